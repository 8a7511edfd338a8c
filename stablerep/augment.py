"""Random views: what is drawn for each, and the stage of colours, on batches.

    worker             decode -> down-sample -> RandomResizedCrop -> flip         `stablerep.data.decoding`
    worker or device   ColorJitter -> grayscale -> Gaussian blur -> normalisation `augment_batch`

What is random is drawn before a pixel is there, from a generator of the caption's own: a view depends on
(seed, pass over its dataset, caption), never on ranks, workers or batch mates. Each operation equals
torchvision's on equal parameters; here the parameters differ from image to image of one batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_NUM_CROP_TRIALS = 10
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, torchvision's rounding
_NUM_OPERATIONS = 4
_NEGLIGIBLE_WEIGHT = 1e-6  # of a blur's tap, where all together have 1


@dataclass(frozen=True)
class AugmentationConfig:
    """How a view is drawn; the defaults are the published strong view (`STRONG_VIEW`), in this order.

    Attributes:
        crop_scale: Least and greatest share of the image's area that RandomResizedCrop keeps, in (0, 1].
        crop_ratio: Least and greatest width / height of the crop.
        flip_probability: Probability of a horizontal flip.
        jitter_probability: Probability of ColorJitter.
        brightness: Factor uniform in [max(0, 1 - x), 1 + x].
        contrast: Factor uniform in [max(0, 1 - x), 1 + x].
        saturation: Factor uniform in [max(0, 1 - x), 1 + x].
        hue: Shift uniform in [-x, x] of the colour circle, x in [0, 0.5].
        grayscale_probability: Probability of grayscale.
        blur_probability: Probability of Gaussian blur.
        blur_sigma: Least and greatest sigma of the blur, pixels; the published (0.1, 2) is for 224 pixels.
        blur_kernel_size: Width of the blur's kernel, pixels, odd; 13 suffices for sigma <= 2.
        downsample_probability: Probability that the whole image, before the rest, is brought to a shorter
            side of one of downsample_sizes and then to downsample_restored_size; published: 0.05.
        downsample_sizes: The shorter sides to draw from, pixels.
        downsample_restored_size: Shorter side that it is brought back to, pixels.

    Reference:
        Tian et al., StableRep, arXiv 2306.00984, appendix; SimCLR, arXiv 2002.05709, appendix A.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel_size: int = 13
    downsample_probability: float = 0.0
    downsample_sizes: tuple[int, ...] = (64, 128)
    downsample_restored_size: int = 256

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "downsample"):
            if not 0 <= (value := getattr(self, f"{name}_probability")) <= 1:
                raise ValueError(f"{name}_probability must be in [0, 1], got {value}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be ascending in (0, 1], got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be ascending and above 0, got {self.crop_ratio}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {self.hue}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be ascending and above 0, got {self.blur_sigma}")
        if self.blur_kernel_size < 1 or self.blur_kernel_size % 2 == 0:
            raise ValueError(f"blur_kernel_size must be odd and above 0, got {self.blur_kernel_size}")
        if not self.downsample_sizes or min(self.downsample_sizes) < 1:
            raise ValueError(f"downsample_sizes must be one or more, each >= 1, got {self.downsample_sizes}")
        if self.downsample_restored_size < 1:
            raise ValueError(f"downsample_restored_size must be >= 1, got {self.downsample_restored_size}")


STRONG_VIEW = AugmentationConfig()
DOWNSAMPLED_VIEW = AugmentationConfig(downsample_probability=0.05)
WEAK_VIEW = AugmentationConfig(
    crop_scale=(0.5, 1.0),
    flip_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
)

# --- what is drawn


class Colours(NamedTuple):
    """Parameters of the stage of colours, drawn in the worker.

    Shapes:
        order: int [..., 4], the operations in the order of their turn: 0 brightness, 1 contrast,
            2 saturation, 3 hue; all −1 where there is no jitter.
        factors: float32 [..., 4], by operation.
        is_gray: bool [...].
        sigma: float32 [...], 0 where there is no blur.
    """

    order: NDArray[Any]
    factors: NDArray[Any]
    is_gray: NDArray[Any]
    sigma: NDArray[Any]


