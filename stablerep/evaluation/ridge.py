"""A linear classifier in closed form: ridge regression of one-hot labels on standardised features.

With X the standardised features and Y the centred one-hot labels of n images,

    W(λ) = (XᵀX / n + λ I)⁻¹ XᵀY / n,        prediction = argmax_c (x W)_c + mean of Y_c.

XᵀY are the sums of X over the images of each class, less n times the mean of Y: X is centred, so no Y is ever
made. One eigendecomposition XᵀX / n = Q diag(e) Qᵀ serves every λ. scikit-learn's `Ridge` has the same W at
alpha = n λ. λ is chosen on a validation split, or without one on about a fifth of the training images,
held out, never on the test images; then W is fitted to all labelled images.

Memory, beside the features as they are given and a copy of them in their own type: a few arrays [D, D] and
[D, C] of float64 and slices of 64 MiB; the scores [M, C] of the test features.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stablerep.evaluation.holdout import SplitBy, hold_out
from stablerep.evaluation.inputs import check_features, check_labels

PENALTIES = tuple(float(value) for value in np.logspace(-5, 2, 15))
HELDOUT_FRACTION = 0.2
MAX_VALUES_PER_SLICE = 2**23  # 64 MiB of float64
_EPSILON = 1e-6
_LEAST_IMAGES = 5


class RidgeResult(NamedTuple):
    """What `ridge_classify` returns.

    Args:
        predictions: Predicted classes of the test features.
        penalty: The chosen λ.
        scores: Outputs of the regression for the test features, float64.
        validation_accuracies: Accuracy of each of `PENALTIES` on the images that the choice was made on.
        selection: Which images those were.
        split_by: What stayed whole when they were held out of train; None with a validation split.

    Shapes:
        predictions [M] int64, scores [M, C].
    """

    predictions: Tensor
    penalty: float
    scores: Tensor
    validation_accuracies: tuple[float, ...]
    selection: Literal["validation", "held-out part of train"]
    split_by: SplitBy | None


def ridge_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    validation: tuple[Tensor, Tensor] | None = None,
    groups: Tensor | None = None,
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
        groups: Numbers of the training images' captions, as `hold_out` takes them. None holds out image
            by image.
        seed: Seed of which images are held out, >= 0.

    Shapes:
        train_features [N, D], train_labels, groups [N], test_features [M, D], validation [V, D] and [V].

    Raises:
        ValueError: If there are fewer than five labelled features, the validation split is empty, a label is
            out of bounds, a feature is not finite, the shapes do not match, or nothing can be held out and
            there is no validation split.
    """
    width = train_features.shape[-1]
    check_features("train_features", train_features, at_least=_LEAST_IMAGES)
    check_labels("train_labels", train_labels, len(train_features), num_classes)
    check_features("test_features", test_features, width=width)
    device = train_features.device
    features, labels = train_features, train_labels.long()
    if validation is None:
        fitted, held_out, split_by = hold_out(labels, groups, fraction=HELDOUT_FRACTION, seed=seed)
        fitted, held_out = fitted.to(device), held_out.to(device)
        regression = _Regression(features[fitted], labels[fitted], num_classes)
        chosen_on = features[held_out], labels[held_out]
    else:
        split_by = None
        check_features("validation_features", validation[0], width=width, at_least=1)
        check_labels("validation_labels", validation[1], len(validation[0]), num_classes)
        chosen_on = validation[0].to(device), validation[1].to(device).long()
        regression = _Regression(features, labels, num_classes)
        features, labels = torch.cat([features, chosen_on[0]]), torch.cat([labels, chosen_on[1]])
    accuracies = [
        float((regression.predict(chosen_on[0], p) == chosen_on[1]).double().mean()) for p in PENALTIES
    ]
    penalty = max(zip(accuracies, PENALTIES, strict=True))[1]  # of equals the largest
    regression = _Regression(features, labels, num_classes)
    scores = torch.cat(list(regression.score(test_features.to(device), penalty)))
    return RidgeResult(
        predictions=scores.argmax(dim=1),
        penalty=penalty,
        scores=scores,
        validation_accuracies=tuple(accuracies),
        selection="held-out part of train" if validation is None else "validation",
        split_by=split_by,
    )


class _Regression:
    """The regression of some images for every λ."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        num_images, width = features.shape
        self.num_rows = max(1, MAX_VALUES_PER_SLICE // max(width, num_classes))
        slices = features.split(self.num_rows)
        self.mean = torch.stack([x.double().sum(dim=0) for x in slices]).sum(dim=0) / num_images
        squares = torch.stack([(x.double() - self.mean).square_().sum(dim=0) for x in slices]).sum(dim=0)
        self.std = (squares / num_images).sqrt() + _EPSILON
        products, sums = self.mean.new_zeros(width, width), self.mean.new_zeros(num_classes, width)
        for own, x in zip(labels.split(self.num_rows), self._standardise(features), strict=True):
            products.addmm_(x.T, x)
            sums.index_add_(0, own, x)
        self.offset = labels.bincount(minlength=num_classes).double() / num_images
        self.eigenvalues, self.basis = torch.linalg.eigh(products / num_images)
        self.eigenvalues.clamp_(min=0)
        self.target = self.basis.T @ sums.T / num_images  # [D, C]

    def _standardise(self, features: Tensor) -> Iterator[Tensor]:
        return ((x.double() - self.mean).div_(self.std) for x in features.split(self.num_rows))

    def score(self, features: Tensor, penalty: float) -> Iterator[Tensor]:
        """Outputs [m, C] of slices of the features [M, D]."""
        weight = self.basis @ (self.target / (self.eigenvalues + penalty)[:, None])
        return (x @ weight + self.offset for x in self._standardise(features))

    def predict(self, features: Tensor, penalty: float) -> Tensor:
        """Predicted classes [M]."""
        return torch.cat([scores.argmax(dim=1) for scores in self.score(features, penalty)])
