"""Rows of captions out of the formats that people have them in, streamed in batches.

    .txt             one caption a line
    .csv .tsv        a header with the names of the columns; without a header, columns are named 0, 1, …
    .jsonl .ndjson   one JSON object a line
    .parquet         columns of text, numbers or truth values
    .tar             WebDataset: the fields of the member .json; the member .txt is the column `caption`

Values of CSV and TSV are text, since those formats have no types. What is too long is refused before it is in
memory as a whole, so that a file of any size needs little.
"""

import codecs
import csv
import hashlib
import itertools
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

from data_gen.captions import MAX_CAPTION_CHARACTERS, normalise_caption

RESERVED_COLUMNS = frozenset(
    ["key", "index", "caption", "caption_id", "occurrence", "image_seed", "guidance_scale", "settings_hash"]
).union(["fingerprint", "sha256", "tar_offset", "num_bytes", "width", "height"])
"""Columns of the parquet beside each shard, where extra columns stand under their own names."""
MAX_ROW_BYTES = 1 << 20

_MAX_TEXT_BYTES = 16 * MAX_CAPTION_CHARACTERS
_NUM_BYTES_PER_BLOCK = 1 << 20
_NUM_ROWS_PER_BATCH = 512
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Args:
        caption: Name of the caption's column, or its number (0, 1, …) in CSV and TSV without a header. Text
            files have no columns.
        extra: Names of the columns that are carried along with each caption.

    Raises:
        ValueError: A name is empty, reserved, or there twice.
    """

    caption: str = "caption"
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for index, name in enumerate(self.extra):
            if name in RESERVED_COLUMNS:
                raise ValueError(f"extra column {name!r} has a name that the dataset itself uses")
            if name == self.caption or name in self.extra[:index]:
                raise ValueError(f"column {name!r} is named twice")
        if "" in (self.caption, *self.extra):
            raise ValueError("a column's name must not be empty")


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one file, as they were read.

    Args:
        source: The file.
        unit: What the format calls a row.
        places: Number or key of each row.
        captions: Not normalised; None or blank where there is none.
        extra: Values of each extra column, in the order of `Columns.extra`.
    """

    source: str
    unit: Literal["line", "row", "sample"]
    places: Sequence[int | str]
    captions: Sequence[str | None]
    extra: tuple[Sequence[Scalar], ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, index: int) -> str:
        """File and row, for messages."""
        return f"{self.source}, {self.unit} {self.places[index]}"

    def head(self, num_rows: int) -> "RowBatch":
        """The first rows alone."""
        extra = tuple(values[:num_rows] for values in self.extra)
        return replace(self, places=self.places[:num_rows], captions=self.captions[:num_rows], extra=extra)


def check_values(batch: RowBatch, columns: Columns) -> None:
    """Refuses captions that are no text, and values that JSON and parquet cannot both hold as they are.

    Raises:
        ValueError: There is one; names its row.
    """
    if set(map(type, batch.captions)) != {str} or not _is_plain(batch.captions):
        for index, text in enumerate(batch.captions):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{batch.where(index)}: a caption must be text, got {type(text).__name__}")
            if fault := _find_fault(text):
                raise ValueError(f"{batch.where(index)}: a caption {fault}")
    for name, values in zip(columns.extra, batch.extra, strict=True):
        if not _is_plain(values):
            for index, value in enumerate(values):
                if fault := _find_fault(value):
                    raise ValueError(f"{batch.where(index)}: column {name!r} {fault}")


def _is_plain(values: Sequence[Any]) -> bool:
    """Whether a quick look at them all finds nothing to refuse."""
    kinds = set(map(type, values))
    if kinds == {str}:
        return max(map(len, values)) <= MAX_CAPTION_CHARACTERS and all(map(str.isascii, values))
    if kinds == {int}:
        return min(values) >= -(2**63) and max(values) < 2**63
    return kinds == {float} and all(map(math.isfinite, values))


