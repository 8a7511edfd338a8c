"""Runs the demo's steps, keeps their output off the terminal, and does nothing twice.

    steps.json    a record a step: command, fingerprint, seconds, whether it is done
    logs/         what each command printed

A step is done again when its command, that of a step that it builds on, the model or the code has changed.
The file also marks the folder as a demo's.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from stablerep.demo.steps import Step, identify_sources

RECORDS_FILE, LOGS_FOLDER = "steps.json", "logs"
_SCHEMA = "stablerep-demo-1"
_SECONDS_BETWEEN_UPDATES = 0.5


@dataclass(frozen=True)
class Record:
    """What is known of a step that was run.

    Args:
        name: The step's.
        title: The step's.
        command: Its command line.
        fingerprint: Digest of all that its outcome depends on.
        seconds: Wall time of the command; of its last part if it went on after an interruption.
        was_continued: Whether it did.
        done: Whether it has come to its end.
    """

    name: str
    title: str
    command: str
    fingerprint: str
    seconds: float
    was_continued: bool
    done: bool


def claim_folder(root: Path) -> dict[str, Record]:
    """Makes the demo's folder, or opens that of an earlier demo.

    Returns:
        The records of the earlier demo by step.

    Raises:
        ValueError: If the folder holds anything else.
    """
    path = root / RECORDS_FILE
    if not path.is_file():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ValueError(f"output {root} holds files that no demo wrote: choose a new or empty folder")
        root.mkdir(parents=True, exist_ok=True)
        _write_records(root, {})
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] == _SCHEMA:
            return {record["name"]: Record(**record) for record in content["steps"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a demo's record: remove {root} or choose another folder") from error
    raise ValueError(f"{path} is of schema {content['schema']}, expected {_SCHEMA}: remove {root}")


def run_steps(root: Path, steps: Sequence[Step]) -> list[Record]:
    """Runs what is not done yet, in order.

    Args:
        root: The demo's folder.
        steps: All of its steps.

    Returns:
        One record a step.

    Raises:
        ValueError: If the folder is no demo's, or a command fails; names the step and its log.
    """
    records = claim_folder(root)
    fingerprints = fingerprint_steps(steps)
    pending = [step for step in steps if not _is_done(step, fingerprints[step.name], records)]
    start, expected_seconds_done, terminal = time.perf_counter(), 0.0, _Terminal()
    for number, step in enumerate(steps, start=1):
        if step not in pending:
            terminal.say(f"[{number}/{len(steps)}] {step.title}: already done")
            continue
        elapsed = time.perf_counter() - start
        expected = sum(other.expected_seconds for other in pending) - expected_seconds_done
        pace = elapsed / expected_seconds_done if expected_seconds_done else 1.0  # this machine's, so far
        terminal.say(f"[{number}/{len(steps)}] {step.title}")
        terminal.say(f"      {format_seconds(elapsed)} elapsed, about {format_seconds(expected * pace)} left")
        records[step.name] = _run_step(root, step, fingerprints[step.name], records, terminal)
        terminal.say(f"      done in {format_seconds(records[step.name].seconds)}")
        expected_seconds_done += step.expected_seconds
    return [records[step.name] for step in steps]


def fingerprint_steps(steps: Sequence[Step]) -> dict[str, str]:
    """Digest of each step's command, salt and inputs' digests, and of the code, by name."""
    digests, sources = dict[str, str](), identify_sources()
    for step in steps:
        facts = [sources, step.command, step.salt, *(digests[name] for name in step.inputs)]
        digests[step.name] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return digests


def format_seconds(seconds: float) -> str:
    """`m:ss`."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _is_done(step: Step, fingerprint: str, records: dict[str, Record]) -> bool:
    record = records.get(step.name)
    return (
        record is not None
        and record.done
        and record.fingerprint == fingerprint
        and all(path.exists() for path in step.outputs)
    )


def _run_step(
    root: Path, step: Step, fingerprint: str, records: dict[str, Record], terminal: "_Terminal"
) -> Record:
    before = records.get(step.name)
    continues = step.can_continue and before is not None and before.fingerprint == fingerprint
    if not continues:
        for path in step.outputs:
            _remove(path)
    record = Record(step.name, step.title, step.command, fingerprint, 0.0, continues, done=False)
    records[step.name] = record
    _write_records(root, records)
    start = time.perf_counter()
    code, log = _call(root, step, terminal)
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
        raise ValueError(f"step {step.name} failed: {reason} (all of its output: {log})")
    seconds = round(time.perf_counter() - start, 2)
    record = Record(step.name, step.title, step.command, fingerprint, seconds, continues, done=True)
    records[step.name] = record
    _write_records(root, records)
    return record


def _call(root: Path, step: Step, terminal: "_Terminal") -> tuple[int, Path]:
    """Runs the command in this process; what it prints goes to its log."""
    from stablerep.cli import main

    log = root / LOGS_FOLDER / f"{step.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as file, _divert_output(file), terminal.follow(log):
        print(f"$ {step.command}", flush=True)
        return main(step.args), log


class _Diverted(io.TextIOBase):
    """stdout or stderr while the demo runs: to a step's log, and to the terminal between and after the steps.

    Log handlers and progress bars keep the stream on which they were made, and outlive their step: so there
    is one for all steps, which is never closed.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.log: TextIO | None = None

    def write(self, text: str) -> int:
        """Passes the text on."""
        (self.log or getattr(sys, f"__{self._name}__")).write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes where the text goes."""
        (self.log or getattr(sys, f"__{self._name}__")).flush()

    def writable(self) -> bool:
        """True."""
        return True


_STDOUT, _STDERR = _Diverted("stdout"), _Diverted("stderr")


@contextmanager
def _divert_output(log: TextIO) -> Iterator[None]:
    _STDOUT.log = _STDERR.log = log
    try:
        with redirect_stdout(_STDOUT), redirect_stderr(_STDERR):
            yield
    finally:
        _STDOUT.log = _STDERR.log = None


class _Terminal:
    """The demo's own lines; where it is a screen, also the last line of the running command's log."""

    def __init__(self) -> None:
        self._stream = sys.stdout

    def say(self, line: str) -> None:
        """Prints a line at once."""
        print(line, file=self._stream, flush=True)

    @contextmanager
    def follow(self, log: Path) -> Iterator[None]:
        """Shows the log's last line, over and over in one place, until the block ends."""
        if not self._stream.isatty():
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._show_tail, args=(log, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _show_tail(self, log: Path, ended: threading.Event) -> None:
        start = time.perf_counter()
        while not ended.wait(_SECONDS_BETWEEN_UPDATES):
            clock = format_seconds(time.perf_counter() - start)
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{f'      {clock}  {read_last_line(log)}'[:width]}")
            self._stream.flush()


def read_last_line(log: Path) -> str:
    """The last line, or state of a progress bar, that is in a log; empty where there is none."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2048))
        text = file.read().decode("utf-8", errors="ignore")
    pieces = [piece.strip() for piece in text.replace("\r", "\n").split("\n")]
    return next((piece for piece in reversed(pieces) if piece and not piece.startswith("\x1b")), "")


def _write_records(root: Path, records: dict[str, Record]) -> None:
    content = {"schema": _SCHEMA, "steps": [asdict(record) for record in records.values()]}
    partial = root / f".{RECORDS_FILE}.partial"
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, root / RECORDS_FILE)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
