"""How protocols, metrics and settings are written for people."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stablerep.evaluation.results import Row


@dataclass(frozen=True)
class MetricFormat:
    """How a metric is written.

    Args:
        title: Its name in words.
        is_fraction: Whether it is in [0, 1] and written as per cent.
        higher_is_better: None where neither is.
    """

    title: str
    is_fraction: bool
    higher_is_better: bool | None = True


_METRICS = {
    "accuracy": MetricFormat("accuracy", True),
    "top5_accuracy": MetricFormat("top-5 accuracy", True),
    "mean_per_class_accuracy": MetricFormat("mean per-class accuracy", True),
    "map11": MetricFormat("mean average precision, 11 points", True),
    "alignment": MetricFormat("alignment", False, higher_is_better=False),
    "uniformity": MetricFormat("uniformity", False, higher_is_better=False),
    "rankme": MetricFormat("RankMe", False),
    "lidar": MetricFormat("LiDAR", False),
}
_PROTOCOLS = {
    "linear": "linear probe",
    "linear_bn": "linear probe after BatchNorm",
    "logreg": "logistic regression",
    "knn": "k-NN",
    "ridge": "ridge classifier",
    "fewshot": "few-shot prototypes",
    "zeroshot": "zero-shot",
    "retrieval": "retrieval",
    "geometry": "geometry",
    "robustness": "k-NN on corrupted images",
}
_SELECTIONS = {
    "paper": ", chosen on test",
    "heldout": "",
}


def describe_metric(metric: str) -> MetricFormat:
    """How a metric is written; one that is not known is a plain number."""
    prefix, at, rank = metric.partition("@")
    if at and prefix in ("recall", "precision"):
        return MetricFormat(f"{prefix} at {rank}", True)
    return _METRICS.get(metric) or MetricFormat(metric.replace("_", " "), False, higher_is_better=None)


def describe_protocol(protocol: str) -> str:
    """The protocol's name in words; one that is not known keeps its own, with spaces."""
    if match := re.fullmatch(r"knn(\d+)", protocol):
        return f"k-NN, k = {match[1]}"
    base, _, selection = protocol.rpartition("_")
    if selection in _SELECTIONS and base in _PROTOCOLS:
        return _PROTOCOLS[base] + _SELECTIONS[selection]
    head = next(
        (name for name in sorted(_PROTOCOLS, key=len, reverse=True) if protocol.startswith(name)), None
    )
    if head is None:
        return protocol.replace("_", " ")
    rest = protocol[len(head) :].strip("_/-.: ").replace("_", " ")
    return f"{_PROTOCOLS[head]}, {rest}" if rest else _PROTOCOLS[head]


def format_value(value: float, metric: str, num_decimals: int = 2) -> str:
    """Per cent without its sign for fractions, four digits for the rest."""
    if describe_metric(metric).is_fraction:
        return f"{100 * value:.{num_decimals}f}"
    return f"{value:.4g}".replace("-", "−")


def format_interval(row: Row, num_decimals: int = 2) -> str:
    """`89.20 to 91.34`; empty if the row has no interval."""
    if row.interval is None:
        return ""
    low, high = (format_value(bound, row.metric, num_decimals) for bound in row.interval)
    return f"{low} to {high}"


def format_settings(hyperparameters: Mapping[str, Any]) -> str:
    """`k 20, temperature 0.07, epochs 90`; settings that are null are left out."""
    parts = (
        f"{name.removeprefix('num_').replace('_', ' ')} {format_setting(value)}"
        for name, value in hyperparameters.items()
        if value is not None
    )
    return ", ".join(parts)


def format_setting(value: Any) -> str:
    """A setting as text: six digits of a fraction, yes and no, lists with spaces."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {format_setting(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(format_setting, value))
    return "none" if value is None else str(value)


def write_as_heading(text: str) -> str:
    """The text with a capital first letter, except where that letter is a symbol: `k-NN`."""
    return text if text[1:2] == "-" else text[:1].upper() + text[1:]
