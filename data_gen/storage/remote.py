"""Files in an object store behind an fsspec URL, written once (`data_gen.storage.Store`).

A file is published by one exclusive put (S3: `If-None-Match: *`, for a large file when its parts are
completed); `Store.probe` has the store prove that it honours it. What may pass (5xx, timeouts, broken
connections, answers that end early) is tried again after a pause that doubles; what will not (404, 403, a
name that is taken) is not. An operation is tried `NUM_TRIES` times at most.
"""

import builtins
import contextlib
import email.utils
import hashlib
import io
import os
import random
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast

from data_gen.storage.local import is_of_dead_process

NUM_TRIES = 5
"""How often an operation on an object store is tried."""
NUM_REQUESTS_PER_TRY = 3
"""How often S3's client sends a request within a try, so that a lost part does not cost a whole upload."""
SECONDS_BEFORE_SECOND_TRY = 0.5
"""The mean pause before the second try; it doubles from try to try, and is drawn anew each time."""
PART_NUM_BYTES = 16 << 20
"""Size of one part of an upload to S3 (5 MiB to 5 GiB); a file of two parts or more goes up in parts."""
NUM_PARTS_AT_ONCE = 4
"""Parts held in memory and under way at the same time, of one upload."""
MIN_READ_NUM_BYTES, MAX_READ_NUM_BYTES = 64 << 10, 8 << 20
"""What a remote file fetches after a jump, and at most while it is read front to back."""

_S3_SCHEMES = ("s3", "s3a")
_WRITABLE_SCHEMES = (*_S3_SCHEMES, "gs", "gcs", "az", "abfs", "abfss", "memory")
LOCAL_SCHEMES = ("file", "local")
SCHEMES = (*LOCAL_SCHEMES, *_WRITABLE_SCHEMES, "hf", "http", "https", "sftp")
"""What a URL may begin with; the last four can be read only, as they have no exclusive put."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)(.*)", re.DOTALL)  # Path() leaves one slash of two
_MAX_NUM_PARTS = 10_000
_MARK = "publication"
_MEMORY_LOCK = threading.Lock()  # `memory://` looks and writes in two steps
_RANDOM = random.SystemRandom()  # pauses are no part of any seeded stream
_Value = TypeVar("_Value")


class WrongLengthError(OSError):
    """An answer of more or fewer bytes than asked for; the next may be right."""


class PastEndError(OSError):
    """Bytes were asked for that the file does not have."""


_FINAL_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    io.UnsupportedOperation,
    PastEndError,
)
# S3: an upload that was completed or aborted by a request whose answer was lost; bodies that arrived damaged.
_CODES_THAT_PASS = (
    "NoSuchUpload",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "RequestTimeout",
)
_STATUSES_THAT_PASS = (408, 409, 425, 429, 500, 502, 503, 504)


def parse_url(url: str) -> tuple[str, str]:
    """Its scheme (`file` for a path), and the local path or the URL without a slash too many or too few."""
    if "::" in url:
        raise ValueError(f"{url}: chained URLs (::) are not opened")
    match = _URL.fullmatch(url)
    if match is None:
        if not url:
            raise ValueError("the URL or path of a folder must not be empty")
        return "file", str(Path(url))
    scheme, rest = match[1].lower(), match[3]
    if scheme not in SCHEMES:
        raise ValueError(f"{url}: the scheme must be one of {', '.join(SCHEMES)}, got {scheme}")
    if scheme in LOCAL_SCHEMES:
        if match[2] and not rest.startswith("/"):
            raise ValueError(f"{url}: a {scheme} URL must name an absolute path: {scheme}:///{rest}")
        return scheme, str(Path("/", rest.lstrip("/")))
    if not rest.strip("/"):
        raise ValueError(f"{url}: the URL must name a bucket or folder")
    return scheme, f"{scheme}://{rest.strip('/')}"


def is_url(url: str | Path) -> bool:
    """Whether it is a URL, rather than a path; also one that lost a slash in a `Path`."""
    return _URL.match(str(url)) is not None


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, without a cache of listings, and the path in it.

    Raises:
        ValueError: The URL is chained, or its scheme is not one of `SCHEMES`.
        OSError: The scheme's package is not installed; the message names it.
    """
    scheme, url = parse_url(url)
    import fsspec  # type: ignore[import-untyped]  # it ships none; who works on a local disk needs it not

    options: dict[str, Any] = {}
    if scheme not in LOCAL_SCHEMES:
        options["use_listings_cache"] = False
    if scheme in _S3_SCHEMES:
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        retries = {"mode": "standard", "total_max_attempts": NUM_REQUESTS_PER_TRY}
        options["config_kwargs"] = {"retries": retries, **configured}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise OSError(f"{url} cannot be opened: {error}") from error
    if scheme in _S3_SCHEMES:
        filesystem.retries = 1  # s3fs's own tries would multiply with those of its client and of `Store`
    return filesystem, path


