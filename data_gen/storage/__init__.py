"""A folder of files that are written once: on a local disk, or in an object store behind an fsspec URL.

A file appears under its name whole, or not at all, and the first writer of a name wins. How that is done on a
disk is in `data_gen.storage.local`, how in an object store, and what is tried again, in
`data_gen.storage.remote`. Local folders, `memory://` and `s3://` are what the tests run on; the other schemes
rest on the same calls.

Threads may share a `Store`. Processes may too: it pickles as its URL, and opens its connections anew in a
process that was spawned or forked; but fork while no other thread is inside a call, as with any lock.
"""

import contextlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

from data_gen.storage.local import TEMPORARY_NAME, LocalFiles, temporary_name
from data_gen.storage.remote import (
    LOCAL_SCHEMES,
    SCHEMES,
    RemoteFiles,
    is_url,
    open_filesystem,
    parse_url,
    read_digest,
)

__all__ = ["SCHEMES", "Store", "open_filesystem"]


class Store:
    """A folder of files that are written once. It need not exist; parents are made as they are needed.

    Names are relative to it and may lead through folders: `00000.tar`, `captions/00000.parquet`.
    Stores are equal if their URLs are. Making one reaches nothing, neither disk nor network.

    Args:
        url: Local path, or URL of one of `SCHEMES`.

    Raises:
        ValueError: The URL is chained, names no folder, or its scheme is not one of `SCHEMES`.
    """

    def __init__(self, url: str | Path) -> None:
        scheme, location = parse_url(str(url))
        self._files: LocalFiles | RemoteFiles
        if scheme in LOCAL_SCHEMES:
            self._files = LocalFiles(Path(location))
            self.url = f"{scheme}://{location}" if is_url(url) else location
        else:
            self._files = RemoteFiles(scheme, location)
            self.url = location

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The last component of its path."""
        return self.local_path.resolve().name if self.is_local else self.url.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine, or one mounted here."""
        return isinstance(self._files, LocalFiles)

    @property
    def local_path(self) -> Path:
        """The folder of a local store.

        Raises:
            ValueError: The store is not local.
        """
        if not isinstance(self._files, LocalFiles):
            raise ValueError(f"{self.url} is not a local folder")
        return self._files.root

    def name_of(self, name: str) -> str:
        """What people call a file of it: the full path or URL."""
        return self._files.name_of(_check_name(name))

    def exists(self, name: str) -> bool:
        """Whether the file is there; a folder is none."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Its size in bytes, None where it is missing."""
        return self._files.size(_check_name(name))

    def read(self, name: str) -> bytes:
        """The whole file, of exactly the size that the store names.

        Raises:
            FileNotFoundError: It is missing.
            OSError: It could not be read, or not whole.
        """
        return self._files.read(_check_name(name))

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Exactly `num_bytes` bytes from `offset` on.

        Raises:
            FileNotFoundError: It is missing.
            OSError: It could not be read, or ends before.
        """
        if offset < 0 or num_bytes < 0:
            raise ValueError(f"offset and num_bytes must be >= 0, got {offset} and {num_bytes}")
        return self._files.read_range(_check_name(name), offset, num_bytes)

    def open(self, name: str) -> IO[bytes]:
        """The file for reading, front to back or at any place: plain `open()` on a local disk.

        A remote file fetches ahead while it is read on, and little after a jump; an answer that ends early is
        asked for again. For a few bytes here and there, prefer `read_range`.

        Raises:
            FileNotFoundError: It is missing.
        """
        return self._files.open(_check_name(name))

    def list(self, folder: str = "", *, recursive: bool = False) -> list[str]:
        """Names of the files in a folder, relative to the store, sorted, fresh, without temporary files.

        Args:
            folder: Where to look; the store's own folder by default.
            recursive: Whether to look into the folders in it as well.

        Returns:
            The names; none where there is no such folder.
        """
        names = self._files.list(_check_name(folder) if folder else "", recursive)
        return sorted(name for name in names if not TEMPORARY_NAME.fullmatch(PurePosixPath(name).name))

    def modified_seconds_ago(self, name: str) -> float | None:
        """Seconds since the file was written, by the store's own clock if it has one; None if missing.

        A local folder's clock is that of the time stamps made in it (on a network disk the server's), S3's
        the date of its answers (whole seconds).
        """
        return self._files.modified_seconds_ago(_check_name(name))

    def temporary(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write a file to before `publish(name, path)`; removed at the end if still there.

        For a local store it is in the folder of `name`, so that publishing it moves no bytes; otherwise in a
        new folder where this machine keeps temporary files (`TMPDIR`).
        """
        return self._files.temporary(_check_name(name))

    def publish(self, name: str, content: bytes | Path) -> bool:
        """Puts a file under its name if the name is free: whole, durable, and the first writer wins.

        Args:
            name: Where to.
            content: The bytes, or a local file that holds them. One from `temporary` is moved if the store is
                local; every other file stays as it is.

        Returns:
            Whether this call put it there. Where the name was taken, what was there stays, and it is False.
            On an object store other than S3, a rival's file of equal content counts as one's own.

        Raises:
            OSError: It could not be written. Nothing of it is under the name then, unless an object store
                kept failing after it had taken the file.
        """
        return self._files.publish(_check_name(name), content)

    def replace(self, name: str, content: bytes | Path) -> None:
        """Puts a file there, over an older one; readers see one of the two, whole."""
        self._files.replace(_check_name(name), content)

    def move(self, name: str, new_name: str) -> None:
        """Renames a file, over an older one: in one step on a local disk, by copy and delete otherwise.

        Raises:
            FileNotFoundError: There is no file `name`.
        """
        self._files.move(_check_name(name), _check_name(new_name))

    def delete(self, name: str, missing_ok: bool = True) -> None:
        """Removes a file.

        Raises:
            FileNotFoundError: It is missing, and `missing_ok` is false.
        """
        self._files.delete(_check_name(name), missing_ok)

    def digest(self, name: str) -> tuple[int, str]:
        """Size in bytes and sha256 of a file, read front to back."""
        with self.open(name) as file:
            return read_digest(file)

    def probe(self) -> None:
        """Makes the folder, writes twice under one name, and removes what it wrote.

        Raises:
            OSError: It cannot be written, or the store replaces a file where only a new one was asked for.
        """
        name = temporary_name("probe")
        try:
            first, second = self._files.probe(name)
            is_kept = self.read(name) == b"first"
        except OSError as error:
            raise OSError(f"output {self.url} cannot be written: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                self.delete(name)
        if not (first and not second and is_kept):
            raise OSError(
                f"output {self.url}: the store replaces a file where only a new one was asked for, so two "
                "workers could mix their files"
            )

    def remove_stale_temporaries(self) -> int:
        """Deletes what killed processes of this host left under temporary names.

        Hosts are told apart by name: containers that share a folder need host names of their own. S3 keeps,
        unseen, the parts of uploads that a kill interrupted; a lifecycle rule of the bucket
        (AbortIncompleteMultipartUpload) removes them.

        Returns:
            Number of files deleted.
        """
        return self._files.remove_stale_temporaries()


def _check_name(name: str) -> str:
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(
            f"a name in a store must be relative, without empty parts, '.' or '..', got {name!r}"
        )
    return name
