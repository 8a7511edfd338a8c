"""Datasets of `stablerep generate`: several images a caption, which is their label.

A column `cls` or `label` that the captions carried along gives classes instead; the captions stay with the
images. One dataset is one split, `test`; a folder with a dataset each in `train/` and `test/` (optionally
`validation/` or `val/`) is a set of splits.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_gen.shards import (
    DatasetManifest,
    Shard,
    ShardError,
    check_sizes,
    list_complete_shards,
    open_store,
    read_manifest,
)
from stablerep.data.verification import VerifiedFiles, default_cache_folder
from stablerep.evaluation.sets.folders import name_classes
from stablerep.evaluation.sets.labelled import (
    FileRange,
    LabelledImage,
    LabelledSet,
    StoredRange,
    build_set,
    label_by_captions,
)

LABEL_COLUMNS = ("cls", "label")
_COLUMNS = ("key", "index", "caption", "caption_id", "tar_offset", "num_bytes", "sha256")


@dataclass(frozen=True)
class _Image:
    """An image whose label is still what the column holds; None without a column."""

    image: LabelledImage
    value: str | int | bool | None


def read_generated_set(name: str, splits: Mapping[str, str | Path], label_column: str | None) -> LabelledSet:
    """The captions, ids and places of all images of finished shards.

    A local shard is compared with its sha256, once for as long as it does not change; an image in an object
    store is compared with its own when it is read.

    Args:
        name: What the set is called.
        splits: Folder or URL of the dataset of each split; `test` among them.
        label_column: Column that holds classes; None takes `cls` or `label`, whichever there is.

    Raises:
        FileNotFoundError: If a folder holds no dataset.
        ValueError: If a shard is missing or damaged, no shard is finished, the label column is missing or
            holds no class, or the splits do not fit together.
    """
    remarks: list[str] = []
    found: dict[str, list[_Image]] = {}
    columns: dict[str, str | None] = {}
    for split, root in splits.items():
        manifest = read_manifest(root)
        columns[split] = _find_label_column(str(root), manifest, label_column)
        found[split] = list(_read_split(split, root, manifest, columns[split], remarks))
    if len(set(columns.values())) > 1:
        raise ValueError(f"{name}: the label column differs between splits: {columns}")
    if next(iter(columns.values())) is None:
        return _label_by_caption(name, found, remarks)
    return _label_by_column(name, found, remarks)


def _find_label_column(root: str, manifest: DatasetManifest, asked: str | None) -> str | None:
    column = asked or next((name for name in LABEL_COLUMNS if name in manifest.extra_columns), None)
    if column is None:
        return None
    if column not in manifest.extra_columns:
        there = ", ".join(sorted(manifest.extra_columns)) or "none"
        raise ValueError(f"{root} has no column '{column}'; the captions carried along: {there}")
    if (kind := manifest.extra_columns[column]) == "double":
        raise ValueError(f"{root}: column '{column}' must hold classes (string, int64, bool), got {kind}")
    return column


def _read_split(
    split: str, root: str | Path, manifest: DatasetManifest, column: str | None, remarks: list[str]
) -> Iterator[_Image]:
    shards = list_complete_shards(root)
    if not any(shard.num_samples for shard in shards):
        raise ValueError(f"{root} holds no complete shard (of {manifest.num_shards} planned)")
    if len(shards) < manifest.num_shards:
        remarks.append(f"{root}: {len(shards)} of {manifest.num_shards} planned shards are complete")
    store = open_store(root)
    verified = VerifiedFiles(default_cache_folder(), store.url)
    for index, shard in enumerate(shards):
        if not shard.num_samples:
            continue
        check_sizes(shard)
        if store.is_local:
            verified.check(shard.path, index, shard.num_bytes, shard.sha256)
        yield from _read_shard(split, shard, column)


def _read_shard(split: str, shard: Shard, column: str | None) -> Iterator[_Image]:
    path = str(shard.path) if shard.store.is_local else ""
    for row in _read_rows(shard, column).to_pylist():
        place = (row["tar_offset"], row["num_bytes"], row["sha256"])
        content = FileRange(path, *place) if path else StoredRange(shard.store, shard.tar_name, *place)
        image = LabelledImage(
            name=f"{split}/{shard.name}/{row['key']}.{row['index']}",
            labels=(),
            content=content,
            caption_id=row["caption_id"],
            captions=(row["caption"],),
        )
        value = row[column] if column else None
        if column and value is None:
            raise ValueError(f"{image.name}: its column '{column}' is empty")
        yield _Image(image, value)


def _read_rows(shard: Shard, column: str | None) -> pa.Table:
    where = shard.store.name_of(shard.parquet_name)
    content = shard.store.read(shard.parquet_name)
    if (actual := hashlib.sha256(content).hexdigest()) != shard.parquet_sha256:
        raise ShardError(f"{where}: sha256 is {actual[:16]}…, expected {shard.parquet_sha256[:16]}…")
    columns = [*_COLUMNS, *([column] if column else [])]
    file = pq.ParquetFile(io.BytesIO(content))
    if missing := [name for name in columns if name not in file.schema_arrow.names]:
        raise ShardError(f"{where}: column {missing[0]} is missing")
    rows = file.read(columns, use_threads=False)
    if rows.num_rows != shard.num_images:
        raise ShardError(f"{where}: expected {shard.num_images} rows, got {rows.num_rows}")
    return rows


def _label_by_caption(name: str, found: Mapping[str, list[_Image]], remarks: list[str]) -> LabelledSet:
    unlabelled = {split: [member.image for member in members] for split, members in found.items()}
    classes, images = label_by_captions(unlabelled)
    return build_set(name, "captions", classes, images, remarks=remarks)


def _label_by_column(name: str, found: Mapping[str, list[_Image]], remarks: list[str]) -> LabelledSet:
    values = {member.value for members in found.values() for member in members}
    classes, labels = _number_classes(name, values)
    images = {
        split: [replace(member.image, labels=(labels[member.value],)) for member in members]
        for split, members in found.items()
    }
    return build_set(name, "classes", classes, images, remarks=remarks)


def _number_classes(name: str, values: set[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Numbers stand for themselves, as in plain shards; words and truth values are sorted."""
    if not all(type(value) is int for value in values):
        ordered = sorted(values)
        return tuple(str(value) for value in ordered), {value: i for i, value in enumerate(ordered)}
    if min(values) < 0:
        raise ValueError(f"{name}: a label must be >= 0, got {min(values)}")
    return name_classes(Path(name), name, max(values)), {value: value for value in values}
