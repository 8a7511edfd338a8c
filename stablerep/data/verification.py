"""Which local shards are sound: each is hashed once, by whichever process needs it first.

Notes of what was found sound are kept in a folder, a file a dataset, so that other processes and later runs
need not hash again. A file whose size, inode or times differ from its note is another file: a copy on another
machine's disk is hashed there, though its path, size and time of change may be those of the first.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_gen.shards import ShardError

logger = logging.getLogger(__name__)
_Note = tuple[object, ...]


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/stablerep`, or `~/.cache/stablerep`, or a user's own among the temporary files."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder, "stablerep")
    try:
        return Path.home() / ".cache" / "stablerep"
    except RuntimeError:  # a user id without a home, as in some containers
        return Path(tempfile.gettempdir(), f"stablerep-{os.getuid()}")


class VerifiedFiles:
    """Compares files with their recorded size and sha256, each once.

    Args:
        folder: Where notes are kept; made where it is missing. If it cannot be written or locked, each
            process hashes for itself.
        dataset: The dataset's URL.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self._notes_path = folder / "verified" / f"{hashlib.sha256(dataset.encode()).hexdigest()[:32]}.jsonl"
        self._notes: dict[object, _Note] = {}  # by path: a later note takes an earlier one's place
        self._num_bytes_read = 0
        self._file: int | None = None
        self._process = -1
        self._has_locks = True

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
        note = _describe(path, num_bytes, sha256)
        if self._is_noted(note):
            return
        with self._locked(index):
            if self._is_noted(note):
                return
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != sha256:
                raise ShardError(f"{path}: sha256 is {actual[:16]}…, expected {sha256[:16]}…")
            if _describe(path, num_bytes, sha256) != note:
                raise ShardError(f"{path}: was changed while it was read")
            self._write_note(note)

    def _is_noted(self, note: _Note) -> bool:
        if self._notes.get(note[0]) != note:
            self._read_notes()
        return self._notes.get(note[0]) == note

    def _read_notes(self) -> None:
        """Takes in what was added since the notes were last read."""
        if (file := self._open()) is None:
            return
        num_bytes = os.fstat(file).st_size
        if num_bytes < self._num_bytes_read:  # somebody has cut the file off
            self._num_bytes_read = 0
        content = os.pread(file, num_bytes - self._num_bytes_read, self._num_bytes_read)
        whole = content[: content.rfind(b"\n") + 1]
        self._num_bytes_read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError, IndexError):  # a line that a full disk cut off
                note = tuple(json.loads(line))
                self._notes[note[0]] = note

    def _write_note(self, note: _Note) -> None:
        self._notes[note[0]] = note
        if (file := self._open()) is not None:
            with contextlib.suppress(OSError):
                os.write(file, f"\n{json.dumps(note)}\n".encode())  # in one piece: it is opened to append

    @contextlib.contextmanager
    def _locked(self, index: int) -> Iterator[None]:
        """Byte `index` of the notes' file is the lock; the kernel frees that of a process which dies."""
        file = self._open()
        if file is None or not self._lock(file, index):
            yield
            return
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, index)

    def _lock(self, file: int, index: int) -> bool:
        if self._has_locks:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX, 1, index)
            except OSError as error:  # a network disk without a lock service
                self._has_locks = False
                logger.warning(
                    "each process verifies shards for itself: %s cannot be locked (%s)",
                    *(self._notes_path, error.strerror),
                )
        return self._has_locks

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


def _describe(path: Path, num_bytes: int, sha256: str) -> _Note:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardError(f"{path}: missing, though its completion marker is there") from error
    if status.st_size != num_bytes:
        raise ShardError(f"{path}: has {status.st_size} bytes, expected {num_bytes}")
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (str(path.absolute()), status.st_size, status.st_ino, *times, sha256)
