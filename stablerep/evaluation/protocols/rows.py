"""Rows that several protocols write."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from stablerep.evaluation.config import PROTOCOLS
from stablerep.evaluation.holdout import SplitBy
from stablerep.evaluation.results import Row
from stablerep.evaluation.statistics import wilson_interval

WILSON = "Wilson, 95 %"
BOOTSTRAP = "percentile bootstrap over test images, 95 %"


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


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """In the order of `PROTOCOLS`, and as they come within one; those of none of them last."""
    return sorted(
        rows,
        key=lambda row: next(
            (place for place, name in enumerate(PROTOCOLS) if row.protocol.startswith(name)), len(PROTOCOLS)
        ),
    )


def describe_split(split_by: SplitBy | None) -> dict[str, str]:
    """For the hyper-parameters of a row: what stayed whole where images were held out of train."""
    return {} if split_by is None else {"held_out_by": split_by}
