"""What the pages show of a shard: its captions with their values, the captions that failed, or its damage."""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_gen.browse.thumbnails import PictureFolder
from data_gen.shard_writer import IMAGE_COLUMNS
from data_gen.shards import (
    DatasetManifest,
    Shard,
    ShardError,
    check_sizes,
    read_samples,
    read_shard,
    read_stats,
)
from data_gen.storage import Store

Value = str | int | float | None

FILTERED_COLUMNS = ("guidance_scale",)
"""Columns of every dataset that have a filter, beside the dataset's own."""
_READ_COLUMNS = ("key", "index", "image_seed", "sha256", "fingerprint")
_MAX_EXACT_INTEGER = 2**53 - 1
"""Beyond it, JavaScript has no number for every integer."""


@dataclass(frozen=True)
class CaptionRow:
    """A caption as the pages show it.

    Args:
        key: Name of the sample in its tar.
        caption_id: Identity of the caption by content.
        caption: The caption.
        image_extension: `jpg`, `png` or `webp`.
        width: Width of its images in pixels.
        height: Height of its images in pixels.
        image_seeds: One an image.
        sha256: One an image.
        fingerprints: One an image.
        values: Column → one value an image.
    """

    key: str
    caption_id: str
    caption: str
    image_extension: str
    width: int
    height: int
    image_seeds: tuple[str, ...]
    sha256: tuple[str, ...]
    fingerprints: tuple[str, ...]
    values: Mapping[str, tuple[Value, ...]]


@dataclass(frozen=True)
class FailureRow:
    """A planned caption without images."""

    key: str
    caption_id: str
    caption: str
    reason: str
    shard_name: str


@dataclass(frozen=True)
class ShardContents:
    """What there is to show of a shard.

    Args:
        name: The shard.
        captions: In the order of the tar; none if the shard is damaged.
        failures: As its completion marker tells them.
        hidden_columns: Columns whose values are neither numbers nor text.
        is_missing: Whether it is not finished.
        problem: What is wrong with it, or None.
    """

    name: str
    captions: tuple[CaptionRow, ...] = ()
    failures: tuple[FailureRow, ...] = ()
    hidden_columns: tuple[str, ...] = ()
    is_missing: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class _ImageTable:
    """A shard's side-car: rows by (key, index), and the names of the columns that are shown, or are not."""

    rows: Mapping[tuple[str, int], Mapping[str, Any]]
    shown_columns: tuple[str, ...] = ()
    hidden_columns: tuple[str, ...] = field(default=())


def read_contents(
    store: Store, manifest: DatasetManifest, shard_index: int, pictures: PictureFolder
) -> ShardContents:
    """Reads a shard front to back, checked, and writes the pictures of its captions.

    A damaged shard leaves no pictures: which of its captions are sound is for `stablerep verify` to say.

    Args:
        store: The dataset's folder.
        manifest: Its plan.
        shard_index: Which shard.
        pictures: Where the images go.
    """
    name = manifest.shard_name(shard_index)
    failures: tuple[FailureRow, ...] = ()
    try:
        shard = read_shard(store, manifest, shard_index)
        if shard is None:
            return ShardContents(name, is_missing=True)
        failures = _read_failures(shard)
        check_sizes(shard)
        table = _read_image_table(shard)
        captions = _read_captions(shard, table, pictures)
    except ShardError as error:
        pictures.remove(name)
        return ShardContents(name, failures=failures, problem=str(error))
    return ShardContents(name, captions, failures, table.hidden_columns)


def _read_captions(shard: Shard, table: _ImageTable, pictures: PictureFolder) -> tuple[CaptionRow, ...]:
    captions = []
    for index, sample in enumerate(read_samples(shard)):
        try:
            rows = [table.rows[sample.key, image_index] for image_index in range(len(sample.images))]
        except KeyError as error:
            raise ShardError(f"{shard}: image {error.args[0]} has no row in {shard.parquet_name}") from error
        try:
            pictures.write(shard.name, index, sample)
        except ShardError as error:
            raise ShardError(f"{shard}: {error}") from error
        captions.append(
            CaptionRow(
                key=sample.key,
                caption_id=sample.caption_id,
                caption=sample.caption,
                image_extension=sample.image_extension,
                width=sample.width,
                height=sample.height,
                image_seeds=tuple(str(row["image_seed"]) for row in rows),
                sha256=tuple(str(row["sha256"]) for row in rows),
                fingerprints=tuple(str(row["fingerprint"]) for row in rows),
                values={name: tuple(_simplify(row[name]) for row in rows) for name in table.shown_columns},
            )
        )
    return tuple(captions)


def _read_image_table(shard: Shard) -> _ImageTable:
    where = shard.store.name_of(shard.parquet_name)
    content = shard.store.read(shard.parquet_name)
    if hashlib.sha256(content).hexdigest() != shard.parquet_sha256:
        raise ShardError(f"{where}: its sha256 is not that of the completion marker")
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        own = [column for column in file.schema_arrow if column.name not in IMAGE_COLUMNS]
        shown = (*FILTERED_COLUMNS, *(column.name for column in own if _is_shown(column.type)))
        rows = file.read(columns=[*_READ_COLUMNS, *shown]).to_pylist()
        hidden = tuple(column.name for column in own if not _is_shown(column.type))
        return _ImageTable({(row["key"], row["index"]): row for row in rows}, shown, hidden)
    except (pa.ArrowException, KeyError) as error:
        raise ShardError(f"{where}: not the side-car of a shard ({error})") from error


def _is_shown(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = ("is_boolean", "is_integer", "is_floating", "is_string", "is_large_string")
    return any(getattr(pa.types, check)(kind) for check in checks)


def _simplify(value: Any) -> Value:
    """What JSON and JavaScript hold: a truth value or huge integer becomes a word, NaN and infinity None.

    An empty text is what a table has where a value is missing, so it becomes None too.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return value if abs(value) <= _MAX_EXACT_INTEGER else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value in (None, "") else str(value)


def _read_failures(shard: Shard) -> tuple[FailureRow, ...]:
    stats = read_stats(shard.store, shard.name) or {}
    names = ("key", "caption_id", "caption", "reason")
    try:
        return tuple(
            FailureRow(**{name: str(failure[name]) for name in names}, shard_name=shard.name)
            for failure in stats["failed_captions"]
        )
    except (KeyError, TypeError) as error:
        where = shard.store.name_of(shard.marker_name)
        raise ShardError(f"{where}: not a completion marker ({type(error).__name__}: {error})") from error
