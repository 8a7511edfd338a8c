"""The fifteen corruptions of ImageNet-C at five severities, written from their definitions and constants.

The constants are those of the published set, which is made of 224×224 images after Resize(256) and
CenterCrop(224). Lengths (blur radii, displacements) are in pixels of such images and are not scaled: on
another size the functions work, and the figures are not those of ImageNet-C.

What differs from the published set:

    frost             laid over with a procedural texture, as the original's six photographs are not ours to
                      ship; its rows cannot be compared (`NOT_COMPARABLE`)
    all               rounded to whole levels (there: cut off) and not stored as JPEG of quality 85 afterwards
    randomness        drawn anew from (seed, corruption, severity, image name): the same laws, other draws
    non-square images zoom blur, snow and pixelate treat both sides alike; there, images are square
    motion blur, snow motion is ImageMagick's kernel, re-implemented: half a Gaussian in one direction

Reference: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), arXiv 1903.12261; its public code (hendrycks/robustness) for the constants.
"""

import hashlib
import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
IMAGENET_C_SIZE = 224  # the side of its images, pixels
SMALLEST_SIDE = 32  # the widest border that a filter reflects is 12 pixels

# Constants by severity, 1 to 5.
_GAUSSIAN_NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
_SHOT_NOISE_PHOTONS = (60, 25, 12, 5, 3)
_IMPULSE_NOISE_AMOUNT = (0.03, 0.06, 0.09, 0.17, 0.27)
_DEFOCUS_RADIUS_AND_ALIAS_STD = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
_GLASS_STD_DISTANCE_PASSES = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
_MOTION_RADIUS_AND_STD = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
_ZOOM_END_AND_STEP = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
# Mean and std of the flakes' noise, zoom, threshold, motion radius and std, share of the image that is kept.
_SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
_FROST_IMAGE_AND_LAYER_WEIGHT = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
_FOG_WEIGHT_AND_DECAY = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
_BRIGHTNESS_SHIFT = (0.1, 0.2, 0.3, 0.4, 0.5)
_CONTRAST_FACTOR = (0.4, 0.3, 0.2, 0.1, 0.05)
# Displacement, smoothing and affine shift as multiples of 244 pixels (sic: the original says 244, not 224).
_ELASTIC = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
_ELASTIC_UNIT = 244
_PIXELATE_FACTOR = (0.6, 0.5, 0.4, 0.3, 0.25)
_JPEG_QUALITY = (25, 18, 15, 10, 7)
_LUMA = (0.299, 0.587, 0.114)

Random = np.random.Generator
# An image as float32 [3, H, W] in [0, 1], the index of the severity, and the draws; the result is clipped.
Corruption = Callable[[Tensor, int, Random], Tensor]


