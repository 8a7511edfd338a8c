"""A Slurm cluster of this machine alone, in a folder of its own: slurmctld and one slurmd, for the tests.

Needs Slurm's daemons and no right beyond the user's own: nobody is authenticated (auth/none), nothing listens
on a port that is known, and nothing of an installed cluster is read or written.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes import MAX_SECONDS, find_free_ports, wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
NUM_CPUS = 16  # as Slurm believes: tasks of the tests sleep for the most part
GPU_DEVICES = ("/dev/null", "/dev/zero")  # any character devices will do

_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

_SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A requeued task waits for the last credential of its former run to expire: two minutes by default.
AuthInfo=cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=60
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} Gres=gpu:{num_gpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES PriorityTier=2
PartitionName=short Nodes={host} DefaultTime={short_limit} PriorityTier=2
PartitionName=low Nodes={host} PriorityTier=1
"""


def find_missing_programs() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster.

    Args:
        environment: In which Slurm's commands find it.
    """

    environment: dict[str, str]

    def call(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        finished = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=MAX_SECONDS
        )
        assert finished.returncode == 0, f"{command}: {finished.stderr}"
        return finished.stdout.strip()

    def states(self, job: str) -> dict[str, str]:
        """State of each task of an array by its index, and of the waiting ones together, such as `[0-1]`."""
        lines = self.call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%K %T")
        return dict(line.split() for line in lines.splitlines())

    def show(self, task: str) -> str:
        """All that the controller knows of a task."""
        return self.call("scontrol", "show", "job", task)


@contextmanager
def run_slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Starts the daemons with their files in `folder`, and ends them with every job that still runs."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
    } | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}
    _write_configuration(folder)
    cluster = SlurmCluster(environment)
    daemons = []
    try:
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            with (folder / f"{command[0]}.out").open("wb") as output:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        wait_until(lambda: _is_idle(cluster), lambda: _read_logs(folder))
        yield cluster
    finally:
        if len(daemons) == 2:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                cluster.call("scancel", "--user", getpass.getuser())
                wait_until(lambda: not cluster.call("squeue", "--noheader"), seconds=60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=MAX_SECONDS)


def _write_configuration(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        _SLURM_CONF.format(
            host=host,
            user=getpass.getuser(),
            ports=find_free_ports(2),
            folder=folder,
            num_cpus=NUM_CPUS,
            num_gpus=len(GPU_DEVICES),
            short_limit="00:01:00",
        )
    )
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in GPU_DEVICES))


def _is_idle(cluster: SlurmCluster) -> bool:
    finished = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=cluster.environment, capture_output=True, text=True
    )
    return finished.stdout.split()[:1] == ["idle"]


def _read_logs(folder: Path) -> str:
    names = ("slurmctld.out", "slurmd.out", "slurmctld.log", "slurmd.log")
    return "\n".join(
        (folder / name).read_text(errors="replace")[-2000:] for name in names if (folder / name).exists()
    )
