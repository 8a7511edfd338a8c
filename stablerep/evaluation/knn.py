"""Weighted k-nearest-neighbour classification of frozen features.

For a test feature x with the k most similar training features N(x), by cosine similarity s,

    score(c) = Σ_{i ∈ N(x), y_i = c} exp(s_i / T),        prediction = argmax_c score(c).

One search serves every k: the votes are counted from the nearest neighbour on and read at each k. Both sets
are taken in slices, so that neither the matrix of similarities nor a copy of the features is ever held.

Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018),
section 3.4; the same vote is used by DINO and its successors with k = 10, 20, 100, 200 and T = 0.07.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stablerep.evaluation.inputs import check_features, check_labels

NUMBERS_OF_NEIGHBOURS = (10, 20, 100, 200)
NUM_TRAIN_ROWS_PER_SLICE = 2**14
MAX_SIMILARITIES_IN_MEMORY = 2**24  # 64 MiB of float32 similarities at a time


class Neighbours(NamedTuple):
    """Cosine similarities [M, k], descending, and the training rows [M, k] that have them."""

    similarities: Tensor
    indices: Tensor


def find_neighbours(train_features: Tensor, test_features: Tensor, k: int) -> Neighbours:
    """The k training features of the highest cosine similarity to each test feature, the nearest first.

    Of equal similarities the lower training row comes first.

    Args:
        train_features: The features to search; they need not be normalised.
        test_features: The features to search for.
        k: Number of neighbours, in [1, N].

    Shapes:
        train_features [N, D], test_features [M, D] → similarities [M, k], indices [M, k] int64.

    Returns:
        Float32 similarities (float64 for float64 features) and rows of `train_features`, on the device of
        `test_features`.

    Raises:
        ValueError: If k or the shapes are out of their bounds, or a feature is not finite.
    """
    _check_features(train_features, test_features, (k,))
    slices = list(_search(train_features, test_features, k))
    if not slices:
        empty = test_features.new_empty(0, k, dtype=_precision(train_features, test_features))
        return Neighbours(empty, empty.long())
    return Neighbours(torch.cat([s.similarities for s in slices]), torch.cat([s.indices for s in slices]))


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """argmax_c Σ_{i ∈ kNN, y_i = c} exp(cos(x, x_i) / T): `knn_classify_by_k` for one k.

    Args:
        train_features: The labelled features; they need not be normalised.
        train_labels: Class indices of ``train_features``, in [0, num_classes).
        test_features: The features to classify.
        num_classes: Number of classes C, at least 1.
        k: Number of neighbours that vote, in [1, N].
        temperature: T of the vote's weights, > 0.

    Shapes:
        train_features [N, D], train_labels [N], test_features [M, D] → [M] int64.

    Returns:
        The predicted class of each test feature, on the device of ``test_features``.

    Raises:
        ValueError: If k, the temperature, the labels or the shapes are out of their bounds, or a feature is
            not finite.

    Reference:
        Wu et al., CVPR 2018, section 3.4.
    """
    return knn_classify_by_k(
        train_features, train_labels, test_features, num_classes=num_classes, ks=(k,), temperature=temperature
    )[k]


def knn_classify_by_k(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = NUMBERS_OF_NEIGHBOURS,
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """The vote of the module for several numbers of neighbours, in float32 (float64 for float64 features).

    Of neighbours at the same similarity the lower training row comes first; of classes with the same score
    the lower index wins.

    Args:
        train_features: The labelled features; they need not be normalised.
        train_labels: Class indices of ``train_features``, in [0, num_classes).
        test_features: The features to classify.
        num_classes: Number of classes C, at least 1.
        ks: Numbers of neighbours that vote, each in [1, N].
        temperature: T of the votes' weights, > 0.

    Shapes:
        train_features [N, D], train_labels [N], test_features [M, D] → [M] int64 for each k.

    Returns:
        For each k the predicted class of each test feature, on the device of ``test_features``.

    Raises:
        ValueError: If a k, the temperature, the labels or the shapes are out of their bounds, or a feature is
            not finite.

    Reference:
        Wu et al., CVPR 2018, section 3.4.
    """
    _check_features(train_features, test_features, ks)
    check_labels("train_labels", train_labels, len(train_features), num_classes)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    labels = train_labels.to(test_features.device).long()
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for neighbours in _search(train_features, test_features, max(ks)):
        for k, voted in _vote(neighbours, labels, num_classes, ks, temperature):
            predictions[k].append(voted)
    none = labels.new_empty(0)
    return {k: torch.cat(slices) if slices else none for k, slices in predictions.items()}


def _search(train_features: Tensor, test_features: Tensor, k: int) -> Iterator[Neighbours]:
    """The neighbours of one slice of the test features after the other."""
    dtype = _precision(train_features, test_features)
    num_columns = min(len(train_features), max(NUM_TRAIN_ROWS_PER_SLICE, k))
    num_rows = max(1, MAX_SIMILARITIES_IN_MEMORY // num_columns)
    for test_rows in test_features.split(num_rows):
        if not len(test_rows):
            return
        test = F.normalize(test_rows.to(dtype), dim=1)
        best: Neighbours | None = None
        for start in range(0, len(train_features), num_columns):
            rows = train_features[start : start + num_columns]
            train = F.normalize(rows.to(test.device, dtype), dim=1)
            found = _largest(test @ train.T, k)
            found = Neighbours(found.similarities, found.indices + start)
            best = found if best is None else _merge(best, found, k)
        assert best is not None  # k >= 1, so there is a training feature
        yield best


def _largest(similarities: Tensor, k: int) -> Neighbours:
    """The k largest of each row, descending; of equals the lowest columns, which `topk` does not promise."""
    num_columns = similarities.shape[1]
    k = min(k, num_columns)
    values, columns = similarities.topk(min(k + 1, num_columns), dim=1)
    tied = (values[:, k - 1] == values[:, -1]).nonzero().flatten() if k < num_columns else None
    columns = columns[:, :k].sort(dim=1).values
    values, order = similarities.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if tied is not None and len(tied):  # the k-th place goes to one of several equals
        sorted_rows = similarities[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = sorted_rows.values[:, :k], sorted_rows.indices[:, :k]
    return Neighbours(values, columns)


def _merge(best: Neighbours, found: Neighbours, k: int) -> Neighbours:
    """The k best of both; the sort is stable, so the rows of `best`, all lower, stay before their equals."""
    similarities = torch.cat([best.similarities, found.similarities], dim=1)
    indices = torch.cat([best.indices, found.indices], dim=1)
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return Neighbours(similarities[:, :k], indices.gather(1, order[:, :k]))


def _vote(
    neighbours: Neighbours, labels: Tensor, num_classes: int, ks: Sequence[int], temperature: float
) -> Iterator[tuple[int, Tensor]]:
    similarities, voters = neighbours.similarities, labels[neighbours.indices]  # [M', k]
    # The largest similarity is taken off first: the argmax stays, and a small temperature cannot overflow.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    scores = weights.new_zeros(len(weights), num_classes)
    # One neighbour at a time: no two votes meet in one cell, so the sum has one order on every device.
    for number in range(1, max(ks) + 1):
        scores.scatter_add_(1, voters[:, number - 1 : number], weights[:, number - 1 : number])
        if number in ks:
            yield number, scores.argmax(dim=1)


def _precision(*features: Tensor) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in features) else torch.float32


def _check_features(train_features: Tensor, test_features: Tensor, ks: Sequence[int]) -> None:
    check_features("train_features", train_features)
    check_features("test_features", test_features, width=train_features.shape[1])
    if not ks:
        raise ValueError("ks must name at least 1 number of neighbours, got none")
    for k in ks:
        if not 1 <= k <= len(train_features):
            raise ValueError(
                f"k must be in [1, {len(train_features)}] (the number of training features), got {k}"
            )
