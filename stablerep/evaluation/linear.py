"""The linear probe of StableRep: ten linear classifiers, one a learning rate, trained at once.

For head h with weights W_h, bias b_h and learning rate η_h(t) = base_h · batch/256 · ½(1 + cos(πt/T)),

    p = softmax(x W_h + b_h),   g = xᵀ(p − onehot(y))/B,   v ← 0.9 v + g,   W_h ← W_h − η_h(t) v

The heads share their inputs, batches and initial weights, so they differ in the learning rate alone.

Reference: Tian et al., StableRep, arXiv 2306.00984, and its public code (google-research/syn-rep-learn).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from stablerep.evaluation.holdout import SplitBy, hold_out

PUBLISHED_BASE_LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
MOMENTUM = 0.9
INITIAL_STD = 0.01
BATCH_NORM_EPS = 1e-6
NUM_ROWS_PER_PREDICTION = 4096

Selection = Literal["test", "validation", "held-out part of train"]


@dataclass(frozen=True)
class LinearConfig:
    """Settings of the linear probe; the defaults are the published protocol."""

    num_epochs: int = 90
    """Passes over the training images."""
    num_images_per_batch: int = 1024
    """Images in one step of SGD; a smaller training set is one batch."""
    base_learning_rates: tuple[float, ...] = PUBLISHED_BASE_LEARNING_RATES
    """One head each; multiplied by num_images_per_batch / 256."""
    num_views: int | None = None
    """null: new augmented views in every epoch, the published protocol. A number: that many augmented views
    of each image are computed once and used in turn: faster, and not comparable with published figures."""
    heldout_fraction: float = 0.1
    """About the share of each class on which head and epoch are chosen if there is no validation split."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_images_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"linear.{name} must be >= 1, got {getattr(self, name)}")
        if self.num_views is not None and self.num_views < 1:
            raise ValueError(f"linear.num_views must be null or >= 1, got {self.num_views}")
        if not self.base_learning_rates or min(self.base_learning_rates) <= 0:
            raise ValueError(
                f"linear.base_learning_rates must all be > 0, got {list(self.base_learning_rates)}"
            )
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"linear.heldout_fraction must be in (0, 1), got {self.heldout_fraction}")


