"""Workers on a Ray cluster: an actor for each, which Ray places where its resources are free.

An actor runs one worker process (`data_gen.job.engines.local`), so that a dead one is replaced where it was.
Ray starts the actors of a lost node on another one. Those that find no place stay asked for, which is what
has an autoscaler add nodes, and is said every minute.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.exit_codes import EXIT_DONE, EXIT_DONE_WITH_FAILURES, EXIT_FAILED, EXIT_UNFINISHED

if TYPE_CHECKING:
    from data_gen.job.worker import WorkConfig

_OBJECT_STORE_BYTES = 100 << 20
"""Of a cluster of our own: exit codes are all that passes through it."""

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_START = 30.0
"""Before workers are said not to have started."""
_SECONDS_TO_ANSWER = 5.0
_DONE = (EXIT_DONE, EXIT_DONE_WITH_FAILURES)


@dataclass(frozen=True)
class RayConfig:
    """Runs the workers on a Ray cluster.

    Args:
        address: Of the cluster, such as "auto", "host:6379" or "ray://host:10001"; None is what RAY_ADDRESS
            holds, or else a cluster of this machine, started for the job and ended with it.
        num_workers: Workers to ask for, >= 1; None is as many as the cluster has room for at the start.
        num_gpus_per_worker: Accelerators of a worker, >= 0, a part of one if < 1; None is 1 where the cluster
            has any at the start, and else 0.
        num_cpus_per_worker: CPU cores of a worker, >= 0; where the worker's num_threads is None, its threads.
        resources_per_worker: Further resources of a worker by Ray's names, such as {"TPU": 1}.
        max_retries: Times that a worker is started again after its node or its actor died, >= 0; -1 is for
            ever.
        runtime_env: Ray's settings for what the workers' machines need, such as {"working_dir": "."}.
        report_seconds: Seconds between two lines about workers that wait for a place, > 0.
        grace_seconds: Seconds that workers have to give back their shards once they are told to stop, >= 0.
    """

    address: str | None = None
    num_workers: int | None = None
    num_gpus_per_worker: float | None = None
    num_cpus_per_worker: float = 1.0
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    max_retries: int = -1
    runtime_env: dict[str, Any] = field(default_factory=dict)
    report_seconds: float = 60.0
    grace_seconds: float = 120.0

    def check(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A setting is out of its range.
        """
        at_least = {"num_cpus_per_worker": 0, "max_retries": -1, "grace_seconds": 0}
        optional = {"num_workers": 1, "num_gpus_per_worker": 0}
        at_least |= {name: bound for name, bound in optional.items() if getattr(self, name) is not None}
        for name, bound in at_least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        if not self.report_seconds > 0:
            raise ValueError(f"report_seconds must be > 0, got {self.report_seconds}")
        for name, amount in self.resources_per_worker.items():
            if name in ("CPU", "GPU"):
                raise ValueError(f"resources_per_worker must not hold {name}: it has a setting of its own")
            if not amount >= 0:
                raise ValueError(f"resources_per_worker.{name} must be >= 0, got {amount}")
        if not any([self.num_cpus_per_worker, self.num_gpus_per_worker, *self.resources_per_worker.values()]):
            raise ValueError("num_cpus_per_worker must be > 0 where a worker takes nothing else, got 0")


