"""Models by path or name: one function for every form in which a vision encoder comes.

our checkpoint                      runs/fit/checkpoints/last.ckpt
the authors' weights                cc12m_1x.pth
bare weights                        FILE with a vision transformer's weights, its heads and input assumed
a model of timm                     vit_small_patch16_224.augreg_in21k
a folder that timm can load         DIR with config.json
a model on the hub                  hf-hub:ORG/NAME
a model of open_clip                open_clip:ViT-B-32/laion2b_s34b_b79k, open_clip:ViT-B-32/FILE
a folder that open_clip can load    DIR with open_clip_config.json
"""

import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from stablerep.arguments import suggest
from stablerep.backbones import ProjectionHead, build_from_checkpoint, is_checkpoint
from stablerep.loading.clip_models import OPEN_CLIP_CONFIG, load_open_clip
from stablerep.loading.model import EvaluationTransform, InputFormat, LoadedModel, TextSide, digest_weights
from stablerep.loading.official import build_official, read_weights
from stablerep.loading.timm_models import (
    HUB,
    LOCAL_FOLDER,
    TIMM_CONFIG,
    TIMM_WEIGHTS,
    is_timm_config,
    load_timm,
)
from stablerep.loading.weights import describe_keys, fit_weights, strip_prefix
from stablerep.text import ImageTextHead, TextConfig, Tokenizer, build_text_tower

__all__ = [
    "EvaluationTransform",
    "InputFormat",
    "LoadedModel",
    "TextSide",
    "digest_weights",
    "load_model",
]

logger = logging.getLogger(__name__)

_CHECKPOINT_PARTS = ("backbone.", "ema_backbone.", "projection_head.", "text_tower.", "text_head.", "queue.")


def load_model(path_or_id: str | Path, *, ema: bool = False, random_init: bool = False) -> LoadedModel:
    """A frozen model in eval mode, on the CPU, from any of the forms above.

    Args:
        path_or_id: A file, a folder or a name.
        ema: Take the moving average of the backbone's weights (`model.ema_decay`) in place of the weights;
            heads and text tower have none, they are those of the last step. Our checkpoints alone.
        random_init: The same backbone with fresh weights (torch's global seed); neither heads nor text tower.

    Raises:
        FileNotFoundError: If a file or folder is not there.
        ValueError: If the form is not understood, or weights other than a classifier's are missing,
            unexpected or of another shape; names them.
    """
    name = str(path_or_id)
    if ema and random_init:
        raise ValueError("ema and random_init exclude each other: fresh weights have no average")
    path = Path(name.removeprefix(LOCAL_FOLDER))
    if not name.startswith("open_clip:") and path.is_file():
        return _load_file(name, path, ema, random_init)
    if ema:
        _refuse_missing(name, path)
        raise ValueError(f"ema needs a checkpoint of stablerep fit with a moving average, got {name}")
    if name.startswith("open_clip:"):
        return load_open_clip(name, random_init=random_init)
    if path.is_dir():
        return _load_folder(name, path, random_init)
    if name.startswith(HUB) or timm.is_model(name):
        return load_timm(name, name, random_init=random_init)
    _refuse_missing(name, path)
    raise ValueError(
        f"model {name!r} is no file, no folder and no name of timm{suggest(name, timm.list_models())}; a "
        "model on the hub is hf-hub:ORG/NAME, one of open_clip open_clip:ARCHITECTURE/TAG"
    )


def _refuse_missing(name: str, path: Path) -> None:
    """What looks like a path is one."""
    if "://" in name:
        raise ValueError(f"checkpoint must be a local file, got {name}")
    if name.startswith((HUB, "open_clip:")) or path.exists() or timm.is_model(name):
        return
    if "/" in name or path.suffix in (".ckpt", ".pth", ".pt", ".bin", ".safetensors"):
        hint = f"; a model on the hub is {HUB}{name}" if name.count("/") == 1 and not path.suffix else ""
        raise FileNotFoundError(f"checkpoint {name} does not exist{hint}")


