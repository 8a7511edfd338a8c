"""The part of the training images that is held out where there is no validation split.

About the same share of each class is held out, and all images of one caption stand on one side: they are near
copies of each other, and a choice on copies of what was fitted takes too small a penalty, too late an epoch.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SplitBy = Literal["image", "caption", "caption or image"]
"""What stays whole: each image by itself; each caption; each caption but for those of classes of which one
caption is more than half, whose images are split."""


class HeldOut(NamedTuple):
    """What `hold_out` returns.

    Attributes:
        fitted: Rows to fit, ascending, int64.
        held_out: The other rows, ascending, int64.
        split_by: What stays whole.
    """

    fitted: Tensor
    held_out: Tensor
    split_by: SplitBy


def hold_out(labels: Tensor, groups: Tensor | None, *, fraction: float, seed: int) -> HeldOut:
    """A random share of each class, in whole groups, and never the whole of a class.

    Of each class round(fraction · images) images are held out, at least one. With groups that is the most:
    they are taken in random order, but for those that no longer fit; where none fits, the smallest is. A
    class of which one group is more than half is split by image.

    An image of several labels counts for the rarest of them, a group with all its images for the rarest class
    of these. What would leave nothing of a class to fit is not taken: never a class of one image.

    Args:
        labels: Class indices, or which classes each image shows.
        groups: Whole numbers, such as those of captions: images of one number stay together. None splits
            image by image.
        fraction: Share to hold out, in (0, 1).
        seed: Seed of the choice.

    Shapes:
        labels [N] int or [N, C] bool, groups [N] int.

    Raises:
        ValueError: If the fraction is out of its bounds, the shapes do not match, or each class has a single
            image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"heldout_fraction must be in (0, 1), got {fraction}")
    if groups is not None and groups.shape != labels.shape[:1]:
        raise ValueError(f"groups must be [{len(labels)}], got {list(groups.shape)}")
    classes = _find_classes(labels.cpu())
    units, strata = torch.arange(len(classes)), classes
    if groups is not None:
        units = groups.cpu().unique(return_inverse=True)[1]
        strata = _find_classes_of_groups(classes, units)
    order = strata.argsort(stable=True)
    generator = torch.Generator().manual_seed(seed)
    class_of_row = classes.tolist()
    num_fitted = Counter(class_of_row)
    held_out: list[int] = []
    splits_groups = False
    for rows in order.split(strata.bincount()[strata.unique()].tolist()):
        members, sizes = units[rows].unique(return_inverse=True, return_counts=True)[1:]
        if 1 < sizes.max() > len(rows) / 2:
            members, sizes, splits_groups = torch.arange(len(rows)), torch.ones_like(rows), True
        by_group = iter(rows[members.argsort(stable=True)].tolist())
        parts = [list(islice(by_group, size)) for size in sizes.tolist()]
        shuffled = [parts[index] for index in torch.randperm(len(parts), generator=generator).tolist()]
        num_images = max(1, round(fraction * len(rows)))
        held_out += _take(shuffled, num_images, class_of_row, num_fitted)
    if not held_out:
        raise ValueError(
            "a choice on held-out training images needs a class of at least 2 images, or a validation split"
        )
    is_held_out = torch.zeros(len(classes), dtype=torch.bool)
    is_held_out[held_out] = True
    split_by: SplitBy = "image"
    if groups is not None:
        split_by = "caption or image" if splits_groups else "caption"
    return HeldOut((~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten(), split_by)


def _take(
    groups: Sequence[list[int]], num_images: int, class_of_row: Sequence[int], num_fitted: Counter[int]
) -> list[int]:
    """Rows of groups that have at most so many images together, in their order; else of the smallest.

    No group is taken that would leave none of a class in `num_fitted`; what is taken is subtracted there.
    """
    taken: list[int] = []

    def take(group: list[int]) -> None:
        counts = Counter(class_of_row[row] for row in group)
        if all(num_fitted[label] > count for label, count in counts.items()):
            num_fitted.subtract(counts)
            taken.extend(group)

    for group in groups:
        if len(taken) + len(group) <= num_images:
            take(group)
    for group in sorted(groups, key=len):
        if taken:
            break
        take(group)
    return taken


def _find_classes(labels: Tensor) -> Tensor:
    """The class of each image, of several the rarest; C where it shows none. Int64 [N]."""
    if labels.ndim == 1:
        return labels.long()
    labels = labels.bool()
    rarity = torch.where(labels, labels.sum(dim=0), len(labels) + 1)
    return rarity.argmin(dim=1).masked_fill(~labels.any(dim=1), labels.shape[1])


def _find_classes_of_groups(classes: Tensor, units: Tensor) -> Tensor:
    """The rarest class of each image's group, [N]; of equally rare ones the lowest."""
    rarity = classes.bincount()[classes] * (classes.max() + 1) + classes
    rarest = torch.full_like(units, torch.iinfo(torch.int64).max)
    rarest.scatter_reduce_(0, units, rarity, "amin")
    return rarest[units] % (classes.max() + 1)
