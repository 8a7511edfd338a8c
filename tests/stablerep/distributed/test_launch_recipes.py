"""The recipes of `configs/launch/`, with real launchers on this machine."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data_gen.slurm_cluster import find_missing_programs, run_slurm_cluster
from tests.processes import is_running, wait_until
from tests.stablerep.datasets import write_dataset
from tests.stablerep.fit_jobs import ROOT, TIMEOUT_SECONDS, Job

LAUNCH = ROOT / "configs" / "launch"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_dataset(tmp_path / "shards", [16, 16], num_images=2, size=16)
    return Job(tmp_path)


@contextmanager
def torchrun(job: Job) -> Iterator["subprocess.Popen[str]"]:
    environment = job.environment() | {"NUM_RANKS_PER_NODE": "2", "MASTER_PORT": "0", "MAX_RESTARTS": "1"}
    with subprocess.Popen(
        ["bash", str(LAUNCH / "torchrun.sh"), *job.options()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.e2e
@pytest.mark.distributed
def test_torchrun_starts_a_killed_job_again_from_its_checkpoint(job: Job) -> None:
    with torchrun(job) as process:
        killed = job.wait_for_steps(1, 4, process)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: job.wait_for_steps(1, 4, process) != killed)
        (job.folder / "finish").touch()
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output
    assert job.read_step("run-2") > job.read_step("run") >= 2
    assert job.read_logged_steps("run-2")[0] >= 2


@pytest.mark.e2e
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_torchrun_stops_its_ranks_with_a_checkpoint(number: signal.Signals, job: Job) -> None:
    with torchrun(job) as process:
        ranks = [job.wait_for_steps(rank, 4, process) for rank in range(2)]
        process.send_signal(number)
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1, output  # torchrun's own
    assert f"stopped by {number.name} after step {job.read_step('run')}" in output
    wait_until(lambda: not any(map(is_running, ranks)))
    assert not (job.folder / "run-2").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "requeue", "message"),
    [
        (75, "", 0, ""),
        (75, "99", 0, ""),
        (75, "100", None, "not put back into the queue: it has been 100 times (MAX_REQUEUES)"),
        (75, "1", 1, "could not be put back into the queue"),
        (1, "", None, ""),
        (0, "", None, ""),
    ],
)
def test_slurm_script_requeues_what_was_stopped_so_many_times(
    code: int, restarts: str, requeue: int | None, message: str, tmp_path: Path
) -> None:
    for name, exit_code in [("srun", code), ("scontrol", requeue or 0)]:
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $@\nexit {exit_code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **{"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2"},
        **{"SLURM_JOB_NUM_NODES": "1"},
        **({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
    }
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "--output", "runs/a"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == code
    assert ("scontrol requeue 7" in done.stdout) is (requeue is not None)
    assert (message in done.stderr) if message else (done.stderr == "")


@pytest.mark.e2e
@pytest.mark.distributed
@pytest.mark.skipif(bool(find_missing_programs()), reason="no Slurm here (Debian: apt install slurm-wlm)")
def test_slurm_requeues_a_job_that_was_told_to_stop(job: Job) -> None:
    (job.folder / "slurm").mkdir()
    with run_slurm_cluster(job.folder / "slurm") as cluster:
        environment = cluster.environment | job.environment()
        environment["PATH"] = job.environment()["PATH"] + os.pathsep + cluster.environment["PATH"]
        submit = [
            *("sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"),
            *("--time=20", f"--output={job.folder}/log", str(LAUNCH / "slurm.sbatch")),
        ]
        done = subprocess.run(
            [*submit, *job.options()], env=environment, capture_output=True, text=True, check=True
        )
        number = done.stdout.strip()
        stopped = job.wait_for_steps(1, 4)
        cluster.call(
            "scancel", "--signal=USR1", number
        )  # as Slurm does before the time limit: not to the script
        wait_until(
            lambda: job.wait_for_steps(1, 4) != stopped,
            lambda: (job.folder / "log").read_text(),
        )
        (job.folder / "finish").touch()
        wait_until(
            lambda: "JobState=COMPLETED" in cluster.show(number),
            lambda: (job.folder / "log").read_text(),
        )
        assert "Restarts=1" in cluster.show(number)
    assert "stopped by SIGUSR1 after step" in (job.folder / "log").read_text()
    assert job.read_step("run") < job.read_step("run-2")
