"""The pages of `stablerep browse` in a real browser, opened from disk."""

import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from data_gen.browse import BrowseConfig, run
from data_gen.browse.page import SCRIPT_NAMES
from data_gen.shards import list_complete_shards, read_samples
from tests.data_gen.browse_datasets import (
    HOSTILE,
    NUM_IMAGES,
    encode_jpeg,
    read_images,
    write_dataset,
    write_mixed_dataset,
)
from tests.processes import MAX_SECONDS

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for path in map(shutil.which, _NAMES) if path), None)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",  # by the browser's own clock, which runs ahead while nothing happens
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: what a browser shows is not tested"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed_dataset(tmp_path_factory.mktemp("browse") / "scenes & <more>")


@pytest.fixture(scope="module")
def pages(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of `dataset`."""
    output = tmp_path_factory.mktemp("pages") / "pages"
    assert run(BrowseConfig(str(dataset), str(output))) == 0
    return output


class Elements(HTMLParser):
    """The elements of a document, each with its attributes and the text in it."""

    EMPTY = ("img", "input", "link", "meta", "path", "rect")

    def __init__(self, document: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = tag, {name: value or "" for name, value in attrs}, list[str]()
        self.all.append(element)
        if tag not in self.EMPTY:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def with_class(self, name: str) -> list[str]:
        """The text of every element of a class."""
        return ["".join(texts) for _, attrs, texts in self.all if name in attrs.get("class", "").split()]

    def with_id(self, name: str) -> str:
        """The text of an element."""
        (text,) = ["".join(texts) for _, attrs, texts in self.all if attrs.get("id") == name]
        return text

    def attributes(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a kind."""
        return [attrs for found, attrs, _ in self.all if found == tag]


Show = Callable[..., Elements]


@pytest.fixture
def show(pages: Path, tmp_path: Path) -> Show:
    """Opens the pages from disk at a hash, and returns what is there when the scripts are done."""

    def open_at(hash_: dict[str, str] | None = None, folder: Path = pages) -> Elements:
        url = f"{(folder / 'index.html').resolve().as_uri()}#{urlencode(hash_ or {})}"
        command = [CHROMIUM or "", *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, timeout=MAX_SECONDS)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        elements = Elements(done.stdout.decode("utf-8"))
        assert elements.attributes("html")[0].get("data-state") == "ready", elements.with_id("status")
        return elements

    return open_at


@pytest.fixture
def photograph(tmp_path: Path) -> Callable[[Path, dict[str, str]], Any]:
    """What a person sees of the pages at a hash, as an array [height, width, 3]."""

    def photograph_at(folder: Path, hash_: dict[str, str]) -> Any:
        url = f"{(folder / 'index.html').resolve().as_uri()}#{urlencode(hash_)}"
        options = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'screen.png'}"]
        command = [CHROMIUM or "", *FLAGS, *options, "--window-size=1280,2400", url]
        done = subprocess.run(command, capture_output=True, timeout=MAX_SECONDS)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        with Image.open(tmp_path / "screen.png") as picture:
            return np.asarray(picture.convert("RGB")).astype(int)

    return photograph_at


NUM_COLOURED = 20
"""Images of a caption: more than a row of its sheet."""
COLOURS = [
    (red, green, blue)
    for red in (20, 90, 160, 230)
    for green in (20, 90, 160, 230)
    for blue in (20, 90, 160, 230)
    if not red == green == blue
][: 2 * NUM_COLOURED]


@pytest.fixture(scope="module")
def coloured_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of two captions, no two of whose images are of one colour."""
    folder = tmp_path_factory.mktemp("coloured")
    images = {
        caption: [
            encode_jpeg(np.full((48, 64, 3), colour, np.uint8))
            for colour in COLOURS[first : first + NUM_COLOURED]
        ]
        for caption, first in (("one", 0), ("two", NUM_COLOURED))
    }
    write_dataset(
        folder / "dataset", list(images), 1, size=(64, 48), images=images, num_images_per_caption=NUM_COLOURED
    )
    assert run(BrowseConfig(str(folder / "dataset"), str(folder / "pages"))) == 0
    return folder / "pages"


def find_places(screen: Any, colours: list[tuple[int, int, int]]) -> list[tuple[float, float]]:
    """Row and column of the middle of each colour's cell; cells must be plain, 4:3 and equally large."""
    places: list[tuple[float, float]] = []
    sizes: list[tuple[float, float]] = []
    for colour in colours:
        rows, columns = np.nonzero(np.abs(screen - colour).max(axis=2) <= 15)
        assert rows.size > 1000, f"{colour} is nowhere to be seen"
        top, bottom = np.quantile(rows, [0.01, 0.99])
        left, right = np.quantile(columns, [0.01, 0.99])
        area = (bottom - top) * (right - left)
        assert rows.size == pytest.approx(area, rel=0.15), f"{colour} is not one plain cell"
        places.append(((top + bottom) / 2, (left + right) / 2))
        sizes.append((bottom - top, right - left))
    heights, widths = np.array(sizes).T
    np.testing.assert_allclose(widths, widths.mean(), atol=6)
    np.testing.assert_allclose(heights, 0.75 * widths.mean(), atol=6)
    return places


