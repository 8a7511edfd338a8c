"""Laws of the caption plan; the oracles are a dictionary in memory, hashlib and pyarrow."""

import csv
import hashlib
import io
import json
import random
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen.captions import caption_id, hash_caption, normalise_caption, planning, rows
from data_gen.captions.planning import CaptionPlan, PlannedCaption, plan_captions, read_planned_captions
from data_gen.captions.rows import Columns

WORDS = ["red", "cube", "größer", "猫", "dog", " ", "\u0301", "a.b/../c", "\x00", "\u202e", "&"]


def plan(paths: Path | Sequence[Path], folder: Path, **options: Any) -> CaptionPlan:
    """Plans files; keywords change the options."""
    defaults: dict[str, Any] = {
        "columns": Columns(),
        "duplicates": "drop",
        "limit": None,
        "num_captions_per_shard": 4,
    }
    patterns = [str(path) for path in ([paths] if isinstance(paths, Path) else paths)]
    return plan_captions(patterns, folder=folder, **defaults | options)


def read_shards(result: CaptionPlan) -> list[list[PlannedCaption]]:
    """The captions, shard by shard."""
    shards = []
    for path in result.files:
        with path.open("rb") as file:
            num_shards = pq.ParquetFile(file).num_row_groups
            shards += [read_planned_captions(file, index) for index in range(num_shards)]
    return shards


def read_captions(result: CaptionPlan) -> list[PlannedCaption]:
    return [caption for shard in read_shards(result) for caption in shard]


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def write_json_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    return write_lines(path, [json.dumps(record) for record in records])


def plan_in_memory(lines: Sequence[str], duplicates: str, limit: int | None) -> tuple[list[str], list[int]]:
    """Keys of the planned captions, and numbers of rows read, empty and repeated."""
    seen: Counter[str] = Counter()
    keys: list[str] = []
    num_rows = num_empty = num_duplicates = 0
    for line in lines:
        if len(keys) == limit:
            break
        num_rows += 1
        if not line.strip(" \u0000\u202e\r"):
            num_empty += 1
            continue
        identity = caption_id(line)
        occurrence = seen[identity]
        seen[identity] += 1
        num_duplicates += occurrence > 0
        if occurrence == 0:
            keys.append(identity)
        elif duplicates == "number":
            keys.append(f"{identity}-{occurrence}")
    return keys, [num_rows, num_empty, num_duplicates]