def _find_fault(value: object) -> str | None:
    match value:
        case str():
            if len(value) > MAX_CAPTION_CHARACTERS:
                return f"must have at most {MAX_CAPTION_CHARACTERS} characters, got {len(value)}"
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                return "must be Unicode, got half of a surrogate pair"
        case None | bool():
            pass
        case int():
            if not -(2**63) <= value < 2**63:
                return "must be within 64 bits, got a larger number"
        case float():
            if not math.isfinite(value):
                return f"must be finite, got {value}"
        case _:
            return f"must be text, a number or a truth value, got {type(value).__name__}"
    return None


# Lines: txt, csv, tsv, jsonl


def _read_lines(file: BinaryIO, name: str, max_bytes: int) -> Iterator[tuple[int, list[str]]]:
    """Lines of UTF-8 without their line feeds, many at a time, with the number of the first."""
    first, offset, rest = 1, 0, b""
    while block := _read_block(file, _NUM_BYTES_PER_BLOCK):
        if not offset and not rest and block.startswith(codecs.BOM_UTF8):
            offset, block = len(codecs.BOM_UTF8), block.removeprefix(codecs.BOM_UTF8)
        whole, line_feed, rest = (rest + block).rpartition(b"\n")
        if line_feed:
            lengths = list(map(len, whole.split(b"\n")))
            _check_lengths(lengths, name, first, max_bytes)
            yield first, _decode(whole, name, first, offset).split("\n")
            first += len(lengths)
            offset += len(whole) + 1
        _check_lengths([len(rest)], name, first, max_bytes)
    if rest:
        yield first, [_decode(rest, name, first, offset)]


def _read_block(file: BinaryIO, num_bytes: int) -> bytes:
    """As many bytes as were asked for, unless the file ends: a network's file may give fewer at a time."""
    block = file.read(num_bytes)
    while 0 < len(block) < num_bytes and (more := file.read(num_bytes - len(block))):
        block += more
    return block


def _check_lengths(lengths: list[int], name: str, first: int, max_bytes: int) -> None:
    if max(lengths) > max_bytes:
        index = next(index for index, length in enumerate(lengths) if length > max_bytes)
        raise ValueError(
            f"{name}, line {first + index}: a line must have at most {max_bytes} bytes, "
            f"got at least {lengths[index]}"
        )


def _decode(block: bytes, name: str, first: int, offset: int) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        line = first + block.count(b"\n", 0, error.start)
        byte = f"byte 0x{block[error.start]:02x} at offset {offset + error.start}"
        raise ValueError(f"{name}, line {line}: {byte} is not UTF-8") from error


def _read_text(file: BinaryIO, name: str, columns: Columns) -> Iterator[RowBatch]:
    if columns.extra:
        raise ValueError(f"caption file {name}: a text file has no column {columns.extra[0]!r}")
    for first, lines in _read_lines(file, name, _MAX_TEXT_BYTES):
        yield RowBatch(name, "line", range(first, first + len(lines)), lines)


def _read_json_lines(file: BinaryIO, name: str, columns: Columns) -> Iterator[RowBatch]:
    def read() -> Iterator[tuple[Any, ...]]:
        for first, lines in _read_lines(file, name, MAX_ROW_BYTES):
            for number, line in enumerate(lines, first):
                try:
                    record = _parse_json_object(line) if line and not line.isspace() else blank
                    yield number, *_pick(record, columns)
                except ValueError as error:
                    raise ValueError(f"{name}, line {number}: {error}") from error

    blank = dict.fromkeys([columns.caption, *columns.extra])
    return _batch(read(), name, "line")


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        record = _JSON.decode(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deep)") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_csv(file: BinaryIO, name: str, columns: Columns) -> Iterator[RowBatch]:
    """Quoted as `csv.writer`, pandas and spreadsheets do; a row may go over several lines."""
    num_characters = 0  # of the row so far

    def read_row_lines() -> Iterator[str]:
        nonlocal num_characters
        for _, lines in _read_lines(file, name, MAX_ROW_BYTES):
            for line in lines:
                num_characters += len(line) + 1
                if num_characters > MAX_ROW_BYTES:
                    raise csv.Error(f"a row must have at most {MAX_ROW_BYTES} characters")
                yield f"{line}\n"

    def read() -> Iterator[tuple[int, list[str]]]:
        nonlocal num_characters
        first = 1
        try:
            for values in rows:
                yield first, values
                first, num_characters = rows.line_num + 1, 0
        except csv.Error as error:
            raise ValueError(f"{name}, line {first}: {error} (is a quotation mark not closed?)") from error

    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    rows = csv.reader(read_row_lines(), strict=True)
    return _batch(_read_table(read(), name, columns), name, "line")


