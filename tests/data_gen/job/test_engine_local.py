"""Laws of workers as processes of this machine: whoever dies or leaves, the dataset is the same."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from data_gen.job.plan import Plan
from data_gen.job.work_folder import MAX_DEATHS, Worker, WorkFolder
from data_gen.shards import list_complete_shards
from data_gen.storage import Store
from tests.data_gen.light_workers import generate_command, light_environment
from tests.processes import MAX_SECONDS, is_running, wait_until

NUM_CAPTIONS = 42


@pytest.fixture
def many_captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"caption {index}\n" for index in range(NUM_CAPTIONS)))
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The dataset's files as one worker writes them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    captions = folder / "captions.txt"
    captions.write_text("".join(f"caption {index}\n" for index in range(NUM_CAPTIONS)))
    command = generate_command(captions, folder / "dataset", tiny_pipeline)
    subprocess.run(command, env=light_environment(folder / "light"), check=True, capture_output=True)
    return data_files(folder / "dataset")


def data_files(root: Path) -> dict[str, bytes]:
    """Everything but the markers, which hold seconds."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith("_stats.json")
    }


def children_of(pid: int) -> list[int]:
    """The oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_several_workers_write_what_one_writes(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path, undisturbed: dict[str, bytes]
) -> None:
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, "--num_workers", "3")
    log = tmp_path / "log"
    environment = light_environment(tmp_path / "light", LIGHT_LOG=str(log))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert data_files(tmp_path / "dataset") == undisturbed
    assert sorted(log.read_text().splitlines()) == sorted(f"caption {index}" for index in range(NUM_CAPTIONS))


def test_random_kills_change_no_byte(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path, undisturbed: dict[str, bytes]
) -> None:
    """The short form of benchmarks/chaos.py. Kills keep to the pace at which captions are drawn, and meet the
    oldest worker: else a machine on which workers start slowly would see none of them save anything."""
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, "--num_workers", "4")
    log = tmp_path / "log"
    log.touch()
    environment = light_environment(tmp_path / "light", LIGHT_SECONDS="0.4", LIGHT_LOG=str(log))
    rng, num_kills, num_drawn = random.Random(0), 0, 0
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        while job.poll() is None and num_kills < 8:
            time.sleep(rng.uniform(0.05, 0.3))
            if len(log.read_text().splitlines()) < num_drawn + 2:
                continue
            num_drawn = len(log.read_text().splitlines())
            with contextlib.suppress(ProcessLookupError):  # it may just have left
                for worker in children_of(job.pid)[:1]:
                    os.kill(worker, signal.SIGKILL)
                    num_kills += 1
        _, error = job.communicate(timeout=MAX_SECONDS)
    assert num_kills >= 6
    assert "killed by SIGKILL" in error
    if job.returncode != 0:  # a shard that happened to be hit three times at one place
        assert "set aside" in error
        subprocess.run([*command, "--retry_failed"], env=environment, check=True, capture_output=True)
    assert data_files(tmp_path / "dataset") == undisturbed


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("LIGHT_POISON", "killed by SIGKILL"), ("LIGHT_BROKEN", "RuntimeError: cannot draw caption 10")],
)
def test_a_shard_that_kills_three_workers_is_set_aside(
    variable: str,
    reason: str,
    tmp_path: Path,
    many_captions: Path,
    tiny_pipeline: Path,
    undisturbed: dict[str, bytes],
) -> None:
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, "--num_workers", "2")
    environment = light_environment(tmp_path / "light", **{variable: "caption 10"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"shard 00002 is set aside: {reason}" in done.stderr
    plan = Plan.read(Store(tmp_path / "dataset"))
    work_folder = WorkFolder(plan.store, Worker.of_this_process(), lease_seconds=60)
    assert len(work_folder.read_deaths("00002")) >= MAX_DEATHS
    assert len(list_complete_shards(plan.store)) == plan.manifest.num_shards - 1
    again = subprocess.run(command, env=light_environment(tmp_path / "light"), capture_output=True, text=True)
    assert again.returncode == 1
    subprocess.run(
        [*command, "--retry_failed"],
        env=light_environment(tmp_path / "light"),
        check=True,
        capture_output=True,
    )
    assert data_files(tmp_path / "dataset") == undisturbed


def read_until(job: "subprocess.Popen[str]", text: str, number: int) -> str:
    """What the job says until it has said this in so many lines, or has ended."""
    assert job.stderr is not None
    said = ""
    while said.count(text) < number and (line := job.stderr.readline()):
        said += line
    return said


@pytest.mark.parametrize("options", [(), ("--num_workers", "2")])
def test_sigterm_gives_back_and_nothing_finished_is_made_twice(
    options: tuple[str, ...],
    tmp_path: Path,
    many_captions: Path,
    tiny_pipeline: Path,
    undisturbed: dict[str, bytes],
) -> None:
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, *options)
    log = tmp_path / "log"
    hold = tmp_path / "hold"
    hold.write_text("8")  # what two workers begin with
    environment = light_environment(
        tmp_path / "light", LIGHT_LOG=str(log), LIGHT_SECONDS="0.05", LIGHT_HOLD=str(hold)
    )
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        while not log.exists() or len(log.read_text().splitlines()) < 6:
            time.sleep(0.02)
            assert job.poll() is None
        job.send_signal(signal.SIGTERM)
        error = read_until(job, "SIGTERM: giving back", 3 if options else 1)
        hold.unlink()
        error += job.communicate(timeout=MAX_SECONDS)[1]
    assert job.returncode == 75, error
    assert not list((tmp_path / "dataset" / ".work").rglob("claim-*.json"))
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert data_files(tmp_path / "dataset") == undisturbed
    drawn = log.read_text().splitlines()
    assert sorted(drawn) == sorted(f"caption {index}" for index in range(NUM_CAPTIONS))


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_a_worker_that_someone_else_stops_is_replaced(
    num_workers: str,
    tmp_path: Path,
    many_captions: Path,
    tiny_pipeline: Path,
    undisturbed: dict[str, bytes],
) -> None:
    log, root = tmp_path / "log", tmp_path / "dataset"
    command = generate_command(many_captions, root, tiny_pipeline, "--num_workers", num_workers)
    hold = tmp_path / "hold"
    hold.write_text("8")
    environment = light_environment(tmp_path / "light", LIGHT_LOG=str(log), LIGHT_HOLD=str(hold))
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        while not log.exists() or len(log.read_text().splitlines()) < 6:
            time.sleep(0.02)
            assert job.poll() is None
        os.kill(children_of(job.pid)[0], signal.SIGTERM)
        error = read_until(job, "SIGTERM: giving back", 1)
        hold.unlink()
        error += job.communicate(timeout=MAX_SECONDS)[1]
    assert job.returncode == 0, error
    assert "was told to stop, though not by this job; starting it anew" in error
    assert data_files(root) == undisturbed
    assert sorted(log.read_text().splitlines()) == sorted(f"caption {index}" for index in range(NUM_CAPTIONS))


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_a_worker_that_hangs_in_a_shard_is_replaced(
    num_workers: str,
    tmp_path: Path,
    many_captions: Path,
    tiny_pipeline: Path,
    undisturbed: dict[str, bytes],
) -> None:
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline)
    hang = tmp_path / "hang"
    hang.touch()
    environment = light_environment(tmp_path / "light", LIGHT_HANG=str(hang))
    command += ["--num_workers", num_workers, "--stall_seconds", "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "no image for 8 seconds in shard 0000" in done.stderr
    assert done.stderr.count("starting it anew") == 1
    assert "in generate" in done.stderr  # the stack says where it stood
    assert data_files(tmp_path / "dataset") == undisturbed


def test_a_worker_without_a_supervisor_that_hangs_ends_and_a_slow_one_does_not(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path
) -> None:
    hang = tmp_path / "hang"
    hang.touch()
    options = ["--stall_seconds", "8", "--num_captions_per_shard", str(NUM_CAPTIONS)]  # a shard of 10 seconds
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, *options)
    environment = light_environment(tmp_path / "light", LIGHT_HANG=str(hang), LIGHT_SECONDS="0.25")
    hung = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
    assert hung.returncode == 70, hung.stderr
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0


def test_a_worker_without_a_supervisor_that_always_fails_ends_while_others_live(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path
) -> None:
    root = tmp_path / "dataset"
    environment = light_environment(tmp_path / "light", LIGHT_BROKEN_DEVICE="cuda:7")
    freeze(many_captions, root, tiny_pipeline, environment)
    work_folder = WorkFolder(Store(root), Worker.of_this_process(), lease_seconds=60)
    work_folder.report({})  # a worker that lives elsewhere
    join = [*generate_command(many_captions, root, tiny_pipeline)[:3], "work", "--dataset", str(root)]
    join += ["--model", str(tiny_pipeline), "--device", "cuda:7"]
    joined = subprocess.run(join, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
    assert joined.returncode == 1
    (line,) = [line for line in joined.stderr.splitlines() if "error:" in line]
    assert "6 errors in a row before a sample was saved (shard 0000" in line
    assert "this accelerator fell off the bus" in line
    assert work_folder.list_set_aside() == {}


def freeze(captions: Path, root: Path, model: Path, environment: dict[str, str]) -> None:
    """Plans a dataset and makes nothing of it."""
    script = ["--slurm.submit", "false", "--slurm.script", str(root.parent / "script")]
    command = generate_command(captions, root, model, "--engine", "slurm", *script)
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 75


def test_every_verb_says_by_one_exit_code_that_captions_failed_or_shards_are_set_aside(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path
) -> None:
    for variable in ("LIGHT_FAILED", "LIGHT_BROKEN"):
        root = tmp_path / variable
        environment = light_environment(tmp_path / "light", **{variable: "caption 10"})
        generate = generate_command(many_captions, root, tiny_pipeline)
        work = [*generate[:3], "work", "--dataset", str(root), "--model", str(tiny_pipeline)]
        status = [*generate[:3], "status", "--dataset", str(root)]
        freeze(many_captions, root, tiny_pipeline, environment)
        codes = [subprocess.run(status, env=environment, capture_output=True).returncode]
        codes += [subprocess.run(work, env=environment, capture_output=True).returncode]
        environment["LIGHT_UNLOADED"] = "nothing is left to load it for"
        for command in (work, status, generate, [*generate, "--num_workers", "2"]):
            codes.append(subprocess.run(command, env=environment, capture_output=True).returncode)
        assert codes == [75, 1, 1, 1, 1, 1]


def test_workers_that_join_share_the_work(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path, undisturbed: dict[str, bytes]
) -> None:
    log, root = tmp_path / "log", tmp_path / "dataset"
    environment = light_environment(tmp_path / "light", LIGHT_LOG=str(log), LIGHT_SECONDS="0.05")
    command = generate_command(many_captions, root, tiny_pipeline)
    join = [*command[:3], "work", "--dataset", str(root), "--model", str(tiny_pipeline)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        while not log.exists():
            time.sleep(0.02)
            assert job.poll() is None
        joined = subprocess.run(join, env=environment, capture_output=True, text=True)
        assert joined.returncode == 0, joined.stderr
        job.communicate(timeout=MAX_SECONDS)
    assert job.returncode == 0
    assert data_files(root) == undisturbed
    assert sorted(log.read_text().splitlines()) == sorted(f"caption {index}" for index in range(NUM_CAPTIONS))


def test_status_tells_of_a_running_job(tmp_path: Path, many_captions: Path, tiny_pipeline: Path) -> None:
    root = tmp_path / "dataset"
    hold = tmp_path / "hold"
    hold.write_text("20")  # the first captions of the sixth shard of eleven
    environment = light_environment(tmp_path / "light", LIGHT_HOLD=str(hold))
    command = generate_command(many_captions, root, tiny_pipeline, "--num_workers", "2")
    ask = [*command[:3], "status", "--dataset", str(root), "--json"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as job:
        while not list(root.glob("*_stats.json")):
            time.sleep(0.1)
            assert job.poll() is None
        status: dict[str, Any] = {"images_per_second": 0.0, "workers": []}
        while not status["images_per_second"] or len(status["workers"]) < 2:  # they report once a second
            running = subprocess.run(ask, env=environment, capture_output=True, text=True)
            status = json.loads(running.stdout)
            assert job.poll() is None
        hold.unlink()
        job.wait(timeout=MAX_SECONDS)
    assert running.returncode == 75
    assert not status["is_finished"]
    assert 0 < status["num_shards_finished"] < status["num_shards"] == 11
    assert 8 <= status["num_images_ready"] < status["num_images"] == 2 * NUM_CAPTIONS
    assert len(status["workers"]) == 2
    assert status["images_per_second"] > 0
    finished = subprocess.run(ask, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0
    assert json.loads(finished.stdout)["num_captions_written"] == NUM_CAPTIONS


def test_workers_that_cannot_start_end_the_job_with_their_reason(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path
) -> None:
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, "--num_workers", "1")
    environment = light_environment(tmp_path / "light", LIGHT_UNLOADED="no such weights")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "6 workers in a row ended before they had saved a sample (exit code 1: error: no such weights)"
        in done.stderr
    )


def test_a_broken_place_is_given_up_and_sets_no_shard_aside(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path, undisturbed: dict[str, bytes]
) -> None:
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, "--num_workers", "2")
    failures = {"LIGHT_FAILURES": str(tmp_path / "failures"), "LIGHT_NUM_FAILURES": "4"}
    environment = light_environment(tmp_path / "light", LIGHT_BROKEN_PLACE="0", **failures)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "worker 0 died (exit code 70" in done.stderr
    assert "set aside" not in done.stderr
    assert data_files(tmp_path / "dataset") == undisturbed


def test_workers_end_with_the_job_that_started_them(
    tmp_path: Path, many_captions: Path, tiny_pipeline: Path, undisturbed: dict[str, bytes]
) -> None:
    command = generate_command(many_captions, tmp_path / "dataset", tiny_pipeline, "--num_workers", "2")
    log = tmp_path / "log"
    environment = light_environment(tmp_path / "light", LIGHT_SECONDS="0.2", LIGHT_LOG=str(log))
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as job:
        while not log.exists():
            time.sleep(0.05)
            assert job.poll() is None
        workers = children_of(job.pid)
        job.kill()
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_running, workers)))
    subprocess.run(command, env=light_environment(tmp_path / "light"), check=True, capture_output=True)
    assert data_files(tmp_path / "dataset") == undisturbed