@pytest.mark.parametrize("duplicates", ["drop", "number"])
@pytest.mark.parametrize("seed", range(12))
def test_a_plan_is_that_of_a_dictionary_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duplicates: str, seed: int
) -> None:
    draw = random.Random(seed)
    lines = [
        "".join(draw.choices(WORDS, k=draw.choice([1, 2, 2, 20]))) for _ in range(draw.randrange(1, 600))
    ]
    lines.append("at least one caption")
    limit = draw.choice([None, None, 1, 40, len(lines)])
    monkeypatch.setattr(rows, "_NUM_BYTES_PER_BLOCK", draw.choice([50, 1 << 20]))
    monkeypatch.setattr(planning, "_NUM_CAPTIONS_PER_WRITE", draw.choice([1, 16_384]))
    monkeypatch.setattr(
        planning, "NUM_SHARDS_PER_CAPTION_FILE", num_shards_per_file := draw.choice([1, 3, 1000])
    )
    cut = draw.randrange(1, len(lines) + 1)
    paths = [write_lines(tmp_path / "a.txt", lines[:cut]), write_lines(tmp_path / "b.txt", lines[cut:])]
    paths = paths if lines[cut:] else paths[:1]
    size = draw.choice([1, 7, 256])
    result = plan(paths, tmp_path / "plan", duplicates=duplicates, limit=limit, num_captions_per_shard=size)

    keys, counts = plan_in_memory(lines, duplicates, limit)
    captions = read_captions(result)
    assert [caption.key for caption in captions] == keys
    assert [caption_id(caption.text) for caption in captions] == [caption.caption_id for caption in captions]
    assert [result.num_rows, result.num_empty, result.num_duplicates] == counts
    assert result.num_captions == len(keys)
    shards = read_shards(result)
    assert [len(shard) for shard in shards[:-1]] == [size] * (len(shards) - 1)
    assert len(result.files) == -(-len(shards) // num_shards_per_file)
    num_dropped = result.num_duplicates if duplicates == "drop" else 0
    assert result.num_rows == result.num_captions + result.num_empty + num_dropped


def test_a_key_and_text_are_sane_whatever_was_read(tmp_path: Path) -> None:
    path = write_json_lines(
        tmp_path / "a.jsonl", [{"caption": "../..\x00/etc\n\x1b[31m\u202epasswd.txt  "}] * 2
    )
    first, second = read_captions(plan(path, tmp_path / "plan", duplicates="number"))
    assert first.text == second.text == "../.. /etc [31m passwd.txt"
    assert set(first.key) <= set("0123456789abcdef")
    assert (first.key, second.key) == (first.caption_id, f"{first.caption_id}-1")
    assert (first.occurrence, second.occurrence) == (0, 1)


def test_plain_text_is_normalised_as_any_other() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab .~!\t\n\x00\x1c\x7f", k=draw.randrange(12)))
        assert normalise_caption(f"{text} é") == f"{normalise_caption(text)} é".strip()
        assert hash_caption(normalise_caption(text)).hex() == caption_id(text)


# Digest


def write_format(folder: Path, suffix: str, records: Sequence[dict[str, str]]) -> list[Path]:
    """Records in one format, spread over as many files as the suffix has letters."""
    paths = []
    size = -(-len(records) // len(suffix))
    for index, start in enumerate(range(0, len(records), size)):
        part, path = records[start : start + size], folder / f"{suffix}{index}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(part), path)
        elif suffix == "jsonl":
            write_json_lines(path, part)
        elif suffix == "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["name", "caption"])
                writer.writeheader()
                writer.writerows(part)
        elif suffix == "txt":
            write_lines(path, [record["caption"] for record in part])
        else:
            with tarfile.open(path, "w") as tar:
                for number, record in enumerate(part):
                    content = json.dumps(record).encode()
                    member = tarfile.TarInfo(f"{number}.json")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        paths.append(path)
    return paths


@pytest.mark.parametrize("extra", [(), ("name",)])
def test_a_digest_depends_on_neither_format_nor_files(tmp_path: Path, extra: tuple[str, ...]) -> None:
    records = [{"name": f"ü{n}", "caption": f"caption, größer {n % 30}"} for n in range(40)]
    suffixes = ["jsonl", "csv", "parquet", "tar"] if extra else ["txt", "jsonl", "csv", "parquet", "tar"]
    for duplicates in ("drop", "number"):
        results = [
            plan(
                write_format(tmp_path, suffix, records),
                tmp_path / f"plan-{suffix}",
                columns=Columns(extra=extra),
                duplicates=duplicates,
            )
            for suffix in suffixes
        ]
        assert len({result.sha256 for result in results}) == 1
        assert len({tuple(path.read_bytes() for path in result.files) for result in results}) == 1


def test_a_digest_of_captions_alone_is_that_of_their_ids(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", ["one", "two", " ", "one", "three"])
    for duplicates, captions in [
        ("drop", ["one", "two", "three"]),
        ("number", ["one", "two", "one", "three"]),
    ]:
        ids = b"".join(bytes.fromhex(caption_id(caption)) for caption in captions)
        result = plan(path, tmp_path / duplicates, duplicates=duplicates)
        assert result.sha256 == hashlib.sha256(ids).hexdigest()


def test_a_digest_tells_every_difference_in_what_is_planned(tmp_path: Path) -> None:
    plain = [{"caption": "a", "n": 1, "m": 1}, {"caption": "b", "n": 2, "m": 2}]
    cases: list[tuple[list[dict[str, Any]], tuple[str, ...]]] = [
        (plain, ()),
        (plain, ("n",)),
        (plain, ("m",)),
        (plain, ("n", "m")),
        (plain[::-1], ("n",)),
        ([{"caption": "a", "n": 1.0}, {"caption": "b", "n": 2}], ("n",)),
        ([{"caption": "a", "n": "1"}, {"caption": "b", "n": "2"}], ("n",)),
        ([{"caption": "a", "n": 1}, {"caption": "b", "n": 3}], ("n",)),
        ([{"caption": "a", "n": 1}, {"caption": "b", "n": None}], ("n",)),
        ([{"caption": "a", "n": True}, {"caption": "b", "n": False}], ("n",)),
        ([{"caption": "a", "n": None}, {"caption": "b", "n": None}], ("n",)),
        ([{"caption": "a", "n": 1}, {"caption": "c", "n": 2}], ("n",)),
    ]
    digests = []
    for records, extra in cases:
        path = write_json_lines(tmp_path / "a.jsonl", records)
        digests.append(plan(path, tmp_path / "plan", columns=Columns(extra=extra)).sha256)
    assert len(set(digests)) == len(cases)


def test_planning_twice_writes_identical_bytes(tmp_path: Path) -> None:
    records = [{"caption": f"caption {n % 700}", "x": n / 7} for n in range(2000)]
    path = write_json_lines(tmp_path / "a.jsonl", records)
    results = [
        plan(
            path,
            tmp_path / name,
            columns=Columns(extra=("x",)),
            duplicates="number",
            num_captions_per_shard=9,
        )
        for name in "ab"
    ]
    first, second = ([file.read_bytes() for file in result.files] for result in results)
    assert first == second
    assert results[0].sha256 == results[1].sha256


# Extra columns


def test_extra_values_come_back_with_their_types(tmp_path: Path) -> None:
    values = [("x", 2**63 - 1, 0.1, True, 1, None), (None, None, None, None, 2.5, None)]
    names = ("text", "whole", "real", "truth", "mixed", "nothing")
    records = [
        {"caption": f"caption {n}", **dict(zip(names, row, strict=True))} for n, row in enumerate(values)
    ]
    paths = [write_json_lines(tmp_path / f"{n}.jsonl", [record]) for n, record in enumerate(records)]
    result = plan(paths, tmp_path / "plan", columns=Columns(extra=names))
    kinds = ["string", "int64", "double", "bool", "double", "string"]
    assert dict(result.extra_columns) == dict(zip(names, kinds, strict=True))
    assert list(result.extra_columns) == list(names)
    captions = read_captions(result)
    assert [tuple(caption.extra.values()) for caption in captions] == values
    assert type(captions[0].extra["mixed"]) is float
    assert type(captions[0].extra["truth"]) is bool
    schema = pq.read_schema(result.files[0])
    assert [str(schema.field(name).type) for name in names] == kinds


@pytest.mark.parametrize(("first", "second"), [(1, "x"), ("x", True), (True, 1), (0.5, False)])
def test_a_column_of_two_types_is_refused_with_a_row_of_each(tmp_path: Path, first: Any, second: Any) -> None:
    a = write_json_lines(tmp_path / "a.jsonl", [{"caption": "", "n": second}, {"caption": "a", "n": first}])
    b = write_json_lines(tmp_path / "b.jsonl", [{"caption": "b", "n": None}, {"caption": "c", "n": second}])
    kinds = [type(first).__name__, type(second).__name__]
    expected = (
        f"column 'n' must hold values of one type, got {kinds[0]} ({a}, line 2) and {kinds[1]} ({b}, line 2)"
    )
    with pytest.raises(ValueError, match=".") as caught:
        plan([a, b], tmp_path / "plan", columns=Columns(extra=("n",)))
    assert str(caught.value) == expected


def test_a_whole_number_that_is_no_exact_float_is_refused_among_floats(tmp_path: Path) -> None:
    records = [{"caption": "a", "n": 0.5}, {"caption": "b", "n": 2**53 + 1}]
    path = write_json_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: column 'n' .* 9007199254740993 is not exact"):
        plan(path, tmp_path / "plan", columns=Columns(extra=("n",)))
    assert list((tmp_path / "plan").iterdir()) == []


def test_a_number_keeps_the_values_of_its_own_row(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{"caption": "a", "n": n} for n in range(3)])
    columns = Columns(extra=("n",))
    numbered = read_captions(plan(path, tmp_path / "plan", columns=columns, duplicates="number"))
    assert [(caption.occurrence, caption.extra["n"]) for caption in numbered] == [(0, 0), (1, 1), (2, 2)]
    assert [caption.extra for caption in read_captions(plan(path, tmp_path / "plan", columns=columns))] == [
        {"n": 0}
    ]


# Limit, sources, progress


@pytest.mark.parametrize("duplicates", ["drop", "number"])
def test_nothing_is_read_behind_the_limit(tmp_path: Path, duplicates: str) -> None:
    first = write_lines(tmp_path / "a.txt", ["one", "two", "", "three"])
    (tmp_path / "broken.parquet").write_bytes(b"x")
    paths = [first, tmp_path / "broken.parquet"]
    result = plan(paths, tmp_path / "plan", limit=3, duplicates=duplicates)
    assert [caption.text for caption in read_captions(result)] == ["one", "two", "three"]
    assert [(source.name, source.num_bytes, source.sha256) for source in result.sources] == [
        (str(first), 15, None)
    ]
    with pytest.raises(ValueError, match=r"broken\.parquet is not a readable parquet file"):
        plan(paths, tmp_path / "plan", limit=4, duplicates=duplicates)


def test_each_source_is_named_with_its_digest(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.txt", [name]) for name in "ba"]
    sources = plan(paths, tmp_path / "plan").sources
    assert [source.name for source in sources] == list(map(str, paths))
    assert [source.sha256 for source in sources] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    ]


def test_progress_counts_each_row_twice(tmp_path: Path) -> None:
    numbers: list[int] = []
    path = write_lines(tmp_path / "a.txt", ["a", "", "a"])
    plan(path, tmp_path / "plan", progress=numbers.append)
    assert sum(numbers) == 6


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be >= 1, got 0"),
        ({"num_captions_per_shard": 0}, "num_captions_per_shard must be >= 1, got 0"),
        ({"duplicates": "keep"}, "duplicates must be drop or number, got keep"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(write_lines(tmp_path / "a.txt", ["one"]), tmp_path / "plan", **options)


@pytest.mark.parametrize("limit", [None, 3])
def test_files_without_a_caption_are_refused(tmp_path: Path, limit: int | None) -> None:
    paths = [write_lines(tmp_path / "a.txt", ["", " \t"]), write_lines(tmp_path / "b.csv", ["caption"])]
    with pytest.raises(ValueError, match=r"caption file .*a\.txt, .*b\.csv holds no caption \(2 rows\)"):
        plan(paths, tmp_path / "plan", limit=limit)
    assert list((tmp_path / "plan").iterdir()) == []


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"caption": "new", "n": 1}\n')


def shorter(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def cut_in_half(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:500]))


def another_caption(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"caption 700", b"caption 7OO"))


