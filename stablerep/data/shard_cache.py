"""Whole files of an object store, kept on a local disk up to a size; the least recently used go first."""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from data_gen.shards import ShardError, Store

_NUM_BYTES_AT_ONCE = 8 << 20
_TIME_OF_CHANGE = (
    10**18
)  # ns; of each file as it was fetched, so that whatever is written into it later shows


class ShardCache:
    """Any number of processes may share the folder: one fetches a file, the others wait for it.

    A file appears under its name whole and hashed; its digest is a part of the name. One that was changed
    afterwards is fetched again. A process that reads a file has it open, so removal does it no harm. What a
    killed process left half fetched is removed when room is made.

    Args:
        folder: Where to.
        max_num_bytes: Size that the files may have together.
    """

    def __init__(self, folder: Path, max_num_bytes: int) -> None:
        self._folder, self._max_num_bytes = folder / "shards", max_num_bytes

    def path_of(self, store: Store, name: str, sha256: str) -> Path:
        """Where a file of a store is kept."""
        dataset = hashlib.sha256(store.url.encode()).hexdigest()[:16]
        return self._folder / f"{dataset}-{sha256[:16]}-{name.replace('/', '-')}"

    def open(self, store: Store, name: str, num_bytes: int, sha256: str) -> int:
        """The local copy of a file, fetched if need be, and marked as used now.

        Returns:
            A file descriptor to read from; the caller closes it.

        Raises:
            ShardError: The file in the store has another size or digest, or is larger than the cache.
            OSError: It cannot be read from the store or written here.
        """
        path = self.path_of(store, name, sha256)
        if num_bytes > self._max_num_bytes:
            raise ShardError(
                f"cache.max_bytes must be >= {num_bytes}, the size of {store.name_of(name)}, "
                f"got {self._max_num_bytes}"
            )
        if (found := _open_unchanged(path, num_bytes)) is not None:
            return found
        with self._being_fetched(path) as file:
            if (found := _open_unchanged(path, num_bytes)) is not None:
                return found
            temporary = path.with_suffix(".tmp")
            self._make_room(file, num_bytes)
            _copy(store, name, file, num_bytes, sha256)
            os.utime(file, ns=(time.time_ns(), _TIME_OF_CHANGE))
            found = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            os.replace(temporary, path)
        return found

    @contextlib.contextmanager
    def _being_fetched(self, path: Path) -> Iterator[int]:
        """Locks the temporary file of a path, alone among processes."""
        temporary = path.with_suffix(".tmp")
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_file_at(file, temporary):  # renamed or removed while this process waited
                    continue
                try:
                    yield file
                finally:
                    if _is_file_at(file, temporary):
                        temporary.unlink()
                return
            finally:
                os.close(file)

    def _make_room(self, file: int, num_bytes: int) -> None:
        """Takes the room of a file, so that processes which fetch at once do not share it."""
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for temporary in self._folder.glob("*.tmp"):
                _remove_if_abandoned(temporary)
            held = [(status.st_atime_ns, status.st_size, path) for path, status in self._files()]
            total = sum(size for _, size, _ in held) + num_bytes
            for _, size, path in sorted(held):
                if total <= self._max_num_bytes:
                    break
                if path.suffix != ".tmp":
                    path.unlink(missing_ok=True)
                    total -= size
            os.ftruncate(file, num_bytes)
        finally:
            os.close(lock)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


def _open_unchanged(path: Path, num_bytes: int) -> int | None:
    """A file as it was fetched, marked as used now by its time of access; None where it is not there."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    status = os.fstat(file)
    if (status.st_size, status.st_mtime_ns) == (num_bytes, _TIME_OF_CHANGE):
        with contextlib.suppress(OSError):  # another user's file: it only goes sooner
            os.utime(file, ns=(time.time_ns(), status.st_mtime_ns))
        return file
    os.close(file)
    return None


def _copy(store: Store, name: str, file: int, num_bytes: int, sha256: str) -> None:
    digest, offset = hashlib.sha256(), 0
    with store.open(name) as source:
        while content := source.read(_NUM_BYTES_AT_ONCE):
            digest.update(content)
            if (offset := offset + len(content)) <= num_bytes:
                _write(file, content, offset - len(content))
    if offset != num_bytes:
        raise ShardError(f"{store.name_of(name)}: has {offset} bytes, expected {num_bytes}")
    if digest.hexdigest() != sha256:
        actual = digest.hexdigest()[:16]
        raise ShardError(f"{store.name_of(name)}: sha256 is {actual}…, expected {sha256[:16]}…")
    os.fsync(file)


def _write(file: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _is_file_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_abandoned(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        file = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that fetches holds it
            if _is_file_at(file, temporary):
                temporary.unlink()
        finally:
            os.close(file)
