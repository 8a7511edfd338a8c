"""The text side of StableRep+ and of CLIP: open_clip's text tower and tokenizer, and the two projections.

Imported where a text tower is asked for: open_clip takes seconds to import and is an extra.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stablerep.backbones import ProjectionHead
from stablerep.distributed.sharding import local
from stablerep.losses import ContrastiveLoss, image_text_contrastive_loss

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer

VOCABULARY_SIZE = 49408
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class TextConfig:
    """A causal transformer over the caption; the defaults are open_clip's `ViT-B-16-quickgelu`, as published.

    Attributes:
        loss_weight: w2, the weight of the image–text loss beside the image loss, > 0.
        projection: "linear" maps both sides to one space by a matrix each, "mlp" by a `ProjectionHead` each,
            whose BatchNorm is per view, as published.
        out_features: Width of that space.
        hidden_features: Hidden width of the MLPs.
        width: Width of the transformer.
        num_layers: Its blocks.
        num_heads: Its attention heads.
        context_length: Tokens of a caption, start and end among them; what is longer is cut.
        quick_gelu: x · sigmoid(1.702 x) for GELU, as in the published model.
    """

    loss_weight: float = 1.0
    projection: Literal["linear", "mlp"] = "linear"
    out_features: int = 512
    hidden_features: int = 4096
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    context_length: int = 77
    quick_gelu: bool = True

    def __post_init__(self) -> None:
        if not self.loss_weight > 0:
            raise ValueError(f"text.loss_weight must be > 0 (leave text out instead), got {self.loss_weight}")
        for name in ("out_features", "hidden_features", "width", "num_layers", "num_heads"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"text.{name} must be >= 1, got {value}")
        if self.context_length < 3:
            raise ValueError(
                f"text.context_length must be >= 3, start, end and a word, got {self.context_length}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"text.width must be a multiple of num_heads {self.num_heads}, got {self.width}")

    def to_plain(self) -> dict[str, Any]:
        """The settings in types that a checkpoint may hold."""
        return asdict(self)


class Tokenizer:
    """Captions to open_clip's tokens.

    Args:
        context_length: Tokens of a caption; shorter ones are filled up with 0, longer ones lose their end.
    """

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self._tokenize: Any = None

    def __call__(self, captions: list[str]) -> Tensor:
        """Tokens of captions.

        Shapes:
            -> int64 [len(captions), context_length]
        """
        if self._tokenize is None:
            self._tokenize = _import_open_clip().tokenizer.SimpleTokenizer()
        tokens: Tensor = self._tokenize(captions, context_length=self.context_length)
        return tokens


class ImageTextResult(NamedTuple):
    """What `ImageTextHead` returns.

    Attributes:
        loss: The loss and the number of images and texts without a partner.
        images: The projected images, [num_captions · num_views, out_features].
        scale: exp(logit_scale), [].
    """

    loss: ContrastiveLoss
    images: Tensor
    scale: Tensor


class ImageTextHead(nn.Module):
    """scale · normalize(project(image)) · normalize(project(text)), and its contrastive loss.

    The scale is exp(logit_scale); `clamp_logit_scale` keeps logit_scale in [0, ln 100] after each step.

    Args:
        in_features: Width of the image backbone's features.
        config: The text tower and the projections.

    Reference:
        Tian et al., StableRep, arXiv 2306.00984, section 3.3; Radford et al., CLIP, arXiv 2103.00020.
    """

    def __init__(self, in_features: int, config: TextConfig) -> None:
        super().__init__()
        self.loss_weight = config.loss_weight
        self.image_projection: nn.Module
        self.text_projection: nn.Module
        if config.projection == "linear":
            self.image_projection = nn.Linear(in_features, config.out_features, bias=False)
            nn.init.normal_(self.image_projection.weight, std=in_features**-0.5)
            self.text_projection = nn.Identity()  # it is a part of open_clip's tower
        else:
            hidden, out = config.hidden_features, config.out_features
            self.image_projection = ProjectionHead(in_features, hidden, out)
            self.text_projection = ProjectionHead(config.width, hidden, out)
        # One number, in a vector: a sharded strategy cannot split a scalar.
        self.logit_scale = nn.Parameter(torch.tensor([INITIAL_LOGIT_SCALE]))

    def forward(self, features: Tensor, text_features: Tensor, labels: Tensor) -> ImageTextResult:
        """The image–text loss.

        Args:
            features: The image backbone's features of each caption's views.
            text_features: What the text tower makes of the captions.
            labels: A number for each caption; equal captions have equal ones and are positives.

        Shapes:
            features [num_captions, num_views, D], text_features [num_captions, ...], labels [num_captions]
        """
        images, texts = self.project(features, text_features)
        image_labels = labels.repeat_interleave(features.shape[1])
        scale = self.logit_scale.float().exp().squeeze(0)
        loss = image_text_contrastive_loss(images, texts, image_labels, labels, scale)
        return ImageTextResult(loss, images, scale)

    def project(self, features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides in one space.

        Shapes:
            features [num_captions, num_views, D], text_features [num_captions, ...]
                -> [num_captions · num_views, out_features], [num_captions, out_features]
        """
        return self.image_projection(features).flatten(0, 1), self.text_projection(text_features)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Puts logit_scale back into [0, ln 100]."""
        local(self.logit_scale).clamp_(0, MAX_LOGIT_SCALE)


def build_text_tower(config: TextConfig) -> "TextTransformer":
    """open_clip's text transformer with random weights, pooled at the end-of-text token.

    Shapes:
        forward: tokens [N, context_length] -> [N, out_features], or [N, width] where MLPs project.

    Raises:
        ValueError: If open_clip is not installed.
    """
    transformer: Any = _import_open_clip().transformer
    tower: TextTransformer = transformer.TextTransformer(
        context_length=config.context_length,
        vocab_size=VOCABULARY_SIZE,
        width=config.width,
        heads=config.num_heads,
        layers=config.num_layers,
        output_dim=config.out_features if config.projection == "linear" else None,
        act_layer=transformer.QuickGELU if config.quick_gelu else nn.GELU,
    )
    return tower


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            "model.text needs open_clip, which is not installed: pip install 'stablerep[text]'"
        ) from error
    return open_clip