def run(
    config: RayConfig,
    work: "WorkConfig",
    on_event: Callable[[str], None],
    stop: threading.Event | None = None,
) -> list[int]:
    """Runs workers until the first of them finds nothing left to do; the others are then told to end.

    Args:
        config: The cluster and the workers' shares of it.
        work: What each worker is told; the dataset must be the same folder on every node, or a URL.
        on_event: Takes a line for the user.
        stop: Once it is set, the workers are told to give back their shards, as they are by Ctrl-C.

    Returns:
        The exit code of each worker; that of the one that was done first for those that it made superfluous.

    Raises:
        ValueError: A setting is out of its range.
        OSError: Ray is not installed, the cluster cannot be reached, that of this machine has no room, or
            every worker has failed.
    """
    config.check()
    ray = _import_ray()
    places = {name: _make_absolute(getattr(work, name)) for name in ("dataset", "model", "tiny_vae")}
    work = replace(work, **places)
    with _connected(ray, config) as can_grow:
        shares = _build_shares(ray, config)
        num_workers = config.num_workers or _count_places(ray, shares) or 1
        if not can_grow and not _count_places(ray, shares):
            raise OSError(
                f"a worker needs {_describe(shares)}; this machine has {_describe_cluster(ray, shares)}"
            )
        return _Crew(ray, config, shares, on_event).run(work, num_workers, stop or threading.Event())


def run_worker(
    work: "WorkConfig", stop: threading.Event, say: Callable[[str], None], grace_seconds: float
) -> int:
    """Runs one worker process where this is called, and others in its place if it dies; its exit code."""
    from data_gen.job.engines.local import run_local

    return run_local([work], stop, say, grace_seconds)[0]


class _Actor:
    """A worker's place on the cluster. Ray calls its methods in threads, and starts it again if it dies."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, runner: Callable[..., int], work: "WorkConfig", grace_seconds: float) -> int:
        return runner(work, self._stop, _print, grace_seconds)

    def stop(self) -> None:
        self._stop.set()

    def answer(self) -> None:
        """Says by its return that the actor has a place."""


def _print(line: str) -> None:
    """Ray passes on to the driver what its processes print."""
    print(line, flush=True)


@dataclass
class _Member:
    """A worker that was asked for, with the promises of its exit code and of its actor's answer."""

    actor: Any
    code: Any
    answer: Any


class _Crew:
    """The workers of a job."""

    def __init__(
        self, ray: Any, config: RayConfig, shares: dict[str, float], on_event: Callable[[str], None]
    ) -> None:
        self._ray, self._config, self._shares, self._on_event = ray, config, shares, on_event
        self._members: list[_Member] = []
        self._codes: dict[int, int] = {}
        self._last_failure = ""
        self._report_at = time.monotonic() + _SECONDS_TO_START
        self._num_waiting = 0

    def run(self, work: "WorkConfig", num_workers: int, stop: threading.Event) -> list[int]:
        """Sees the workers through to the end of the job; see the function `run`."""
        code_of_the_rest = EXIT_UNFINISHED
        try:
            self._members = [self._start(work) for _ in range(num_workers)]
            while len(self._codes) < num_workers and not stop.is_set():
                self._collect(_SECONDS_BETWEEN_LOOKS)
                done = [code for code in self._codes.values() if code in _DONE]
                if done:
                    code_of_the_rest = done[0]
                    break
                if time.monotonic() > self._report_at:
                    self._report()
        finally:
            self._dismiss()
        codes = [self._codes.get(index, code_of_the_rest) for index in range(num_workers)]
        if not stop.is_set() and all(code == EXIT_FAILED for code in codes):
            raise OSError(f"every worker failed ({self._last_failure})")
        return codes

    def _start(self, work: "WorkConfig") -> _Member:
        shares = dict(self._shares)
        actor = (
            self._ray.remote(_Actor)
            .options(
                num_cpus=shares.pop("CPU", 0),
                num_gpus=shares.pop("GPU", 0),
                resources=shares,
                max_restarts=self._config.max_retries,
                max_task_retries=self._config.max_retries,
                max_concurrency=3,  # its three methods
            )
            .remote()
        )
        code = actor.run.remote(run_worker, work, self._config.grace_seconds)
        return _Member(actor, code, actor.answer.remote())

    def _collect(self, seconds: float) -> None:
        """Takes the exit codes that come within this time."""
        running = self._running()
        codes = [member.code for member in running.values()]
        ended, _ = self._ray.wait(codes, num_returns=1, timeout=seconds)
        for index, member in running.items():
            if member.code in ended:
                self._codes[index] = code = self._get_code(index, member)
                if code not in _DONE:
                    self._ray.kill(member.actor)  # its place is free for one that waits

    def _get_code(self, index: int, member: _Member) -> int:
        try:
            return int(self._ray.get(member.code))
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(getattr(error, "cause", None) or error).split())
            self._on_event(f"worker {index}: {reason}")
            self._last_failure = reason
            return EXIT_FAILED

    def _running(self) -> dict[int, _Member]:
        return {index: member for index, member in enumerate(self._members) if index not in self._codes}

    def _report(self) -> None:
        """Says how many workers have no place, and when all have one again."""
        running, cluster = self._running(), _describe_cluster(self._ray, self._shares)
        num_waiting = len(running) - len(self._find_placed(running))
        if num_waiting:
            self._on_event(
                f"{num_waiting} of {len(running)} workers have not started: each needs "
                f"{_describe(self._shares)}; the cluster has {cluster}"
            )
        elif self._num_waiting:
            self._on_event("every worker has started")
        self._num_waiting = num_waiting
        self._report_at = time.monotonic() + self._config.report_seconds

    def _find_placed(self, members: dict[int, _Member]) -> list[_Member]:
        """The workers whose actors answer."""
        answers = [member.answer for member in members.values()]
        given, _ = self._ray.wait(answers, num_returns=len(answers), timeout=_SECONDS_TO_ANSWER)
        placed = [member for member in members.values() if member.answer in given]
        for member in placed:  # asked anew each time, as its node may be lost later
            member.answer = member.actor.answer.remote()
        return placed

    def _dismiss(self) -> None:
        """Tells the workers that still run to give back, waits for them, and ends every actor."""
        running = self._running()
        placed = self._find_placed(running) if running else []
        for member in running.values():
            if member in placed:
                member.actor.stop.remote()
            else:
                self._ray.kill(member.actor)
        if codes := [member.code for member in placed]:
            seconds = self._config.grace_seconds + _SECONDS_TO_ANSWER  # past which actors kill their workers
            self._ray.wait(codes, num_returns=len(codes), timeout=seconds)
        for member in self._members:
            self._ray.kill(member.actor)


