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

Reference: Tian et al., SynCLR, arXiv 2312.17742, appendix (L-BFGS, 45 λ in logspace(−6, 5), refit on train
and validation); Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stablerep.evaluation.linear import split_by_class
from stablerep.evaluation.metrics import accuracy, mean_average_precision, mean_per_class_accuracy

PENALTIES = tuple(float(value) for value in np.logspace(-6, 5, 45))
TOLERANCE = 1e-5
MAX_ITERATIONS = 5000
NUM_PENALTIES_AT_ONCE = 9
MAX_LOGITS_IN_MEMORY = 2**24  # 128 MiB of float64 at a time, a few times over
MEMORY = 10
_SUFFICIENT_DECREASE = 1e-4
_ROUNDING = 1e-13
_MAX_STEPS_OF_LINE_SEARCH = 20
_SMALLEST_CURVATURE = 1e-12

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
        heldout_fraction: Share of each class that is held out if there is no validation split, in (0, 1).
        seed: Seed of what is held out.
        tolerance: Converged is a fit whose gradient has, for each class, at most this 2-norm; none of its
            entries is then larger, which is scikit-learn's criterion `tol`.
        max_iterations: Iterations of L-BFGS after which a fit is given up, at least 1.

    Shapes:
        train_features [N, D], train_labels [N], test_features [M, D], validation [V, D] and [V].

    Raises:
        ValueError: If an argument is out of its bounds, the shapes do not match, a feature is not finite,
            train shows fewer than 2 classes, or a class has a single image and there is no validation split.

    Reference:
        Tian et al., SynCLR, arXiv 2312.17742, appendix; Kornblith et al., "Do better ImageNet models transfer
        better?", CVPR 2019.
    """
    _check_settings(penalties, heldout_fraction, tolerance, max_iterations)
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    _check_features(train_features, test_features, validation)
    _check_classes("train", train_labels, len(train_features), num_classes)
    device = train_features.device
    train = _Examples(train_features, train_labels.to(device).long())
    present = train.labels.unique()
    if len(present) < 2:
        raise ValueError(f"train_labels must have at least 2 classes, got {len(present)}")
    held_out = None
    if validation is not None:
        _check_classes("validation", validation[1], len(validation[0]), num_classes)
        held_out = _Examples(validation[0].to(device), validation[1].to(device).long())

    def split() -> tuple[Tensor, Tensor]:
        return split_by_class(train.labels.cpu(), heldout_fraction, seed=seed)

    def score(logits: Tensor, examples: _Examples) -> float:
        function = accuracy if metric == "accuracy" else mean_per_class_accuracy
        return function(logits.argmax(dim=1), examples.labels)

    def build(examples: _Examples) -> _Softmax:
        return _Softmax(examples.labels, num_classes)

    protocol = _Protocol(metric, split, score, build)
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
            chosen on a held-out part of train, the same share of the images of each rarest label, and the
            refit is on all of train.
        validation_ignored: Entries of the validation labels to ignore; none if not given.
        penalties: The grid of λ, each > 0.
        heldout_fraction: Share that is held out if there is no validation split, in (0, 1).
        seed: Seed of what is held out.
        tolerance: Converged is a fit whose gradient has, for each class, at most this 2-norm.
        max_iterations: Iterations of L-BFGS after which a fit is given up, at least 1.

    Shapes:
        train_features [N, D], train_labels [N, C] bool, test_features [M, D], train_ignored [N, C] bool,
        validation [V, D] and [V, C] bool, validation_ignored [V, C] bool.

    Raises:
        ValueError: If an argument is out of its bounds, the shapes do not match, a feature is not finite, or
            a class has no entry that counts in train.

    Reference:
        Everingham et al., IJCV 2010, section 4.2; Kornblith et al., CVPR 2019.
    """
    _check_settings(penalties, heldout_fraction, tolerance, max_iterations)
    _check_features(train_features, test_features, validation)
    train = _read_labels("train", train_features, train_labels, train_ignored, train_features.device)
    held_out = None
    if validation is not None:
        held_out = _read_labels("validation", *validation, validation_ignored, train_features.device)
        if held_out.labels.shape[1] != train.labels.shape[1]:
            raise ValueError(
                f"validation_labels must be [V, {train.labels.shape[1]}], got {list(validation[1].shape)}"
            )

    def split() -> tuple[Tensor, Tensor]:
        assert train.counted is not None
        return _split_by_rarest_label(train.labels & train.counted, heldout_fraction, seed)

    def score(logits: Tensor, examples: _Examples) -> float:
        assert examples.counted is not None
        return mean_average_precision(logits, examples.labels, ~examples.counted)

    def build(examples: _Examples) -> _Sigmoid:
        assert examples.counted is not None
        return _Sigmoid(examples.labels, examples.counted)

    protocol = _Protocol("map11", split, score, build)
    return _choose_and_refit(
        train,
        held_out,
        test_features.to(train_features.device),
        protocol,
        penalties,
        tolerance,
        max_iterations,
    )


