"""The Slurm array: its script alone, and on a real cluster of this machine where Slurm is installed."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_gen.exit_codes import EXIT_UNFINISHED
from data_gen.job.engines import slurm
from data_gen.job.engines.slurm import SlurmConfig, build_script, submit
from data_gen.job.generate import GenerateConfig, run
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.job.worker import WorkConfig
from data_gen.storage import Store
from stablerep.cli import main
from tests.data_gen.light_workers import generate_command, light_environment
from tests.data_gen.slurm_cluster import (
    GPU_DEVICES,
    SlurmCluster,
    find_missing_programs,
    run_slurm_cluster,
)
from tests.processes import MAX_SECONDS, is_pending, stop_process, wait_until

NASTY_NAME = 'it\'s 100% "of" größer #1; $(touch injected) `touch injected` & packed \\ set'
NUM_SHARDS = 4

# Makes files instead of images: claims one after another, says what happens to it, and while there is a file
# `hold` stays in the shard that it has, as a worker does in a long one. `die-CODE` has it die once.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

work = json.loads(sys.argv[1])
folder = Path(work["dataset"])
stopped = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stopped.append(signal.Signals(number).name))

def say(**event):
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES", "SET_UP")
    event |= {name: os.environ.get(name) for name in names} | {"device": work["device"], "signals": stopped}
    event["place"] = os.environ.get("STABLEREP_WORKER_PLACE")
    event["is_supervised"] = os.environ.get("STABLEREP_SUPERVISOR_PID") == str(os.getppid())
    descriptor = os.open(folder / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(event) + chr(10)).encode())

say(event="start", pid=os.getpid(), cwd=os.getcwd(), work=work)
for index in range(NUM_SHARDS):
    for order in folder.glob("die-*"):
        order.unlink()
        os._exit(int(order.name.removeprefix("die-")))
    claim, shard = folder / f"claim-{index}", folder / f"shard-{index}"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        continue
    while (folder / "hold").exists() and not stopped:
        time.sleep(0.05)
    if not stopped:
        time.sleep(0.2)
    if stopped:
        claim.unlink()
        say(event="gave back")
        sys.exit(75)
    shard.touch()
    say(event="made", shard=index)
say(event="end")
sys.exit(work["num_threads"] or 0)
""".replace("NUM_SHARDS", str(NUM_SHARDS))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has tasks run the stand-in; its exit code at the end is the worker's `num_threads`."""
    use_stand_in(tmp_path, monkeypatch)


def use_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(
        slurm,
        "build_worker_command",
        lambda work: [sys.executable, "-S", str(path), json.dumps(dataclasses.asdict(work))],
    )


def read_events(dataset: Path, **wanted: Any) -> list[dict[str, Any]]:
    """What stand-ins have said, of the kind that is wanted."""
    try:
        lines = (dataset / "events").read_text().splitlines()
    except FileNotFoundError:
        return []
    events = [json.loads(line) for line in lines]
    return [event for event in events if wanted.items() <= event.items()]


def list_made(dataset: Path) -> set[str]:
    return {path.name for path in dataset.glob("shard-*")}


ALL_SHARDS = {f"shard-{index}" for index in range(NUM_SHARDS)}


# The script alone


@dataclass(frozen=True)
class Task:
    """A task of an array without Slurm: the batch shell, and what the stand-in for scontrol was told."""

    process: "subprocess.Popen[bytes]"
    dataset: Path
    scontrol_calls: Path

    def wait(self) -> int:
        return self.process.wait(timeout=MAX_SECONDS)

    def read_calls(self) -> list[str]:
        return self.scontrol_calls.read_text().splitlines() if self.scontrol_calls.exists() else []


