"""`stablerep evaluate compare A B`: two runs on the same examples, score by score.

Rows are matched by protocol, metric and feature, examples by name. For each pair of rows:

    difference    value of A less value of B
    interval      percentile bootstrap, in which an example is drawn with what both runs answered for it
    McNemar's p   exact, two-sided: how often A alone is right against how often B alone is

Each row is taken by itself: of twenty rows without any true difference, one is expected to show p < 0.05.
Rows of other settings are compared, and the settings named; where the examples themselves were drawn by the
settings, as episodes are, and are others, there is no interval.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from stablerep.evaluation.formats import format_value
from stablerep.evaluation.resampling import count_kinds, resample_average_precision
from stablerep.evaluation.results import Results, Row, read_results, replace_file
from stablerep.evaluation.statistics import (
    Estimate,
    McNemarTest,
    PairedDifference,
    bootstrap_difference,
    bootstrap_indices,
    bootstrap_kinds,
    mcnemar_test,
)

SCHEMA_VERSION = 1
COMPARISON_FILE = "compare.json"
MAX_NAMES_SHOWN = 3
_TOLERANCE = 1e-6
"""Largest difference between a row's value and what its predictions give: float32 of the protocols."""


class _Resampling(TypedDict):
    num_resamples: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class CompareConfig:
    """Which runs to compare, and how."""

    a: str
    """Folder of the first run: results.jsonl and predictions.npz of `stablerep evaluate`."""
    b: str
    """Folder of the second run, on the same images."""
    output: str | None = None
    """Folder for compare.json; null prints the table alone."""
    num_resamples: int = 10_000
    """Bootstrap samples, at least 100."""
    confidence: float = 0.95
    """Coverage of the intervals, in (0, 1)."""
    seed: int = 0
    """Seed of the bootstrap, >= 0."""

    def __post_init__(self) -> None:
        if self.num_resamples < 100:
            raise ValueError(f"num_resamples must be >= 100, got {self.num_resamples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


@dataclass(frozen=True)
class Comparison:
    """One score of both runs.

    Args:
        protocol: Such as `knn20`.
        metric: Such as `accuracy`.
        feature: Such as `cls`.
        value_a: Score of A.
        value_b: Score of B.
        difference: value_a − value_b.
        interval: Paired bootstrap interval of the difference; None if the rows have no predictions, the
            metric is none of theirs, or the examples are others.
        mcnemar: None where an example is not right or wrong.
        n: Examples.
        settings: Those that differ: name → the value in A and in B.
    """

    protocol: str
    metric: str
    feature: str
    value_a: float
    value_b: float
    difference: float
    interval: tuple[float, float] | None
    mcnemar: McNemarTest | None
    n: int
    settings: Mapping[str, tuple[Any, Any]]


def run(config: CompareConfig) -> int:
    """Compare, print the table, write compare.json if asked.

    Returns:
        0, whatever the differences.

    Raises:
        ValueError: If a file cannot be read, or the runs are not of the same examples.
        OSError: If a file is missing or the output cannot be written.
    """
    a, b = read_results(config.a), read_results(config.b)
    comparisons = compare_results(
        a, b, num_resamples=config.num_resamples, confidence=config.confidence, seed=config.seed
    )
    print(build_table(a, b, comparisons, config.confidence))
    if config.output is not None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        content = describe_comparison(a, b, comparisons, config)
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        replace_file(folder / COMPARISON_FILE, text.encode())
        print(f"\n{folder / COMPARISON_FILE}")
    return 0


def compare_results(
    a: Results, b: Results, *, num_resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> list[Comparison]:
    """Every score that both runs have, in the order of A.

    Args:
        a: A run.
        b: Another one on the same examples, in any order.
        num_resamples: Bootstrap samples, at least 100.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Of the bootstrap, >= 0.

    Raises:
        ValueError: If the data, the names or the targets differ, no score is of both, or a row's value is
            not that of its predictions.
    """
    _check_same_data(a, b)
    rows_b = {row.key: row for row in b.rows}
    pairs = [(row, rows_b[row.key]) for row in a.rows if row.key in rows_b]
    if not pairs:
        raise ValueError(
            f"{a.folder} and {b.folder} have no score in common: {_name_rows(a.rows)} against "
            f"{_name_rows(b.rows)}"
        )
    return [
        _compare_rows(
            row,
            _align(row, other, a, b),
            (a, b),
            {"num_resamples": num_resamples, "confidence": confidence, "seed": seed},
        )
        for row, other in pairs
    ]


def build_table(a: Results, b: Results, comparisons: Sequence[Comparison], confidence: float = 0.95) -> str:
    """The comparison as a Markdown table, with what a reader has to know about it."""
    header = [
        "protocol",
        "metric",
        "feature",
        "A",
        "B",
        "A − B",
        f"{100 * confidence:g} % interval",
        "McNemar's p",
        "only A right",
        "only B right",
        "n",
    ]
    cells = [header, *map(_write_row, comparisons)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_join(row, widths) for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + (":" if i > 2 else "-") for i, width in enumerate(widths)) + "|"
    notes = [
        f"A: {a.folder} ({a.provenance.model})",
        f"B: {b.folder} ({b.provenance.model})",
        "",
        lines[0],
        rule,
        *lines[1:],
    ]
    differing: dict[str, list[Comparison]] = {}
    for found in comparisons:
        for name, (in_a, in_b) in found.settings.items():
            differing.setdefault(f"{name} is {in_a} in A, {in_b} in B", []).append(found)
    for text, rows in differing.items():
        notes += ["", f"Other settings: {text} ({_name_rows(rows)})."]
    if len(comparisons) > 1:
        notes += ["", "Each row by itself: neither intervals nor p are corrected for the number of rows."]
    for name, run_, other in (("A", a, b), ("B", b, a)):
        keys = {row.key for row in other.rows}
        if alone := [row for row in run_.rows if row.key not in keys]:
            notes += ["", f"Only {name} has {_name_rows(alone)}."]
    return "\n".join(notes)


def describe_comparison(
    a: Results, b: Results, comparisons: Sequence[Comparison], config: CompareConfig
) -> dict[str, Any]:
    """The comparison in plain types, for compare.json."""
    runs = {
        name: {
            "folder": str(found.folder),
            "model": found.provenance.model,
            "data": found.provenance.data,
            "hashes": dict(found.provenance.hashes),
            "versions": dict(found.provenance.versions),
        }
        for name, found in (("a", a), ("b", b))
    }
    return {
        "schema_version": SCHEMA_VERSION,
        **runs,
        "interval_method": f"paired percentile bootstrap, {100 * config.confidence:g} %",
        "num_resamples": config.num_resamples,
        "seed": config.seed,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def _check_same_data(a: Results, b: Results) -> None:
    data_a, data_b = a.provenance.hashes["data"], b.provenance.hashes["data"]
    if data_a != data_b:
        raise ValueError(
            f"{a.folder} and {b.folder} were evaluated on other data: {a.provenance.data} ({data_a[:12]}) "
            f"and {b.provenance.data} ({data_b[:12]})"
        )
    if a.names and b.names:  # a run without predictions has none
        _check_same_names(a.names, b.names, a, b)


def _check_same_names(names_a: Sequence[str], names_b: Sequence[str], a: Results, b: Results) -> None:
    for found, folder in ((names_a, a.folder), (names_b, b.folder)):
        if len(set(found)) != len(found):
            raise ValueError(f"{folder} has two examples of one name, which cannot be matched")
    only_a, only_b = set(names_a) - set(names_b), set(names_b) - set(names_a)
    if only_a or only_b:
        parts = [
            f"{_name_some(sorted(only))} only in {folder}"
            for only, folder in ((only_a, a.folder), (only_b, b.folder))
            if only
        ]
        raise ValueError(f"{a.folder} and {b.folder} were evaluated on other examples: {'; '.join(parts)}")


def _align(row_a: Row, row_b: Row, a: Results, b: Results) -> Row:
    """The row of B with its examples in the order of A."""
    if row_a.predictions is None or row_b.predictions is None:
        return row_b
    names_a, names_b = row_a.names or a.names, row_b.names or b.names
    if row_a.settings != row_b.settings and names_a != a.names and set(names_a) != set(names_b):
        return dataclasses.replace(row_b, predictions=None, targets=None, names=None)
    _check_same_names(names_a, names_b, a, b)
    place = {name: index for index, name in enumerate(names_b)}
    order = np.array([place[name] for name in names_a])
    targets = None if row_b.targets is None else row_b.targets[order]
    aligned = dataclasses.replace(
        row_b,
        predictions=row_b.predictions[order],
        targets=targets,
        names=names_a,
    )
    if not _equal_targets(row_a.targets, targets):
        raise ValueError(
            f"{row_a.protocol} {row_a.metric}: the targets of {a.folder} and {b.folder} differ for the same "
            "examples"
        )
    return aligned


def _equal_targets(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _compare_rows(a: Row, b: Row, runs: tuple[Results, Results], resampling: _Resampling) -> Comparison:
    difference: PairedDifference | Estimate | None = None
    mcnemar: McNemarTest | None = None
    if a.predictions is not None and b.predictions is not None:
        scores_a, scores_b = _score_examples(a), _score_examples(b)
        if scores_a is not None and scores_b is not None:
            difference = bootstrap_difference(scores_a, scores_b, **resampling)
            _check_values(a, b, runs, float(scores_a.mean()), float(scores_b.mean()))
            if _are_right_or_wrong(scores_a) and _are_right_or_wrong(scores_b):
                mcnemar = mcnemar_test(scores_a.bool(), scores_b.bool())
        elif a.metric == "mean_per_class_accuracy":
            difference = _bootstrap_mean_per_class(a, b, runs, resampling)
        elif a.metric == "map11":
            difference = _bootstrap_average_precision(a, b, runs, resampling)
    return Comparison(
        protocol=a.protocol,
        metric=a.metric,
        feature=a.feature,
        value_a=a.value,
        value_b=b.value,
        difference=a.value - b.value,
        interval=None if difference is None else (difference.low, difference.high),
        mcnemar=mcnemar,
        n=a.n,
        settings={
            name: (a.settings.get(name), b.settings.get(name))
            for name in {**a.settings, **b.settings}
            if a.settings.get(name) != b.settings.get(name)
        },
    )


def _score_examples(row: Row) -> Tensor | None:
    """A number for each example whose mean is the metric; None if the metric is no such mean."""
    assert row.predictions is not None
    if row.predictions.ndim != 1:
        return None
    if row.targets is None:
        return torch.from_numpy(row.predictions.astype(np.float64))
    if row.metric == "accuracy" and row.targets.ndim == 1:
        return torch.from_numpy(row.predictions == row.targets).double()
    return None


def _bootstrap_mean_per_class(
    a: Row, b: Row, runs: tuple[Results, Results], resampling: _Resampling
) -> Estimate | None:
    assert a.predictions is not None
    assert b.predictions is not None
    if a.targets is None or not a.targets.ndim == a.predictions.ndim == b.predictions.ndim == 1:
        return None
    right = np.stack([a.predictions == a.targets, b.predictions == a.targets])
    kinds = count_kinds(a.targets, right)
    _check_values(a, b, runs, *map(float, kinds.mean_per_class(kinds.counts.double()[None])[:, 0]))
    return bootstrap_kinds(
        lambda drawn: torch.sub(*kinds.mean_per_class(drawn)),
        kinds.counts,
        **resampling,
    )


def _bootstrap_average_precision(
    a: Row, b: Row, runs: tuple[Results, Results], resampling: _Resampling
) -> Estimate | None:
    assert a.predictions is not None
    assert b.predictions is not None
    if a.targets is None or not a.targets.ndim == a.predictions.ndim == b.predictions.ndim == 2:
        return None
    shown = torch.from_numpy(a.targets.astype(np.int8))
    scores_a, scores_b = torch.from_numpy(a.predictions), torch.from_numpy(b.predictions)
    everything = torch.arange(len(shown))[None]
    found = (
        float(resample_average_precision(scores, shown, everything)[0]) for scores in (scores_a, scores_b)
    )
    _check_values(a, b, runs, *found)
    return bootstrap_indices(
        lambda indices: (
            resample_average_precision(scores_a, shown, indices)
            - resample_average_precision(scores_b, shown, indices)
        ),
        len(shown),
        **resampling,
    )


def _check_values(a: Row, b: Row, runs: tuple[Results, Results], *found: float) -> None:
    for row, value, run_ in zip((a, b), found, runs, strict=True):
        if abs(value - row.value) > _TOLERANCE:
            raise ValueError(
                f"{run_.folder}: {row.protocol} {row.metric} is {row.value:.6f}, but its predictions give "
                f"{value:.6f}"
            )


def _are_right_or_wrong(scores: Tensor) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _write_row(found: Comparison) -> list[str]:
    interval = ""
    if found.interval is not None:
        interval = " to ".join(_sign(bound, found.metric) for bound in found.interval)
    mcnemar = found.mcnemar
    return [
        found.protocol,
        found.metric,
        found.feature,
        format_value(found.value_a, found.metric),
        format_value(found.value_b, found.metric),
        _sign(found.difference, found.metric),
        interval,
        "" if mcnemar is None else format_p_value(mcnemar.p_value),
        "" if mcnemar is None else f"{mcnemar.num_only_a_correct:,}",
        "" if mcnemar is None else f"{mcnemar.num_only_b_correct:,}",
        f"{found.n:,}",
    ]


def format_p_value(p: float) -> str:
    """Two digits, and `< 0.0001` where more would say nothing."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _sign(value: float, metric: str) -> str:
    text = format_value(abs(value), metric)
    is_zero = float(text) == 0
    return text if is_zero else f"{'−' if value < 0 else '+'}{text}"


def _join(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        cell.ljust(width) if index <= 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(aligned)} |"


def _name_rows(rows: Sequence[Row] | Sequence[Comparison]) -> str:
    return _name_some([f"{row.protocol} {row.metric} of {row.feature}" for row in rows])


def _name_some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    rest = len(names) - MAX_NAMES_SHOWN
    return shown if rest <= 0 else f"{shown} and {rest:,} more"
