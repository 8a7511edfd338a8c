"""Models of timm: by name, from a folder with config.json, or from the hub."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import timm.data
from safetensors import safe_open
from torch import nn

from stablerep.loading.model import InputFormat, LoadedModel, describe_resizing
from stablerep.loading.weights import describe_keys, describe_shapes

TIMM_CONFIG, TIMM_WEIGHTS = "config.json", "model.safetensors"
LOCAL_FOLDER, HUB = "local-dir:", "hf-hub:"
"""What timm and open_clip call a folder, and a repository of the hub."""
_MISSING, _UNEXPECTED = "Missing key(s) in state_dict:", "Unexpected key(s) in state_dict:"


def load_timm(name: str, source: str, *, random_init: bool) -> LoadedModel:
    """A model of timm without its classifier.

    Args:
        name: What the user gave.
        source: A name of timm, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        random_init: Fresh weights (torch's global seed).

    Raises:
        ValueError: If timm cannot build it, or weights other than the classifier's are missing, unexpected,
            or of another shape in a folder or on the hub.
    """
    model: Any = _create(name, source, not random_init)
    if not random_init:
        _check_shapes(name, source, model)
    if getattr(model, "num_classes", 0):
        model.reset_classifier(0)
    settings = timm.data.resolve_model_data_config(model)
    return LoadedModel(
        name=name,
        architecture=str(model.pretrained_cfg.get("architecture") or source),
        kind="timm",
        backbone=model,
        input_format=read_input_format(settings, name),
        remarks=describe_resizing(name, settings.get("crop_mode") or "center", "center"),
    )


def _create(name: str, source: str, pretrained: bool) -> nn.Module:
    """As timm builds it; strictly, so that no weight is left at random but a classifier that is not there."""
    try:
        return timm.create_model(source, pretrained=pretrained)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AssertionError, AttributeError) as error:
        text = str(error)
        missing, unexpected = _keys_after(text, _MISSING), _keys_after(text, _UNEXPECTED)
        if missing and not unexpected and "size mismatch" not in text:
            bare: Any = timm.create_model(source, pretrained=False)
            classifiers = bare.pretrained_cfg.get("classifier") or "head"
            prefixes = [classifiers] if isinstance(classifiers, str) else list(classifiers)
            if all(key.startswith(tuple(f"{prefix}." for prefix in prefixes)) for key in missing):
                return timm.create_model(source, pretrained=True, num_classes=0)
        keys = "; ".join([*describe_keys("missing", missing), *describe_keys("unexpected", unexpected)])
        reason = keys or " ".join(text.split())[:300] or type(error).__name__
        raise ValueError(f"{name}: timm cannot load it: {reason}") from error


def _check_shapes(name: str, source: str, model: nn.Module) -> None:
    """Refuses what timm would interpolate: position embeddings of another image size."""
    path = _find_weights(source)
    if path is None:
        return
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    with safe_open(path, "pt") as file:
        given = {key: list(file.get_slice(key).get_shape()) for key in file.keys() if key in own}  # noqa: SIM118
    if shapes := describe_shapes(given, own):
        raise ValueError(f"{name}: its weights are not those of its {TIMM_CONFIG}: {'; '.join(shapes)}")


def _find_weights(source: str) -> Path | None:
    """The file of safetensors that timm has read; None for a name of timm, or a file of another kind."""
    if source.startswith(LOCAL_FOLDER):
        path = Path(source.removeprefix(LOCAL_FOLDER), TIMM_WEIGHTS)
        return path if path.is_file() else None
    if not source.startswith(HUB):
        return None
    repository, _, revision = source.removeprefix(HUB).partition("@")
    found = huggingface_hub.try_to_load_from_cache(repository, TIMM_WEIGHTS, revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def is_timm_config(path: Path) -> bool:
    """Whether a config.json is timm's: transformers gives its own the same name.

    Raises:
        ValueError: If it is no JSON.
    """
    return bool(_read_pretrained_cfg(path))


def read_folder_format(folder: Path) -> InputFormat:
    """The input format of a folder of timm.

    Raises:
        ValueError: If it is no such folder, or the input is not square.
    """
    settings = _read_pretrained_cfg(folder / TIMM_CONFIG)
    if not settings:
        raise ValueError(f"{folder / TIMM_CONFIG} is not timm's: it has no pretrained_cfg")
    return read_input_format(settings, str(folder))


def _read_pretrained_cfg(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    found = content.get("pretrained_cfg") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def read_input_format(settings: Mapping[str, Any], name: str) -> InputFormat:
    """The input format of timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.

    timm rounds the resized side down; the crop fraction here is that of the side which it takes.

    Args:
        settings: timm's, complete or not; what is missing is ImageNet's.
        name: What messages call the model.

    Raises:
        ValueError: If the input is not square, or has not three channels.
    """
    channels, height, width = settings.get("input_size") or (3, 224, 224)
    if channels != 3 or height != width:
        raise ValueError(
            f"{name} takes {channels} x {height} x {width} images, not square ones of 3 channels"
        )
    resize_size = max(height, math.floor(height / (settings.get("crop_pct") or 0.875)))
    interpolation = settings.get("interpolation") or "bicubic"
    return InputFormat(
        image_size=height,
        mean=tuple(settings.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN),
        std=tuple(settings.get("std") or timm.data.IMAGENET_DEFAULT_STD),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_fraction=height / resize_size,
    )


def _keys_after(text: str, heading: str) -> list[str]:
    """The quoted names in the line of torch's message that begins with the heading."""
    _, found, rest = text.partition(heading)
    return re.findall(r'"([^"]+)"', rest.partition("\n")[0]) if found else []
