"""The weights that the authors of StableRep published, and bare weights of a vision transformer.

What is in such a file, and where it goes:

    visual.*                                       the backbone, a timm vision transformer
    image_mlp.layer1, bn1, layer2, bn2, layer3     the projection head
    transformer.*, token_embedding.*, ln_final.*,
    positional_embedding, text_projection          the text tower of StableRep+, as open_clip has it
    image_projection, logit_scale                  the image's side of the space that both share

Reference:
    google-research/syn-rep-learn, StableRep/models/StableRep.py and StableRepMM.py.
"""

import argparse
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from stablerep.backbones import ProjectionHead, build_backbone
from stablerep.loading.model import TextSide
from stablerep.loading.weights import describe_keys, fit_weights, strip_prefix
from stablerep.text import TextConfig, Tokenizer, build_text_tower

CLASSIFIER_PREFIX = "head."
_HEAD_WIDTH = 64
_FAMILIES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
_GENERIC = "vit_base_patch16_224"
_MLP_LAYERS = {"layer1": "0", "bn1": "1", "layer2": "3", "bn2": "4", "layer3": "6"}
_TOWER_PARTS = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding")
_TEXT_PARTS = (*_TOWER_PARTS, "text_projection", "image_projection", "logit_scale")


class OfficialModel(NamedTuple):
    """What a file of weights holds.

    Attributes:
        backbone: A timm vision transformer, with the attributes of `build_backbone`.
        projection_head: The image loss's head, where the file has it.
        text: The text tower, where the file has it.
        is_bare: Whether there is a backbone alone, which could be anybody's: the authors' files have more.
    """

    backbone: nn.Module
    projection_head: nn.Module | None
    text: TextSide | None
    is_bare: bool


