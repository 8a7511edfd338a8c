"""A model for evaluation and export: its features, the space it shares with texts, the form of its input."""

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from stablerep.data.decoding import to_rgb
from stablerep.text import TextConfig

logger = logging.getLogger(__name__)

Kind = Literal["checkpoint", "stablerep", "weights", "timm", "open_clip"]
"""Of `stablerep fit`; of the authors; a vision transformer's weights and nothing else; of those libraries."""

_NUM_LAST_BLOCKS = 4
_NUM_TEXTS_PER_BATCH = 256


@dataclass(frozen=True)
class InputFormat:
    """What a model takes, and how an image becomes that for evaluation.

    Attributes:
        image_size: Side of the square input, pixels, >= 1.
        mean: Mean of the channels, of pixels in [0, 1].
        std: Their deviation, > 0.
        interpolation: How images are resized: bicubic, bilinear, or another of torchvision's.
        crop_fraction: Side of the square that is kept by shorter side of the resized image, in (0, 1].
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        known = [mode.value for mode in InterpolationMode]
        if self.image_size < 1:
            raise ValueError(f"image_size must be >= 1, got {self.image_size}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std must have 3 channels, got {self.mean} and {self.std}")
        if not min(self.std) > 0:
            raise ValueError(f"std must be > 0, got {self.std}")
        if self.interpolation not in known:
            raise ValueError(f"interpolation must be one of {', '.join(known)}, got {self.interpolation}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}")

    @property
    def resize_size(self) -> int:
        """What the shorter side is resized to before the central square is cut out, pixels."""
        return round(self.image_size / self.crop_fraction)


def describe_resizing(name: str, mode: str, expected: str) -> list[str]:
    """What is to be said of a model whose own resizing is not evaluation's; nothing where it is.

    Args:
        name: What the user gave.
        mode: How its library resizes for it.
        expected: What that library calls evaluation's.
    """
    if mode == expected:
        return []
    return [f"{name} was made for images resized by {mode}; the shorter side and a central crop are used"]


def build_eval_transform(
    image_size: int, resize_size: int | None = None, interpolation: str = "bicubic"
) -> v2.Transform:
    """The shorter side to `resize_size`, then the central square; uint8 [3, image_size, image_size].

    Args:
        image_size: Side of the square, pixels.
        resize_size: What the shorter side is resized to, pixels; None takes 256/224 of the square.
        interpolation: One of torchvision's.
    """
    resize_size = round(image_size * 256 / 224) if resize_size is None else resize_size
    return v2.Compose(
        [
            v2.Resize(resize_size, interpolation=InterpolationMode(interpolation)),
            v2.CenterCrop(image_size),
            v2.PILToTensor(),
        ]
    )


class EvaluationTransform:
    """An image as evaluation shows it to the model: upright RGB, resized, its central square, normalised.

    It can be sent to other processes.

    Args:
        input_format: What the model takes.

    Shapes:
        -> float32 [3, image_size, image_size]
    """

    def __init__(self, input_format: InputFormat) -> None:
        self.input_format = input_format
        self._transform = v2.Compose(
            [
                build_eval_transform(
                    input_format.image_size, input_format.resize_size, input_format.interpolation
                ),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(input_format.mean), list(input_format.std)),
            ]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        tensor: Tensor = self._transform(to_rgb(ImageOps.exif_transpose(image)))
        return tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.input_format})"


class TextSide(nn.Module):
    """What makes texts comparable with images.

    Args:
        tower: Tokens to text features.
        image_projection: The backbone's feature to the joint space.
        text_projection: Text features to the joint space.
        tokenize: Texts to tokens.
        logit_scale: What cosines in that space are multiplied with.
        config: The tower as `stablerep fit` has it; None for the towers of others.

    Shapes:
        tower [M, context_length] -> [M, ...]; image_projection [N, D] -> [N, E]; text_projection -> [M, E]
    """

    def __init__(
        self,
        tower: nn.Module,
        image_projection: nn.Module,
        text_projection: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        logit_scale: float,
        config: TextConfig | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.image_projection = image_projection
        self.text_projection = text_projection
        self.tokenize = tokenize
        self.logit_scale = logit_scale
        self.config = config


class LoadedModel(nn.Module):
    """A frozen model, in eval mode, on the CPU.

    Args:
        name: What the user gave.
        architecture: What the model is called where it comes from.
        kind: From whom it comes.
        backbone: Normalised images to features.
        input_format: What it takes.
        projection_head: The head that the image loss was taken behind.
        text: What compares images with texts.
        remarks: What a reader of its scores should know; a line each, which is logged.

    Attributes:
        digest: SHA-256 over names, types, shapes and bytes of all weights, in the order of their names.
        forward_digest: SHA-256 over what is done with them, from `describe_forward`: equal weights of another
            number of heads are another model.
        feature_names: Of "cls" (the pooled feature: of our models the class token after the final norm),
            "patch_mean" (mean of the patch tokens after the final norm), "cls_last4" (class tokens of the
            last four blocks, each after the final norm), "projection" (the projection head's output), those
            that the model has.

    Shapes:
        backbone: images [N, 3, S, S] -> [N, D]

    Raises:
        ValueError: If a weight is not finite; names it.
    """

    def __init__(
        self,
        *,
        name: str,
        architecture: str,
        kind: Kind,
        backbone: nn.Module,
        input_format: InputFormat,
        projection_head: nn.Module | None = None,
        text: TextSide | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.architecture = architecture
        self.kind: Kind = kind
        self.input_format = input_format
        self.backbone = backbone
        self.projection_head = projection_head
        self.text = text
        self.remarks = tuple(remarks)
        for remark in self.remarks:
            logger.warning("%s", remark)
        self.requires_grad_(False)
        self.eval()
        _check_finite(name, self)
        self.digest = digest_weights(self.state_dict())
        self.forward_digest = hashlib.sha256(describe_forward(self).encode()).hexdigest()
        self._read_tokens = _find_token_reader(backbone)
        names = ["cls"]
        if self._read_tokens is not None:
            names += ["patch_mean", *(["cls_last4"] if _has_last_blocks(backbone) else [])]
        self.feature_names = (*names, *(["projection"] if projection_head is not None else []))

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return self.text is not None

    @property
    def logit_scale(self) -> float | None:
        """What cosines of images and texts are multiplied with; None without a text tower."""
        return None if self.text is None else self.text.logit_scale

    @torch.no_grad()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Every feature of `feature_names`, in one pass through the backbone.

        "cls" is what `backbone(images)` returns.

        Shapes:
            images [N, 3, S, S] -> cls, patch_mean [N, D], cls_last4 [N, 4·D], projection [N, P]
        """
        if self._read_tokens is None:
            features = {"cls": self.backbone(images)}
        else:
            features = self._read_tokens(self.backbone, images)
        if self.projection_head is not None:
            features["projection"] = self.projection_head(features["cls"])
        return {name: features[name] for name in self.feature_names}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images in the space that they share with texts, normalised.

        Shapes:
            images [N, 3, S, S] -> [N, E]

        Raises:
            ValueError: If the model has no text tower.
        """
        self._need_text()
        return self.encode_image_features(self.backbone(images))

    @torch.no_grad()
    def encode_image_features(self, cls: Tensor) -> Tensor:
        """The same from features that were computed before.

        Shapes:
            cls [N, D] -> [N, E]

        Raises:
            ValueError: If the model has no text tower.
        """
        return F.normalize(self._need_text().image_projection(cls), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts in the space that they share with images, normalised.

        Shapes:
            -> [len(texts), E]

        Raises:
            ValueError: If the model has no text tower, or there is no text.
        """
        side = self._need_text()
        if not texts:
            raise ValueError("texts must hold at least one text, got none")
        device = next(side.tower.parameters()).device
        tokens = side.tokenize(list(texts)).to(device)
        parts = [side.text_projection(side.tower(part)) for part in tokens.split(_NUM_TEXTS_PER_BATCH)]
        return F.normalize(torch.cat(parts), dim=-1)

    def _need_text(self) -> TextSide:
        if self.text is None:
            raise ValueError(f"{self.name} has no text tower: it cannot compare images with texts")
        return self.text


def _check_finite(name: str, model: nn.Module) -> None:
    for key, weight in model.state_dict().items():  # with running means
        if not weight.isfinite().all():
            raise ValueError(f"{name}: weight {key} is not finite")


def digest_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names; 64 hex digits."""
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        sha256.update(f"{name}\t{value.dtype}\t{list(value.shape)}\n".encode())
        sha256.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def describe_forward(model: nn.Module) -> str:
    """Class and plain settings of each submodule and of the tokenizer, a line each."""
    parts: list[tuple[str, object]] = list(model.named_modules())[1:]
    if (tokenize := getattr(getattr(model, "text", None), "tokenize", None)) is not None:
        parts.append(("tokenize", tokenize))
    return "\n".join(f"{name}\t{type(part).__qualname__}\t{_list_settings(part)}" for name, part in parts)


def _list_settings(part: object) -> list[tuple[str, object]]:
    """Public numbers, words and tuples of them, such as `num_heads`."""
    plain = (bool, int, float, str, type(None))
    return sorted(
        (name, value)
        for name, value in getattr(part, "__dict__", {}).items()
        if not name.startswith("_")
        and name != "training"
        and all(isinstance(item, plain) for item in (value if isinstance(value, tuple | list) else [value]))
    )


def _find_token_reader(backbone: nn.Module) -> Callable[[Any, Tensor], dict[str, Tensor]] | None:
    """What gives all tokens in one pass; None for a backbone that has none, such as a convolutional one."""
    forward = getattr(backbone, "forward_intermediates", None)
    if forward is None:
        return None
    options = inspect.signature(forward).parameters
    if "return_prefix_tokens" in options and hasattr(backbone, "num_prefix_tokens"):
        return _read_timm_tokens
    if "output_extra_tokens" in options and hasattr(backbone, "class_embedding"):
        return _read_open_clip_tokens
    return None


def _read_timm_tokens(backbone: Any, images: Tensor) -> dict[str, Tensor]:
    num_blocks = _NUM_LAST_BLOCKS if _has_last_blocks(backbone) else 1
    tokens, blocks = backbone.forward_intermediates(
        images, indices=num_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC"
    )
    features = {
        "cls": backbone.forward_head(tokens),
        "patch_mean": tokens[:, backbone.num_prefix_tokens :].mean(dim=1),
    }
    if num_blocks == _NUM_LAST_BLOCKS:
        features["cls_last4"] = torch.cat([prefix[:, 0] for _, prefix in blocks], dim=1)
    return features


def _read_open_clip_tokens(backbone: Any, images: Tensor) -> dict[str, Tensor]:
    num_blocks = _NUM_LAST_BLOCKS if _has_last_blocks(backbone) else 1
    found = backbone.forward_intermediates(
        images,
        indices=num_blocks,
        normalize_intermediates=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    features = {
        "cls": found["image_features"],
        "patch_mean": found["image_intermediates"][-1].mean(dim=1),
    }
    if num_blocks == _NUM_LAST_BLOCKS:
        prefixes = found["image_intermediates_prefix"]
        features["cls_last4"] = torch.cat([prefix[:, 0] for prefix in prefixes], dim=1)
    return features


def _has_last_blocks(backbone: Any) -> bool:
    """Whether there is a class token, and as many blocks as `cls_last4` takes."""
    if hasattr(backbone, "class_embedding"):
        return len(backbone.transformer.resblocks) >= _NUM_LAST_BLOCKS
    return (
        getattr(backbone, "cls_token", None) is not None
        and len(getattr(backbone, "blocks", ())) >= _NUM_LAST_BLOCKS
    )
