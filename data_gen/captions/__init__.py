"""Captions and their identity by content.

A caption's id depends on its text alone, so equal captions have equal ids in every dataset, order and shard.
"""

import hashlib
import re
import unicodedata

MAX_CAPTION_CHARACTERS = 8_192

_SPACES = re.compile(r"\s+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


def normalise_caption(text: str) -> str:
    """Unicode NFC, control characters and runs of white space as one space, none at the ends."""
    if text.isascii() and text.isprintable():  # the same, three times as fast
        return " ".join(text.split())
    return _SPACES.sub(" ", _CONTROLS.sub(" ", unicodedata.normalize("NFC", text))).strip()


def caption_id(text: str) -> str:
    """First 32 hex digits of sha256(normalise_caption(text)): equal captions, equal ids; no dot.

    128 bits: among a billion captions, two share an id with probability 1e-21.
    """
    return hash_caption(normalise_caption(text)).hex()


def hash_caption(text: str) -> bytes:
    """The 16 bytes of `caption_id` of a caption that is normalised already."""
    return hashlib.sha256(text.encode()).digest()[:16]