@pytest.fixture
def start_task(tmp_path: Path, stand_in: None) -> Iterator[Callable[..., Task]]:
    """Runs the script in bash as slurmd would: alone in a process group, in the environment of task 2."""
    processes = []
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "scontrol-calls"
    write_program(programs / "scontrol", f'echo "$@" >> {calls}')

    def start(config: SlurmConfig, restart_count: int | None = None, **work: Any) -> Task:
        dataset = tmp_path / "dataset"
        dataset.mkdir(exist_ok=True)
        script = tmp_path / "task.sbatch"
        script.write_text(build_script(config, WorkConfig(dataset=str(dataset), **work)))
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "17",
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": "2",
        }
        if restart_count is not None:
            environment["SLURM_RESTART_COUNT"] = str(restart_count)
        process = subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)
        processes.append(process)
        return Task(process, dataset, calls)

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


@contextmanager
def held(dataset: Path) -> Iterator[None]:
    """Workers stay in their shards."""
    dataset.mkdir(parents=True, exist_ok=True)
    (dataset / "hold").touch()
    yield
    (dataset / "hold").unlink()


def wait_for_event(dataset: Path, number: int = 1, **wanted: Any) -> None:
    wait_until(lambda: len(read_events(dataset, **wanted)) >= number, lambda: str(read_events(dataset)))


@pytest.mark.parametrize("gpus_per_task", [0, 1, 3])
def test_the_script_is_valid_bash(gpus_per_task: int, tmp_path: Path) -> None:
    config = SlurmConfig(gpus_per_task=gpus_per_task, setup_lines=["module load cuda"], time_limit="1-0:0:0")
    script = tmp_path / "script"
    script.write_text(build_script(config, WorkConfig(dataset=str(tmp_path))))
    finished = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_every_value_reaches_the_worker_as_it_was(
    start_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_folder = tmp_path / "work"
    work_folder.mkdir()
    monkeypatch.chdir(work_folder)
    model = NASTY_NAME + "\n\t{}%s!\U0001f600"
    task = start_task(SlurmConfig(gpus_per_task=0), model=model, device="cpu")
    assert task.wait() == 0
    (start,) = read_events(task.dataset, event="start")
    assert start["work"] == dataclasses.asdict(
        WorkConfig(dataset=str(task.dataset), model=model, device="cpu")
    )
    assert list(work_folder.iterdir()) == []  # nothing in a value was run
    assert list_made(task.dataset) == ALL_SHARDS


@pytest.mark.parametrize("code", [0, 3, 1])
def test_the_task_ends_as_its_worker_does(code: int, start_task: Callable[..., Task]) -> None:
    task = start_task(SlurmConfig(max_restarts=0), num_threads=code)
    assert task.wait() == code
    assert task.read_calls() == []


def test_usr1_to_the_batch_shell_has_the_worker_give_back_and_the_task_requeued(
    start_task: Callable[..., Task], tmp_path: Path
) -> None:
    with held(tmp_path / "dataset"):
        task = start_task(SlurmConfig())
        wait_for_event(task.dataset, event="start")
        task.process.send_signal(signal.SIGUSR1)
        assert task.wait() == 75
    (event,) = read_events(task.dataset, event="gave back")
    assert set(event["signals"]) == {"SIGUSR1"}  # more than once if it came just as the shells began to wait
    assert task.read_calls() == ["requeue 17_2"]  # "requeue 17" would be the whole array


def test_term_to_all_processes_reaches_the_worker_once_and_requeues_nothing(
    start_task: Callable[..., Task], tmp_path: Path
) -> None:
    with held(tmp_path / "dataset"):
        task = start_task(SlurmConfig(gpus_per_task=2))
        wait_for_event(task.dataset, event="start", number=2)
        os.killpg(task.process.pid, signal.SIGTERM)
        assert task.wait() == 75
    assert len(read_events(task.dataset, event="gave back", signals=["SIGTERM"])) == 2
    assert task.read_calls() == []


def test_a_task_that_is_cancelled_while_it_gives_back_is_not_requeued(
    start_task: Callable[..., Task], tmp_path: Path
) -> None:
    with held(tmp_path / "dataset"):
        task = start_task(SlurmConfig())
        wait_for_event(task.dataset, event="start")
        pid = read_events(task.dataset)[0]["pid"]
        stop_process(pid)
        task.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: is_pending(pid, signal.SIGUSR1))  # both shells have passed it on
        os.killpg(task.process.pid, signal.SIGTERM)
        os.killpg(task.process.pid, signal.SIGCONT)
        assert task.wait() == 75
    assert task.read_calls() == []


