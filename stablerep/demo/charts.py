"""Geometry of the report's charts; the template draws it as inline SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stablerep.evaluation.reporting.ticks import Tick, choose_ticks

WIDTH, HEIGHT = 560.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 132.0, 14.0, 42.0
"""Margins: the right one holds the names of the lines."""
_LABEL_HEIGHT = 17.0
_ROW_HEIGHT = 30.0


@dataclass(frozen=True)
class Line:
    """One series of a line chart.

    Args:
        key: Decides its colour.
        title: Its name, written at its end.
        points: `x,y x,y …` for an SVG polyline.
        end: Its last point.
        label_y: Height of its name, moved so that names do not overlap.
    """

    key: str
    title: str
    points: str
    end: tuple[float, float]
    label_y: float


@dataclass(frozen=True)
class LineChart:
    """A line chart of WIDTH x HEIGHT."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    description: str


@dataclass(frozen=True)
class IntervalRow:
    """One accuracy with its interval: places along the axis, pixels."""

    key: str
    title: str
    y: float
    low: float
    value: float
    high: float
    text: str


@dataclass(frozen=True)
class IntervalChart:
    """Accuracies with their intervals, one row a run."""

    rows: tuple[IntervalRow, ...]
    x_ticks: tuple[Tick, ...]
    chance: float
    height: float
    description: str


def build_line_chart(
    series: Mapping[str, tuple[str, Sequence[tuple[float, float]]]],
    *,
    x_title: str,
    y_title: str,
    percent: bool,
) -> LineChart:
    """Places lines in a chart.

    Args:
        series: By key: title and points (x, y), y in [0, 1] if `percent`.
        x_title: Name of the horizontal axis.
        y_title: Name of the vertical axis.
        percent: Write y as per cent.
    """
    x_max = max((x for _, points in series.values() for x, _ in points), default=1.0)
    values = [y for _, points in series.values() for _, y in points] or [0.0, 1.0]
    y_ticks = choose_ticks(min(values), max(values), 5)
    low, high = y_ticks[0], y_ticks[-1]

    def place_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_max

    def place_y(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    lines = [
        Line(
            key,
            title,
            " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points),
            (place_x(points[-1][0]), place_y(points[-1][1])),
            0.0,
        )
        for key, (title, points) in series.items()
        if points
    ]
    ends = {line.key: f"{line.title} ends at {_write(series[line.key][1][-1][1], percent)}" for line in lines}
    return LineChart(
        lines=tuple(_spread_labels(lines)),
        x_ticks=tuple(Tick(place_x(x), f"{x:g}") for x in choose_ticks(0, x_max, 5) if x <= x_max),
        y_ticks=tuple(Tick(place_y(y), _write(y, percent, short=True)) for y in y_ticks),
        x_title=x_title,
        y_title=y_title,
        description=f"{y_title} over {x_title}: {'; '.join(ends.values())}.",
    )


def build_interval_chart(
    rows: Mapping[str, tuple[str, float, tuple[float, float]]], *, chance: float, title: str
) -> IntervalChart:
    """Places accuracies with intervals on an axis from 0 to 100 %.

    Args:
        rows: By key: title, accuracy and interval, fractions.
        chance: Accuracy of guessing, a fraction.
        title: What is measured, for the description.
    """

    def place(fraction: float) -> float:
        return 150 + (WIDTH - 150 - 60) * fraction

    placed = [
        IntervalRow(key, name, TOP + (index + 0.5) * _ROW_HEIGHT, place(low), place(value), place(high), text)
        for index, (key, (name, value, (low, high))) in enumerate(rows.items())
        for text in [f"{100 * value:.1f}"]
    ]
    said = "; ".join(
        f"{name} {100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        for name, value, (low, high) in rows.values()
    )
    return IntervalChart(
        rows=tuple(placed),
        x_ticks=tuple(Tick(place(percent / 100), f"{percent}") for percent in range(0, 101, 20)),
        chance=place(chance),
        height=TOP + len(placed) * _ROW_HEIGHT + BOTTOM,
        description=f"{title}: {said}; guessing {100 * chance:.1f} %.",
    )


def _spread_labels(lines: Sequence[Line]) -> list[Line]:
    """Moves the names of lines that end close to each other apart."""
    placed: list[Line] = []
    for line in sorted(lines, key=lambda line: line.end[1]):
        y = line.end[1] if not placed else max(line.end[1], placed[-1].label_y + _LABEL_HEIGHT)
        placed.append(Line(line.key, line.title, line.points, line.end, y))
    return placed


def _write(value: float, percent: bool, short: bool = False) -> str:
    if percent:
        return f"{100 * value:.0f}" if short else f"{100 * value:.1f} %"
    return f"{value:g}" if short else f"{value:.2f}"
