"""Laws of reading captions; the files come from csv, json, gzip, pyarrow, tarfile and webdataset."""

import csv
import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # it ships none
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen.captions import MAX_CAPTION_CHARACTERS, normalise_caption
from data_gen.captions import rows as rows_module
from data_gen.captions.rows import MAX_ROW_BYTES, RESERVED_COLUMNS, Columns
from data_gen.captions.sources import digest_sources, expand_sources, read_rows

CAPTIONS = [
    "a red cube",
    'a sign that says "stop, now"',
    "größer, größer",
    "猫と犬",
    "",
    "'tis a dog",
    "a\\b",
]
LABELS = ["one", "two", "", 'thr"ee', "fünf", "six", "7"]
FORMATS = ["txt", "csv", "tsv", "jsonl", "ndjson", "parquet", "tar"]
PACKABLE = ["txt", "csv", "tsv", "jsonl", "ndjson"]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows of columns by the library that others use for the format."""
    text = io.StringIO(newline="")
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "txt":
            text.writelines(f"{row['caption']}\n" for row in rows)
        case "csv" | "tsv" as suffix:
            dialect = "excel" if suffix == "csv" else "excel-tab"
            writer = csv.DictWriter(text, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
        case "jsonl" | "ndjson":
            text.writelines(f"{json.dumps(row)}\n" for row in rows)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
            return path
        case "tar":
            write_webdataset(path, rows)
            return path
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_webdataset(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    from webdataset import TarWriter

    with TarWriter(str(path)) as writer:
        for index, row in enumerate(rows):
            fields = {name: value for name, value in row.items() if name != "caption"}
            writer.write(
                {"__key__": f"{index:06d}", "txt": row["caption"], "json": fields, "jpg": b"\xff\xd8"}
            )


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **attributes: Any) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in attributes.items():
                setattr(member, attribute, value)
            tar.addfile(member, io.BytesIO(content))
    return path


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path | str, columns: Columns | None = None) -> list[tuple[Any, ...]]:
    """Rows of (caption, extra values …)."""
    batches = read_rows(str(path), columns or Columns())
    return [row for batch in batches for row in zip(batch.captions, *batch.extra, strict=True)]


def read_captions(path: Path | str, columns: Columns | None = None) -> list[str]:
    return [normalise_caption(caption or "") for caption, *_ in read(path, columns)]


def refusal(path: Path | str, columns: Columns | None = None) -> str:
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(ValueError, match=".") as caught:
        read(path, columns)
    message = str(caught.value)
    assert Path(path).name in message
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


# What is read


@pytest.mark.parametrize("name", [*FORMATS, *(f"{name}.gz" for name in PACKABLE)])
def test_every_format_gives_the_same_captions(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / f"rows.{name}", [{"caption": caption} for caption in CAPTIONS])
    assert read_captions(path) == CAPTIONS


@pytest.mark.parametrize("name", ["csv", "tsv.gz", "jsonl", "parquet", "tar"])
def test_every_format_with_columns_carries_text_along(tmp_path: Path, name: str) -> None:
    rows = [{"label": label, "caption": c, "other": 1} for c, label in zip(CAPTIONS, LABELS, strict=True)]
    path = write_rows(tmp_path / f"rows.{name}", rows)
    assert [row[1] for row in read(path, Columns(extra=("label",)))] == LABELS
    assert read_captions(path, Columns(caption="label")) == LABELS


@pytest.mark.parametrize("name", ["jsonl", "parquet", "tar"])
def test_typed_formats_keep_the_type_of_a_value(tmp_path: Path, name: str) -> None:
    values = [("x", 2**63 - 1, 0.1, True), (None, -5, -1e300, False), ("007", None, None, None)]
    names = ("text", "whole", "real", "truth")
    rows = [{"caption": "a dog", **dict(zip(names, row, strict=True))} for row in values]
    found = read(write_rows(tmp_path / f"rows.{name}", rows), Columns(extra=names))
    assert [row[1:] for row in found] == values
    assert [list(map(type, row[1:])) for row in found] == [list(map(type, row)) for row in values]


@pytest.mark.parametrize("name", ["csv", "tsv"])
def test_formats_without_types_give_text(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / f"rows.{name}", [{"caption": "a dog", "zip": "007", "number": 3}])
    assert read(path, Columns(extra=("zip", "number"))) == [("a dog", "007", "3")]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_columns_without_a_header_go_by_number(tmp_path: Path, suffix: str) -> None:
    delimiter = "," if suffix == "csv" else "\t"
    path = write(tmp_path / f"rows.{suffix}", f"a dog{delimiter}u1\r\na cat{delimiter}u2\r\n".encode())
    assert read(path, Columns("0", ("1",))) == [("a dog", "u1"), ("a cat", "u2")]
    assert "no column '2'; there are '0', '1'" in refusal(path, Columns("2"))


def test_tsv_keeps_quotation_marks_that_csv_must_double(tmp_path: Path) -> None:
    lines = ["caption\tn", '"stop" he said\t1', '"a ""b"" c"\t2', '"\t3', '""\t4', 'a "b"\t5']
    path = write(tmp_path / "rows.tsv", "\n".join(lines).encode())
    assert read_captions(path) == ['"stop" he said', 'a "b" c', '"', "", 'a "b"']


def test_a_csv_value_may_go_over_lines_and_the_next_row_still_has_its_own(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", [{"caption": "one\ntwo\r\nthree"}, {"caption": "x" * 8193}])
    assert read_captions(write_rows(tmp_path / "good.csv", [{"caption": "one\ntwo\r\nthree"}])) == [
        "one two three"
    ]
    assert "rows.csv, line 5: a caption must have at most 8192" in refusal(path)


def test_a_csv_column_that_is_not_asked_for_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    rows = [{"caption": "a dog", "blob": "x" * 500_000}, {"caption": "a cat", "blob": "y"}]
    assert read_captions(write_rows(tmp_path / "rows.csv", rows)) == ["a dog", "a cat"]


@pytest.mark.parametrize("name", ["txt", "csv", "jsonl", "tar"])
def test_a_byte_order_mark_is_no_part_of_a_caption_or_name(tmp_path: Path, name: str) -> None:
    mark = b"\xef\xbb\xbf"
    contents = {
        "txt": mark + b"a dog\n",
        "csv": mark + b"caption\na dog\n",
        "jsonl": mark + b'{"caption": "a dog"}\n',
    }
    path = tmp_path / f"rows.{name}"
    if name == "tar":
        write_tar(path, [("a.txt", mark + b"a dog"), ("a.json", mark + b"{}")])
    else:
        write(path, contents[name])
    assert read(path) == [("a dog",)]


@pytest.mark.parametrize("num_bytes", [3, 7, 64])
@pytest.mark.parametrize("is_marked", [False, True])
def test_lines_do_not_depend_on_the_blocks_they_are_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, is_marked: bool
) -> None:
    text = "one\n\n  zwei: größer\r\n猫と犬\n" + "x" * 100 + "\n\nlast"
    path = write(tmp_path / "rows.txt", text.encode("utf-8-sig" if is_marked else "utf-8"))
    monkeypatch.setattr(rows_module, "_NUM_BYTES_PER_BLOCK", num_bytes)
    batches = list(read_rows(str(path), Columns()))
    assert [caption for batch in batches for caption in batch.captions] == text.split("\n")
    places = [batch.where(index) for batch in batches for index in range(len(batch))]
    assert places == [f"{path}, line {number}" for number in range(1, 8)]


def test_a_file_that_gives_fewer_bytes_than_asked_for_makes_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.txt", [{"caption": f"caption {n}"} for n in range(1000)])
    monkeypatch.setattr(rows_module, "_NUM_BYTES_PER_BLOCK", 1000)
    expected = list(read_rows(str(path), Columns()))

    class Trickle(io.BytesIO):
        def read(self, num_bytes: int | None = -1) -> bytes:
            return super().read(min(num_bytes or 0, 77))

    with Trickle(path.read_bytes()) as file:
        assert list(rows_module.READERS[".txt"](file, str(path), Columns())) == expected


def test_a_tar_sample_is_what_webdataset_takes_for_one(tmp_path: Path) -> None:
    members = [
        ("__meta__/about.txt", b"no caption"),
        (".hidden.txt", b"no caption"),
        ("no_suffix", b"x"),
        ("dir.v1/a.jpg", b"x"),
        ("dir.v1/a.TXT", b"a dog"),
        ("dir.v1/a.0.jpg", b"x"),
        ("other/a.json", b'{"caption": "a cat", "txt": 1}'),
        ("other/a.txt", b"a tiger"),
        ("b.json", b'{"caption": "a cow"}'),
        ("c.json", b'{"caption": null}'),
    ]
    path = write_tar(tmp_path / "rows.tar", members)
    assert read_captions(path) == ["a dog", "a tiger", "a cow", ""]

    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with path.open("rb") as file:
        files = [dict(member, __url__="") for member in tar_file_iterator(file)]
    assert [sample["__key__"] for sample in group_by_keys(files)] == ["dir.v1/a", "other/a", "b", "c"]


def test_members_that_are_no_regular_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [("a", tarfile.DIRTYPE), ("x.txt", tarfile.SYMTYPE), ("y.txt", tarfile.FIFOTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("../../a.txt")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"a dog"))
    assert read_captions(path) == ["a dog"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_parquet_dictionary_and_large_text_are_text(tmp_path: Path) -> None:
    captions = pa.array(["a dog", None, "a cat"])
    table = pa.table({"caption": captions.dictionary_encode(), "a.b": captions.cast(pa.large_string())})
    pq.write_table(table, tmp_path / "rows.parquet")
    expected = [("a dog", "a dog"), (None, None), ("a cat", "a cat")]
    assert read(tmp_path / "rows.parquet", Columns(extra=("a.b",))) == expected


# Which files


def test_paths_globs_and_urls_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in ["b.txt", "a.txt", "c.csv", "x[1].txt"]:
        write(tmp_path / name, b"caption\n")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/captions/m2.txt", b"x")
    memory.pipe_file("/captions/m1.txt", b"x")
    try:
        patterns = [
            f"{tmp_path}/x[1].txt",
            f"{tmp_path}/[ab].txt",
            "memory://captions/*.txt",
            f"{tmp_path}/c.csv",
        ]
        names = expand_sources(patterns)
        assert [name.rpartition("/")[2] for name in names] == [
            "x[1].txt", "a.txt", "b.txt", "m1.txt", "m2.txt", "c.csv"
        ]  # fmt: skip
        assert read(names[3]) == [("x",)]
    finally:
        memory.rm("/captions", recursive=True)


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x")
    (tmp_path / "link.txt").symlink_to(path)
    for other in [
        str(path),
        f"{tmp_path}/./a.txt",
        f"file://{path}",
        f"{tmp_path}/*.txt",
        f"{tmp_path}/link.txt",
    ]:
        with pytest.raises(ValueError, match=r"caption file .*\.txt is named twice"):
            expand_sources([str(path), other])


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"caption file .*nothing\.txt does not exist"):
        expand_sources([f"{tmp_path}/nothing.txt"])
    with pytest.raises(FileNotFoundError, match=r"caption file .*\*\.txt does not exist"):
        expand_sources([f"{tmp_path}/*.txt"])
    with pytest.raises(ValueError, match="is not a file"):
        expand_sources([str(tmp_path)])
    with pytest.raises(ValueError, match="at least one file"):
        expand_sources([])


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.gz", "a.parquet.gz", "a.txt.zip"])
def test_an_unknown_format_is_refused_with_those_there_are(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"x")
    with pytest.raises(ValueError, match=rf"{name}: the name must end in one of \.txt, .*\.tar"):
        expand_sources([str(path)])


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tgz.gz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"x")
    with pytest.raises(ValueError, match="compressed tars are not read"):
        expand_sources([str(path)])


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    path = write_rows(tmp_path / "a.txt.gz", [{"caption": "a dog"}])
    (source,) = digest_sources([str(path)])
    assert (source.name, source.num_bytes) == (str(path), path.stat().st_size)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# What is refused


def test_every_column_of_a_shard_is_reserved() -> None:
    from data_gen.shard_writer import IMAGE_COLUMNS

    assert set(IMAGE_COLUMNS) == RESERVED_COLUMNS


def test_a_column_is_not_named_twice_nor_as_one_of_the_dataset() -> None:
    for name in RESERVED_COLUMNS - {"caption"}:
        with pytest.raises(
            ValueError, match=f"extra column '{name}' has a name that the dataset itself uses"
        ):
            Columns(extra=("label", name))
    for columns in [("caption", ("a", "a")), ("text", ("text",))]:
        with pytest.raises(ValueError, match="is named twice"):
            Columns(*columns)
    with pytest.raises(ValueError, match="must not be empty"):
        Columns(extra=("",))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "tar"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", [{"caption": "a dog", "b": 1}])
    for columns in (Columns("text"), Columns(extra=("text",))):
        message = refusal(path, columns)
        assert "there is no column 'text'; there are" in message
        assert "'caption'" in message
        assert "'b'" in message


def test_a_text_file_has_no_extra_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", b"a dog\n")
    assert "a text file has no column 'label'" in refusal(path, Columns(extra=("label",)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_no_bytes_is_refused(tmp_path: Path, suffix: str) -> None:
    assert "holds no caption (0 bytes)" in refusal(write(tmp_path / f"rows.{suffix}", b""))
    if suffix in PACKABLE:
        assert "holds no caption (0 bytes)" in refusal(write(tmp_path / f"rows.{suffix}.gz", b""))


@pytest.mark.parametrize("suffix", PACKABLE)
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, suffix: str, damage: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}.gz", [{"caption": f"a dog {n}"} for n in range(1000)])
    content = path.read_bytes()
    flipped = content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]  # in the checksum
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": flipped, "garbage": b"text"}[damage])
    assert "is not a whole gzip file" in refusal(path)


@pytest.mark.parametrize("suffix", PACKABLE)
def test_a_gzip_file_that_unpacks_to_one_endless_line_is_refused_in_little_memory(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"rows.{suffix}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(32):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        assert "line 1: a line must have at most" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_line_beyond_the_cap_is_refused_wherever_it_stands(tmp_path: Path, suffix: str) -> None:
    header = b"caption\n" if suffix != "jsonl" else b'{"caption": "a"}\n'
    for num_before in (0, 700):
        blank = (b" " * 999 + b"\n") * num_before
        path = write(tmp_path / f"rows.{suffix}", header + blank + b"x" * (MAX_ROW_BYTES + 1) + b"\n")
        assert f"line {num_before + 2}: a line must have at most {MAX_ROW_BYTES} bytes" in refusal(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_caption_beyond_the_bound_is_named_by_its_row(tmp_path: Path, suffix: str) -> None:
    longest = "𝒳" * MAX_CAPTION_CHARACTERS
    rows = [{"caption": longest}, {"caption": "x" * 10_000}]
    path = write_rows(tmp_path / f"rows.{suffix}", rows)
    message = refusal(path)
    assert f"a caption must have at most {MAX_CAPTION_CHARACTERS} characters, got 10000" in message
    place = {"txt": "line 2", "csv": "line 3", "tsv": "line 3", "parquet": "row 2", "tar": "sample '000001'"}
    assert place.get(suffix, "line 2") in message
    assert read(write_rows(tmp_path / f"good.{suffix}", rows[:1])) == [(longest,)]


@pytest.mark.parametrize("suffix", PACKABLE)
def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path: Path, suffix: str) -> None:
    first = b'{"caption": "a"}\n' if "json" in suffix else b"caption\n"
    path = write(tmp_path / f"rows.{suffix}", first + b"caf\xe9\n")
    assert f"rows.{suffix}, line 2: byte 0xe9 at offset {len(first) + 3} is not UTF-8" in refusal(path)


def test_text_of_a_tar_or_parquet_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "rows.tar", [("a.txt", b"caf\xe9")])
    assert "sample 'a': member .txt: byte 0xe9 at offset 3 is not UTF-8" in refusal(tar)
    column = pa.array([b"ok", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"caption": column}), tmp_path / "rows.parquet")
    assert "rows.parquet, row 2: text that is not UTF-8" in refusal(tmp_path / "rows.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tar"])
@pytest.mark.parametrize("value", [5, 1.5, True, ["a dog"], {"text": "a dog"}])
def test_a_caption_that_is_no_text_is_refused(tmp_path: Path, suffix: str, value: Any) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", [{"text": value, "caption": "x"}])
    assert f": a caption must be text, got {type(value).__name__}" in refusal(path, Columns("text"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tar"])
@pytest.mark.parametrize("value", [["a dog"], {"text": "a dog"}])
def test_an_extra_value_that_is_nested_is_refused(tmp_path: Path, suffix: str, value: Any) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", [{"caption": "a dog", "tags": value}])
    expected = f": column 'tags' must be text, a number or a truth value, got {type(value).__name__}"
    assert expected in refusal(path, Columns(extra=("tags",)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (pa.scalar(float("nan")), "column 'n' must be finite, got nan"),
        (pa.scalar(float("-inf")), "column 'n' must be finite, got -inf"),
        (pa.scalar(2**63, pa.uint64()), "column 'n' must be within 64 bits"),
        (pa.scalar(0, pa.timestamp("s")), "must be text, a number or a truth value, got datetime"),
        (pa.scalar(b"x"), "must be text, a number or a truth value, got bytes"),
        (pa.scalar("x" * 10_000), "column 'n' must have at most 8192 characters, got 10000"),
    ],
)
def test_an_extra_value_that_json_cannot_hold_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    table = pa.table({"caption": ["a", "b"], "n": pa.array([None, value.as_py()], value.type)})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = refusal(tmp_path / "rows.parquet", Columns(extra=("n",)))
    assert "rows.parquet, row 2: column 'n' " in found
    assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "expected a JSON object, got list"),
        (b'"a dog"', "expected a JSON object, got str"),
        (b"a dog", "not JSON"),
        (b'{"caption": "a", "n": NaN}', "not JSON (NaN is no JSON value)"),
        (b'{"caption": "a", "n": -Infinity}', "not JSON (-Infinity is no JSON value)"),
        (b'{"caption": "a", "n": 1e999}', "column 'n' must be finite"),
        (b'{"caption": "a", "n": 9223372036854775808}', "column 'n' must be within 64 bits"),
        (b'{"caption": "a", "n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"caption": "\\ud83d", "n": 1}', "a caption must be Unicode, got half of a surrogate pair"),
        (b'{"caption": "a", "n": "\\ud83d"}', "column 'n' must be Unicode"),
        (b'{"caption": "a"}', "there is no column 'n'; there are 'caption'"),
        (b'{"n": 1}', "there is no column 'caption'; there are 'n'"),
    ],
)
def test_a_json_line_that_is_no_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"caption": "a dog", "n": 1}\n' + line)
    found = refusal(path, Columns(extra=("n",)))
    assert "rows.jsonl, line 2: " in found
    assert message in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("caption,n\na,1\nb\n", "line 3: a row must have 2 values, got 1"),
        ("caption,n\na,1\nb,2,3\n", "line 3: a row must have 2 values, got 3"),
        (
            'caption,n\n"a\nb",1\n"c,2\nd,3\n',
            "line 4: unexpected end of data (is a quotation mark not closed?)",
        ),
        ('caption,n\n"a" dog,1\n', "line 2: "),
        ('caption,n\na,1\n"c' + ",2\n" * 500_000, "line 3: a row must have at most"),
        ("caption,n,n\na,1,2\n", "line 1: there are 2 columns 'n'"),
        ("caption;n\na;1\n", "line 1: there is no column 'caption'; there are 'caption;n'"),
        ("\ncaption,n\n", "line 1: there is no column 'caption'; there are none"),
    ],
)
def test_a_csv_row_that_is_damaged_is_named(tmp_path: Path, content: str, message: str) -> None:
    assert f"rows.csv, {message}" in refusal(write(tmp_path / "rows.csv", content.encode()))


def test_a_tsv_row_that_is_ragged_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", b"caption\tn\na dog\t1\na cat\n")
    assert "rows.tsv, line 3: a row must have 2 values, got 1" in refusal(path)


def test_blank_lines_are_empty_rows_in_every_text_format(tmp_path: Path) -> None:
    for name, content in [
        ("a.txt", b"a\n\n \nb"),
        ("a.csv", b"caption,n\na,1\n\n,2\nb,3\n"),
        ("a.tsv", b"caption\tn\r\na\t1\r\n\r\n \t2\r\nb\t3\r\n"),
        ("a.jsonl", b'{"caption": "a"}\n\n \n{"caption": "b"}'),
    ]:
        assert read_captions(write(tmp_path / name, content)) == ["a", "", "", "b"]


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.99])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, cut: float) -> None:
    path = write_rows(tmp_path / "rows.parquet", [{"caption": f"a dog {n}"} for n in range(1000)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    assert "is not a readable parquet file" in refusal(path)
    path.write_bytes(content[:100] + bytes(500) + content[600:])
    assert "rows.parquet" in refusal(path)


def test_a_tar_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [(f"{n}.txt", b"a dog" * 200) for n in range(3)]).read_bytes()
    size = whole.rindex(b"a dog") // 512 * 512 + 512
    path = tmp_path / "rows.tar"
    for cut in range(100, size + 1, 100):
        assert "tar" in refusal(write(path, whole[:cut]))
    assert "is not a whole tar" in refusal(write(path, whole[:size]))
    assert read_captions(write(path, whole[: size + 512])) == [" ".join(["a dog" * 200])] * 3


def test_a_tar_with_a_damaged_header_or_another_tar_behind_it_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "rows.tar", [(f"{n}.txt", b"a dog") for n in range(3)]).read_bytes()
    damaged = bytearray(whole)
    damaged[1024 + 10] ^= 1
    assert "is not a whole tar" in refusal(write(tmp_path / "rows.tar", bytes(damaged)))
    assert "is not a whole tar" in refusal(write(tmp_path / "rows.tar", whole[:4096] + whole))
    assert "is not a readable tar" in refusal(write(tmp_path / "rows.tar", gzip.compress(whole)))


@pytest.mark.parametrize("name", ["a.b.txt", "dir/a.v1.json", "a.0.TXT"])
def test_a_key_with_a_dot_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "rows.tar", [("ok.txt", b"a dog"), (name, b"{}")])
    message = refusal(path)
    assert f"member '{name}'" in message
    assert "a key must hold no dot" in message


def test_keys_that_occur_twice_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "rows.tar", [("a.txt", b"a dog"), ("a.jpg", b""), ("a.txt", b"a cat")])
    assert "sample 'a': two members .txt" in refusal(path)
    path = write_tar(tmp_path / "rows.tar", [("a.txt", b"a dog"), ("b.txt", b"x"), ("a.json", b"{}")])
    assert "the key of sample 'a' occurs again" in refusal(path)


def test_members_beyond_the_cap_are_refused_unread(tmp_path: Path) -> None:
    for name, num_bytes in [("a.txt", 1 << 33), ("a.json", 1 << 21)]:
        member = tarfile.TarInfo(name)
        member.size = num_bytes
        path = write(tmp_path / "rows.tar", member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert f"member '{name}' must have at most" in refusal(path)
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    path = write(tmp_path / "rows.tar", long_name.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "is not a readable tar (a header of" in refusal(path)


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    sparse = {"GNU.sparse.map": "0,5", "GNU.sparse.size": "100000"}
    path = write_tar(tmp_path / "rows.tar", [("a.txt", b"a dog")], pax_headers=sparse)
    assert "member 'a.txt' is sparse" in refusal(path)


def test_a_sparse_map_that_is_no_number_is_refused(tmp_path: Path) -> None:
    for sparse in ({"GNU.sparse.map": "x"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}):
        path = write_tar(tmp_path / "rows.tar", [("a.txt", b"a dog")], pax_headers=sparse)
        assert "is not a readable tar" in refusal(path)


def test_a_sample_without_a_caption_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "rows.tar", [("a.txt", b"a dog"), ("b.jpg", b"x")])
    assert "sample 'b': there is no column 'caption'; there are none" in refusal(path)
    path = write_tar(tmp_path / "rows.tar", [("a\n.json", b"[]")])
    assert "sample 'a\\n': expected a JSON object, got list" in refusal(path)


def test_reading_csv_leaves_the_csv_module_no_stricter_than_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit(1 << 24)
    try:
        read(write(tmp_path / "rows.csv", b"caption\na\n"))
        assert csv.field_size_limit() == 1 << 24
    finally:
        csv.field_size_limit(before)
