import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from stablerep import augment
from stablerep.augment import (
    STRONG_VIEW,
    WEAK_VIEW,
    AugmentationConfig,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment_batch,
    crop_view,
    decode_image,
    draw_crop,
    gaussian_blur,
    normalize,
    to_grayscale,
)
from stablerep.backbones import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (adjust_brightness, oracle.adjust_brightness, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (adjust_contrast, oracle.adjust_contrast, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (adjust_saturation, oracle.adjust_saturation, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (adjust_hue, oracle.adjust_hue, [-0.5, -0.1, 0.0, 0.05, 0.1, 0.5]),
    ],
)
def test_colour_operation_equals_torchvision_image_by_image(ours, theirs, factors, images) -> None:  # type: ignore[no-untyped-def]
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours(images, torch.tensor(factors)), expected, atol=2e-6, rtol=0)


def test_hue_of_gray_pixels_is_left_alone() -> None:
    gray = torch.full((1, 3, 2, 2), 0.3)
    torch.testing.assert_close(adjust_hue(gray, torch.tensor([0.4])), gray)


def test_grayscale_equals_torchvision(images: torch.Tensor) -> None:
    torch.testing.assert_close(to_grayscale(images), oracle.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


def test_blur_equals_torchvision_image_by_image(images: torch.Tensor) -> None:
    sigmas = [0.1, 0.5, 1.0, 1.5, 2.0, 0.3]
    expected = torch.stack(
        [oracle.gaussian_blur(image, [13, 13], [s, s]) for image, s in zip(images, sigmas, strict=True)]
    )
    torch.testing.assert_close(gaussian_blur(images, torch.tensor(sigmas), 13), expected, atol=2e-6, rtol=0)


def test_blur_kernel_of_13_suffices_for_sigma_2() -> None:
    noise = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    wide = oracle.gaussian_blur(noise[0], [37, 37], [2.0, 2.0])
    assert (gaussian_blur(noise, torch.tensor([2.0]), 13)[0] - wide).abs().max() < 2 / 255


def test_normalisation_equals_torchvision(images: torch.Tensor) -> None:
    expected = oracle.normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalize(images, IMAGENET_MEAN, IMAGENET_STD), expected)


def test_crop_boxes_have_torchvisions_distribution() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(8), torch.zeros(3, 48, 64)
    ours = np.array([draw_crop(rng, 48, 64, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    drawn = [crop.make_params([image]) for _ in range(2000)]
    theirs = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in drawn])
    for column in range(4):
        grid = np.arange(65)
        distance = np.abs(
            (ours[:, column, None] <= grid).mean(axis=0) - (theirs[:, column, None] <= grid).mean(axis=0)
        ).max()
        assert distance < 1.63 * np.sqrt(2 / 2000)  # the Kolmogorov–Smirnov bound at 1 %


def test_crop_stays_inside_an_extreme_image() -> None:
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 50), (50, 1), (3, 200)]:
        top, left, h, w = draw_crop(rng, height, width, (0.08, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) > 0


def test_view_is_a_function_of_its_generator() -> None:
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    first, again, other = (crop_view(image, np.random.default_rng(s), 16, STRONG_VIEW) for s in (3, 3, 4))
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parameters_differ_within_a_batch() -> None:
    same = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(8, -1, -1, -1)
    views = augment_batch(same, STRONG_VIEW, np.random.default_rng(0), IMAGENET_MEAN, IMAGENET_STD)
    assert len({tuple(view.flatten().tolist()) for view in views}) >= 7


def test_weak_view_is_normalisation_alone_on_the_device() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    views = augment_batch(images, WEAK_VIEW, np.random.default_rng(0), IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(views, normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD))


def test_jitter_applies_each_operation_once_to_each_image_in_varying_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for name in names:

        def record(x: torch.Tensor, factor: torch.Tensor, name: str = name) -> torch.Tensor:
            calls.append((name, len(factor)))
            return x

        monkeypatch.setattr(augment, name, record)
    config = AugmentationConfig(jitter_probability=1.0, blur_probability=0.0)
    images = torch.zeros(240, 3, 2, 2, dtype=torch.uint8)
    augment_batch(images, config, np.random.default_rng(0), IMAGENET_MEAN, IMAGENET_STD)
    for name in names:
        counts = [count for called, count in calls if called == name]
        assert sum(counts) == 240
        assert len(counts) == 4  # at each of the four places for some images
        assert min(counts) > 240 / 4 / 2


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("cut", [5, 40, -30])
def test_truncated_image_is_named(image_format: str, cut: int) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, image_format)
    assert decode_image(buffer.getvalue(), "whole").shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"^image abc\.0 of 00000\.tar cannot be decoded: [^\n]+$"):
        decode_image(buffer.getvalue()[:cut], "abc.0 of 00000.tar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_kernel_size": 4}, "blur_kernel_size must be odd and above 0, got 4"),
        ({"hue": 0.6}, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], got 1.5"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be ascending"),
    ],
)
def test_impossible_augmentation_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**options)
