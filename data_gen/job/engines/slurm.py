"""Workers as the tasks of a Slurm array: a batch script that people can read, edit and submit themselves.

What becomes of a task, each of which was seen on a real cluster (tests/data_gen/job/test_engine_slurm.py):

    time limit near      Slurm sends USR1 to the batch shell alone; the script passes it on, waits for the
                         workers to spill and give back, and has the task requeued
    preempted, requeued  Slurm sends TERM to every process of the task, and starts it again by itself
    cancelled            likewise TERM, and the task is gone; so the script requeues nothing after a TERM
    a worker dies        it is started again, at most `max_restarts` times

The workers run in the batch step, without srun: a TERM that reaches srun kills its tasks before they can
give anything back. The price is that a partition's GraceTime is not theirs, as its TERM goes to steps alone:
without `preempt_send_user_signal` in the cluster's settings they have KillWait, by default 30 seconds, to
finish a batch. Whoever is slower loses what it made since its last spill, and no more.
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_gen.job.worker import WorkConfig

_MAX_SIGNAL_SECONDS = 65535
_SIGNAL_RESOLUTION_SECONDS = 60
"""Slurm may send the signal that much earlier than asked (sbatch(1), --signal)."""

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN_OPTION = re.compile(r"[\w@%+=:,./-]*", re.ASCII)


@dataclass(frozen=True)
class SlurmConfig:
    """Runs the workers as a Slurm array of one task each, requeued until every shard is there.

    Args:
        num_tasks: Tasks of the array, >= 1; more than there are shards to make have nothing to do.
        max_running: Tasks that may run at the same time, >= 1; None leaves it to Slurm.
        partition: Partition to submit to; None is the cluster's default.
        account: Account to charge; None is the user's default.
        qos: Quality of service; None is the account's default.
        time_limit: Of one run of a task, as "hours:minutes:seconds" or "days-hours:minutes:seconds"; a number
            is in seconds (YAML reads an unquoted 24:00:00 as one). None is the partition's.
        gpus_per_task: Accelerators of a task, >= 0, each with a worker of its own; 0 is a worker on the CPU.
        cpus_per_task: CPU cores of a task, >= 1; None is the cluster's default.
        memory: Memory of a task, such as "16G"; None is the cluster's default.
        signal_seconds: Seconds before the time limit at which workers begin to give back, from 1 to 65535;
            Slurm may be 60 seconds early. It should exceed the time that a batch takes.
        max_requeues: Runs of a task after its first beyond which it no longer requeues itself, >= 0.
        max_restarts: Times that a run of a task starts a worker again that died, >= 0.
        job_name: Name of the job; None is the dataset's.
        extra_lines: Further lines for the script's head, each beginning with "#SBATCH "; they override ours.
        setup_lines: Shell lines to run before the workers, such as "module load cuda"; one that fails ends
            the task.
        script: Where the script is written; None is "<dataset's name>.sbatch" in the working folder. Logs go
            beside it.
        submit: Whether to submit the script once it is written.
    """

    num_tasks: int = 1
    max_running: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | int | None = None
    gpus_per_task: int = 1
    cpus_per_task: int | None = None
    memory: str | None = None
    signal_seconds: int = 300
    max_requeues: int = 1000
    max_restarts: int = 10
    job_name: str | None = None
    extra_lines: list[str] = field(default_factory=list)
    setup_lines: list[str] = field(default_factory=list)
    script: str | None = None
    submit: bool = True

    def check(self) -> None:
        """Checks what can be checked without Slurm.

        Raises:
            ValueError: A setting is out of its range, or would break out of its line of the script.
        """
        at_least = {
            "num_tasks": 1,
            "gpus_per_task": 0,
            "max_requeues": 0,
            "max_restarts": 0,
            "signal_seconds": 1,
        }
        optional = {name: 1 for name in ("max_running", "cpus_per_task") if getattr(self, name) is not None}
        for name, bound in {**at_least, **optional}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        if self.signal_seconds > _MAX_SIGNAL_SECONDS:
            raise ValueError(f"signal_seconds must be <= {_MAX_SIGNAL_SECONDS}, got {self.signal_seconds}")
        for name in ("partition", "account", "qos", "memory", "job_name", "script"):
            _check_line(name, getattr(self, name))
        for name in ("extra_lines", "setup_lines"):
            for line in getattr(self, name):
                _check_line(name, line)
        for line in self.extra_lines:
            if not line.startswith("#SBATCH "):
                raise ValueError(f"extra_lines must each begin with '#SBATCH ', got {line!r}")
        if self.time_limit is not None:
            self._check_time_limit(_count_seconds(self.time_limit))

    def _check_time_limit(self, seconds: int) -> None:
        """A signal that comes when the task starts would have it requeued for ever, with nothing made."""
        shortest = self.signal_seconds + _SIGNAL_RESOLUTION_SECONDS
        if seconds <= shortest:
            raise ValueError(
                f"time_limit must be > {shortest} seconds (signal_seconds, which Slurm may have "
                f"{_SIGNAL_RESOLUTION_SECONDS} seconds early), got {self.time_limit}"
            )


def submit(config: SlurmConfig, work: "WorkConfig") -> str | None:
    """Writes the batch script and hands it to Slurm.

    Args:
        config: The array.
        work: What each worker is told; paths in it are relative to the working folder.

    Returns:
        The job id, or None where `config.submit` is false.

    Raises:
        ValueError: A setting is bad; see `SlurmConfig.check`.
        OSError: The script cannot be written, there is no sbatch here, or it refuses.
    """
    text = build_script(config, work)
    path = _find_script(config, work)
    path.parent.mkdir(parents=True, exist_ok=True)  # Slurm does not make the folder of the logs
    path.write_text(text, encoding="utf-8")
    if not config.submit:
        return None
    try:
        finished = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise OSError(
            f"sbatch is not on this machine; {path} is written, submit it where Slurm is: sbatch {path.name}"
        ) from error
    if finished.returncode:
        reason = " ".join((finished.stderr or finished.stdout).split()) or f"exit code {finished.returncode}"
        raise OSError(f"sbatch refuses {path}: {reason}")
    return finished.stdout.strip().partition(";")[0]  # with several clusters: "job id;cluster"


def is_queued(job_id: str) -> bool:
    """Whether tasks of a job wait, run or end.

    Raises:
        OSError: squeue cannot tell.
    """
    try:
        finished = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job_id}"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:  # nothing can be submitted here either
        return False
    if finished.returncode and "invalid job id" not in finished.stderr.lower():  # said of one long gone
        reason = " ".join(finished.stderr.split()) or f"exit code {finished.returncode}"
        raise OSError(f"squeue cannot tell whether Slurm job {job_id} is still there: {reason}")
    return bool(finished.stdout.strip())


def build_script(config: SlurmConfig, work: "WorkConfig") -> str:
    """The batch script of the array.

    Every value is quoted; of the settings, `extra_lines` and `setup_lines` alone stand in it as they are.

    Raises:
        ValueError: A setting is bad; see `SlurmConfig.check`.
    """
    config.check()
    parts = [
        "#!/bin/bash",
        *_build_options(config, work),
        *config.extra_lines,
        "",
        f"max_restarts={config.max_restarts}  # of a worker that died, in one run of this task",
        f"max_requeues={config.max_requeues}  # of this task by itself",
        _FUNCTIONS,
        *(["set -e", *config.setup_lines, "set +e", ""] if config.setup_lines else []),
        "if ((${#signals[@]} == 0)); then",
        *(f"    start {shlex.join(build_worker_command(worker))}" for worker in _split_devices(config, work)),
        "fi",
        "",
        _END,
    ]
    return "\n".join(parts)


def build_worker_command(work: "WorkConfig") -> list[str]:
    """The command line of one worker."""
    return [sys.executable, "-m", "data_gen.job.worker", json.dumps(dataclasses.asdict(work))]


_FUNCTIONS = """\
signals=()   # that came: USR1 (the time limit is near), TERM (Slurm ends the task)
children=()  # processes to pass USR1 on to

