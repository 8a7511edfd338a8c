"""Encoded images to views, in a worker: decode, crop, resize, flip; uint8 throughout.

Every image becomes upright RGB: what EXIF says of the orientation is done, transparency is left out, grey
levels of 16 bits are scaled to 8 (`decode_upright`). JPEG files of three colours that lie upright are decoded
by libjpeg-turbo (simplejpeg), strictly: what it could mend is an error. Where the crop has at least 2, 4 or 8
times the view's side in both directions, they are decoded at that fraction, which spares most of the inverse
transform: never below the view's own resolution. The crop is drawn before the pixels are there, and brought
to the coarser grid.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

from stablerep.augment import AugmentationConfig, ViewDraws

MAX_IMAGE_PIXELS = 64 << 20
_FORMATS = ("JPEG", "PNG", "WEBP")
_SCALES = (8, 4, 2)
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what every decoder reads
_NO_LENGTH = (0x01, *range(0xD0, 0xD9))
_APP1 = 0xE1  # EXIF or XMP, which may turn the image
_NUM_COLOURS = 3
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B")
_LEVELS_PER_LEVEL = 257  # 65535 / 255


def decode_image(data: bytes | bytearray, name: str) -> Tensor:
    """Decodes a JPEG, PNG or WebP file.

    Args:
        data: The file's bytes.
        name: What an error message calls the image.

    Shapes:
        -> uint8 [3, H, W], upright RGB

    Raises:
        ValueError: If the bytes are not such an image, are cut off, or hold more than `MAX_IMAGE_PIXELS`.
    """
    return _decode(data, name, 1, read_jpeg_size(data))


def decode_upright(data: bytes | bytearray, name: str) -> Image.Image:
    """Decodes a JPEG, PNG or WebP file of any mode by Pillow: the rule that `decode_image` follows, too.

    Args:
        data: The file's bytes.
        name: What an error message calls the image.

    Returns:
        The upright image, RGB.

    Raises:
        ValueError: As for `decode_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_num_pixels(image.width * image.height)
                return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _undecodable(name, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: grey levels of 16 bits scaled to 8, transparency left out."""
    if image.mode in _SIXTEEN_BIT_MODES:  # Pillow clips them at 255
        levels = np.asarray(image).astype(np.float32) / _LEVELS_PER_LEVEL
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    # A palette with transparency has to pass through RGBA; Pillow warns otherwise.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def decode_views(
    images: Sequence[bytes], names: Sequence[str], draws: ViewDraws, config: AugmentationConfig, out: Tensor
) -> None:
    """Decodes the images of a caption and writes its views.

    Args:
        images: The files: one a view, or one for all.
        names: What error messages call them.
        draws: What was drawn for the views.
        config: Distribution of the views.
        out: Where to.

    Shapes:
        out uint8 [views, 3, S, S]

    Raises:
        ValueError: As for `decode_image`.
    """
    num_views = len(out)
    groups = [[view] for view in range(num_views)] if len(images) == num_views else [list(range(num_views))]
    for data, name, views in zip(images, names, groups, strict=True):
        jpeg_size = read_jpeg_size(data)
        upright = None if jpeg_size else decode_image(data, name)
        height, width = upright.shape[1:] if upright is not None else jpeg_size or (0, 0)
        plans = [_plan(draws, view, height, width, out.shape[-1], config) for view in views]
        scale = 1 if upright is not None else _largest_scale(min(num_pixels for _, num_pixels in plans))
        decoded = _decode(data, name, scale, jpeg_size) if upright is None else upright
        for view, (box, _) in zip(views, plans, strict=True):
            image = decoded
            if short_side := int(draws.short_sides[view]):
                try:
                    image = resize_short_side(image, short_side)
                    image = resize_short_side(image, config.downsample_restored_size)
                except ValueError as error:
                    raise _undecodable(name, error) from error
                box = draws.crop_box(view, image.shape[1], image.shape[2], config)
            else:
                box = _scale_box(box, scale, image)
            crop = resized_crop(image, box, out.shape[-1])
            out[view].copy_(crop.flip(-1) if draws.is_flipped[view] else crop)


def _plan(
    draws: ViewDraws, view: int, height: int, width: int, image_size: int, config: AugmentationConfig
) -> tuple[tuple[int, int, int, int], float]:
    """The crop of a full image, and how many of its pixels make one of what the view needs."""
    if short_side := int(draws.short_sides[view]):
        return (0, 0, height, width), min(height, width) / short_side
    box = draws.crop_box(view, height, width, config)
    return box, min(box[2:]) / image_size


def read_jpeg_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Height and width of an upright JPEG file of three colours and 8 bits, from its header; or None."""
    if data[:2] != b"\xff\xd8":
        return None
    place, has_metadata = 2, False
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF or marker in _NO_LENGTH:
            place += 1 if marker == 0xFF else 2
            continue
        if marker in _START_OF_FRAME:
            height, width = (int.from_bytes(data[at : at + 2]) for at in (place + 5, place + 7))
            is_usual = data[place + 4] == 8 and data[place + 9] == _NUM_COLOURS
            is_usual = is_usual and not (has_metadata and _is_turned(data))
            return (height, width) if is_usual and height and width else None
        has_metadata = has_metadata or marker == _APP1
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def _is_turned(data: bytes | bytearray) -> bool:
    """Whether the metadata name an orientation, or cannot be read here."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the header alone
            return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


def resized_crop(image: Tensor, box: tuple[int, int, int, int], image_size: int) -> Tensor:
    """The box (top, left, height, width) at image_size × image_size, bilinear with antialiasing.

    Shapes:
        uint8 [3, H, W] -> uint8 [3, image_size, image_size]
    """
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    return _resize(part, image_size, image_size)[0]


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """The image with its shorter side at `size` pixels, as torchvision's Resize.

    Shapes:
        uint8 [3, H, W] -> uint8 [3, H', W'] with min(H', W') = size

    Raises:
        ValueError: If it would have more than `MAX_IMAGE_PIXELS`.
    """
    height, width = image.shape[1:]
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    if size * other > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{width}×{height} pixels would be {size * other} at a short side of {size}, "
            f"at most {MAX_IMAGE_PIXELS} are made"
        )
    return _resize(image[None], *((size, other) if height <= width else (other, size)))[0]


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    # torch's vectorised kernel for uint8 is that of images whose channels lie side by side.
    packed = images.contiguous(memory_format=torch.channels_last)
    return F.interpolate(packed, (height, width), mode="bilinear", antialias=True)


def _largest_scale(num_pixels: float) -> int:
    return next((scale for scale in _SCALES if num_pixels >= scale), 1)


def _scale_box(box: tuple[int, int, int, int], scale: int, image: Tensor) -> tuple[int, int, int, int]:
    """The box of a full image in one that was decoded smaller, to the nearest pixel of that."""
    top, left, height, width = (round(value / scale) for value in box)
    return top, left, min(height, image.shape[1] - top), min(width, image.shape[2] - left)


def _decode(data: bytes | bytearray, name: str, scale: int, jpeg_size: tuple[int, int] | None) -> Tensor:
    if jpeg_size is None:
        return torch.from_numpy(np.array(decode_upright(data, name))).permute(2, 0, 1)
    height, width = jpeg_size
    least = {"min_height": height // scale, "min_width": width // scale, "min_factor": scale}
    try:
        _check_num_pixels(height * width)
        pixels = decode_jpeg(data, strict=True, **(least if scale > 1 else {}))
    except (OSError, ValueError) as error:
        raise _undecodable(name, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _check_num_pixels(num_pixels: int) -> None:
    if num_pixels > MAX_IMAGE_PIXELS:
        raise ValueError(f"it has {num_pixels} pixels, at most {MAX_IMAGE_PIXELS} are read")


def _undecodable(name: str, error: Exception) -> ValueError:
    is_image = not isinstance(error, UnidentifiedImageError)
    reason = str(error).splitlines()[0] if is_image and str(error) else "no image"
    return ValueError(f"image {name} cannot be decoded: {reason}")
