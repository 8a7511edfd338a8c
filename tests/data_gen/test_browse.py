"""`stablerep browse`: what is written; test_browse_chromium.py holds what a browser shows of it."""

import importlib.util
import io
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_gen.browse.output
from data_gen.browse import BrowseConfig, run
from data_gen.browse.blocks import BLOCK_SIZE, MAX_LABELS, BlockWriter, ColumnSummary, to_script
from data_gen.browse.contents import CaptionRow, ShardContents
from data_gen.browse.page import SCRIPT_NAMES, STYLE_NAME
from data_gen.browse.thumbnails import NUM_SHEET_COLUMNS, build_sheet
from data_gen.shards import ShardError, list_complete_shards, read_samples
from data_gen.storage import Store
from tests.data_gen.browse_datasets import (
    FAILURES,
    HOSTILE,
    NUM_IMAGES,
    build_sample,
    draw_images,
    write_dataset,
    write_mixed_dataset,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed_dataset(tmp_path_factory.mktemp("browse") / "scenes & <more>")


@pytest.fixture(scope="module")
def pages(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of `dataset`."""
    output = tmp_path_factory.mktemp("pages") / "pages"
    assert run(BrowseConfig(str(dataset), str(output))) == 0
    return output


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """Six captions in three shards; may be damaged."""
    root = tmp_path / "dataset"
    write_dataset(root, [f"caption {index}" for index in range(6)], 2)
    return root


def read_rows(pages: Path, kind: str) -> list[Any]:
    """The rows of every block of a kind, in order."""
    rows = []
    for path in sorted((pages / "build-1" / "data").glob(f"*/{kind}.js")):
        match = re.fullmatch(rf'receive\("{kind}", (\d+), (.*)\);\n', path.read_text("utf-8"), re.DOTALL)
        assert match is not None
        assert int(match[1]) == int(path.parent.name)
        rows += json.loads(match[2])
    return rows


def read_dataset(pages: Path) -> dict[str, Any]:
    """What the page tells its scripts."""
    page = (pages / "index.html").read_text("utf-8")
    [text] = re.findall(r'<script type="application/json" id="dataset">(.*?)</script>', page, re.DOTALL)
    dataset: dict[str, Any] = json.loads(text)
    return dataset


# What is written


def test_every_caption_is_listed_once_in_the_dataset_s_order(dataset: Path, pages: Path) -> None:
    samples = [sample for shard in list_complete_shards(dataset) for sample in read_samples(shard)]
    assert [row[0] for row in read_rows(pages, "captions")] == [sample.caption for sample in samples]
    details = read_rows(pages, "details")
    assert [row[0] for row in details] == [sample.key for sample in samples]
    assert [tuple(row[3]) for row in details] == [sample.image_seeds for sample in samples]


def test_every_image_is_in_its_caption_s_sheet_once(dataset: Path, pages: Path) -> None:
    num_sheets = 0
    for shard in list_complete_shards(dataset):
        for index, sample in enumerate(read_samples(shard)):
            sheet = Image.open(pages / f"build-1/images/{shard.name}/0/{index}.jpg")
            assert sheet.size == (16 * NUM_IMAGES, 16)
            for image_index, image in enumerate(sample.images):
                colour = np.asarray(Image.open(io.BytesIO(image))).mean(axis=(0, 1))
                shown = np.asarray(sheet)[4:12, 16 * image_index + 4 : 16 * image_index + 12].mean(
                    axis=(0, 1)
                )
                np.testing.assert_allclose(shown, colour, atol=6)
            num_sheets += 1
    assert len(list(pages.rglob("*.jpg"))) == num_sheets == 127


@pytest.mark.parametrize(
    ("size", "num_images", "thumbnail_size", "sheet_size"),
    [
        ((64, 32), 2, 16, (32, 8)),  # the longer side
        ((8, 8), 2, 16, (16, 8)),  # never enlarged
        ((200, 2), 1, 16, (16, 1)),  # never empty
        ((16, 16), NUM_SHEET_COLUMNS + 3, 16, (16 * NUM_SHEET_COLUMNS, 32)),  # a second row
    ],
)
def test_a_sheet_holds_thumbnails_of_the_size_asked_for(
    size: tuple[int, int], num_images: int, thumbnail_size: int, sheet_size: tuple[int, int]
) -> None:
    sample = build_sample("a caption", draw_images("a caption", num_images, size), size, {})
    assert Image.open(io.BytesIO(build_sheet(sample, thumbnail_size))).size == sheet_size


def test_an_image_of_another_size_than_its_sample_says_is_refused() -> None:
    sample = build_sample("a caption", draw_images("a caption", 1, (16, 16)), (16, 17), {})
    with pytest.raises(ShardError, match="16×16, expected 16×17"):
        build_sheet(sample, 128)


def test_full_images_are_the_files_of_the_shards(small_dataset: Path, tmp_path: Path) -> None:
    assert run(BrowseConfig(str(small_dataset), str(tmp_path / "pages"), full_images=True)) == 0
    num_images = 0
    for shard in list_complete_shards(small_dataset):
        for sample in read_samples(shard):
            for index, image in enumerate(sample.images):
                path = tmp_path / f"pages/build-1/originals/{shard.name}/0/{sample.key}.{index}.jpg"
                assert path.read_bytes() == image
                num_images += 1
    assert num_images == len(list((tmp_path / "pages/build-1/originals").rglob("*.jpg"))) == 18


def test_every_failure_is_listed_with_its_reason(pages: Path) -> None:
    rows = read_rows(pages, "failures")
    assert {row[0]: row[1] for row in rows} == FAILURES
    assert [row[4] for row in rows] == ["00000", "00001", "00001"]


@pytest.mark.parametrize("text", [*HOSTILE, "\u2029", "\ud800 alone", '"];alert(1);//'])
def test_no_text_leaves_its_string_in_a_script(text: str) -> None:
    script = to_script("captions", 0, [text]).decode("ascii", errors="ignore")
    assert "<" not in script
    content = to_script("captions", 0, [text]).decode()
    assert "\u2028" not in content
    assert "\u2029" not in content
    assert json.loads(content[len('receive("captions", 0, ') : -len(");\n")]) == [text]


def test_pages_ask_for_nothing_from_elsewhere(pages: Path) -> None:
    page = (pages / "index.html").read_text("utf-8")
    named = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert sorted(named) == sorted(["data:,", *(f"build-1/{name}" for name in (STYLE_NAME, *SCRIPT_NAMES))])
    for name in (STYLE_NAME, *SCRIPT_NAMES):
        source = (pages / "build-1" / name).read_text("utf-8")
        assert re.findall(r"https?:|//\w|@import|url\(|fetch\(|innerHTML|eval\(", source) == []


@pytest.mark.parametrize("form", ["absolute", "relative", "file://"])
def test_the_command_that_extracts_a_caption_works_wherever_it_is_run(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "it's a dataset"
    write_dataset(root, ["a caption"], 1)
    monkeypatch.chdir(tmp_path)
    url = {"absolute": str(root), "relative": root.name, "file://": f"file://{root}"}[form]
    assert run(BrowseConfig(url, str(tmp_path / "pages"))) == 0
    folder = read_dataset(tmp_path / "pages")["tarFolder"]
    (tmp_path / "elsewhere").mkdir()
    names = subprocess.run(
        f"tar -tf {folder}/00000.tar",
        shell=True,
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        check=True,
    )
    assert names.stdout.splitlines()[0].endswith(".json")


def test_a_dataset_that_is_not_on_a_disk_has_no_command(tmp_path: Path) -> None:
    store = Store("memory://browse/remote")
    write_dataset(tmp_path / "dataset", ["a caption"], 1)
    for path in (tmp_path / "dataset").iterdir():
        store.replace(path.name, path)
    assert run(BrowseConfig(store.url, str(tmp_path / "pages"))) == 0
    assert read_dataset(tmp_path / "pages")["tarFolder"] is None


# Columns


def test_an_empty_label_is_a_missing_one(tmp_path: Path) -> None:
    extras: dict[str, dict[str, Any]] = {
        "one": {"label": ""},
        "two": {"label": "x"},
        "three": {"label": None},
    }
    write_dataset(tmp_path / "dataset", list(extras), 3, extras=extras, extra_columns={"label": "string"})
    assert run(BrowseConfig(str(tmp_path / "dataset"), str(tmp_path / "pages"))) == 0
    column = next(entry for entry in read_dataset(tmp_path / "pages")["columns"] if entry["name"] == "label")
    assert read_rows(tmp_path / "pages", f"column{column['number']}") == [None, "x", None]
    page = (tmp_path / "pages/index.html").read_text("utf-8")
    [choice] = re.findall(r'<select name="is.label">(.*?)</select>', page, re.DOTALL)
    assert re.findall(r'<option value="(.*?)">(.*?)</option>', choice) == [("", "any"), ("x", "x (1)")]


def summarise(rows_of_values: list[dict[str, tuple[Any, ...]]], folder: Path) -> dict[str, ColumnSummary]:
    """The columns of captions with these values."""
    rows = tuple(
        CaptionRow(
            f"key{index}",
            f"id{index}",
            f"caption {index}",
            "jpg",
            8,
            8,
            ("a", "b"),
            ("c", "d"),
            ("e", "f"),
            values,
        )
        for index, values in enumerate(rows_of_values)
    )
    with BlockWriter(folder) as blocks:
        blocks.add(ShardContents("00000", rows))
        blocks.close()
        return {column.name: column for column in blocks.summarise_columns()}


def test_few_labels_are_chosen_from_and_many_are_searched(tmp_path: Path) -> None:
    few = [{"label": (f"{index % MAX_LABELS}",) * 2} for index in range(2 * MAX_LABELS)]
    many = [{"label": (f"{index}",) * 2} for index in range(MAX_LABELS + 1)]
    assert summarise(few, tmp_path / "few")["label"].kind == "label"
    assert summarise(many, tmp_path / "many")["label"].kind == "text"


def test_labels_count_captions_not_images(tmp_path: Path) -> None:
    column = summarise([{"label": ("x", "x")}, {"label": ("x", "y")}, {"label": (None, "z")}], tmp_path)[
        "label"
    ]
    assert column.labels == (("x", 2), ("y", 1), ("z", 1))


def test_histogram_counts_every_number_once(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(2 * BLOCK_SIZE + 7, 2))
    column = summarise([{"score": tuple(pair.tolist())} for pair in numbers], tmp_path)["score"]
    assert column.kind == "number"
    assert (column.minimum, column.maximum) == (numbers.min(), numbers.max())
    assert column.histogram == tuple(np.histogram(numbers, len(column.histogram))[0].tolist())


def test_numbers_mixed_with_text_are_text(tmp_path: Path) -> None:
    assert summarise([{"mixed": (1, 2)}, {"mixed": ("one", "two")}], tmp_path)["mixed"].kind == "text"


def test_column_without_a_value_has_a_filter_still(tmp_path: Path) -> None:
    assert summarise([{"score": (None, None)}], tmp_path)["score"].kind == "number"


def test_column_that_comes_late_starts_at_its_block(tmp_path: Path) -> None:
    values: list[dict[str, tuple[Any, ...]]] = [{} for _ in range(BLOCK_SIZE)] + [{"late": (1.0, 2.0)}, {}]
    assert summarise(values, tmp_path)["late"].first_block == 1
    assert (tmp_path / "00001/column0.js").read_text() == 'receive("column0", 1, [1.0,2.0,null,null]);\n'
    assert not (tmp_path / "00000/column0.js").exists()


def test_each_column_has_its_kind_of_filter(pages: Path) -> None:
    page = (pages / "index.html").read_text("utf-8")
    names = set(re.findall(r'name="((?:min|max|is|has)\.[^"]+)"', page))
    assert names == {
        "min.guidance_scale",
        "max.guidance_scale",
        "min.score",
        "max.score",
        "is.shape",
        "is.is_photo",
        "is.big",
        "has.source",
    }
    assert re.search(r"columns not shown</dt><dd>embedding</dd>", page)


def test_integers_too_large_for_javascript_keep_their_digits(pages: Path) -> None:
    assert f'<option value="{2**60 + 1}">' in (pages / "index.html").read_text("utf-8")


# Damage


def test_missing_shards_are_named_and_no_failure(small_dataset: Path, tmp_path: Path) -> None:
    for name in ("00000", "00001"):
        (small_dataset / f"{name}_stats.json").unlink()
    assert run(BrowseConfig(str(small_dataset), str(tmp_path / "pages"))) == 0
    page = (tmp_path / "pages/index.html").read_text("utf-8")
    assert re.search(r"2 of 3 shards\s+are not finished\.</strong> 00000 to 00001", page)
    assert [row[0] for row in read_rows(tmp_path / "pages", "captions")] == ["caption 4", "caption 5"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def blank(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".tar", flip),
        (".tar", cut),
        (".tar", Path.unlink),
        (".parquet", flip),
        (".parquet", cut),
        (".parquet", Path.unlink),
        ("_stats.json", cut),
        ("_stats.json", blank),
    ],
)
def test_a_damaged_shard_is_named_and_the_others_are_shown(
    small_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    damage: Callable[[Path], None],
) -> None:
    damaged = small_dataset / f"00001{suffix}"
    if damage is cut and suffix == "_stats.json":
        damaged.write_text(damaged.read_text().rstrip()[:-1])
    else:
        damage(damaged)
    assert run(BrowseConfig(str(small_dataset), str(tmp_path / "pages"))) == 1
    page = (tmp_path / "pages/index.html").read_text("utf-8")
    assert re.search(
        r"1 of 3 shards\s+is damaged and not shown\.</strong></p>\s+<ul>\s+<li><b>00001</b>", page
    )
    assert str(small_dataset / "00001") in capsys.readouterr().err
    captions = [row[0] for row in read_rows(tmp_path / "pages", "captions")]
    assert captions == ["caption 0", "caption 1", "caption 4", "caption 5"]
    assert {path.name for path in (tmp_path / "pages/build-1/images").iterdir()} == {"00000", "00002"}


def test_a_note_and_a_name_are_text(pages: Path) -> None:
    page = (pages / "index.html").read_text("utf-8")
    assert "A note with &lt;b&gt;markup&lt;/b&gt;." in page
    assert "<h1>scenes &amp; &lt;more&gt;</h1>" in page


# The output folder


@pytest.mark.parametrize("name", ["notes.txt", "index.html", "build-1", "browse.json"])
def test_a_folder_of_something_else_is_refused(small_dataset: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / name).write_text("{}")
    with pytest.raises(ValueError, match="is not empty and holds no pages of this command"):
        run(BrowseConfig(str(small_dataset), str(tmp_path / "pages")))
    assert [path.name for path in (tmp_path / "pages").iterdir()] == [name]


def test_a_url_as_output_is_refused(small_dataset: Path) -> None:
    with pytest.raises(ValueError, match="output must be a folder of this machine, got s3://bucket/pages"):
        run(BrowseConfig(str(small_dataset), "s3://bucket/pages"))


def test_no_dataset_leaves_no_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a dataset"):
        run(BrowseConfig(str(tmp_path), str(tmp_path / "pages")))
    assert not (tmp_path / "pages").exists()


def test_pages_written_anew_replace_the_older_ones(small_dataset: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    (small_dataset / "00002_stats.json").rename(tmp_path / "marker")
    run(BrowseConfig(str(small_dataset), str(pages)))
    (tmp_path / "marker").rename(small_dataset / "00002_stats.json")
    run(BrowseConfig(str(small_dataset), str(pages)))
    assert sorted(path.name for path in pages.iterdir()) == ["browse.json", "build-2", "index.html"]
    assert "18 images of" in (pages / "index.html").read_text("utf-8")


def test_the_page_comes_last(small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    publish = data_gen.browse.output.publish_page

    def watch(output: Path, build: Path, page: bytes) -> None:
        written.append({path.relative_to(output) for path in output.rglob("*") if path.is_file()})
        publish(output, build, page)

    monkeypatch.setattr(data_gen.browse.output, "publish_page", watch)
    run(BrowseConfig(str(small_dataset), str(tmp_path / "pages")))
    final = {
        path.relative_to(tmp_path / "pages") for path in (tmp_path / "pages").rglob("*") if path.is_file()
    }
    assert final - written[0] == {Path("index.html")}


def test_an_interrupted_run_leaves_the_older_pages_as_they_were(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    config = BrowseConfig(str(small_dataset), str(tmp_path / "pages"))
    run(config)
    before = {path: path.read_bytes() for path in (tmp_path / "pages").rglob("*") if path.is_file()}
    monkeypatch.setattr(data_gen.browse.output, "publish_page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert before == {path: path.read_bytes() for path in (tmp_path / "pages").rglob("*") if path.is_file()}


def test_what_a_killed_run_left_is_cleared_away(small_dataset: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    run(BrowseConfig(str(small_dataset), str(pages)))
    (pages / "index.html").unlink()  # killed before its end, a run leaves its build and no page
    assert run(BrowseConfig(str(small_dataset), str(pages))) == 0
    assert sorted(path.name for path in pages.iterdir()) == ["browse.json", "build-2", "index.html"]


def test_number_of_threads_changes_nothing(small_dataset: Path, tmp_path: Path) -> None:
    contents = []
    for num_threads in (1, 4):
        output = tmp_path / f"pages{num_threads}"
        run(BrowseConfig(str(small_dataset), str(output), num_threads=num_threads))
        files = (path for path in output.rglob("*") if path.is_file())
        contents.append({path.relative_to(output): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_a_dataset_behind_a_url_has_the_same_data(small_dataset: Path, tmp_path: Path) -> None:
    store = Store("memory://browse/dataset")
    for path in small_dataset.iterdir():
        store.publish(path.name, path)
    contents = []
    for name, dataset in (("local", str(small_dataset)), ("url", store.url)):
        assert run(BrowseConfig(dataset, str(tmp_path / name))) == 0
        files = (path for path in (tmp_path / name / "build-1").rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert '"tarFolder": null' in (tmp_path / "url/index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("thumbnail_size", 15, "thumbnail_size must be in [16, 1024], got 15"),
        ("thumbnail_size", 1025, "thumbnail_size must be in [16, 1024], got 1025"),
        ("num_threads", 0, "num_threads must be >= 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BrowseConfig("dataset", "pages", **{field: value})  # type: ignore[arg-type]  # each field by its name


def test_a_missing_package_is_named(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "jinja2" else find_spec(name)
    )
    with pytest.raises(ValueError, match=re.escape("pip install 'stablerep[report]'")):
        run(BrowseConfig(str(small_dataset), str(tmp_path / "pages")))
    assert not (tmp_path / "pages").exists()
