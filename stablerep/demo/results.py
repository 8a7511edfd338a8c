"""What came out of the demo: scores, differences, curves, and whether its claim holds."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from data_gen.shards import list_complete_shards, read_samples
from stablerep.demo.budget import Budget
from stablerep.demo.runner import Record
from stablerep.evaluation.results import Results, Row, read_results
from stablerep.evaluation.sets import read_labelled_set
from stablerep.evaluation.statistics import PairedDifference, paired_difference
from stablerep.machine import describe_machine

RUN_TITLES = {"stablerep": "StableRep", "simclr": "SimCLR", "random": "random initialisation"}
"""The three sets of weights, in the order that is claimed."""
PROTOCOL_TITLES = {
    "linear_heldout": "linear probe",
    "linear_bn_heldout": "linear probe after BatchNorm",
    "knn20": "k-NN",
}
"""The scores on which the claim rests: the probe's settings are chosen without the test images."""
NUM_GRID_CAPTIONS = 8
_STEPS_BEFORE = {"loss": 1, "knn_top1": 0}
"""Steps taken at entry 0 of the log: a loss is of a step counted from 0, k-NN is of the weights after it."""
_MAX_GRID_CAPTION_CHARACTERS = 60
_NUM_CAPTIONS_TO_CHOOSE_FROM = 256


@dataclass(frozen=True)
class Difference:
    """Accuracy of one run less that of the next, paired by test image; fractions in [-1, 1].

    Args:
        protocol: Name of the score.
        above: The run that is claimed to be better.
        below: The other.
        difference: Observed.
        low: Lower bound of the 95 % interval.
        high: Upper bound.
    """

    protocol: str
    above: str
    below: str
    difference: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the difference is above 0 by more than the interval."""
        return self.low > 0


@dataclass(frozen=True)
class GridRow:
    """A caption and its generated images, as encoded files."""

    caption: str
    images: tuple[bytes, ...]
    image_extension: str


def collect_results(
    root: Path, budget: Budget, records: Sequence[Record], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the report says, in plain types, for demo.json.

    Args:
        root: The demo's folder, every step done.
        budget: Sizes of the steps.
        records: One a step.
        options: The demo's own options.
    """
    evaluations = {run: read_results(root / "evaluation" / run) for run in RUN_TITLES}
    differences = compare_all(root / "evaluation")
    num_classes = len(read_labelled_set(root / "scenes").classes)
    return {
        "schema_version": 1,
        "claim": judge(differences, budget.label_by),
        "scores": {run: describe_scores(found) for run, found in evaluations.items()},
        "differences": [asdict(difference) | {"holds": difference.holds} for difference in differences],
        "curves": {run: read_curves(root / run / "metrics.csv") for run in ("stablerep", "simclr")},
        "steps": [asdict(record) for record in records],
        "options": dict(options),
        "budget": asdict(budget) | {"num_images": budget.num_images, "chance": 1 / num_classes},
        "machine": describe_machine(),
        "versions": dict(evaluations["stablerep"].provenance.versions),
    }


def compare_all(folder: Path) -> list[Difference]:
    """Each run against the next, under each protocol; `folder` holds an evaluation a run.

    Raises:
        ValueError: If the runs had other test images, or one has not every score.
    """
    runs = {run: read_results(folder / run) for run in RUN_TITLES}
    found = []
    for protocol in PROTOCOL_TITLES:
        for above, below in pairwise(runs):
            paired = _compare(runs[above], runs[below], protocol)
            found.append(Difference(protocol, above, below, paired.difference, paired.low, paired.high))
    return found


def _compare(a: Results, b: Results, protocol: str) -> PairedDifference:
    """Accuracy of A less that of B, paired by test image."""
    correct = []
    for row in (_find_row(a, protocol), _find_row(b, protocol)):
        assert row.predictions is not None
        assert row.targets is not None
        correct.append(torch.from_numpy(row.predictions == row.targets))
    if a.names != b.names or a.provenance.hashes["data"] != b.provenance.hashes["data"]:
        raise ValueError(f"{a.folder} and {b.folder} were evaluated on other test images")
    return paired_difference(*correct)


