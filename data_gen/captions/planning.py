"""The captions of a dataset, frozen before the first image: which, in which order, in which shard.

Three passes need little memory however many captions there are:

    1. Stream the rows. Each caption's 16-byte id goes to one of 128 files, chosen by its first byte.
    2. Give each id its occurrence number, file by file: how many equal ones stand before it.
    3. Stream the rows again, which must be the same, each with the next number of its id's file: drop or
       number the repeats, and write what is left to parquet, one row group a shard.
"""

import hashlib
import json
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, TracebackType
from typing import IO, Any, BinaryIO, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from data_gen.captions import hash_caption, normalise_caption
from data_gen.captions.rows import Columns, RowBatch, Scalar
from data_gen.captions.sources import SourceFile, digest_sources, expand_sources, measure_source, read_rows

NUM_SHARDS_PER_CAPTION_FILE = 1000

_NUM_BUCKETS = 128
_NUM_ID_BYTES = 16
_NUM_IDS_PER_BLOCK = 4096
_NUM_CAPTIONS_PER_WRITE = 16_384
_TYPES = {str: "string", int: "int64", float: "double", bool: "bool"}
_ARROW_TYPES = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
_OWN_FIELDS = [
    pa.field("caption_id", pa.string(), nullable=False),
    pa.field("occurrence", pa.int32(), nullable=False),
    pa.field("caption", pa.string(), nullable=False),
]


@dataclass(frozen=True)
class PlannedCaption:
    """A caption that is to be generated.

    Args:
        key: Name of its sample, unique over the dataset and without a dot: `caption_id`, or
            `{caption_id}-{occurrence}` from the second occurrence on.
        caption_id: Identity of the caption by content (32 hex digits).
        text: Normalised caption.
        occurrence: How many equal captions the plan holds before this one.
        extra: Values of the extra columns by name.
    """

    key: str
    caption_id: str
    text: str
    occurrence: int
    extra: Mapping[str, Scalar]


@dataclass(frozen=True)
class CaptionPlan:
    """The planned captions, and what became of every row that was read.

    Args:
        num_captions: Captions planned.
        sha256: Digest of the planned captions in order, with their extra values; whatever the format of the
            files, their names, and how the rows are spread over them.
        extra_columns: Type of each extra column by name: `string`, `int64`, `double` or `bool`.
        files: Parquet files, each of `NUM_SHARDS_PER_CAPTION_FILE` shards, but the last; a row group a shard.
        num_rows: Rows read: `num_captions + num_empty`, and `num_duplicates` where those are dropped.
        num_empty: Rows without a visible character.
        num_duplicates: Rows whose caption had occurred before.
        sources: The files that were read.
    """

    num_captions: int
    sha256: str
    extra_columns: Mapping[str, str]
    files: tuple[Path, ...]
    num_rows: int
    num_empty: int
    num_duplicates: int
    sources: tuple[SourceFile, ...]


