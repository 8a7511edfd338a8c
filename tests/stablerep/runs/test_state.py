"""Runs of two ranks through the real command, and what becomes of them when they are disturbed."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import lightning.pytorch as pl
import pytest
import torch

from stablerep.runs.state import SeedSteps, is_last_step
from tests.processes import is_group_running, wait_until
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
            _, error = process.communicate(timeout=TIMEOUT_SECONDS)
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


def test_a_signal_to_the_whole_process_group_leaves_data_workers_to_their_ranks(job: Job) -> None:
    with job.started("--data.num_workers", "1") as process:
        job.wait_for_steps(1, 3, process)
        os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, error
    step = job.read_step("run")
    assert f"stopped by SIGTERM after step {step}: --ckpt_path last goes on from there" in error
    assert "DataLoader worker" not in error
    wait_until(lambda: not is_group_running(process.pid))


def test_a_signal_while_ranks_start_stops_them_as_one_that_comes_later(job: Job) -> None:
    with job.started() as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 2:  # the ranks have begun to import
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, error
    lines = [line for line in error.splitlines() if line.startswith("stablerep fit: ")]
    assert lines == ["stablerep fit: stopped by SIGTERM before the first step: nothing new to save"]
    assert not (job.folder / "run" / "checkpoints").exists()


def test_a_run_that_saves_nothing_is_not_one_to_go_on_from(job: Job) -> None:
    with job.started("--trainer.enable_checkpointing", "false") as process:
        os.kill(job.wait_for_steps(1, 3, process), signal.SIGTERM)
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1  # and not 75, for which a batch system would begin it again and again
    assert "nothing is saved" in error.strip().splitlines()[-1]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_all_ranks_with_one_line(job: Job) -> None:
    with job.started("--data.num_workers", "1") as process:
        job.wait_for_steps(1, 3, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "stablerep fit: interrupted"
    assert "Traceback" not in error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bug_on_one_rank_is_all_that_is_told(rank: int, job: Job) -> None:
    with job.started(bug_after_step=3, rank_with_bug=rank) as process:
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert error.count("Traceback (most recent call last)") == 1
    assert error.strip().splitlines()[-1].endswith(f"RuntimeError: a bug that rank {rank} met")
    assert "gloo" not in error
    assert "lost another rank" not in error
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
    with job.started("--rank_timeout_seconds", "30") as process:
        hanging = job.wait_for_steps(1, 3, process)
        os.kill(hanging, signal.SIGSTOP)
        timer = threading.Timer(TIMEOUT_SECONDS, process.kill)  # ends the reading below
        timer.start()
        try:
            assert process.stderr is not None
            lines = (line for line in process.stderr if line.startswith("stablerep fit: error: "))
            error = next(lines, "")
        finally:
            timer.cancel()
            os.kill(hanging, signal.SIGCONT)  # else it is killed 20 seconds later: distributed/test_launch.py
        _, rest = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "rank 0 lost another rank, which was killed or does not answer" in error
    assert "Traceback" not in rest
