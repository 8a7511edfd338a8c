"""`stablerep work`: one worker of a generation job, which claims a shard, makes it, and takes the next.

Every engine starts workers, and nothing else; more of them may join at any time from anywhere, by the
dataset's folder or URL alone. They agree through files: claims that save double work, and shards of which the
first one published stays.
"""

import contextlib
import dataclasses
import faulthandler
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
from data_gen.croissant import CHECKSUMS_NAME
from data_gen.diffusion.fidelity import (
    FIDELITY_NAME,
    UnmeasuredError,
    is_fidelity_due,
    measure_plan,
    write_fidelity,
)
from data_gen.diffusion.models import GeneratorConfig, ModelFiles, find_model, generator_config_from
from data_gen.exit_codes import (
    EXIT_DONE,
    EXIT_DONE_WITH_FAILURES,
    EXIT_FAILED,
    EXIT_SHARD_FAILED,
    EXIT_UNFINISHED,
)
from data_gen.job.plan import Plan
from data_gen.job.shard_job import GivenBackError, Progress, run_shard
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.shards import ShardError, list_complete_shards, read_manifest, to_json
from data_gen.storage import Store

if TYPE_CHECKING:
    from data_gen.diffusion.generator import DiffusionGenerator

SUPERVISOR_VARIABLE = "STABLEREP_SUPERVISOR_PID"
"""Environment variable with the process that a worker is to end with."""

MAX_FRUITLESS_RUNS = 6
"""Workers of a place, or errors of one without a supervisor, that may follow each other and save nothing."""

STALL_SECONDS = 1800.0
"""The limit of `WorkConfig.stall_seconds` on an accelerator where none is set."""

_FIDELITY = "fidelity"
"""What is claimed, like a shard, by the worker that measures."""
_MAX_FIDELITY_DEATHS = 2
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
        stall_seconds: Time in a shard without a new image after which the worker ends, for another to take
            its place, as a device may hang; longer than a batch takes, and the first one compiles. 0 is no
            limit; None is 1800 on an accelerator, and no limit on the CPU.
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
    stall_seconds: float | None = None
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
        if self.stall_seconds is not None and not self.stall_seconds >= 0:
            raise ValueError(f"stall_seconds must be >= 0, got {self.stall_seconds}")


def run(config: WorkConfig) -> int:
    """Makes shards until none is left.

    Returns:
        0 if every caption is written, 1 if nothing is left to do but captions failed or shards are set aside,
        75 if it was told to stop by a signal.

    Raises:
        FileNotFoundError: There is no such dataset, or no such model.
        ValueError: The model is not the plan's.
        OSError: The dataset cannot be read or written, or errors in a row saved no sample.
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
    supervisor loads its model anew, a few times in a row.
    """
    work_folder = WorkFolder(plan.store, Worker.of_this_process(), config.lease_seconds)
    maker = _ShardMaker(plan, config, work_folder, stop)
    queue = _Queue(plan, work_folder)
    with _reporting(work_folder, maker.progress, config, plan.store.is_local), _ending_a_stall(maker):
        is_measured = False
        while not stop.is_set():
            is_measured = is_measured or _measure_fidelity(plan, config, work_folder, stop)
            if stop.is_set():
                break
            if queue.has_pending:  # before a claim, which would be void if the model does not load
                maker.load_model()
            shard_index = queue.next()
            if shard_index is not None:
                try:
                    maker.make(shard_index)
                except ShardFailedError as error:
                    if is_supervised:
                        raise
                    maker.go_on_after(error)
            elif queue.has_pending or not is_measured:
                stop.wait(_SECONDS_BETWEEN_LOOKS)
            else:
                work_folder.forget_jobs()
                break
    if stop.is_set():
        return EXIT_UNFINISHED
    _check_plan_stands(plan)
    _describe(plan, work_folder)
    num_written = sum(shard.num_samples for shard in list_complete_shards(plan.store))
    return EXIT_DONE if num_written == plan.manifest.num_captions else EXIT_FAILED


