"""Files on a local disk, written once (`data_gen.storage.Store`).

A file is written under a temporary name in its own folder, flushed to the disk, and linked to its name, which
fails where that is taken.
"""

import builtins
import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

_NUM_TRIES = 10
_Value = TypeVar("_Value")

TEMPORARY_NAME = re.compile(r"\..+\.\d+\.tmp")


class LocalFiles:
    """A folder on a disk that has hard links."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def name_of(self, name: str) -> str:
        return str(self.root / name)

    def size(self, name: str) -> int | None:
        try:
            status = (self.root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, name: str) -> bytes:
        with self._naming(name):
            return (self.root / name).read_bytes()

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        with self._naming(name), (self.root / name).open("rb", buffering=0) as file:
            content = b""
            while len(content) < num_bytes:
                chunk = os.pread(file.fileno(), num_bytes - len(content), offset + len(content))
                if not chunk:
                    size = os.fstat(file.fileno()).st_size
                    asked = f"{num_bytes} bytes from {offset} on were asked for"
                    raise OSError(f"{self.name_of(name)}: {asked}, it has {size}")
                content = content + chunk if content else chunk
            return content

    def open(self, name: str) -> IO[bytes]:
        return (self.root / name).open("rb")

    def list(self, folder: str, recursive: bool) -> builtins.list[str]:
        def fail(error: OSError) -> None:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise error

        names = []
        for parent, folders, files in os.walk(self.root / folder, onerror=fail):
            prefix = PurePosixPath(Path(parent).relative_to(self.root))
            names += [str(prefix / file) for file in files]
            if not recursive:
                folders.clear()
        return names

    def modified_seconds_ago(self, name: str) -> float | None:
        try:
            modified = (self.root / name).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None
        return max(0.0, self._now() - modified)

    def _now(self) -> float:
        """The time that this disk stamps on a file; of this machine where nothing can be written."""
        path = self.root / temporary_name("clock")
        try:
            path.touch(exist_ok=False)
            return path.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        path = self.root / name
        _make_folder(path.parent)
        temporary = path.with_name(temporary_name(path.name))
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def publish(self, name: str, content: bytes | Path) -> bool:
        return _despite_removals(lambda: self._publish(name, content))

    def _publish(self, name: str, content: bytes | Path) -> bool:
        path = self.root / name
        if os.path.lexists(path):
            return False
        with self._naming(name), self.temporary(name) as temporary:
            if isinstance(content, Path) and self._is_temporary_beside(content, path):
                temporary = content
                _flush(temporary)
            else:
                _write_flushed(temporary, content)
            is_published = self._link(temporary, path)
            temporary.unlink(missing_ok=True)
        if is_published:
            _flush_folder(path.parent)
        return is_published

    def replace(self, name: str, content: bytes | Path) -> None:
        _despite_removals(lambda: self._replace(name, content))

    def _replace(self, name: str, content: bytes | Path) -> None:
        path = self.root / name
        with self._naming(name), self.temporary(name) as temporary:
            _write_flushed(temporary, content)
            os.replace(temporary, path)
        _flush_folder(path.parent)

    def move(self, name: str, new_name: str) -> None:
        path, new_path = self.root / name, self.root / new_name
        _make_folder(new_path.parent)
        os.rename(path, new_path)
        for folder in {new_path.parent, path.parent}:
            _flush(folder)

    def delete(self, name: str, missing_ok: bool) -> None:
        path = self.root / name
        try:
            path.unlink()
        except FileNotFoundError:
            if not missing_ok:
                raise
        else:
            _flush_folder(path.parent)

    def probe(self, name: str) -> tuple[bool, bool]:
        _make_folder(self.root)
        return self.publish(name, b"first"), self.publish(name, b"second")

    def remove_stale_temporaries(self) -> int:
        stale = [
            Path(parent, name)
            for parent, _, names in os.walk(self.root)
            for name in names
            if TEMPORARY_NAME.fullmatch(name) and is_of_dead_process(name.removesuffix(".tmp"))
        ]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)

    @staticmethod
    def _is_temporary_beside(file: Path, path: Path) -> bool:
        return bool(TEMPORARY_NAME.fullmatch(file.name)) and os.path.samefile(file.parent, path.parent)

    @staticmethod
    def _link(temporary: Path, path: Path) -> bool:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A network disk may have answered a link that it made already.
            return os.path.lexists(path) and os.path.samefile(temporary, path)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise OSError(
                    f"{path.parent} is on a file system without hard links, by which a file gets its name "
                    f"only where that is free ({error.strerror}); choose a folder on another one"
                ) from error
            raise
        return True

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Adds the file to errors that do not name one, such as that of a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = self.name_of(name)
            raise


def _despite_removals(call: Callable[[], _Value]) -> _Value:
    """Calls again where another process removed an empty folder before the first file was in it."""
    for _ in range(_NUM_TRIES):
        with contextlib.suppress(FileNotFoundError):
            return call()
    return call()


def temporary_name(name: str) -> str:
    """`.{name}.{random}.{host}.{pid}.tmp`: unseen by readers, written by no other process, thread or call."""
    return f".{name}.{secrets.token_hex(4)}.{socket.gethostname()}.{os.getpid()}.tmp"


def is_of_dead_process(stem: str) -> bool:
    """Whether a name that ends in `.{host}.{pid}` is of this host, and of a process that no longer runs."""
    rest, _, process = stem.rpartition(".")
    if not rest.endswith(f".{socket.gethostname()}") or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents, durably.

    Raises:
        FileNotFoundError: Another process removed one of them meanwhile.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # also where it was there for `mkdir`, and no more for the look at it
        if folder.exists() and not folder.is_dir():
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder)) from error
    for path in missing:
        _flush(path.parent)


def _flush(path: Path) -> None:
    """Waits until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Waits until a folder's list of files is on the disk; it may have gone with its last file."""
    with contextlib.suppress(FileNotFoundError):
        _flush(folder)


def _write_flushed(path: Path, content: bytes | Path) -> None:
    with path.open("xb") as file:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