def are_in_reading_order(places: list[tuple[float, float]]) -> bool:
    """Whether each is right of the one before, or in a lower row."""
    return all(
        column > last_column if abs(row - last_row) < 10 else row > last_row
        for (last_row, last_column), (row, column) in pairwise(places)
    )


def test_a_person_sees_every_image_in_its_place_on_the_cards(
    coloured_pages: Path, photograph: Callable[[Path, dict[str, str]], Any]
) -> None:
    shown = [*COLOURS[:16], *COLOURS[NUM_COLOURED : NUM_COLOURED + 16]]  # a card has no more
    places = find_places(photograph(coloured_pages, {}), shown)
    assert are_in_reading_order(places)


@pytest.mark.parametrize("caption", [0, 1])
def test_a_person_sees_every_image_of_a_caption_enlarged(
    coloured_pages: Path, caption: int, photograph: Callable[[Path, dict[str, str]], Any]
) -> None:
    screen = photograph(coloured_pages, {"at": f"0000{caption}.0"})
    first = caption * NUM_COLOURED
    places = find_places(screen, COLOURS[first : first + NUM_COLOURED])
    assert are_in_reading_order(places)


def test_browser_shows_the_first_page_with_every_image(dataset: Path, show: Show) -> None:
    shown = show()
    expected = list(dict.fromkeys(row["caption"] for row in read_images(dataset)))
    assert shown.with_class("caption") == expected[:48]
    assert shown.with_id("status") == "127 captions"
    assert shown.with_id("num-pages") == "3"
    sheets = [attrs["src"] for attrs in shown.attributes("img")]
    assert [sheets.count(sheet) for sheet in dict.fromkeys(sheets)] == [NUM_IMAGES] * 48
    assert {attrs["loading"] for attrs in shown.attributes("img")} == {"lazy"}


def test_browser_shows_hostile_captions_as_text(show: Show) -> None:
    shown = show({"at": "00000.0"})
    assert set(HOSTILE) <= set(shown.with_class("caption"))
    assert shown.with_id("detail-caption") == HOSTILE[0]
    assert (
        "".join(texts for tag, _, parts in shown.all if tag == "title" for texts in parts)
        == "scenes & <more>"
    )
    assert not [attrs for attrs in shown.attributes("img") if "onerror" in attrs]
    assert len(shown.attributes("script")) == 1 + len(SCRIPT_NAMES)


def test_browser_shows_the_rest_on_the_last_page(dataset: Path, show: Show) -> None:
    expected = list(dict.fromkeys(row["caption"] for row in read_images(dataset)))
    assert show({"page": "3"}).with_class("caption") == expected[96:]


def is_above(bound: float) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row["score"] is not None and row["score"] >= bound


@pytest.mark.parametrize(
    ("hash_", "passes"),
    [
        ({"q": "STAR colour"}, lambda row: "star" in row["caption"]),
        ({"q": "</script>"}, lambda row: "</script>" in row["caption"]),
        ({"q": "שלום"}, lambda row: "שלום" in row["caption"]),
        ({"min.score": "1.5"}, is_above(1.5)),
        (
            {"min.score": "0", "max.guidance_scale": "2"},
            lambda row: is_above(0)(row) and row["guidance_scale"] <= 2,
        ),
        ({"is.shape": "ring", "min.score": "1"}, lambda row: row["shape"] == "ring" and is_above(1)(row)),
        (
            {"is.is_photo": "true", "q": "colour 12"},
            lambda row: row["is_photo"] and "colour 12" in row["caption"],
        ),
        (
            {"is.big": str(2**60 + 1), "q": "ring"},
            lambda row: row["big"] % 2 == 1 and "ring" in row["caption"],
        ),
        ({"has.source": "-01"}, lambda row: "-01" in row["source"]),
        ({"id": "a"}, lambda row: any(row[name].startswith("a") for name in ("key", "image_seed", "sha256"))),
        ({"q": "no caption says this"}, lambda row: False),
    ],
)
def test_browser_shows_the_captions_of_which_an_image_passes_every_filter(
    dataset: Path, show: Show, hash_: dict[str, str], passes: Callable[[dict[str, Any]], bool]
) -> None:
    rows = [{"score": None} | row for row in read_images(dataset)]
    for row in rows:
        row["score"] = None if row["score"] is None or np.isnan(row["score"]) else row["score"]
    expected = list(dict.fromkeys(row["caption"] for row in rows if passes(row)))
    shown = show(hash_)
    assert shown.with_class("caption") == expected[:48]
    kept = set(expected[:48])
    num_others = sum(row["caption"] in kept and not passes(row) for row in rows)
    assert len(shown.with_class("other")) == num_others
    some = f"{len(expected)} of 127 captions" if expected else "None of 127 captions passes the filters"
    assert shown.with_id("status") == some


