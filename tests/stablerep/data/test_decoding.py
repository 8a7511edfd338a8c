import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as oracle

from stablerep.augment import STRONG_VIEW, AugmentationConfig, draw_views
from stablerep.data import decoding
from stablerep.data.decoding import (
    decode_image,
    decode_upright,
    decode_views,
    read_jpeg_size,
    resize_short_side,
    resized_crop,
)

PLAIN = AugmentationConfig(flip_probability=0.0)


def smooth_pixels(height: int, width: int, cell: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("cut", [5, 40, -30])
def test_truncated_image_is_named(image_format: str, cut: int) -> None:
    data = encode(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8), image_format)
    assert decode_image(data, "whole").shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"^image abc\.0 of 00000\.tar cannot be decoded: [^\n]+$"):
        decode_image(data[:cut], "abc.0 of 00000.tar")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_decodes_as_pillow_does(options: dict[str, Any]) -> None:
    data = encode(smooth_pixels(41, 67), **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, "x").permute(1, 2, 0).numpy() - expected).max() <= 3  # upsampling


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("1", "JPEG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("1", "PNG"),
    ],
)
def test_image_of_another_mode_becomes_rgb(mode: str, image_format: str) -> None:
    image = Image.fromarray(smooth_pixels(20, 30)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    found = decode_image(buffer.getvalue(), "x").permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(found - expected).mean() < (0.5 if image_format == "PNG" else 8)


def test_grey_levels_of_16_bits_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    found = decode_image(encode(ramp, "PNG"), "x")
    assert (found - torch.from_numpy(ramp / 257)).abs().max() <= 0.5


def test_palette_with_transparency_decodes_without_a_warning() -> None:
    image = Image.fromarray(smooth_pixels(20, 30)).convert("P")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(range(200)))
    assert decode_image(buffer.getvalue(), "x").shape == (3, 20, 30)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_turned_as_its_metadata_say(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(smooth_pixels(24, 40), image_format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    found = decode_image(data, "x").permute(1, 2, 0).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 3
    assert np.array_equal(np.asarray(decode_upright(data, "x")), expected)
    view = torch.empty(1, 3, 16, 16, dtype=torch.uint8)
    config = AugmentationConfig((1.0, 1.0), (0.1, 10.0), flip_probability=0.0)
    draws = draw_views(np.random.default_rng(0), 1, config)
    decode_views([data], ["x"], draws, config, view)
    height, width = expected.shape[:2]
    box = draws.crop_box(0, height, width, config)
    whole = torch.from_numpy(found.copy()).permute(2, 0, 1)
    assert torch.equal(view[0], resized_crop(whole, box, 16))


def test_down_sampling_an_extreme_image_is_refused() -> None:
    config = AugmentationConfig(downsample_probability=1.0)
    draws = draw_views(np.random.default_rng(0), 1, config)
    data = encode(np.zeros((1, 60_000, 3), dtype=np.uint8), "PNG")
    with pytest.raises(ValueError, match=r"image thin cannot be decoded: .* would be \d+ at a short side of"):
        decode_views([data], ["thin"], draws, config, torch.empty(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(300)}])
def test_size_in_a_jpeg_header_is_found(options: dict[str, Any]) -> None:
    assert read_jpeg_size(encode(smooth_pixels(41, 67), **options)) == (41, 67)


def test_what_is_no_jpeg_of_three_colours_has_no_jpeg_size() -> None:
    gray = encode(smooth_pixels(20, 20)[..., 0])
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff", encode(smooth_pixels(20, 20), "PNG"), gray):
        assert read_jpeg_size(data) is None


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "MAX_IMAGE_PIXELS", 999)
    data = encode(smooth_pixels(20, 50), image_format)
    with pytest.raises(ValueError, match="it has 1000 pixels, at most 999 are read"):
        decode_image(data, "x")


@pytest.mark.parametrize("box", [(0, 0, 40, 60), (3, 5, 20, 31), (10, 7, 4, 5)])
def test_crop_equals_torchvisions(box: tuple[int, int, int, int]) -> None:
    image = torch.from_numpy(smooth_pixels(40, 60).copy()).permute(2, 0, 1)
    expected = oracle.resized_crop(image.float(), *box, [24, 24], antialias=True)
    assert (resized_crop(image, box, 24).float() - expected).abs().max() <= 1  # rounding to uint8


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 33)])
def test_short_side_equals_torchvisions(size: tuple[int, int]) -> None:
    image = torch.from_numpy(smooth_pixels(*size).copy()).permute(2, 0, 1)
    expected = oracle.resize(image.float(), [16], antialias=True)
    resized = resize_short_side(image, 16)
    assert resized.shape == expected.shape
    assert (resized.float() - expected).abs().max() <= 1


def test_views_are_functions_of_their_draws() -> None:
    images = [encode(smooth_pixels(48, 48) // divisor) for divisor in (1, 2)]
    out = [torch.empty(2, 3, 16, 16, dtype=torch.uint8) for _ in range(3)]
    for view, seed in zip(out, (3, 3, 4), strict=True):
        draws = draw_views(np.random.default_rng(seed), 2, STRONG_VIEW)
        decode_views(images, ["a", "b"], draws, STRONG_VIEW, view)
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


def test_flipped_view_is_the_mirror_image() -> None:
    data = encode(smooth_pixels(48, 48))
    out = torch.empty(2, 1, 3, 16, 16, dtype=torch.uint8)
    for view, probability in zip(out, (0.0, 1.0), strict=True):
        config = AugmentationConfig(flip_probability=probability)
        decode_views([data], ["x"], draw_views(np.random.default_rng(0), 1, config), config, view)
    assert torch.equal(out[0].flip(-1), out[1])


@pytest.mark.parametrize("size", [(512, 512), (511, 389), (1000, 700)])
def test_scaled_decoding_gives_the_view_of_full_decoding_with_the_crop_on_the_coarser_grid(
    size: tuple[int, int],
) -> None:
    pixels = smooth_pixels(*size, cell=64)
    data, full = encode(pixels, quality=95), torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()
    scales = set()
    for seed in range(20):
        draws = draw_views(np.random.default_rng(seed), 1, PLAIN)
        box = draws.crop_box(0, *size, PLAIN)
        scale = max(scale for scale in (1, 2, 4, 8) if min(box[2:]) >= 64 * scale or scale == 1)
        top, left, height, width = (round(value / scale) * scale for value in box)
        expected = oracle.resized_crop(
            full, top, left, min(height, size[0] - top), min(width, size[1] - left), [64, 64], antialias=True
        )
        view = torch.empty(1, 3, 64, 64, dtype=torch.uint8)
        decode_views([data], ["x"], draws, PLAIN, view)
        assert (view - expected).abs().mean() < 2
        scales.add(scale)
    assert {2, 4} <= scales


@pytest.mark.parametrize(("num_pixels", "scale"), [(0.3, 1), (1.99, 1), (2.0, 2), (7.9, 4), (50.0, 8)])
def test_scale_never_leaves_fewer_pixels_than_the_view_has(num_pixels: float, scale: int) -> None:
    assert decoding._largest_scale(num_pixels) == scale


def test_downsampled_view_has_the_detail_of_the_small_size_alone() -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than 64 pixels can show
    config = AugmentationConfig(
        crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0, downsample_probability=1.0
    )
    out = torch.empty(1, 3, 256, 256, dtype=torch.uint8)
    decode_views(
        [encode(stripes, "PNG")], ["x"], draw_views(np.random.default_rng(0), 1, config), config, out
    )
    assert out.float().std() < 2
    assert 120 < out.float().mean() < 135
