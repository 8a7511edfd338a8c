"""The recipes of `configs/launch/`, with real launchers on this machine."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.data_gen.slurm_cluster import find_missing_programs, run_slurm_cluster, wait_until
from tests.stablerep.datasets import write_dataset
from tests.stablerep.fit_jobs import ROOT, TIMEOUT_SECONDS, Job

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_dataset(tmp_path / "shards", [16, 16], num_images=2, size=16)
    return Job(tmp_path)


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
