"""Runs of several ranks through the real command, and what becomes of them when they are disturbed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import lightning.pytorch as pl
import pytest
import torch

from stablerep.run_state import SeedSteps, is_last_step
from tests.data_gen.slurm_cluster import find_missing_programs, run_slurm_cluster, wait_until
from tests.stablerep.datasets import write_dataset

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240
MANY_STEPS = 1_000_000
pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


@dataclass
class Job:
    """`stablerep fit` on a tiny model, as its users start it.

    Args:
        folder: Where all is; its dataset has 32 captions.
    """

    folder: Path

    def options(self, max_steps: int, bug_after_step: int | None = None) -> list[str]:
        diary = {"folder": str(self.folder), "bug_after_step": bug_after_step}
        model = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
        return [
            *("--data.root", str(self.folder / "shards"), "--output", str(self.folder / "run")),
            *("--data.num_captions_per_rank", "4", "--data.num_views_per_caption", "2"),
            *("--data.image_size", "16", "--data.num_workers", "0"),
            *("--model.backbone", "vit_tiny_patch16_224", "--model.backbone_options", json.dumps(model)),
            *("--model.projection_hidden_features", "16", "--model.projection_out_features", "8"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.log_every_n_steps", "1"),
            *("--trainer.max_steps", str(max_steps), "--trainer.enable_progress_bar", "false"),
            *("--trainer.max_epochs", "-1", "--checkpoint_every_n_steps", "2"),
            *(
                "--trainer.callbacks",
                json.dumps([{"class_path": "tests.stablerep.diary.Diary", "init_args": diary}]),
            ),
        ]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cleared = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return cleared | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}

    @contextmanager
    def started(self, *options: str, bug_after_step: int | None = None) -> Iterator["subprocess.Popen[str]"]:
        for path in self.folder.glob("*.json"):
            path.unlink()
        command = [sys.executable, "-m", "stablerep.cli", "fit", *self.options(MANY_STEPS, bug_after_step)]
        with subprocess.Popen(
            [*command, *options],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # its ranks stop then

    def wait_for_steps(
        self, rank: int, num_steps: int, process: "subprocess.Popen[str] | None" = None
    ) -> int:
        """The process of a rank, once it has made that many; fails where the job's ends before."""
        path = self.folder / f"{rank}.json"
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not path.exists() or json.loads(path.read_text())["step"] < num_steps:
            assert time.monotonic() < deadline
            assert process is None or process.poll() is None, process.communicate()
            time.sleep(0.02)
        return int(json.loads(path.read_text())["pid"])

    def read_step(self, run: str) -> int:
        content = torch.load(self.folder / run / "checkpoints" / "last.ckpt", weights_only=True)
        return int(content["global_step"])

    def read_logged_steps(self, run: str) -> list[int]:
        with (self.folder / run / "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]


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
        os.kill(job.wait_for_steps(1, 3, process), signal.SIGSTOP)
        start = time.monotonic()
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert time.monotonic() - start < 60
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "rank 0 lost another rank, which was killed or does not answer" in error
    assert "rank 1 had not left 20 s later and was killed" in error


def test_killed_runs_go_on_as_if_nothing_had_happened(job: Job) -> None:
    """The short form of benchmarks/resume.py."""
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "resume.py"), "--data", str(job.folder / "shards")),
        *(
            "--num_captions",
            "32",
            "--num_kills",
            "2",
            "--ranks",
            "2:2,2:1",
            "--num_workers",
            "0",
            "--name",
            "",
        ),
    ]
    done = subprocess.run(command, env=job.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_torchrun_starts_a_killed_job_again_from_its_checkpoint(job: Job) -> None:
    script = ROOT / "configs" / "launch" / "torchrun.sh"
    environment = job.environment() | {"NUM_RANKS_PER_NODE": "2", "MASTER_PORT": "0", "MAX_RESTARTS": "1"}
    with subprocess.Popen(
        ["bash", str(script), *job.options(max_steps=30)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            os.kill(job.wait_for_steps(1, 4, process), signal.SIGKILL)
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            process.terminate()
    assert process.returncode == 0, output
    assert job.read_step("run-2") == 30
    assert job.read_logged_steps("run-2")[0] >= 2


@pytest.mark.skipif(bool(find_missing_programs()), reason="no Slurm here (Debian: apt install slurm-wlm)")
def test_slurm_requeues_a_job_that_was_told_to_stop(job: Job) -> None:
    script = ROOT / "configs" / "launch" / "slurm.sbatch"
    (job.folder / "slurm").mkdir()
    with run_slurm_cluster(job.folder / "slurm") as cluster:
        environment = cluster.environment | job.environment()
        environment["PATH"] = job.environment()["PATH"] + os.pathsep + cluster.environment["PATH"]
        submit = [
            *("sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"),
            *("--time=10", f"--output={job.folder}/log", str(script)),
        ]
        done = subprocess.run(
            [*submit, *job.options(max_steps=40)], env=environment, capture_output=True, text=True, check=True
        )
        number = done.stdout.strip()
        job.wait_for_steps(1, 4)
        cluster.call(
            "scancel", "--signal=USR1", number
        )  # as Slurm does before the time limit: not to the script
        wait_until(
            lambda: "JobState=COMPLETED" in cluster.show(number),
            TIMEOUT_SECONDS,
            lambda: (job.folder / "log").read_text(),
        )
        assert "Restarts=1" in cluster.show(number)
    assert "stopped by SIGUSR1 after step" in (job.folder / "log").read_text()
    assert job.read_step("run") < job.read_step("run-2") == 40
