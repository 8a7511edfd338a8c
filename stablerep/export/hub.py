"""The upload to the Hugging Face hub."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import huggingface_hub.utils

from stablerep.export.checksums import CHECKSUMS_FILE, write_checksums
from stablerep.loading.clip_models import HUB, LOCAL_FOLDER, OPEN_CLIP_CONFIG


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


def push_folder(folder: Path, repository: str, *, private: bool = False) -> str:
    """Uploads an export in one commit.

    Where open_clip's file names the folder, it names the repository there.

    Args:
        folder: The export; it stays as it is.
        repository: ORG/NAME; made if it is not there.
        private: Whether it is made a private one.

    Returns:
        The repository's address.

    Raises:
        OSError: If the hub refuses, or is out of reach.
    """
    api = huggingface_hub.HfApi(library_name="stablerep")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent) as temporary:
        copy = Path(temporary) / folder.name
        shutil.copytree(folder, copy, copy_function=_link)
        _name_repository(copy, repository)
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=copy, commit_message="Model exported by stablerep"
            )
        except (huggingface_hub.errors.HfHubHTTPError, ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OSError(f"{folder} is written, but not pushed to {repository}: {reason}") from error
    return str(address)


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
