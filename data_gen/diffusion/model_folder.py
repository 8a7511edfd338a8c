"""A model's folder before it is loaded: what identifies it, and what is refused.

Loading is where a stranger's model could run code: by Python files beside the weights, and by weights that
are pickles. Neither is touched unless the user asks for it by name. Light to import.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX_NAME = "model_index.json"

_IDENTITY_SUFFIXES = {".json", ".model", ".py", ".safetensors", ".txt"}
_PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def digest_model(folder: Path) -> str:
    """sha256 over names and contents of a model's weights, tokenizer, settings and code, 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if _identifies(path)):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\n{content}\n".encode())
    return digest.hexdigest()


def check_pipeline_folder(folder: Path, trust_remote_code: bool, allow_pickle: bool) -> None:
    """Refuses a pipeline that would run code of its own, and names what it lacks.

    Args:
        folder: A diffusers pipeline.
        trust_remote_code: Accept code in the folder.
        allow_pickle: Accept weights that are not safetensors.

    Raises:
        FileNotFoundError: The index or a tokenizer is missing.
        OSError: The index cannot be read.
        ValueError: The folder holds code or pickled weights that were not asked for.
    """
    index = _read_index(folder)
    parts = [name for name, value in index.items() if _is_part(value)]
    if not trust_remote_code and (code := next(_find_code(folder, index), None)):
        raise ValueError(
            f"model folder {folder} runs code of its own ({code}); trust_remote_code must be true to load it"
        )
    for name in parts:
        if not allow_pickle:
            check_weights(folder / name)
        if name.startswith("tokenizer") and not _has_files(folder / name):
            state = "is empty" if (folder / name).is_dir() else "is missing"
            raise FileNotFoundError(
                f"model folder {folder} has no tokenizer: {INDEX_NAME} names {name}, and the folder {name} "
                f"{state}"
            )


def check_weights(folder: Path) -> None:
    """Refuses a folder with pickled weights and no others.

    Raises:
        ValueError: There are such weights; the first is named.
    """
    if pickled := _list_pickled_weights(folder):
        raise ValueError(
            f"{pickled[0]} is a pickle, which can run code when it is read, and there is no .safetensors "
            "beside it; allow_pickle must be true to load it"
        )


def forbid_remote_code() -> None:
    """Keeps diffusers from running code that comes with a model; to be called before it is imported."""
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"model folder {folder} holds no diffusers pipeline: {INDEX_NAME} is missing")
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise OSError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise OSError(f"{path} names no pipeline: _class_name is missing")
    return index


def _is_part(value: Any) -> bool:
    """Whether an entry of the index is a [library, class] that is loaded from a folder of its own."""
    return isinstance(value, list) and len(value) == 2 and value[0] is not None


def _find_code(folder: Path, index: dict[str, Any]) -> Iterator[str]:
    """What the index has loaded that is neither diffusers' nor transformers' own."""
    if isinstance(index["_class_name"], list):
        yield f"{INDEX_NAME}: _class_name is {index['_class_name']}"
    if "custom_pipeline" in index:
        yield f"{INDEX_NAME}: custom_pipeline is {index['custom_pipeline']}"
    for name, value in index.items():
        if name.startswith("_") or not _is_part(value):
            continue
        if (folder / name / f"{value[0]}.py").is_file():
            yield f"{name}/{value[0]}.py"
        for path in sorted((folder / name).glob("*config.json")):
            if "auto_map" in path.read_text(encoding="utf-8", errors="replace"):
                yield f"{name}/{path.name}: auto_map"


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _list_pickled_weights(folder: Path) -> list[Path]:
    """Pickles in a folder without safetensors: the ones that would be loaded."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(path for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES)


def _identifies(path: Path) -> bool:
    return path.suffix in _IDENTITY_SUFFIXES or path in _list_pickled_weights(path.parent)
