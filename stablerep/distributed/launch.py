"""One process a rank on this machine, started and watched by a process that is no rank itself.

Lightning's own launcher makes rank 0 the parent of the others, and within five seconds of another rank's
death kills it without a word. Here the parent says which rank ended how, hands signals on, and its exit code
is that of the rank that failed first. torchrun and Slurm start ranks themselves; then nothing here is used.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
"""What is left to the other ranks when one has ended."""

_PARENT = "STABLEREP_PARENT_PIPE"
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)


def is_started_by_us() -> bool:
    """Whether this process is a rank that `run_ranks` started."""
    return _PARENT in os.environ


def run_ranks(command: Sequence[str], num_ranks: int) -> int:
    """Runs a command once a rank, with the environment that Lightning reads, until all have ended.

    Args:
        command: Program and arguments, the same for each rank.
        num_ranks: Ranks on this machine. With more machines NODE_RANK, MASTER_ADDR and MASTER_PORT are set.

    Returns:
        0 if all ranks returned 0; else the exit code of the first that did not.

    Raises:
        ChildProcessError: If a rank was ended by a signal; names both.
    """
    read_end, write_end = os.pipe()  # which the ranks hold; its other end closes when this process ends
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_find_free_port())}
    environment |= os.environ | {_PARENT: str(read_end)}
    ranks = [
        subprocess.Popen(command, env=environment | {"LOCAL_RANK": str(rank)}, pass_fds=[read_end])
        for rank in range(num_ranks)
    ]
    os.close(read_end)
    try:
        with _handing_on_signals(ranks):
            return _wait(ranks)
    finally:
        os.close(write_end)
        for rank in ranks:
            rank.kill()
            rank.wait()


def watch_parent() -> None:
    """In a rank: when the process that started it is gone, it stops as at SIGTERM."""
    pipe = int(os.environ[_PARENT])

    def watch() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; the others are killed when they outlive a rank that failed by `GRACE_SECONDS`."""
    failed: dict[int, int] = {}  # rank to exit code, the first that failed first
    deadline, interrupted = float("inf"), False
    while True:
        try:
            codes = [rank.poll() for rank in ranks]
            for rank, code in enumerate(codes):
                if code and rank not in failed:
                    failed[rank] = code
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            running = [rank for rank, code in enumerate(codes) if code is None]
            if not running or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        except KeyboardInterrupt:  # which a terminal sends to the ranks as well, and `kill -INT` does not
            deadline, interrupted = min(deadline, time.monotonic() + GRACE_SECONDS), True
            threading.Timer(1.0, lambda: _send(ranks, signal.SIGINT)).start()
    for rank in running:
        logger.warning("rank %d had not left %.0f s later and was killed", rank, GRACE_SECONDS)
    if interrupted:
        raise KeyboardInterrupt
    for rank, code in failed.items():
        if code < 0:
            raise ChildProcessError(
                f"rank {rank} was ended by {signal.Signals(-code).name}; --ckpt_path last goes on from the "
                "last checkpoint"
            )
    return next(iter(failed.values()), 0)


@contextmanager
def _handing_on_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def hand_on(number: int, frame: Any) -> None:
        _send(ranks, number)

    former = {number: signal.signal(number, hand_on) for number in _HANDED_ON}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # which has no effect on one that has ended


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_command(verb: str, args: Sequence[str]) -> list[str]:
    """The command line of a verb for one rank; `--debug`, which the front door keeps, is handed on."""
    debug = ["--debug"] if "--debug" in sys.argv else []
    return [sys.executable, "-m", "stablerep.cli", verb, *args, *debug]