catch_signals() {
    trap 'signals+=(USR1); if ((${#children[@]})); then kill -USR1 "${children[@]}" 2>/dev/null; fi' USR1
    trap 'signals+=(TERM)' TERM  # not passed on: Slurm sends it to every process itself
}

# Sets `code` to the exit code of a child. A signal ends `wait`, not the child.
await() {
    local num_signals
    while
        num_signals=${#signals[@]}
        wait "$1"
        code=$?
        ((${#signals[@]} != num_signals))
    do :; done
}

# Runs a worker, as the one of this number, until it says that nothing is left (0, 3), or that it was told to
# stop (75) while this task is.
supervise() {
    catch_signals
    local num_restarts=0 supervisor=$BASHPID place
    place=$(uname -n)/$SLURM_JOB_ID/$1  # HOSTNAME may be that of the machine which submitted the job
    shift
    children=()
    until ((${#signals[@]})); do
        STABLEREP_SUPERVISOR_PID=$supervisor STABLEREP_WORKER_PLACE=$place "$@" &
        children=("$!")
        if ((${#signals[@]})); then kill -USR1 "$!" 2>/dev/null; fi  # it came just before
        await "$!"
        children=()
        case $code in
            0 | 3) exit "$code" ;;
            75) if ((${#signals[@]} == 0)); then sleep 1; fi ;;  # what stops all may reach this shell last
        esac
        if ((${#signals[@]} || num_restarts >= max_restarts)); then exit "$code"; fi
        num_restarts=$((num_restarts + 1))
        echo "a worker ended with code $code; starting it again ($num_restarts of $max_restarts)" >&2
    done
    exit 75
}

start() {
    supervise "${#children[@]}" "$@" &
    children+=("$!")
    if ((${#signals[@]})); then kill -USR1 "$!" 2>/dev/null; fi  # it came just before
}

# Back into the queue: what this task leaves is made by whichever task runs next.
requeue() {
    local task=$SLURM_JOB_ID
    if [[ $SLURM_ARRAY_TASK_ID ]]; then  # where SLURM_JOB_ID of one of the tasks means the whole array
        task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    if ((${SLURM_RESTART_COUNT:-0} >= max_requeues)); then
        echo "task $task was started again $SLURM_RESTART_COUNT times: not requeued" >&2
        return
    fi
    for _ in 1 2 3 4 5; do  # the controller is busy when many tasks meet their time limit at once
        if scontrol requeue "$task"; then return; fi
        sleep 5
    done
    echo "task $task could not be requeued; what it leaves is made by the others" >&2
}

catch_signals
"""

_END = """\
worst=0
for child in "${children[@]}"; do
    await "$child"
    if ((code > worst)); then worst=$code; fi
done
if ((${#children[@]} == 0)); then worst=75; fi  # the signal came before the workers
case "${signals[*]}" in
    *TERM*) ;;  # cancelled, or requeued by Slurm itself
    *USR1*) if ((worst >= 70)); then requeue; fi ;;
esac
exit "$worst"
"""


def _build_options(config: SlurmConfig, work: "WorkConfig") -> list[str]:
    """The head of the script."""
    _check_line("dataset", work.dataset)
    script = _find_script(config, work)
    if "\\" in str(script):
        raise ValueError(f"script must hold no backslash (Slurm cannot name a log so), got {script}")
    array = f"0-{config.num_tasks - 1}" + (f"%{config.max_running}" if config.max_running else "")
    options = {
        "job-name": config.job_name or _name_dataset(work.dataset),
        "array": array,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "nodes": "1",
        "ntasks": "1",
        "gres": f"gpu:{config.gpus_per_task}" if config.gpus_per_task else None,
        "cpus-per-task": config.cpus_per_task,
        "mem": config.memory,
        "time": None if config.time_limit is None else _format_seconds(_count_seconds(config.time_limit)),
        "signal": f"B:USR1@{config.signal_seconds}",
        "open-mode": "append",
        "chdir": os.getcwd(),
        "output": str(script.with_suffix("")).replace("%", "%%") + "-%A_%a.log",
    }
    lines = [
        f"#SBATCH --{name}={_quote_option(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    return [*lines, "#SBATCH --requeue"]


def _split_devices(config: SlurmConfig, work: "WorkConfig") -> list["WorkConfig"]:
    """What each worker of a task is told: with several accelerators, each has its own."""
    if config.gpus_per_task <= 1:
        return [work]
    kind = "cuda" if work.device == "auto" else work.device
    if ":" in kind or kind == "cpu":
        raise ValueError(f"device must be auto or a kind of accelerator where gpus_per_task > 1, got {kind}")
    return [dataclasses.replace(work, device=f"{kind}:{index}") for index in range(config.gpus_per_task)]


def _find_script(config: SlurmConfig, work: "WorkConfig") -> Path:
    return Path(config.script or f"{_name_dataset(work.dataset)}.sbatch").absolute()


def _name_dataset(dataset: str) -> str:
    name = dataset.rstrip("/").rpartition("/")[2]
    return name if name not in ("", ".", "..") else "dataset"


def _quote_option(value: str) -> str:
    """Quotes for sbatch's own parser of `#SBATCH` lines: unlike in the shell, a bare `\\ ` ends the word."""
    if _PLAIN_OPTION.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _check_line(name: str, value: str | None) -> None:
    """Refuses what would break out of its line of the script."""
    if value is not None and _CONTROL_CHARACTER.search(value):
        raise ValueError(f"{name} must hold no line break or control character, got {value!r}")


def _count_seconds(time_limit: str | int) -> int:
    """Seconds of a time limit.

    Raises:
        ValueError: It cannot be read, or its unit is not clear.
    """
    if isinstance(time_limit, int):
        return time_limit
    match = _TIME_LIMIT.fullmatch(time_limit)
    if match is None or (match[1] is None and match[3] is None):
        raise ValueError(
            f"time_limit must be hours:minutes:seconds or days-hours:minutes:seconds, got {time_limit!r}"
        )
    days, first, second, third = (int(group or 0) for group in match.groups())
    if match[1] is None and match[4] is None:  # as Slurm has it: minutes:seconds
        return 60 * first + second
    return 86400 * days + 3600 * first + 60 * second + third


def _format_seconds(seconds: int) -> str:
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
