"""Logistic regression of frozen features: of 45 penalties one is chosen on a validation split, then a refit.

With x_i the standardised features of n images and a_i = x_i W + b, one class an image y_i:

    f(W, b) = 1/n Σ_i [logsumexp_c a_ic − a_{i y_i}] + λ/2 ‖W‖²,

and several labels an image, Y_ic in {0, 1}, n_c images that count for class c:

    f(W, b) = Σ_c [1/n_c Σ_i (log(1 + exp a_ic) − Y_ic a_ic) + λ/2 ‖W_c‖²].

The penalty convention: the mean of the losses, half the squared norm, the bias not penalised. The minimum of
scikit-learn's `LogisticRegression(C=...)` is the same at

    C = 1 / (n λ)     three or more classes,
    C = 2 / (n λ)     two classes, for which it fits one vector, the difference of our two,
    C = 1 / (n_c λ)   one of several labels.

The method is L-BFGS in float64, of many λ at once: their weights lie side by side, so that an iteration is
two large products for all of them. The features are turned into the eigenvectors Q of their covariance
Q diag(e) Qᵀ first, which leaves ‖W‖ as it is; there the second derivative is nearly diagonal, about
e_j · mean p(1 − p) + λ, and that is where L-BFGS starts. With fewer images than features, only the
eigenvectors in the span of the images are kept: the minimum lies there.

Memory, beside the features as they are given: the turned ones in float64, 8 n (D + 1) bytes; a copy, in their
own type, of those that are fitted, until they are turned; the arrays of L-BFGS, 32 of (D + 1) C float64 for
each λ at once (as many λ as fit into 4 GiB, at most 9, at least 1); the weights of the 45 fits; slices of the
images of 64 MiB, of which a few are alive; with several labels an image, the held-out logits of each λ. No
other array of images × classes is held. With 1.28 million images of one class each, D = 1024 and C = 1000
that is 10.5 + 5.2 (at other times than L-BFGS) + 2.4 + 0.4 GB.

Reference: Tian et al., SynCLR, arXiv 2312.17742, appendix (L-BFGS, 45 λ in logspace(−6, 5), refit on train
and validation).
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stablerep.evaluation.holdout import HeldOut, SplitBy, hold_out
from stablerep.evaluation.inputs import check_features, check_labels
from stablerep.evaluation.lbfgs import NUM_ARRAYS_IN_MEMORY, Evaluation, Minimum, minimise
from stablerep.evaluation.metrics import accuracy, mean_average_precision, mean_per_class_accuracy

PENALTIES = tuple(float(value) for value in np.logspace(-6, 5, 45))
TOLERANCE = 1e-5
MAX_ITERATIONS = 5000
NUM_PENALTIES_AT_ONCE = 9
MAX_WEIGHTS_IN_MEMORY = 2**29  # 4 GiB of float64 in the arrays of L-BFGS
MAX_VALUES_PER_SLICE = 2**23  # 64 MiB of float64

Selection = Literal["validation", "held-out part of train"]
Metric = Literal["accuracy", "mean_per_class_accuracy", "map11"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogisticRegressionResult:
    """Predictions at the chosen penalty, and how it was chosen.

    Args:
        predictions: Predicted class of each test image; with several labels, whether each is more likely
            than not.
        logits: Logits of the test images, float64; −inf for a class without a training image.
        penalty: The chosen λ.
        selection: The images on which it was chosen.
        split_by: What stayed whole when they were held out of train; None with a validation split.
        metric: The score by which it was chosen; of λ with the same score the largest.
        penalties: The grid, ascending.
        validation_scores: The score of each λ of the grid, fractions.
        converged: Whether the fit at each λ of the grid reached the tolerance.
        num_iterations: Iterations of each of these fits.
        refit_converged: Whether the refit at the chosen λ reached the tolerance.
        refit_num_iterations: Its iterations.
        warnings: What a reader of the score should know: a choice at the edge of the grid, a fit that did
            not converge.

    Shapes:
        predictions [M] int64 (several labels: [M, C] bool), logits [M, C].
    """

    predictions: Tensor
    logits: Tensor
    penalty: float
    selection: Selection
    split_by: SplitBy | None
    metric: Metric
    penalties: tuple[float, ...]
    validation_scores: tuple[float, ...]
    converged: tuple[bool, ...]
    num_iterations: tuple[int, ...]
    refit_converged: bool
    refit_num_iterations: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Examples:
    """Features [N, D], labels [N] or [N, C], and for several labels the entries [N, C] that count."""

    features: Tensor
    labels: Tensor
    counted: Tensor | None = None

    def rows(self, rows: Tensor) -> "_Examples":
        counted = None if self.counted is None else self.counted[rows]
        return _Examples(self.features[rows], self.labels[rows], counted)

    def joined(self, other: "_Examples") -> "_Examples":
        counted = None
        if self.counted is not None and other.counted is not None:
            counted = torch.cat([self.counted, other.counted])
        features = torch.cat([self.features, other.features])
        return _Examples(features, torch.cat([self.labels, other.labels]), counted)


def logistic_regression(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    validation: tuple[Tensor, Tensor] | None = None,
    metric: Literal["accuracy", "mean_per_class_accuracy"] = "accuracy",
    penalties: Sequence[float] = PENALTIES,
    groups: Tensor | None = None,
    heldout_fraction: float = 0.2,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LogisticRegressionResult:
    """Multinomial logistic regression as in the module, with one class an image.

    A feature is standardised by the mean and the deviation over the images of the fit, those of the refit
    over its own; a feature without variance is only centred.

    Args:
        train_features: The labelled features; everything is computed on their device.
        train_labels: Class indices of ``train_features``, in [0, num_classes).
        test_features: The features to classify.
        num_classes: C, at least 2.
        validation: Features and class indices on which λ is chosen; the refit takes them in. If not given,
            λ is chosen on a held-out part of train, and the refit is on all of train.
        metric: The score by which λ is chosen.
        penalties: The grid of λ, each > 0.
        groups: Numbers of the training images' captions, as `hold_out` takes them. None holds out image
            by image.
        heldout_fraction: `hold_out`'s share of each class if there is no validation split, in (0, 1).
        seed: Seed of what is held out.
        tolerance: Converged is a fit whose gradient has, for each class, at most this 2-norm; none of its
            entries is then larger, which is scikit-learn's criterion `tol`.
        max_iterations: Iterations of L-BFGS after which a fit is given up, at least 1.

    Shapes:
        train_features [N, D], train_labels, groups [N], test_features [M, D], validation [V, D] and [V].

    Raises:
        ValueError: If an argument is out of its bounds, the shapes do not match, a feature is not finite,
            train shows fewer than 2 classes, or nothing can be held out and there is no validation split.

    Reference:
        Tian et al., SynCLR, arXiv 2312.17742, appendix; Kornblith et al., "Do better ImageNet models transfer
        better?", CVPR 2019.
    """
    _check_settings(penalties, tolerance, max_iterations)
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    _check_features(train_features, test_features, validation)
    check_labels("train_labels", train_labels, len(train_features), num_classes)
    device = train_features.device
    train = _Examples(train_features, train_labels.to(device).long())
    if (num_present := len(train.labels.unique())) < 2:
        raise ValueError(f"train_labels must have at least 2 classes, got {num_present}")
    held_out = None
    if validation is not None:
        check_labels("validation_labels", validation[1], len(validation[0]), num_classes)
        held_out = _Examples(validation[0].to(device), validation[1].to(device).long())

    def split() -> HeldOut:
        return hold_out(train.labels, groups, fraction=heldout_fraction, seed=seed)

    def score(predictions: Tensor, examples: _Examples) -> float:
        function = accuracy if metric == "accuracy" else mean_per_class_accuracy
        return function(predictions, examples.labels)

    def build(examples: _Examples) -> _Softmax:
        return _Softmax(examples.labels, num_classes)

    protocol = _Protocol(metric, split, lambda logits: logits.argmax(dim=1), score, build)
    return _choose_and_refit(
        train, held_out, test_features.to(device), protocol, penalties, tolerance, max_iterations
    )


def multilabel_logistic_regression(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    train_ignored: Tensor | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    validation_ignored: Tensor | None = None,
    penalties: Sequence[float] = PENALTIES,
    groups: Tensor | None = None,
    heldout_fraction: float = 0.2,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LogisticRegressionResult:
    """Logistic regression as in the module, with several labels an image: one against the rest for each.

    One λ serves all classes: that of the highest mean average precision (VOC 2007, 11 points). Ignored
    entries count neither in the fit nor in the choice, as the "difficult" ones of VOC.

    Args:
        train_features: The labelled features; everything is computed on their device.
        train_labels: Whether each image shows each class.
        test_features: The features to score.
        train_ignored: Entries of ``train_labels`` to ignore; none if not given.
        validation: Features and labels on which λ is chosen; the refit takes them in. If not given, λ is
            chosen on a held-out part of train, about the same share of the images of each rarest label; the
            refit is on all of train.
        validation_ignored: Entries of the validation labels to ignore; none if not given.
        penalties: The grid of λ, each > 0.
        groups: As for `logistic_regression`.
        heldout_fraction: As for `logistic_regression`.
        seed: Seed of what is held out.
        tolerance: Converged is a fit whose gradient has, for each class, at most this 2-norm.
        max_iterations: Iterations of L-BFGS after which a fit is given up, at least 1.

    Shapes:
        train_features [N, D], train_labels [N, C] bool, groups [N], test_features [M, D], train_ignored
        [N, C] bool, validation [V, D] and [V, C] bool, validation_ignored [V, C] bool.

    Raises:
        ValueError: If an argument is out of its bounds, the shapes do not match, a feature is not finite, or
            a class has no entry that counts in train, or nothing can be held out and there is no validation
            split.

    Reference:
        Everingham et al., IJCV 2010, section 4.2; Kornblith et al., CVPR 2019.
    """
    _check_settings(penalties, tolerance, max_iterations)
    _check_features(train_features, test_features, validation)
    device = train_features.device
    train = _read_labels("train", train_features, train_labels, train_ignored, device)
    held_out = None
    if validation is not None:
        held_out = _read_labels("validation", *validation, validation_ignored, device)
        if held_out.labels.shape[1] != train.labels.shape[1]:
            raise ValueError(
                f"validation_labels must be [V, {train.labels.shape[1]}], got {list(validation[1].shape)}"
            )

    def split() -> HeldOut:
        assert train.counted is not None
        return hold_out(train.labels & train.counted, groups, fraction=heldout_fraction, seed=seed)

    def score(logits: Tensor, examples: _Examples) -> float:
        assert examples.counted is not None
        return mean_average_precision(logits, examples.labels, ~examples.counted)

    def build(examples: _Examples) -> _Sigmoid:
        assert examples.counted is not None
        return _Sigmoid(examples.labels, examples.counted)

    protocol = _Protocol("map11", split, lambda logits: logits, score, build)
    return _choose_and_refit(
        train, held_out, test_features.to(device), protocol, penalties, tolerance, max_iterations
    )


@dataclass(frozen=True)
class _Protocol:
    """What tells one class an image from several labels.

    Args:
        metric: The score.
        split: The part of train to hold out.
        decide: What the score looks at, from logits [M, C].
        score: The score of that.
        build: The loss of images.
    """

    metric: Metric
    split: Callable[[], HeldOut]
    decide: Callable[[Tensor], Tensor]
    score: Callable[[Tensor, _Examples], float]
    build: Callable[[_Examples], "_Loss"]


def _choose_and_refit(
    train: _Examples,
    held_out: _Examples | None,
    test_features: Tensor,
    protocol: _Protocol,
    penalties: Sequence[float],
    tolerance: float,
    max_iterations: int,
) -> LogisticRegressionResult:
    grid = sorted(penalties)
    split = None
    if held_out is None:
        split = protocol.split()
        held_out = train.rows(split.held_out)

    def pose(values: Sequence[float], *, refit: bool) -> _Problem:
        """A function, so that a copy of the features lives no longer than its call."""
        if split is not None:
            examples = train if refit else train.rows(split.fitted)
        else:
            examples = train.joined(held_out) if refit else train
        return _Problem(_Space(examples.features), protocol.build(examples), values)

    problem = pose(grid[::-1], refit=False)
    fits = _fit_grid(problem, tolerance, max_iterations)[::-1]
    weights = [fit.weight for fit in fits]
    decisions = list(zip(*problem.predict(held_out.features, weights, protocol.decide), strict=True))
    scores = tuple(protocol.score(torch.cat(parts), held_out) for parts in decisions)
    best = max(range(len(grid)), key=lambda index: (scores[index], index))

    del problem, weights, decisions
    problem = pose([grid[best]], refit=True)
    (refit,) = _fit_grid(problem, tolerance, max_iterations)
    logits = torch.cat([part for (part,) in problem.predict(test_features, [refit.weight])])
    warnings = _find_warnings(grid, best, fits[best].converged, refit.converged, max_iterations)
    for warning in warnings:
        logger.warning("logistic regression: %s", warning)
    several = train.labels.ndim == 2
    return LogisticRegressionResult(
        predictions=logits > 0 if several else logits.argmax(dim=1),
        logits=logits,
        penalty=grid[best],
        selection="validation" if split is None else "held-out part of train",
        split_by=None if split is None else split.split_by,
        metric=protocol.metric,
        penalties=tuple(grid),
        validation_scores=scores,
        converged=tuple(fit.converged for fit in fits),
        num_iterations=tuple(fit.num_iterations for fit in fits),
        refit_converged=refit.converged,
        refit_num_iterations=refit.num_iterations,
        warnings=warnings,
    )


def _fit_grid(problem: "_Problem", tolerance: float, max_iterations: int) -> list[Minimum]:
    """The fits at the problem's penalties; each batch of them starts from the last of the one before."""
    fits: list[Minimum] = []
    guess = problem.first_guess()
    numbers = torch.arange(len(problem.penalties), device=guess.device)
    num_at_once = MAX_WEIGHTS_IN_MEMORY // (NUM_ARRAYS_IN_MEMORY * guess.numel())
    with tqdm(total=len(numbers), desc="logistic regression", unit=" λ", leave=False) as progress:
        for some in numbers.split(max(1, min(NUM_PENALTIES_AT_ONCE, num_at_once))):
            fits += minimise(problem, guess, some, tolerance=tolerance, max_iterations=max_iterations)
            guess = fits[-1].weight
            progress.update(len(some))
    return fits


