"""Both towers as open_clip has them.

    ours                                    open_clip's CLIP with an image tower of timm
    backbone.*                              visual.trunk.*
    text_head.image_projection.weight       visual.head.proj.weight
    text_tower.*                            the same names, at the top
    text_head.logit_scale [1]               logit_scale []

open_clip builds an image tower of timm from a name alone. A backbone that such a name does not describe is
named by its folder instead (`local-dir:`), whose config.json says the rest, or by its id on the hub. The
folder is named as the user does, never by the way to it on this machine.
"""

import json
import math
import re
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stablerep.export.timm_files import bare_architecture, read_structure
from stablerep.loading import LoadedModel
from stablerep.loading.clip_models import OPEN_CLIP_CONFIG
from stablerep.text import VOCABULARY_SIZE

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


def refuse_reason(model: LoadedModel) -> str | None:
    """Why open_clip cannot hold the model; None if it can."""
    if model.text is None or model.text.config is None:
        return "the model has no text tower"
    if not isinstance(model.text.image_projection, nn.Linear):
        return (
            "open_clip has no MLP behind its towers, which this model has (model.text.projection mlp); one "
            "that was trained with projection linear can be written"
        )
    return None


def find_image_tower(model: LoadedModel) -> str | None:
    """The name by which timm builds the very same backbone; None if no name does."""
    if read_structure(model):
        return None
    name = bare_architecture(model)
    sibling = re.sub(r"_\d+$", f"_{model.input_format.image_size}", name)
    shapes = {key: value.shape for key, value in model.backbone.state_dict().items()}
    for candidate in dict.fromkeys([name, sibling]):
        if not timm.is_model(candidate):
            continue
        with torch.device("meta"):
            built = timm.create_model(candidate, num_classes=0)
        if {key: value.shape for key, value in built.state_dict().items()} == shapes:
            return candidate
    return None


def write_open_clip_weights(folder: Path, model: LoadedModel, license_: str) -> None:
    """Writes open_clip_model.safetensors.

    Args:
        folder: Where; it exists.
        model: One that `refuse_reason` does not refuse.
        license_: Of the weights.
    """
    text = model.text
    assert text is not None
    weights: dict[str, Tensor] = {f"visual.trunk.{k}": v for k, v in model.backbone.state_dict().items()}
    weights["visual.head.proj.weight"] = text.image_projection.state_dict()["weight"]
    weights |= text.tower.state_dict()
    weights["logit_scale"] = torch.tensor(math.log(text.logit_scale))
    weights = {name: value.detach().contiguous() for name, value in weights.items()}
    save_file(weights, folder / OPEN_CLIP_WEIGHTS, metadata={"format": "pt", "license": license_})


def write_open_clip_config(folder: Path, model: LoadedModel, image_tower: str) -> None:
    """Writes open_clip_config.json.

    Args:
        folder: Where; it exists.
        model: One that `refuse_reason` does not refuse.
        image_tower: What timm builds the backbone from.
    """
    assert model.text is not None
    config = model.text.config
    assert config is not None
    form = model.input_format
    content = {
        "model_cfg": {
            "embed_dim": config.out_features,
            "quick_gelu": config.quick_gelu,  # of the text tower; those of timm have their own
            "vision_cfg": {
                "timm_model_name": image_tower,
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": "linear",
                "image_size": form.image_size,
            },
            "text_cfg": {
                "context_length": config.context_length,
                "vocab_size": VOCABULARY_SIZE,
                "width": config.width,
                "heads": config.num_heads,
                "layers": config.num_layers,
            },
        },
        "preprocess_cfg": {
            "mean": list(form.mean),
            "std": list(form.std),
            "interpolation": form.interpolation,
            "resize_mode": "shortest",
        },
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / OPEN_CLIP_CONFIG).write_text(f"{text}\n", encoding="utf-8")
