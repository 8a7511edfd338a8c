"""What the cache's files are: their header, their digest, the list of them. Nothing here needs torch."""

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablerep.data import verification

SUFFIX = ".safetensors"
DIGESTS_FOLDER = "digests"
# Only these are ever listed or removed, should the folder hold other things.
CACHED_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
DIGESTS_NAME = re.compile(r"[0-9a-f]{32}\.parquet")
TEMPORARY_NAME = re.compile(r"\.([0-9a-f]{64}\.safetensors|[0-9a-f]{32}\.parquet)\.[0-9]+\.[0-9a-f]+\.tmp")
SCHEMA_VERSION = 3

_DIGEST = "sha256"
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound
_BLOCK_BYTES = 1 << 22


class DamagedFileError(ValueError):
    """A cached file is not what was written; the message names it."""


def default_cache_folder() -> str:
    """`$STABLEREP_CACHE`, or `stablerep/features` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return os.environ.get("STABLEREP_CACHE") or str(verification.default_cache_folder() / "features")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its type as safetensors names it, its shape, its place behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Args:
        metadata: What the values are of.
        tensors: What the file holds, by name.
        num_bytes: Of the header with its length, which the data follow.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    num_bytes: int


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache.

    Args:
        path: The file.
        num_bytes: Its size.
        last_used: When it was last read or written, seconds since 1970.
    """

    path: Path
    num_bytes: int
    last_used: float

    @property
    def key(self) -> str:
        """What it is found by."""
        return self.path.name.removesuffix(SUFFIX)


def temporary_name(name: str) -> str:
    """What a file is called until it is whole: a name of this process and call alone."""
    return f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def list_files(folder: Path, name: re.Pattern[str] = CACHED_NAME) -> list[CachedFile]:
    """The cache's files of such a name, the last used first; none where the folder is missing."""
    files = []
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    for entry in entries:
        if name.fullmatch(entry.name) and entry.is_file():
            status = entry.stat()
            files.append(CachedFile(Path(entry.path), status.st_size, status.st_mtime))
    return sorted(files, key=lambda file: (-file.last_used, file.path.name))


def read_header(path: Path) -> Header:
    """The header of a cached file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it has no header, or one that does not fit the file.
    """
    with open(path, "rb") as file:
        try:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            content = json.loads(file.read(length))
            metadata = {str(name): str(value) for name, value in content.pop("__metadata__").items()}
            tensors = {
                name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in content.items()
            }
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{path} is damaged: no header ({error})") from error
        num_bytes = _LENGTH.size + length
        expected = num_bytes + max((tensor.end for tensor in tensors.values()), default=0)
        if (actual := os.fstat(file.fileno()).st_size) != expected:
            raise DamagedFileError(f"{path} is damaged: it has {actual} bytes, expected {expected}")
    return Header(metadata, tensors, num_bytes)


def digest_content(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[Any]]]
) -> str:
    """SHA-256 over metadata, names, types, shapes and bytes, 64 hex digits.

    Args:
        metadata: All of it but the digest itself.
        tensors: Name, type, shape and blocks of bytes of each.
    """
    digest = hashlib.sha256()
    described = {name: value for name, value in metadata.items() if name != _DIGEST}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name, dtype, shape, blocks in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(json.dumps([name, dtype, list(shape)]).encode())
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()


def verify_file(path: Path) -> Header:
    """The header of a file that is what was written.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not what was written.
    """
    header = read_header(path)
    with open(path, "rb") as file:
        actual = digest_content(
            header.metadata,
            (
                (name, tensor.dtype, tensor.shape, _read_blocks(file, header.num_bytes, tensor))
                for name, tensor in header.tensors.items()
            ),
        )
    recorded = header.metadata.get(_DIGEST, "")
    if actual != recorded:
        raise DamagedFileError(
            f"{path} is damaged: sha256 is {actual[:16]}…, expected {recorded[:16] or 'none'}…"
        )
    return header


def _read_blocks(file: Any, start: int, tensor: StoredTensor) -> Iterator[bytes]:
    file.seek(start + tensor.start)
    rest = tensor.end - tensor.start
    while rest > 0:
        block = file.read(min(rest, _BLOCK_BYTES))
        if not block:
            return
        rest -= len(block)
        yield block


def format_bytes(num_bytes: int) -> str:
    """As people read it: 1.5 GB."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns side by side, each as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[*head], ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
