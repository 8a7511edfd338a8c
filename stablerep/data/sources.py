"""Datasets as tables of where images lie, and the bytes at those places.

A shard's table is read when a caption of it is first drawn, and only the tables in use are kept. Images are
read by range: from a local disk, from a local cache of whole shards and tables, or from the object store
itself.
"""

import hashlib
import io
import os
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
    "sha256",
)
_SIZE_COLUMNS = ("width", "height")  # in the footers alone
_MAX_GAP_NUM_BYTES = 64 << 10  # read along with what lies on both sides of it, rather than asked for twice
_MAX_REQUEST_NUM_BYTES = 8 << 20  # but for an image that is larger
_NUM_REQUESTS_AT_ONCE = 16
_NUM_FETCHES_AT_ONCE = 4  # of whole shards, by one worker
_MAX_NUM_OPEN_FILES = 64
_SECONDS_UNTIL_RETRY = 60.0
_MIN_FOOTER_NUM_BYTES = 64 << 10
_Value = TypeVar("_Value")


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
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    occurrences: NDArray[np.int64]
    keys: Any
    captions: Any
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    digests: Any

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
        folder: For whole shards and their side-cars; None reads the images that are drawn straight from the
            store, each checked by its own sha256. Notes are kept there too, otherwise in ~/.cache/stablerep.
        max_bytes: Size that these files may have together; the least recently used go first.
    """

    folder: str | None = None
    max_bytes: int = 100 << 30

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"cache.max_bytes must be >= 1, got {self.max_bytes}")


ON_THIS_MACHINE = CacheConfig()


class ShardedDataset(ABC):
    """A folder of tars, local or in an object store.

    It may be sent to other processes: files and tables are those of the process that uses it.

    Args:
        store: The folder.
        tar_names: Names of the tars.
        num_samples: Samples of each.
        num_images: Images of each sample.
        cache: What is kept on this machine.

    Attributes:
        num_tables_kept: Tables in memory at a time, beside those that a caller holds.
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
        self._unreadable: dict[int, tuple[float, str]] = {}  # until when, and why
        self._files: OrderedDict[int, int] = OrderedDict()
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

    def check_tables(self, shards: Sequence[int]) -> None:
        """Makes sure that shards hold what training reads, as far as a little of each tells.

        Reads the first sound table, and of `shards` what `_check_footers` does.

        Raises:
            ShardError: No table is sound; the message is that of the first.
            MalformedDataError: One is not a table of samples, or images are of unequal size.
            OSError: The store cannot be read.
        """
        first_error: ShardError | None = None
        for shard in range(len(self.tar_names)):
            try:
                self._read_table(shard)
            except ShardError as error:
                first_error = first_error or error
                continue
            return self._check_footers(shard, shards)
        if first_error is not None:
            raise first_error
        return None

    def _check_footers(self, first: int, shards: Sequence[int]) -> None:
        """Compares what the shards' tables say of themselves with that of the first sound one."""
        return None

    def tables(self, shards: Sequence[int]) -> dict[int, "ShardTable | ShardError | OSError"]:
        """What each of some shards holds, or why that is not known.

        A shard is verified, and fetched into the cache, before its table is there for the first time. Others
        wait for a process that does so: processes that need many ought to ask for them in other orders.

        Raises:
            MalformedDataError: One is not a table of samples.
        """
        found: dict[int, ShardTable | ShardError | OSError] = {}
        new = []
        for shard in shards:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                found[shard] = self._tables[shard]
            elif shard in self._broken:
                found[shard] = ShardError(self._broken[shard])
            elif (error := self._recent_error(shard)) is not None:
                found[shard] = error
            else:
                new.append(shard)
        for shard, table in zip(new, self._map(self._load, new), strict=True):
            found[shard] = table
            if isinstance(table, ShardError):
                self._broken[shard] = str(table)
            elif isinstance(table, OSError):
                self._remember(shard, table)
            else:
                self._tables[shard] = table
        while len(self._tables) > self.num_tables_kept:
            self._tables.popitem(last=False)
        return found

    def table(self, shard: int) -> ShardTable:
        """What a shard holds.

        Raises:
            ShardError: The shard is missing or not what was recorded; again at each later call.
            MalformedDataError: It is not a table of samples.
            OSError: It cannot be read; again at each call within a minute.
        """
        found = self.tables([shard])[shard]
        if isinstance(found, Exception):
            raise found
        return found

    def _load(self, shard: int) -> "ShardTable | ShardError | OSError":
        try:
            table = self._read_table(shard)
            if not self.is_read_by_range:
                self._verify(shard)
        except (ShardError, OSError) as error:
            return error
        return table

    def _verify(self, shard: int) -> None:
        if (recorded := self._recorded(shard)) is None:
            return
        if self._whole is not None:  # it is hashed as it is fetched
            os.close(self._whole.open(self.store, self.tar_names[shard], *recorded))
            return
        self._verified.check(self.store.local_path / self.tar_names[shard], shard, *recorded)

    def _map(self, function: Callable[[int], _Value], shards: Sequence[int]) -> Iterable[_Value]:
        """In threads, where waiting for an object store takes most of the time."""
        if self.store.is_local or len(shards) < 2:
            return map(function, shards)
        num_threads = _NUM_REQUESTS_AT_ONCE if self.is_read_by_range else _NUM_FETCHES_AT_ONCE
        with ThreadPoolExecutor(num_threads, "read") as threads:  # not kept: workers may be forked
            return list(threads.map(function, shards))

    def _recent_error(self, shard: int) -> OSError | None:
        until, message = self._unreadable.get(shard, (0.0, ""))
        return OSError(message) if time.monotonic() < until else None

    def _remember(self, shard: int, error: OSError) -> None:
        """Spares the next captions of a shard that cannot be read the waiting for the same error."""
        self._unreadable[shard] = (time.monotonic() + _SECONDS_UNTIL_RETRY, str(error))

    def read(self, extents: Sequence[Extent]) -> list["bytes | OSError"]:
        """The bytes at each place, or why there are none; from front to back of each shard.

        Raises:
            Nothing: what cannot be read is told place by place.
        """
        order = sorted(range(len(extents)), key=lambda place: extents[place][:2])
        found: list[bytes | OSError] = [b""] * len(extents)
        if self.is_read_by_range:
            groups = _group(extents, order)
            parts = self._map(lambda g: self._request([extents[i] for i in groups[g]]), range(len(groups)))
            for group, contents in zip(groups, parts, strict=True):
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
        file = self._open(extent.shard)
        content = os.pread(file, extent.num_bytes, extent.offset)
        if len(content) != extent.num_bytes:
            raise OSError(
                f"{self.name_of(extent.shard)}: {len(content)} bytes at {extent.offset}, expected "
                f"{extent.num_bytes}"
            )
        return content

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if (error := self._recent_error(shard)) is not None:
            raise error
        try:
            file = self._open_tar(shard)
        except OSError as failure:
            self._remember(shard, failure)
            raise
        while len(self._files) >= _MAX_NUM_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = file
        return file

    def _open_tar(self, shard: int) -> int:
        if self._whole is None:
            return os.open(self.store.local_path / self.tar_names[shard], os.O_RDONLY | os.O_CLOEXEC)
        recorded = self._recorded(shard)
        assert recorded is not None  # the cache holds what was recorded alone
        try:
            return self._whole.open(self.store, self.tar_names[shard], *recorded)
        except ShardError as error:  # it left the cache since it was verified, and has changed in the store
            raise OSError(str(error)) from error

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
            num_bytes = extent.offset + extent.num_bytes - extents[groups[-1][0]].offset
            is_near = extent.shard == last.shard and gap <= _MAX_GAP_NUM_BYTES
            if is_near and num_bytes <= _MAX_REQUEST_NUM_BYTES:
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

    def _check_footers(self, first: int, shards: Sequence[int]) -> None:
        shards = [first, *(shard for shard in shards if shard != first)]
        expected = None
        for shard, size in zip(shards, self._map(self._read_image_size, shards), strict=True):
            expected = expected or size
            if size is not None and expected is not None and size != expected:
                where, other = (self.store.name_of(self.shards[i].parquet_name) for i in (shard, first))
                (w, h), (other_w, other_h) = size, expected
                raise MalformedDataError(
                    f"{where}: images of {w}×{h} pixels, of {other_w}×{other_h} in {other}"
                )

    def _read_image_size(self, shard: int) -> tuple[int, int] | None:
        """Width and height of a shard's images by its side-car's footer; None of one that is broken."""
        described = self.shards[shard]
        name, num_bytes = described.parquet_name, described.parquet_num_bytes
        content = b""
        try:
            for length in (min(_MIN_FOOTER_NUM_BYTES, num_bytes), num_bytes):
                content = self.store.read_range(name, num_bytes - length, length)
                if int.from_bytes(content[-8:-4], "little") + 8 <= length:
                    break
        except OSError:
            if self.store.size(name) == num_bytes:
                raise
            return None  # told when it is drawn, as is one that differs from its digest
        try:
            metadata = pq.read_metadata(io.BytesIO(content))
        except (pa.ArrowException, OSError):
            return None
        return _find_image_size(metadata, described, self.store.name_of(name))

    def _read_table(self, shard: int) -> ShardTable:
        described = self.shards[shard]
        where = self.store.name_of(described.parquet_name)
        content = self._read_side_car(described, where)
        columns = [name for name in _COLUMNS if name != "sha256" or self.is_read_by_range]
        metadata = pq.read_metadata(io.BytesIO(content))
        _check_columns(metadata.schema.names, where)
        repeated = ["key", "caption", "caption_id"]  # of each image of a caption: decoded once
        file = pq.ParquetFile(io.BytesIO(content), metadata=metadata, read_dictionary=repeated)
        return _build_table(file.read(columns, use_threads=False), described, where)

    def _read_side_car(self, shard: Shard, where: str) -> bytes:
        name, num_bytes, sha256 = shard.parquet_name, shard.parquet_num_bytes, shard.parquet_sha256
        try:
            if self._whole is not None:  # hashed as it was fetched
                with os.fdopen(self._whole.open(self.store, name, num_bytes, sha256), "rb") as file:
                    return file.read()
            content = self.store.read(name)
        except FileNotFoundError as error:
            raise ShardError(f"{where}: missing, though its completion marker is there") from error
        if len(content) != num_bytes:
            raise ShardError(f"{where}: has {len(content)} bytes, expected {num_bytes}")
        if (actual := hashlib.sha256(content).hexdigest()) != sha256:
            raise ShardError(f"{where}: sha256 is {actual[:16]}…, expected {sha256[:16]}…")
        return content