@contextmanager
def _connected(ray: Any, config: RayConfig) -> Iterator[bool]:
    """Connects to the cluster, or starts one of this machine that ends with the job; whether it may grow."""
    if ray.is_initialized():
        yield True
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"address": address, "runtime_env": config.runtime_env or None}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: last in line on a shared machine
        settings |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(f"address {address}: there is no Ray cluster to be reached: {reason}") from error
    try:
        if on_term not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)  # Ray sets its own, which ends the process
        yield address != "local"
    finally:
        ray.shutdown()


def _build_shares(ray: Any, config: RayConfig) -> dict[str, float]:
    """What a worker takes of the cluster, by Ray's names."""
    num_gpus = config.num_gpus_per_worker
    if num_gpus is None:
        num_gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    shares = {"CPU": config.num_cpus_per_worker, "GPU": num_gpus, **config.resources_per_worker}
    return {name: amount for name, amount in shares.items() if amount}


def _count_places(ray: Any, shares: dict[str, float]) -> int:
    """Workers that the nodes of this moment have room for, were they empty."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) / amount) for name, amount in shares.items()) for node in nodes)


def _describe(shares: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in shares.items())


def _describe_cluster(ray: Any, shares: dict[str, float]) -> str:
    """What the cluster has of what a worker needs."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"{total[name]:g} {name} ({free.get(name, 0):g} free)" if total.get(name) else f"no {name}"
        for name in shares
    )


def _make_absolute(place: str | None) -> Any:
    """A path that is there, as the workers need it, which run in other folders; URLs and names stay."""
    return str(Path(place).absolute()) if place and "://" not in place and Path(place).exists() else place


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OSError(f"ray is not installed: pip install 'stablerep[ray]' ({error})") from error
    return ray
