"""A score, and what the scores of one run share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HASH_NAMES = ("weights", "data", "transform")
RowKey = tuple[str, str, str]
"""Protocol, metric and feature: what tells the rows of a run apart."""
_ARRAY_KINDS = "biuf"  # bool, integers, floats: what a reader needs no pickle for


@dataclass(frozen=True)
class Row:
    """One score of one protocol on one feature.

    Args:
        protocol: Such as `knn20`, `linear_paper`, `geometry`.
        metric: Such as `accuracy`, `mean_per_class_accuracy`, `map11`, `recall@1`, `alignment`.
        value: The score; accuracies and the like are fractions in [0, 1].
        interval: Its bounds; None if it has none.
        interval_method: How the bounds were found, such as `Wilson, 95 %`; empty without bounds.
        n: Examples, episodes or pairs that the value is over.
        selection: The split on which hyper-parameters were chosen; `none` if nothing was chosen.
        hyperparameters: What was set and what was chosen, in plain types.
        feature: Such as `cls`, `patch_mean`.
        seconds: Time of the protocol; rows of one protocol share it.
        settings: The options that it was computed with, such as `linear.num_epochs`, in plain types.
        predictions: What was answered for each example. Without targets: a score for each example (whether a
            retrieval hit, the accuracy of an episode), whose mean is the value.
        targets: What is right for each example.
        names: Names of the examples, where they are not the run's test images.

    Shapes:
        predictions [N] or [N, C], targets [N] or [N, C], names [N]; numbers or bool.

    Raises:
        ValueError: If a field is out of its bounds.
    """

    protocol: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    interval_method: str
    n: int
    selection: str
    hyperparameters: Mapping[str, Any]
    feature: str
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    predictions: np.ndarray | None = field(default=None, repr=False, compare=False)
    targets: np.ndarray | None = field(default=None, repr=False, compare=False)
    names: Sequence[str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("protocol", "metric", "selection", "feature"):
            if not getattr(self, name):
                raise ValueError(f"{name} of a row must not be empty")
        where = f"{self.protocol} {self.metric}"
        if not math.isfinite(self.value):
            raise ValueError(f"{where}: value must be finite, got {self.value}")
        if self.interval is not None:
            low, high = self.interval
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"{where}: interval must be (low, high), got ({low}, {high})")
        if self.n < 1:
            raise ValueError(f"{where}: n must be >= 1, got {self.n}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"{where}: seconds must be >= 0, got {self.seconds}")
        self._check_arrays(where)

    def _check_arrays(self, where: str) -> None:
        if self.predictions is None:
            if self.targets is not None or self.names is not None:
                raise ValueError(f"{where}: targets and names come with predictions")
            return
        for name in ("predictions", "targets"):
            array = getattr(self, name)
            if array is None:
                continue
            if array.dtype.kind not in _ARRAY_KINDS:
                raise ValueError(f"{where}: {name} must be numbers or bool, got {array.dtype}")
            if array.ndim not in (1, 2):
                raise ValueError(f"{where}: {name} must be [N] or [N, C], got {list(array.shape)}")
        for name in ("targets", "names"):
            found = getattr(self, name)
            if found is not None and len(found) != len(self.predictions):
                raise ValueError(
                    f"{where}: {name} must be as many as predictions, {len(self.predictions)}, "
                    f"got {len(found)}"
                )

    @property
    def key(self) -> RowKey:
        """What tells the row from others of its run."""
        return self.protocol, self.metric, self.feature


@dataclass(frozen=True)
class Provenance:
    """What the rows of one run share.

    Args:
        model: What was evaluated, as the user gave it.
        data: What it was evaluated on, as the user gave it.
        transform: The evaluation transform in words.
        hashes: SHA-256 of `weights`, `data` and `transform`; more may stand beside them.
        versions: Library → version.

    Raises:
        ValueError: If a hash is missing.
    """

    model: str
    data: str
    transform: str
    hashes: Mapping[str, str]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        missing = [name for name in HASH_NAMES if not self.hashes.get(name)]
        if missing:
            raise ValueError(f"hashes must name {', '.join(HASH_NAMES)}; missing: {', '.join(missing)}")
