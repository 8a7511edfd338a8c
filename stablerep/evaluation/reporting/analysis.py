"""What a report computes from features and predictions."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stablerep.evaluation.reporting.content import ReportContent
from stablerep.evaluation.results import Row

PREFERRED_PROTOCOLS = (
    "linear_heldout",
    "linear_bn_heldout",
    "logreg",
    "knn20",
    "ridge",
    "zeroshot",
    "linear_paper",
    "linear_bn_paper",
)
"""Which scores come first where not all are shown."""


class Plane(NamedTuple):
    """Features on their first two principal axes.

    Attributes:
        coordinates: Float64 [N, 2], centred.
        shares: Of the variance, on each axis, fractions.
    """

    coordinates: Tensor
    shares: tuple[float, float]


@dataclass(frozen=True)
class Confusion:
    """How often a class was taken for another.

    Args:
        counts: Images of class i that were predicted as j, int64 [C, C].
        num_images: Images of each class, predicted as anything or nothing, int64 [C].
    """

    counts: np.ndarray
    num_images: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Counts over the images of the class, [C, C]; 0 for a class without images."""
        return self.counts / np.maximum(self.num_images, 1)[:, None]


def project_to_plane(features: Tensor) -> Plane:
    """Principal component analysis, in float64; the largest loading of each axis is positive.

    Args:
        features: One row an image.

    Shapes:
        features [N, D].

    Raises:
        ValueError: If there are fewer than two features, or one is not finite.
    """
    if len(features) < 2:
        raise ValueError(f"features for a map must be >= 2, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite")
    x = features.double()
    x = x - x.mean(dim=0)
    if x.shape[1] == 1:
        x = torch.cat([x, torch.zeros_like(x)], dim=1)
    values, vectors = torch.linalg.eigh(x.T @ x)  # ascending
    axes = vectors[:, -2:].flip(1)
    largest = axes.abs().argmax(dim=0)
    axes = axes * axes[largest, torch.arange(2)].sign()
    total = float(values.clamp(min=0).sum())
    shares = [float(value) / total if total > 0 else 0.0 for value in values[-2:].flip(0).clamp(min=0)]
    return Plane(x @ axes, (shares[0], shares[1]))


def choose_points(num_points: int, most: int, seed: int) -> np.ndarray:
    """Indices of at most `most` points, ascending, drawn without replacement."""
    if num_points <= most:
        return np.arange(num_points)
    return np.sort(np.random.default_rng(seed).choice(num_points, most, replace=False))


def count_confusions(predictions: np.ndarray, targets: np.ndarray, num_classes: int) -> Confusion:
    """Counts of (target, prediction); a prediction that is no class counts for none.

    Args:
        predictions: Predicted classes; −1 is no answer.
        targets: True classes, in [0, num_classes).
        num_classes: Number of classes C.

    Shapes:
        predictions, targets [N] int.
    """
    answered = (predictions >= 0) & (predictions < num_classes)
    cells = targets[answered].astype(np.int64) * num_classes + predictions[answered].astype(np.int64)
    counts = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    return Confusion(counts, np.bincount(targets.astype(np.int64), minlength=num_classes))


def list_confused_pairs(confusion: Confusion, most: int) -> list[tuple[int, int, int, float]]:
    """Pairs (target, prediction, images, share of the target's images), the most frequent first."""
    counts = confusion.counts.copy()
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    pairs = [(int(cell // len(counts)), int(cell % len(counts))) for cell in order]
    return [
        (target, prediction, int(counts[target, prediction]), float(confusion.shares[target, prediction]))
        for target, prediction in pairs
        if counts[target, prediction] > 0
    ]


def list_confusable_rows(content: ReportContent, most: int) -> list[Row]:
    """The accuracies whose predictions are classes of the test images, the preferred protocols first."""
    if content.targets is None:
        return []
    rows = [
        row
        for row in content.rows
        if row.metric == "accuracy"
        and row.names is None
        and row.predictions is not None
        and row.predictions.ndim == 1
        and row.predictions.dtype.kind in "iu"
        and row.targets is not None
        and np.array_equal(row.targets, content.targets)
    ]
    return sort_by_preference(rows)[:most]


def sort_by_preference(rows: list[Row]) -> list[Row]:
    """Preferred protocols first; the rest as they come."""
    rank = {protocol: index for index, protocol in enumerate(PREFERRED_PROTOCOLS)}
    return sorted(rows, key=lambda row: rank.get(row.protocol, len(rank)))


def choose_queries(
    targets: np.ndarray, predictions: np.ndarray | None = None, *, num_queries: int = 12, seed: int = 0
) -> np.ndarray:
    """Test images whose neighbours are shown: of as many classes as there can be, half of them wrong.

    Args:
        targets: Class of each test image.
        predictions: Predicted classes; None draws without regard to them.
        num_queries: How many, at least 1; fewer if there are fewer images.
        seed: Of the draw.

    Shapes:
        targets, predictions [M] → indices [at most num_queries], by class.

    Raises:
        ValueError: If `num_queries` is below 1.
    """
    if num_queries < 1:
        raise ValueError(f"num_queries must be >= 1, got {num_queries}")
    order = np.random.default_rng(seed).permutation(len(targets))
    wrong = np.zeros(len(targets), dtype=bool) if predictions is None else predictions != targets
    num_wrong = min(int(wrong.sum()), num_queries // 2)
    chosen_wrong = _spread(order[wrong[order]], targets, num_wrong, np.zeros(0, dtype=np.int64))
    rest = _spread(order[~wrong[order]], targets, num_queries - num_wrong, targets[chosen_wrong])
    chosen = np.concatenate([chosen_wrong, rest])
    return chosen[np.argsort(targets[chosen], kind="stable")]


def _spread(order: np.ndarray, targets: np.ndarray, count: int, taken: np.ndarray) -> np.ndarray:
    """The first `count` of the order, a class again only when every other has had its turn."""
    num_taken: dict[int, int] = {}
    for target in taken.tolist():
        num_taken[target] = num_taken.get(target, 0) + 1
    turns = []
    for place, index in enumerate(order.tolist()):
        target = int(targets[index])
        turns.append((num_taken.get(target, 0), place, index))
        num_taken[target] = num_taken.get(target, 0) + 1
    return np.array([index for _, _, index in sorted(turns)[:count]], dtype=np.int64)