class RemoteFiles:
    """A prefix of an object store."""

    def __init__(self, scheme: str, url: str) -> None:
        self._scheme, self._url, self._is_s3 = scheme, url, scheme in _S3_SCHEMES
        self._opened: tuple[int, Any, str] | None = None

    def name_of(self, name: str) -> str:
        return f"{self._url}/{name}"

    def size(self, name: str) -> int | None:
        try:
            return self._try("asking for the size", name, self._size_at)
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        def read(filesystem: Any, path: str) -> bytes:
            if self._is_s3:
                # One answer, whose length the client compares with its header.
                return bytes(filesystem.cat_file(path, max_concurrency=1))
            size = self._size_at(filesystem, path)
            content = bytes(filesystem.cat_file(path))
            if len(content) != size:
                raise WrongLengthError(f"{len(content)} bytes came, {size} expected")
            return content

        return self._try("reading", name, read)

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        def read(filesystem: Any, path: str) -> bytes:
            try:
                content = bytes(filesystem.cat_file(path, start=offset, end=offset + num_bytes))
            except Exception as error:
                if _answer(error)[1] != 416:
                    raise
                content = b""
            if len(content) != num_bytes:
                size = self._size_at(filesystem, path)
                if offset + num_bytes > size:
                    raise PastEndError(f"{num_bytes} bytes from {offset} on were asked for, it has {size}")
                raise WrongLengthError(f"{len(content)} bytes came, {num_bytes} expected")
            return content

        return self._try("reading", name, read) if num_bytes else b""

    def open(self, name: str) -> IO[bytes]:
        size = self._try("opening", name, self._size_at)
        file = _RemoteFile(self.name_of(name), size, lambda *span: self.read_range(name, *span))
        return cast(IO[bytes], file)

    def list(self, folder: str, recursive: bool) -> builtins.list[str]:
        def find(filesystem: Any, path: str) -> builtins.list[str]:
            # fsspec's own `find` takes a folder that it could not list for an empty one; that of S3 does not,
            # and asks once for all folders.
            if recursive and self._is_s3:
                return list(filesystem.find(path))
            return list(_walk(filesystem, path, recursive))

        _, root = self._filesystem()
        try:
            paths = self._try("listing", folder, find)
        except FileNotFoundError:
            self._check_root()
            return []
        prefix = f"{root}/{folder}/" if folder else f"{root}/"
        return [path[len(root) + 1 :] for path in paths if path.startswith(prefix) and path[-1] != "/"]

    def _check_root(self) -> None:
        """Tells a folder that holds nothing from a bucket that does not exist."""
        if self._is_s3:
            bucket = self._filesystem()[1].partition("/")[0]
            self._try("listing", "", lambda filesystem, _: filesystem.call_s3("head_bucket", Bucket=bucket))

    def modified_seconds_ago(self, name: str) -> float | None:
        def age(filesystem: Any, path: str) -> float:
            if self._is_s3:
                head = _head(filesystem, path)
                now = email.utils.parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
                return float((now - head["LastModified"]).total_seconds())
            try:
                return float((datetime.now(UTC) - filesystem.modified(path)).total_seconds())
            except NotImplementedError as error:
                raise io.UnsupportedOperation("the store does not tell when a file was written") from error

        try:
            return max(0.0, self._try("asking for the age", name, age))
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=f"data_gen.{socket.gethostname()}.{os.getpid()}."))
        try:
            yield folder / PurePosixPath(name).name
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, name: str, content: bytes | Path) -> bool:
        self._check_writable()
        if _num_bytes(content) >= 2 * PART_NUM_BYTES and self.size(name) is not None:
            return False
        mark = secrets.token_hex(16)
        try:
            self._try("publishing", name, lambda filesystem, path: self._put(filesystem, path, content, mark))
        except FileExistsError:
            # By a rival; or by this very call, where the answer to a request was lost and it was sent again.
            return self._is_own(name, content, mark)
        return True

    def replace(self, name: str, content: bytes | Path) -> None:
        self._check_writable()
        options = self._put_options(_num_bytes(content))

        def put(filesystem: Any, path: str) -> None:
            if isinstance(content, Path):
                filesystem.put_file(str(content), path, **options)
            else:
                filesystem.pipe_file(path, content, **options)

        self._try("writing", name, put)

    def move(self, name: str, new_name: str) -> None:
        self._check_writable()
        if new_name == name:  # S3 refuses to copy a file to itself
            self._try("moving", name, self._size_at)
            return
        new_path = f"{self._filesystem()[1]}/{new_name}"
        self._try("moving", name, lambda filesystem, path: filesystem.cp_file(path, new_path))
        self.delete(name, True)

    def delete(self, name: str, missing_ok: bool) -> None:
        self._check_writable()
        if not missing_ok and self.size(name) is None:
            raise FileNotFoundError(f"{self.name_of(name)}: no such file")
        with contextlib.suppress(FileNotFoundError):
            self._try("deleting", name, lambda filesystem, path: filesystem.rm_file(path))

    def probe(self, name: str) -> tuple[bool, bool]:
        first, second = self.publish(name, b"first"), self.publish(name, b"second")
        if self._is_s3:
            self._try("publishing in parts", name, _complete_over)
        return first, second

    def remove_stale_temporaries(self) -> int:
        folders = Path(tempfile.gettempdir()).glob(f"data_gen.{socket.gethostname()}.*.*")
        stale = [folder for folder in folders if is_of_dead_process(folder.name.rpartition(".")[0])]
        for folder in stale:
            shutil.rmtree(folder, ignore_errors=True)
        return sum(not folder.exists() for folder in stale)

    def _filesystem(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            filesystem, path = open_filesystem(self._url)
            self._opened = (os.getpid(), filesystem, path.rstrip("/"))
        return self._opened[1:]

    def _size_at(self, filesystem: Any, path: str) -> int:
        if self._is_s3:
            return int(_head(filesystem, path)["ContentLength"])
        info = filesystem.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        if info["size"] is None:
            raise io.UnsupportedOperation("the store does not tell the size of a file")
        return int(info["size"])

    def _check_writable(self) -> None:
        if self._scheme not in _WRITABLE_SCHEMES:
            raise OSError(
                f"{self._url} can only be read: {self._scheme} has no put that leaves a file that is there; "
                f"the scheme must be one of {', '.join(_WRITABLE_SCHEMES)}"
            )

    def _put(self, filesystem: Any, path: str, content: bytes | Path, mark: str) -> None:
        """One exclusive put; FileExistsError where the name is taken."""
        options = self._put_options(_num_bytes(content))
        if self._is_s3:
            options["Metadata"] = {_MARK: mark}
        try:
            if self._scheme == "memory":
                with _MEMORY_LOCK:
                    filesystem.pipe_file(path, _content_bytes(content), mode="create")
            elif isinstance(content, Path):
                filesystem.put_file(str(content), path, mode="create", **options)
            else:
                filesystem.pipe_file(path, content, mode="create", **options)
        except Exception as error:
            if _is_taken(error):
                raise FileExistsError(f"{self._url}: the name is taken") from error
            raise

    def _put_options(self, num_bytes: int) -> dict[str, Any]:
        if not self._is_s3:
            return {}
        part = max(PART_NUM_BYTES, -(-num_bytes // _MAX_NUM_PARTS))
        return {"chunksize": part, "max_concurrency": NUM_PARTS_AT_ONCE}

    def _is_own(self, name: str, content: bytes | Path, mark: str) -> bool:
        """Whether the file that is there is the one that this call sent."""
        if self._scheme == "memory":  # loses no answers
            return False
        try:
            if self._is_s3:
                return bool(self._try("publishing", name, _head)["Metadata"].get(_MARK) == mark)
            if self.size(name) != _num_bytes(content):
                return False
            with self.open(name) as file, _open_content(content) as sent:
                return read_digest(file) == read_digest(sent)
        except FileNotFoundError:  # deleted meanwhile
            return False

    def _try(self, what: str, name: str, call: Callable[[Any, str], _Value]) -> _Value:
        """Calls with the file system and the full path, again after a pause while the error may pass."""
        filesystem, root = self._filesystem()
        path, full_name = (f"{root}/{name}", self.name_of(name)) if name else (root, self._url)
        for attempt in range(NUM_TRIES):
            try:
                return call(filesystem, path)
            except Exception as error:
                if not isinstance(error, OSError) and type(error).__module__ == "builtins":
                    raise
                if not _may_pass(error):
                    kind = next((kind for kind in _FINAL_ERRORS if isinstance(error, kind)), OSError)
                    is_missing = kind is FileNotFoundError and path in str(error)  # fsspec's whole message
                    reason = "no such file" if is_missing else f"{what} failed: {error}"
                    raise kind(f"{full_name}: {reason}") from error
                failure = error
            if attempt + 1 < NUM_TRIES:
                time.sleep(SECONDS_BEFORE_SECOND_TRY * 2**attempt * (0.5 + _RANDOM.random()))
        raise OSError(
            f"{full_name}: {what} failed {NUM_TRIES} times, at last with {type(failure).__name__}: {failure}"
        ) from failure


class _RemoteFile(io.BufferedIOBase):
    """A remote file for reading. What it fetches at once doubles while it is read on, and starts small anew
    after a jump.

    Args:
        name: The file's full name.
        size: Its size in bytes.
        read_range: Reads exactly (offset, num_bytes).
    """

    def __init__(self, name: str, size: int, read_range: Callable[[int, int], bytes]) -> None:
        self.name, self._size, self._read_range = name, size, read_range
        self._position = self._start = 0
        self._buffer = b""
        self._window = MIN_READ_NUM_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check_open()
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"{self.name}: the position must be >= 0, got {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        self._check_open()
        left = max(0, self._size - self._position)
        num_bytes = left if size is None or size < 0 else min(size, left)
        if not 0 <= self._position - self._start <= len(self._buffer):
            self._start, self._buffer, self._window = self._position, b"", MIN_READ_NUM_BYTES
        skip = self._position - self._start
        content = self._buffer[skip : skip + num_bytes]
        self._position += len(content)
        if len(content) < num_bytes:
            content += self._fetch(num_bytes - len(content))
        return content

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size)

    def peek(self, size: int = 0, /) -> bytes:
        """The next bytes, some of them; lines are found with it."""
        first = self.read(1)
        self._position -= len(first)
        skip = self._position - self._start
        return self._buffer[skip : skip + max(size, 8192)] or first

    def _fetch(self, num_bytes: int) -> bytes:
        """The next bytes, of a new buffer that starts with them."""
        ahead = min(max(num_bytes, self._window), self._size - self._position)
        fetched = self._read_range(self._position, ahead)
        self._window = min(2 * self._window, MAX_READ_NUM_BYTES)
        content = fetched[:num_bytes]
        if num_bytes < ahead:
            self._start, self._buffer = self._position, fetched
            self._position += num_bytes
        else:  # nothing is left of it
            self._position += num_bytes
            self._start, self._buffer = self._position, b""
        return content

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.name}: the file is closed")


def _num_bytes(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _content_bytes(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _open_content(content: bytes | Path) -> IO[bytes]:
    return content.open("rb") if isinstance(content, Path) else io.BytesIO(content)


def read_digest(file: IO[bytes]) -> tuple[int, str]:
    digest, num_bytes = hashlib.sha256(), 0
    while chunk := file.read(1 << 20):
        digest.update(chunk)
        num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def _walk(filesystem: Any, path: str, recursive: bool) -> Iterator[str]:
    for entry in filesystem.ls(path, detail=True):
        if entry["type"] != "directory":
            yield entry["name"]
        elif recursive and entry["name"].rstrip("/") != path.rstrip("/"):
            yield from _walk(filesystem, entry["name"], recursive)


def _head(filesystem: Any, path: str) -> Any:
    """S3's own answer about an object, with its metadata and the server's date."""
    bucket, key, _ = filesystem.split_path(path)
    return filesystem.call_s3("head_object", Bucket=bucket, Key=key)


def _complete_over(filesystem: Any, path: str) -> None:
    """Tries to put an object of one part over one that is there, where only a new one is asked for (S3)."""
    bucket, key, _ = filesystem.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    place["UploadId"] = filesystem.call_s3("create_multipart_upload", **place)["UploadId"]
    part = filesystem.call_s3("upload_part", **place, PartNumber=1, Body=b"third")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    try:
        filesystem.call_s3("complete_multipart_upload", **place, MultipartUpload=parts, IfNoneMatch="*")
    except OSError as error:
        filesystem.call_s3("abort_multipart_upload", **place)
        if not _is_taken(error):
            raise


def _is_taken(error: Exception) -> bool:
    """Whether an exclusive put found a file; many stores do not say which condition failed."""
    code, status = _answer(error)
    return isinstance(error, FileExistsError) or code == "PreconditionFailed" or status == 412


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed."""
    code, status = _answer(error)
    if code in _CODES_THAT_PASS:
        return True
    if isinstance(error, _FINAL_ERRORS):
        return False
    if status is not None:
        return status in _STATUSES_THAT_PASS
    return isinstance(error, (OSError, *_network_errors()))


def _answer(error: Exception) -> tuple[str | None, int | None]:
    """Code and HTTP status of the answer behind an error, of any of the stores' packages."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)  # botocore
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return response.get("Error", {}).get("Code"), status
    statuses = (
        getattr(error, name, None) for name in ("status", "status_code", "code")
    )  # aiohttp, azure, gcsfs
    return None, next((status for status in statuses if isinstance(status, int)), None)


def _network_errors() -> tuple[type[Exception], ...]:
    """What the packages in use raise, beside OSError, when a connection fails."""
    names = {
        "aiohttp": ("ClientError",),
        "azure.core.exceptions": ("AzureError",),
        "botocore.exceptions": ("ConnectionError", "HTTPClientError", "IncompleteReadError"),
        "botocore.parsers": ("ResponseParserError",),
        "gcsfs.retry": ("HttpError",),
        "urllib3.exceptions": ("HTTPError",),
    }
    used = [
        (sys.modules[module], name) for module in names if module in sys.modules for name in names[module]
    ]
    return tuple(getattr(module, name) for module, name in used)