class _ShardMaker:
    """Makes claimed shards with the plan's model, which is loaded once."""

    def __init__(
        self, plan: Plan, config: WorkConfig, work_folder: WorkFolder, stop: threading.Event
    ) -> None:
        self._plan, self._config, self._work_folder, self._stop = plan, config, work_folder, stop
        self._generator: DiffusionGenerator | None = None
        self._known_fingerprints: set[str] = set()
        self._num_fruitless_runs = self._num_samples_saved = 0
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

    def go_on_after(self, error: ShardFailedError) -> None:
        """Says what went wrong in a shard.

        Raises:
            OSError: It is the last of `MAX_FRUITLESS_RUNS` errors in a row, and no sample was saved since.
        """
        num_samples_saved = self.progress.num_samples_saved
        self._num_fruitless_runs += 1
        if num_samples_saved > self._num_samples_saved:
            self._num_fruitless_runs, self._num_samples_saved = 0, num_samples_saved
        if self._num_fruitless_runs >= MAX_FRUITLESS_RUNS:
            count = MAX_FRUITLESS_RUNS
            raise OSError(f"{count} errors in a row before a sample was saved ({error})") from error
        say(str(error))

    @property
    def stall_seconds(self) -> float:
        """Time without an image after which the loaded model hangs; 0 is no limit."""
        if self._config.stall_seconds is not None:
            return self._config.stall_seconds
        is_on_cpu = self._generator is None or self._generator.device.type == "cpu"
        return 0.0 if is_on_cpu else STALL_SECONDS

    def load_model(self) -> "DiffusionGenerator":
        """The loaded model."""
        if self._generator is None:
            self._generator = load_generator(self._plan, self._config)
            if has_images(self._plan.store):
                _compare_fingerprints(self._plan, self._generator.fingerprint())
        return self._generator

    def _prepare_writing(self) -> None:
        """Makes sure that the plan stands, and that the fingerprints which images carry are spelt out."""
        _check_plan_stands(self._plan)
        # A copy: this is called in the thread that writes, and the one that draws may add to them.
        for identity, fingerprint in dict(self._generator.fingerprints if self._generator else {}).items():
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
        markers = {name for name in self._plan.store.list() if name.endswith("_stats.json")}
        set_aside = self._work_folder.list_set_aside()
        self._pending = [
            index
            for index, name in enumerate(self._plan.shard_names)
            if f"{name}_stats.json" not in markers and name not in set_aside
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
    set_num_threads(config.num_threads)
    from data_gen.diffusion.generator import DiffusionGenerator

    generator_config, model = _find_planned_model(plan, config)
    return DiffusionGenerator(generator_config, model, plan.manifest.settings["num_images_per_batch"])


def _find_planned_model(plan: Plan, config: WorkConfig) -> tuple[GeneratorConfig, ModelFiles]:
    """The plan's sampling and model on this machine.

    Raises:
        OSError: There is no such model here.
        ValueError: It is not the model of the plan.
    """
    generator_config = build_generator_config(plan, config)
    model = find_model(generator_config)
    planned = plan.manifest.settings["generator"]["model_identity"]
    if model.identity != planned:
        raise ValueError(f"model {model.name} is {model.identity}, and the plan's is {planned}")
    return generator_config, model


def _measure_fidelity(plan: Plan, config: WorkConfig, work_folder: WorkFolder, stop: threading.Event) -> bool:
    """Measures what the plan's options change, where that is due and no other worker is at it.

    What cannot be measured, or has killed `_MAX_FIDELITY_DEATHS` workers, is recorded as unmeasured: no
    shard waits for it.

    Returns:
        Whether nothing is left to measure.
    """
    if not is_fidelity_due(plan):
        return True
    is_claimed = work_folder.claim(_FIDELITY)
    deaths = work_folder.read_deaths(_FIDELITY)
    try:
        if len(deaths) >= _MAX_FIDELITY_DEATHS:
            _give_fidelity_up(plan, f"{len(deaths)} workers died of it ({deaths[-1].get('reason')})")
        elif not is_claimed:
            return False
        elif is_fidelity_due(plan):  # not published and released just now
            set_num_threads(config.num_threads)
            report = measure_plan(plan, *_find_planned_model(plan, config), stop)
            _check_plan_stands(plan)
            write_fidelity(plan, report.to_dict())
            for line in report.lines():
                say(line)
    except UnmeasuredError as error:
        _give_fidelity_up(plan, str(error))
    except GivenBackError:
        return False
    finally:
        with contextlib.suppress(OSError):
            work_folder.release(_FIDELITY)
    work_folder.clear(_FIDELITY)
    return True


def _give_fidelity_up(plan: Plan, reason: str) -> None:
    _check_plan_stands(plan)
    write_fidelity(plan, {"unmeasured": reason})
    say(f"full precision is not compared with, {FIDELITY_NAME} says so: {reason}")


def has_images(store: Store) -> bool:
    """Whether an image was made, or spilled, in this folder."""
    return any(name.endswith(".tar") for name in (*store.list(), *store.list(".work", recursive=True)))


def set_num_threads(num_threads: int | None) -> None:
    """Sets the threads of the CPU's operations, before or after torch is imported."""
    if num_threads is not None:
        os.environ |= {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(num_threads)


def build_generator_config(plan: Plan, config: WorkConfig) -> GeneratorConfig:
    """The plan's sampling, with what this machine and this worker add."""
    settings = plan.manifest.settings["generator"]
    tiny_vae_identity, identity = _split_identity(settings["model_identity"])
    return dataclasses.replace(
        generator_config_from(settings),
        model=config.model or settings["model"],
        tiny_vae=config.tiny_vae or settings["tiny_vae"],
        revision=_commit_of(identity),
        tiny_vae_revision=_commit_of(tiny_vae_identity),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )


def _split_identity(model_identity: str) -> tuple[str, str]:
    """Of the tiny VAE ("" without one) and of the model itself, as `ModelFiles.identity` joins them."""
    tiny_vae, _, model = f" {model_identity}".rpartition(" ")
    return tiny_vae.strip().removeprefix("tiny_vae="), model


def _commit_of(identity: str) -> str | None:
    return identity.removeprefix("commit:") if identity.startswith("commit:") else None


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
    """Writes the card where it is missing or out of date: the last worker does."""
    if not plan.store.exists(CHECKSUMS_NAME) and work_folder.claim("card"):
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
def _ending_a_stall(maker: _ShardMaker) -> Iterator[None]:
    """Ends this process when a shard has had no new image for too long, and says where it stood.

    Against a device that hangs only another process helps; this one would prolong its claim for ever.
    """
    done = threading.Event()

    def watch() -> None:
        before, since = None, time.monotonic()
        while not done.wait(_SECONDS_BETWEEN_LOOKS / 2):
            progress = maker.progress
            now = (progress.shard, progress.num_images_made, progress.num_samples_saved)
            if now != before or progress.shard is None:
                before, since = now, time.monotonic()
            elif 0 < maker.stall_seconds <= time.monotonic() - since:
                faulthandler.dump_traceback()
                say(
                    f"error: no image for {maker.stall_seconds:g} seconds in shard {progress.shard}; "
                    "this worker ends, and leaves the shard to another"
                )
                os._exit(EXIT_SHARD_FAILED)

    thread = threading.Thread(target=watch, name="stall", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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
    """Runs the worker that engines start: `python -m data_gen.job.worker '{"dataset": …}'`."""
    config = WorkConfig(**json.loads(argument))
    try:
        code = run(config)
    except ShardFailedError:
        traceback.print_exc()
        return EXIT_SHARD_FAILED
    except (OSError, ValueError) as error:
        say(f"error: {_describe_error(error, config.dataset)}")
        return EXIT_FAILED
    return EXIT_DONE_WITH_FAILURES if code == EXIT_FAILED else code


def _describe_error(error: Exception, dataset: str) -> str:
    """One line; errors of the system name their file, or the dataset where they do not know it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or dataset}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
