import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from stablerep import augment
from stablerep.augment import (
    DOWNSAMPLED_VIEW,
    STRONG_VIEW,
    WEAK_VIEW,
    AugmentationConfig,
    Colours,
    adjust_brightness_,
    adjust_contrast_,
    adjust_hue_,
    adjust_saturation_,
    augment_batch,
    draw_views,
    gaussian_blur,
    normalize,
    to_grayscale,
)
from stablerep.backbones import IMAGENET_MEAN, IMAGENET_STD

NUM_DRAWS = 4000
LEAST_P = 0.01  # with fixed seeds


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (adjust_brightness_, oracle.adjust_brightness, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (adjust_contrast_, oracle.adjust_contrast, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (adjust_saturation_, oracle.adjust_saturation, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (adjust_hue_, oracle.adjust_hue, [-0.5, -0.1, 0.0, 0.05, 0.1, 0.5]),
        (adjust_hue_, oracle.adjust_hue, [-0.4, -1 / 6, 1 / 6, 0.2, 1 / 3, 0.49]),
        (augment._turn_hues_, oracle.adjust_hue, [-0.5, -0.1, 0.0, 0.05, 0.1, 0.5]),  # as on a device
    ],
)
def test_colour_operation_equals_torchvision_image_by_image(ours, theirs, factors, images) -> None:  # type: ignore[no-untyped-def]
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours(images.clone(), torch.tensor(factors)), expected, atol=2e-6, rtol=0)


def test_hue_of_gray_pixels_is_left_alone() -> None:
    gray = torch.full((1, 3, 2, 2), 0.3)
    torch.testing.assert_close(adjust_hue_(gray.clone(), torch.tensor([0.4])), gray)


def test_hue_of_pixels_on_a_border_between_sectors_equals_torchvisions() -> None:
    levels = torch.tensor([0.0, 0.25, 1.0])
    pixels = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 3, 9)  # two channels equal, or three
    for shift in (-0.5, -0.1, 0.0, 0.1, 0.5):
        expected = oracle.adjust_hue(pixels, shift)
        found = adjust_hue_(pixels[None].clone(), torch.tensor([shift]))[0]
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_grayscale_equals_torchvision(images: torch.Tensor) -> None:
    torch.testing.assert_close(to_grayscale(images), oracle.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


def test_blur_equals_torchvision_image_by_image(images: torch.Tensor) -> None:
    sigmas = [0.1, 0.5, 1.0, 1.5, 2.0, 0.3]
    expected = torch.stack(
        [oracle.gaussian_blur(image, [13, 13], [s, s]) for image, s in zip(images, sigmas, strict=True)]
    )
    torch.testing.assert_close(gaussian_blur(images, torch.tensor(sigmas), 13), expected, atol=2e-5, rtol=0)


def test_blur_kernel_of_13_suffices_for_sigma_2() -> None:
    noise = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    wide = oracle.gaussian_blur(noise[0], [37, 37], [2.0, 2.0])
    assert (gaussian_blur(noise, torch.tensor([2.0]), 13)[0] - wide).abs().max() < 2 / 255


def test_normalisation_equals_torchvision(images: torch.Tensor) -> None:
    expected = oracle.normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalize(images, IMAGENET_MEAN, IMAGENET_STD), expected)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 64), (30, 100)])
def test_crop_boxes_have_torchvisions_distribution(height: int, width: int) -> None:
    draws = draw_views(np.random.default_rng(0), NUM_DRAWS, STRONG_VIEW)
    ours = np.array([draws.crop_box(i, height, width, STRONG_VIEW) for i in range(NUM_DRAWS)])
    crop, image = v2.RandomResizedCrop(8), torch.zeros(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(NUM_DRAWS)]
    theirs = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in drawn])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > LEAST_P
    areas = (boxes[:, 2] * boxes[:, 3] for boxes in (ours, theirs))
    assert ks_2samp(*areas).pvalue > LEAST_P


def test_factors_of_colour_have_torchvisions_distribution() -> None:
    colours = draw_views(np.random.default_rng(0), NUM_DRAWS, STRONG_VIEW).colours
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    drawn = [jitter.make_params([]) for _ in range(NUM_DRAWS)]
    for index, name in enumerate(["brightness", "contrast", "saturation", "hue"]):
        theirs = [float(params[f"{name}_factor"]) for params in drawn]
        assert ks_2samp(colours.factors[:, index], theirs).pvalue > LEAST_P


