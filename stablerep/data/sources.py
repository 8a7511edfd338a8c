"""Datasets as tables of where images lie, and the bytes at those places.

A shard's table is read when a caption of it is first drawn, and only the tables in use are kept. Images are
read by range: from a local disk, from a local cache of whole shards, or from the object store itself.
"""

import contextlib
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_gen.shards import MAX_IMAGE_MEMBER_BYTES, Shard, ShardError, Store
from stablerep.data.shard_cache import ShardCache
from stablerep.data.verification import VerifiedFiles, default_cache_folder

_COLUMNS = (
    "key",
    "index",
    "caption",
    "caption_id",
    "occurrence",
    "tar_offset",
    "num_bytes",
    "width",
    "height",
    "sha256",
)
_MAX_GAP_NUM_BYTES = 64 << 10  # read along with what lies on both sides of it, rather than asked for twice
_NUM_REQUESTS_AT_ONCE = 16
_MAX_NUM_OPEN_FILES = 64


class MalformedDataError(ValueError):
    """The data are not of the kind that was asked for: no part of them to leave out, but a reason to stop."""


class Extent(NamedTuple):
    """Where an encoded image lies.

    Attributes:
        shard: Index of the shard.
        offset: Where it begins in the tar, bytes.
        num_bytes: Its size.
        sha256: What it is compared with; "" where the shard was verified whole.
    """

    shard: int
    offset: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardTable:
    """What a shard holds, one row a sample.

    Shapes:
        ids: int64 [n], 63 bits of what tells the sample from others by content.
        labels: int64 [n], what makes samples each other's positives.
        occurrences: int64 [n], 0 for the first time that the caption occurs in the dataset.
        keys: n names of samples, or None where they are not kept.
        captions: n texts, or None where there are none.
        offsets: int64 [n, m], of each image in the tar, bytes.
        num_bytes: int64 [n, m], size of each image.
        digests: n · m sha256, or None where they are not needed.
        height, width: Of every image, pixels; 0 where they are not recorded.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    occurrences: NDArray[np.int64]
    keys: Any
    captions: Any
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    digests: Any
    height: int = 0
    width: int = 0

    def image_name(self, sample: int, image: int) -> str:
        """What messages call an image: its member in the tar, or else its place."""
        if self.keys is None:
            return f"at byte {self.offsets[sample, image]}"
        return f"{self.keys[sample].as_py()}.{image}"

    def extent(self, shard: int, sample: int, image: int) -> Extent:
        """Where an image of a sample lies; `shard` is the table's own index."""
        row = sample * self.offsets.shape[1] + image
        sha256 = "" if self.digests is None else self.digests[row].as_py()
        return Extent(shard, int(self.offsets[sample, image]), int(self.num_bytes[sample, image]), sha256)


@dataclass(frozen=True)
class CacheConfig:
    """Where shards of an object store, and notes of what was verified, are kept on this machine.

    Attributes:
        folder: For whole shards; None reads the images that are drawn straight from the store, each checked
            by its own sha256. Notes are kept there too, otherwise in ~/.cache/stablerep.
        max_bytes: Size that the whole shards may have together; the least recently used go first.
    """

    folder: str | None = None
    max_bytes: int = 100 << 30

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"cache.max_bytes must be >= 1, got {self.max_bytes}")


ON_THIS_MACHINE = CacheConfig()


