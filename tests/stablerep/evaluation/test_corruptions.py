"""ImageNet-C's corruptions: hand calculations, SciPy, and what each must do whatever its draws."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from stablerep.evaluation import corruptions
from stablerep.evaluation.corruptions import (
    CORRUPTIONS,
    NOT_COMPARABLE,
    SEVERITIES,
    corrupt,
)


def draw_image(seed: int, height: int = 64, width: int = 64) -> Tensor:
    """Smooth coloured shapes with some texture: what blurs and noises both change."""
    random = np.random.default_rng(seed)
    coarse = scipy.ndimage.zoom(random.random((3, height // 8, width // 8)), (1, 8, 8), order=1)
    shapes = (
        90 + 110 * coarse + 25 * (scipy.ndimage.gaussian_filter(random.normal(size=coarse.shape), (0, 1, 1)))
    )
    return torch.from_numpy(shapes.clip(0, 255).astype(np.uint8))


def grey(level: int, side: int = 64) -> Tensor:
    return torch.full((3, side, side), level, dtype=torch.uint8)


def test_the_fifteen_are_those_of_the_paper() -> None:
    noise = ["gaussian_noise", "shot_noise", "impulse_noise"]
    blur = ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"]
    weather = ["snow", "frost", "fog", "brightness"]
    digital = ["contrast", "elastic_transform", "pixelate", "jpeg_compression"]
    assert list(CORRUPTIONS) == noise + blur + weather + digital
    assert set(NOT_COMPARABLE) < set(CORRUPTIONS)


def distance(image: Tensor, corrupted: Tensor, corruption: str) -> Tensor:
    """Mean squared error; where a layer brightens what is also darkened, what is left of the correlation."""
    if corruption in ("snow", "frost"):
        return 1 - torch.corrcoef(torch.stack([image.flatten(), corrupted.flatten()]).float())[0, 1]
    return (corrupted.float() - image.float()).square().mean()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_each_severity_is_farther_from_the_clean_image(corruption: str) -> None:
    images = [draw_image(seed) for seed in range(40)]
    distances = {0: 0.0}
    for severity in SEVERITIES:
        all_distances = [
            distance(image, corrupt(image, corruption, severity, image_name=str(index)), corruption)
            for index, image in enumerate(images)
        ]
        distances[severity] = float(torch.stack(all_distances).mean())
    # The published constants of two corruptions trade one thing for another: passes for distance, and one
    # affine shift of the whole image for many small ones.
    orders: dict[str, list[tuple[int, ...]]] = {
        "glass_blur": [(0, 1, 3), (0, 2, 4, 5)],
        "elastic_transform": [(0, 1, 2), (0, 3, 5)],
    }
    for order in orders.get(corruption, [(0, *SEVERITIES)]):
        for less, more in itertools.pairwise(order):
            assert distances[less] < distances[more]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_shape_type_and_layout_stay(corruption: str) -> None:
    image = draw_image(0, 40, 56)
    before = image.clone()
    first = corrupt(image, corruption, 5, image_name="a")
    last = corrupt(image.permute(1, 2, 0), corruption, 5, image_name="a")
    assert torch.equal(image, before)
    assert (first.dtype, first.shape, last.shape) == (torch.uint8, (3, 40, 56), (40, 56, 3))
    assert torch.equal(first, last.permute(2, 0, 1))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_draws_depend_on_name_and_seed_alone(corruption: str) -> None:
    image = draw_image(1)
    result = corrupt(image, corruption, 3, image_name="train/a.jpg")
    torch.manual_seed(9)
    corrupt(image, corruption, 3, image_name="train/b.jpg")  # what was drawn in between is of no matter
    assert torch.equal(result, corrupt(image, corruption, 3, image_name="train/a.jpg"))
    deterministic = {
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    }
    other_name = corrupt(image, corruption, 3, image_name="train/b.jpg")
    other_seed = corrupt(image, corruption, 3, image_name="train/a.jpg", seed=1)
    for other in (other_name, other_seed):
        assert torch.equal(result, other) == (corruption in deterministic)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_adds_to_the_value_of_hsv(severity: int) -> None:
    image = draw_image(2, 32, 32)
    image[:, :3] = torch.tensor([[0, 0, 0], [255, 255, 255], [10, 250, 0]], dtype=torch.uint8).T[:, :, None]
    result = corrupt(image, "brightness", severity, image_name="")
    for row, column in [(0, 0), (1, 0), (2, 0), (9, 3), (20, 20), (31, 7)]:
        h, s, v = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
        rgb = colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.1 * severity))
        assert result[:, row, column].tolist() == pytest.approx([255 * c for c in rgb], abs=0.51)


@pytest.mark.parametrize(("severity", "factor"), list(enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1)))
def test_contrast_draws_values_to_the_mean_of_their_channel(severity: int, factor: float) -> None:
    image = grey(100)
    image[0, :32] = 208
    result = corrupt(image, "contrast", severity, image_name="")
    assert set(result[0, :32].unique().tolist()) == {round(154 + 54 * factor)}
    assert set(result[0, 32:].unique().tolist()) == {round(154 - 54 * factor)}
    assert set(result[1:].unique().tolist()) == {100}


@pytest.mark.parametrize(("severity", "block"), [(2, 2), (5, 4)])
def test_pixelate_takes_the_means_of_blocks(severity: int, block: int) -> None:
    image = draw_image(3, 32, 48)
    result = corrupt(image, "pixelate", severity, image_name="").float()
    means = torch.nn.functional.avg_pool2d(image.float(), block)
    expected = means.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
    assert float((result - expected).abs().max()) <= 1  # Pillow rounds after the rows and after the columns
    even = result.unflatten(1, (-1, block)).unflatten(3, (-1, block))
    assert torch.equal(even, even[:, :, :1, :, :1].expand_as(even))


@pytest.mark.parametrize(("severity", "quality"), list(enumerate((25, 18, 15, 10, 7), 1)))
def test_jpeg_rounds_the_mean_of_a_block_to_the_steps_of_its_quality(severity: int, quality: int) -> None:
    # Of a grey image only the mean coefficient is left, 8 · (level − 128), in steps that the standard's
    # table gives as 16 at quality 50, scaled by 50 / quality.
    step = (16 * (5000 // quality) + 50) // 100
    for level in (4, 77, 131, 200):
        expected = 128 + round(8 * (level - 128) / step) * step / 8
        result = corrupt(grey(level), "jpeg_compression", severity, image_name="").float()
        assert float((result - min(max(expected, 0), 255)).abs().max()) <= 1


def test_noises_have_their_moments() -> None:
    mid = grey(128, 128)
    for severity, std in zip(SEVERITIES, (0.08, 0.12, 0.18), strict=False):
        noise = (corrupt(mid, "gaussian_noise", severity, image_name="a").double() - 128) / 255
        assert float(noise.std()) == pytest.approx(std, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.003)
    dim = grey(51, 128)  # a fifth of white: c / 5 photons on average
    for severity, photons in zip(SEVERITIES, (60, 25, 12), strict=False):
        shots = corrupt(dim, "shot_noise", severity, image_name="a").double() / 255
        assert float(shots.mean()) == pytest.approx(0.2, rel=0.02)
        assert float(shots.var()) == pytest.approx(0.2 / photons, rel=0.05)
        assert float((shots * photons - (shots * photons).round()).abs().max()) < 0.5 * photons / 255 + 1e-6
    for severity, amount in zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True):
        impulses = corrupt(mid, "impulse_noise", severity, image_name="a")
        assert float((impulses == 255).double().mean()) == pytest.approx(amount / 2, rel=0.08)
        assert float((impulses == 0).double().mean()) == pytest.approx(amount / 2, rel=0.08)
        assert set(impulses.unique().tolist()) == {0, 128, 255}


@pytest.mark.parametrize("corruption", ["glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
def test_blurs_leave_an_even_image_as_it_is(corruption: str) -> None:
    for severity in SEVERITIES:
        result = corrupt(grey(93), corruption, severity, image_name="a").float()
        assert float((result - 93).abs().max()) == 0


@pytest.mark.parametrize(
    ("severity", "radius", "std"), [(1, 3, 0.1), (2, 4, 0.5), (3, 6, 0.5), (4, 8, 0.5), (5, 10, 0.5)]
)
def test_defocus_is_scipys_correlation_with_a_softened_disk(severity: int, radius: int, std: float) -> None:
    half, reach = (8, 1) if radius <= 8 else (10, 2)
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
    disk = (rows**2 + columns**2 <= radius**2) / (rows**2 + columns**2 <= radius**2).sum()
    kernel = scipy.ndimage.gaussian_filter(disk, std, mode="mirror", radius=reach)
    image = draw_image(4, 50, 40)
    oracle = np.stack([scipy.ndimage.correlate(c, kernel, mode="mirror") for c in image.numpy() / 255.0])
    result = corrupt(image, "defocus_blur", severity, image_name="")
    np.testing.assert_allclose(result.numpy(), 255 * oracle, atol=0.51)


def test_even_images_stay_in_defocus_but_for_the_originals_surplus() -> None:
    surplus = [int(corrupt(grey(93), "defocus_blur", s, image_name="")[0, 5, 5]) - 93 for s in SEVERITIES]
    assert surplus == [0, 0, 0, 1, 1]


def test_motion_of_a_point_is_half_a_gaussian_in_one_direction() -> None:
    x = torch.zeros(1, 64, 64)
    x[0, 32, 32] = 1
    blurred = corruptions._blur_along(x, radius=10, std=3, angle=0)[0]
    weights = np.exp(-0.5 * (np.arange(21) / 3) ** 2)
    # Each pixel looks to the right, so the point shows on its left.
    np.testing.assert_allclose(blurred[32, 32 - 20 : 33].flip(0), weights / weights.sum(), atol=1e-7)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-6)
    down = corruptions._blur_along(x, radius=10, std=3, angle=90)[0]
    torch.testing.assert_close(down, blurred.T)


@pytest.mark.parametrize("std", [0.7, 5.0, 40.0])
def test_gaussian_filters_equal_scipy(std: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).random((1, 24, 24)))
    for ours, theirs in (("edge", "nearest"), ("symmetric", "reflect")):
        matrix = corruptions._blur_matrix(24, std, 3.0, ours)
        oracle = scipy.ndimage.gaussian_filter(x[0].numpy(), std, mode=theirs, truncate=3.0)
        np.testing.assert_allclose((matrix @ x[0] @ matrix.T).numpy(), oracle, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.07, 1.3, 3.0, 4.5])
def test_zoom_equals_scipy(factor: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).random((1, 40, 40)).astype(np.float32))
    inner = math.ceil(40 / factor)
    top = (40 - inner) // 2
    enlarged = scipy.ndimage.zoom(x[0, top : top + inner, top : top + inner].numpy(), factor, order=1)
    trim = (len(enlarged) - 40) // 2
    oracle = enlarged[trim : trim + 40, trim : trim + 40]
    np.testing.assert_allclose(corruptions._zoom(x, factor)[0].numpy(), oracle, atol=1e-5)


def test_sampling_equals_scipy() -> None:
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.random((1, 30, 41)).astype(np.float32))
    rows, columns = random.uniform(-25, 50, (2, 9, 8))
    for ours, theirs in (("pixel centres", "mirror"), ("pixel edges", "reflect")):
        sampled = corruptions._sample(x, columns, rows, reflect_on=ours)  # type: ignore[arg-type]  # of a loop
        oracle = scipy.ndimage.map_coordinates(x[0].numpy(), [rows, columns], order=1, mode=theirs)
        np.testing.assert_allclose(sampled[0].numpy(), oracle, atol=1e-4)


@pytest.mark.parametrize("level", [0, 1, 2, 4])
def test_elastic_transform_equals_its_steps_in_scipy(level: int) -> None:
    strength, smoothing, shift = (
        np.array([(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (), (0.12, 0.01, 0.02)][level]) * 244
    )
    x = draw_image(5, 64, 48).float() / 255
    ours = corruptions._elastic_transform(x, level, np.random.default_rng(7))
    random = np.random.default_rng(7)
    corners = np.array([24, 32]) + 16 * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y) around the centre
    moved = corners + random.uniform(-shift, shift, (3, 2))
    # With row vectors, (corner, 1) · forward = moved.
    forward = np.linalg.inv(np.column_stack([corners, np.ones(3)])) @ moved
    linear = np.linalg.inv(forward[:2].T)[::-1, ::-1]  # to rows before columns
    offset = -linear @ forward[2, ::-1]
    noise = random.uniform(-1, 1, (2, 64, 48))
    shift_x, shift_y = (
        strength * scipy.ndimage.gaussian_filter(n, smoothing, mode="reflect", truncate=3) for n in noise
    )
    rows, columns = np.mgrid[:64, :48]
    for channel, result in zip(x.numpy(), ours.numpy(), strict=True):
        turned = scipy.ndimage.affine_transform(channel, linear, offset, order=1, mode="mirror")
        places = [rows + shift_y, columns + shift_x]
        oracle = scipy.ndimage.map_coordinates(turned, places, order=1, mode="reflect")
        np.testing.assert_allclose(result, oracle, atol=1e-3)


def test_snow_equals_its_steps_in_scipy() -> None:
    x = draw_image(6).float() / 255
    ours = corruptions._snow(x, 2, np.random.default_rng(7))
    random = np.random.default_rng(7)
    flakes = 0.55 + 0.3 * random.standard_normal((64, 64), dtype=np.float32)
    flakes = scipy.ndimage.zoom(flakes[24:40, 24:40], 4, order=1)  # the middle quarter, ⌈64 / 4⌉ = 16
    flakes = np.where(flakes < 0.9, 0, flakes.clip(0, 1))
    angle = np.radians(random.uniform(-135, -45))
    weights = np.exp(-0.5 * (np.arange(25) / 8) ** 2)
    blurred = np.zeros((64, 64))
    for step, weight in enumerate(weights / weights.sum()):
        places = -np.round([step * np.sin(angle), step * np.cos(angle)])
        blurred += weight * scipy.ndimage.shift(flakes, places, order=0, mode="nearest")
    grey_values = np.tensordot([0.299, 0.587, 0.114], x.numpy(), axes=1)
    whitened = 0.7 * x.numpy() + 0.3 * np.maximum(x.numpy(), 1.5 * grey_values + 0.5)
    np.testing.assert_allclose(ours.numpy(), whitened + blurred + np.rot90(blurred, 2), atol=1e-5)


@pytest.mark.parametrize("distance", [1, 4])
def test_glass_copies_pixels_one_after_the_other(distance: int) -> None:
    random = np.random.default_rng(distance)
    height, width = 21, 34
    rows, columns = np.mgrid[height - distance : distance : -1, width - distance : distance : -1]
    shifts = random.integers(-distance, distance, size=(2, *rows.shape))
    here, there = (
        (r * width + c).ravel() for r, c in ((rows, columns), (rows + shifts[0], columns + shifts[1]))
    )
    values = random.permutation(height * width)
    naive = values.copy()
    for to, taken_from in zip(here, there, strict=True):
        naive[to] = naive[taken_from]
    np.testing.assert_array_equal(corruptions._copy_one_by_one(values, here, there), naive)


def test_glass_blur_roughens_a_straight_edge() -> None:
    image = grey(0)
    image[:, :, 32:] = 255
    for severity in SEVERITIES:
        result = corrupt(image, "glass_blur", severity, image_name="a")[0].float()
        assert float(result[8:56, 32].std()) > 5
        assert float(result[:, :10].max()) == 0
        assert float(result[:, 54:].min()) > 250


def test_fog_surface_is_diamond_square_on_a_torus() -> None:
    size, decay, random = 32, 1.7, np.random.default_rng(3)
    surface, step, amplitude = np.zeros((size, size)), size, 1.0
    while step > 1:
        half = step // 2
        noise = amplitude * np.stack([random.uniform(-1, 1, (size // step,) * 2) for _ in range(3)])
        corners = list(itertools.product(range(0, size, step), repeat=2))
        for i, j in corners:
            square = [surface[(i + a) % size, (j + b) % size] for a in (0, step) for b in (0, step)]
            surface[i + half, j + half] = np.mean(square) + noise[0, i // step, j // step]
        for kind, down, right in ((1, 0, half), (2, half, 0)):
            for i, j in corners:
                y, x = i + down, j + right
                diamond = [
                    surface[(y + half) % size, x],
                    surface[(y - half) % size, x],
                    surface[y, (x + half) % size],
                    surface[y, (x - half) % size],
                ]
                surface[y, x] = np.mean(diamond) + noise[kind, i // step, j // step]
        step, amplitude = half, amplitude / decay**2
    oracle = (surface - surface.min()) / (surface.max() - surface.min())
    ours = corruptions._plasma(32, 20, decay, np.random.default_rng(3))
    np.testing.assert_allclose(ours.numpy(), oracle[:, :20], atol=1e-6)


def test_fog_surface_fills_its_range_and_grows_rougher_with_less_decay() -> None:
    def roughness(decay: float) -> float:
        surfaces = [corruptions._plasma(224, 224, decay, np.random.default_rng(seed)) for seed in range(5)]
        return float(torch.stack([surface.diff(dim=0).square().mean() for surface in surfaces]).mean())

    surface = corruptions._plasma(256, 256, 2.0, np.random.default_rng(0))
    assert (float(surface.min()), float(surface.max()), surface.shape) == (0, 1, (256, 256))
    assert roughness(3.0) < roughness(2.0) < roughness(1.4)
    black = corrupt(grey(0), "fog", 5, image_name="a")
    assert int(black.max()) == 0  # the formula scales by the largest value


def test_arguments_out_of_bounds_are_refused() -> None:
    image = grey(1)
    with pytest.raises(ValueError, match="corruption must be one of gaussian_noise, .*, got rain"):
        corrupt(image, "rain", 1, image_name="")
    for severity in (0, 6):
        with pytest.raises(ValueError, match=rf"severity must be in \[1, 5\], got {severity}"):
            corrupt(image, "fog", severity, image_name="")
    with pytest.raises(
        ValueError, match=r"image must be uint8 \[3, H, W\] or \[H, W, 3\], got torch.float32"
    ):
        corrupt(image.float(), "fog", 1, image_name="")
    with pytest.raises(ValueError, match=r"image must be uint8 .* got torch.uint8 \[1, 64, 64\]"):
        corrupt(image[:1], "fog", 1, image_name="")
    with pytest.raises(ValueError, match=r"sides of the image must be >= 32, got \[31, 64\]"):
        corrupt(image[:, :31], "fog", 1, image_name="")
