"""Captions and their identity by content.

A caption's id depends on its text alone, so equal captions have equal ids in every dataset, order and shard.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_CAPTION_CHARACTERS = 8_192

_MAX_LINE_BYTES = 16 * MAX_CAPTION_CHARACTERS
_SPACES = re.compile(r"\s+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


@dataclass(frozen=True)
class Caption:
    """A normalised caption with its identity.

    Args:
        caption_id: `caption_id(text)`, 32 hex digits.
        text: `normalise_caption` of what was read; never empty.
    """

    caption_id: str
    text: str


@dataclass(frozen=True)
class CaptionList:
    """The captions of a job, and what became of every line that was read.

    Args:
        captions: Distinct captions, in the order of their first occurrence.
        num_lines: Lines read, `len(captions) + num_empty + num_duplicates`.
        num_empty: Lines without a visible character.
        num_duplicates: Lines whose caption had occurred before.
    """

    captions: tuple[Caption, ...]
    num_lines: int
    num_empty: int
    num_duplicates: int

    @property
    def sha256(self) -> str:
        """Digest of the captions in order: what a job's settings hash takes for its input."""
        digest = hashlib.sha256()
        for caption in self.captions:
            digest.update(bytes.fromhex(caption.caption_id))
        return digest.hexdigest()


def normalise_caption(text: str) -> str:
    """Unicode NFC, control characters and runs of white space as one space, none at the ends."""
    return _SPACES.sub(" ", _CONTROLS.sub(" ", unicodedata.normalize("NFC", text))).strip()


def caption_id(text: str) -> str:
    """First 32 hex digits of sha256(normalise_caption(text)): equal captions, equal ids; no dot.

    128 bits: among a billion captions, two share an id with probability 1e-21.
    """
    return hashlib.sha256(normalise_caption(text).encode()).hexdigest()[:32]


def read_captions(path: str | Path, limit: int | None = None) -> CaptionList:
    """Reads a text file with one caption a line, dropping repeats, and counts what it drops.

    Args:
        path: UTF-8 text file.
        limit: Distinct captions to read, None for all; reading stops there.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not UTF-8 or too long, or the file holds no caption, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    captions: dict[str, Caption] = {}
    num_lines = num_empty = num_duplicates = 0
    for line in _read_lines(Path(path)):
        num_lines += 1
        text = normalise_caption(line)
        identity = caption_id(text)
        if not text:
            num_empty += 1
        elif identity in captions:
            num_duplicates += 1
        else:
            captions[identity] = Caption(identity, text)
            if len(captions) == limit:
                break
    if not captions:
        raise ValueError(f"caption file {path} holds no caption ({num_lines} lines, each of them empty)")
    return CaptionList(tuple(captions.values()), num_lines, num_empty, num_duplicates)


def _read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, streamed, each within `MAX_CAPTION_CHARACTERS`."""
    if not path.exists():
        raise FileNotFoundError(f"caption file {path} does not exist")
    if not path.is_file():
        raise ValueError(f"caption file {path} is not a file")
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), start=1):
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                if len(line) < _MAX_LINE_BYTES:
                    at = offset + error.start
                    raise ValueError(
                        f"{path}, line {number}: byte 0x{line[error.start]:02x} at offset {at} is not UTF-8"
                    ) from error
                text = line.decode(errors="replace")
            if len(text) > MAX_CAPTION_CHARACTERS:
                size = f"at least {len(text)}" if len(line) == _MAX_LINE_BYTES else f"{len(text)}"
                raise ValueError(
                    f"{path}, line {number}: a caption must have at most {MAX_CAPTION_CHARACTERS} "
                    f"characters, got {size}"
                )
            offset += len(line)
            yield text