def test_usr1_before_the_workers_are_started_requeues_without_starting_them(
    start_task: Callable[..., Task],
) -> None:
    task = start_task(SlurmConfig(setup_lines=["kill -USR1 $$"]))
    assert task.wait() == 75
    assert read_events(task.dataset) == []
    assert task.read_calls() == ["requeue 17_2"]


def test_a_task_that_was_requeued_too_often_stays_away(
    start_task: Callable[..., Task], tmp_path: Path
) -> None:
    with held(tmp_path / "dataset"):
        task = start_task(SlurmConfig(max_requeues=7), restart_count=7)
        wait_for_event(task.dataset, event="start")
        task.process.send_signal(signal.SIGUSR1)
        assert task.wait() == 75
    assert task.read_calls() == []


@pytest.mark.parametrize("code", [70, 137, 1])
def test_a_worker_that_dies_is_started_again(
    code: int, start_task: Callable[..., Task], tmp_path: Path
) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / f"die-{code}").touch()
    task = start_task(SlurmConfig())
    assert task.wait() == 0
    assert list_made(task.dataset) == ALL_SHARDS
    assert len(read_events(task.dataset, event="start")) == 2


def test_a_worker_is_not_started_again_for_ever(start_task: Callable[..., Task]) -> None:
    task = start_task(SlurmConfig(max_restarts=2), num_threads=70)
    assert task.wait() == 70
    assert len(read_events(task.dataset, event="start")) == 3


def test_a_worker_that_dies_while_the_time_limit_is_near_is_left_to_the_next_run(
    start_task: Callable[..., Task], tmp_path: Path
) -> None:
    with held(tmp_path / "dataset"):
        task = start_task(SlurmConfig())
        wait_for_event(task.dataset, event="start")
        pid = read_events(task.dataset)[0]["pid"]
        stop_process(pid)
        task.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: is_pending(pid, signal.SIGUSR1))  # both shells have passed it on
        os.kill(pid, signal.SIGKILL)
        assert task.wait() == 137
    assert len(read_events(task.dataset, event="start")) == 1
    assert task.read_calls() == ["requeue 17_2"]


def test_a_worker_that_someone_else_stops_is_started_again(
    start_task: Callable[..., Task], tmp_path: Path
) -> None:
    with held(tmp_path / "dataset"):
        task = start_task(SlurmConfig())
        wait_for_event(task.dataset, event="start")
        os.kill(read_events(task.dataset)[0]["pid"], signal.SIGTERM)
        wait_for_event(task.dataset, event="start", number=2)
    assert task.wait() == 0
    assert list_made(task.dataset) == ALL_SHARDS


def test_a_worker_keeps_its_place_and_supervisor_when_it_is_started_again(
    start_task: Callable[..., Task], tmp_path: Path
) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "die-70").touch()
    task = start_task(SlurmConfig(gpus_per_task=2))
    assert task.wait() == 0
    starts = read_events(task.dataset, event="start")
    places = {(event["device"], event["place"]) for event in starts}
    assert len(starts) == 3
    assert places == {(f"cuda:{index}", f"{os.uname().nodename}/17/{index}") for index in range(2)}
    assert all(event["is_supervised"] for event in starts)