def read_weights(path: Path) -> dict[str, Any]:
    """What a `.pth` or `.safetensors` file holds, on the CPU; no code that it may hold is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is torn, holds what only code could restore, or no dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        # The authors' files hold their command line, a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            is_mapped = zipfile.is_zipfile(path)  # what nobody asks for, an optimizer's state, is not read
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except (
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        OSError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"checkpoint {path} is not readable: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} holds no weights by name, but a {type(content).__name__}")
    return content


def build_official(content: Mapping[str, Any], where: str, random_init: bool = False) -> OfficialModel:
    """The model whose weights a file holds.

    The transformer follows from their shapes: width, depth, patch and image size, and a head for each 64
    channels of the width.

    Args:
        content: The weights by name, on their own or under `model` or `state_dict`; names may begin with
            `module.` (DistributedDataParallel) and `visual.`.
        where: What messages call the file.
        random_init: Build the same backbone with fresh weights (torch's global seed) and nothing else.

    Raises:
        ValueError: If they are no such weights, or some are missing, unexpected or of another shape; the
            weights of a classifier may be there or not.
    """
    weights = _find_weights(content, where)
    others = {key: value for key, value in weights.items() if not key.startswith("visual.")}
    visual = strip_prefix(weights, "visual.")
    if not visual:
        visual, others = weights, {}
    known = ("image_mlp.", *_TEXT_PARTS)
    if unknown := [key for key in others if not key.startswith(known)]:
        raise ValueError(f"{where} is not understood: {'; '.join(describe_keys('unexpected', unknown))}")
    backbone = _build_vit(visual, where)
    if random_init:
        return OfficialModel(backbone.eval(), None, None, is_bare=not others)
    fit_weights(backbone, visual, where, ignored_prefixes=[CLASSIFIER_PREFIX])
    width = int(backbone.num_features)  # type: ignore[arg-type]
    mlp = strip_prefix(others, "image_mlp.")
    head = _build_mlp(mlp, f"{where}, image_mlp") if mlp else None
    text = None
    if any(key.startswith(_TEXT_PARTS) for key in others):
        text = _build_text(others, width, where)
    return OfficialModel(backbone.eval(), head, text, is_bare=not others)


def _find_weights(content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The weights, wherever they are, without `module.`."""
    found: Any = content
    for name in ("model", "state_dict"):
        if isinstance(content.get(name), Mapping):
            found = content[name]
            break
    weights = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not weights:
        raise ValueError(f"{where} holds no weights: neither itself nor under model or state_dict")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _build_vit(weights: Mapping[str, Tensor], where: str) -> nn.Module:
    """The vision transformer whose shapes the weights have."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in weights]:
        raise ValueError(
            f"{where} is no vision transformer with a class token: {describe_keys('missing', missing)[0]}"
        )
    width = weights["cls_token"].shape[-1]
    patch_size = weights["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    mlp_ratio = weights["blocks.0.mlp.fc1.weight"].shape[0] / width
    num_patches = weights["pos_embed"].shape[1] - 1
    side = round(num_patches**0.5)
    if side * side != num_patches or side == 0:
        raise ValueError(f"{where}: pos_embed must be of a square of patches, got {num_patches} patches")
    if width % _HEAD_WIDTH:
        raise ValueError(f"{where}: the width must be a multiple of {_HEAD_WIDTH}, got {width}")
    family = _FAMILIES.get((width, depth))
    name = f"vit_{family}_patch{patch_size}_224"
    if family is not None and mlp_ratio == 4 and timm.is_model(name):
        return build_backbone(name, side * patch_size)
    options = {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // _HEAD_WIDTH,
        **({} if mlp_ratio == 4 else {"mlp_ratio": mlp_ratio}),
    }
    return build_backbone(_GENERIC, side * patch_size, options)


def _build_mlp(weights: Mapping[str, Tensor], where: str) -> nn.Module:
    """Their MLP as a `ProjectionHead`: the same layers under other names."""
    renamed = {}
    for key, value in weights.items():
        layer, _, rest = key.partition(".")
        renamed[f"{_MLP_LAYERS.get(layer, layer)}.{rest}"] = value
    if missing := [key for key in ("layer1.weight", "layer3.weight") if key not in weights]:
        raise ValueError(f"{where} is not understood: {describe_keys('missing', missing)[0]}")
    hidden_features, in_features = weights["layer1.weight"].shape
    head = ProjectionHead(in_features, hidden_features, weights["layer3.weight"].shape[0])
    fit_weights(head, renamed, where)
    return head


def _build_text(weights: Mapping[str, Tensor], width: int, where: str) -> TextSide:
    """The text tower of StableRep+ and the projections of both sides, linear or MLPs."""
    needed = ("positional_embedding", "token_embedding.weight", "logit_scale", "ln_final.weight")
    if missing := [key for key in needed if key not in weights]:
        raise ValueError(f"{where} has a part of a text tower: {describe_keys('missing', missing)[0]}")
    context_length, text_width = weights["positional_embedding"].shape
    is_linear = "text_projection" in weights
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")}
    config = TextConfig(
        projection="linear" if is_linear else "mlp",
        out_features=weights["text_projection"].shape[1] if is_linear else 1,
        width=text_width,
        num_layers=len(layers),
        num_heads=max(1, text_width // _HEAD_WIDTH),
        context_length=context_length,
    )
    tower = build_text_tower(config)
    image_projection: nn.Module
    text_projection: nn.Module
    tower_weights = {key: value for key, value in weights.items() if key.startswith(_TOWER_PARTS)}
    if is_linear:
        if "image_projection" not in weights:
            raise ValueError(f"{where} has a part of a text tower: missing image_projection")
        tower_weights["text_projection"] = weights["text_projection"]
        image_projection = nn.Linear(width, config.out_features, bias=False)
        fit_weights(image_projection, {"weight": weights["image_projection"].T}, f"{where}, image_projection")
        text_projection = nn.Identity()
    else:
        image_projection = _build_mlp(
            strip_prefix(weights, "image_projection."), f"{where}, image_projection"
        )
        text_projection = _build_mlp(strip_prefix(weights, "text_projection."), f"{where}, text_projection")
    fit_weights(tower, tower_weights, f"{where}, text tower")
    scale = math.exp(weights["logit_scale"].item())
    return TextSide(tower, image_projection, text_projection, Tokenizer(context_length), scale, config)
