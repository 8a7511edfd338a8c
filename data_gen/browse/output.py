"""The folder of the pages: whose it is, and how one build of them takes the place of another."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWNER_NAME = "browse.json"
PAGE_NAME = "index.html"
_OWNER = {"written_by": "stablerep browse"}
_BUILD_NAME = re.compile(r"build-(\d+)")


def claim_folder(output: str) -> Path:
    """Makes the folder if need be, and marks it as one of pages.

    Raises:
        ValueError: It holds something that this command has not written, or is a URL.
        OSError: It cannot be made.
    """
    if "://" in output:
        raise ValueError(f"output must be a folder of this machine, got {output}")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / OWNER_NAME
    others = {path.name for path in folder.iterdir()} - {_temporary(owner).name}
    if others and not _is_owner(owner):
        raise ValueError(f"output {folder} is not empty and holds no pages of this command")
    _replace(owner, (json.dumps(_OWNER) + "\n").encode())
    return folder


@contextmanager
def open_build(output: Path) -> Iterator[Path]:
    """A new folder beside the builds that are there; removed again if it does not come to `publish_page`."""
    number = 1 + max((number for number, _ in _list_builds(output)), default=0)
    build = output / f"build-{number}"
    build.mkdir()
    try:
        yield build
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise


def publish_page(output: Path, build: Path, page: bytes) -> None:
    """Puts `index.html` in place, which from then on loads `build`; then removes every other build."""
    _replace(output / PAGE_NAME, page)
    for _, other in _list_builds(output):
        if other != build:
            shutil.rmtree(other)


def _is_owner(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes()) == _OWNER)
    except (OSError, ValueError):
        return False


def _list_builds(output: Path) -> list[tuple[int, Path]]:
    matches = [(_BUILD_NAME.fullmatch(path.name), path) for path in output.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _replace(path: Path, content: bytes) -> None:
    temporary = _temporary(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
