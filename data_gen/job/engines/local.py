"""Workers as processes of this machine: one an accelerator, or some on its CPU; a dead one is replaced."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_gen.exit_codes import EXIT_DONE, EXIT_DONE_WITH_FAILURES, EXIT_UNFINISHED
from data_gen.job.supervision import SUPERVISOR_VARIABLE
from data_gen.job.work_folder import PLACE_VARIABLE, Worker, WorkFolder
from data_gen.job.worker import MAX_FRUITLESS_RUNS, WorkConfig
from data_gen.storage import Store

_SECONDS_BETWEEN_LOOKS = 0.2
_MAX_SECONDS_BEFORE_START = 60.0
_SECONDS_AFTER_STOP = 1.0
"""Before a worker is started again that someone else has stopped."""
_NUM_LINES_KEPT = 20


@dataclass
class _Slot:
    """A place for one worker after another.

    Args:
        work: What each is told.
        index: Which place.
        process: The present worker.
        lines: What it said last.
        num_fruitless: Workers in a row that died before they had saved a sample.
        start_at: When the next one starts, where the last one died.
        code: The exit code of the last one, once no other follows.
    """

    work: WorkConfig
    index: int
    process: "subprocess.Popen[str]"
    reader: threading.Thread
    lines: deque[str]
    num_fruitless: int = 0
    start_at: float | None = None
    code: int | None = None


def run_local(
    works: Sequence[WorkConfig],
    stop: threading.Event,
    say: Callable[[str], None],
    grace_seconds: float = 120.0,
) -> list[int]:
    """Runs one worker process for each config until none has anything left to do.

    A worker that dies is buried (its shard is free at once, its death noted) and replaced, at once the first
    time, and after a pause that doubles while its successors save nothing; at last its place is given up. One
    that someone else has told to stop is replaced too, as there is work left.

    Args:
        works: What each worker is told.
        stop: Once it is set, the workers are told to give back their shards.
        say: Takes a line for the user.
        grace_seconds: Time that workers have for giving back, before they are killed.

    Returns:
        The last exit code of each worker.

    Raises:
        OSError: Every place was given up.
    """
    prefixes = [f"worker {index}: " if len(works) > 1 else "" for index in range(len(works))]
    slots = [
        _Slot(work, index, *_start(work, index, prefixes[index], say)) for index, work in enumerate(works)
    ]
    work_folder = WorkFolder(Store(works[0].dataset), Worker.of_this_process(), works[0].lease_seconds)
    try:
        while any(slot.code is None for slot in slots) and not stop.is_set():
            stop.wait(_SECONDS_BETWEEN_LOOKS)
            for slot in slots:
                if slot.code is not None:
                    continue
                if slot.start_at is None and slot.process.poll() is not None:
                    _look_after(slot, work_folder, say, stop)
                elif slot.start_at is not None and time.monotonic() >= slot.start_at:
                    slot.process, slot.reader, slot.lines = _start(
                        slot.work, slot.index, prefixes[slot.index], say
                    )
                    slot.start_at = None
    finally:
        _end(slots, grace_seconds)
    if all(slot.num_fruitless >= MAX_FRUITLESS_RUNS for slot in slots):
        reason = _describe(slots[0].process.returncode, slots[0].lines)
        raise OSError(
            f"{MAX_FRUITLESS_RUNS} workers in a row ended before they had saved a sample ({reason})"
        )
    return [EXIT_UNFINISHED if slot.code is None else slot.code for slot in slots]


def _look_after(
    slot: _Slot, work_folder: WorkFolder, say: Callable[[str], None], stop: threading.Event
) -> None:
    """Takes the exit code of a worker that has ended; where it died, buries it and has another one follow."""
    slot.reader.join(timeout=5.0)
    code = slot.process.returncode
    if code in (EXIT_DONE, EXIT_DONE_WITH_FAILURES) or (code == EXIT_UNFINISHED and stop.is_set()):
        slot.code = code
        return
    if code == EXIT_UNFINISHED:
        slot.start_at = time.monotonic() + _SECONDS_AFTER_STOP
        say(f"worker {slot.index} was told to stop, though not by this job; starting it anew")
        return
    reason = _describe(code, slot.lines)
    shards, num_samples_saved = list[str](), 0
    with contextlib.suppress(OSError):  # the store may be what it died of
        shards, num_samples_saved = work_folder.bury(slot.process.pid, reason)
    slot.num_fruitless = 0 if num_samples_saved else slot.num_fruitless + 1
    where = f" in shard {shards[0]}" if shards else ""
    if slot.num_fruitless >= MAX_FRUITLESS_RUNS:
        slot.code = code
        say(f"worker {slot.index} died{where} ({reason}); its place is given up")
        return
    pause = min(2.0 ** (slot.num_fruitless - 1), _MAX_SECONDS_BEFORE_START) if slot.num_fruitless > 1 else 0.0
    slot.start_at = time.monotonic() + pause
    say(
        f"worker {slot.index} died{where} ({reason}); starting it anew{f' in {pause:.0f} s' if pause else ''}"
    )


def _start(
    work: WorkConfig, index: int, prefix: str, say: Callable[[str], None]
) -> tuple["subprocess.Popen[str]", threading.Thread, deque[str]]:
    """A worker process, the thread that passes on what it says, and its last lines."""
    place = f"{socket.gethostname()}/{os.getpid()}/{index}"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_gen.job.worker", json.dumps(dataclasses.asdict(work))],
        env={**os.environ, SUPERVISOR_VARIABLE: str(os.getpid()), PLACE_VARIABLE: place},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which then tells its workers
    )
    lines: deque[str] = deque(maxlen=_NUM_LINES_KEPT)

    def forward() -> None:
        assert process.stdout is not None  # a pipe was asked for
        with process.stdout as output:
            for line in output:
                if text := line.rstrip().removeprefix("stablerep generate: "):
                    lines.append(text)
                    say(prefix + text)

    reader = threading.Thread(target=forward, daemon=True)
    reader.start()
    return process, reader, lines


def _end(slots: Sequence[_Slot], grace_seconds: float) -> None:
    """Tells the workers that still run to give back, waits for them, and kills what does not end."""
    running = [slot.process for slot in slots if slot.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _describe(code: int, lines: Sequence[str]) -> str:
    """How a worker ended: the signal, or the last line that it said."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" + (f": {lines[-1]}" if lines else "")
