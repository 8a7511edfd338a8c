"""Pixels to files and back: how an image is stored in a shard, and how a stored one is checked."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_gen.shards import MAX_IMAGE_PIXELS

_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def encode_image(
    pixels: npt.NDArray[np.uint8], image_format: str, image_quality: int, stored_image_size: int | None
) -> tuple[bytes, int, int]:
    """Encodes an image as it is stored.

    Args:
        pixels: uint8 array.
        image_format: `jpg`, `png` or `webp`.
        image_quality: 1 to 100, for jpg and webp.
        stored_image_size: Shorter side in pixels after resizing (Lanczos); None keeps the size.

    Shapes:
        pixels: [height, width, 3].

    Returns:
        The file's content, its width and its height in pixels.
    """
    picture = _resize(Image.fromarray(pixels), stored_image_size)
    return _encode(picture, image_format, image_quality), picture.width, picture.height


def decode_image(image: bytes, extension: str) -> npt.NDArray[np.uint8]:
    """Decodes a stored image in full.

    Args:
        image: The file.
        extension: `jpg`, `png` or `webp`; nothing else is decoded.

    Returns:
        uint8 array [height, width, 3].

    Raises:
        ValueError: It is no whole image of that format, or has more pixels than a stored image may have.
    """
    try:
        with Image.open(io.BytesIO(image), formats=[_PIL_FORMATS[extension]]) as picture:
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{picture.width}×{picture.height} pixels, at most {MAX_IMAGE_PIXELS} expected"
                )
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable {extension} image ({error})") from error


def _resize(picture: Image.Image, shorter_side: int | None) -> Image.Image:
    if shorter_side is None or min(picture.size) == shorter_side:
        return picture
    scale = shorter_side / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _encode(picture: Image.Image, image_format: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    picture.save(buffer, format=_PIL_FORMATS[image_format], **options)
    return buffer.getvalue()
