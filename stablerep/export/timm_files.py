"""The backbone as timm has it: bare weights, and the config.json that transformers reads too.

Reference: timm, `timm.models._hub`; transformers, `TimmWrapperConfig`.
"""

import json
import math
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from stablerep.loading import InputFormat, LoadedModel

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

_OF_TRAINING = {
    "attn_drop_rate",
    "drop_path_rate",
    "drop_rate",
    "patch_drop_rate",
    "pos_drop_rate",
    "proj_drop_rate",
}
"""Options of a timm model that change no weight and nothing in eval mode."""


def write_timm_files(folder: Path, model: LoadedModel, license_: str) -> None:
    """Writes model.safetensors and config.json.

    Args:
        folder: Where; it exists.
        model: Its backbone is a timm model.
        license_: Of the weights, for both files.
    """
    weights = {name: value.detach().contiguous() for name, value in model.backbone.state_dict().items()}
    # transformers refuses a file that does not say of which framework its tensors are.
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", "license": license_})
    text = json.dumps(build_timm_config(model, license_), indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")


def build_timm_config(model: LoadedModel, license_: str) -> dict[str, Any]:
    """What timm builds the model and its transform from."""
    form, backbone = model.input_format, model.backbone
    model_args = build_model_args(model)
    return {
        "architecture": bare_architecture(model),
        "num_classes": 0,
        "num_features": int(backbone.num_features),  # type: ignore[arg-type]
        "global_pool": "token",
        **({"model_args": model_args} if model_args else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, form.image_size, form.image_size],
            "fixed_input_size": True,
            "interpolation": form.interpolation,
            "crop_pct": find_crop_pct(form),
            "crop_mode": "center",
            "mean": list(form.mean),
            "std": list(form.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": license_,
        },
    }


def bare_architecture(model: LoadedModel) -> str:
    """timm's name without the tag of pretrained weights."""
    return model.architecture.partition(".")[0]


def build_model_args(model: LoadedModel) -> dict[str, Any]:
    """What the model has been built with beside timm's defaults; empty where the name says it all."""
    options = read_structure(model)
    default_size = timm.get_pretrained_cfg(bare_architecture(model)).input_size[-1]  # type: ignore[union-attr]
    if model.input_format.image_size != default_size:
        options = {"img_size": model.input_format.image_size, **options}
    return options


def read_structure(model: LoadedModel) -> dict[str, Any]:
    """The options that change weights or outputs."""
    options: dict[str, Any] = dict(model.backbone.backbone_options)  # type: ignore[arg-type]
    return {name: value for name, value in options.items() if name not in _OF_TRAINING}


def find_crop_pct(form: InputFormat) -> float:
    """The crop that makes timm, which rounds ⌊size / crop_pct⌋ down, resize to `form.resize_size`."""
    crop_pct = form.image_size / form.resize_size
    while math.floor(form.image_size / crop_pct) < form.resize_size:
        crop_pct = math.nextafter(crop_pct, 0)
    return crop_pct