class ShardedDataset(ABC):
    """A folder of tars, local or in an object store.

    It may be sent to other processes: files, tables and threads are those of the process that uses it.

    Args:
        store: The folder.
        tar_names: Names of the tars.
        num_samples: Samples of each.
        num_images: Images of each sample.
        cache: What is kept on this machine.

    Attributes:
        num_tables_kept: Tables in memory at a time.
        image_size: Height and width of every image, pixels; None until `measure`.
    """

    has_captions = False
    has_classes = False

    def __init__(
        self,
        store: Store,
        tar_names: Sequence[str],
        num_samples: Sequence[int],
        num_images: int,
        cache: CacheConfig,
    ) -> None:
        self.store, self.tar_names, self.num_samples = store, list(tar_names), list(num_samples)
        self.num_images = num_images
        self.num_tables_kept = 8
        self.image_size: tuple[int, int] | None = None
        self._cache = cache
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("store", "tar_names", "num_samples", "num_images", "num_tables_kept", "_cache")
        return {
            name: value for name, value in self.__dict__.items() if name in kept or not name.startswith("_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._broken: dict[int, str] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        folder = Path(self._cache.folder) if self._cache.folder else default_cache_folder()
        self._verified = VerifiedFiles(folder, self.store.url)
        self._whole = (
            ShardCache(folder, self._cache.max_bytes)
            if self._cache.folder and not self.store.is_local
            else None
        )

    @property
    def is_read_by_range(self) -> bool:
        """Whether images come straight from an object store."""
        return not self.store.is_local and self._whole is None

    @property
    def num_captions(self) -> int:
        """Samples of all shards."""
        return sum(self.num_samples)

    @property
    @abstractmethod
    def identity(self) -> str:
        """What tells the samples and their order from those of another dataset, 64 hex digits."""

    @abstractmethod
    def _read_table(self, shard: int) -> ShardTable:
        """Reads what a shard holds, and verifies what can be verified without its images."""

    @abstractmethod
    def _recorded(self, shard: int) -> tuple[int, str] | None:
        """Size and sha256 of the tar as they were recorded, if they were."""

    def name_of(self, shard: int) -> str:
        """The tar, for messages."""
        return self.store.name_of(self.tar_names[shard])

    def measure(self) -> None:
        """Reads the first sound table for the size of the images.

        Raises:
            ShardError: No table is sound; the message is that of the first.
            MalformedDataError: It is not a table of samples.
        """
        first_error: ShardError | None = None
        for shard in range(len(self.tar_names)):
            try:
                table = self._read_table(shard)
            except ShardError as error:
                first_error = first_error or error
                continue
            self.image_size = table.height, table.width
            return
        if first_error is not None:
            raise first_error

    def table(self, shard: int) -> ShardTable:
        """What a shard holds; the shard is verified before its table is there for the first time.

        Raises:
            ShardError: The shard is missing or not what was recorded; again at each later call.
            MalformedDataError: It is not a table of samples, or the images' size is not that of the others.
            OSError: It cannot be read.
        """
        if shard in self._tables:
            self._tables.move_to_end(shard)
            return self._tables[shard]
        if shard in self._broken:
            raise ShardError(self._broken[shard])
        try:
            table = self._read_table(shard)
            if not self.is_read_by_range:
                self._verify(shard)
        except ShardError as error:
            self._broken[shard] = str(error)
            raise
        if self.image_size not in (None, (table.height, table.width)):
            (height, width), (own_height, own_width) = self.image_size, (table.height, table.width)
            raise MalformedDataError(
                f"{self.name_of(shard)}: images of {own_width}×{own_height} pixels, "
                f"of {width}×{height} in other shards"
            )
        while len(self._tables) >= self.num_tables_kept:
            self._tables.popitem(last=False)
        self._tables[shard] = table
        return table

    def _verify(self, shard: int) -> None:
        if (recorded := self._recorded(shard)) is None:
            return
        if self._whole is None:
            self._verified.check(self.store.local_path / self.tar_names[shard], shard, *recorded)
            return
        path, is_new = self._whole.fetch(self.store, self.tar_names[shard], *recorded)
        if is_new:
            self._verified.trust(path, *recorded)
        else:
            self._verified.check(path, shard, *recorded)

    def read(self, extents: Sequence[Extent]) -> list["bytes | OSError"]:
        """The bytes at each place, or why there are none; from front to back of each shard.

        Raises:
            Nothing: what cannot be read is told place by place.
        """
        order = sorted(range(len(extents)), key=lambda place: extents[place][:2])
        found: list[bytes | OSError] = [b""] * len(extents)
        if self.is_read_by_range:
            groups = _group(extents, order)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_NUM_REQUESTS_AT_ONCE, "read")
            for group, contents in zip(
                groups,
                self._threads.map(lambda g: self._request([extents[i] for i in g]), groups),
                strict=True,
            ):
                for place, content in zip(group, contents, strict=True):
                    found[place] = content
            return found
        for place in order:
            try:
                found[place] = self._pread(extents[place])
            except OSError as error:
                found[place] = error
        return found

    def _pread(self, extent: Extent) -> bytes:
        if extent.shard not in self._files:
            while len(self._files) >= _MAX_NUM_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[extent.shard] = os.open(self._local_path(extent.shard), os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(extent.shard)
        content = os.pread(self._files[extent.shard], extent.num_bytes, extent.offset)
        if len(content) != extent.num_bytes:
            raise OSError(
                f"{self.name_of(extent.shard)}: {len(content)} bytes at {extent.offset}, expected "
                f"{extent.num_bytes}"
            )
        return content

    def _local_path(self, shard: int) -> Path:
        if self._whole is None:
            return self.store.local_path / self.tar_names[shard]
        recorded = self._recorded(shard)
        assert recorded is not None  # the cache holds what was recorded alone
        with contextlib.suppress(ShardError):
            return self._whole.fetch(self.store, self.tar_names[shard], *recorded)[0]
        raise OSError(f"{self.name_of(shard)}: changed in the store")

    def _request(self, extents: list[Extent]) -> list["bytes | OSError"]:
        """Neighbouring images in one request, each compared with its sha256."""
        first, last = extents[0], extents[-1]
        try:
            content = self.store.read_range(
                self.tar_names[first.shard], first.offset, last.offset + last.num_bytes - first.offset
            )
        except OSError as error:
            return [error] * len(extents)
        parts = [content[e.offset - first.offset :][: e.num_bytes] for e in extents]
        return [self._check_digest(extent, part) for extent, part in zip(extents, parts, strict=True)]

    def _check_digest(self, extent: Extent, content: bytes) -> "bytes | OSError":
        if not extent.sha256 or hashlib.sha256(content).hexdigest() == extent.sha256:
            return content
        return OSError(f"{self.name_of(extent.shard)}: image at {extent.offset} differs from its sha256")


def _group(extents: Sequence[Extent], order: list[int]) -> list[list[int]]:
    """Runs of places that one request reads."""
    groups: list[list[int]] = []
    for place in order:
        extent = extents[place]
        if groups:
            last = extents[groups[-1][-1]]
            gap = extent.offset - last.offset - last.num_bytes
            if extent.shard == last.shard and gap <= _MAX_GAP_NUM_BYTES:
                groups[-1].append(place)
                continue
        groups.append([place])
    return groups


class GeneratedDataset(ShardedDataset):
    """A dataset of `stablerep generate`; captions of equal content are each other's positives.

    Args:
        shards: Its finished shards, one or more.
        cache: What is kept on this machine.
    """

    has_captions = True

    def __init__(self, shards: Sequence[Shard], cache: CacheConfig) -> None:
        self.shards = list(shards)
        super().__init__(
            shards[0].store,
            [shard.tar_name for shard in shards],
            [shard.num_samples for shard in shards],
            shards[0].num_images_per_caption,
            cache,
        )

    @property
    def identity(self) -> str:
        """Of the shards' names, digests and sizes."""
        parts = [f"{shard.name} {shard.sha256} {shard.num_samples}\n" for shard in self.shards]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def _recorded(self, shard: int) -> tuple[int, str]:
        return self.shards[shard].num_bytes, self.shards[shard].sha256

    def _read_table(self, shard: int) -> ShardTable:
        described = self.shards[shard]
        where = self.store.name_of(described.parquet_name)
        try:
            content = self.store.read(described.parquet_name)
        except FileNotFoundError as error:
            raise ShardError(f"{where}: missing, though its completion marker is there") from error
        if len(content) != described.parquet_num_bytes:
            raise ShardError(f"{where}: has {len(content)} bytes, expected {described.parquet_num_bytes}")
        if (actual := hashlib.sha256(content).hexdigest()) != described.parquet_sha256:
            raise ShardError(f"{where}: sha256 is {actual[:16]}…, expected {described.parquet_sha256[:16]}…")
        columns = [name for name in _COLUMNS if name != "sha256" or self.is_read_by_range]
        file = pq.ParquetFile(io.BytesIO(content))
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise MalformedDataError(f"{where}: column {missing[0]} is missing")
        return _build_table(file.read(columns, use_threads=False), described, where)


def _build_table(rows: pa.Table, shard: Shard, where: str) -> ShardTable:
    """One row an image -> one row a sample."""
    n, m = shard.num_samples, shard.num_images_per_caption
    if rows.num_rows != n * m or rows["index"].to_numpy().tolist() != list(range(m)) * n:
        raise MalformedDataError(
            f"{where}: expected {n} x {m} rows in order, got {rows.num_rows} or another order"
        )
    offsets, num_bytes = (rows[name].to_numpy().reshape(n, m) for name in ("tar_offset", "num_bytes"))
    if offsets.min() < 0 or num_bytes.min() < 1 or (offsets + num_bytes).max() > shard.num_bytes:
        raise MalformedDataError(f"{where}: an image lies outside of its tar")
    if num_bytes.max() > MAX_IMAGE_MEMBER_BYTES:
        raise MalformedDataError(
            f"{where}: an image may have {MAX_IMAGE_MEMBER_BYTES} bytes, got {num_bytes.max()}"
        )
    sizes = {(h, w) for h, w in zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True)}
    if len(sizes) > 1:
        (h, w), (other_h, other_w) = sorted(sizes)[:2]
        raise MalformedDataError(f"{where}: images of unequal size, {w}×{h} and {other_w}×{other_h}")
    first = rows.take(pa.array(np.arange(0, n * m, m)))
    texts = first["caption_id"].to_pylist()
    try:
        ids = np.array([int(text[:16], 16) >> 1 for text in texts], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise MalformedDataError(f"{where}: a caption_id must be 32 hex digits ({error})") from error
    ((height, width),) = sizes
    return ShardTable(
        ids=ids,
        labels=ids,
        occurrences=first["occurrence"].to_numpy().astype(np.int64),
        keys=first["key"],
        captions=first["caption"],
        offsets=offsets,
        num_bytes=num_bytes,
        digests=rows["sha256"] if "sha256" in rows.column_names else None,
        height=height,
        width=width,
    )
