"""SHA256SUMS: what `sha256sum -c` compares a folder with."""

import hashlib
from pathlib import Path

CHECKSUMS_FILE = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Writes the digests of all other files of the folder, by name."""
    lines = [
        f"{_digest(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != CHECKSUMS_FILE
    ]
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")


def find_change(folder: Path) -> str | None:
    """What the folder holds that is not as `write_checksums` found it, in words; None if nothing is."""
    if not (folder / CHECKSUMS_FILE).is_file():
        return f"holds no {CHECKSUMS_FILE}"
    lines = (folder / CHECKSUMS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for path in sorted(folder.iterdir()):
        if path.name == CHECKSUMS_FILE:
            continue
        if path.name not in listed or not path.is_file():
            return f"holds {path.name}, which {CHECKSUMS_FILE} does not list"
        if _digest(path) != listed[path.name]:
            return f"holds {path.name}, which is not what {CHECKSUMS_FILE} says"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
