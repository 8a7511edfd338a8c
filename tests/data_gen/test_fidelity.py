"""PSNR and SSIM against naive loops over their formulas, and the report against what it must say."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data_gen.captions import caption_id
from data_gen.fidelity import compare_with_full_precision, measure_fidelity, summarise
from data_gen.generator import ImageRequest
from data_gen.models import GeneratorConfig, find_model
from tests.data_gen.datasets import save_tiny_vae

REQUESTS = [ImageRequest(caption_id(text), text, (0, 1)) for text in ("a red cube", "a dog", "猫と犬")]
Image = npt.NDArray[np.uint8]


def draw_pair(amount: float, size: int = 20) -> tuple[Image, Image]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size, 3))
    return image.astype(np.uint8), (image + rng.normal(0, amount, image.shape)).clip(0, 255).astype(np.uint8)


def naive_psnr(image: Image, reference: Image) -> float:
    error = np.mean((image.astype(float) - reference.astype(float)) ** 2)
    return 10 * math.log10(255**2 / error)


def naive_ssim(image: Image, reference: Image) -> float:
    """Equation 13 of the paper, a window around each pixel; borders are mirrored."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / np.outer(taps, taps).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        x, y = (np.pad(one[..., channel].astype(float), 5, mode="reflect") for one in (image, reference))
        for row in range(image.shape[0]):
            for column in range(image.shape[1]):
                a, b = (one[row : row + 11, column : column + 11] for one in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                variance_a = (window * a * a).sum() - mean_a**2
                variance_b = (window * b * b).sum() - mean_b**2
                covariance = (window * a * b).sum() - mean_a * mean_b
                numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                values.append(numerator / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("amount", [1.0, 10.0, 60.0])
def test_psnr_and_ssim_are_those_of_a_naive_loop(amount: float) -> None:
    image, reference = draw_pair(amount)
    psnr, ssim = measure_fidelity(image, reference)
    assert psnr == pytest.approx(naive_psnr(image, reference), rel=1e-6)
    assert ssim == pytest.approx(naive_ssim(image, reference), abs=1e-6)


def test_one_grey_level_everywhere_is_48_decibels() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    psnr, _ = measure_fidelity(image, image + np.uint8(1))
    assert psnr == pytest.approx(20 * math.log10(255))


def test_equal_images_have_no_psnr_and_an_ssim_of_one() -> None:
    image, other = draw_pair(5.0)
    assert measure_fidelity(image, image.copy()) == (None, 1.0)
    report = summarise({}, [(image, image), (image, other)], num_failed=1)
    assert (report.num_images, report.num_equal, report.num_failed) == (2, 1, 1)
    psnr, ssim = measure_fidelity(image, other)
    assert report.psnr_mean == report.psnr_min == psnr
    assert report.ssim_mean == pytest.approx((1 + ssim) / 2)
    assert report.ssim_min == ssim


def test_a_report_on_nothing_is_plain_json() -> None:
    report = summarise({"int8": True}, [], num_failed=4)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == dataclasses.asdict(report)
    assert report.lines() == ["int8 True against full precision on 0 images, 4 failed:"]


def test_no_option_means_no_difference(tiny_pipeline: Path) -> None:
    config = GeneratorConfig(str(tiny_pipeline), num_inference_steps=2, device="cpu")
    report = compare_with_full_precision(config, find_model(config), REQUESTS, 0, 4)
    assert (report.options, report.num_images, report.num_equal) == ({}, 6, 6)
    assert (report.psnr_mean, report.ssim_mean, report.ssim_min) == (None, 1.0, 1.0)
    json.dumps(report.to_dict(), allow_nan=False)


def test_each_option_is_measured_and_the_coarser_one_is_worse(tiny_pipeline: Path, tmp_path: Path) -> None:
    save_tiny_vae(tmp_path)
    plain = GeneratorConfig(
        str(tiny_pipeline), num_inference_steps=2, device="cpu", guidance_scale=[1.0, 4.0]
    )
    psnr = {}
    for options in ({"dtype": "float16"}, {"dtype": "bfloat16"}, {"int8": True}, {"tiny_vae": str(tmp_path)}):
        config = dataclasses.replace(plain, **options)
        report = compare_with_full_precision(config, find_model(config), REQUESTS, 0, 4)
        assert report.options == options
        assert report.psnr_mean is not None
        assert report.psnr_min is not None
        assert report.psnr_min <= report.psnr_mean
        psnr[next(iter(options.values()))] = report.psnr_mean
    assert psnr["float16"] > psnr["bfloat16"] > psnr[str(tmp_path)]
    assert psnr[True] > psnr[str(tmp_path)]


def test_an_image_that_fails_on_one_side_is_counted_and_left_out(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_gen.generator import DiffusionGenerator

    generate = DiffusionGenerator.generate

    def fail_in_half_precision(self: DiffusionGenerator, requests: object, seed: int) -> object:
        for made in generate(self, requests, seed):  # type: ignore[arg-type]
            bad = self.config.dtype == "bfloat16" and made.request is REQUESTS[1]
            yield dataclasses.replace(made, failure="non_finite") if bad else made

    monkeypatch.setattr(DiffusionGenerator, "generate", fail_in_half_precision)
    config = GeneratorConfig(str(tiny_pipeline), num_inference_steps=2, device="cpu", dtype="bfloat16")
    report = compare_with_full_precision(config, find_model(config), REQUESTS, 0, 4)
    assert (report.num_images, report.num_failed) == (4, 2)
    assert report.lines()[0] == "dtype bfloat16 against full precision on 4 images, 2 failed:"
