"""Random views: crops in the worker, as uint8; colour, blur and normalisation batched on the device.

    worker   decode -> RandomResizedCrop -> horizontal flip                  `decode_image`, `crop_view`
    device   ColorJitter -> grayscale -> Gaussian blur -> normalisation      `augment_batch`

Every random number comes from a generator that the caller passes, so that a view depends on (seed, epoch,
caption) and a batch's colours on (seed, step, rank), never on the number of workers. Each operation equals
torchvision's on equal parameters; here the parameters differ from image to image of one batch.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

MAX_IMAGE_PIXELS = 64 << 20
_NUM_CROP_TRIALS = 10
_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, torchvision's rounding


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

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur"):
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


STRONG_VIEW = AugmentationConfig()
WEAK_VIEW = AugmentationConfig(
    crop_scale=(0.5, 1.0),
    flip_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
)

# --- worker


def decode_image(data: bytes, name: str) -> Tensor:
    """Decodes a JPEG, PNG or WebP file.

    Args:
        data: The file's bytes.
        name: What an error message calls the image.

    Shapes:
        -> uint8 [3, H, W]

    Raises:
        ValueError: If the bytes are not such an image, are cut off, or hold more than `MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:  # reads the header alone
            if (num_pixels := image.width * image.height) > MAX_IMAGE_PIXELS:
                raise ValueError(f"it has {num_pixels} pixels, at most {MAX_IMAGE_PIXELS} are read")
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise ValueError(f"image {name} cannot be decoded: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def draw_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of RandomResizedCrop, with torchvision's distribution."""
    log_ratio = np.log(ratio)
    for _ in range(_NUM_CROP_TRIALS):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*log_ratio))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])  # the largest central crop of an allowed ratio
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_view(image: Tensor, rng: np.random.Generator, image_size: int, config: AugmentationConfig) -> Tensor:
    """RandomResizedCrop (bilinear, antialiased) and horizontal flip of one image.

    Shapes:
        uint8 [3, H, W] -> uint8 [3, image_size, image_size]
    """
    top, left, height, width = draw_crop(
        rng, image.shape[1], image.shape[2], config.crop_scale, config.crop_ratio
    )
    view: Tensor = resized_crop(image, top, left, height, width, [image_size, image_size], antialias=True)
    return horizontal_flip(view) if rng.random() < config.flip_probability else view


# --- device


def augment_batch(
    images: Tensor,
    config: AugmentationConfig,
    rng: np.random.Generator,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """ColorJitter, grayscale, blur and normalisation, with parameters of its own for each image.

    Shapes:
        uint8 [N, 3, H, W] -> float32 [N, 3, H, W]
    """
    x = images.float() / 255
    x = _jitter(x, config, rng)
    rows = _rows(rng.random(len(x)) < config.grayscale_probability, x)
    x[rows] = to_grayscale(x[rows])
    sigma = rng.uniform(*config.blur_sigma, size=len(x))
    chosen = rng.random(len(x)) < config.blur_probability
    if chosen.any():
        rows = _rows(chosen, x)
        x[rows] = gaussian_blur(x[rows], _column(sigma[chosen], x), config.blur_kernel_size)
    return normalize(x, mean, std)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x − mean) / std by channel.

    Shapes:
        float [N, 3, H, W] in [0, 1] -> float [N, 3, H, W]
    """
    shape = (1, len(mean), 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def _jitter(x: Tensor, config: AugmentationConfig, rng: np.random.Generator) -> Tensor:
    """The four operations of ColorJitter in an order of its own for each image."""
    num_images = len(x)
    applied = rng.random(num_images) < config.jitter_probability
    order = rng.permuted(np.tile(np.arange(4), (num_images, 1)), axis=1)  # [N, 4]
    strengths = (config.brightness, config.contrast, config.saturation)
    factors = [rng.uniform(max(0.0, 1 - s), 1 + s, size=num_images) for s in strengths]
    factors.append(rng.uniform(-config.hue, config.hue, size=num_images))
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for place in range(4):
        for index, (operation, factor) in enumerate(zip(operations, factors, strict=True)):
            chosen = applied & (order[:, place] == index)
            if (*strengths, config.hue)[index] > 0 and chosen.any():
                rows = _rows(chosen, x)
                x[rows] = operation(x[rows], _column(factor[chosen], x))
    return x


def _rows(chosen: NDArray[np.bool_], like: Tensor) -> Tensor:
    """Indices of the chosen images, on their device."""
    return torch.from_numpy(np.flatnonzero(chosen)).to(like.device)


def _column(values: NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor · x + (1 − factor) · other, clamped to [0, 1]."""
    f = factor.view(-1, 1, 1, 1)
    return (x * f + other * (1 - f)).clamp_(0, 1)


def _luma(x: Tensor) -> Tensor:
    return (x * x.new_tensor(_GRAY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def to_grayscale(x: Tensor) -> Tensor:
    """ITU-R 601-2 luma on all three channels.

    Shapes:
        [N, 3, H, W] -> [N, 3, H, W]
    """
    return _luma(x).expand_as(x)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """factor · x, clamped.

    Shapes:
        x [N, 3, H, W] in [0, 1], factor [N] -> [N, 3, H, W]
    """
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luma.

    Shapes:
        x [N, 3, H, W] in [0, 1], factor [N] -> [N, 3, H, W]
    """
    return _blend(x, _luma(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's luma.

    Shapes:
        x [N, 3, H, W] in [0, 1], factor [N] -> [N, 3, H, W]
    """
    return _blend(x, _luma(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` of the colour circle, value and saturation kept.

    With value v, chroma c and hue h in [0, 6), a channel is v − c · clamp(min(k, 4 − k), 0, 1), where
    k = (n + h) mod 6 and n = 5, 3, 1 for red, green, blue: no six-way choice.

    Shapes:
        x [N, 3, H, W] in [0, 1], shift [N] in [-0.5, 0.5] -> [N, 3, H, W]
    """
    value = x.amax(dim=1)  # [N, H, W]
    chroma = value - x.amin(dim=1)
    red, green, blue = x.unbind(dim=1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        red == value,
        (green - blue) / divisor,
        torch.where(green == value, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * shift.view(-1, 1, 1)
    n = x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = (n + hue.unsqueeze(1)).remainder(6)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Separable Gaussian blur with a sigma of its own for each image, reflecting at the border.

    Args:
        x: The images.
        sigma: Standard deviation, pixels, above 0.
        kernel_size: Width of the kernel, pixels, odd, at most 2 · min(H, W) − 1.

    Shapes:
        x [N, 3, H, W], sigma [N] -> [N, 3, H, W]
    """
    num_images, channels, height, width = x.shape
    radius = kernel_size // 2
    if radius >= min(height, width):
        limit = 2 * min(height, width)
        raise ValueError(f"blur_kernel_size must be < {limit} at this size, got {kernel_size}")
    place = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-0.5 * (place / sigma.view(-1, 1)).square()).exp()  # [N, K]
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    groups = num_images * channels
    flat = F.pad(x.reshape(num_images, channels, height, width), [radius] * 4, mode="reflect")
    flat = flat.reshape(1, groups, height + 2 * radius, width + 2 * radius)
    flat = F.conv2d(flat, kernel.view(groups, 1, 1, kernel_size), groups=groups)
    flat = F.conv2d(flat, kernel.view(groups, 1, kernel_size, 1), groups=groups)
    return flat.view(num_images, channels, height, width)
