"""Workers as processes of this machine: one an accelerator, or some on its CPU; a dead one is replaced."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_gen.storage import Store
from data_gen.work_folder import Worker, WorkFolder
from data_gen.worker import (
    EXIT_DONE,
    EXIT_SET_ASIDE,
    EXIT_SHARD_FAILED,
    EXIT_UNFINISHED,
    SUPERVISOR_VARIABLE,
    WorkConfig,
)

MAX_FRUITLESS_STARTS = 5
"""Workers that may die in a row without having made anything, before the job is given up."""

_SECONDS_BETWEEN_LOOKS = 0.2
_NUM_LINES_KEPT = 20


@dataclass
class _Slot:
    """A place for one worker after another."""

    work: WorkConfig
    environment: dict[str, str]
    process: "subprocess.Popen[str]"
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_NUM_LINES_KEPT))
    started: float = 0.0


def run_local(
    works: Sequence[WorkConfig],
    stop: threading.Event,
    say: Callable[[str], None],
    grace_seconds: float = 120.0,
) -> list[int]:
    """Runs one worker process for each config until none has anything left to do.

    A worker that dies is buried (its shard is free at once, its death noted) and replaced.

    Args:
        works: What each worker is told.
        stop: Once it is set, the workers are told to give back their shards.
        say: Takes a line for the user.
        grace_seconds: Time that workers have for giving back, before they are killed.

    Returns:
        The last exit code of each worker.

    Raises:
        OSError: Workers die again and again without making anything.
    """
    slots = [_start(work, index, len(works), say) for index, work in enumerate(works)]
    work_folder = WorkFolder(Store(works[0].dataset), Worker.of_this_process(), works[0].lease_seconds)
    num_fruitless = 0
    codes: dict[int, int] = {}
    try:
        while len(codes) < len(slots) and not stop.is_set():
            stop.wait(_SECONDS_BETWEEN_LOOKS)
            for index, slot in enumerate(slots):
                code = slot.process.poll()
                if code is None or index in codes:
                    continue
                if code in (EXIT_DONE, EXIT_SET_ASIDE, EXIT_UNFINISHED):
                    codes[index] = code
                    continue
                reason = _describe(code, slot.lines)
                shards = work_folder.bury(slot.process.pid, reason)
                where = f" in shard {shards[0]}" if shards else ""
                say(f"worker {index} died{where} ({reason}); starting it anew")
                is_fruitful = shards or code == EXIT_SHARD_FAILED or _is_anything_made(work_folder)
                num_fruitless = 0 if is_fruitful else num_fruitless + 1
                if num_fruitless >= MAX_FRUITLESS_STARTS:
                    raise OSError(
                        f"{num_fruitless} workers in a row died before their first image ({reason})"
                    )
                slots[index] = _start(slot.work, index, len(works), say)
    finally:
        _end(slots, grace_seconds)
    return [codes.get(index, EXIT_UNFINISHED) for index in range(len(slots))]


def _start(work: WorkConfig, index: int, num_workers: int, say: Callable[[str], None]) -> _Slot:
    environment = {**os.environ, SUPERVISOR_VARIABLE: str(os.getpid())}
    process = subprocess.Popen(
        [sys.executable, "-m", "data_gen.worker", json.dumps(dataclasses.asdict(work))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which then tells its workers
    )
    slot = _Slot(work, environment, process, started=time.monotonic())
    prefix = f"worker {index}: " if num_workers > 1 else ""
    threading.Thread(target=_forward, args=(slot, prefix, say), daemon=True).start()
    return slot


def _forward(slot: _Slot, prefix: str, say: Callable[[str], None]) -> None:
    """Passes on what a worker says, and keeps its last lines for the reason of its death."""
    assert slot.process.stdout is not None  # a pipe was asked for
    for line in slot.process.stdout:
        text = line.rstrip().removeprefix("stablerep generate: ")
        if text:
            slot.lines.append(text)
            say(prefix + text)


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


def _is_anything_made(work_folder: WorkFolder) -> bool:
    return any(report["num_images_made"] for report in work_folder.list_reports())


def _describe(code: int, lines: Sequence[str]) -> str:
    """How a worker ended: the signal, or the last line that it said."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" + (f": {lines[-1]}" if lines else "")
