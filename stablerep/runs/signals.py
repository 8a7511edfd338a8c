"""The signals that stop a run: held back while it starts and ends, and none of its data workers' business.

Standard library alone, as it comes before all else is imported.
"""

import multiprocessing.process
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def hold_signals() -> None:
    """From here on signals to stop wait, also for processes that this one starts, until they are asked for.

    A run takes a while to import and to open its data; a signal that came meanwhile stops it then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def without_signals() -> Iterator[None]:
    """What is started here never sees a signal to stop, nor Ctrl-C, unless it looks for one."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def ignore_signals(worker_id: int) -> None:
    """In a data worker: what is told to its rank is not told to it.

    `timeout`, systemd and batch systems signal whole groups. A rank whose worker dies of that raises wherever
    it is, also while it saves the checkpoint that the signal asked for. When a rank dies, torch's own watch
    ends its workers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGINT})


def end_by_kill(worker: multiprocessing.process.BaseProcess) -> None:
    """In a rank: what would ask a worker to end by a signal that it ignores ends it by one that it cannot.

    At its exit Python asks the worker's handle, torch the worker itself.
    """
    handles: list[Any] = [worker, worker._popen]  # type: ignore[attr-defined]
    for handle in handles:
        handle.terminate = handle.kill