def another_value(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"n": 1}', b'"n": 2}', 1))


def another_type(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"n": 1}', b'"n": "x"}'))


@pytest.mark.parametrize(
    "change", [longer, shorter, cut_in_half, another_caption, another_value, another_type]
)
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("duplicates", ["drop", "number"])
def test_a_file_that_changes_between_the_passes_is_named(
    tmp_path: Path, change: Callable[[Path], None], changed: int, duplicates: Literal["drop", "number"]
) -> None:
    paths = []
    for name in "ab":
        records = [{"caption": f"{name} caption {n}", "n": 1} for n in range(1000)]
        paths.append(write_json_lines(tmp_path / f"{name}.jsonl", records))
    num_rows = 0

    def count(num_rows_more: int) -> None:
        nonlocal num_rows
        num_rows += num_rows_more
        if num_rows == 2000:
            change(paths[changed])

    with pytest.raises(ValueError, match=f"caption file {paths[changed]} changed while it was read"):
        plan(paths, tmp_path / "plan", columns=Columns(extra=("n",)), duplicates=duplicates, progress=count)
    assert list((tmp_path / "plan").iterdir()) == []


def test_nothing_but_the_plan_is_left_in_the_folder(tmp_path: Path) -> None:
    result = plan(write_lines(tmp_path / "a.txt", list("abcdefgh")), tmp_path / "plan")
    assert (
        sorted((tmp_path / "plan").iterdir()) == list(result.files) == [tmp_path / "plan" / "00000.parquet"]
    )


