"""The signals that stop a run: held back while it starts and ends, and none of its data workers' business.

Standard library alone, as it comes before all else is imported.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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


def obey_parent_alone(worker_id: int) -> None:
    """In a data worker that was started `without_signals`: only its rank ends it.

    `timeout`, systemd and batch systems signal whole groups. A rank whose worker dies of that raises wherever
    it is, also while it saves the checkpoint that the signal asked for. When a rank dies, torch's own watch
    ends its workers.
    """
    rank = multiprocessing.parent_process()
    signals = {*STOP_SIGNALS, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # where it is no copy of its parent

    def wait() -> None:
        while rank is not None and signal.sigwaitinfo(signals).si_pid != rank.pid:
            pass
        os._exit(0)

    if rank is not None:
        threading.Thread(target=wait, daemon=True, name="signals").start()