@dataclass(frozen=True)
class ViewDraws:
    """What is drawn for the views of one caption.

    Shapes:
        short_sides: int [views], to which the image is down-sampled; 0 where it is not.
        trials: float [views, 10, 2], share of area and logarithm of the ratio of each try at a crop.
        places: float [views, 2], where in its room the crop lies, in [0, 1).
        is_flipped: bool [views].
        colours: Of each view.
    """

    short_sides: NDArray[np.int64]
    trials: NDArray[np.float64]
    places: NDArray[np.float64]
    is_flipped: NDArray[np.bool_]
    colours: Colours

    def crop_box(
        self, index: int, height: int, width: int, config: AugmentationConfig
    ) -> tuple[int, int, int, int]:
        """Box (top, left, height, width) of RandomResizedCrop, with torchvision's distribution."""
        for share, log_ratio in self.trials[index].tolist():
            area, ratio = height * width * share, math.exp(log_ratio)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                down, right = self.places[index].tolist()
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        low, high = config.crop_ratio  # the largest central crop of an allowed ratio
        ratio = min(max(width / height, low), high)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (height - h) // 2, (width - w) // 2, h, w


def draw_views(rng: np.random.Generator, num_views: int, config: AugmentationConfig) -> ViewDraws:
    """Draws everything that is random about the views of a caption."""
    chance = rng.random((5, num_views))
    low, high = np.log(config.crop_ratio)
    uniform = rng.random((num_views, _NUM_CROP_TRIALS, 2))
    least = np.array([config.crop_scale[0], low])
    trials = least + uniform * (np.array([config.crop_scale[1], high]) - least)
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    lows = np.array([*np.maximum(0.0, 1 - strengths), -config.hue])
    highs = np.array([*(1 + strengths), config.hue])
    order = rng.permuted(np.tile(np.arange(_NUM_OPERATIONS, dtype=np.int8), (num_views, 1)), axis=1)
    order[chance[0] >= config.jitter_probability] = -1
    sigma = rng.uniform(*config.blur_sigma, size=num_views)
    short_sides = rng.choice(np.array(config.downsample_sizes), size=num_views)
    return ViewDraws(
        short_sides=np.where(chance[1] < config.downsample_probability, short_sides, 0),
        trials=trials,
        places=rng.random((num_views, 2)),
        is_flipped=chance[2] < config.flip_probability,
        colours=Colours(
            order=order,
            factors=(lows + rng.random((num_views, _NUM_OPERATIONS)) * (highs - lows)).astype(np.float32),
            is_gray=chance[3] < config.grayscale_probability,
            sigma=np.where(chance[4] < config.blur_probability, sigma, 0.0).astype(np.float32),
        ),
    )


def stack_colours(parts: Sequence[Colours]) -> Colours:
    """One dimension more: [...] each -> [len(parts), ...]."""
    return Colours(*map(np.stack, zip(*parts, strict=True)))


def flatten_colours(colours: Colours) -> Colours:
    """Captions and views as one dimension: [captions, views, ...] -> [captions · views, ...]."""
    return Colours(*(values.reshape(-1, *values.shape[2:]) for values in colours))


# --- the stage of colours


