"""Decoding of whatever image files people have: upright, RGB, scaled to 8 bits; or one clear line."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from stablerep.evaluation.sets import decoding
from stablerep.evaluation.sets.decoding import decode_image

EncodeImage = Callable[[str, int], bytes]


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_a_torn_image_is_named(encode_image: EncodeImage) -> None:
    data = encode_image("red", 0)
    for broken in (b"", data[: len(data) // 2], b"not an image"):
        with pytest.raises(ValueError, match=r"^test/red/7.png: not a readable image"):
            decode_image(broken, "test/red/7.png")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, encode_image: EncodeImage
) -> None:
    monkeypatch.setattr(decoding, "MAX_IMAGE_PIXELS", 479)
    with pytest.raises(ValueError, match=r"a.png: .*at most 479 pixels, got 20×24"):
        decode_image(encode_image("red", 0), "a.png")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA"])
def test_images_of_any_mode_become_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    options = {"transparency": b"\0\1"} if mode == "P" else {}
    Image.new(mode, (8, 6)).save(buffer, "JPEG" if mode == "CMYK" else "PNG", **options)
    decoded = decode_image(buffer.getvalue(), "x")
    assert (decoded.mode, decoded.size) == ("RGB", (8, 6))


def test_grey_levels_of_16_bits_are_scaled_and_not_clipped() -> None:
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(levels)
    assert image.mode == "I;16"
    decoded = np.asarray(decode_image(encode(image), "x"))
    assert np.array_equal(decoded, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_colours_of_16_bits_are_scaled() -> None:
    # Pillow writes no such file; this is one of 2×1 pixels, by the PNG specification.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">6H", 65535, 0, 32896, 257, 514, 65535)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    decoded = np.asarray(decode_image(data, "x"))
    assert decoded.tolist() == [[[255, 0, 128], [1, 2, 255]]]


def test_grey_becomes_three_equal_channels() -> None:
    levels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    decoded = np.asarray(decode_image(encode(Image.fromarray(levels)), "x"))
    assert all(np.array_equal(decoded[..., channel], levels) for channel in range(3))


@pytest.mark.parametrize(
    ("cmyk", "rgb"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0,) * 3)],
)
def test_colours_of_print_become_those_of_the_screen(cmyk: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    data = encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
    decoded = np.asarray(decode_image(data, "x")).astype(int)
    assert np.abs(decoded - np.array(rgb)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_exif_is_done(orientation: int) -> None:
    """The stored image is turned as a camera would; EXIF says how, and the upright one comes back."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # bright at the top left alone
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(turned)), exif=exif)
    assert np.array_equal(np.asarray(decode_image(data, "x")), upright)
