"""What features, labels and embeddings must be, said alike by all protocols."""

import torch
import torch.nn.functional as F
from torch import Tensor

_NUM_VALUES_PER_SLICE = 2**24


def check_features(name: str, features: Tensor, *, width: int | None = None, at_least: int = 0) -> None:
    """Refuses what is not [N, width], or is not finite.

    Args:
        name: What the message calls them.
        features: Features [N, D].
        width: D; any if not given.
        at_least: Lowest N.

    Raises:
        ValueError: Names the features, the bound and what was found.
    """
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        expected = "D" if width is None else width
        raise ValueError(f"{name} must be [N, {expected}], got {list(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {len(features)}")
    num_rows = max(1, _NUM_VALUES_PER_SLICE // max(1, features.shape[1]))
    for number, rows in enumerate(features.split(num_rows)):
        if not (finite := rows.isfinite().all(dim=1)).all():
            row = number * num_rows + int((~finite).nonzero()[0])
            raise ValueError(f"{name} must be finite, got a row {row} that is not")


def check_labels(name: str, labels: Tensor, num_images: int, num_classes: int | None = None) -> None:
    """Refuses what are not class indices [num_images] in [0, num_classes).

    Args:
        name: What the message calls them.
        labels: Class indices.
        num_images: How many there must be.
        num_classes: Bound of the indices; none if not given.

    Raises:
        ValueError: Names the labels, the bound and what was found.
    """
    if labels.shape != (num_images,):
        raise ValueError(f"{name} must be [{num_images}], got {list(labels.shape)}")
    if num_classes is None or not num_images:
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"{name} must be in [0, {num_classes}), got {lowest} to {highest}")


def normalize_embeddings(name: str, embeddings: Tensor) -> Tensor:
    """x / ‖x‖ in float32; float64 stays.

    Args:
        name: What the message calls them.
        embeddings: Embeddings [N, E].

    Raises:
        ValueError: If one is zero or not finite: it has no direction, and would be ranked all the same.
    """
    x = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    norms = torch.linalg.vector_norm(x, dim=1)
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise ValueError(f"{name} must be finite and other than zero")
    return F.normalize(x, dim=1)