def augment_batch(
    images: Tensor,
    colours: Colours,
    config: AugmentationConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """ColorJitter, grayscale, blur and normalisation, with parameters of its own for each image.

    On the CPU images pass one by one, so that each stays in the cache from the first operation to the last;
    elsewhere together, those with the same operation at a turn as one batch.

    Args:
        images: The images.
        colours: Parameters of each.
        config: Which operations there are; the parameters were drawn from it.
        mean: Of each channel, subtracted at the end.
        std: Of each channel, divided by at the end.

    Shapes:
        images uint8 [N, 3, H, W], colours [N] -> float32 [N, 3, H, W]
    """
    if images.device.type != "cpu":
        return _augment(images, colours, config, mean, std)
    views = torch.empty(images.shape, dtype=torch.float32)
    for index, image in enumerate(images.split(1)):
        _augment_one(image, Colours(*(values[index] for values in colours)), config, mean, std, views[index])
    return views


def _augment_one(
    image: Tensor,
    colours: Colours,
    config: AugmentationConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    out: Tensor,
) -> None:
    """One image [1, 3, H, W], with the parameters of one."""
    x = image.contiguous() / 255
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    factors = torch.from_numpy(colours.factors).split(1)
    for index in colours.order.tolist():
        if index >= 0 and strengths[index] > 0:
            x = _OPERATIONS[index](x, factors[index])
    if colours.is_gray:
        x = _luma(x)  # one channel for all three
    if (sigma := float(colours.sigma)) > 0:
        x = gaussian_blur(x, torch.tensor([sigma]), config.blur_kernel_size)
    for channel, (plane, center, scale) in enumerate(zip(x[0].expand(3, -1, -1), mean, std, strict=True)):
        torch.add(-center / scale, plane, alpha=1 / scale, out=out[channel])


def _augment(
    images: Tensor,
    colours: Colours,
    config: AugmentationConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    x = images.contiguous() / 255
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    for turn in range(_NUM_OPERATIONS):
        for index, (operation, strength) in enumerate(zip(_OPERATIONS, strengths, strict=True)):
            if strength > 0:
                x = _apply_to(x, colours.order[:, turn] == index, operation, colours.factors[:, index])
    x = _apply_to(x, colours.is_gray, lambda part, _: to_grayscale(part), colours.sigma)
    x = _apply_to(
        x,
        colours.sigma > 0,
        lambda part, sigma: gaussian_blur(part, sigma, config.blur_kernel_size),
        colours.sigma,
    )
    return normalize(x, mean, std)


def _apply_to(
    x: Tensor,
    chosen: NDArray[np.bool_],
    operation: Callable[[Tensor, Tensor], Tensor],
    values: NDArray[np.float32],
) -> Tensor:
    """The operation on the chosen images."""
    if chosen.any():
        rows = _to_tensor(np.flatnonzero(chosen), x)
        x[rows] = operation(x[rows], _to_tensor(values[chosen], x))
    return x


def _to_tensor(values: NDArray[np.generic], like: Tensor) -> Tensor:
    """On the device of `like`, without waiting for what that still computes."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x − mean) / std by channel.

    Shapes:
        float [N, 3, H, W] in [0, 1] -> float [N, 3, H, W]
    """
    shape = (1, len(mean), 1, 1)
    return (images - images.new_tensor(mean).view(shape)).div_(images.new_tensor(std).view(shape))


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def to_grayscale(x: Tensor) -> Tensor:
    """ITU-R 601-2 luma on all three channels.

    Shapes:
        [N, 3, H, W] -> [N, 3, H, W]
    """
    return _luma(x).repeat(1, 3, 1, 1)


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """factor · x, clamped; in place, as the operations below.

    Shapes:
        x [N, 3, H, W] in [0, 1], factor [N] -> [N, 3, H, W]
    """
    return x.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luma.

    Shapes:
        x [N, 3, H, W] in [0, 1], factor [N] -> [N, 3, H, W]
    """
    mean = _luma(x.mean(dim=(2, 3), keepdim=True))  # the mean of the luma is the luma of the means
    f = factor.view(-1, 1, 1, 1)
    return x.mul_(f).add_(mean.mul_(1 - f)).clamp_(0, 1)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's luma.

    Shapes:
        x [N, 3, H, W] in [0, 1], factor [N] -> [N, 3, H, W]
    """
    luma = _luma(x)
    f = factor.view(-1, 1, 1, 1)
    return x.mul_(f).add_(luma.mul_(1 - f)).clamp_(0, 1)


def adjust_hue_(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` of the colour circle, value and saturation kept.

    Shapes:
        x [N, 3, H, W] in [0, 1], shift [N] in [-0.5, 0.5] -> [N, 3, H, W]
    """
    if x.device.type != "cpu":
        return _turn_hues_(x, shift)
    for image, value in zip(x, shift.tolist(), strict=True):
        _turn_hue_(image, value)
    return x


def _turn_hues_(x: Tensor, shift: Tensor) -> Tensor:
    """Each image by a shift of its own, without a choice among the six sectors.

    With value v, chroma c and hue h in [0, 1), a channel is v − c · clamp(6d − 1, 0, 1), where d is the
    distance on the circle of h from the channel's own hue, 0, ⅓ or ⅔. With k(a) = clamp(|h − a|, ⅙, ⅓) that
    is v + c − 6c · k(⅓) for green, v + c − 6c · k(⅔) for blue and v − 2c + 6c · k(½) for red. The hue itself
    is |K + (middle − low) / 6c|, with K of the sector.
    """
    red, green, blue = x.unbind(dim=1)  # [N, H, W] each
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, high), torch.minimum(red, high)
    chroma = value - torch.minimum(middle, low)
    is_blue_side = (blue - green).sign_().clamp_(min=0)
    is_red_less = (high - red).sign_().clamp_(min=0)
    sector = (is_blue_side * 2).sub_(1 / 3).mul_(is_red_less).sub_(is_blue_side)
    inverse = chroma.clamp(min=torch.finfo(x.dtype).tiny).reciprocal_()  # of grey, times a difference of 0
    hue = sector.addcmul_(middle.sub_(low), inverse, value=1 / 6).abs_()
    hue = hue.add_(shift.view(-1, 1, 1))
    hue.sub_(hue.floor())  # in [0, 1)
    far, near = torch.sub(value, chroma, alpha=2), value.add_(chroma)
    for channel, (base, middle_hue, sign) in enumerate(
        [(far, 1 / 2, 6), (near, 1 / 3, -6), (near, 2 / 3, -6)]
    ):
        distance = (hue - middle_hue).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, chroma, distance, value=sign, out=x[:, channel])
    return x


def _turn_hue_(image: Tensor, shift: float) -> None:
    """One image [3, H, W], by a shift that all its pixels share: no hue is ever computed.

    Less the lowest channel and over the chroma, the channels are waves of the hue's place p in [-3, 3) on the
    border of the colour hexagon: R(p) = clamp(2 − |p|, 0, 1), G(p) = R(p − 2), B(p) = R(p + 2). From this

        R(p + t) = clamp(R − G + (1 − t if G > B else t), 0, 1)    for t in [0, 1], else swapped as below

    and so on for G and B in turn. A step of 2 on the border is a permutation of the channels, and a step back
    is one forth with G and B exchanged.
    """
    num_permutations = round(3 * shift)
    step = 6 * shift - 2 * num_permutations  # in [-1, 1]
    order = (0, 1, 2) if step >= 0 else (0, 2, 1)
    channels = image.unbind(0)
    first, second, third = (channels[index] for index in order)
    low = torch.minimum(first, second).clamp_(max=third)
    value = torch.maximum(first, second).clamp_(min=third)
    differences = (first - second, second - third, third - first)
    half = torch.sub(value, low).mul_(0.5 - abs(step))  # times 1 or −1, and from the middle: the choice above
    middle = torch.lerp(low, value, 0.5)
    for place, index in enumerate(order):
        moved = torch.addcmul(middle, half, differences[(place + 1) % 3].sign()).add_(differences[place])
        torch.clamp(moved, low, value, out=channels[(index + num_permutations) % 3])


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Separable Gaussian blur with a sigma of its own for each image, reflecting at the border.

    Args:
        x: The images.
        sigma: Standard deviation, pixels, above 0.
        kernel_size: Width of the kernel, pixels, odd, at most 2 · min(H, W) − 1.

    Shapes:
        x [N, C, H, W], sigma [N] -> [N, C, H, W]
    """
    height, width = x.shape[2:]
    radius = kernel_size // 2
    if radius >= min(height, width):
        limit = 2 * min(height, width)
        raise ValueError(f"blur_kernel_size must be < {limit} at this size, got {kernel_size}")
    place = torch.arange(radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-0.5 * (place / sigma.view(-1, 1)).square()).exp()  # [N, radius + 1], from the middle outwards
    kernel = kernel / (2 * kernel.sum(dim=1, keepdim=True) - 1)
    if x.device.type == "cpu":  # where looking costs nothing, taps that add nothing are left out
        radius = max(1, int((kernel > _NEGLIGIBLE_WEIGHT).any(dim=0).sum()) - 1)
    x = F.pad(x, [radius] * 4, mode="reflect")
    for axis, size in ((3, width), (2, height)):
        x = _convolve(x, kernel, radius, axis, size)
    return x


def _convolve(x: Tensor, kernel: Tensor, radius: int, axis: int, size: int) -> Tensor:
    """Σ_k kernel_|k| · x shifted by k along an axis."""
    weights = [weight.view(-1, 1, 1, 1) for weight in kernel.unbind(dim=1)]
    out = x.narrow(axis, radius, size) * weights[0]
    for k in range(1, radius + 1):
        pair = x.narrow(axis, radius - k, size) + x.narrow(axis, radius + k, size)
        out.addcmul_(pair, weights[k])
    return out


_OPERATIONS = (adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_)
"""In the order of `Colours.factors`."""
