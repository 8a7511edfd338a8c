"""Laws of caption identity and of reading captions."""

import hashlib
from pathlib import Path

import pytest

from data_gen.captions import MAX_CAPTION_CHARACTERS, caption_id, normalise_caption, read_captions


def write(folder: Path, content: bytes) -> Path:
    path = folder / "captions.txt"
    path.write_bytes(content)
    return path


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


def test_each_line_read_is_a_caption_or_counted(tmp_path: Path) -> None:
    result = read_captions(write(tmp_path, b"one\n\n  two \r\none\n \t\ntwo\nthree"))
    assert [caption.text for caption in result.captions] == ["one", "two", "three"]
    assert (result.num_lines, result.num_empty, result.num_duplicates) == (7, 2, 2)


def test_limit_counts_distinct_captions(tmp_path: Path) -> None:
    path = write(tmp_path, b"one\none\ntwo\nthree\n")
    assert [caption.text for caption in read_captions(path, limit=2).captions] == ["one", "two"]


def test_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        read_captions(write(tmp_path, b"one\n"), limit=0)


def test_digest_depends_on_captions_and_order_alone(tmp_path: Path) -> None:
    first = read_captions(write(tmp_path, b"one\ntwo\n")).sha256
    assert read_captions(write(tmp_path, b" one\none\n\ntwo")).sha256 == first
    assert read_captions(write(tmp_path, b"two\none\n")).sha256 != first


def test_a_line_of_10000_characters_is_named_with_its_bound(tmp_path: Path) -> None:
    path = write(tmp_path, b"fine\n" + b"x" * 10_000 + b"\n")
    with pytest.raises(
        ValueError, match=rf"captions.txt, line 2: .* at most {MAX_CAPTION_CHARACTERS} .*, got 10000"
    ):
        read_captions(path)


def test_longest_line_is_accepted_in_any_script(tmp_path: Path) -> None:
    text = "𝒳" * MAX_CAPTION_CHARACTERS
    assert read_captions(write(tmp_path, text.encode())).captions[0].text == text


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: .* at least"):
        read_captions(write(tmp_path, "é".encode() * 2_000_000))


def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: byte 0xe9 at offset 7 is not UTF-8"):
        read_captions(write(tmp_path, b"one\ncaf\xe9\n"))


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_a_file_without_a_caption_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"captions\.txt holds no caption"):
        read_captions(write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist"):
        read_captions(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="is not a file"):
        read_captions(tmp_path)
