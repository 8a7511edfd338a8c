"""PSNR and SSIM against naive loops over their formulas, and the report against what it must say."""

import dataclasses
import gc
import json
import math
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data_gen.captions import caption_id
from data_gen.diffusion import pipelines
from data_gen.diffusion.fidelity import (
    FIDELITY_NAME,
    compare_with_full_precision,
    measure_fidelity,
    summarise,
    write_fidelity,
)
from data_gen.diffusion.generator import DiffusionGenerator, ImageRequest
from data_gen.diffusion.models import GeneratorConfig, find_model
from data_gen.job import worker
from data_gen.job.engines.slurm import SlurmConfig
from data_gen.job.generate import GenerateConfig, run
from data_gen.job.plan import Plan
from data_gen.job.shard_job import GivenBackError
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.shards import list_complete_shards, read_manifest
from data_gen.storage import Store
from data_gen.verify import VerifyConfig
from data_gen.verify import run as verify
from tests.data_gen.datasets import save_tiny_vae
from tests.data_gen.job.test_generate import data_files
from tests.processes import MAX_SECONDS

MakeConfig = Callable[..., GenerateConfig]

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


def test_a_comparison_ends_when_it_is_told_to(tiny_pipeline: Path) -> None:
    config = GeneratorConfig(str(tiny_pipeline), num_inference_steps=2, device="cpu", dtype="bfloat16")
    stop = threading.Event()
    stop.set()
    with pytest.raises(GivenBackError):
        compare_with_full_precision(config, find_model(config), REQUESTS, 0, 4, stop)


# --- the report of a job