def plan_captions(
    patterns: Sequence[str],
    *,
    columns: Columns,
    duplicates: Literal["drop", "number"],
    limit: int | None,
    num_captions_per_shard: int,
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> CaptionPlan:
    """Plans the captions of files, in the order of their rows.

    Args:
        patterns: Paths, globs and fsspec URLs, in order.
        columns: Which columns are read.
        duplicates: What becomes of a caption that occurred before: `drop` leaves it out, `number` plans it
            again under its occurrence number.
        limit: Captions to plan, None for all; reading stops there. With `drop`, 120 bytes of memory each.
        num_captions_per_shard: Captions in each shard but the last, >= 1.
        folder: Where the parquet files and, meanwhile, about 20 bytes a row of temporary files are written.
        progress: Called with the number of rows of each batch that was read; each row is read twice.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A setting is out of its range, a file is damaged, a row holds what is no caption, a column
            mixes types, there is no caption at all, or a file changed while it was read.
    """
    if duplicates not in ("drop", "number"):
        raise ValueError(f"duplicates must be drop or number, got {duplicates}")
    for name, value in (("limit", limit), ("num_captions_per_shard", num_captions_per_shard)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    # Digests are taken before the rows are read: a file that changes in between is seen as changed later.
    sources = digest_sources(patterns) if limit is None else ()
    names = [source.name for source in sources] or expand_sources(patterns)
    reader = _CaptionReader(names, columns, progress)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".planning-", dir=folder) as buckets:
        survey = _survey(reader, Path(buckets), _Limit(limit, is_dropping=duplicates == "drop"))
        if not survey.num_captions:
            raise ValueError(f"caption file {', '.join(patterns)} holds no caption ({survey.num_rows} rows)")
        num_duplicates = _number_occurrences(Path(buckets))
        with _PlanWriter(folder, num_captions_per_shard, survey.types.names()) as writer:
            for batch, occurrences in _read_again(reader, survey, Path(buckets)):
                if duplicates == "drop":
                    batch = batch.pick([index for index, number in enumerate(occurrences) if number == 0])
                    occurrences = [0] * len(batch.ids)
                writer.write(batch, occurrences)
    return CaptionPlan(
        num_captions=writer.num_captions,
        sha256=writer.sha256,
        extra_columns=writer.types,
        files=tuple(writer.files),
        num_rows=survey.num_rows,
        num_empty=survey.num_rows - survey.num_captions,
        num_duplicates=num_duplicates,
        sources=sources or tuple(map(measure_source, names[: survey.num_sources])),
    )


def read_planned_captions(file: IO[bytes], row_group: int) -> list[PlannedCaption]:
    """The captions of one shard.

    Args:
        file: One of `CaptionPlan.files`, open.
        row_group: Index of the shard within the file.

    Raises:
        ValueError: It is no such file, or has no such row group.
    """
    try:
        rows = pq.ParquetFile(file).read_row_group(row_group).to_pylist()
        return [
            PlannedCaption(
                key=_build_key(identity := row.pop("caption_id"), occurrence := row.pop("occurrence")),
                caption_id=identity,
                text=row.pop("caption"),
                occurrence=occurrence,
                extra=row,
            )
            for row in rows
        ]
    except (pa.ArrowException, OSError, IndexError, KeyError) as error:
        reason = normalise_caption(str(error))  # may go over several lines
        raise ValueError(f"not a file of planned captions with a row group {row_group} ({reason})") from error


def _build_key(caption_id: str, occurrence: int) -> str:
    return f"{caption_id}-{occurrence}" if occurrence else caption_id


@dataclass(frozen=True)
class _CaptionBatch:
    """The captions of a batch of rows; rows without a visible character have none.

    Args:
        rows: The batch.
        indexes: Where in it each caption stands.
        texts: Normalised captions.
        ids: Their ids, 16 bytes each.
        extra: Values of each extra column.
    """

    rows: RowBatch
    indexes: list[int]
    texts: list[str]
    ids: list[bytes]
    extra: list[list[Scalar]]

    @classmethod
    def of(cls, rows: RowBatch) -> "_CaptionBatch":
        texts = [normalise_caption(caption) if caption else "" for caption in rows.captions]
        indexes = [index for index, text in enumerate(texts) if text]
        extra = [[values[index] for index in indexes] for values in rows.extra]
        texts = [text for text in texts if text]
        return cls(rows, indexes, texts, [hash_caption(text) for text in texts], extra)

    def pick(self, kept: list[int]) -> "_CaptionBatch":
        """Some of the captions."""
        if len(kept) == len(self.ids):
            return self
        return _CaptionBatch(
            self.rows,
            [self.indexes[index] for index in kept],
            [self.texts[index] for index in kept],
            [self.ids[index] for index in kept],
            [[values[index] for index in kept] for values in self.extra],
        )

    def where(self, index: int) -> str:
        """File and row of a caption."""
        return self.rows.where(self.indexes[index])

    def digest(self) -> bytes:
        """Tells the batch from one of other captions or values."""
        return hashlib.sha256(b"".join(self.ids) + repr(self.extra).encode()).digest()[:16]


class _CaptionReader:
    """Reads the files from the first row on, any number of times."""

    def __init__(self, names: list[str], columns: Columns, progress: Callable[[int], None] | None) -> None:
        self.names, self.columns, self._progress = names, columns, progress

    def read(self, num_rows: int | None = None) -> Iterator[_CaptionBatch]:
        """The captions of the first rows, None for all."""
        for name in self.names:
            for rows in read_rows(name, self.columns):
                if num_rows is not None:
                    rows = rows.head(num_rows)
                    num_rows -= len(rows)
                if self._progress is not None:
                    self._progress(len(rows))
                yield _CaptionBatch.of(rows)
                if num_rows == 0:
                    return


class _Limit:
    """Ends the reading with the row of the last caption that is to be planned."""

    def __init__(self, num_captions: int | None, is_dropping: bool) -> None:
        self._num_left, self._is_dropping = num_captions, is_dropping
        self._seen: set[bytes] = set()

    @property
    def is_reached(self) -> bool:
        return self._num_left == 0

    def cut(self, batch: _CaptionBatch) -> _CaptionBatch:
        """The batch as far as it is needed."""
        if self._num_left is None:
            return batch
        for index, identity in zip(batch.indexes, batch.ids, strict=True):
            if self._is_dropping:
                if identity in self._seen:
                    continue
                self._seen.add(identity)
            self._num_left -= 1
            if self._num_left == 0:
                return _CaptionBatch.of(batch.rows.head(index + 1))
        return batch


class _ColumnTypes:
    """The type of each extra column, from its values."""

    def __init__(self, names: Sequence[str]) -> None:
        self._places: dict[str, dict[type, str]] = {name: {} for name in names}

    def add(self, batch: _CaptionBatch) -> None:
        """Notes where each type is met first.

        Raises:
            ValueError: A column holds two types, and not both of them are numbers.
        """
        for (name, places), values in zip(self._places.items(), batch.extra, strict=True):
            kinds = list(map(type, values))
            for kind in dict.fromkeys(kinds):
                if kind is not NoneType and kind not in places:
                    places[kind] = batch.where(kinds.index(kind))
            if len(places) > 1 and places.keys() != {int, float}:
                found = " and ".join(f"{kind.__name__} ({where})" for kind, where in places.items())
                raise ValueError(f"column {name!r} must hold values of one type, got {found}")

    def names(self) -> dict[str, str]:
        """`double` where whole numbers and others are mixed, `string` where there is no value at all."""
        return {
            name: _TYPES[float if float in places else next(iter(places), str)]
            for name, places in self._places.items()
        }


@dataclass
class _Survey:
    """What the first pass found.

    Args:
        types: Types of the extra columns.
        num_rows: Rows read.
        num_captions: Rows with a visible character.
        num_sources: Files read.
        is_cut: Whether the limit ended the reading.
        digests: File and digest of each batch.
    """

    types: _ColumnTypes
    num_rows: int = 0
    num_captions: int = 0
    num_sources: int = 0
    is_cut: bool = False
    digests: list[tuple[str, bytes]] = field(default_factory=list)


def _survey(reader: _CaptionReader, buckets: Path, limit: _Limit) -> _Survey:
    """First pass: counts, types, and the ids, spread over the buckets in the order of their rows."""
    survey = _Survey(_ColumnTypes(reader.columns.extra), num_sources=len(reader.names))
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in _bucket_paths(buckets, "ids")]
        for batch in map(limit.cut, reader.read()):
            survey.num_rows += len(batch.rows)
            survey.num_captions += len(batch.ids)
            survey.digests.append((batch.rows.source, batch.digest()))
            survey.types.add(batch)
            for identity in batch.ids:
                files[identity[0] % _NUM_BUCKETS].write(identity)
            if limit.is_reached:
                survey.is_cut = True
                survey.num_sources = reader.names.index(batch.rows.source) + 1
                break
    return survey