@dataclass(frozen=True)
class _Protocol:
    """What tells one class an image from several labels."""

    metric: Metric
    split: Callable[[], tuple[Tensor, Tensor]]
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
    fitted, everything = train, train
    selection: Selection = "validation"
    if held_out is None:
        selection = "held-out part of train"
        rows, held_out_rows = (each.to(train.features.device) for each in protocol.split())
        fitted, held_out = train.rows(rows), train.rows(held_out_rows)
    else:
        everything = train.joined(held_out)

    scores: list[float] = []  # of the largest λ first
    fits: list[_Fit] = []
    space = _Space(fitted.features)
    problem = _Problem(space, protocol.build(fitted))
    held_out_z = space.transform(held_out.features)
    descending = grid[::-1]
    size = problem.num_penalties_at_once()
    with tqdm(total=len(grid), desc="logistic regression", unit=" λ", leave=False) as progress:
        for start in range(0, len(grid), size):
            first_guess = fits[-1].weight if fits else None
            for fit in _minimise(
                problem, descending[start : start + size], first_guess, tolerance, max_iterations
            ):
                fits.append(fit)
                scores.append(protocol.score(problem.logits(held_out_z, fit), held_out))
                progress.update()
    scores, fits = scores[::-1], fits[::-1]
    best = max(range(len(grid)), key=lambda index: (scores[index], index))

    space = _Space(everything.features)
    problem = _Problem(space, protocol.build(everything))
    refit = _minimise(problem, [grid[best]], None, tolerance, max_iterations)[0]
    logits = problem.logits(space.transform(test_features), refit)
    warnings = _find_warnings(grid, best, fits[best].converged, refit.converged, max_iterations)
    for warning in warnings:
        logger.warning("logistic regression: %s", warning)
    several = train.labels.ndim == 2
    return LogisticRegressionResult(
        predictions=logits > 0 if several else logits.argmax(dim=1),
        logits=logits,
        penalty=grid[best],
        selection=selection,
        metric=protocol.metric,
        penalties=tuple(grid),
        validation_scores=tuple(scores),
        converged=tuple(fit.converged for fit in fits),
        num_iterations=tuple(fit.num_iterations for fit in fits),
        refit_converged=refit.converged,
        refit_num_iterations=refit.num_iterations,
        warnings=warnings,
    )


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
        x = features.double()
        num_images, num_features = x.shape
        self.mean = x.mean(dim=0)
        # Of a constant feature the computed deviation may be a rounding error and not 0.
        constant = features.amin(dim=0) == features.amax(dim=0)
        self.scale = x.std(dim=0, correction=0).masked_fill(constant, 1.0)
        x = (x - self.mean) / self.scale
        if num_features <= num_images:
            _, self.basis = torch.linalg.eigh(x.T @ x)
        else:
            squares, left = torch.linalg.eigh(x @ x.T)
            # Below this an eigenvalue is rounding: centring alone makes one of them 0.
            kept = squares > num_images * torch.finfo(torch.float64).eps * squares[-1]
            self.basis = x.T @ (left[:, kept] / squares[kept].sqrt())
        self.z = self._turn(x)
        self.variances = self.z.square().mean(dim=0)

    def transform(self, features: Tensor) -> Tensor:
        """Coordinates [M, R + 1] of other images."""
        return self._turn((features.double() - self.mean) / self.scale)

    def _turn(self, x: Tensor) -> Tensor:
        return F.pad(x @ self.basis, (0, 1), value=1.0)


