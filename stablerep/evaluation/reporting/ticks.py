"""Marks on the axes of a page's figures."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: place along it, pixels, and its text."""

    place: float
    text: str


def choose_ticks(low: float, high: float, num_steps: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high] in about `num_steps`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / num_steps))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= num_steps)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]