def _read_tsv(file: BinaryIO, name: str, columns: Columns) -> Iterator[RowBatch]:
    """A value may begin with a quotation mark, as in lists of captions; one wholly in them is unwrapped."""

    def read() -> Iterator[tuple[int, list[str]]]:
        for first, lines in _read_lines(file, name, MAX_ROW_BYTES):
            for number, line in enumerate(lines, first):
                line = line.removesuffix("\r")
                values = line.split("\t") if line else []
                yield number, list(map(_unquote, values)) if '"' in line else values

    return _batch(_read_table(read(), name, columns), name, "line")


def _unquote(value: str) -> str:
    inner = value[1:-1].replace('""', "")
    is_quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner
    return value[1:-1].replace('""', '"') if is_quoted else value


def _read_table(
    rows: Iterable[tuple[int, list[str]]], name: str, columns: Columns
) -> Iterator[tuple[Any, ...]]:
    """Picks the columns by the names in the first row; by number where the caption's column is a number."""
    header: list[str] = []
    indexes: list[int] = []
    blank = [None] * (1 + len(columns.extra))
    for number, values in rows:
        if not indexes:
            header = list(map(str, range(len(values)))) if columns.caption.isdecimal() else values
            if fault := _find_column_fault(header, columns):
                raise ValueError(f"{name}, line {number}: {fault}")
            indexes = [header.index(column) for column in (columns.caption, *columns.extra)]
            if header is values:
                continue
        if values and len(values) != len(header):
            raise ValueError(
                f"{name}, line {number}: a row must have {len(header)} values, got {len(values)}"
            )
        yield number, *([values[index] for index in indexes] if values else blank)
    if not indexes:
        raise ValueError(f"caption file {name} has no line with the names of its columns")


def _find_column_fault(names: Sequence[str], columns: Columns) -> str | None:
    for name in (columns.caption, *columns.extra):
        if name not in names:
            there = ", ".join(f"{other!r:.80}" for other in names[:20])
            return f"there is no column {name!r}; there are {there or 'none'}"
    for name, count in Counter(names).items():
        if count > 1 and name:
            return f"there are {count} columns {name!r:.80}"
    return None


def _pick(record: dict[str, Any], columns: Columns) -> list[Any]:
    """The caption and the extra values of a JSON object."""
    try:
        return [record[columns.caption], *[record[name] for name in columns.extra]]
    except KeyError as error:
        raise ValueError(_find_column_fault(list(record), columns)) from error


def _batch(
    rows: Iterator[tuple[Any, ...]], name: str, unit: Literal["line", "row", "sample"]
) -> Iterator[RowBatch]:
    """Batches rows of (place, caption, extra values …)."""
    while batch := list(itertools.islice(rows, _NUM_ROWS_PER_BATCH)):
        places, captions, *extra = zip(*batch, strict=True)
        yield RowBatch(name, unit, places, captions, tuple(extra))


# Columns and members: parquet, tar


def _read_parquet(file: BinaryIO, name: str, columns: Columns) -> Iterator[RowBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [columns.caption, *columns.extra]
    first = 1
    try:
        # Without these two a row group is in memory as a whole.
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_NUM_BYTES_PER_BLOCK)
        if fault := _find_column_fault(parquet.schema_arrow.names, columns):
            raise ValueError(f"caption file {name}: {fault}")
        for batch in parquet.iter_batches(_NUM_ROWS_PER_BATCH, columns=wanted, use_threads=False):
            places = range(first, first + len(batch))
            captions, *extra = [_to_list(batch.column(column), name, first) for column in wanted]
            yield RowBatch(name, "row", places, captions, tuple(extra))
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        reason = normalise_caption(str(error))  # several lines, some with raw bytes
        raise ValueError(f"caption file {name} is not a readable parquet file ({reason})") from error