def _find_row(results: Results, protocol: str) -> Row:
    row = next((row for row in results.rows if row.key == (protocol, "accuracy", "cls")), None)
    if row is None:
        raise ValueError(f"{results.folder} has no score '{protocol}'")
    return row


def describe_scores(results: Results) -> dict[str, dict[str, Any]]:
    """The rows of an evaluation by protocol, in plain types."""
    fields = ("metric", "value", "interval", "interval_method", "n", "selection", "hyperparameters")
    return {row.protocol: {name: getattr(row, name) for name in fields} for row in results.rows}


def judge(differences: Sequence[Difference], label_by: str) -> dict[str, Any]:
    """Whether StableRep > SimCLR > random initialisation, by more than the interval, under every protocol.

    Args:
        differences: From `compare_all`.
        label_by: The attribute that the scores are about.
    """
    failed = [difference for difference in differences if not difference.holds]
    if failed:
        text = (
            f"The claim (at naming the {label_by}) does not hold in this run: "
            + "; ".join(map(_explain_failure, failed))
            + "."
        )
    else:
        parts = [_explain_success(protocol, differences) for protocol in PROTOCOL_TITLES]
        text = f"The claim holds: at naming the {label_by}, " + "; ".join(parts) + "."
    return {
        "holds": not failed,
        "statement": f"At naming the {label_by}: StableRep > SimCLR > random initialisation, each by more "
        "than the 95 % interval of the paired difference, by " + ", ".join(PROTOCOL_TITLES.values()),
        "verdict": text,
    }


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """`loss` and `knn_top1` over the number of optimizer steps taken, from the log of a training."""
    curves: dict[str, list[tuple[int, float]]] = {"loss": [], "knn_top1": []}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, points in curves.items():
                if row.get(name):
                    points.append((int(row["step"]) + _STEPS_BEFORE[name], float(row[name])))
    return curves


def choose_grid(root: Path) -> list[GridRow]:
    """Captions that differ much from each other, with their images: the same ones for the same dataset."""
    rows: list[GridRow] = []
    for shard in list_complete_shards(root):
        rows += [
            GridRow(sample.caption, sample.images, sample.image_extension)
            for sample in read_samples(shard)
            if len(sample.caption) <= _MAX_GRID_CAPTION_CHARACTERS
        ]
        if len(rows) >= _NUM_CAPTIONS_TO_CHOOSE_FROM:
            break
    chosen = rows[:1]
    while rows and len(chosen) < min(NUM_GRID_CAPTIONS, len(rows)):
        rest = [row for row in rows if row not in chosen]
        chosen.append(min(rest, key=lambda row: max(_overlap(row, other) for other in chosen)))
    return chosen


def _explain_success(protocol: str, differences: Sequence[Difference]) -> str:
    parts = [
        f"{RUN_TITLES[found.above]} is {_points(found.difference)} points above {RUN_TITLES[found.below]} "
        f"({_points(found.low)} to {_points(found.high)})"
        for found in differences
        if found.protocol == protocol
    ]
    return f"by {PROTOCOL_TITLES[protocol]}, " + " and ".join(parts)


def _explain_failure(difference: Difference) -> str:
    above, below = RUN_TITLES[difference.above], RUN_TITLES[difference.below]
    where = f"is {'below' if difference.high < 0 else 'not clearly above'} {below}"
    return (
        f"by {PROTOCOL_TITLES[difference.protocol]}, {above} {where} ("
        f"{_points(difference.difference)} points, {_points(difference.low)} to {_points(difference.high)})"
    )


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f}".replace("-", "−")


def _overlap(row: GridRow, other: GridRow) -> float:
    words, others = set(row.caption.split()), set(other.caption.split())
    return len(words & others) / len(words | others)
