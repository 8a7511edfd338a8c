"""The demo's page: one HTML file with everything in it."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from stablerep.demo import charts
from stablerep.demo.results import PROTOCOL_TITLES, RUN_TITLES, GridRow
from stablerep.demo.runner import format_seconds

TEMPLATE_FILE = "report.html.jinja"
_MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_SCORE_TITLES = {
    "linear_heldout": "linear probe",
    "linear_bn_heldout": "linear probe after BatchNorm",
    "knn20": "k-NN, k = 20",
    "linear_paper": "linear probe, chosen on test",
    "linear_bn_paper": "linear probe after BatchNorm, chosen on test",
}


def build_report(results: dict[str, Any], grid: Sequence[GridRow]) -> str:
    """The page as HTML.

    Args:
        results: What `collect_results` returns.
        grid: Captions and images to show.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions are text that others wrote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "clock": format_seconds}
    environment.filters["heading"] = write_as_heading
    steps = results["steps"]
    return environment.get_template(TEMPLATE_FILE).render(
        **results,
        run_titles=RUN_TITLES,
        protocol_titles=PROTOCOL_TITLES,
        score_titles={
            name: title for name, title in _SCORE_TITLES.items() if name in results["scores"]["stablerep"]
        },
        grid=[
            (row.caption, [_to_data_uri(image, row.image_extension) for image in row.images]) for row in grid
        ],
        interval_charts={
            title: _interval_chart(results, protocol) for protocol, title in PROTOCOL_TITLES.items()
        },
        line_charts=_line_charts(results),
        total_seconds=sum(step["seconds"] for step in steps),
        frame=charts,
    )


def write_as_heading(text: str) -> str:
    """The text with a capital first letter, except where that letter is a symbol: `k-NN`."""
    return text if text[1:2] == "-" else text[:1].upper() + text[1:]


def _interval_chart(results: dict[str, Any], protocol: str) -> charts.IntervalChart:
    rows = {}
    for run, title in RUN_TITLES.items():
        score = results["scores"][run][protocol]
        rows[run] = (title, score["value"], tuple(score["interval"]))
    return charts.build_interval_chart(
        rows, chance=results["budget"]["chance"], title=f"Accuracy of the {PROTOCOL_TITLES[protocol]}, %"
    )


def _line_charts(results: dict[str, Any]) -> dict[str, charts.LineChart]:
    curves = results["curves"]
    return {
        "Loss": charts.build_line_chart(
            {run: (RUN_TITLES[run], found["loss"]) for run, found in curves.items()},
            x_title="optimizer step",
            y_title="loss",
            percent=False,
        ),
        "k-NN accuracy while training": charts.build_line_chart(
            {run: (RUN_TITLES[run], found["knn_top1"]) for run, found in curves.items()},
            x_title="optimizer step",
            y_title="accuracy, %",
            percent=True,
        ),
    }


def _to_data_uri(image: bytes, extension: str) -> str:
    return f"data:{_MEDIA_TYPES[extension]};base64,{base64.b64encode(image).decode()}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}".replace("-", "−")