def _find_warnings(
    grid: list[float], best: int, converged: bool, refit_converged: bool, max_iterations: int
) -> tuple[str, ...]:
    warnings = []
    if len(grid) > 1 and best in (0, len(grid) - 1):
        warnings.append(
            f"the chosen penalty {grid[best]:g} lies at the edge of the grid [{grid[0]:g}, {grid[-1]:g}]: "
            "the best may lie outside"
        )
    if not converged:
        warnings.append(f"the fit at the chosen penalty did not converge in {max_iterations} iterations")
    if not refit_converged:
        warnings.append(f"the refit did not converge in {max_iterations} iterations")
    return tuple(warnings)


class _Space:
    """Standardisation, and the turn into the eigenvectors of the covariance, by one set of images.

    Args:
        features: The images' features.

    Shapes:
        features [N, D]; z [N, R + 1], the last column the bias's ones; variances [R + 1], the mean squares of
        the columns.
    """

    def __init__(self, features: Tensor) -> None:
        num_images, num_features = features.shape
        self.mean = _sum(x.sum(dim=0) for x in _to_float64(features)) / num_images
        squares = _sum((x - self.mean).square_().sum(dim=0) for x in _to_float64(features))
        deviation = (squares / num_images).sqrt()
        # Of a constant feature the computed deviation may be a rounding error and not 0.
        constant = features.amin(dim=0) == features.amax(dim=0)
        self.scale = deviation.masked_fill(constant, 1.0)
        if num_features <= num_images:
            standardised = map(self._standardise, _to_float64(features))
            _, self.basis = torch.linalg.eigh(_sum(x.T @ x for x in standardised))
        else:
            x = self._standardise(features.double())
            values, left = torch.linalg.eigh(x @ x.T)
            # Below this an eigenvalue is rounding: centring alone makes one of them 0.
            kept = values > num_images * torch.finfo(torch.float64).eps * values[-1]
            self.basis = x.T @ (left[:, kept] / values[kept].sqrt())
        self.z = self.transform(features)
        self.variances = _sum(z.square().sum(dim=0) for z in _slices(self.z)) / num_images

    def transform(self, features: Tensor) -> Tensor:
        """Coordinates [M, R + 1] of images."""
        z = self.mean.new_ones(len(features), self.basis.shape[1] + 1)
        for part, x in zip(_slices(z, features.shape[1]), _to_float64(features), strict=True):
            part[:, :-1] = self._standardise(x) @ self.basis
        return z

    def _standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean).div_(self.scale)


