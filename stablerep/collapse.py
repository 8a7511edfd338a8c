"""Figures that fall when embeddings collapse to a point or to a few directions."""

import torch
from torch import Tensor

from stablerep.losses import normalize_embeddings

NUM_EMBEDDINGS_FOR_RANK = 1024
_EPSILON = 1e-7


def embedding_std(embeddings: Tensor) -> Tensor:
    """√D · mean standard deviation of the unit embeddings' dimensions: 1 when spread evenly, 0 in a point.

    Shapes:
        [N, D] -> []
    """
    return normalize_embeddings(embeddings).std(dim=0).mean() * embeddings.shape[1] ** 0.5


def smooth_rank(values: Tensor) -> Tensor:
    """exp(−Σ_k p_k log p_k), p_k = v_k / Σ v + 10⁻⁷: how many of the values are large, without a threshold.

    Of k equal values among zeros k comes out, of all zeros a number near 1. The 10⁻⁷ is not taken off again,
    as published.

    Args:
        values: Singular values or eigenvalues, >= 0.

    Shapes:
        [K] -> []

    Reference:
        Garrido et al., RankMe, arXiv 2210.02885, section 3.1.
    """
    p = values / values.sum().clamp(min=_EPSILON) + _EPSILON
    return torch.exp(-(p * p.log()).sum())


def rank_me(embeddings: Tensor) -> Tensor:
    """`smooth_rank` of the singular values: how many directions the embeddings use.

    At most min(N, D) comes out. Of more than `NUM_EMBEDDINGS_FOR_RANK` embeddings, as many are taken, at even
    distances. `stablerep.evaluation.geometry.rank_me` takes more of them, in float64.

    Shapes:
        [N, D] -> []

    Reference:
        Garrido et al., RankMe, arXiv 2210.02885, section 3.1.
    """
    rows = embeddings[:: -(-len(embeddings) // NUM_EMBEDDINGS_FOR_RANK)].float()
    return smooth_rank(torch.linalg.svdvals(rows))


def positives_per_anchor(labels: Tensor, queue_labels: Tensor | None = None) -> Tensor:
    """Mean over images of how many others share the label, those of the queue among them.

    Shapes:
        labels [N], queue_labels [Q] -> []
    """
    columns = labels if queue_labels is None else torch.cat([labels, queue_labels])
    _, numbers, counts = columns.unique(return_inverse=True, return_counts=True)
    return (counts[numbers[: len(labels)]] - 1).float().mean()
