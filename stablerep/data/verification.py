"""Which local shards are sound: each is hashed once, by whichever process needs it first.

Notes of what was found sound are kept in a folder, a file a dataset, so that other processes and later runs
need not hash again; a file whose size or time of change differs from its note is another file.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from data_gen.shards import ShardError

logger = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/stablerep`, or `~/.cache/stablerep`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stablerep"


class VerifiedFiles:
    """Compares files with their recorded size and sha256, each once.

    Args:
        folder: Where notes are kept; made where it is missing. If it cannot be written, each process hashes
            for itself.
        dataset: The dataset's URL.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self._notes_path = folder / "verified" / f"{hashlib.sha256(dataset.encode()).hexdigest()[:32]}.jsonl"
        self._notes: set[tuple[object, ...]] = set()
        self._num_bytes_read = 0
        self._file: int | None = None
        self._process = -1

    def check(self, path: Path, index: int, num_bytes: int, sha256: str) -> None:
        """Makes sure that a file is what was recorded.

        Args:
            path: The file.
            index: A number of its own within the dataset, >= 0: processes that need one file wait for each
                other.
            num_bytes: Its recorded size.
            sha256: Its recorded digest.

        Raises:
            ShardError: It is missing, or of another size or digest.
        """
        note = self._describe(path, num_bytes, sha256)
        if note in self._notes or note in self._read_notes():
            return
        with self._locked(index):
            if note in self._read_notes():
                return
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != sha256:
                raise ShardError(f"{path}: sha256 is {actual[:16]}…, expected {sha256[:16]}…")
            if self._describe(path, num_bytes, sha256) != note:
                raise ShardError(f"{path}: was changed while it was read")
            self._write_note(note)

    def trust(self, path: Path, num_bytes: int, sha256: str) -> None:
        """Notes a file that the caller has hashed."""
        self._write_note(self._describe(path, num_bytes, sha256))

    def _describe(self, path: Path, num_bytes: int, sha256: str) -> tuple[object, ...]:
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardError(f"{path}: missing, though its completion marker is there") from error
        if status.st_size != num_bytes:
            raise ShardError(f"{path}: has {status.st_size} bytes, expected {num_bytes}")
        return (str(path.absolute()), status.st_size, status.st_mtime_ns, sha256)

    def _read_notes(self) -> set[tuple[object, ...]]:
        """The notes, with what was added since they were last read."""
        if (file := self._open()) is None:
            return self._notes
        content = os.pread(file, os.fstat(file).st_size - self._num_bytes_read, self._num_bytes_read)
        whole = content[: content.rfind(b"\n") + 1]
        self._num_bytes_read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a line that a full disk cut off
                self._notes.add(tuple(json.loads(line)))
        return self._notes

    def _write_note(self, note: tuple[object, ...]) -> None:
        self._notes.add(note)
        if (file := self._open()) is not None:
            with contextlib.suppress(OSError):
                os.write(file, f"\n{json.dumps(note)}\n".encode())  # in one piece: it is opened to append

    @contextlib.contextmanager
    def _locked(self, index: int) -> Iterator[None]:
        """Byte `index` of the notes' file is the lock; the kernel frees that of a process which dies."""
        file = self._open()
        if file is None:
            yield
            return
        fcntl.lockf(file, fcntl.LOCK_EX, 1, index)
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, index)

    def _open(self) -> int | None:
        """The notes' file; it stays open, as closing it anywhere would free this process's locks."""
        if self._process != os.getpid():
            self._process = os.getpid()
            try:
                self._notes_path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(
                    self._notes_path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
                )
            except OSError as error:
                self._file = None
                logger.warning("verified shards cannot be remembered in %s: %s", self._notes_path, error)
        return self._file
