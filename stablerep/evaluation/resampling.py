"""Metrics of resamples of the examples, many at a time: for intervals of what is no mean over examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stablerep.evaluation.metrics import NUM_RECALL_LEVELS
from stablerep.evaluation.statistics import bootstrap_difference, bootstrap_indices, bootstrap_kinds

NUM_RESAMPLES_IN_CACHE = 32
"""Resamples of an average precision at a time: few, so that they stay in the processor's cache."""


def mean_interval(scores: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of a score over the examples.

    Shapes:
        scores [N].
    """
    values = torch.from_numpy(scores.astype(np.float64))
    found = bootstrap_difference(values, torch.zeros_like(values), seed=seed)
    return found.low, found.high


def mean_per_class_interval(
    predictions: np.ndarray, targets: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `metrics.mean_per_class_accuracy`.

    Shapes:
        predictions, targets [N] int.
    """
    kinds = count_kinds(targets, (predictions == targets)[None])
    found = bootstrap_kinds(lambda drawn: kinds.mean_per_class(drawn)[0], kinds.counts, seed=seed)
    return found.low, found.high


def average_precision_interval(scores: np.ndarray, targets: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of `metrics.mean_average_precision`.

    Args:
        scores: Confidence of each image and class.
        targets: 1 where the image shows the class, 0 where not, −1 where that does not count.
        seed: Of the draws.

    Shapes:
        scores, targets [N, C].
    """
    confidence, shown = torch.from_numpy(scores), torch.from_numpy(targets.astype(np.int8))
    found = bootstrap_indices(
        lambda indices: resample_average_precision(confidence, shown, indices), len(shown), seed=seed
    )
    return found.low, found.high


@dataclass(frozen=True)
class ClassifiedKinds:
    """Examples by kind: of one class, and classified alike by each of some classifiers.

    Args:
        counts: Examples of each kind, int64 [V].
        member: Whether a kind is of a class, float64 [V, C].
        right: Whether a classifier has a kind right, float64 [classifiers, V].
    """

    counts: Tensor
    member: Tensor
    right: Tensor

    def mean_per_class(self, drawn: Tensor) -> Tensor:
        """Mean accuracy over the classes that a resample has, of each classifier.

        Shapes:
            drawn [R, V] → [classifiers, R].
        """
        num_images = drawn @ self.member  # [R, C]
        num_right = (drawn * self.right[:, None]) @ self.member  # [classifiers, R, C]
        return (num_right / num_images.clamp(min=1)).sum(dim=-1) / (num_images > 0).sum(dim=-1)


def count_kinds(targets: np.ndarray, right: np.ndarray) -> ClassifiedKinds:
    """Examples of one class on which each classifier is right or wrong alike are of one kind.

    Shapes:
        targets [N] int, right [classifiers, N] bool.
    """
    answers = np.concatenate([targets[None].astype(np.int64), right.astype(np.int64)])
    kinds, counts = np.unique(answers, axis=1, return_counts=True)
    classes, of_class = np.unique(kinds[0], return_inverse=True)
    member = torch.zeros(len(of_class), len(classes), dtype=torch.float64)
    member[torch.arange(len(of_class)), torch.from_numpy(of_class)] = 1
    return ClassifiedKinds(torch.from_numpy(counts), member, torch.from_numpy(kinds[1:]).double())


def resample_average_precision(scores: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
    """`metrics.mean_average_precision` of resamples of the images.

    The images of a class are ranked once; a resample only changes how often each counts.

    Args:
        scores: Confidence of each image and class.
        targets: 1 where the image shows the class, 0 where not, −1 where that does not count.
        indices: Images of each resample.

    Shapes:
        scores, targets [N, C], indices [R, N] → [R] float64; 0 for a resample that shows no class.
    """
    shown = (targets == 1).any(dim=0).nonzero().flatten().tolist()
    classes = [_rank_class(scores[:, column], targets[:, column]) for column in shown]
    chunks = indices.split(NUM_RESAMPLES_IN_CACHE)
    return torch.cat([_average_precisions(classes, rows, len(scores)) for rows in chunks])


def _rank_class(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The images of one class by score, which of them show it and which count, and where precision can peak.

    Precision falls from one positive to the next, so it is taken at the last image of each score that a
    positive has.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked, truth = scores[order], targets[order]
    _, group = ranked.unique_consecutive(return_inverse=True)
    last = torch.bincount(group).cumsum(0) - 1
    return order, truth, last[group[truth == 1].unique()]


def _average_precisions(
    classes: Sequence[tuple[Tensor, Tensor, Tensor]], indices: Tensor, num_examples: int
) -> Tensor:
    counts = torch.zeros(len(indices), num_examples).scatter_add_(1, indices, torch.ones(indices.shape))
    total, num_classes = torch.zeros(len(indices), dtype=torch.float64), torch.zeros(len(indices))
    levels = torch.arange(NUM_RECALL_LEVELS)
    for order, truth, peaks in classes:
        weights = counts[:, order]
        found = (weights * (truth == 1)).cumsum(1)[:, peaks]
        shown = (weights * (truth >= 0)).cumsum(1)[:, peaks]
        precision = found / shown.clamp(min=1)
        best = precision.flip(1).cummax(dim=1).values.flip(1)  # at this threshold or any later one
        positives = found[:, -1:]
        # The first threshold whose recall is at least the level, in whole numbers.
        first = torch.searchsorted((NUM_RECALL_LEVELS - 1) * found, (levels * positives).contiguous())
        average = best.gather(1, first).double().mean(dim=1)
        has_positives = positives[:, 0] > 0
        total += average.where(has_positives, 0.0)
        num_classes += has_positives
    return total / num_classes.clamp(min=1)
