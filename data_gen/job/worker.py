"""`stablerep work`: one worker of a generation job, which claims a shard, makes it, and takes the next.

Every engine starts workers, and nothing else; more of them may join at any time from anywhere, by the
dataset's folder or URL alone. They agree through files: claims that save double work, and shards of which the
first one published stays.
"""

import contextlib
import json
import signal
import sys
import threading
import traceback
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_gen.exit_codes import (
    EXIT_DONE,
    EXIT_DONE_WITH_FAILURES,
    EXIT_FAILED,
    EXIT_SHARD_FAILED,
    EXIT_UNFINISHED,
)
from data_gen.job.plan import Plan, has_images
from data_gen.job.planned_model import compare_fingerprints, load_generator
from data_gen.job.shard_job import GivenBackError, Progress, run_shard
from data_gen.job.shard_queue import ShardQueue
from data_gen.job.shared_tasks import describe, measure_fidelity
from data_gen.job.supervision import ending_a_stall, reporting, stop_with_supervisor, stopping_on
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.messages import say
from data_gen.shards import ShardError, list_complete_shards, to_json
from data_gen.storage import Store

if TYPE_CHECKING:
    from data_gen.diffusion.generator import DiffusionGenerator

MAX_FRUITLESS_RUNS = 6
"""Workers of a place, or errors of one without a supervisor, that may follow each other and save nothing."""

STALL_SECONDS = 1800.0
"""The limit of `WorkConfig.stall_seconds` on an accelerator where none is set."""

_SECONDS_BETWEEN_LOOKS = 2.0


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
    is_supervised = stop_with_supervisor(stop)
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
    queue = ShardQueue(plan, work_folder)
    with (
        reporting(work_folder, maker.progress, config.device, config.lease_seconds, plan.store.is_local),
        ending_a_stall(maker.progress, lambda: maker.stall_seconds),
    ):
        is_measured = False
        while not stop.is_set():
            is_measured = is_measured or measure_fidelity(plan, config, work_folder, stop)
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
    plan.check_stands()
    describe(plan, work_folder)
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
                compare_fingerprints(self._plan, self._generator.fingerprint())
        return self._generator

    def _prepare_writing(self) -> None:
        """Makes sure that the plan stands, and that the fingerprints which images carry are spelt out."""
        self._plan.check_stands()
        # A copy: this is called in the thread that writes, and the one that draws may add to them.
        for identity, fingerprint in dict(self._generator.fingerprints if self._generator else {}).items():
            if identity not in self._known_fingerprints:
                content = (to_json(fingerprint) + "\n").encode()
                self._plan.store.publish(f"fingerprints/{identity}.json", content)
                self._known_fingerprints.add(identity)


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
