"""Rows that several protocols write."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stablerep.evaluation.results import Row
from stablerep.evaluation.statistics import wilson_interval

WILSON = "Wilson, 95 %"


def accuracy_row(
    protocol: str,
    feature: str,
    predictions: Tensor,
    labels: Tensor,
    seconds: float,
    *,
    selection: str = "none",
    hyperparameters: Mapping[str, Any],
) -> Row:
    """The share of test images that are classified rightly, with its interval."""
    num_correct, num_images = int((predictions == labels).sum()), len(labels)
    return Row(
        protocol=protocol,
        metric="accuracy",
        value=num_correct / num_images,
        interval=wilson_interval(num_correct, num_images),
        interval_method=WILSON,
        n=num_images,
        selection=selection,
        hyperparameters=hyperparameters,
        feature=feature,
        seconds=seconds,
        predictions=predictions.numpy(),
        targets=labels.numpy(),
    )


def mean_row(protocol: str, rows: Sequence[Row], start: float, hyperparameters: Mapping[str, Any]) -> Row:
    """The mean of accuracies; without an interval, as they are of the same images."""
    return Row(
        protocol=protocol,
        metric="accuracy",
        value=sum(row.value for row in rows) / len(rows),
        interval=None,
        interval_method="",
        n=sum(row.n for row in rows),
        selection="none",
        hyperparameters=hyperparameters,
        feature="cls",
        seconds=time.perf_counter() - start,
    )
