"""`stablerep work`: one worker of a generation job, which claims a shard, makes it, and takes the next.

Every engine starts workers, and nothing else; more of them may join at any time from anywhere, by the
dataset's folder or URL alone. They agree through files: claims that save double work, and shards of which the
first one published stays.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from data_gen.card import write_card
from data_gen.models import GeneratorConfig, find_model, generator_config_from
from data_gen.plan import Plan
from data_gen.shard_job import GivenBackError, Progress, run_shard
from data_gen.shards import ShardError, list_complete_shards, read_manifest, to_json
from data_gen.storage import Store
from data_gen.work_folder import Worker, WorkFolder

if TYPE_CHECKING:
    from data_gen.generator import DiffusionGenerator

EXIT_DONE, EXIT_ERROR, EXIT_SET_ASIDE, EXIT_SHARD_FAILED, EXIT_UNFINISHED = 0, 1, 3, 70, 75
"""Every shard is there; an error; all but those set aside are; an error within a shard; told to stop."""

SUPERVISOR_VARIABLE = "STABLEREP_SUPERVISOR_PID"
"""Environment variable with the process that a worker is to end with."""

_SECONDS_BETWEEN_LISTINGS = 60.0
_LISTING_SHARE = 0.05
"""Share of the time that listing the dataset may take."""
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_REPORTS = {True: 1.0, False: 10.0}
"""On a local disk, in an object store."""


@dataclass(frozen=True)
class WorkConfig:
    """Joins the job of a dataset, whose plan `stablerep generate` has frozen, as one worker.

    Args:
        dataset: Folder or URL of the dataset.
        model: Where its model is on this machine (a folder or a hub id); None takes the name in the plan.
        tiny_vae: Where the plan's tiny VAE is on this machine; None takes the name in the plan.
        device: Where it runs, such as "cpu" or "cuda:1"; "auto" is the accelerator where there is one.
        num_threads: Threads of the CPU that compute; None takes torch's own number. Images are bit-equal for
            equal numbers alone.
        spill_seconds: Time between two spills of finished samples, at most what is lost when it is killed.
        lease_seconds: Time after which a claim that was not renewed is void; it matters for workers of other
            machines alone.
        trust_remote_code: Allow a model that brings its own code.
        allow_pickle: Allow weights without a safetensors file.
    """

    dataset: str
    model: str | None = None
    tiny_vae: str | None = None
    device: str = "auto"
    num_threads: int | None = None
    spill_seconds: float = 60.0
    lease_seconds: float = 300.0
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def check(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A setting is out of its range.
        """
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be >= 1, got {self.num_threads}")
        for name in ("spill_seconds", "lease_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0 seconds, got {getattr(self, name)}")


