"""A linear classifier in closed form: ridge regression of one-hot labels on standardised features.

With X the standardised features and Y the centred one-hot labels of n images,

    W(λ) = (XᵀX / n + λ I)⁻¹ XᵀY / n,        prediction = argmax_c (x W)_c + mean of Y_c.

One eigendecomposition XᵀX / n = Q diag(e) Qᵀ serves every λ. scikit-learn's `Ridge` has the same W at
alpha = n λ. λ is chosen on a validation split, or without one on a held-out fifth of the training images,
never on the test images; then W is fitted to all labelled images.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

PENALTIES = tuple(float(value) for value in np.logspace(-5, 2, 15))
_EPSILON = 1e-6
_HELD_OUT = 5


class RidgeResult(NamedTuple):
    """What `ridge_classify` returns.

    Args:
        predictions: Predicted classes of the test features.
        penalty: The chosen λ.
        scores: Outputs of the regression for the test features, float64.
        validation_accuracies: Accuracy of each of `PENALTIES` on the images that the choice was made on.
        selection: Which images those were.

    Shapes:
        predictions [M] int64, scores [M, C].
    """

    predictions: Tensor
    penalty: float
    scores: Tensor
    validation_accuracies: tuple[float, ...]
    selection: Literal["validation", "held-out part of train"]


def ridge_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> RidgeResult:
    """argmax of the ridge regression above, in float64; of λ with the same accuracy the largest is chosen.

    Args:
        train_features: The labelled features.
        train_labels: Class indices of ``train_features``, in [0, num_classes).
        test_features: The features to classify.
        num_classes: Number of classes, at least 1.
        validation: Features and class indices on which λ is chosen; W is then fitted to these and the
            training features together. If not given, λ is chosen on a fifth of the training features.
        seed: Seed of which images are held out, >= 0.

    Shapes:
        train_features [N, D], train_labels [N], test_features [M, D], validation [V, D] and [V].

    Raises:
        ValueError: If there are fewer than five labelled features, the validation split is empty, a label is
            out of bounds, or the shapes do not match.
    """
    _check_labelled("train", train_features, train_labels, num_classes, at_least=_HELD_OUT)
    if test_features.ndim != 2 or test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test_features must be [M, {train_features.shape[1]}], got {list(test_features.shape)}"
        )
    device = train_features.device
    features, labels = train_features, train_labels
    if validation is None:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels))).to(device)
        chosen_on, fitted = order[: len(labels) // _HELD_OUT], order[len(labels) // _HELD_OUT :]
    else:
        _check_labelled("validation", *validation, num_classes, at_least=1)
        if validation[0].shape[1] != features.shape[1]:
            raise ValueError(
                f"validation_features must be [V, {features.shape[1]}], got {list(validation[0].shape)}"
            )
        features = torch.cat([features, validation[0].to(device)])
        labels = torch.cat([labels, validation[1].to(device)])
        rows = torch.arange(len(labels), device=device)
        chosen_on, fitted = rows[len(train_labels) :], rows[: len(train_labels)]
    x, y = features.double(), one_hot(labels.long(), num_classes).double()
    scores = _fit_and_score(x[fitted], y[fitted], x[chosen_on], PENALTIES)
    hits = (scores.argmax(dim=2) == labels[chosen_on]).sum(dim=1).tolist()
    penalty = max(zip(hits, PENALTIES, strict=True))[1]  # of equals the largest
    scores = _fit_and_score(x, y, test_features.to(device).double(), (penalty,))[0]
    return RidgeResult(
        predictions=scores.argmax(dim=1),
        penalty=penalty,
        scores=scores,
        validation_accuracies=tuple(num_correct / len(chosen_on) for num_correct in hits),
        selection="held-out part of train" if validation is None else "validation",
    )


def _fit_and_score(x: Tensor, y: Tensor, test: Tensor, penalties: tuple[float, ...]) -> Tensor:
    """Scores of each test feature under each λ, [λ, M, C]."""
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0) + _EPSILON
    x, test = (x - mean) / std, (test - mean) / std
    offset = y.mean(dim=0)
    e, q = torch.linalg.eigh(x.T @ x / len(x))
    projected, target = test @ q, q.T @ (x.T @ (y - offset)) / len(x)  # [M, D], [D, C]
    return torch.stack([projected @ (target / (e.clamp(min=0) + p)[:, None]) for p in penalties]) + offset


def _check_labelled(split: str, features: Tensor, labels: Tensor, num_classes: int, at_least: int) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{split}_features must be [N, D] and {split}_labels [N], got {list(features.shape)} and "
            f"{list(labels.shape)}"
        )
    if len(features) < at_least:
        raise ValueError(f"{split}_features must be >= {at_least}, got {len(features)}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"{split}_labels must be in [0, {num_classes}), got {lowest} to {highest}")
