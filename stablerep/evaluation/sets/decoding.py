"""Encoded images to upright RGB, by Pillow: JPEG, PNG and WebP of every mode."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 2**26
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B")
_LEVELS_PER_LEVEL = 257  # 65535 / 255


def decode_image(data: bytes, name: str) -> Image.Image:
    """The upright RGB image of encoded bytes.

    What EXIF says of the orientation is done. Grey levels of 16 bits are scaled to 8; Pillow clips them.

    Raises:
        ValueError: If the bytes are no whole JPEG, PNG or WebP image or hold too many pixels; names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"at most {MAX_IMAGE_PIXELS} pixels, got {image.width}×{image.height}")
        return to_rgb(ImageOps.exif_transpose(image))
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(f"{name}: not a readable image ({' '.join(str(error).split())})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, its transparency left out."""
    if image.mode in _SIXTEEN_BIT_MODES:
        levels = np.asarray(image).astype(np.float32) / _LEVELS_PER_LEVEL
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    # A palette with transparency has to pass through RGBA; Pillow warns otherwise.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