def test_sigma_of_blur_has_torchvisions_distribution() -> None:
    sigma = draw_views(np.random.default_rng(0), NUM_DRAWS, STRONG_VIEW).colours.sigma
    blur = v2.GaussianBlur(13, (0.1, 2.0))
    theirs = [float(blur.make_params([])["sigma"][0]) for _ in range(NUM_DRAWS)]
    assert ks_2samp(sigma[sigma > 0], theirs).pvalue > LEAST_P


def test_orders_of_jitter_are_uniform() -> None:
    order = draw_views(np.random.default_rng(0), NUM_DRAWS, STRONG_VIEW).colours.order
    _, counts = np.unique(order[order[:, 0] >= 0], axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > LEAST_P


def test_each_operation_has_its_published_probability_on_its_own() -> None:
    draws = draw_views(np.random.default_rng(0), NUM_DRAWS, DOWNSAMPLED_VIEW)
    happens = {
        0.8: draws.colours.order[:, 0] >= 0,
        0.2: draws.colours.is_gray,
        0.5: draws.is_flipped,
        0.05: draws.short_sides > 0,
    }
    blurred = draws.colours.sigma > 0
    assert binomtest(int(blurred.sum()), NUM_DRAWS, 0.5).pvalue > LEAST_P
    for probability, chosen in happens.items():
        assert binomtest(int(chosen.sum()), NUM_DRAWS, probability).pvalue > LEAST_P
        both = int((chosen & blurred).sum())
        assert binomtest(both, int(chosen.sum()), 0.5).pvalue > LEAST_P
    assert set(draws.short_sides.tolist()) == {0, 64, 128}


def test_crop_stays_inside_an_extreme_image() -> None:
    draws = draw_views(np.random.default_rng(0), 4, STRONG_VIEW)
    for index, (height, width) in enumerate([(1, 1), (1, 50), (50, 1), (3, 200)]):
        top, left, h, w = draws.crop_box(index, height, width, STRONG_VIEW)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) > 0


def draw_colours(num_images: int, config: AugmentationConfig) -> Colours:
    return draw_views(np.random.default_rng(0), num_images, config).colours


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batch_equals_torchvision_image_by_image(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 20, 22), dtype=torch.uint8, generator=generator)
    colours = draw_colours(24, STRONG_VIEW)
    operations = (
        oracle.adjust_brightness,
        oracle.adjust_contrast,
        oracle.adjust_saturation,
        oracle.adjust_hue,
    )
    expected = []
    for index, image in enumerate(images.float() / 255):
        for operation in colours.order[index]:
            if operation >= 0:
                image = operations[operation](image, float(colours.factors[index, operation]))
        if colours.is_gray[index]:
            image = oracle.rgb_to_grayscale(image, 3)
        if (sigma := float(colours.sigma[index])) > 0:
            image = oracle.gaussian_blur(image, [13, 13], [sigma, sigma])
        expected.append(oracle.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    views = augment_batch(images.to(device), colours, STRONG_VIEW, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(views.cpu(), torch.stack(expected), atol=5e-5, rtol=0)


def test_images_of_a_batch_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    colours = draw_colours(12, STRONG_VIEW)
    alone = augment_batch(images, colours, STRONG_VIEW, IMAGENET_MEAN, IMAGENET_STD)
    together = augment._augment(images, colours, STRONG_VIEW, IMAGENET_MEAN, IMAGENET_STD)  # as on a device
    torch.testing.assert_close(alone, together, atol=5e-5, rtol=0)


def test_parameters_differ_within_a_batch() -> None:
    same = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(8, -1, -1, -1)
    views = augment_batch(same, draw_colours(8, STRONG_VIEW), STRONG_VIEW, IMAGENET_MEAN, IMAGENET_STD)
    assert len({tuple(view.flatten().tolist()) for view in views}) >= 7


def test_weak_view_is_normalisation_alone_on_the_device() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    views = augment_batch(images, draw_colours(4, WEAK_VIEW), WEAK_VIEW, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(views, normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_kernel_size": 4}, "blur_kernel_size must be odd and above 0, got 4"),
        ({"hue": 0.6}, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], got 1.5"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be ascending"),
        ({"downsample_probability": -0.1}, r"downsample_probability must be in \[0, 1\], got -0.1"),
        ({"downsample_sizes": ()}, "downsample_sizes must be one or more, each >= 1"),
    ],
)
def test_impossible_augmentation_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**options)