def _slices(x: Tensor, num_values_per_row: int | None = None) -> tuple[Tensor, ...]:
    """Rows of x in slices of a bounded number of values; of its own unless given."""
    width = x.shape[1] if num_values_per_row is None else num_values_per_row
    return x.split(max(1, MAX_VALUES_PER_SLICE // max(1, width)))


def _to_float64(features: Tensor) -> Iterator[Tensor]:
    return (part.double() for part in _slices(features))


def _sum(parts: Iterator[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


class _Loss(Protocol):
    """The part of f that depends on the logits, for G penalties at once, a slice of the images at a time.

    Args:
        num_classes: C of the predictions.
        first_bias: Bias without features, or near it.
        has_independent_columns: Whether each class is a problem of its own.

    Shapes:
        first_bias [C'], of the classes that are fitted.
    """

    num_classes: int
    first_bias: Tensor
    has_independent_columns: ClassVar[bool]

    def __call__(
        self, logits: Tensor, rows: slice, *, with_curvature: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of logits [n, G, C'], which it may overwrite, of the images `rows`.

        Returns:
            The part of f, [1, G, 1] (independent classes: [1, G, C']); its derivative by the logits,
            [n, G, C']; the sum over the images of the second ones by the logits of each class, [1, G, C'].
        """

    def spread(self, logits: Tensor) -> Tensor:
        """Logits [M, C'] of the fitted classes as logits [M, C] of all."""


class _Softmax:
    has_independent_columns: ClassVar[bool] = False

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classes, self.labels = labels.unique(return_inverse=True)  # the bias of any other is −inf
        self.first_bias = (self.labels.bincount().double() / len(labels)).log()

    def __call__(
        self, logits: Tensor, rows: slice, *, with_curvature: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_images = len(self.labels)
        own = self.labels[rows, None, None].expand(-1, logits.shape[1], 1)
        logits -= logits.amax(dim=2, keepdim=True)
        shifted = logits.gather(2, own)
        exponentials = logits.exp_()
        sums = exponentials.sum(dim=2, keepdim=True)
        value = (sums.log() - shifted).sum(dim=0, keepdim=True) / num_images
        probabilities = exponentials.div_(sums)
        curvature = None
        if with_curvature:
            curvature = (probabilities.sum(dim=0) - probabilities.square().sum(dim=0))[None] / num_images
        error = probabilities.scatter_add_(2, own, probabilities.new_full((1, 1, 1), -1.0).expand_as(own))
        return value, error.div_(num_images), curvature

    def spread(self, logits: Tensor) -> Tensor:
        everything = logits.new_full((len(logits), self.num_classes), -math.inf)
        everything[:, self.classes] = logits
        return everything


class _Sigmoid:
    has_independent_columns: ClassVar[bool] = True

    def __init__(self, labels: Tensor, counted: Tensor) -> None:
        self.num_classes = labels.shape[1]
        self.labels = labels
        self.counted = counted
        self.num_counted = counted.sum(dim=0).clamp(min=1)
        # One image of each kind more than there are: a class that all show, or none, has no finite bias.
        shown = (labels & counted).sum(dim=0) + 1
        self.first_bias = (shown / (counted.sum(dim=0) + 2 - shown)).log().double()

    def __call__(
        self, logits: Tensor, rows: slice, *, with_curvature: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = (self.counted[rows].double() / self.num_counted)[:, None]
        labels = self.labels[rows, None].double()
        losses = F.softplus(logits, threshold=40.0).sub_(labels * logits).mul_(weight)
        probabilities = logits.sigmoid_()
        curvature = None
        if with_curvature:
            curvature = (weight * probabilities * (1 - probabilities)).sum(dim=0, keepdim=True)
        return losses.sum(dim=0, keepdim=True), probabilities.sub_(labels).mul_(weight), curvature

    def spread(self, logits: Tensor) -> Tensor:
        return logits


class _Problem:
    """f of the module at each of the penalties, as `stablerep.evaluation.lbfgs.Functions`."""

    def __init__(self, space: _Space, loss: _Loss, penalties: Sequence[float]) -> None:
        self.space = space
        self.loss = loss
        self.penalties = space.z.new_tensor(penalties)

    @property
    def has_independent_columns(self) -> bool:
        return self.loss.has_independent_columns

    def first_guess(self) -> Tensor:
        """Weights [R + 1, C] of no features."""
        guess = self.space.z.new_zeros(self.space.z.shape[1], len(self.loss.first_bias))
        guess[-1] = self.loss.first_bias
        return guess

    def __call__(self, weight: Tensor, which: Tensor, *, with_diagonal: bool) -> Evaluation:
        """Values, gradients and diagonals; see `stablerep.evaluation.lbfgs.Functions`."""
        penalty = self.penalties[which][:, None]
        gradient = penalty * weight
        gradient[-1] = 0  # the bias
        dims = (0,) if self.has_independent_columns else (0, 2)
        value = (gradient * weight).sum(dim=dims, keepdim=True) / 2
        curvature = torch.zeros_like(weight[:1])
        flat, start = weight.flatten(1), 0
        for z in _slices(self.space.z, flat.shape[1]):
            logits = (z @ flat).unflatten(1, weight.shape[1:])
            rows = slice(start, start + len(z))
            part, derivative, bend = self.loss(logits, rows, with_curvature=with_diagonal)
            value += part
            gradient.flatten(1).addmm_(z.T, derivative.flatten(1))
            if bend is not None:
                curvature += bend
            start += len(z)
        diagonal = None
        if with_diagonal:
            diagonal = self.space.variances[:, None, None] * curvature
            diagonal[:-1] += penalty
        return Evaluation(value, gradient, diagonal)

    def predict(
        self, features: Tensor, weights: Sequence[Tensor], decide: Callable[[Tensor], Tensor] = torch.clone
    ) -> Iterator[list[Tensor]]:
        """What is kept of the logits [n, C] of slices of the images, for each of the weights [R + 1, C]."""
        for part in _slices(features, max(features.shape[1], self.loss.num_classes)):
            z = self.space.transform(part)
            yield [decide(self.loss.spread(z @ weight)) for weight in weights]


def _read_labels(
    split: str, features: Tensor, labels: Tensor, ignored: Tensor | None, device: torch.device
) -> _Examples:
    if labels.ndim != 2 or len(labels) != len(features) or labels.shape[1] == 0:
        raise ValueError(f"{split}_labels must be [{len(features)}, C], got {list(labels.shape)}")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{split}_labels must be 0 or 1, got {int(labels.min())} to {int(labels.max())}")
    if ignored is None:
        ignored = torch.zeros_like(labels, dtype=torch.bool)
    if ignored.shape != labels.shape:
        raise ValueError(f"{split}_ignored must be {list(labels.shape)}, got {list(ignored.shape)}")
    counted = ~ignored.to(device).bool()
    if split == "train" and not counted.any(dim=0).all():
        without = int((~counted.any(dim=0)).nonzero()[0])
        raise ValueError(f"train_ignored must leave an image to each class, got none for class {without}")
    return _Examples(features.to(device), labels.to(device).bool(), counted)


def _check_settings(penalties: Sequence[float], tolerance: float, max_iterations: int) -> None:
    if len(penalties) == 0 or not all(0 < penalty < math.inf for penalty in penalties):
        raise ValueError(f"penalties must all be > 0 and finite, got {list(penalties)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations}")


def _check_features(train: Tensor, test: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
    check_features("train_features", train, at_least=2)
    check_features("test_features", test, width=train.shape[1])
    if validation is not None:
        check_features("validation_features", validation[0], width=train.shape[1], at_least=1)