@pytest.mark.parametrize(("end", "best", "sign"), [("low", min, 1), ("high", max, -1)])
@pytest.mark.parametrize("max_guidance", [None, 2.0])
def test_browser_sorts_by_the_lowest_or_the_highest_image_that_passes(
    dataset: Path,
    show: Show,
    end: str,
    best: Callable[[list[float]], float],
    sign: int,
    max_guidance: float | None,
) -> None:
    scores: dict[str, list[float]] = {}
    for row in read_images(dataset):
        passes = max_guidance is None or row["guidance_scale"] <= max_guidance
        if passes and (score := row.get("score")) is not None and not np.isnan(score):
            scores.setdefault(row["caption"], []).append(score)
    expected = sorted(scores, key=lambda caption: sign * best(scores[caption]))
    bound = {} if max_guidance is None else {"max.guidance_scale": str(max_guidance)}
    assert show({"sort": f"{end}.score"} | bound).with_class("caption") == expected[:48]


def test_browser_lists_failures_by_reason(show: Show) -> None:
    shown = show({"view": "failed", "reason": "non_finite"})
    assert shown.with_class("reason") == ["non_finite"] * 2
    assert "another failed one" in shown.with_id("failures")
    assert shown.with_id("status") == "2 of 3 failed captions"
    assert "a failed <i>caption</i>" in show({"view": "failed"}).with_id("failures")


def test_browser_tells_of_a_caption_what_finds_its_files(dataset: Path, show: Show) -> None:
    shard = list_complete_shards(dataset)[1]
    sample = list(read_samples(shard))[4]
    rows = [row for row in read_images(dataset) if row["key"] == sample.key]
    shown = show({"at": "00001.4"})
    assert any("open" in attrs for attrs in shown.attributes("dialog"))
    assert shown.with_id("detail-caption") == sample.caption
    for row in rows:
        assert row["image_seed"] in shown.with_id("detail-images")
        assert row["sha256"][:16] in shown.with_id("detail-images")
        assert row["fingerprint"] in shown.with_id("detail-images")
        assert f"guidance_scale{row['guidance_scale']:g}" in shown.with_id("detail-images")
    facts = shown.with_id("detail-facts")
    assert f"'{dataset}'/00001.tar {sample.key}.0.jpg" in facts
    assert rows[0]["source"] in facts
    alts = [attrs["alt"] for attrs in shown.attributes("img") if attrs["alt"]]
    assert alts == [
        f"Image {index + 1} of 3 for the caption “{sample.caption}”" for index in range(NUM_IMAGES)
    ]


def test_browser_enlarges_the_files_themselves_where_they_are(tmp_path: Path, show: Show) -> None:
    write_dataset(tmp_path / "dataset", [f"caption {index}" for index in range(3)], 2)
    run(BrowseConfig(str(tmp_path / "dataset"), str(tmp_path / "full"), full_images=True))
    shown = show({"at": "00001.0"}, folder=tmp_path / "full")
    sources = [attrs["src"] for attrs in shown.attributes("img") if "originals" in attrs["src"]]
    assert len(sources) == 3
    assert all((tmp_path / "full" / source).is_file() for source in sources)


def test_browser_takes_a_hash_that_makes_no_sense_for_no_filter(show: Show) -> None:
    shown = show({"at": "99999.1", "page": "x", "min.score": "x", "sort": "high.nothing", "is.nothing": "y"})
    assert len(shown.with_class("caption")) == 48
    assert shown.with_id("status") == "127 captions; caption 99999.1 is not here"


def test_browser_shows_a_dataset_of_which_nothing_is_finished(tmp_path: Path, show: Show) -> None:
    write_dataset(tmp_path / "dataset", ["a caption"], 1)
    (tmp_path / "dataset/00000_stats.json").unlink()
    run(BrowseConfig(str(tmp_path / "dataset"), str(tmp_path / "none")))
    assert show(folder=tmp_path / "none").with_id("status") == "No captions"
