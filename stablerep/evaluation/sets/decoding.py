"""Encoded images to upright RGB, by Pillow: JPEG, PNG and WebP of every mode."""

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from stablerep.data.decoding import MAX_IMAGE_PIXELS, to_rgb

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGE_BYTES = 64 * 2**20


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
        is_known = not isinstance(error, UnidentifiedImageError)  # whose words name an address in memory
        reason = " ".join(str(error).split()) if is_known else "no JPEG, PNG or WebP"
        raise ValueError(f"{name}: not a readable image ({reason})") from error
