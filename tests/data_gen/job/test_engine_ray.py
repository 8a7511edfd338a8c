"""The Ray engine on real clusters of this machine, each in a process of its own; stand-ins do the work."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_gen.job.engines import local, ray_cluster
from data_gen.job.engines.ray_cluster import RayConfig, run
from data_gen.job.supervision import stopping_on
from data_gen.job.worker import WorkConfig
from tests.processes import MAX_SECONDS, find_free_ports, is_running, wait_until

ROOT = Path(__file__).parents[3]
NUM_SHARDS = 6
OBJECT_STORE_BYTES = 100 << 20
ALL_SHARDS = {f"shard-{index}" for index in range(NUM_SHARDS)}
CROWDED = (
    "2 of 4 workers have not started: each needs 1 CPU, 1 GPU; the cluster has 2 CPU (0 free), 2 GPU (0 free)"
)


# The stand-in for a worker, which makes files instead of images. It runs in the actor's process.


def make_files(
    work: WorkConfig, stop: threading.Event, say: Callable[[str], None], grace_seconds: float
) -> int:
    """Claims and makes shards; files that the test puts beside them have it die, wait or fail in one."""
    folder = Path(work.dataset)
    write_event(folder, "start", grace_seconds=grace_seconds)
    if (folder / "broken").exists():
        raise OSError("6 workers in a row\nended")
    while pending := ALL_SHARDS - list_made(folder):
        name = next((name for name in sorted(pending) if claim(folder, name)), None)
        if name is None:
            time.sleep(0.05)
            continue
        try:
            if take_away(folder / "die"):
                os.kill(os.getpid(), signal.SIGKILL)
            while (folder / "hold").exists() and not stop.is_set():
                if take_away(folder / "fail"):
                    raise OSError("the disk\nis full")
                time.sleep(0.05)
            time.sleep(0.2)
            if stop.is_set():
                write_event(folder, "gave back")
                return 75
            (folder / name).touch()
        finally:
            (folder / f"claim-of-{name}").unlink()
    say("nothing is left")
    return 0


def claim(folder: Path, name: str) -> bool:
    """Takes a shard of which nobody living has the claim."""
    path = folder / f"claim-of-{name}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if is_running(int(path.read_text())):
                return False
        path.write_text(str(os.getpid()))
        return True


def list_made(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("shard-*")}


def take_away(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def write_event(folder: Path, name: str, **more: Any) -> None:
    event = {
        "event": name,
        "pid": os.getpid(),
        "niceness": os.nice(0),
        "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"),
        **more,
    }
    with (folder / "events").open("a") as file:
        file.write(json.dumps(event) + "\n")


def read_events(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "events"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in events if event["event"] == name]


# What the processes with the clusters do. Each returns what its tests look at.


def on_a_growing_cluster(root: Path) -> dict[str, Any]:
    """Jobs on a cluster that has no accelerator at first, and an autoscaler that may add a node of two."""
    import ray

    ray_cluster._SECONDS_TO_START, ray_cluster._SECONDS_TO_ANSWER = 0.0, 1.0  # before a node can come
    with autoscaling_cluster(root) as address:
        results: dict[str, Any] = {}
        for scenario in (killed, crowded, impossible, broken):
            folder = root / scenario.__name__
            folder.mkdir()
            messages: list[str] = []
            codes = scenario(RayConfig(address=address, report_seconds=2.0), str(folder), messages)
            results[scenario.__name__] = {"codes": codes, "messages": messages}
        ray.init(address=address)
        results["num_nodes"] = len([node for node in ray.nodes() if node["Alive"]])
        ray.shutdown()
        return results


@contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """A head without resources, and Ray's autoscaler with nodes that are processes of this machine."""
    from ray.util import get_node_ip_address

    port, client_port = find_free_ports(2)
    address = f"{get_node_ip_address()}:{port}"
    config = folder / "cluster.json"
    config.write_text(json.dumps(build_cluster_config(address)))
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--num-cpus=0",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        "--dashboard-agent-listen-port=0",
        "--include-dashboard=false",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--autoscaling-config={config}",
    ]
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_worker_niceness": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with (folder / "head").open("w+") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while "block" not in (folder / "head").read_text():
                assert head.poll() is None, (folder / "head").read_text()
                time.sleep(0.2)
            yield address
        finally:
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # its group is killed in the end
                head.wait(timeout=60)


