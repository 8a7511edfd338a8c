"""Laws of caption identity."""

import hashlib

import pytest

from data_gen.captions import caption_id, normalise_caption


def test_id_is_the_hash_of_the_normalised_text() -> None:
    assert caption_id("a  red\tcube ") == hashlib.sha256(b"a red cube").hexdigest()[:32]


def test_id_is_that_of_the_characters_not_of_their_encoding() -> None:
    assert caption_id("caf\u00e9") == caption_id("cafe\u0301")
    assert caption_id("cafe") != caption_id("caf\u00e9")


def test_key_has_no_dot() -> None:
    assert set(caption_id("a.b.c/../d.jpg")) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "text", ["a\x00b", "a\x1b[31mb", "a\u202eb", "e\x00\u0301", " \ufeffa b", "\u2000a\u3000b"]
)
def test_normalising_twice_is_normalising_once_and_leaves_no_control_character(text: str) -> None:
    once = normalise_caption(text)
    assert normalise_caption(once) == once
    assert once.isprintable()