def corrupt(image: Tensor, corruption: str, severity: int, *, image_name: str, seed: int = 0) -> Tensor:
    """One corrupted image; the same for the same arguments, in whatever order images are taken.

    Args:
        image: uint8, channels first or last; [3, H, 3] is taken as channels first.
        corruption: One of `CORRUPTIONS`.
        severity: 1 to 5.
        image_name: What tells the image from others; equal names get equal draws.
        seed: Of all draws.

    Shapes:
        [3, H, W] or [H, W, 3], H and W >= 32 -> the same, on the CPU, contiguous.

    Raises:
        ValueError: If the image is of another type or size, or the corruption or severity is unknown.

    Reference:
        Hendrycks and Dietterich, arXiv 1903.12261, section 3 and appendix.
    """
    if corruption not in _FUNCTIONS:
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, got {corruption}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be in [1, 5], got {severity}")
    if image.dtype != torch.uint8 or image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
        raise ValueError(f"image must be uint8 [3, H, W] or [H, W, 3], got {image.dtype} {list(image.shape)}")
    channels_first = image.shape[0] == 3
    pixels = (image if channels_first else image.permute(2, 0, 1)).cpu().contiguous()
    if min(pixels.shape[1:]) < SMALLEST_SIDE:
        raise ValueError(f"sides of the image must be >= {SMALLEST_SIDE}, got {list(pixels.shape[1:])}")
    digest = hashlib.sha256(f"{seed}/{corruption}/{severity}/{image_name}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    changed = _FUNCTIONS[corruption](pixels.float() / 255, severity - 1, random)
    levels = (changed.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels if channels_first else levels.permute(1, 2, 0).contiguous()


def _gaussian_noise(x: Tensor, level: int, random: Random) -> Tensor:
    return x + _GAUSSIAN_NOISE_STD[level] * _normal(random, x.shape)


def _shot_noise(x: Tensor, level: int, random: Random) -> Tensor:
    photons = _SHOT_NOISE_PHOTONS[level]
    return torch.from_numpy(random.poisson(x.numpy() * photons).astype(np.float32)) / photons


def _impulse_noise(x: Tensor, level: int, random: Random) -> Tensor:
    """A share of all values, channel by channel, becomes 0 or 1 with even odds."""
    amount = _IMPULSE_NOISE_AMOUNT[level]
    draw = torch.from_numpy(random.random(x.shape, dtype=np.float32))
    return torch.where(draw < amount, (draw < amount / 2).float(), x)


def _defocus_blur(x: Tensor, level: int, random: Random) -> Tensor:
    kernel = _disk(*_DEFOCUS_RADIUS_AND_ALIAS_STD[level])
    margin = len(kernel) // 2
    padded = F.pad(x[None], (margin,) * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)[0]


def _glass_blur(x: Tensor, level: int, random: Random) -> Tensor:
    """Blur, move pixels about, blur again.

    Passing from the last row and column to the first, each pixel takes the value of a neighbour that is at
    most `distance` away. The original means to swap the two; its statement copies, and the published images
    are made by that.
    """
    std, distance, num_passes = _GLASS_STD_DISTANCE_PASSES[level]
    _, height, width = x.shape
    rows, columns = np.mgrid[height - distance : distance : -1, width - distance : distance : -1]
    here = (rows * width + columns).ravel()
    source = np.arange(height * width)
    for _ in range(num_passes):
        shifts = random.integers(-distance, distance, size=(2, *rows.shape))
        there = ((rows + shifts[0]) * width + columns + shifts[1]).ravel()
        source = _copy_one_by_one(source, here, there)
    moved = _gaussian_blur(x, std).flatten(1)[:, torch.from_numpy(source)].unflatten(1, (height, width))
    return _gaussian_blur(moved, std)


def _copy_one_by_one(values: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """`values[here[n]] = values[there[n]]` for n = 0, 1, …, each seeing those before; `here` falls.

    A copy from a place that has been written takes what was copied there. Each such chain is followed to its
    first copy, all chains at once and by twice the length each time.
    """
    target = np.arange(len(values))
    target[here] = there
    is_written = np.zeros(len(values), dtype=bool)
    is_written[here] = True
    places = np.arange(len(values))
    previous = np.where(is_written & (target > places) & is_written[target], target, places)
    while (further := previous[previous]).tobytes() != previous.tobytes():
        previous = further
    return values[target[previous]]


def _motion_blur(x: Tensor, level: int, random: Random) -> Tensor:
    radius, std = _MOTION_RADIUS_AND_STD[level]
    return _blur_along(x, radius, std, angle=random.uniform(-45, 45))


def _zoom_blur(x: Tensor, level: int, random: Random) -> Tensor:
    factors = np.arange(1, *_ZOOM_END_AND_STEP[level])
    return (x + sum(_zoom(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def _snow(x: Tensor, level: int, random: Random) -> Tensor:
    mean, std, zoom, threshold, radius, blur_std, kept = _SNOW[level]
    flakes = _zoom(mean + std * _normal(random, (1, *x.shape[1:])), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = _blur_along(flakes, int(radius), blur_std, angle=random.uniform(-135, -45))
    grey = (x * torch.tensor(_LUMA)[:, None, None]).sum(dim=0)
    whitened = kept * x + (1 - kept) * torch.maximum(x, 1.5 * grey + 0.5)
    return whitened + flakes + flakes.flip(1, 2)


def _frost(x: Tensor, level: int, random: Random) -> Tensor:
    """Crystals in place of the original's photographs, with the original's weights.

    The ridges of three rough fractal surfaces, bluish white, over a pale ground that varies slowly.
    """
    image_weight, layer_weight = _FROST_IMAGE_AND_LAYER_WEIGHT[level]
    height, width = x.shape[1:]
    surfaces = [_plasma(height, width, decay, random) for decay in (1.2, 1.3, 1.2)]
    ridges = [(1 - (2 * surface - 1).abs()) ** 4 for surface in surfaces]
    ground = 0.2 + 0.5 * _plasma(height, width, 2.0, random)
    layer = 0.4 * ground + 0.6 * torch.stack(ridges).amax(dim=0)
    tint = torch.tensor([0.85, 0.95, 1.0])[:, None, None]
    return image_weight * x + layer_weight * tint * layer


def _fog(x: Tensor, level: int, random: Random) -> Tensor:
    weight, decay = _FOG_WEIGHT_AND_DECAY[level]
    largest = x.max()
    surface = _plasma(x.shape[1], x.shape[2], decay, random)
    return (x + weight * surface) * largest / (largest + weight)


def _brightness(x: Tensor, level: int, random: Random) -> Tensor:
    """V + shift in HSV: hue and saturation stay where all channels are scaled alike; black becomes grey."""
    value = x.amax(dim=0)
    brighter = (value + _BRIGHTNESS_SHIFT[level]).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value.clamp(min=1e-12)), brighter)


def _contrast(x: Tensor, level: int, random: Random) -> Tensor:
    means = x.mean(dim=(1, 2), keepdim=True)
    return (x - means) * _CONTRAST_FACTOR[level] + means


def _elastic_transform(x: Tensor, level: int, random: Random) -> Tensor:
    """A random affine map, then a smooth random displacement of each pixel."""
    displacement, smoothing, shift = (_ELASTIC_UNIT * factor for factor in _ELASTIC[level])
    height, width = x.shape[1:]
    centre, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + random.uniform(-shift, shift, size=corners.shape)
    # The map that takes `moved` back to `corners` says where each output pixel is read.
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # [3, 2]
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    source_x, source_y = np.moveaxis(np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back, -1, 0)
    x = _sample(x, source_x, source_y, reflect_on="pixel centres")
    left = _blur_matrix(height, smoothing, 3.0, "symmetric").numpy()
    right = _blur_matrix(width, smoothing, 3.0, "symmetric").numpy().T
    shift_x, shift_y = (
        displacement * (left @ noise @ right) for noise in random.uniform(-1, 1, (2, *rows.shape))
    )
    return _sample(x, columns + shift_x, rows + shift_y, reflect_on="pixel edges")


def _pixelate(x: Tensor, level: int, random: Random) -> Tensor:
    image = _to_pillow(x)
    small = [int(side * _PIXELATE_FACTOR[level]) for side in image.size]
    return _from_pillow(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def _jpeg_compression(x: Tensor, level: int, random: Random) -> Tensor:
    file = io.BytesIO()
    _to_pillow(x).save(file, "JPEG", quality=_JPEG_QUALITY[level])
    with Image.open(file) as image:
        return _from_pillow(image)


_FUNCTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
CORRUPTIONS = tuple(_FUNCTIONS)
NOT_COMPARABLE = ("frost",)


def _normal(random: Random, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))


def _to_pillow(x: Tensor) -> Image.Image:
    return Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _from_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@lru_cache
def _disk(radius: int, alias_std: float) -> Tensor:
    """An even disk that a Gaussian of 3×3 (5×5 past radius 8) has softened at its edge.

    The original's array ends with the disk at radius 8 and 10, and is mirrored there: the weights then sum to
    a little over 1, and images come out as much brighter. This is kept.
    """
    half, margin = max(8, radius), 1 if radius <= 8 else 2
    steps = torch.arange(-half, half + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).double()
    taps = _gaussian_taps(margin, alias_std)
    padded = F.pad((disk / disk.sum())[None, None], (margin,) * 4, mode="reflect")
    return F.conv2d(padded, torch.outer(taps, taps)[None, None])[0, 0].float()


def _gaussian_taps(radius: int, std: float) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / std) ** 2)
    return taps / taps.sum()


@lru_cache
def _blur_matrix(size: int, std: float, truncate: float, border: Literal["edge", "symmetric"]) -> Tensor:
    """A Gaussian filter of one axis as a matrix: the taps of what lies outside go where it is copied from.

    A matrix, as the filter may be several times as long as the image (elastic transform, severity 1).
    """
    radius = int(truncate * std + 0.5)
    positions = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    if border == "edge":
        positions = positions.clamp(0, size - 1)
    else:
        positions = positions % (2 * size)
        positions = torch.minimum(positions, 2 * size - 1 - positions)
    taps = _gaussian_taps(radius, std).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, positions, taps)


def _gaussian_blur(x: Tensor, std: float) -> Tensor:
    left, right = (_blur_matrix(size, std, 4.0, "edge").float() for size in x.shape[1:])
    return left @ x @ right.T


def _blur_along(x: Tensor, radius: int, std: float, angle: float) -> Tensor:
    """Mean of the 2·radius + 1 pixels from here on in one direction, with the weights exp(−i² / 2 std²).

    Places are rounded to whole pixels; beyond the border, its pixels are repeated.
    """
    num_taps = 2 * radius + 1
    weights = _gaussian_taps(2 * radius, std)[2 * radius :]
    direction = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    height, width = x.shape[1:]
    padded = F.pad(x[None], (num_taps,) * 4, mode="replicate")[0]
    blurred = torch.zeros_like(x)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        left, top = (num_taps + math.ceil(step * component - 0.5) for component in direction)
        blurred.add_(padded[:, top : top + height, left : left + width], alpha=weight)
    return blurred


def _zoom(x: Tensor, factor: float) -> Tensor:
    """The middle 1/factor of both sides, enlarged to the full size, bilinearly between outermost pixels."""
    sides = x.shape[1:]
    inner = [math.ceil(side / factor) for side in sides]
    middle = _crop_middle(x, inner)
    size = [round(side * factor) for side in inner]
    enlarged = F.interpolate(middle[None], size=size, mode="bilinear", align_corners=True)[0]
    return _crop_middle(enlarged, list(sides))


def _crop_middle(x: Tensor, sides: list[int]) -> Tensor:
    top, left = ((whole - side) // 2 for whole, side in zip(x.shape[1:], sides, strict=True))
    return x[:, top : top + sides[0], left : left + sides[1]]


def _sample(
    x: Tensor, columns: np.ndarray, rows: np.ndarray, *, reflect_on: Literal["pixel centres", "pixel edges"]
) -> Tensor:
    """The image at places in pixels, bilinearly; outside it is its mirror image."""
    height, width = x.shape[1:]
    on_centres = reflect_on == "pixel centres"
    if on_centres:
        grid = 2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1
    else:
        grid = (2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1
    places = torch.from_numpy(np.stack(grid, axis=-1).astype(np.float32))
    return F.grid_sample(
        x[None], places[None], mode="bilinear", padding_mode="reflection", align_corners=on_centres
    )[0]


def _plasma(height: int, width: int, decay: float, random: Random) -> Tensor:
    """A fractal surface in [0, 1] by the diamond-square algorithm on a torus, cut to the size.

    The random part of each halving is uniform and smaller by decay² than that of the one before.
    """
    size = 1 << (max(height, width) - 1).bit_length()
    surface = np.zeros((size, size))
    step, amplitude = size, 1.0
    while step > 1:
        half = step // 2
        corners = surface[::step, ::step]
        below, right = np.roll(corners, -1, axis=0), np.roll(corners, -1, axis=1)
        centres = (corners + below + right + np.roll(below, -1, axis=1)) / 4
        centres += amplitude * random.uniform(-1, 1, corners.shape)
        rows = (corners + right + centres + np.roll(centres, 1, axis=0)) / 4
        columns = (corners + below + centres + np.roll(centres, 1, axis=1)) / 4
        surface[half::step, half::step] = centres
        surface[::step, half::step] = rows + amplitude * random.uniform(-1, 1, corners.shape)
        surface[half::step, ::step] = columns + amplitude * random.uniform(-1, 1, corners.shape)
        step, amplitude = half, amplitude / decay**2
    low, high = surface.min(), surface.max()
    return torch.from_numpy(((surface - low) / (high - low))[:height, :width].astype(np.float32))