def _load_file(name: str, path: Path, ema: bool, random_init: bool) -> LoadedModel:
    if path.name == TIMM_WEIGHTS and is_timm_config(path.parent / TIMM_CONFIG) and not ema:
        return load_timm(name, f"{LOCAL_FOLDER}{path.parent}", random_init=random_init)
    content = read_weights(path)
    if is_checkpoint(content):
        return _load_checkpoint(name, path, content, ema, random_init)
    if ema:
        raise ValueError(f"ema needs a checkpoint of stablerep fit with a moving average, got {name}")
    found = build_official(content, f"checkpoint {path}", random_init)
    if found.is_bare:
        logger.warning(
            "%s says neither how many heads it has nor what its input is: heads of 64 channels, ImageNet's "
            "mean and deviation, and a crop of 224/256 are assumed",
            name,
        )
    return LoadedModel(
        name=name,
        architecture=str(found.backbone.architecture),
        kind="weights" if found.is_bare else "stablerep",
        backbone=found.backbone,
        input_format=_our_input_format(found.backbone),
        projection_head=found.projection_head,
        text=found.text,
    )


def _load_checkpoint(
    name: str, path: Path, content: Mapping[str, Any], ema: bool, random_init: bool
) -> LoadedModel:
    where = f"checkpoint {path}"
    weights: Mapping[str, Tensor] = content["state_dict"]
    if unknown := [key for key in weights if not key.startswith(_CHECKPOINT_PARTS)]:
        raise ValueError(f"{where} is not understood: {describe_keys('unexpected', unknown)[0]}")
    backbone = build_from_checkpoint(content, path, random_init=random_init, ema=ema)
    head, text = None, None
    if not random_init:
        head = _build_projection_head(strip_prefix(weights, "projection_head."), where)
        if any(key.startswith(("text_tower.", "text_head.")) for key in weights):
            text = _build_text_side(content, int(backbone.num_features), where)  # type: ignore[arg-type]
    return LoadedModel(
        name=name,
        architecture=str(backbone.architecture),
        kind="checkpoint",
        backbone=backbone,
        input_format=_our_input_format(backbone),
        projection_head=head,
        text=text,
    )


def _our_input_format(backbone: Any) -> InputFormat:
    """Evaluation's: the shorter side to 256/224 of the size in whole pixels, bicubic, the central square."""
    size = int(backbone.image_size)
    return InputFormat(
        size, tuple(backbone.mean), tuple(backbone.std), crop_fraction=size / round(size * 256 / 224)
    )


def _build_projection_head(weights: Mapping[str, Tensor], where: str) -> nn.Module | None:
    """The head that the shapes of its weights describe; None where there is none."""
    if not weights:
        return None
    if missing := [key for key in ("0.weight", "6.weight") if key not in weights]:
        raise ValueError(f"{where}, projection head: {describe_keys('missing', missing)[0]}")
    hidden_features, in_features = weights["0.weight"].shape
    norm = "batchnorm_per_view" if "1.running_mean" in weights else "layernorm"
    head = ProjectionHead(
        in_features,
        hidden_features,
        weights["6.weight"].shape[0],
        norm,  # type: ignore[arg-type]
    )
    fit_weights(head, weights, f"{where}, projection head")
    return head


def _build_text_side(content: Mapping[str, Any], width: int, where: str) -> TextSide:
    """The text tower and the projections of both sides, as the hyper-parameters describe them."""
    settings = (content.get("hyper_parameters") or {}).get("text")
    if settings is None:
        raise ValueError(f"{where} has a text tower, but its hyper-parameters do not describe it")
    try:
        config = TextConfig(**settings)
    except TypeError as error:
        raise ValueError(f"{where}: its text tower is not understood: {error}") from error
    tower, head = build_text_tower(config), ImageTextHead(width, config)
    fit_weights(tower, strip_prefix(content["state_dict"], "text_tower."), f"{where}, text tower")
    fit_weights(head, strip_prefix(content["state_dict"], "text_head."), f"{where}, text head")
    return TextSide(
        tower,
        head.image_projection,
        head.text_projection,
        Tokenizer(config.context_length),
        math.exp(head.logit_scale.item()),
        config,
    )


def _load_folder(name: str, folder: Path, random_init: bool) -> LoadedModel:
    has_timm = is_timm_config(folder / TIMM_CONFIG)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        if importlib.util.find_spec("open_clip") is not None or not has_timm:
            model = load_open_clip(str(folder), random_init=random_init)
            model.name = name
            return model
        logger.warning("%s: open_clip is not installed, so its text tower is left out", name)
    if (folder / TIMM_CONFIG).is_file():
        return load_timm(name, f"{LOCAL_FOLDER}{folder}", random_init=random_init)
    last = folder / "checkpoints" / "last.ckpt"
    hint = f"; its checkpoint is {last}" if last.is_file() else ""
    raise ValueError(f"folder {folder} has neither {TIMM_CONFIG} nor {OPEN_CLIP_CONFIG}{hint}")