def _to_list(column: Any, name: str, first: int) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        for number, value in enumerate(column, first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}, row {number}: text that is not UTF-8 ({error.reason})") from error
        raise


def _read_tar(file: BinaryIO, name: str, columns: Columns) -> Iterator[RowBatch]:
    """Samples as webdataset forms them: consecutive members whose names are equal up to the first dot."""

    def read() -> Iterator[tuple[Any, ...]]:
        seen: set[bytes] = set()
        for key, members in itertools.groupby(_read_members(file, name), key=lambda member: member[0]):
            identity = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).digest()
            if identity in seen:
                raise ValueError(f"{name}: the key of sample {key!r} occurs again after other samples")
            seen.add(identity)
            try:
                yield repr(key), *_pick(_parse_sample(members), columns)
            except ValueError as error:
                raise ValueError(f"{name}, sample {key!r}: {error}") from error

    return _batch(read(), name, "sample")


def _parse_sample(members: Iterable[tuple[str, str, bytes | None]]) -> dict[str, Any]:
    texts: dict[str, str] = {}
    for _, suffix, content in members:
        if content is not None and suffix in texts:
            raise ValueError(f"two members .{suffix}")
        if content is not None:
            try:
                texts[suffix] = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{content[error.start]:02x} at offset {error.start}"
                raise ValueError(f"member .{suffix}: {byte} is not UTF-8") from error
    record = _parse_json_object(texts["json"]) if "json" in texts else {}
    return record | ({"caption": texts["txt"]} if "txt" in texts else {})


def _read_members(file: BinaryIO, name: str) -> Iterator[tuple[str, str, bytes | None]]:
    """Key, suffix and, of .txt and .json alone, content of each regular member."""
    with _open_tar(file, name) as tar:
        while (member := _find_next(tar, name)) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
            stem, _, suffix = member.name.rpartition("/")[2].partition(".")
            if member.isreg() and stem and suffix and not _WEBDATASET_META.match(member.name):
                key = member.name.removesuffix(f".{suffix}")
                yield key, suffix.lower(), _read_member(file, name, member, suffix.lower())
        file.seek(tar.offset)
    # tarfile takes a torn or damaged header for the end.
    end = _read_block(file, tarfile.RECORDSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise ValueError(f"caption file {name} is not a whole tar: no end mark at byte {tar.offset}")


def _read_member(file: BinaryIO, name: str, member: tarfile.TarInfo, suffix: str) -> bytes | None:
    """The content of a .txt or .json, None of anything else."""
    if suffix.rpartition(".")[2] not in ("txt", "json"):
        return None
    if "." in suffix:
        raise ValueError(
            f"{name}: member {member.name!r}: a key must hold no dot, since readers of WebDataset would take "
            f"this for .{suffix} of another sample"
        )
    max_bytes = _MAX_TEXT_BYTES if suffix == "txt" else MAX_ROW_BYTES
    if member.size > max_bytes:
        raise ValueError(
            f"{name}: member {member.name!r} must have at most {max_bytes} bytes, got {member.size}"
        )
    if member.issparse():
        raise ValueError(f"{name}: member {member.name!r} is sparse; it must be stored whole")
    file.seek(member.offset_data)
    content = _read_block(file, member.size)
    if len(content) < member.size:
        raise ValueError(f"caption file {name} is not a whole tar: it ends within member {member.name!r}")
    return content


class _CappedFile:
    """What tarfile reads headers from: a header may claim any length for its long name or attributes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > MAX_ROW_BYTES:
            raise tarfile.ReadError(f"a header of {num_bytes} bytes")
        return self._file.read(num_bytes)


def _open_tar(file: BinaryIO, name: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=_CappedFile(file), mode="r:")  # type: ignore[call-overload]
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"caption file {name} is not a readable tar ({error})") from error


def _find_next(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"caption file {name} is not a readable tar ({error})") from error


READERS: dict[str, Callable[[BinaryIO, str, Columns], Iterator[RowBatch]]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
}
"""By suffix. Each streams the rows of an open file of that name; the same bytes make the same batches."""