def test_a_worker_that_fails_in_every_shard_ends_and_sets_none_aside(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    """The workers themselves, of which one has a broken accelerator."""
    captions, dataset, script = tmp_path / "captions.txt", tmp_path / "dataset", tmp_path / "task.sbatch"
    captions.write_text("".join(f"caption {index}\n" for index in range(32)))
    failures = {"LIGHT_FAILURES": str(tmp_path / "failures"), "LIGHT_NUM_FAILURES": "3"}
    environment = light_environment(
        tmp_path / "light", LIGHT_BROKEN_DEVICE="cuda:0", SLURM_JOB_ID="17", **failures
    )
    options = ["--slurm.gpus_per_task", "2", "--slurm.max_restarts", "2", "--slurm.script", str(script)]
    options += ["--generator.device", "auto", "--slurm.submit", "false", "--engine", "slurm"]
    command = generate_command(captions, dataset, tiny_pipeline, *options)
    assert subprocess.run(command, env=environment).returncode == EXIT_UNFINISHED
    command = ["bash", str(script)]
    task = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
    assert task.returncode == 70, task.stderr
    assert task.stderr.count("starting it again") == 2
    assert len(list(dataset.glob("*_stats.json"))) == 8


def test_each_accelerator_of_a_task_has_a_worker(start_task: Callable[..., Task]) -> None:
    task = start_task(SlurmConfig(gpus_per_task=3))
    assert task.wait() == 0
    devices = [event["device"] for event in read_events(task.dataset, event="start")]
    assert sorted(devices) == ["cuda:0", "cuda:1", "cuda:2"]
    assert list_made(task.dataset) == ALL_SHARDS


def test_setup_lines_are_run_before_the_worker(start_task: Callable[..., Task]) -> None:
    task = start_task(SlurmConfig(setup_lines=["export SET_UP='of course'", "# comment"]))
    assert task.wait() == 0
    assert read_events(task.dataset, event="start", SET_UP="of course")


def test_a_setup_line_that_fails_ends_the_task(start_task: Callable[..., Task]) -> None:
    task = start_task(SlurmConfig(setup_lines=["(exit 5)"]))
    assert task.wait() == 5
    assert read_events(task.dataset) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be >= 1, got 0"),
        ({"max_running": 0}, "max_running must be >= 1, got 0"),
        ({"gpus_per_task": -1}, "gpus_per_task must be >= 0, got -1"),
        ({"cpus_per_task": 0}, "cpus_per_task must be >= 1, got 0"),
        ({"signal_seconds": 0}, "signal_seconds must be >= 1, got 0"),
        ({"signal_seconds": 70000}, "signal_seconds must be <= 65535, got 70000"),
        ({"partition": "a\n#SBATCH --uid=0"}, "partition must hold no line break or control character"),
        ({"memory": "1G\r"}, "memory must hold no line break or control character"),
        ({"job_name": "a\x00"}, "job_name must hold no line break or control character"),
        ({"setup_lines": ["true\nrm"]}, "setup_lines must hold no line break or control character"),
        ({"extra_lines": ["#SBATCH --a\nrm"]}, "extra_lines must hold no line break or control character"),
        ({"extra_lines": ["rm -r /"]}, "extra_lines must each begin with '#SBATCH ', got 'rm -r /'"),
        ({"script": "a\\b.sbatch"}, "script must hold no backslash"),
        ({"time_limit": "90"}, "time_limit must be hours:minutes:seconds or days-hours:minutes:seconds"),
        ({"time_limit": "1:2:3:4"}, "time_limit must be hours:minutes:seconds"),
        (
            {"time_limit": "0:06:00"},
            r"time_limit must be > 360 seconds \(signal_seconds, which .*got 0:06:00",
        ),
        ({"time_limit": 360}, "time_limit must be > 360 seconds"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_script(SlurmConfig(**changes), WorkConfig(dataset="dataset"))


def test_a_dataset_whose_name_breaks_its_line_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset must hold no line break"):
        build_script(SlurmConfig(), WorkConfig(dataset="a\n#SBATCH --uid=0"))


def test_several_workers_cannot_share_one_device() -> None:
    with pytest.raises(ValueError, match="device must be auto or a kind of accelerator .* got cuda:1"):
        build_script(SlurmConfig(gpus_per_task=2), WorkConfig(dataset="dataset", device="cuda:1"))


@pytest.mark.parametrize(
    ("time_limit", "option"),
    [
        ("24:00:00", "24:00:00"),
        (86400, "24:00:00"),
        ("2-12", "60:00:00"),
        ("1-00:30:00", "24:30:00"),
        ("90:30", "01:30:30"),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time_limit: str | int, option: str) -> None:
    script = build_script(SlurmConfig(time_limit=time_limit), WorkConfig(dataset="dataset"))
    assert f"#SBATCH --time={option}\n" in script


def test_submit_returns_the_job_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "sbatch", f'echo "$@" > {tmp_path}/arguments; echo "4711;cluster"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = tmp_path / "new folder" / "job.sbatch"
    assert submit(SlurmConfig(script=str(script)), WorkConfig(dataset="dataset")) == "4711"
    assert (tmp_path / "arguments").read_text() == f"--parsable {script}\n"
    assert script.read_text() == build_script(SlurmConfig(script=str(script)), WorkConfig(dataset="dataset"))


def test_no_second_array_is_submitted_while_slurm_has_the_first(
    make_config: Callable[..., GenerateConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls, queue = tmp_path / "calls", tmp_path / "queue"
    write_program(tmp_path / "sbatch", f'echo sbatch >> {calls}; echo "47$(wc -l < {calls})"')
    write_program(tmp_path / "squeue", f'echo "$@" >&2; cat {queue}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = make_config(engine="slurm", slurm=SlurmConfig(script=str(tmp_path / "job.sbatch")))
    assert run(config) == EXIT_UNFINISHED
    assert "Slurm job 471; " in capsys.readouterr().out
    queue.write_text("471_0 PENDING\n")
    assert run(config) == EXIT_UNFINISHED
    assert "Slurm job 471 is still there, no other is submitted" in capsys.readouterr().out
    write_program(tmp_path / "squeue", "echo 'slurm_load_jobs error: no controller' >&2; exit 1")
    with pytest.raises(OSError, match="squeue cannot tell whether Slurm job 471 is still there: .* no contr"):
        run(config)
    write_program(tmp_path / "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert run(config) == EXIT_UNFINISHED
    assert "Slurm job 472; " in capsys.readouterr().out
    assert WorkFolder(Store(config.output), Worker.of_this_process(), 60).list_jobs() == ["472"]
    assert run(dataclasses.replace(config, engine="local")) == 0
    assert not (Path(config.output) / ".work").exists()


def test_no_array_is_submitted_for_shards_that_were_set_aside(
    make_config: Callable[..., GenerateConfig], dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in dataset_copy.glob("00001*"):
        path.unlink()
    WorkFolder(Store(dataset_copy), Worker.of_this_process(), 60).set_aside("00001", "its captions")
    assert run(make_config(engine="slurm", slurm=SlurmConfig(submit=False))) == 1
    assert "shard 00001 is set aside: its captions" in capsys.readouterr().err


def test_a_refusal_is_told_in_slurms_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "sbatch", "echo 'sbatch: error: invalid\npartition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(OSError, match=r"sbatch refuses .*job.sbatch: sbatch: error: invalid partition$"):
        submit(SlurmConfig(script=str(tmp_path / "job.sbatch")), WorkConfig(dataset="dataset"))


def test_without_slurm_the_script_is_written_and_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    work = WorkConfig(dataset="s3://bucket/my set/")
    with pytest.raises(OSError, match=r"sbatch is not on this machine; .*my set.sbatch is written"):
        submit(SlurmConfig(), work)
    assert (tmp_path / "my set.sbatch").exists()
    assert submit(SlurmConfig(submit=False), work) is None


# A real cluster


missing = find_missing_programs()
real_cluster = pytest.mark.skipif(
    bool(missing), reason=f"Slurm is not installed here: no {', '.join(missing)}"
)


@dataclass(frozen=True)
class Array:
    """A submitted array of stand-ins."""

    job: str
    dataset: Path
    log_prefix: str

    def explain(self, cluster: SlurmCluster) -> str:
        logs = [path.read_text() for path in Path(self.log_prefix).parent.glob("*.log")]
        return f"{cluster.states(self.job)} {read_events(self.dataset)} {logs}"

    def wait_for_states(self, cluster: SlurmCluster, states: set[str]) -> None:
        wait_until(lambda: set(cluster.states(self.job).values()) == states, lambda: self.explain(cluster))

    def was_ended_by_a_later_run(self) -> bool:
        """Whether the work came to its end after a requeue, of however many."""
        ends = read_events(self.dataset, event="end")
        return any(int(event["SLURM_RESTART_COUNT"] or 0) >= 1 for event in ends)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with run_slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def arrays(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """Every array of these tests, submitted at once, so that the tests wait at the same time.

    The stand-ins hold on in their first shard until a test lets them go.
    """
    configs = {
        "expiring": SlurmConfig(partition="short", signal_seconds=30, gpus_per_task=0),
        "plain": SlurmConfig(num_tasks=3, max_running=2, gpus_per_task=0),
        "gpus": SlurmConfig(gpus_per_task=len(GPU_DEVICES), extra_lines=["#SBATCH --comment='two gpus'"]),
        "requeued": SlurmConfig(num_tasks=2, gpus_per_task=0),
        "cancelled": SlurmConfig(gpus_per_task=0),
        "preempted": SlurmConfig(partition="low", cpus_per_task=8, gpus_per_task=0),
    }
    submitted = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_stand_in(tmp_path_factory.mktemp("stand-in"), monkeypatch)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        for name, config in configs.items():
            folder = tmp_path_factory.mktemp(name) / NASTY_NAME.replace("\\", "")
            dataset = folder / "data set"
            dataset.mkdir(parents=True)
            if name not in ("plain", "gpus"):
                (dataset / "hold").touch()
            config = dataclasses.replace(config, script=str(folder / "a job.sbatch"))
            job = submit(config, WorkConfig(dataset=str(dataset)))
            assert job is not None
            submitted[name] = Array(job, dataset, str(folder / "a job"))
    return submitted


@real_cluster
def test_an_array_makes_every_shard_once(cluster: SlurmCluster, arrays: dict[str, Array]) -> None:
    array = arrays["plain"]
    array.wait_for_states(cluster, {"COMPLETED"})
    made = read_events(array.dataset, event="made")
    assert sorted(event["shard"] for event in made) == list(range(NUM_SHARDS))
    starts = read_events(array.dataset, event="start")
    assert {event["SLURM_ARRAY_TASK_ID"] for event in starts} == {"0", "1", "2"}
    assert {event["cwd"] for event in starts} == {os.getcwd()}
    assert all(Path(f"{array.log_prefix}-{array.job}_{task}.log").exists() for task in range(3))
    assert (
        cluster.call("squeue", "--noheader", "--states=all", f"--jobs={array.job}_0", "--format=%j")
        == "data set"
    )


@real_cluster
def test_a_task_of_two_accelerators_has_two_workers(cluster: SlurmCluster, arrays: dict[str, Array]) -> None:
    array = arrays["gpus"]
    array.wait_for_states(cluster, {"COMPLETED"})
    starts = read_events(array.dataset, event="start", CUDA_VISIBLE_DEVICES="0,1")
    assert sorted(event["device"] for event in starts) == ["cuda:0", "cuda:1"]
    assert "Comment=two gpus" in cluster.show(array.job)


@real_cluster
def test_a_cancelled_task_gives_back_and_does_not_return(
    cluster: SlurmCluster, arrays: dict[str, Array]
) -> None:
    array = arrays["cancelled"]
    wait_for_event(array.dataset, event="start")
    cluster.call("scancel", array.job)
    wait_for_event(array.dataset, event="gave back", signals=["SIGTERM"])
    array.wait_for_states(cluster, {"CANCELLED"})
    assert "Restarts=0" in cluster.show(array.job)


@real_cluster
def test_a_task_that_somebody_requeues_goes_on_and_the_others_stay(
    cluster: SlurmCluster, arrays: dict[str, Array]
) -> None:
    array = arrays["requeued"]
    wait_for_event(array.dataset, event="start", number=2)
    cluster.call("scontrol", "requeue", f"{array.job}_1")
    wait_for_event(array.dataset, event="gave back", SLURM_ARRAY_TASK_ID="1", signals=["SIGTERM"])
    wait_for_event(array.dataset, event="start", SLURM_ARRAY_TASK_ID="1", SLURM_RESTART_COUNT="1")
    (array.dataset / "hold").unlink()
    array.wait_for_states(cluster, {"COMPLETED"})
    assert list_made(array.dataset) == ALL_SHARDS
    assert len(read_events(array.dataset, event="start", SLURM_ARRAY_TASK_ID="0")) == 1


@real_cluster
def test_a_preempted_task_gives_back_and_returns(cluster: SlurmCluster, arrays: dict[str, Array]) -> None:
    array = arrays["preempted"]
    wait_for_event(array.dataset, event="start")
    urgent = cluster.call("sbatch", "--parsable", "--cpus-per-task=8", "--output=/dev/null", "--wrap=sleep 1")
    wait_for_event(array.dataset, event="gave back", signals=["SIGTERM"])
    wait_until(lambda: "JobState=COMPLETED" in cluster.show(urgent), lambda: cluster.show(urgent))
    (array.dataset / "hold").unlink()
    array.wait_for_states(cluster, {"COMPLETED"})
    assert list_made(array.dataset) == ALL_SHARDS
    assert array.was_ended_by_a_later_run()


@real_cluster
def test_a_task_near_its_time_limit_gives_back_and_returns(
    cluster: SlurmCluster, arrays: dict[str, Array]
) -> None:
    array = arrays["expiring"]
    wait_for_event(array.dataset, event="gave back", signals=["SIGUSR1"])
    (array.dataset / "hold").unlink()
    array.wait_for_states(cluster, {"COMPLETED"})
    assert list_made(array.dataset) == ALL_SHARDS
    assert array.was_ended_by_a_later_run()


@real_cluster
@pytest.mark.e2e
def test_an_array_makes_the_dataset_that_one_process_makes(
    cluster: SlurmCluster,
    tiny_pipeline: Path,
    captions_file: Path,
    finished_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    settings = {
        "engine": "slurm",
        "slurm": {"num_tasks": 2, "gpus_per_task": 0, "script": str(tmp_path / "job.sbatch")},
        "num_threads_per_worker": 1,
        "captions": str(captions_file),
        "output": str(tmp_path / "dataset"),
        "generator": {"model": str(tiny_pipeline), "num_inference_steps": 2, "device": "cpu"},
        "num_images_per_caption": 3,
        "num_captions_per_shard": 2,
        "num_images_per_batch": 4,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert main(["generate", "--config", str(tmp_path / "config.yaml")]) == EXIT_UNFINISHED
    (job,) = re.findall(r"Slurm job (\d+)", capsys.readouterr().out)
    assert main(["generate", "--config", str(tmp_path / "config.yaml")]) == EXIT_UNFINISHED
    assert f"Slurm job {job} is still there" in capsys.readouterr().out
    array = Array(job, tmp_path / "dataset", str(tmp_path / "job"))
    array.wait_for_states(cluster, {"COMPLETED"})
    for path in sorted(finished_dataset.glob("*.tar")):
        assert (tmp_path / "dataset" / path.name).read_bytes() == path.read_bytes()
    assert not slurm.is_queued(job)
    assert not (tmp_path / "dataset" / ".work").exists()
