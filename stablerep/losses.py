"""The multi-positive contrastive loss of StableRep (Tian et al., NeurIPS 2023, arXiv 2306.00984, section 3).

For anchor i with normalised embedding z_i, s_ij = z_i·z_j / τ, and P(i) the other images of i's caption,

    q_ij = exp(s_ij) / Σ_{k≠i} exp(s_ik)         the contrastive distribution
    p_ij = [j ∈ P(i)] / |P(i)|                   the ground truth: uniform over the caption's other images
    loss_i = H(p_i, q_i) = logsumexp_{j≠i} s_ij − mean_{p∈P(i)} s_ip

The last form needs no N×N mask, because Σ_{p∈P(i)} z_p = (sum over i's caption) − z_i.

    paper   here            meaning
    τ       temperature
    N       num_images      images in the step, over all ranks
    m       -               images of a caption; may differ from caption to caption
    z       embeddings      output of the projection head
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stablerep.distributed import (
    all_gather_rows,
    all_gather_with_gradient,
    gather_sizes,
    is_distributed,
    rank,
    world_size,
)

_SMALLEST_SQUARED_NORM = 1e-12


class ContrastiveLoss(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: Scalar; the mean over ranks is the loss of the whole step.
        num_anchors_without_positive: Anchors of this rank that the mean leaves out, as no other image
            of the step shares their caption.
    """

    loss: Tensor
    num_anchors_without_positive: Tensor


def normalize_embeddings(embeddings: Tensor) -> Tensor:
    """x / ‖x‖ in float32 (float64 stays); a zero vector stays zero and gets a zero gradient.

    Shapes:
        [..., D] -> [..., D]
    """
    x = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    squared_norm = x.square().sum(dim=-1, keepdim=True)
    is_zero = squared_norm <= _SMALLEST_SQUARED_NORM
    inverse_norm = squared_norm.masked_fill(is_zero, 1.0).rsqrt().masked_fill(is_zero, 0.0)
    return x * inverse_norm


def multi_positive_contrastive_loss(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.1
) -> ContrastiveLoss:
    """mean_i [ logsumexp_{j≠i} s_ij − mean_{p∈P(i)} s_ip ], s = z zᵀ / temperature.

    Each rank holds its own rows against the columns of all ranks. A rank returns
    world_size · Σ_local loss_i / (number of anchors with a positive, over all ranks): the mean over ranks is
    the single-process loss, and the gradient that DDP averages is the single-process gradient, also when
    ranks hold unequal numbers of images. With two views per label this is NT-Xent.

    Args:
        embeddings: Output of the projection head for this rank's images, not normalised, any float dtype;
            the loss is computed in float32 (float64 for float64) inside any autocast.
        labels: Integer label of each image; equal labels are positives, wherever in the step they stand.
        temperature: τ, above 0.

    Shapes:
        embeddings [N_local, D], labels [N_local] -> scalar

    Returns:
        The loss and the number of this rank's anchors without a positive, which the mean leaves out.

    Raises:
        ValueError: If temperature is not above 0 or the shapes do not match.

    Reference:
        Tian et al., StableRep, arXiv 2306.00984, section 3.2, equations 1 to 3.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must be [N, D] and labels [N], got {list(embeddings.shape)}, {list(labels.shape)}"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        z = normalize_embeddings(embeddings)  # [N_local, D]
        columns = all_gather_with_gradient(z)  # [N, D]
        column_labels = all_gather_rows(labels)  # [N]
        first = sum(gather_sizes(z.shape[0], z.device)[: rank()])
        own = torch.arange(first, first + z.shape[0], device=z.device)  # own column of each row

        _, caption, caption_size = column_labels.unique(return_inverse=True, return_counts=True)
        num_positives = caption_size[caption[own]] - 1  # [N_local]
        has_positive = num_positives > 0

        s = z @ columns.T / temperature  # [N_local, N]
        s[torch.arange(z.shape[0], device=z.device), own] = -torch.inf  # j ≠ i
        log_normaliser = torch.logsumexp(s[has_positive], dim=1)

        caption_sum = columns.new_zeros(len(caption_size), z.shape[1]).index_add(0, caption, columns)
        positive_sum = caption_sum[caption[own]] - z
        positive_mean = (z * positive_sum).sum(dim=1) / num_positives.clamp(min=1) / temperature

        losses = log_normaliser - positive_mean[has_positive]
        num_anchors = has_positive.sum()
        if is_distributed():
            dist.all_reduce(num_anchors)
        # `0 * z.sum()` keeps every rank in the backward's collective when it has no anchor of its own.
        loss = (losses.sum() + 0.0 * columns.sum()) * world_size() / num_anchors.clamp(min=1)
    return ContrastiveLoss(loss, (~has_positive).sum())