def _check_columns(names: Sequence[str], where: str) -> None:
    if missing := [name for name in (*_COLUMNS, *_SIZE_COLUMNS) if name not in names]:
        raise MalformedDataError(f"{where}: column {missing[0]} is missing")


def _find_image_size(metadata: pq.FileMetaData, shard: Shard, where: str) -> tuple[int, int] | None:
    """Width and height from the statistics of the columns; None where there are none."""
    names = metadata.schema.names
    _check_columns(names, where)
    if metadata.num_rows != shard.num_samples * shard.num_images_per_caption:
        raise MalformedDataError(
            f"{where}: expected {shard.num_samples} x {shard.num_images_per_caption} rows, "
            f"got {metadata.num_rows}"
        )
    bounds = []
    for name in _SIZE_COLUMNS:
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        statistics = [group.column(names.index(name)).statistics for group in groups]
        if not all(part is not None and part.has_min_max for part in statistics):
            return None
        bounds.append((min(part.min for part in statistics), max(part.max for part in statistics)))
    (w, other_w), (h, other_h) = bounds
    if (w, h) != (other_w, other_h):
        raise MalformedDataError(f"{where}: images of unequal size, {w}×{h} and {other_w}×{other_h}")
    return w, h


def _build_table(rows: pa.Table, shard: Shard, where: str) -> ShardTable:
    """One row an image -> one row a sample."""
    n, m = shard.num_samples, shard.num_images_per_caption
    if rows.num_rows != n * m or not np.array_equal(rows["index"].to_numpy(), np.tile(np.arange(m), n)):
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
    names = ["key", "caption", "caption_id", "occurrence"]
    first = rows.select(names).take(pa.array(np.arange(0, n * m, m)))
    texts = first["caption_id"].cast(pa.string()).to_numpy()  # to_pylist takes thirty times as long
    try:
        ids = np.array([int(text[:16], 16) >> 1 for text in texts], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise MalformedDataError(f"{where}: a caption_id must be 32 hex digits ({error})") from error
    return ShardTable(
        ids=ids,
        labels=ids,
        occurrences=first["occurrence"].to_numpy().astype(np.int64),
        keys=first["key"],
        captions=first["caption"],
        offsets=offsets,
        num_bytes=num_bytes,
        digests=rows["sha256"] if "sha256" in rows.column_names else None,
    )