def build_cluster_config(address: str) -> dict[str, Any]:
    node_types = {
        "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
        "accelerators": {
            "resources": {"CPU": 2, "GPU": 2, "object_store_memory": OBJECT_STORE_BYTES},
            "node_config": {},
            "max_workers": 1,
        },
    }
    provider = {
        "type": "fake_multinode",
        "gcs_address": address,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    return {
        "cluster_name": "test",
        "max_workers": 1,
        "provider": provider,
        "auth": {},
        "available_node_types": node_types,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 10,
        "file_mounts": {},  # it must hold the keys from here on, which are of real machines
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def killed(config: RayConfig, dataset: str, messages: list[str]) -> list[int]:
    Path(dataset, "die").touch()
    hold_until_started(dataset, 3)
    config = replace(config, num_workers=2, num_gpus_per_worker=1, grace_seconds=200.0)
    return run(config, WorkConfig(dataset=dataset), messages.append)


def crowded(config: RayConfig, dataset: str, messages: list[str]) -> list[int]:
    def take(message: str) -> None:
        if message == CROWDED and message not in messages:
            Path(dataset, "fail").touch()
        messages.append(message)

    hold_until_started(dataset, 3)
    return run(replace(config, num_workers=4), WorkConfig(dataset=dataset), take)


def hold_until_started(dataset: str, num_starts: int) -> None:
    """Holds workers in their first shards until so many have started, one of them in the place of another."""
    (Path(dataset) / "hold").touch()

    def watch() -> None:
        while len(read_events(Path(dataset), "start")) < num_starts:
            time.sleep(0.1)
        (Path(dataset) / "hold").unlink()

    threading.Thread(target=watch).start()


def impossible(config: RayConfig, dataset: str, messages: list[str]) -> list[int]:
    stop = threading.Event()

    def take(message: str) -> None:
        messages.append(message)
        stop.set()

    return run(replace(config, num_gpus_per_worker=3), WorkConfig(dataset=dataset), take, stop)


def broken(config: RayConfig, dataset: str, messages: list[str]) -> str:
    Path(dataset, "broken").touch()
    try:
        return f"no error, but {run(replace(config, num_workers=2), WorkConfig(dataset=dataset), print)}"
    except OSError as error:
        return str(error)


def on_a_cluster_of_its_own(root: Path) -> dict[str, Any]:
    """A job whose workers hold on until the test sends a signal."""
    import ray

    config, stop = RayConfig(num_workers=2, num_cpus_per_worker=0.5), threading.Event()
    codes = None
    with stopping_on(stop, [signal.SIGTERM]), contextlib.suppress(KeyboardInterrupt):
        codes = run(config, WorkConfig(dataset=str(root)), print, stop)
    return {"codes": codes, "is_connected": ray.is_initialized()}


def generate(root: Path) -> int:
    """A job from end to end."""
    from stablerep.cli import main

    return main(["generate", "--config", str(root / "config.yaml")])


def drive(name: str, root: str) -> None:
    """What the process with a cluster runs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from birth
    if name != "generate":
        ray_cluster.run_worker = make_files
    (Path(root) / "result").write_text(json.dumps(globals()[name](Path(root))))


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of the processes with clusters: a cluster is many of Python, which share the bytecode of Ray here."""
    with tempfile.TemporaryDirectory() as folder:
        removed = ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS")
        kept = {name: value for name, value in os.environ.items() if name not in removed}
        yield kept | {
            "PYTHONPYCACHEPREFIX": folder,
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # which would leave a token in the home folder
        }


@contextmanager
def driven(name: str, root: Path, environment: Mapping[str, str]) -> "Iterator[subprocess.Popen[bytes]]":
    """A process with a cluster, in the background; both are gone in the end."""
    call = f"from tests.data_gen.job.test_engine_ray import drive; drive({name!r}, {str(root)!r})"
    with (root / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", call],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_result(process: "subprocess.Popen[bytes]", root: Path) -> Any:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2 * MAX_SECONDS)
    assert process.returncode == 0, (root / "output").read_text()
    return json.loads((root / "result").read_text())


@pytest.fixture(scope="module")
def results(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("ray")
    root = tmp_path_factory.mktemp("growing")
    with driven("on_a_growing_cluster", root, environment) as process:
        return root, read_result(process, root)


def test_workers_have_accelerators_added_one_for_each_and_a_killed_one_is_started_again(
    results: tuple[Path, dict[str, Any]],
) -> None:
    root, result = results[0] / "killed", results[1]["killed"]
    assert result["codes"] == [0, 0]
    assert result["messages"][0] == (
        "2 of 2 workers have not started: each needs 1 CPU, 1 GPU; the cluster has no CPU, no GPU"
    )
    assert list_made(root) == ALL_SHARDS
    starts = read_events(root, "start")
    assert {event["cuda"] for event in starts} == {"0", "1"}
    assert len({event["pid"] for event in starts}) == 3
    assert {event["grace_seconds"] for event in starts} == {200.0}


def test_workers_without_a_place_are_told_of_and_take_the_place_of_those_that_fail(
    results: tuple[Path, dict[str, Any]],
) -> None:
    root, result = results[0] / "crowded", results[1]["crowded"]
    assert list_made(root) == ALL_SHARDS
    assert len(read_events(root, "start")) >= 3  # the fourth too, if it found a place in the very end
    assert sorted(result["codes"]) == [0, 0, 0, 1]
    assert CROWDED in result["messages"]
    assert f"worker {result['codes'].index(1)}: the disk is full" in result["messages"]


def test_a_place_that_the_cluster_lacks_is_named(results: tuple[Path, dict[str, Any]]) -> None:
    root, result = results[0] / "impossible", results[1]["impossible"]
    assert result["codes"] == [75]
    (message,) = result["messages"]
    assert re.fullmatch(  # Ray may not know yet that the workers before have gone
        r"1 of 1 workers have not started: each needs 1 CPU, 3 GPU; "
        r"the cluster has 2 CPU \(\d free\), 2 GPU \(\d free\)",
        message,
    )
    assert read_events(root, "start") == []


def test_a_job_whose_workers_all_fail_ends_with_the_last_reason(
    results: tuple[Path, dict[str, Any]],
) -> None:
    assert results[1]["broken"]["codes"] == "every worker failed (6 workers in a row ended)"


def test_the_cluster_of_another_is_left_as_it_is(results: tuple[Path, dict[str, Any]]) -> None:
    assert results[1]["num_nodes"] == 2


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, None), (signal.SIGTERM, [75, 75])])
def test_a_signal_has_workers_give_back_and_ends_a_cluster_of_its_own(
    number: signal.Signals, codes: list[int] | None, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    (tmp_path / "hold").touch()
    with driven("on_a_cluster_of_its_own", tmp_path, environment) as process:
        while len(read_events(tmp_path, "start")) < 2:
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert read_result(process, tmp_path) == {"codes": codes, "is_connected": False}
    assert len(read_events(tmp_path, "gave back")) == 2
    events = read_events(tmp_path, "start")
    assert [event["niceness"] for event in events] == [os.nice(0)] * 2
    # Ray ends them, and does not wait for it.
    wait_until(lambda: not any(is_running(event["pid"]) for event in events), lambda: str(events))


@pytest.mark.e2e
def test_a_cluster_makes_the_dataset_that_one_process_makes(
    environment: dict[str, str],
    tiny_pipeline: Path,
    captions_file: Path,
    finished_dataset: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray")
    settings = {
        "engine": "ray",
        "ray": {"num_workers": 1},
        "num_threads_per_worker": 1,
        "captions": str(captions_file),
        "output": str(tmp_path / "dataset"),
        "generator": {"model": str(tiny_pipeline), "num_inference_steps": 2, "device": "cpu"},
        "num_images_per_caption": 3,
        "num_captions_per_shard": 2,
        "num_images_per_batch": 4,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    with driven("generate", tmp_path, environment) as process:
        assert read_result(process, tmp_path) == 0
    for path in sorted(finished_dataset.glob("*.tar")):
        assert (tmp_path / "dataset" / path.name).read_bytes() == path.read_bytes()


# Without a cluster


def test_the_worker_of_an_actor_has_the_time_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run_local(*args: Any) -> list[int]:
        given.append(args[3])
        return [0]

    monkeypatch.setattr(local, "run_local", run_local)
    assert ray_cluster.run_worker(WorkConfig(dataset="dataset"), threading.Event(), print, 300.0) == 0
    assert given == [300.0]


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OSError, match=r"ray is not installed: pip install 'stablerep\[ray\]'"):
        run(RayConfig(), WorkConfig(dataset="dataset"), print)


class FakeRay:
    """Ray as far as the engine asks it before it starts anything."""

    def __init__(self, nodes: list[dict[str, float]], error: Exception | None = None) -> None:
        self._nodes, self._error = nodes, error
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str, **settings: Any) -> None:
        self.calls.append(f"init {address}")
        if self._error:
            raise self._error

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": resources} for resources in self._nodes]

    def cluster_resources(self) -> dict[str, float]:
        return {name: sum(node.get(name, 0) for node in self._nodes) for node in self._nodes for name in node}

    available_resources = cluster_resources


def test_a_machine_without_room_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay([{"CPU": 2}])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    config = RayConfig(num_gpus_per_worker=1)
    with pytest.raises(
        OSError, match=r"a worker needs 1 CPU, 1 GPU; this machine has 2 CPU \(2 free\), no GPU"
    ):
        run(config, WorkConfig(dataset="dataset"), print)
    assert ray.calls == ["init local", "shutdown"]


def test_workers_in_other_folders_find_what_is_named_by_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[WorkConfig] = []

    def note(_: Any, work: WorkConfig, *__: Any) -> list[int]:
        told.append(work)
        return [0]

    monkeypatch.chdir(tmp_path)
    for name in ("dataset", "sd", "taesd"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", FakeRay([{"CPU": 2}]))
    monkeypatch.setattr("data_gen.job.engines.ray_cluster._Crew.run", note)
    run(RayConfig(), WorkConfig("dataset", model="sd", tiny_vae="taesd"), print)
    run(RayConfig(), WorkConfig("s3://bucket/dataset", model="owner/sd", tiny_vae="owner/taesd"), print)
    places = [(work.dataset, work.model, work.tiny_vae) for work in told]
    assert places[0] == tuple(str(tmp_path / name) for name in ("dataset", "sd", "taesd"))
    assert places[1] == ("s3://bucket/dataset", "owner/sd", "owner/taesd")


def test_a_cluster_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay([], ConnectionError("no route\nmore"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(OSError, match=r"address head:6379: there is no Ray cluster .* no route$"):
        run(RayConfig(), WorkConfig(dataset="dataset"), print)


@pytest.mark.parametrize(
    ("nodes", "shares", "num_places"),
    [
        ([{"CPU": 8, "GPU": 4}, {"CPU": 2, "GPU": 4}], {"CPU": 1, "GPU": 1}, 6),
        ([{"CPU": 8}, {"CPU": 7}], {"CPU": 4}, 3),
        ([{"CPU": 8, "GPU": 1}], {"CPU": 1, "GPU": 0.5}, 2),
        ([{"CPU": 8}], {"CPU": 1, "TPU": 1}, 0),
    ],
)
def test_places_are_counted_node_by_node(
    nodes: list[dict[str, float]], shares: dict[str, float], num_places: int
) -> None:
    assert ray_cluster._count_places(FakeRay(nodes), shares) == num_places


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 0}, "num_workers must be >= 1, got 0"),
        ({"num_gpus_per_worker": -1}, "num_gpus_per_worker must be >= 0, got -1"),
        ({"num_cpus_per_worker": -1}, "num_cpus_per_worker must be >= 0, got -1"),
        ({"num_cpus_per_worker": 0}, "num_cpus_per_worker must be > 0 where a worker takes nothing else"),
        ({"max_retries": -2}, "max_retries must be >= -1, got -2"),
        ({"report_seconds": 0}, "report_seconds must be > 0, got 0"),
        ({"grace_seconds": -1}, "grace_seconds must be >= 0, got -1"),
        ({"resources_per_worker": {"GPU": 1}}, "resources_per_worker must not hold GPU"),
        ({"resources_per_worker": {"TPU": -1}}, "resources_per_worker.TPU must be >= 0, got -1"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(RayConfig(**changes), WorkConfig(dataset="dataset"), print)