def run(config: WorkConfig) -> int:
    """Makes shards until none is left.

    Returns:
        0 if every shard is there, 3 if all but those set aside are, 75 if it was told to stop by a signal.

    Raises:
        FileNotFoundError: There is no such dataset, or no such model.
        ValueError: The model is not the plan's.
        OSError: The dataset cannot be read or written.
    """
    config.check()
    plan = Plan.read(Store(config.dataset))
    plan.store.remove_stale_temporaries()
    stop = threading.Event()
    is_supervised = _stop_with_supervisor(stop)
    with stopping_on(stop, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
        return work(plan, config, stop, is_supervised)


class ShardFailedError(RuntimeError):
    """An error in the midst of a shard, which is noted as the death of a worker there."""


def work(plan: Plan, config: WorkConfig, stop: threading.Event, is_supervised: bool = False) -> int:
    """Makes shards of the plan until none is left or `stop` is set; see `run`.

    An error within a shard ends a supervised worker, for another process to take its place; one without a
    supervisor loads its model anew.
    """
    work_folder = WorkFolder(plan.store, Worker.of_this_process(), config.lease_seconds)
    maker = _ShardMaker(plan, config, work_folder, stop)
    queue = _Queue(plan, work_folder)
    with _reporting(work_folder, maker.progress, config, plan.store.is_local):
        while not stop.is_set():
            if queue.has_pending:  # before a claim, which would be void if the model does not load
                maker.load_model()
            shard_index = queue.next()
            if shard_index is not None:
                try:
                    maker.make(shard_index)
                except ShardFailedError as error:
                    if is_supervised:
                        raise
                    say(str(error))
            elif queue.has_pending:
                stop.wait(_SECONDS_BETWEEN_LOOKS)
            else:
                break
    if stop.is_set():
        return EXIT_UNFINISHED
    _check_plan_stands(plan)
    _describe(plan, work_folder)
    return EXIT_SET_ASIDE if work_folder.list_set_aside() else EXIT_DONE


class _ShardMaker:
    """Makes claimed shards with the plan's model, which is loaded once."""

    def __init__(
        self, plan: Plan, config: WorkConfig, work_folder: WorkFolder, stop: threading.Event
    ) -> None:
        self._plan, self._config, self._work_folder, self._stop = plan, config, work_folder, stop
        self._generator: DiffusionGenerator | None = None
        self._known_fingerprints: set[str] = set()
        self.progress = Progress()

    def make(self, shard_index: int) -> None:
        """Makes a shard that this worker has claimed, and gives the claim back whatever happens.

        Raises:
            ShardFailedError: Something in the shard itself went wrong.
        """
        name = self._plan.manifest.shard_name(shard_index)
        self.progress.begin(name)
        try:
            run_shard(
                self._plan,
                shard_index,
                self.load_model,
                self._work_folder,
                progress=self.progress,
                stop=self._stop,
                spill_seconds=self._config.spill_seconds,
                before_writing=self._prepare_writing,
                say=say,
            )
            self.progress.num_shards_made += 1
        except GivenBackError:
            pass
        except (OSError, ShardError):  # the dataset's fault or the disk's, not this shard's
            raise
        except Exception as error:
            self._generator = None  # whatever broke may be in it
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            worker = self._work_folder.worker
            self._work_folder.record_death(name, reason, f"{worker.name}/{uuid.uuid4().hex}", worker.place)
            raise ShardFailedError(f"shard {name}: {reason}") from error
        finally:
            self.progress.end()
            with contextlib.suppress(OSError):
                self._work_folder.release(name)

    def load_model(self) -> "DiffusionGenerator":
        """The loaded model."""
        if self._generator is None:
            self._generator = load_generator(self._plan, self._config)
            _compare_fingerprints(self._plan, self._generator.fingerprint())
        return self._generator

    def _prepare_writing(self) -> None:
        """Makes sure that the plan stands, and that the fingerprints which images carry are spelt out."""
        _check_plan_stands(self._plan)
        for identity, fingerprint in (self._generator.fingerprints if self._generator else {}).items():
            if identity not in self._known_fingerprints:
                content = (to_json(fingerprint) + "\n").encode()
                self._plan.store.publish(f"fingerprints/{identity}.json", content)
                self._known_fingerprints.add(identity)


class _Queue:
    """The shards that are still to be made.

    A single worker takes them in order. Among many, each takes one of the next few that nobody had claimed
    when it last looked, so that they seldom meet.
    """

    def __init__(self, plan: Plan, work_folder: WorkFolder) -> None:
        self._plan, self._work_folder = plan, work_folder
        self._random = random.Random(work_folder.worker.name)
        self._pending: list[int] = []
        self._claimed: set[str] = set()
        self._list()

    @property
    def has_pending(self) -> bool:
        """Whether shards are left, free ones or those that others have claimed."""
        return bool(self._pending)

    def next(self) -> int | None:
        """Claims a shard; None where none is free."""
        if time.monotonic() > self._list_again_at:
            self._list()
        for index in self._order():
            name = self._plan.manifest.shard_name(index)
            if self._plan.store.exists(f"{name}_stats.json") or self._work_folder.is_set_aside(name):
                self._pending.remove(index)
            elif self._work_folder.claim(name):
                if not self._plan.store.exists(f"{name}_stats.json"):  # or published and released just now
                    return index
                self._work_folder.release(name)
            else:
                self._claimed.add(name)
        return None

    def _order(self) -> list[int]:
        names = {index: self._plan.manifest.shard_name(index) for index in self._pending}
        free = [index for index in self._pending if names[index] not in self._claimed]
        head, tail = free[: 2 * len(self._claimed)], free[2 * len(self._claimed) :]
        self._random.shuffle(head)
        return [*head, *tail, *(index for index in self._pending if names[index] in self._claimed)]

    def _list(self) -> None:
        start = time.monotonic()
        finished = {name for name in self._plan.store.list() if name.endswith("_stats.json")}
        self._pending = [
            index for index, name in enumerate(self._plan.shard_names) if f"{name}_stats.json" not in finished
        ]
        self._claimed = self._work_folder.list_claims()
        seconds = time.monotonic() - start
        self._list_again_at = time.monotonic() + max(_SECONDS_BETWEEN_LISTINGS, seconds / _LISTING_SHARE)


def load_generator(plan: Plan, config: WorkConfig) -> "DiffusionGenerator":
    """Loads the plan's model on this machine.

    Raises:
        OSError: It cannot be loaded.
        ValueError: It is not the model of the plan.
    """
    _set_num_threads(config.num_threads)
    from data_gen.generator import DiffusionGenerator

    settings = plan.manifest.settings
    generator_config = build_generator_config(plan, config)
    model = find_model(generator_config)
    planned = settings["generator"]["model_identity"]
    if model.identity != planned:
        raise ValueError(f"model {model.name} is {model.identity}, and the plan's is {planned}")
    return DiffusionGenerator(generator_config, model, settings["num_images_per_batch"])


def _set_num_threads(num_threads: int | None) -> None:
    """Sets the threads of the CPU's operations, before or after torch is imported."""
    if num_threads is not None:
        os.environ |= {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(num_threads)


def build_generator_config(plan: Plan, config: WorkConfig) -> GeneratorConfig:
    """The plan's sampling, with what this machine and this worker add."""
    settings = plan.manifest.settings["generator"]
    identity = str(settings["model_identity"]).split()[-1]
    return dataclasses.replace(
        generator_config_from(settings),
        model=config.model or settings["model"],
        tiny_vae=config.tiny_vae or settings["tiny_vae"],
        revision=identity.removeprefix("commit:") if identity.startswith("commit:") else None,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )


def _compare_fingerprints(plan: Plan, here: dict[str, Any]) -> None:
    planned = plan.manifest.fingerprint
    for name in sorted(planned.keys() | here.keys()) if planned else ():
        before, now = planned.get(name), here.get(name)
        if before != now:
            say(f"{name} was {before!r} and is {now!r}: new images are not bit-equal to the old")


def _check_plan_stands(plan: Plan) -> None:
    """Raises ShardError if the dataset was given another plan since this worker began."""
    if read_manifest(plan.store).settings_hash != plan.manifest.settings_hash:
        raise ShardError(f"{plan.store.url}: its plan was changed while this worker ran; start it again")


def _describe(plan: Plan, work_folder: WorkFolder) -> None:
    """Writes the card of a dataset that has none: the last worker does."""
    if not plan.store.exists("README.md") and work_folder.claim("card"):
        try:
            write_card(plan.store, plan.manifest, list_complete_shards(plan.store))
        finally:
            work_folder.release("card")


@contextmanager
def _reporting(
    work_folder: WorkFolder, progress: Progress, config: WorkConfig, is_local: bool
) -> Iterator[None]:
    """Says in the background what this worker does, and prolongs its claim."""
    seconds = min(_SECONDS_BETWEEN_REPORTS[is_local], config.lease_seconds / 4)
    start, done = time.time(), threading.Event()

    def report() -> None:
        with contextlib.suppress(OSError):  # a full disk is told of by what needs it
            work_folder.report({"device": config.device, "started": start, **progress.to_dict()})

    def repeat() -> None:
        renew_at = 0.0
        while True:
            report()
            if time.monotonic() >= renew_at:
                with contextlib.suppress(OSError):
                    work_folder.renew()
                renew_at = time.monotonic() + config.lease_seconds / 4
            if done.wait(seconds):
                return

    thread = threading.Thread(target=repeat, name="report", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        done.set()
        thread.join()
        report()  # the last word, for whoever starts another in its place
        raise
    done.set()
    thread.join()
    with contextlib.suppress(OSError):
        work_folder.withdraw_report()
        work_folder.finish()


@contextmanager
def stopping_on(stop: threading.Event, signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Sets `stop` at each of these signals that is not ignored; a second Ctrl-C interrupts as ever.

    Clusters send several in a row: none but a person's is to cut off the batch that is being finished.
    """
    before = {number: signal.getsignal(number) for number in signals}

    def give_back(name: str) -> None:
        if not stop.is_set():
            stop.set()
            say(f"{name}: giving back the shard in the making")

    def handle(number: int, frame: FrameType | None) -> None:
        # An event's lock may be held by the very call that the signal interrupts, so another thread sets it.
        threading.Thread(target=give_back, args=(signal.Signals(number).name,), daemon=True).start()
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    installed = [number for number, action in before.items() if action is not signal.SIG_IGN]
    for number in installed:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in installed:
            signal.signal(number, before[number])


def _stop_with_supervisor(stop: threading.Event) -> bool:
    """Sets `stop` when the process that started this worker is no more; whether one said that it did."""
    supervisor = os.environ.pop(SUPERVISOR_VARIABLE, None)

    def watch() -> None:
        while os.getppid() == int(supervisor or 0):
            time.sleep(1.0)
        stop.set()

    if supervisor is not None:
        threading.Thread(target=watch, name="supervisor", daemon=True).start()
    return supervisor is not None


def say(message: str) -> None:
    """A line for the user, if anyone still listens."""
    with contextlib.suppress(OSError):
        print(f"stablerep generate: {message}", file=sys.stderr, flush=True)


def main(argument: str) -> int:
    """Runs the worker that engines start: `python -m data_gen.worker '{"dataset": …}'`."""
    config = WorkConfig(**json.loads(argument))
    try:
        return run(config)
    except ShardFailedError:
        traceback.print_exc()
        return EXIT_SHARD_FAILED
    except (OSError, ValueError) as error:
        say(f"error: {_describe_error(error, config.dataset)}")
        return EXIT_ERROR


def _describe_error(error: Exception, dataset: str) -> str:
    """One line; errors of the system name their file, or the dataset where they do not know it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or dataset}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
