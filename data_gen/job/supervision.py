"""What watches a worker from beside it: reports, stalls, signals, the process that started it."""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from data_gen.exit_codes import EXIT_SHARD_FAILED
from data_gen.job.shard_job import Progress
from data_gen.job.work_folder import WorkFolder
from data_gen.messages import say

SUPERVISOR_VARIABLE = "STABLEREP_SUPERVISOR_PID"
"""Environment variable with the process that a worker is to end with."""

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_REPORTS = {True: 1.0, False: 10.0}
"""On a local disk, in an object store."""


@contextmanager
def reporting(
    work_folder: WorkFolder, progress: Progress, device: str, lease_seconds: float, is_local: bool
) -> Iterator[None]:
    """Says in the background what this worker does, and prolongs its claim."""
    seconds = min(_SECONDS_BETWEEN_REPORTS[is_local], lease_seconds / 4)
    start, done = time.time(), threading.Event()

    def report() -> None:
        with contextlib.suppress(OSError):  # a full disk is told of by what needs it
            work_folder.report({"device": device, "started": start, **progress.to_dict()})

    def repeat() -> None:
        renew_at = 0.0
        while True:
            report()
            if time.monotonic() >= renew_at:
                with contextlib.suppress(OSError):
                    work_folder.renew()
                renew_at = time.monotonic() + lease_seconds / 4
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
def ending_a_stall(progress: Progress, limit_seconds: Callable[[], float]) -> Iterator[None]:
    """Ends this process when a shard has had no new image for too long, and says where it stood.

    Against a device that hangs only another process helps; this one would prolong its claim for ever.

    Args:
        progress: What the worker has done so far.
        limit_seconds: The longest time without an image at present; 0 is no limit.
    """
    done = threading.Event()

    def watch() -> None:
        before, since = None, time.monotonic()
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            now = (progress.shard, progress.num_images_made, progress.num_samples_saved)
            if now != before or progress.shard is None:
                before, since = now, time.monotonic()
            elif 0 < limit_seconds() <= time.monotonic() - since:
                faulthandler.dump_traceback()
                say(
                    f"error: no image for {limit_seconds():g} seconds in shard {progress.shard}; "
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


def stop_with_supervisor(stop: threading.Event) -> bool:
    """Sets `stop` when the process that started this worker is no more; whether one said that it did."""
    supervisor = os.environ.pop(SUPERVISOR_VARIABLE, None)

    def watch() -> None:
        while os.getppid() == int(supervisor or 0):
            time.sleep(1.0)
        stop.set()

    if supervisor is not None:
        threading.Thread(target=watch, name="supervisor", daemon=True).start()
    return supervisor is not None