def _number_occurrences(buckets: Path) -> int:
    """Second pass: writes the occurrence number of each id, and returns how many are above 0."""
    num_duplicates = 0
    paths = zip(_bucket_paths(buckets, "ids"), _bucket_paths(buckets, "occurrences"), strict=True)
    for ids_path, occurrences_path in paths:
        num_seen: dict[bytes, int] = {}
        with ids_path.open("rb") as ids, occurrences_path.open("wb") as file:
            while block := ids.read(_NUM_IDS_PER_BLOCK * _NUM_ID_BYTES):
                occurrences = array("I")
                for (identity,) in struct.iter_unpack(f"{_NUM_ID_BYTES}s", block):
                    occurrences.append(number := num_seen.get(identity, 0))
                    num_seen[identity] = number + 1
                num_duplicates += len(occurrences) - occurrences.count(0)
                occurrences.tofile(file)
        ids_path.unlink()
    return num_duplicates


def _read_again(
    reader: _CaptionReader, survey: _Survey, buckets: Path
) -> Iterator[tuple[_CaptionBatch, list[int]]]:
    """Third pass: each batch with the occurrence numbers of its captions.

    Raises:
        ValueError: A batch is not the one of the first pass.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in _bucket_paths(buckets, "occurrences")]
        numbers = [_read_numbers(file) for file in files]
        digests = iter(survey.digests)
        for batch in reader.read(survey.num_rows if survey.is_cut else None):
            source = batch.rows.source
            expected_source, expected = next(digests, (source, b""))
            if (source, batch.digest()) != (expected_source, expected):
                changed = min(source, expected_source, key=reader.names.index)
                raise ValueError(f"caption file {changed} changed while it was read")
            yield batch, [next(numbers[identity[0] % _NUM_BUCKETS]) for identity in batch.ids]
        for source, _ in digests:
            raise ValueError(f"caption file {source} changed while it was read")


def _bucket_paths(buckets: Path, suffix: str) -> list[Path]:
    return [buckets / f"{index}.{suffix}" for index in range(_NUM_BUCKETS)]


def _read_numbers(file: BinaryIO) -> Iterator[int]:
    while block := file.read(_NUM_IDS_PER_BLOCK * array("I").itemsize):
        yield from array("I", block)


class _PlanWriter:
    """Writes the planned captions; on an error it leaves no file.

    Args:
        folder: Where to.
        num_captions_per_shard: Rows of each row group but the last.
        types: Type of each extra column by name.
    """

    def __init__(self, folder: Path, num_captions_per_shard: int, types: dict[str, str]) -> None:
        self.types = types
        self.files: list[Path] = []
        self.num_captions = 0
        self._folder, self._num_captions_per_shard = folder, num_captions_per_shard
        extra = [pa.field(name, _ARROW_TYPES[kind]) for name, kind in types.items()]
        self._schema = pa.schema([*_OWN_FIELDS, *extra])
        self._pending: list[list[Any]] = [[] for _ in self._schema]
        self._num_shards = 0
        self._writer: pq.ParquetWriter | None = None
        self._ids_digest, self._extra_digest = hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write_pending(is_last=True)
        finally:
            self._close_file()
            if error is not None:
                for path in self.files:
                    path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of the ids in order, from which the occurrence numbers follow, and of the extra columns."""
        if not self.types:
            return self._ids_digest.hexdigest()
        parts = [list(self.types.items()), self._ids_digest.hexdigest(), self._extra_digest.hexdigest()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def write(self, batch: _CaptionBatch, occurrences: list[int]) -> None:
        """Appends captions to the plan."""
        extra: list[list[Scalar]] = [
            _to_floats(batch, name, values) if kind == "double" else values
            for (name, kind), values in zip(self.types.items(), batch.extra, strict=True)
        ]
        self._ids_digest.update(b"".join(batch.ids))
        for row in zip(*extra, strict=True):
            self._extra_digest.update(f"{json.dumps(row)}\n".encode())
        own: list[list[Any]] = [[identity.hex() for identity in batch.ids], occurrences, batch.texts]
        for pending, values in zip(self._pending, [*own, *extra], strict=True):
            pending.extend(values)
        self.num_captions += len(batch.ids)
        if len(self._pending[0]) >= max(self._num_captions_per_shard, _NUM_CAPTIONS_PER_WRITE):
            self._write_pending(is_last=False)

    def _write_pending(self, is_last: bool) -> None:
        """Writes whole shards, and the rest too if it is the last one."""
        num_rows = len(self._pending[0])
        if not is_last:
            num_rows -= num_rows % self._num_captions_per_shard
        start = 0
        while start < num_rows:
            num_shards_in_file = self._num_shards % NUM_SHARDS_PER_CAPTION_FILE
            if num_shards_in_file == 0:
                self._open_file()
            num_shards_left = NUM_SHARDS_PER_CAPTION_FILE - num_shards_in_file
            stop = min(num_rows, start + num_shards_left * self._num_captions_per_shard)
            columns = [values[start:stop] for values in self._pending]
            table = pa.table(columns, schema=self._schema)
            assert self._writer is not None  # opened for the first shard
            self._writer.write_table(table, row_group_size=self._num_captions_per_shard)
            self._num_shards += -(-(stop - start) // self._num_captions_per_shard)
            start = stop
        for values in self._pending:
            del values[:num_rows]

    def _open_file(self) -> None:
        self._close_file()
        self.files.append(self._folder / f"{len(self.files):05d}.parquet")
        self._writer = pq.ParquetWriter(
            self.files[-1], self._schema, compression="zstd", use_dictionary=False, write_statistics=False
        )

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _to_floats(batch: _CaptionBatch, name: str, values: list[Scalar]) -> list[Scalar]:
    """Whole numbers of a column that holds others too.

    Raises:
        ValueError: One of them is no float exactly.
    """
    floats: list[Scalar] = [None if value is None else float(value) for value in values]
    if floats != values:
        index = next(index for index, value in enumerate(values) if floats[index] != value)
        raise ValueError(
            f"{batch.where(index)}: column {name!r} holds floats too, and {values[index]} is not exact as one"
        )
    return floats
