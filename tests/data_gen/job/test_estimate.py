"""Laws of the dry run's estimate: it measures what a planned worker will do, and counts them all."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from data_gen.job import estimate
from data_gen.job.engines.ray_cluster import RayConfig
from data_gen.job.engines.slurm import SlurmConfig
from data_gen.job.generate import GenerateConfig, run

MakeConfig = Callable[..., GenerateConfig]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Device and threads of each calibration, which finds a second an image."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    calls = []

    def calibrate(config: GenerateConfig, *_: Any) -> tuple[float, float]:
        calls.append((config.generator.device, torch.get_num_threads()))
        return 1.0, 1000.0

    monkeypatch.setattr(estimate, "_calibrate", calibrate)
    num_threads = torch.get_num_threads()
    yield calls
    torch.set_num_threads(num_threads)


def test_the_calibration_runs_as_the_first_worker_will(
    make_config: MakeConfig, measured: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    assert run(make_config(dry_run=True, num_workers=2)) == 0
    assert run(make_config(dry_run=True, num_workers=2, num_threads_per_worker=4)) == 0
    assert run(make_config(dry_run=True, engine="ray", ray=RayConfig(num_cpus_per_worker=2))) == 0
    assert run(make_config(dry_run=True, engine="slurm", slurm=SlurmConfig(cpus_per_task=5))) == 0
    assert measured == [("cpu", 3), ("cpu", 4), ("cpu", 2), ("cpu", 5)]


@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({}, "1 worker"),
        ({"num_workers": 2}, "2 workers"),
        ({"engine": "ray"}, "1 worker"),
        ({"engine": "ray", "ray": RayConfig(num_workers=3)}, "3 workers"),
        ({"engine": "slurm", "slurm": SlurmConfig(num_tasks=3, gpus_per_task=0)}, "3 workers"),
        ({"engine": "slurm", "slurm": SlurmConfig(num_tasks=3, max_running=2)}, "2 workers"),
        ({"engine": "slurm", "slurm": SlurmConfig(gpus_per_task=2)}, "2 workers"),
        ({"num_workers": 9}, "3 workers"),  # no more than shards
    ],
)
def test_the_time_is_that_of_all_workers_and_the_cost_that_of_their_sum(
    changes: dict[str, Any],
    workers: str,
    make_config: MakeConfig,
    measured: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(make_config(dry_run=True, price_per_hour=240.0, **changes)) == 0
    output = capsys.readouterr().out
    assert f"time: {15 / int(workers[0]):.0f} s with {workers} at 1.00 images/s each" in output
    assert "cost: 1.00 at 240 an hour and worker" in output