@dataclass(frozen=True)
class LabelledFeatures:
    """Features [N, D] and their class indices [N]."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LinearResult:
    """Predictions of one chosen head on the test split.

    Args:
        batch_norm: Whether a BatchNorm without affine stands before the head.
        selection: The images on which head and epoch were chosen; `test` is the published custom.
        split_by: What stayed whole when they were held out of train; None where they were not.
        base_learning_rate: That of the chosen head.
        epoch: The chosen epoch, from 1.
        predictions: Predicted class of each test image; −1 where the head had diverged.

    Shapes:
        predictions [M].
    """

    batch_norm: bool
    selection: Selection
    split_by: SplitBy | None
    base_learning_rate: float
    epoch: int
    predictions: Tensor


class LinearHeads:
    """The heads of one probe: batched weights, their momentum, and an optional shared BatchNorm.

    Args:
        num_features: D.
        num_classes: C.
        num_heads: H.
        batch_norm: Put a BatchNorm without affine, eps 1e-6, before the heads.
        seed: Seed of the initial weights N(0, 0.01), the same for all heads.
        device: Where they live.

    Shapes:
        weight [H, D, C], bias [H, C].
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_heads: int,
        *,
        batch_norm: bool,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        initial = torch.empty(num_features, num_classes)
        initial.normal_(0, INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        self.weight = initial.repeat(num_heads, 1, 1).to(device)
        self.bias = torch.zeros(num_heads, num_classes, device=device)
        self.weight_velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)
        self.norm = (
            nn.BatchNorm1d(num_features, eps=BATCH_NORM_EPS, affine=False).to(device) if batch_norm else None
        )

    def step(self, features: Tensor, labels: Tensor, learning_rates: Tensor) -> None:
        """One step of SGD with momentum on the mean cross-entropy of each head.

        Shapes:
            features [B, D], labels [B], learning_rates [H].
        """
        x = self.norm.train()(features) if self.norm is not None else features
        probabilities = self._logits(x).softmax(dim=-1)  # [H, B, C]
        error = (probabilities - F.one_hot(labels, self.bias.shape[1])) / len(labels)
        self.weight_velocity.mul_(MOMENTUM).add_(torch.einsum("bd,hbc->hdc", x, error))
        self.bias_velocity.mul_(MOMENTUM).add_(error.sum(dim=1))
        self.weight -= learning_rates[:, None, None] * self.weight_velocity
        self.bias -= learning_rates[:, None] * self.bias_velocity

    def predict(self, features: Tensor) -> Tensor:
        """Predicted classes [H, M] int32 of features [M, D]; −1 where a logit is not finite."""
        slices = []
        for rows in features.split(NUM_ROWS_PER_PREDICTION):
            logits = self._logits(self.norm.eval()(rows) if self.norm is not None else rows)
            diverged = ~logits.isfinite().all(dim=-1)
            slices.append(logits.argmax(dim=-1).masked_fill(diverged, -1).int())
        return torch.cat(slices, dim=1)

    def _logits(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,hdc->hbc", x, self.weight) + self.bias[:, None]


def cosine_factor(step: int, num_steps: int) -> float:
    """½(1 + cos(π · step / num_steps)): from 1 at the first step towards 0."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))


def choose_head(predictions: Tensor, labels: Tensor) -> tuple[int, int]:
    """The (epoch, head), from 0, of the highest accuracy; of equals the latest epoch, then the first head.

    Shapes:
        predictions [E, H, N], labels [N].
    """
    num_correct = (predictions == labels).sum(dim=-1)
    epochs, heads = (num_correct == num_correct.max()).nonzero(as_tuple=True)
    epoch = int(epochs.max())
    return epoch, int(heads[epochs == epoch].min())


def linear_probe(
    train_features: Callable[[int], Tensor],
    train_labels: Tensor,
    test: LabelledFeatures,
    config: LinearConfig,
    *,
    num_classes: int,
    validation: LabelledFeatures | None = None,
    heldout_features: Tensor | None = None,
    groups: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[LinearResult]:
    """The published probe without and with BatchNorm, each with head and epoch chosen in two ways.

    Chosen on test: the published custom, optimistic.
    Chosen held-out: on the validation split; without one, on a part of train that a second run, with the same
    settings, leaves out, while the score is that of the run on all of train.

    Args:
        train_features: Features [N, D] of the training images for an epoch, from 0: augmented views.
        train_labels: Classes [N].
        test: The test split.
        config: The settings.
        num_classes: C.
        validation: The validation split, if there is one.
        heldout_features: Features [N, D] of the training images under the evaluation transform; needed if
            there is no validation split.
        groups: Numbers [N] of the training images' captions, as `hold_out` takes them. None holds out
            image by image.
        seed: Seed of initial weights, order and held-out part.
        device: Where the heads are trained.

    Returns:
        Four results: without and with BatchNorm, chosen on test and held-out.

    Raises:
        ValueError: If there is no validation split and no heldout_features, or nothing can be held out.
    """
    everything = torch.arange(len(train_labels))
    selection: Selection = "validation"
    split_by: SplitBy | None = None
    if validation is None:
        if heldout_features is None:
            raise ValueError("linear_probe needs validation or heldout_features")
        selection = "held-out part of train"
        fitted, heldout, split_by = hold_out(
            train_labels, groups, fraction=config.heldout_fraction, seed=seed
        )
        validation = LabelledFeatures(heldout_features[heldout], train_labels[heldout])
    else:
        fitted = everything

    def build(rows: Tensor, watched: Sequence[LabelledFeatures], batch_norm: bool) -> _Probe:
        return _Probe(rows, watched, config, test.features.shape[1], num_classes, batch_norm, seed, device)

    pairs = []
    for batch_norm in (False, True):
        if fitted is everything:
            main = build(everything, (test, validation), batch_norm)
            pairs.append((main, main))
        else:
            pairs.append((build(everything, (test,), batch_norm), build(fitted, (validation,), batch_norm)))
    probes = list({id(probe): probe for pair in pairs for probe in pair}.values())
    for epoch in tqdm(range(config.num_epochs), desc="linear probe", unit=" epochs", leave=False):
        features = train_features(epoch).to(device)
        for probe in probes:
            probe.train_epoch(features, train_labels.to(device), epoch)
    results: list[LinearResult] = []
    for main, chooser in pairs:
        test_predictions = torch.stack(main.predictions[0])
        on_test = choose_head(test_predictions, test.labels)
        on_heldout = choose_head(torch.stack(chooser.predictions[-1]), validation.labels)
        results.append(main.describe("test", None, test_predictions, on_test))
        results.append(main.describe(selection, split_by, test_predictions, on_heldout))
    return results


class _Probe:
    """One run of the heads over some rows of train, and their predictions after each epoch."""

    def __init__(
        self,
        rows: Tensor,
        watched: Sequence[LabelledFeatures],
        config: LinearConfig,
        num_features: int,
        num_classes: int,
        batch_norm: bool,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.rows = rows
        self.watched = [split.features.to(device) for split in watched]
        self.predictions: list[list[Tensor]] = [[] for _ in watched]
        self.base_learning_rates = config.base_learning_rates
        self.seed = seed
        num_heads = len(config.base_learning_rates)
        self.heads = LinearHeads(
            num_features, num_classes, num_heads, batch_norm=batch_norm, seed=seed, device=device
        )
        self.num_images_per_batch = min(config.num_images_per_batch, len(rows))
        self.num_steps_per_epoch = len(rows) // self.num_images_per_batch
        self.num_steps = self.num_steps_per_epoch * config.num_epochs
        self.learning_rates = (
            torch.tensor(config.base_learning_rates, device=device) * self.num_images_per_batch / 256
        )

    def train_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> None:
        step = epoch * self.num_steps_per_epoch
        for rows in self._batches(epoch):
            rates = self.learning_rates * cosine_factor(step, self.num_steps)
            self.heads.step(features[rows.to(features.device)], labels[rows.to(labels.device)], rates)
            step += 1
        for history, watched in zip(self.predictions, self.watched, strict=True):
            history.append(self.heads.predict(watched).cpu())

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """Shuffled rows in whole batches: as published, the rest of an epoch is left to the next shuffle."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        for step in range(self.num_steps_per_epoch):
            yield order[step * self.num_images_per_batch : (step + 1) * self.num_images_per_batch]

    def describe(
        self,
        selection: Selection,
        split_by: SplitBy | None,
        test_predictions: Tensor,
        place: tuple[int, int],
    ) -> LinearResult:
        epoch, head = place
        return LinearResult(
            batch_norm=self.heads.norm is not None,
            selection=selection,
            split_by=split_by,
            base_learning_rate=self.base_learning_rates[head],
            epoch=epoch + 1,
            predictions=test_predictions[epoch, head].long(),
        )