@pytest.mark.parametrize("content", [b"", b"not parquet", None])
def test_a_file_that_is_no_plan_is_refused(content: bytes | None) -> None:
    buffer = io.BytesIO(content or b"")
    if content is None:
        pq.write_table(pa.table({"caption": ["a dog"]}), buffer)
    with pytest.raises(ValueError, match="not a file of planned captions with a row group 0"):
        read_planned_captions(buffer, 0)


def test_a_shard_that_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    result = plan(write_lines(tmp_path / "a.txt", ["one"]), tmp_path / "plan")
    for row_group in (1, -1):
        with result.files[0].open("rb") as file, pytest.raises(ValueError, match=f"row group {row_group}"):
            read_planned_captions(file, row_group)


# Memory


@pytest.mark.parametrize("duplicates", ["drop", "number"])
def test_memory_does_not_grow_with_the_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duplicates: str
) -> None:
    monkeypatch.setattr(rows, "_NUM_BYTES_PER_BLOCK", 1 << 14)
    monkeypatch.setattr(planning, "_NUM_CAPTIONS_PER_WRITE", 512)
    peaks = []
    for num_rows in (3_000, 24_000):
        path = write_lines(tmp_path / f"{num_rows}.txt", [f"caption {n // 2}" for n in range(num_rows)])
        tracemalloc.start()
        try:
            plan(path, tmp_path / "plan", duplicates=duplicates, num_captions_per_shard=256)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]
