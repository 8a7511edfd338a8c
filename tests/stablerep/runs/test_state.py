"""Runs of two ranks through the real command, and what becomes of them when they are disturbed."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import lightning.pytorch as pl
import pytest
import torch

from stablerep.runs.state import SeedSteps, is_last_step
from tests.stablerep.datasets import write_dataset
from tests.stablerep.fit_jobs import TIMEOUT_SECONDS, Job

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_dataset(tmp_path / "shards", [16, 16], num_images=2, size=16)
    return Job(tmp_path)


@pytest.mark.parametrize("changed", ["seed", "step", "rank"])
def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(seed: int = 1, step: int = 2, rank: int = 0) -> list[float]:
        torch.rand(step)  # whatever came before
        monkeypatch.setattr("stablerep.distributed.rank", lambda: rank)
        trainer = cast(pl.Trainer, SimpleNamespace(global_step=step))
        SeedSteps(seed).on_train_batch_start(trainer, pl.LightningModule(), None, 0)
        return torch.rand(4).tolist()

    first = draw()
    draw(step=7)
    assert draw() == first
    assert draw(**{changed: 3}) != first


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"global_step": 9}, False),
        ({"global_step": 10}, True),
        ({"global_step": 10, "max_steps": -1}, False),
        ({"should_stop": True}, True),
        ({"is_last_batch": True}, False),
        ({"is_last_batch": True, "current_epoch": 2}, True),
        ({"is_last_batch": True, "current_epoch": 2, "max_epochs": -1}, False),
    ],
)
def test_last_step_is_that_of_the_last_epoch_or_the_last_that_is_asked_for(
    values: dict[str, int], expected: bool
) -> None:
    trainer = {"global_step": 5, "max_steps": 10, "current_epoch": 1, "max_epochs": 3}
    flags = {"should_stop": False, "is_last_batch": False}
    assert is_last_step(cast(pl.Trainer, SimpleNamespace(**(trainer | flags | values)))) is expected


def test_a_signal_to_any_rank_stops_all_with_a_checkpoint_that_the_next_run_goes_on_from(job: Job) -> None:
    first_step = 0
    for run, rank, number in [("run", 1, signal.SIGTERM), ("run-2", 0, signal.SIGUSR1)]:
        options = ["--ckpt_path", "last"] if first_step else []
        with job.started(*options) as process:
            os.kill(job.wait_for_steps(rank, first_step + 3, process), number)
            start = time.monotonic()
            _, error = process.communicate(timeout=TIMEOUT_SECONDS)
        assert time.monotonic() - start < 30
        assert process.returncode == 75
        step = job.read_step(run)
        lines = [line for line in error.splitlines() if line.startswith("stablerep fit: ")]
        assert lines == [
            f"stablerep fit: stopped by {number.name} after step {step}: --ckpt_path last goes on from there"
        ]
        assert "Traceback" not in error
        assert "4 captions x 2 ranks x 2 views = 16 images a step" in error
        assert job.read_logged_steps(run) == list(range(first_step, step))
        first_step = step


def test_a_bug_on_one_rank_is_all_that_is_told(job: Job) -> None:
    with job.started(bug_after_step=3) as process:
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert error.count("Traceback (most recent call last)") == 1
    assert error.strip().splitlines()[-1].endswith("RuntimeError: a bug that rank 1 met")
    assert "gloo" not in error
    assert job.read_step("run") == 2


def test_a_rank_that_is_killed_is_named(job: Job) -> None:
    with job.started() as process:
        os.kill(job.wait_for_steps(1, 3, process), signal.SIGKILL)
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "rank 0 lost another rank, which was killed or does not answer" in error
    last_line = error.strip().splitlines()[-1]
    assert last_line == (
        "stablerep fit: error: rank 1 was ended by SIGKILL; --ckpt_path last goes on from the last checkpoint"
    )


def test_a_rank_that_hangs_is_waited_for_no_longer_than_was_asked(job: Job) -> None:
    with job.started("--rank_timeout_seconds", "3") as process:
        hanging = job.wait_for_steps(1, 3, process)
        os.kill(hanging, signal.SIGSTOP)
        start = time.monotonic()
        assert process.stderr is not None
        error = next(line for line in process.stderr if line.startswith("stablerep fit: error: "))
        assert time.monotonic() - start < 30
        os.kill(
            hanging, signal.SIGCONT
        )  # else it is killed 20 seconds later, as tests/stablerep/test_launch.py has it
        _, rest = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "rank 0 lost another rank, which was killed or does not answer" in error
    assert "Traceback" not in rest
