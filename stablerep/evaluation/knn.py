"""Weighted k-nearest-neighbour classification of frozen features.

For a test feature x with the k most similar training features N(x), by cosine similarity s,

    score(c) = Σ_{i ∈ N(x), y_i = c} exp(s_i / T),        prediction = argmax_c score(c).

Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018),
section 3.4; the same vote is used by DINO and its successors with k = 20, T = 0.07.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SIMILARITIES_IN_MEMORY = 2**25  # 128 MiB of float32 similarities at a time


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """argmax_c Σ_{i ∈ kNN, y_i = c} exp(cos(x, x_i) / T), computed in float32 (float64 for float64 features).

    The test set is taken in slices, so that the full matrix of similarities is never held.

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
        ValueError: If k, the temperature, the labels or the shapes are out of their bounds.

    Reference:
        Wu et al., CVPR 2018, section 3.4.
    """
    _check_arguments(train_features, train_labels, test_features, num_classes, k, temperature)
    train = _normalize(train_features)
    num_rows_per_slice = max(1, MAX_SIMILARITIES_IN_MEMORY // len(train))
    predictions = [
        _vote(train, train_labels.long(), _normalize(rows), num_classes, k, temperature)
        for rows in test_features.split(num_rows_per_slice)
        if len(rows)
    ]
    return torch.cat(predictions) if predictions else train_labels.new_empty(0, dtype=torch.int64)


def _vote(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    similarities, neighbours = (test @ train.T).topk(k, dim=1)  # [M', k]
    # The largest similarity is taken off first: the argmax stays, and a small temperature cannot overflow.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    scores = weights.new_zeros(len(test), num_classes)
    scores.scatter_add_(1, labels[neighbours], weights)
    return scores.argmax(dim=1)


def _normalize(features: Tensor) -> Tensor:
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


def _check_arguments(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
) -> None:
    if (
        train_features.ndim != 2
        or test_features.ndim != 2
        or train_features.shape[1] != test_features.shape[1]
    ):
        raise ValueError(
            "train_features and test_features must be [N, D] and [M, D], got "
            f"{list(train_features.shape)} and {list(test_features.shape)}"
        )
    if train_labels.shape != train_features.shape[:1]:
        raise ValueError(f"train_labels must be [{len(train_features)}], got {list(train_labels.shape)}")
    if not 1 <= k <= len(train_features):
        raise ValueError(
            f"k must be in [1, {len(train_features)}] (the number of training features), got {k}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    lowest, highest = int(train_labels.min()), int(train_labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"train_labels must be in [0, {num_classes}), got {lowest} to {highest}")
