"""Scores of predictions: accuracy, mean accuracy of the classes, average precision as of PASCAL VOC 2007."""

import torch
from torch import Tensor

NUM_RECALL_LEVELS = 11


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of right predictions.

    Args:
        predictions: Predicted class indices; −1, which is no class, is wrong.
        labels: Class indices.

    Shapes:
        predictions, labels [N].

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ or there is no label.
    """
    _check_predictions(predictions, labels)
    return float((predictions == labels).double().mean())


def mean_per_class_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Mean over the classes of `labels` of the share of a class's images that are predicted right.

    A class without an image in `labels` does not count, whatever is predicted.

    Args:
        predictions: Predicted class indices; −1, which is no class, is wrong.
        labels: Class indices, >= 0.

    Shapes:
        predictions, labels [N].

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, there is no label or one is negative.
    """
    _check_predictions(predictions, labels)
    labels = labels.long()
    if (lowest := int(labels.min())) < 0:
        raise ValueError(f"labels must be >= 0, got {lowest}")
    num_images = torch.bincount(labels)
    num_correct = torch.bincount(labels[predictions == labels], minlength=len(num_images))
    present = num_images > 0
    return float((num_correct[present].double() / num_images[present]).mean())


def voc_average_precision(scores: Tensor, labels: Tensor, ignored: Tensor | None = None) -> float:
    """AP = 1/11 Σ_{r ∈ {0, 0.1, …, 1}} max {precision(s) : recall(s) >= r}, of the thresholds s.

    precision(s) and recall(s) are those of "score >= s": images of equal score enter together, so that the
    value does not depend on the order of the images. Where no threshold reaches r, the maximum is 0.

    Args:
        scores: Confidence that an image shows the class; any monotone scale.
        labels: Whether it does.
        ignored: Images that count neither as right nor as wrong ("difficult" in VOC); none if not given.

    Shapes:
        scores [N] float, labels [N] bool, ignored [N] bool.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, a score is NaN, or no image shows the class.

    Reference:
        Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2.
    """
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"scores and labels must both be [N], got {list(scores.shape)} and {list(labels.shape)}"
        )
    if ignored is not None:
        if ignored.shape != scores.shape:
            raise ValueError(f"ignored must be {list(scores.shape)}, got {list(ignored.shape)}")
        scores, labels = scores[~ignored.bool()], labels[~ignored.bool()]
    if scores.isnan().any():
        raise ValueError(f"scores must be numbers, got {int(scores.isnan().sum())} NaN")
    num_positives = int(labels.bool().sum())
    if num_positives == 0:
        raise ValueError("labels must have at least 1 positive, got 0")
    order = scores.argsort(descending=True, stable=True)
    ranked = scores[order]
    is_threshold = torch.ones_like(ranked, dtype=torch.bool)  # the last image of each score
    is_threshold[:-1] = ranked[1:] != ranked[:-1]
    num_found = labels.bool()[order].cumsum(0)[is_threshold]
    num_shown = torch.arange(1, len(ranked) + 1, device=ranked.device)[is_threshold]
    precision = num_found.double() / num_shown
    # In integers: as floats, a recall of 3/10 is less than 3 · 0.1.
    levels = torch.arange(NUM_RECALL_LEVELS, device=ranked.device)[:, None]
    reached = (NUM_RECALL_LEVELS - 1) * num_found >= levels * num_positives
    return float(precision.where(reached, 0.0).amax(dim=1).mean())


def mean_average_precision(scores: Tensor, labels: Tensor, ignored: Tensor | None = None) -> float:
    """Mean of `voc_average_precision` over the classes that at least one image shows.

    Args:
        scores: Confidence of each image and class.
        labels: Whether the image shows the class.
        ignored: Entries that do not count; none if not given.

    Shapes:
        scores [N, C] float, labels [N, C] bool, ignored [N, C] bool.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, a score is NaN, or no image shows any class.
    """
    if scores.ndim != 2 or labels.shape != scores.shape:
        raise ValueError(
            f"scores and labels must both be [N, C], got {list(scores.shape)} and {list(labels.shape)}"
        )
    if ignored is None:
        ignored = torch.zeros_like(labels, dtype=torch.bool)
    if ignored.shape != scores.shape:
        raise ValueError(f"ignored must be {list(scores.shape)}, got {list(ignored.shape)}")
    shown = (labels.bool() & ~ignored.bool()).any(dim=0).nonzero().flatten().tolist()
    if not shown:
        raise ValueError("labels must have at least 1 positive, got 0")
    precisions = [voc_average_precision(scores[:, c], labels[:, c], ignored[:, c]) for c in shown]
    return sum(precisions) / len(precisions)


def _check_predictions(predictions: Tensor, labels: Tensor) -> None:
    if labels.ndim != 1 or predictions.shape != labels.shape or len(labels) == 0:
        raise ValueError(
            "predictions and labels must both be [N] with N >= 1, got "
            f"{list(predictions.shape)} and {list(labels.shape)}"
        )
