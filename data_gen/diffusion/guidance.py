"""Classifier-free guidance that differs from image to image, each scale a pure function of the image's seed.

    guided = u + g (t − u)        u: unconditional prediction, t: conditional prediction, g: guidance scale

A diffusers pipeline takes one g for a batch. Here it runs with g = 2, and its UNet's answer is changed to
t' = u + (g_i / 2) (t − u) for image i, so that u + 2 (t' − u) is what g_i asks for.

Reference: Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598), equation 6 with g = 1 + w.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PIPELINE_SCALE = 2.0
"""What the pipeline guides by while each image has a scale of its own; halving is exact in floating point."""


@dataclass(frozen=True)
class GuidanceRange:
    """Guidance scales drawn uniformly, one an image.

    Args:
        low: Smallest scale, >= 0.
        high: Largest scale, >= low.
    """

    low: float
    high: float


GuidanceScale = float | list[float] | GuidanceRange


def check_guidance_scale(guidance_scale: GuidanceScale) -> None:
    """Checks every scale that could be drawn.

    Raises:
        ValueError: One is negative or not finite, a list is empty, or a range is upside down.
    """
    if isinstance(guidance_scale, GuidanceRange):
        named = {"guidance_scale.low": guidance_scale.low, "guidance_scale.high": guidance_scale.high}
    elif isinstance(guidance_scale, list):
        named = {f"guidance_scale[{index}]": scale for index, scale in enumerate(guidance_scale)}
    else:
        named = {"guidance_scale": guidance_scale}
    for name, scale in named.items():
        if not 0 <= scale < float("inf"):
            raise ValueError(f"{name} must be >= 0 and finite, got {scale}")
    if not named:
        raise ValueError("guidance_scale must hold at least one scale, got []")
    if isinstance(guidance_scale, GuidanceRange) and guidance_scale.low > guidance_scale.high:
        raise ValueError(
            f"guidance_scale.low must be <= guidance_scale.high, got {guidance_scale.low} and "
            f"{guidance_scale.high}"
        )


def is_fixed(guidance_scale: GuidanceScale) -> bool:
    """Whether all images share one scale."""
    return not isinstance(guidance_scale, list | GuidanceRange)


def largest_scale(guidance_scale: GuidanceScale) -> float:
    """The largest scale that can be drawn; at 1 or below there is no second pass to guide by."""
    if isinstance(guidance_scale, GuidanceRange):
        return guidance_scale.high
    return max(guidance_scale) if isinstance(guidance_scale, list) else guidance_scale


def draw_guidance_scale(guidance_scale: GuidanceScale, image_seed: str) -> float:
    """The scale of one image: the fixed one, else uniform from sha256("image_seed/guidance").

    Args:
        guidance_scale: The fixed scale, a list to choose from, or a range.
        image_seed: 32 hex digits, from `data_gen.diffusion.noise.image_seed`.
    """
    if not isinstance(guidance_scale, list | GuidanceRange):
        return float(guidance_scale)
    digest = hashlib.sha256(f"{image_seed}/guidance".encode()).hexdigest()
    uniform = int(digest[:13], 16) / 16**13  # 52 bits: exact in a float, and below 1
    if isinstance(guidance_scale, list):
        return float(guidance_scale[int(uniform * len(guidance_scale))])
    return guidance_scale.low + (guidance_scale.high - guidance_scale.low) * uniform


@contextmanager
def guide_each_image(unet: "torch.nn.Module", guidance_scales: Sequence[float]) -> Iterator[None]:
    """Gives each image of a batch its own scale while the pipeline guides by `PIPELINE_SCALE`.

    A scale of 1 or below counts as 1, as in the pipeline: the conditional prediction alone.

    Args:
        unet: The pipeline's network; called once a step with the unconditional half of the batch first.
        guidance_scales: One an image.

    Raises:
        ValueError: The network is not called with two halves, so that there is nothing to guide by.
    """
    import torch

    num_images = len(guidance_scales)
    halved = [max(scale, 1.0) / PIPELINE_SCALE for scale in guidance_scales]
    weights = torch.tensor(halved, device=next(unet.parameters()).device)

    def rescale(_: Any, __: Any, output: Any) -> tuple[Any, ...]:
        if not isinstance(output, tuple) or len(output[0]) != 2 * num_images:
            raise ValueError(
                "guidance_scale must be one number for this model: its network does not answer for two "
                f"halves of {num_images} images each, without and with the prompt"
            )
        unconditional, conditional = output[0].float().chunk(2)
        step = weights.view(-1, *[1] * (conditional.ndim - 1)) * (conditional - unconditional)
        guided = (unconditional + step).to(output[0].dtype)
        return torch.cat([output[0][:num_images], guided]), *output[1:]

    handle = unet.register_forward_hook(rescale)
    try:
        yield
    finally:
        handle.remove()
