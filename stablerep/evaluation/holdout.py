"""The part of the training images that is held out where there is no validation split.

The same share of each class is held out, and all images of one caption stand on one side: they are near
copies of each other, and a choice on copies of what was fitted takes too small a penalty, too late an epoch.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SplitBy = Literal["image", "caption", "caption or image"]
"""What stays whole: each image by itself; each caption; each caption but for those that are a class by
themselves, whose images are split."""


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
    """A random share of each class's groups; at least one group of a class, and never all.

    An image of several labels counts for the rarest of them, a group for the rarest class of its images. Of a
    class of one group a share of the images is held out, as neither side can do without it; a class of one
    image is never held out.

    Args:
        labels: Class indices, or which classes each image shows.
        groups: Whole numbers >= 0, such as those of captions: images of one number stay together. None splits
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
    strata = _find_strata(labels.cpu())
    every_row = torch.arange(len(strata))
    units = every_row if groups is None else groups.cpu().unique(return_inverse=True)[1]
    if groups is not None:
        strata = _find_strata_of_groups(strata, units)
    order = strata.argsort(stable=True)
    generator = torch.Generator().manual_seed(seed)
    is_held_out = torch.zeros(len(strata), dtype=torch.bool)
    splits_groups = False
    for rows in order.split(strata.bincount()[strata.unique()].tolist()):
        own, members = units[rows].unique(), units
        if len(own) == 1 < len(rows):
            own, members, splits_groups = rows, every_row, True
        chosen = own[torch.randperm(len(own), generator=generator)]
        num_chosen = min(max(1, round(fraction * len(own))), len(own) - 1)
        is_held_out[rows] = torch.isin(members[rows], chosen[:num_chosen])
    if not is_held_out.any():
        raise ValueError(
            "a choice on held-out training images needs a class of at least 2 images, or a validation split"
        )
    split_by: SplitBy = "image"
    if groups is not None:
        split_by = "caption or image" if splits_groups else "caption"
    return HeldOut((~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten(), split_by)


def _find_strata(labels: Tensor) -> Tensor:
    """The class of each image, of several the rarest; C where it shows none. Int64 [N]."""
    if labels.ndim == 1:
        return labels.long()
    labels = labels.bool()
    rarity = torch.where(labels, labels.sum(dim=0), len(labels) + 1)
    return rarity.argmin(dim=1).masked_fill(~labels.any(dim=1), labels.shape[1])


def _find_strata_of_groups(strata: Tensor, units: Tensor) -> Tensor:
    """The rarest class of each image's group, [N]; of equally rare ones the lowest."""
    rarity = strata.bincount()[strata] * (strata.max() + 1) + strata
    rarest = torch.full_like(units, torch.iinfo(torch.int64).max)
    rarest.scatter_reduce_(0, units, rarity, "amin")
    return rarest[units] % (strata.max() + 1)
