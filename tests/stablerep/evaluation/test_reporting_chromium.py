"""report.html in a real browser, opened from disk."""

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from stablerep.evaluation.reporting import ReportContent, write_report
from tests.stablerep.evaluation.reports import HOSTILE, build_content, row

CHROMIUM = next(
    (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",  # with what the page's console says
    "--virtual-time-budget=10000",  # by the browser's own clock, which runs ahead while nothing happens
)
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: what a browser shows is not tested"),
]


class Elements(HTMLParser):
    """The elements of a document: tag, attributes, text, and the ids that they are in."""

    EMPTY = ("img", "input", "link", "meta", "path", "line", "circle", "polyline", "br")

    def __init__(self, document: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str], list[str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str], list[str]]] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside = [attributes["id"] for _, attributes, _, _ in self._open if "id" in attributes]
        element = tag, {name: value or "" for name, value in attrs}, list[str](), inside
        self.all.append(element)
        if tag not in self.EMPTY:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, _, texts, _ in self._open:
            texts.append(data)

    def find(
        self, tag: str, inside: str | None = None, **attributes: str
    ) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of every such element."""
        return [
            (found, "".join(texts))
            for name, found, texts, ids in self.all
            if name == tag
            and (inside is None or inside in ids)
            and all(found.get(key) == value for key, value in attributes.items())
        ]


Open = Callable[..., Elements]


@pytest.fixture
def show(tmp_path: Path) -> Open:
    """Opens a report from disk, does what a script says, and returns what is there afterwards.

    Fails on anything that the page's console says.
    """

    def open_page(content: ReportContent, actions: str = "") -> Elements:
        write_report(tmp_path, content)
        path = tmp_path / "report.html"
        page = path.read_text().replace("</body>", f"<script>{actions}</script></body>")
        path.write_text(page)
        command = [
            CHROMIUM or "",
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            path.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, timeout=120)
        errors = done.stderr.decode(errors="replace")
        assert done.returncode == 0, errors
        assert [line for line in errors.splitlines() if ":CONSOLE" in line] == []
        return Elements(done.stdout.decode())

    return open_page


def list_protocols(shown: Elements) -> list[str]:
    return [text for _, text in shown.find("b", inside="score-table") if not re.fullmatch(r"[\d.]+", text)]


IN_ORDER = ["Linear probe", "Linear probe, chosen on test", "k-NN, k = 20", "k-NN, k = 20"]


def test_a_console_error_fails(show: Open) -> None:
    with pytest.raises(AssertionError, match="CONSOLE"):
        show(build_content(), "console.error('x')")


def test_everything_is_there_and_hostile_names_are_text(show: Open) -> None:
    content = build_content()
    shown = show(content)
    assert list_protocols(shown) == IN_ORDER
    assert [text for _, text in shown.find("h2")] == [
        "Scores",
        "What is taken for what",
        "Nearest images",
        "Map of the features",
        "Spectrum of the covariance",
        "Facts",
    ]
    assert len(shown.find("circle")) == 60
    assert len(shown.find("img")) == 3
    assert not [found for found, _ in shown.find("img") if "onerror" in found]
    assert HOSTILE in [text for _, text in shown.find("button")]
    assert [text for found, text in shown.find("span") if found.get("class") == "badge"] == ["✓", "✗"]
    assert len(shown.find("script")) == 3


def test_a_click_on_a_heading_sorts_and_a_third_one_restores(show: Open) -> None:
    press = "document.querySelectorAll('#score-table th button')[1].click();"
    orders = {}
    for num_clicks in (1, 2, 3):
        shown = show(build_content(), press * num_clicks)
        values = [float(text) for _, text in shown.find("b", inside="score-table") if text[0].isdigit()]
        sorted_by = [found["aria-sort"] for found, _ in shown.find("th") if "aria-sort" in found]
        orders[num_clicks] = values, sorted_by
    assert orders[1] == (sorted(orders[3][0], reverse=True), ["descending"])
    assert orders[2] == (sorted(orders[3][0]), ["ascending"])
    assert orders[3][1] == []
    assert orders[3][0] not in (orders[1][0], orders[2][0])


def test_names_sort_as_words(show: Open) -> None:
    shown = show(build_content(), "document.querySelector('#score-table th button').click();")
    assert list_protocols(shown) == [*IN_ORDER[2:], *IN_ORDER[:2]]


def test_numbers_sort_as_numbers(show: Open) -> None:
    rows = [row(f"p{index}", 0.5, seconds=seconds) for index, seconds in enumerate((9.0, 100.0, 20.0))]
    shown = show(build_content(rows=rows), "document.querySelectorAll('#score-table th button')[3].click();")
    assert list_protocols(shown) == ["P1", "P2", "P0"]


def test_a_choice_shows_other_confusions(show: Open) -> None:
    choose = (
        "const c = document.getElementById('confusion-choice'); c.value = '1';"
        "c.dispatchEvent(new Event('change'));"
    )
    for actions, expected in (("", ["0"]), (choose, ["1"])):
        blocks = show(build_content(), actions).find("div")
        shown = [
            found["data-confusion"]
            for found, _ in blocks
            if "data-confusion" in found and "unchosen" not in found["class"]
        ]
        assert shown == expected


def test_the_matrix_holds_the_shares_of_each_class(show: Open) -> None:
    content = build_content()
    shown = show(content)
    predictions = content.rows[2].predictions
    assert predictions is not None
    assert content.targets is not None
    counts = confusion_matrix(content.targets, predictions)
    titles = [found["title"] for found, _ in shown.find("td") if "title" in found][:16]
    names = content.class_names
    assert titles == [
        f"{names[i]} as {names[j]}: {counts[i, j]} of {counts[i].sum()}" for i in range(4) for j in range(4)
    ]


def test_many_classes_are_listed_by_pair(show: Open) -> None:
    shown = show(build_content(num_classes=40, num_images=400))
    captions = [text for _, text in shown.find("caption")]
    assert captions[-3:] == [
        "Most confused",
        "Hardest classes",
        "Hardest classes",
    ]  # the second has none wrong
    assert not [found for found, _ in shown.find("table") if "matrix" in found["class"]]
    assert len(shown.find("select", id="class-choice")) == 1


def test_at_most_2000_points_are_drawn(show: Open) -> None:
    assert len(show(build_content(num_images=2500)).find("circle")) == 2000


def test_pointing_at_a_point_says_which_image_it_is(show: Open) -> None:
    point = """
        const circle = document.querySelectorAll('#feature-map circle')[7];
        const box = circle.getBoundingClientRect();
        document.querySelector('#feature-map svg').dispatchEvent(new PointerEvent('pointermove', {
          clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }));
        document.body.dataset.expected = circle.dataset.i;
    """
    content = build_content()
    shown = show(content, point)
    (body, _), (tip, text) = shown.find("body")[0], shown.find("p", id="map-tip")[0]
    index = int(body["data-expected"])
    assert "hidden" not in tip
    assert text.startswith(content.names[index])
    assert content.targets is not None
    assert content.class_names[content.targets[index]] in text


def test_arrow_keys_go_from_image_to_image_within_the_chosen_class(show: Open) -> None:
    keys = """
        document.querySelectorAll('.legend button')[2].click();
        const svg = document.querySelector('#feature-map svg');
        svg.focus();
        const seen = [];
        for (const key of ['ArrowRight', 'ArrowLeft', 'ArrowRight', 'ArrowDown', 'ArrowUp', 'ArrowLeft']) {
          svg.dispatchEvent(new KeyboardEvent('keydown', { key, cancelable: true }));
          seen.push(document.querySelector('circle.marked').parentNode.dataset.class);
        }
        document.body.dataset.seen = seen.join(' ');
        document.body.dataset.name = document.getElementById('map-tip').textContent;
        svg.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }));
    """
    shown = show(build_content(), keys)
    body = shown.find("body")[0][0]
    assert body["data-seen"] == "2 2 2 2 2 2"
    assert "class 2" in body["data-name"]
    assert "hidden" in shown.find("p", id="map-tip")[0][0]
    pressed = [text for found, text in shown.find("button") if found.get("aria-pressed") == "true"]
    assert pressed == ["class 2"]


def test_every_control_has_a_name_and_ids_are_unique(show: Open) -> None:
    shown = show(build_content())
    ids = [found["id"] for _, found, _, _ in shown.all if "id" in found]
    assert len(ids) == len(set(ids))
    assert all(text.strip() for _, text in shown.find("button"))
    labelled = {found["for"] for found, _ in shown.find("label")}
    assert {found["id"] for found, _ in shown.find("select")} <= labelled
    assert all(found.get("alt") for found, _ in shown.find("img"))
    assert all(found.get("aria-label") for found, _ in shown.find("svg"))


@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_is_light_or_dark_as_wanted_and_fits_the_width(
    tmp_path: Path, scheme: int, is_dark: bool, width: int
) -> None:
    write_report(tmp_path, build_content())
    # A window is never as narrow as a telephone; a frame is.
    (tmp_path / "frame.html").write_text(
        "<body style='margin:0;background:lime'>"
        f"<iframe src='report.html' style='border:0;display:block;width:{width}px;height:3000px'></iframe>"
    )
    command = [
        CHROMIUM or "",
        *FLAGS,
        "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width + 200},3000",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'screen.png'}",
        (tmp_path / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    with Image.open(tmp_path / "screen.png") as picture:
        screen = np.asarray(picture.convert("L")).astype(int)[:, :width]
    background = np.median(screen)
    assert (background < 60) if is_dark else (background > 230)
    margin = screen[:, -8:]  # nothing reaches the edge: the page does not scroll sideways
    assert np.abs(margin - background).max() <= 12
