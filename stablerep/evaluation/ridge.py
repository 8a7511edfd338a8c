"""A linear classifier in closed form: ridge regression of one-hot labels on standardised features.

With X the standardised features and Y the centred one-hot labels of n images,

    W(λ) = (XᵀX / n + λ I)⁻¹ XᵀY / n,        prediction = argmax_c (x W)_c + mean of Y_c.

One eigendecomposition XᵀX / n = Q diag(e) Qᵀ serves every λ. λ is chosen on a held-out fifth of the training
images, never on the test images; then W is fitted to all.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

PENALTIES = tuple(float(value) for value in np.logspace(-5, 2, 15))
_EPSILON = 1e-6
_HELD_OUT = 5


class RidgeResult(NamedTuple):
    """What `ridge_classify` returns: the predicted classes [M], and λ."""

    predictions: Tensor
    penalty: float


def ridge_classify(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, num_classes: int, seed: int = 0
) -> RidgeResult:
    """argmax of the ridge regression above, in float64.

    Args:
        train_features: The labelled features.
        train_labels: Class indices of ``train_features``, in [0, num_classes).
        test_features: The features to classify.
        num_classes: Number of classes, at least 1.
        seed: Seed of which images are held out, >= 0.

    Shapes:
        train_features [N, D], train_labels [N], test_features [M, D] -> [M] int64

    Raises:
        ValueError: If there are fewer than five labelled features, or the shapes do not match.
    """
    if train_features.ndim != 2 or train_labels.shape != train_features.shape[:1]:
        raise ValueError(
            f"train_features must be [N, D] and train_labels [N], got {list(train_features.shape)} and "
            f"{list(train_labels.shape)}"
        )
    if (num_train := len(train_features)) < _HELD_OUT:
        raise ValueError(f"train_features must be >= {_HELD_OUT}, got {num_train}")
    x, y = train_features.double(), one_hot(train_labels.long(), num_classes).double()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_train)).to(x.device)
    held_out, fitted = order[: num_train // _HELD_OUT], order[num_train // _HELD_OUT :]
    scores = _fit_and_score(x[fitted], y[fitted], x[held_out], PENALTIES)
    hits = (scores.argmax(dim=2) == train_labels[held_out]).sum(dim=1)
    penalty = max(zip(hits.tolist(), PENALTIES, strict=True))[1]  # of equals the largest
    return RidgeResult(_fit_and_score(x, y, test_features.double(), (penalty,))[0].argmax(dim=1), penalty)


def _fit_and_score(x: Tensor, y: Tensor, test: Tensor, penalties: tuple[float, ...]) -> Tensor:
    """Scores of each test feature under each λ, [λ, M, C]."""
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0) + _EPSILON
    x, test = (x - mean) / std, (test - mean) / std
    offset = y.mean(dim=0)
    e, q = torch.linalg.eigh(x.T @ x / len(x))
    projected, target = test @ q, q.T @ (x.T @ (y - offset)) / len(x)  # [M, D], [D, C]
    return torch.stack([projected @ (target / (e.clamp(min=0) + p)[:, None]) for p in penalties]) + offset
