"""The timm vision encoder, the projection head, and the reading of a backbone out of a checkpoint.

`features` are the class token after the final norm (probed); `embeddings` come out of the head (in the loss).
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from stablerep.arguments import suggest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BACKBONE_SCHEMA_VERSION = 1
_CHECKPOINT_KEY = "stablerep_backbone"

ProjectionNorm = Literal["batchnorm_per_view", "batchnorm_all_views", "layernorm"]


def build_backbone(name: str, image_size: int, backbone_options: dict[str, Any] | None = None) -> nn.Module:
    """A timm vision transformer whose forward is the class token after the final norm.

    Args:
        name: timm model name, such as `vit_base_patch16_224`.
        image_size: Side of the square input, pixels.
        backbone_options: Further keyword arguments of the timm model: patch_size, embed_dim, depth,
            num_heads, drop_path_rate.

    Shapes:
        forward: images [N, 3, image_size, image_size] -> features [N, num_features]

    Returns:
        The model with the attributes architecture, backbone_options, image_size, mean, std, num_features.

    Raises:
        ValueError: If timm does not know the name, refuses the options, or the model has no class token.
    """
    options = dict(backbone_options or {})
    if not timm.is_model(name):
        raise ValueError(f"backbone {name!r} is not known to timm{suggest(name, timm.list_models())}")
    if clash := sorted(options.keys() & {"img_size", "num_classes", "pretrained"}):
        raise ValueError(f"backbone_options must not hold {clash[0]}; image_size is an option of its own")
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=0, img_size=image_size, **options
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"backbone {name} refuses image_size {image_size}, {options}: {error}") from error
    if getattr(model, "cls_token", None) is None or getattr(model, "global_pool", None) != "token":
        raise ValueError(f"backbone {name} does not pool a class token; vit_base_patch16_224 does")
    attributes: dict[str, Any] = {
        "architecture": name,
        "backbone_options": options,
        "image_size": image_size,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    for key, value in attributes.items():
        setattr(model, key, value)
    return model


class ProjectionHead(nn.Sequential):
    """D → hidden → hidden → out: Linear, norm, ReLU, Linear, norm, ReLU, Linear.

    The module turns BatchNorm into SyncBatchNorm when ranks hold accelerators; torch has none for CPU ranks,
    whose statistics are each rank's own.

    Args:
        in_features: Width of the backbone's features.
        hidden_features: Width of the two hidden layers.
        out_features: Width of the embeddings.
        norm: "batchnorm_per_view" (published) takes BatchNorm's statistics over one view of each caption,
            "batchnorm_all_views" over all images of the rank; "layernorm" normalises each image by itself.

    Reference:
        Tian et al., StableRep, arXiv 2306.00984, appendix.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 4096,
        out_features: int = 256,
        norm: ProjectionNorm = "batchnorm_per_view",
    ) -> None:
        norm_layer = nn.LayerNorm if norm == "layernorm" else nn.BatchNorm1d
        super().__init__(
            nn.Linear(in_features, hidden_features),
            norm_layer(hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, hidden_features),
            norm_layer(hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, out_features),
        )
        self.norm = norm

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings, of all views of each caption, or of images that belong to no caption.

        Shapes:
            features [num_captions, num_views, D] -> [num_captions, num_views, out_features]
            features [N, D] -> [N, out_features]
        """
        x = features if features.ndim == 3 else features[:, None]
        for layer in self:
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                if self.norm == "batchnorm_per_view":
                    x = torch.stack([layer(view) for view in x.unbind(dim=1)], dim=1)
                else:
                    x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            else:
                x = layer(x)
        return x if features.ndim == 3 else x.squeeze(1)


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """What `load_backbone` needs beside the weights, in plain types, for the checkpoint."""
    return {
        "schema_version": BACKBONE_SCHEMA_VERSION,
        "architecture": backbone.architecture,
        "backbone_options": dict(backbone.backbone_options),  # type: ignore[arg-type]
        "image_size": backbone.image_size,
        "mean": list(backbone.mean),  # type: ignore[arg-type]
        "std": list(backbone.std),  # type: ignore[arg-type]
    }


def add_backbone_to_checkpoint(checkpoint: dict[str, Any], backbone: nn.Module) -> None:
    """Records the backbone's description in a Lightning checkpoint, in place."""
    checkpoint[_CHECKPOINT_KEY] = describe_backbone(backbone)


def load_backbone(checkpoint: str | Path, *, random_init: bool = False, ema: bool = False) -> nn.Module:
    """The backbone of a checkpoint that `stablerep fit` wrote, in eval mode, on the CPU.

    Args:
        checkpoint: Path of the checkpoint; web addresses are refused.
        random_init: Build the same architecture with fresh weights (torch's global seed) instead.
        ema: Take the moving average of the weights (`model.ema_decay`) in place of the weights.

    Returns:
        The timm model with the attributes architecture, image_size, mean, std, num_features.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint of this project, its weights do not fit, or it has no
            moving average and `ema` asks for it.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")
    return build_from_checkpoint(read_checkpoint(path), path, random_init=random_init, ema=ema)


def build_from_checkpoint(
    content: Mapping[str, Any], path: Path, *, random_init: bool = False, ema: bool = False
) -> nn.Module:
    """The backbone of a checkpoint that is read already; `load_backbone` says the rest."""
    description = content[_CHECKPOINT_KEY]
    if description.get("schema_version") != BACKBONE_SCHEMA_VERSION:
        raise ValueError(
            f"checkpoint {path} has backbone schema {description.get('schema_version')}, "
            f"expected {BACKBONE_SCHEMA_VERSION}"
        )
    backbone = build_backbone(
        description["architecture"], description["image_size"], description["backbone_options"]
    )
    backbone.mean = tuple(description["mean"])  # type: ignore[assignment]
    backbone.std = tuple(description["std"])  # type: ignore[assignment]
    if not random_init:
        prefix = "ema_backbone." if ema else "backbone."
        state = content["state_dict"]
        weights = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        if ema and not weights:
            raise ValueError(f"checkpoint {path} has no moving average of its weights: ema needs ema_decay")
        try:
            backbone.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"checkpoint {path} does not fit its architecture: {reason}") from error
    return backbone.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of `stablerep fit` holds, on the CPU; no code that it may hold is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is torn, or no checkpoint of this project.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"checkpoint {path} is not readable: {reason}") from error
    if not is_checkpoint(content):
        raise ValueError(f"checkpoint {path} is of another model: it has no {_CHECKPOINT_KEY} entry")
    found: dict[str, Any] = content
    return found


def is_checkpoint(content: Any) -> bool:
    """Whether what a file holds is a checkpoint of `stablerep fit`."""
    return isinstance(content, dict) and {_CHECKPOINT_KEY, "state_dict"} <= content.keys()