def report_of(root: str | Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((Path(root) / FIDELITY_NAME).read_text())
    return report


def freeze(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a job that is stopped before its first image."""
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.generate._run_workers", lambda *_: True)
        assert run(config) == 75
    return Plan.read(Store(config.output))


def check_report(root: Path, options: dict[str, Any]) -> None:
    """The report is of the dataset's own plan and captions, and the card tells it."""
    report, card = report_of(root), (root / "README.md").read_text()
    assert report["settings_hash"] == read_manifest(root).settings_hash
    assert (report["options"], report["num_images"], report["num_failed"]) == (options, 2, 0)
    assert "Against full precision, 2 of the images have" in card
    assert f"a mean PSNR of {report['psnr_mean']:.4g} dB and a mean SSIM of {report['ssim_mean']:.4g}" in card
    assert f"`{FIDELITY_NAME}` has more" in card


def check_again(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset is sound, and the same command changes nothing and loads no model."""
    assert verify(VerifyConfig(config.output, deep=True)) == 0
    before = data_files(Path(config.output))
    monkeypatch.setattr("data_gen.diffusion.generator.load_pipeline", None)
    assert run(config) == 0
    assert data_files(Path(config.output)) == before


def test_a_job_with_int8_weights_reports_what_they_change(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(generator={"int8": True})
    assert run(config) == 0
    assert "int8 True against full precision on 2 images" in capsys.readouterr().err
    assert read_manifest(config.output).settings["generator"]["int8"] is True
    check_report(Path(config.output), {"int8": True})
    check_again(config, monkeypatch)


def test_two_workers_with_a_tiny_vae_report_once_what_it_changes(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tiny_vae(tmp_path / "taesd")
    config = make_config(generator={"tiny_vae": str(tmp_path / "taesd")}, num_workers=2)
    assert run(config) == 0
    assert capsys.readouterr().err.count("against full precision on") == 1
    settings = read_manifest(config.output).settings["generator"]
    assert settings["tiny_vae"] == "taesd"
    assert settings["model_identity"].startswith("tiny_vae=sha256:")
    check_report(Path(config.output), {"tiny_vae": "taesd"})
    assert not (Path(config.output) / ".work").exists()
    check_again(config, monkeypatch)


def test_a_report_goes_with_its_plan(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    save_tiny_vae(tmp_path / "taesd")
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.worker._ShardMaker.load_model", interrupt)  # once it is measured
        for generator, options in (
            ({"int8": True}, {"int8": True}),
            ({"tiny_vae": str(tmp_path / "taesd")}, {"tiny_vae": "taesd"}),
        ):
            config = make_config(generator=generator)
            with pytest.raises(KeyboardInterrupt):
                run(config)
            report = report_of(config.output)
            assert report["options"] == options
            assert report["settings_hash"] == read_manifest(config.output).settings_hash
    assert run(make_config()) == 0
    root = Path(config.output)
    assert not (root / FIDELITY_NAME).exists()
    assert "full precision" not in (root / "README.md").read_text()


def test_whoever_works_on_a_plan_of_a_cluster_measures_it(make_config: MakeConfig, tmp_path: Path) -> None:
    slurm = SlurmConfig(gpus_per_task=0, submit=False, script=str(tmp_path / "job.sbatch"))
    config = make_config(generator={"int8": True}, engine="slurm", slurm=slurm)
    assert run(config) == 75
    assert worker.run(worker.WorkConfig(config.output, model=config.generator.model, device="cpu")) == 0
    check_report(Path(config.output), {"int8": True})


def test_each_model_of_a_comparison_is_gone_before_the_next_comes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = pipelines.load_pipeline

    def load_alone(*arguments: Any) -> Any:
        gc.collect()
        assert not any(pipeline() for pipeline in loaded)
        pipeline = load(*arguments)
        loaded.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr("data_gen.diffusion.generator.load_pipeline", load_alone)
    assert run(make_config(generator={"int8": True})) == 0
    assert len(loaded) == 3  # the reference, its rival, and for the shards


def test_a_reference_that_does_not_fit_into_memory_is_recorded_and_stops_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = pipelines.load_pipeline

    def load_what_fits(config: GeneratorConfig, *rest: Any) -> Any:
        if not config.int8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate 9 GiB")
        return load(config, *rest)

    monkeypatch.setattr("data_gen.diffusion.generator.load_pipeline", load_what_fits)
    config = make_config(generator={"int8": True})
    assert run(config) == 0
    report = report_of(config.output)
    assert report.keys() == {"settings_hash", "unmeasured"}
    assert "out of memory. Tried to allocate 9 GiB" in report["unmeasured"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert "full precision is not compared with, fidelity.json says so" in line
    assert "out of memory. Tried to allocate 9 GiB" in (Path(config.output) / "README.md").read_text()
    check_again(config, monkeypatch)


def test_a_comparison_that_kills_its_workers_is_given_up(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(generator={"int8": True})
    plan = freeze(config, monkeypatch)
    work_folder = WorkFolder(plan.store, Worker("dead", "host", 1, "there"), lease_seconds=60)
    for name in ("first", "second"):
        work_folder.record_death("fidelity", "killed by SIGKILL", name, "there")
    assert run(config) == 0
    assert report_of(config.output)["unmeasured"] == "2 workers died of it (killed by SIGKILL)"
    assert not (Path(config.output) / ".work").exists()


def test_workers_make_shards_while_another_measures_and_end_once_it_has(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(generator={"int8": True})
    plan = freeze(config, monkeypatch)
    other = WorkFolder(plan.store, Worker("other", "elsewhere", 1, "there"), lease_seconds=60)
    assert other.claim("fidelity")
    num_shards_finished: list[int] = []

    def measure_at_leisure() -> None:
        deadline = time.monotonic() + MAX_SECONDS
        while (
            len(list_complete_shards(plan.store)) < plan.manifest.num_shards and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        num_shards_finished.append(len(list_complete_shards(plan.store)))
        write_fidelity(plan, {"unmeasured": "by the other"})
        other.release("fidelity")

    monkeypatch.setattr(worker, "_SECONDS_BETWEEN_LOOKS", 0.05)
    thread = threading.Thread(target=measure_at_leisure)
    thread.start()
    assert run(config) == 0
    thread.join()
    assert num_shards_finished == [plan.manifest.num_shards]
    assert report_of(config.output)["unmeasured"] == "by the other"