class _Loss(Protocol):
    """The part of f that depends on the logits, less its linear part, for G penalties at once.

    Args:
        linear: Coefficients of the linear part by image and class: f = loss − Σ linear · logits + penalty.
        first_bias: Bias without features, or near it.
        dims: The dimensions of [R + 1, G, C] whose entries depend on each other.

    Shapes:
        linear [N, C], first_bias [C].
    """

    linear: Tensor
    first_bias: Tensor
    dims: ClassVar[tuple[int, ...]]

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Value [1, G, 1] (independent classes: [1, G, C]) and derivative [N, G, C] of logits [N, G, C]."""

    def curvature(self, derivative: Tensor) -> Tensor:
        """Sum of the second derivatives by the logits of each class, [1, G, C]."""

    def spread(self, logits: Tensor) -> Tensor:
        """Logits [M, C'] of the fitted classes as logits [M, C] of all."""


class _Softmax:
    dims: ClassVar[tuple[int, ...]] = (0, 2)

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classes, labels = labels.unique(return_inverse=True)  # the bias of any other is −inf
        self.linear = F.one_hot(labels).double() / len(labels)
        self.first_bias = self.linear.sum(dim=0).log()

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        largest = logits.amax(dim=2, keepdim=True)
        exponentials = (logits - largest).exp_()
        sums = exponentials.sum(dim=2, keepdim=True)
        value = (largest + sums.log()).mean(dim=0, keepdim=True)
        return value, exponentials.div_(sums * len(logits))

    def curvature(self, derivative: Tensor) -> Tensor:
        return (derivative.sum(dim=0) - len(derivative) * derivative.square().sum(dim=0))[None]

    def spread(self, logits: Tensor) -> Tensor:
        everything = logits.new_full((len(logits), self.num_classes), -math.inf)
        everything[:, self.classes] = logits
        return everything


class _Sigmoid:
    dims: ClassVar[tuple[int, ...]] = (0,)

    def __init__(self, labels: Tensor, counted: Tensor) -> None:
        self.weight = counted.double() / counted.sum(dim=0).clamp(min=1)
        self.linear = self.weight * labels
        # One image of each kind more than there are: a class that all show, or none, has no finite bias.
        shown = (labels & counted).sum(dim=0) + 1
        self.first_bias = (shown / (counted.sum(dim=0) + 2 - shown)).log().double()

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight[:, None]
        value = (weight * F.softplus(logits, threshold=40.0)).sum(dim=0, keepdim=True)
        return value, weight * logits.sigmoid()

    def curvature(self, derivative: Tensor) -> Tensor:
        weight = self.weight[:, None]
        return (derivative - derivative.square() / weight.clamp(min=1e-300)).sum(dim=0, keepdim=True)

    def spread(self, logits: Tensor) -> Tensor:
        return logits


class _Problem:
    """The images of a fit in their own coordinates, and the loss of their labels."""

    def __init__(self, space: _Space, loss: _Loss) -> None:
        self.z = space.z
        self.variances = space.variances
        self.loss = loss
        self.linear = self.z.T @ loss.linear  # [R + 1, C]

    def num_penalties_at_once(self) -> int:
        return max(1, min(NUM_PENALTIES_AT_ONCE, MAX_LOGITS_IN_MEMORY // self.loss.linear.numel()))

    def logits(self, z: Tensor, fit: "_Fit") -> Tensor:
        """Logits [M, C] of images in the coordinates z [M, R + 1]."""
        return self.loss.spread(z @ fit.weight)


class _Fit(NamedTuple):
    """A minimum: weight [R + 1, C], the last row the bias."""

    weight: Tensor
    converged: bool
    num_iterations: int


@dataclass
class _State:
    """Where L-BFGS stands for G penalties: weights, what follows from them, and what it has learnt.

    Shapes:
        penalty [R + 1, G, 1], weight, gradient [R + 1, G, C], logits [N, G, C], value, scale [1, G, 1 or C],
        curvature [1, G, C]; of each pair s, y [R + 1, G, C] and 1/sᵀy [1, G, 1 or C], oldest first.
    """

    penalty: Tensor
    weight: Tensor
    gradient: Tensor
    logits: Tensor
    value: Tensor
    scale: Tensor
    curvature: Tensor
    pairs: list[tuple[Tensor, Tensor, Tensor]]

    def keep(self, columns: Tensor) -> "_State":
        def take(each: Tensor) -> Tensor:
            return each.index_select(1, columns)

        return _State(
            take(self.penalty),
            take(self.weight),
            take(self.gradient),
            take(self.logits),
            take(self.value),
            take(self.scale),
            take(self.curvature),
            [(take(s), take(y), take(inverse_product)) for s, y, inverse_product in self.pairs],
        )


def _minimise(
    problem: _Problem,
    penalties: Sequence[float],
    first_guess: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> list[_Fit]:
    """L-BFGS for G penalties side by side, each until it has converged or is given up."""
    state = _start(problem, penalties, first_guess)
    active = list(range(len(penalties)))
    fits: dict[int, _Fit] = {}
    for iteration in range(max_iterations + 1):
        converged = state.gradient.square().sum(dim=0).amax(dim=1).sqrt() <= tolerance
        finished = converged | (iteration == max_iterations)
        if finished.any():
            for column in finished.nonzero().flatten().tolist():
                weight = state.weight[:, column].clone()
                fits[active[column]] = _Fit(weight, bool(converged[column]), iteration)
            kept = (~finished).nonzero().flatten()
            if not len(kept):
                break
            active = [active[column] for column in kept.tolist()]
            state = state.keep(kept)
        # The share of each class changes fast at first, slowly later.
        _step(problem, state, renew_curvature=(iteration + 1) & iteration == 0)
    return [fits[index] for index in range(len(penalties))]


def _start(problem: _Problem, penalties: Sequence[float], first_guess: Tensor | None) -> _State:
    penalty = problem.z.new_tensor(penalties).repeat(problem.z.shape[1], 1)[..., None]
    penalty[-1] = 0  # the bias
    if first_guess is None:
        first_guess = torch.zeros_like(problem.linear)
        first_guess[-1] = problem.loss.first_bias
    weight = first_guess[:, None].repeat(1, len(penalties), 1)
    logits = _multiply(problem.z, weight)
    value, derivative = problem.loss(logits)
    return _State(
        penalty=penalty,
        weight=weight,
        gradient=_multiply(problem.z.T, derivative) - problem.linear[:, None] + penalty * weight,
        logits=logits,
        value=value,
        scale=torch.ones_like(value),
        curvature=problem.loss.curvature(derivative),
        pairs=[],
    )


def _step(problem: _Problem, state: _State, *, renew_curvature: bool) -> None:
    """One iteration of L-BFGS, in place."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=problem.loss.dims, keepdim=True)

    def inverse_hessian() -> Tensor:
        diagonal = problem.variances[:, None, None] * state.curvature + state.penalty
        return 1 / diagonal.clamp(min=_SMALLEST_CURVATURE)

    initial = state.scale * inverse_hessian()
    direction = -_multiply_by_inverse_hessian(state.gradient, state.pairs, initial, dot)
    step, derivative = _search_line(problem, state, direction, dot)
    s = step * direction
    state.weight = state.weight + s
    gradient = _multiply(problem.z.T, derivative) - problem.linear[:, None] + state.penalty * state.weight
    y = gradient - state.gradient
    state.gradient = gradient
    product = dot(s, y)
    valid = product > 0
    state.pairs.append((s, y, torch.where(valid, 1 / product, 0.0)))
    del state.pairs[:-MEMORY]
    if renew_curvature:
        state.curvature = problem.loss.curvature(derivative)
    state.scale = torch.where(valid, product / dot(y, inverse_hessian() * y), state.scale)


def _search_line(
    problem: _Problem, state: _State, direction: Tensor, dot: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Steps that decrease f enough, the first of 1, and the loss's derivative there; moves logits and value.

    The logits along the direction are a sum, so that a step, however often it is shortened, costs no product
    with z.
    """
    along = _multiply(problem.z, direction)
    slope = dot(state.gradient, direction)
    linear = dot(state.penalty * state.weight - problem.linear[:, None], direction)
    quadratic = dot(state.penalty * direction, direction) / 2
    step = torch.ones_like(slope)
    for _ in range(_MAX_STEPS_OF_LINE_SEARCH):
        logits = state.logits + step * along
        value, derivative = problem.loss(logits)
        change = value - state.value + step * (linear + step * quadratic)
        # Near the minimum a decrease drowns in the rounding of the value itself.
        enough = change <= _SUFFICIENT_DECREASE * step * slope + _ROUNDING * (1 + state.value.abs())
        if enough.all():
            break
        parabola = -slope * step.square() / (2 * (change - slope * step))
        shorter = torch.maximum(0.1 * step, torch.minimum(0.5 * step, parabola))
        used, step = step, torch.where(enough, step, shorter)
    else:
        step = used
    state.logits, state.value = logits, value
    return step, derivative


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [I, J] times b [J, G, C]: one product for all penalties."""
    return (a @ b.flatten(1)).unflatten(1, b.shape[1:])


def _multiply_by_inverse_hessian(
    gradient: Tensor,
    history: list[tuple[Tensor, Tensor, Tensor]],
    initial: Tensor,
    dot: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The two loops of L-BFGS over the pairs (s, y, 1/sᵀy), oldest first."""
    result = gradient
    coefficients = []
    for s, y, inverse_product in reversed(history):
        coefficient = inverse_product * dot(s, result)
        coefficients.append(coefficient)
        result = result - coefficient * y
    result = initial * result
    for (s, y, inverse_product), coefficient in zip(history, reversed(coefficients), strict=True):
        result = result + (coefficient - inverse_product * dot(y, result)) * s
    return result


def _split_by_rarest_label(labels: Tensor, heldout_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to hold out; an image counts for the rarest of its labels."""
    num_images = labels.sum(dim=0)
    rarity = torch.where(labels.bool(), num_images, len(labels) + 1)
    group = rarity.argmin(dim=1).masked_fill(~labels.bool().any(dim=1), labels.shape[1]).cpu()
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for each in group.unique().tolist():
        rows = (group == each).nonzero().flatten()
        num_held_out = max(1, round(heldout_fraction * len(rows))) if len(rows) > 1 else 0
        held_out[rows[torch.randperm(len(rows), generator=generator)[: min(num_held_out, len(rows) - 1)]]] = (
            True
        )
    if not held_out.any():
        raise ValueError(
            "choosing a penalty on held-out images needs a label of 2 images, or a validation split"
        )
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


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


def _check_settings(
    penalties: Sequence[float], heldout_fraction: float, tolerance: float, max_iterations: int
) -> None:
    if len(penalties) == 0 or not all(0 < penalty < math.inf for penalty in penalties):
        raise ValueError(f"penalties must all be > 0 and finite, got {list(penalties)}")
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in (0, 1), got {heldout_fraction}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations}")


def _check_features(train: Tensor, test: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
    if train.ndim != 2 or len(train) < 2:
        raise ValueError(f"train_features must be [N, D] with N >= 2, got {list(train.shape)}")
    named = {"train_features": train, "test_features": test}
    if validation is not None:
        named["validation_features"] = validation[0]
        if len(validation[0]) == 0:
            raise ValueError("validation_features must be >= 1, got 0")
    for name, features in named.items():
        if features.ndim != 2 or features.shape[1] != train.shape[1]:
            raise ValueError(f"{name} must be [*, {train.shape[1]}], got {list(features.shape)}")
        if not features.isfinite().all():
            row = int((~features.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"{name} must be finite, got a row {row} that is not")


def _check_classes(split: str, labels: Tensor, num_images: int, num_classes: int) -> None:
    if labels.shape != (num_images,):
        raise ValueError(f"{split}_labels must be [{num_images}], got {list(labels.shape)}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"{split}_labels must be in [0, {num_classes}), got {lowest} to {highest}")
