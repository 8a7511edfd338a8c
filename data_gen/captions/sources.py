"""The files that captions are read from: paths, globs and fsspec URLs.

The formats are those of `data_gen.captions.rows`; text formats may be gzipped (`.gz`).
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from data_gen.captions.rows import READERS, Columns, RowBatch, check_values
from data_gen.storage import open_filesystem

_PACKABLE_FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson")
_NUM_BYTES_PER_BLOCK = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file of captions.

    Args:
        name: As it was given, or as a glob found it.
        num_bytes: Its size; None where a server does not say and it was not read to its end.
        sha256: Digest of its bytes (packed, if it is); None where it was not read to its end.
    """

    name: str
    num_bytes: int | None
    sha256: str | None


def expand_sources(patterns: Sequence[str]) -> list[str]:
    """Files of paths, globs and fsspec URLs: in the order given, those of a glob sorted by name.

    Raises:
        FileNotFoundError: One of them names no file.
        ValueError: One is a folder, of no known format, or named twice.
    """
    if not patterns:
        raise ValueError("captions must name at least one file")
    names = [name for pattern in patterns for name in _expand(pattern)]
    seen: set[tuple[str, str]] = set()
    for name in names:
        _format_of(name)
        identity = _identity_of(name)
        if identity in seen:
            raise ValueError(f"caption file {name} is named twice")
        seen.add(identity)
    return names


def digest_sources(patterns: Sequence[str]) -> tuple[SourceFile, ...]:
    """Sizes and digests of the files' bytes, by which an unchanged input is known again.

    Raises:
        FileNotFoundError, ValueError: As `expand_sources`.
    """
    return tuple(map(_digest, expand_sources(patterns)))


def measure_source(name: str) -> SourceFile:
    """A file that is not read to its end: its size alone."""
    filesystem, path = open_filesystem(name)
    return SourceFile(name, filesystem.size(path), None)


def read_rows(name: str, columns: Columns) -> Iterator[RowBatch]:
    """Streams the rows of one file; the same bytes make the same batches.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, lacks a column, or holds what is no caption; names file and row.
    """
    with _open(name) as file:
        for batch in READERS[_format_of(name)](file, name, columns):
            check_values(batch, columns)
            yield batch


def _expand(pattern: str) -> list[str]:
    filesystem, path = open_filesystem(pattern)
    if filesystem.isfile(path):
        return [pattern]
    if filesystem.isdir(path):
        raise ValueError(
            f"caption file {pattern} is not a file; the files of a folder are named by {pattern}/*"
        )
    found = filesystem.glob(path, detail=True) if any(character in path for character in "*?[") else {}
    matches = [name for name in sorted(found) if found[name]["type"] == "file" or filesystem.isfile(name)]
    if not matches:
        raise FileNotFoundError(f"caption file {pattern} does not exist")
    return [filesystem.unstrip_protocol(match) for match in matches] if "://" in pattern else matches


def _format_of(name: str) -> str:
    """The suffix that says how a file is read, without `.gz`."""
    path = PurePosixPath(name.lower())
    is_packed = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if is_packed else path.suffix
    if suffix == ".tgz" or (is_packed and suffix == ".tar"):
        raise ValueError(f"caption file {name}: compressed tars are not read, unpack it to .tar")
    if suffix not in (_PACKABLE_FORMATS if is_packed else READERS):
        raise ValueError(
            f"caption file {name}: the name must end in one of {', '.join(READERS)}; "
            f"{', '.join(_PACKABLE_FORMATS)} may be followed by .gz"
        )
    return suffix


def _identity_of(name: str) -> tuple[str, str]:
    """Equal for two names of one file."""
    filesystem, path = open_filesystem(name)
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    return protocol, os.path.realpath(path) if protocol == "file" else path


def _digest(name: str) -> SourceFile:
    filesystem, path = open_filesystem(name)
    digest, num_bytes = hashlib.sha256(), 0
    with filesystem.open(path, "rb") as file:
        while block := file.read(_NUM_BYTES_PER_BLOCK):
            digest.update(block)
            num_bytes += len(block)
    return SourceFile(name, num_bytes, digest.hexdigest())


@contextmanager
def _open(name: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where it is gzipped."""
    filesystem, path = open_filesystem(name)
    if not filesystem.isfile(path):
        raise FileNotFoundError(f"caption file {name} does not exist")
    if filesystem.size(path) == 0:
        raise ValueError(f"caption file {name} holds no caption (0 bytes)")
    with filesystem.open(path, "rb") as file:
        if not name.lower().endswith(".gz"):
            yield file
            return
        try:
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]  # a GzipFile reads as a BinaryIO does
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"caption file {name} is not a whole gzip file ({error})") from error
