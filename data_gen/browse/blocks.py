"""The pages' data on disk: blocks of rows, each a script that hands its rows to `receive` (data.js).

A block holds as many captions whatever the shards' sizes, so that a page of captions takes one or two files,
and a filter takes one small file a block of each column that it asks about.
"""

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import numpy as np

from data_gen.browse.contents import CaptionRow, FailureRow, ShardContents, Value

BLOCK_SIZE = 500
"""Rows of a block."""
MAX_LABELS = 100
"""A text column with more values than this is searched, not chosen from."""
NUM_BINS = 40
_NUM_SHA256_DIGITS = 16
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class ColumnSummary:
    """What a filter over a column needs to know.

    Args:
        name: The column.
        number: Names its files: `column{number}.js`.
        kind: `number` (from, to), `label` (one of few values) or `text` (search).
        first_block: The block where the column occurs first; before it, values are missing.
        minimum: Smallest number.
        maximum: Largest number.
        histogram: Images in equal bins from minimum to maximum.
        labels: Label → captions that have it, the most frequent first.
    """

    name: str
    number: int
    kind: Literal["number", "label", "text"]
    first_block: int
    minimum: float | None = None
    maximum: float | None = None
    histogram: tuple[int, ...] = ()
    labels: tuple[tuple[str, int], ...] = ()


@dataclass
class _Column:
    """A column while it is written; its numbers go to a temporary file, for the histogram at the end."""

    name: str
    number: int
    first_block: int
    numbers: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    minimum: float = float("inf")
    maximum: float = -float("inf")
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, values: Sequence[Value]) -> None:
        """Counts the values of one caption."""
        numbers = array("d", (value for value in values if isinstance(value, int | float)))
        if numbers:
            self.minimum, self.maximum = min(self.minimum, *numbers), max(self.maximum, *numbers)
            self.numbers.write(numbers.tobytes())
        if len(self.labels) <= MAX_LABELS:
            self.labels.update({value for value in values if isinstance(value, str)})

    def summarise(self) -> ColumnSummary:
        """Its kind, and what its filter shows."""
        place = self.name, self.number
        if self.labels:
            is_label = len(self.labels) <= MAX_LABELS and self.minimum > self.maximum
            labels = tuple(sorted(self.labels.items(), key=lambda item: (-item[1], item[0])))
            if is_label:
                return ColumnSummary(*place, "label", self.first_block, labels=labels)
            return ColumnSummary(*place, "text", self.first_block)
        if self.minimum > self.maximum:
            return ColumnSummary(*place, "number", self.first_block)
        return ColumnSummary(
            *place, "number", self.first_block, self.minimum, self.maximum, tuple(self._count_numbers())
        )

    def _count_numbers(self) -> list[int]:
        counts = np.zeros(NUM_BINS, dtype=np.int64)
        self.numbers.seek(0)
        while chunk := self.numbers.read(_CHUNK_BYTES):
            counts += np.histogram(np.frombuffer(chunk), NUM_BINS, (self.minimum, self.maximum))[0]
        return [int(count) for count in counts]


class BlockWriter:
    """Writes the rows of shard after shard; at most a block of rows is held.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._captions: list[CaptionRow] = []
        self._failures: list[FailureRow] = []
        self._num_caption_blocks = self._num_failure_blocks = 0
        self._columns: dict[str, _Column] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in self._columns.values():
            column.numbers.close()

    def add(self, contents: ShardContents) -> None:
        """Adds the captions and failures of the next shard."""
        for caption in contents.captions:
            self._captions.append(caption)
            if len(self._captions) == BLOCK_SIZE:
                self._flush_captions()
        for failure in contents.failures:
            self._failures.append(failure)
            if len(self._failures) == BLOCK_SIZE:
                self._flush_failures()

    def close(self) -> None:
        """Writes what is left."""
        if self._captions:
            self._flush_captions()
        if self._failures:
            self._flush_failures()

    def summarise_columns(self) -> list[ColumnSummary]:
        """Every column that occurred, in the order of its first occurrence."""
        return [column.summarise() for column in self._columns.values()]

    def _flush_captions(self) -> None:
        rows, block = self._captions, self._num_caption_blocks
        self._write("captions", block, [[row.caption, row.width, row.height] for row in rows])
        self._write("details", block, [_to_details(row) for row in rows])
        for name in dict.fromkeys(name for row in rows for name in row.values):
            if name not in self._columns:
                self._columns[name] = _Column(name, len(self._columns), block)
        for column in self._columns.values():
            values = [row.values.get(column.name, (None,) * len(row.image_seeds)) for row in rows]
            for values_of_caption in values:
                column.add(values_of_caption)
            self._write(f"column{column.number}", block, _to_column(values))
        self._captions, self._num_caption_blocks = [], block + 1

    def _flush_failures(self) -> None:
        block = self._num_failure_blocks
        rows = [[row.caption, row.reason, row.key, row.caption_id, row.shard_name] for row in self._failures]
        self._write("failures", block, rows)
        self._failures, self._num_failure_blocks = [], block + 1

    def _write(self, kind: str, block: int, rows: list[Any]) -> None:
        path = self._folder / f"{block:05d}" / f"{kind}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_script(kind, block, rows))


def to_script(kind: str, block: int, rows: list[Any]) -> bytes:
    """A call of `receive`, safe wherever a script may stand, whatever text is in the rows."""
    text = json.dumps(rows, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A surrogate without its partner, as damaged text may have, becomes its escape, which JavaScript reads.
    return f'receive("{kind}", {block}, {text});\n'.encode(errors="backslashreplace")


def _to_details(row: CaptionRow) -> list[Any]:
    sha256 = [digest[:_NUM_SHA256_DIGITS] for digest in row.sha256]
    return [row.key, row.caption_id, row.image_extension, row.image_seeds, sha256, row.fingerprints]


def _to_column(values: list[tuple[Value, ...]]) -> list[Value]:
    """One value a caption where the images of each caption agree, else one an image."""
    if all(len(set(values_of_caption)) <= 1 for values_of_caption in values):
        return [values_of_caption[0] for values_of_caption in values]
    return [value for values_of_caption in values for value in values_of_caption]
