"""Geometry of the page's figures; the template draws it as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stablerep.evaluation.formats import describe_metric
from stablerep.evaluation.reporting.ticks import Tick, choose_ticks
from stablerep.evaluation.results import Row

CHART_WIDTH, CHART_HEIGHT = 720.0, 320.0
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 58.0, 18.0, 14.0, 46.0
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 720.0, 470.0, 14.0
MAX_DECADES = 12
"""Eigenvalues further below the largest are rounding."""


@dataclass(frozen=True)
class SpectrumChart:
    """Eigenvalues on a logarithmic axis, pixels of CHART_WIDTH × CHART_HEIGHT.

    Args:
        points: `x,y x,y …` for an SVG polyline.
        area: `d` of an SVG path that fills what is below the line.
        x_ticks: Of the index of the direction.
        y_ticks: Powers of ten.
        marks: Places along x with the texts `50 %`, `90 %`: so many directions hold that much variance.
        num_for: Share of the variance → how many directions hold it.
        num_directions: Of the features.
        description: In words, for those who cannot see it.
    """

    points: str
    area: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...]
    num_for: dict[int, int]
    num_directions: int
    description: str


@dataclass(frozen=True)
class IntervalAxis:
    """The common axis of the bars in the score table, from `low` to `high`, fractions."""

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def place(self, fraction: float) -> float:
        """Per cent of the axis's length, cut to it."""
        return 100 * min(1.0, max(0.0, (fraction - self.low) / (self.high - self.low)))


def build_spectrum_chart(eigenvalues: np.ndarray) -> SpectrumChart | None:
    """Places the eigenvalues of a covariance; None if there is no variance.

    Args:
        eigenvalues: >= 0, from the largest.

    Shapes:
        eigenvalues [D].
    """
    if not len(eigenvalues) or eigenvalues[0] <= 0:
        return None
    largest = float(eigenvalues[0])
    shown = eigenvalues[eigenvalues > largest * 10.0**-MAX_DECADES]
    top = math.ceil(math.log10(largest) - 1e-9)
    bottom = min(top - 1, math.floor(math.log10(float(shown[-1])) + 1e-9))
    right, floor = CHART_WIDTH - CHART_RIGHT, CHART_HEIGHT - CHART_BOTTOM
    last = max(2, len(eigenvalues))

    def place_x(index: float) -> float:
        return CHART_LEFT + (right - CHART_LEFT) * (index - 1) / (last - 1)

    def place_y(value: float) -> float:
        return CHART_TOP + (floor - CHART_TOP) * (top - math.log10(value)) / (top - bottom)

    places = [(place_x(index), place_y(float(value))) for index, value in enumerate(shown, start=1)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    shares = np.cumsum(eigenvalues) / eigenvalues.sum()
    num_for = {percent: int(np.searchsorted(shares, percent / 100 - 1e-12)) + 1 for percent in (50, 90, 99)}
    step = math.ceil((top - bottom) / 6)
    corners = [f"{x:.1f},{floor:.1f}" for x in (places[0][0], places[-1][0])]
    return SpectrumChart(
        points=points,
        area=f"M{corners[0]} L{points.replace(' ', ' L')} L{corners[1]}Z",
        x_ticks=tuple(
            Tick(place_x(max(1.0, x)), f"{max(1.0, x):g}") for x in choose_ticks(0, last, 6) if x <= last
        ),
        y_ticks=tuple(
            Tick(place_y(10.0**power), _write_power(power, is_short=bottom >= -3 and top <= 3))
            for power in range(top, bottom - 1, -step)
        ),
        marks=tuple(Tick(place_x(num_for[percent]), f"{percent} %") for percent in (50, 90)),
        num_for=num_for,
        num_directions=len(eigenvalues),
        description=f"Eigenvalues of the covariance on a logarithmic axis, falling from {largest:.3g} to "
        f"{float(shown[-1]):.3g} over {len(shown)} of {len(eigenvalues)} directions; {num_for[90]} hold 90 % "
        "of the variance.",
    )


def build_interval_axis(rows: Sequence[Row]) -> IntervalAxis:
    """An axis of round per cents that holds every value and interval of the fractions."""
    ends = [
        bound
        for row in rows
        if describe_metric(row.metric).is_fraction
        for bound in (row.value, *(row.interval or ()))
    ]
    ticks = [
        tick for tick in choose_ticks(100 * min(ends), 100 * max(ends), 4) if -1e-9 <= tick <= 100 + 1e-9
    ]
    axis = IntervalAxis(ticks[0] / 100, ticks[-1] / 100, ())
    return IntervalAxis(
        axis.low, axis.high, tuple(Tick(axis.place(tick / 100), f"{tick:g}") for tick in ticks)
    )


def place_points(coordinates: np.ndarray) -> np.ndarray:
    """Coordinates [N, 2] as pixels of MAP_WIDTH × MAP_HEIGHT, both axes to one scale, y upwards."""
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    span = np.maximum(high - low, 1e-12)
    size = np.array([MAP_WIDTH, MAP_HEIGHT])
    scale = float(((size - 2 * MAP_MARGIN) / span).min())
    centred = (coordinates - (low + high) / 2) * scale
    return np.round(size / 2 + centred * np.array([1.0, -1.0]), 1)


def _write_power(power: int, is_short: bool) -> str:
    if is_short or power in (0, 1):
        return f"{10.0**power:g}"
    return f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
