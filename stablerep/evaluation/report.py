"""Scores, and the files that hold them: results.json, results.md, predictions.npz."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablerep.evaluation.statistics import PairedDifference, paired_difference, wilson_interval

SCHEMA_VERSION = 1
RESULTS_FILE, TABLE_FILE, PREDICTIONS_FILE = "results.json", "results.md", "predictions.npz"


@dataclass(frozen=True)
class Score:
    """Accuracy of one protocol on the test split.

    Args:
        name: Such as `knn20`, `linear_paper`, `linear_bn_heldout`.
        selection: The images on which hyper-parameters were chosen; `none` if nothing was.
        predictions: Predicted classes.
        labels: True classes.
        hyperparameters: What was set and what was chosen.
        seconds: Time of the protocol, without the evaluation features; rows of one run share it.

    Shapes:
        predictions, labels [M].
    """

    name: str
    selection: str
    predictions: Tensor
    labels: Tensor
    hyperparameters: Mapping[str, Any]
    seconds: float

    @property
    def num_correct(self) -> int:
        """How many test images are classified rightly."""
        return int((self.predictions == self.labels).sum())

    @property
    def value(self) -> float:
        """Accuracy, a fraction in [0, 1]."""
        return self.num_correct / len(self.labels)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy over test images."""
        return wilson_interval(self.num_correct, len(self.labels))

    def to_json(self) -> dict[str, Any]:
        """Plain types for results.json; the predictions are in predictions.npz under the same name."""
        return {
            "name": self.name,
            "metric": "accuracy",
            "value": self.value,
            "interval": list(self.interval),
            "interval_method": "Wilson, 95 %",
            "n": len(self.labels),
            "num_correct": self.num_correct,
            "selection": self.selection,
            "hyperparameters": dict(self.hyperparameters),
            "seconds": round(self.seconds, 3),
        }


def build_table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table, with what a reader has to know about its rows."""
    lines = [
        "| protocol | accuracy, % | 95 % interval | n | chosen on | settings |",
        "|---|---:|---:|---:|---|---|",
    ]
    for score in scores:
        low, high = score.interval
        settings = ", ".join(
            f"{name} {value}" for name, value in score.hyperparameters.items() if value is not None
        )
        lines.append(
            f"| {score.name} | {100 * score.value:.2f} | {100 * low:.2f} to {100 * high:.2f} "
            f"| {len(score.labels)} | {score.selection} | {settings} |"
        )
    notes = []
    if any(score.selection == "test" for score in scores):
        notes.append(
            "`paper` rows: head and epoch are the best *on the test split*, as in the published figures; "
            "`heldout` rows are chosen without it."
        )
    if any(score.hyperparameters.get("views_cached") is not None for score in scores):
        notes.append(
            "`views_cached`: the probe saw that many augmented views of each image in turn, not a new one in "
            "each epoch; not comparable with published figures."
        )
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def write_report(
    folder: Path, scores: Sequence[Score], names: Sequence[str], facts: Mapping[str, Any], title: str
) -> None:
    """Write results.json, results.md and predictions.npz, each whole or not at all.

    Args:
        folder: Where; it exists.
        scores: The rows.
        names: Names of the test images, in the order of the predictions.
        facts: What results.json says beside the scores: checkpoint, data, settings, versions, seconds.
        title: Heading of results.md.

    Raises:
        OSError: If a file cannot be written.
    """
    arrays = {score.name: score.predictions.numpy() for score in scores}
    arrays |= {"names": np.array(names), "labels": scores[0].labels.numpy()}
    content = {"schema_version": SCHEMA_VERSION, **facts, "results": [score.to_json() for score in scores]}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    table = f"# {title}\n\n{build_table(scores)}\n"
    _replace(folder / PREDICTIONS_FILE, lambda path: _save_arrays(path, arrays))
    _replace(folder / TABLE_FILE, lambda path: path.write_text(table, encoding="utf-8"))
    _replace(folder / RESULTS_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def read_results(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's results.json.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no results.json of this version.
    """
    path = Path(folder) / RESULTS_FILE
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version must be {SCHEMA_VERSION}, got {content.get('schema_version')}"
        )
    return content


def compare_runs(folder_a: str | Path, folder_b: str | Path, name: str) -> PairedDifference:
    """Accuracy of run A less that of run B under one protocol, paired by test image.

    Args:
        folder_a: Output folder of an evaluation.
        folder_b: Output folder of another one on the same test images.
        name: Name of the score, such as `knn20`.

    Raises:
        ValueError: If the runs had other test images, or one has no such score.
    """
    runs = [_read_predictions(Path(folder)) for folder in (folder_a, folder_b)]
    for folder, run in zip((folder_a, folder_b), runs, strict=True):
        if name not in run:
            raise ValueError(f"{Path(folder) / PREDICTIONS_FILE} has no score '{name}'")
    a, b = runs
    if not (np.array_equal(a["names"], b["names"]) and np.array_equal(a["labels"], b["labels"])):
        raise ValueError(f"{folder_a} and {folder_b} were evaluated on other test images")
    correct_a, correct_b = (torch.from_numpy(run[name] == run["labels"]) for run in runs)
    return paired_difference(correct_a, correct_b)


def _read_predictions(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / PREDICTIONS_FILE, allow_pickle=False) as arrays:
        return dict(arrays)


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
