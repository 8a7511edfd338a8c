"""The upload to the Hugging Face hub."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import huggingface_hub.utils

from stablerep.export.checksums import CHECKSUMS_FILE, write_checksums
from stablerep.loading.clip_models import OPEN_CLIP_CONFIG
from stablerep.loading.timm_models import HUB, LOCAL_FOLDER

TAG = "stablerep"
"""What the cards of exports are tagged with, and so their repositories."""

_OF_THE_HUB = ".gitattributes"


def check_repository(repository: str) -> None:
    """Refuses what is no id of a repository.

    Raises:
        ValueError: If it is not ORG/NAME.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except huggingface_hub.errors.HFValidationError as error:
        raise ValueError(f"push must be ORG/NAME, got {repository}") from error
    if repository.count("/") != 1:
        raise ValueError(f"push must be ORG/NAME, got {repository}")


def check_push(repository: str, *, private: bool, overwrite: bool) -> None:
    """Refuses an upload that could not be, before the work.

    Args:
        repository: ORG/NAME; it need not be there.
        private: Whether it must be a private one.
        overwrite: Whether an earlier export there may be replaced.

    Raises:
        ValueError: If there is no token.
        OSError: If the hub is out of reach, or the repository is public, another model's, or an export's.
    """
    if huggingface_hub.get_token() is None:
        raise ValueError("push needs a token of the Hugging Face hub: hf auth login")
    try:
        _check_repository(_open_hub(), repository, private, overwrite)
    except huggingface_hub.errors.RepositoryNotFoundError:
        return
    except Exception as error:  # the hub's client hands on what its library for requests raises
        raise OSError(f"cannot push to {repository}: {_reason(error)}") from error


def push_folder(
    folder: Path, repository: str, own_files: Collection[str], *, private: bool, overwrite: bool
) -> str:
    """Uploads an export in one commit.

    Where open_clip's file names the folder, it names the repository there.

    Args:
        folder: The export; it stays as it is.
        repository: ORG/NAME; made if it is not there.
        own_files: The names that exports have: those of an earlier one that this has not are deleted.
        private: Whether it is made a private one; one that is public already gets nothing.
        overwrite: Whether an earlier export there may be replaced.

    Returns:
        The repository's address.

    Raises:
        OSError: If the hub refuses or is out of reach, or the repository is public, another model's, or an
            export's.
    """
    api = _open_hub()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent) as temporary:
        copy = Path(temporary) / folder.name
        shutil.copytree(folder, copy, copy_function=_link)
        _name_repository(copy, repository)
        try:
            # Of a repository that is there already, the hub does not look at what `private` asks for.
            address = api.create_repo(repository, private=private, exist_ok=True)
            _check_repository(api, repository, private, overwrite)
            api.upload_folder(
                repo_id=repository,
                folder_path=copy,
                commit_message="Model exported by stablerep",
                delete_patterns=sorted(own_files),
            )
        except Exception as error:  # the hub's client hands on what its library for requests raises
            raise OSError(
                f"{folder} is written, but not pushed to {repository}: {_reason(error)}; the same command "
                "with --overwrite tries again"
            ) from error
    return str(address)


def _open_hub() -> Any:
    return huggingface_hub.HfApi(library_name="stablerep")


def _check_repository(api: Any, repository: str, private: bool, overwrite: bool) -> None:
    """Refuses what would publish, or replace files, against the user's word."""
    found = api.model_info(repository)
    if private and not found.private:
        raise ValueError("it is a public repository, and --private asks for a private one")
    names = {sibling.rfilename for sibling in found.siblings or []} - {_OF_THE_HUB}
    if names and TAG not in (found.tags or []):
        raise ValueError(f"it holds {min(names)}, and no card with the tag {TAG}: name another repository")
    if names and not overwrite:
        raise ValueError("it holds an export: name another repository, or --overwrite it")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _name_repository(folder: Path, repository: str) -> None:
    path = folder / OPEN_CLIP_CONFIG
    if not path.is_file():
        return
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vision = content["model_cfg"]["vision_cfg"]
    if not vision["timm_model_name"].startswith(LOCAL_FOLDER):
        return
    vision["timm_model_name"] = f"{HUB}{repository}"
    path.unlink()  # the name may be a link to the export's own file
    path.write_text(f"{json.dumps(content, indent=2, ensure_ascii=False)}\n", encoding="utf-8")
    (folder / CHECKSUMS_FILE).unlink()
    write_checksums(folder)
