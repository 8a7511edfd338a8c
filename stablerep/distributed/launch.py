"""One process a rank on this machine, started and watched by a process that is no rank itself.

Lightning's own launcher makes rank 0 the parent of the others, and within five seconds of another rank's
death kills it without a word. Here the parent says which rank ended how, hands signals on, and its exit code
is that of the rank that failed first. The ranks' store lives in the parent, so that what a failing rank told
the others outlives it, whichever it was. torchrun and Slurm start ranks themselves and use nothing of this.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from stablerep.runs.signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
"""What is left to the other ranks when one has ended."""

_PARENT = "STABLEREP_PARENT_PIPE"
_HAS_STORE_ELSEWHERE = "TORCHELASTIC_USE_AGENT_STORE"  # torch's word for ranks that do not host their store


def is_started_by_us() -> bool:
    """Whether this process is a rank that `run_ranks` started."""
    return _PARENT in os.environ


def run_ranks(command: Sequence[str], num_ranks: int) -> int:
    """Runs a command once a rank, with the environment that Lightning reads, until all have ended.

    Signals to stop are held back in each rank (`stablerep.runs.signals`), and so not lost while it starts.

    Args:
        command: Program and arguments, the same for each rank.
        num_ranks: Ranks on this machine. With more machines NODE_RANK, MASTER_ADDR and MASTER_PORT are set.

    Returns:
        0 if all ranks returned 0; else the exit code of the first that did not.

    Raises:
        ConnectionError: If the ranks' meeting place cannot be opened.
        ChildProcessError: If a rank was ended by a signal; names both.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    with _meeting_place() as port, _handing_on_signals(ranks):
        read_end, write_end = os.pipe()  # which the ranks hold; its other end closes when this process ends
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | os.environ
        environment |= {_PARENT: str(read_end), _HAS_STORE_ELSEWHERE: str(True)}
        try:
            for number in range(num_ranks):
                of_rank = environment | {"LOCAL_RANK": str(number)}
                ranks.append(subprocess.Popen(command, env=of_rank, pass_fds=[read_end]))
            os.close(read_end)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
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
    first: tuple[int, int] | None = None  # the rank that failed first, and its exit code
    deadline, interrupted = float("inf"), False
    while True:
        try:
            codes = [rank.poll() for rank in ranks]
            # Of several at once, the one that left by itself: what it did may have ended the others.
            failed = sorted(
                ((rank, code) for rank, code in enumerate(codes) if code), key=lambda rc: rc[1] < 0
            )
            if failed and first is None:
                first = failed[0]
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
    rank, code = first or (0, 0)
    if code < 0:
        raise ChildProcessError(
            f"rank {rank} was ended by {signal.Signals(-code).name}; --ckpt_path last goes on from the "
            "last checkpoint"
        )
    return code


@contextmanager
def _meeting_place() -> Iterator[int]:
    """Hosts the store of the ranks of all machines, on the first of them; yields its port."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    if int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))) > 0:
        yield port
        return
    try:
        store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    except dist.DistError as error:
        raise ConnectionError(
            f"MASTER_PORT {port} cannot be opened: {' '.join(str(error).split())}"
        ) from error
    yield store.port
    del store


@contextmanager
def _handing_on_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hands signals to stop on to the ranks; they are held back, in the ranks too, until let through."""

    def hand_on(number: int, frame: Any) -> None:
        _send(ranks, number)

    former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    former = {number: signal.signal(number, hand_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)
        for number, handler in former.items():
            signal.signal(number, handler)


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # which has no effect on one that has ended


def rank_command(verb: str, args: Sequence[str]) -> list[str]:
    """The command line of a verb for one rank; `--debug`, which the front door keeps, is handed on."""
    debug = ["--debug"] if "--debug" in sys.argv else []
    return [sys.executable, "-m", "stablerep.cli", verb, *args, *debug]
