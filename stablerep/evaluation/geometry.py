"""The shape of a set of features, without labels of classes: how close, how spread, in how many directions.

Features are taken as they come (float64 throughout); alignment and uniformity look at x / ‖x‖.

    alignment     mean over pairs (x, y) of one caption of ‖x − y‖²: 0 where a caption's images coincide
    uniformity    log mean over distinct pairs of exp(−t ‖x − y‖²), t = 2: the lower, the more evenly spread
    RankMe        smooth rank of the singular values
    LiDAR         smooth rank of the between-caption covariance, whitened by that within captions
    spectrum      eigenvalues of the covariance

The smooth rank is `stablerep.collapse.smooth_rank`.

Reference: Wang and Isola, arXiv 2005.10242 (alignment with α = 2, uniformity); Garrido et al., RankMe, arXiv
2210.02885; Thilak et al., LiDAR, arXiv 2312.04000.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stablerep.collapse import smooth_rank

MAX_DISTANCES_IN_MEMORY = 2**24  # 128 MiB of float64 distances at a time
NUM_SAMPLES_FOR_UNIFORMITY = 10_000
NUM_SAMPLES_FOR_RANK = 25_600  # as in RankMe, section 3.1


class Alignment(NamedTuple):
    """What `alignment` returns.

    Attributes:
        value: Mean squared distance, in [0, 4].
        num_pairs: Pairs that it is the mean of.
        num_captions: Captions with two images or more.
        num_images_alone: Images that nothing shares the caption of; they are left out.
    """

    value: float
    num_pairs: int
    num_captions: int
    num_images_alone: int


class Uniformity(NamedTuple):
    """What `uniformity` returns.

    Attributes:
        value: In [−4 t, 0]; 0 when all features point in one direction.
        num_features: Features of which all pairs were taken.
    """

    value: float
    num_features: int


class SmoothRank(NamedTuple):
    """What `rank_me` returns.

    Attributes:
        value: Between 1 and min(num_features, D), up to the published 10⁻⁷.
        num_features: Features that it was computed of; with fewer than D, it cannot reach D.
    """

    value: float
    num_features: int


class Lidar(NamedTuple):
    """What `lidar` returns.

    Attributes:
        value: Between 1 and min(num_captions − 1, D), up to the published 10⁻⁷.
        num_captions: Captions with two images or more.
        num_images_alone: Images that nothing shares the caption of; they are left out.
    """

    value: float
    num_captions: int
    num_images_alone: int


class Spectrum(NamedTuple):
    """What `covariance_spectrum` returns.

    Attributes:
        eigenvalues: Of the covariance, from the largest, >= 0, float64 [D].
        participation_ratio: (Σ λ)² / Σ λ²: k for k equal eigenvalues among zeros; 0 without any variance.
    """

    eigenvalues: Tensor
    participation_ratio: float


def alignment(features: Tensor, caption_ids: Tensor) -> Alignment:
    """Mean of ‖x − y‖² over all pairs of images that share a caption, x and y of unit length.

    Of a caption with k images and mean x̄, Σ_{i<j} ‖x_i − x_j‖² = k Σ_i ‖x_i − x̄‖², so no pair is formed.
    Every pair counts alike: a caption with more images weighs more.

    Args:
        features: The features of the images.
        caption_ids: Whole numbers; equal ones mean one caption.

    Shapes:
        features [N, D], caption_ids [N].

    Raises:
        ValueError: If the shapes do not match, a feature is not finite or is zero, or no two images share a
            caption.

    Reference:
        Wang and Isola, arXiv 2005.10242, section 4.1, with α = 2.
    """
    x, captions, counts, num_alone = _keep_shared(_unit(features), caption_ids)
    if len(counts) == 0:
        raise ValueError("alignment needs two images of one caption, got none")
    deviations = x - _means(x, captions, counts)[captions]
    sums = counts.new_zeros(len(counts)).index_add_(0, captions, deviations.square().sum(dim=1))
    num_pairs = int((counts * (counts - 1)).sum()) // 2
    return Alignment(float((counts * sums).sum()) / num_pairs, num_pairs, len(counts), num_alone)


def uniformity(
    features: Tensor, *, t: float = 2.0, num_samples: int | None = NUM_SAMPLES_FOR_UNIFORMITY, seed: int = 0
) -> Uniformity:
    """log mean of exp(−t ‖x − y‖²) over the pairs of distinct rows, x and y of unit length.

    Args:
        features: The features of the images.
        t: Sharpness of the kernel, > 0.
        num_samples: Of more features, as many are drawn without replacement; None takes all. The time goes
            with its square.
        seed: Seed of that draw.

    Shapes:
        features [N, D] with N >= 2.

    Raises:
        ValueError: If an argument is out of its bounds, or a feature is zero or not finite.

    Reference:
        Wang and Isola, arXiv 2005.10242, section 4.1.
    """
    if not t > 0:
        raise ValueError(f"t must be > 0, got {t}")
    x = _unit(_draw(_check(features), num_samples, seed))
    if len(x) < 2:
        raise ValueError(f"features for uniformity must be >= 2, got {len(x)}")
    num_rows_per_slice = max(1, MAX_DISTANCES_IN_MEMORY // len(x))
    sums = []
    for start in range(0, len(x) - 1, num_rows_per_slice):
        rows, others = x[start : start + num_rows_per_slice], x[start:]
        exponents = -t * (2 - 2 * (rows @ others.T)).clamp(min=0)  # ‖x − y‖² of unit vectors
        later = torch.ones_like(exponents, dtype=torch.bool).triu(diagonal=1)
        sums.append(exponents.masked_fill_(~later, -torch.inf).flatten().logsumexp(dim=0))
    log_num_pairs = math.log(len(x) * (len(x) - 1) / 2)
    return Uniformity(float(torch.stack(sums).logsumexp(dim=0)) - log_num_pairs, len(x))


def rank_me(features: Tensor, *, num_samples: int | None = NUM_SAMPLES_FOR_RANK, seed: int = 0) -> SmoothRank:
    """Smooth rank of the singular values σ of the features, neither centred nor normalised.

        exp(−Σ_k p_k log p_k),        p_k = σ_k / Σ σ + 10⁻⁷,        k = 1 … min(N, D)

    Args:
        features: The features of the images.
        num_samples: Of more features, as many are drawn without replacement; None takes all.
        seed: Seed of that draw.

    Shapes:
        features [N, D] with N >= 1.

    Raises:
        ValueError: If an argument is out of its bounds, or a feature is not finite.

    Reference:
        Garrido et al., RankMe, arXiv 2210.02885, section 3.1.
    """
    x = _draw(_check(features), num_samples, seed).double()
    return SmoothRank(float(smooth_rank(torch.linalg.svdvals(x))), len(x))


def lidar(features: Tensor, caption_ids: Tensor, *, delta: float = 1e-4) -> Lidar:
    """Smooth rank of Σ_w^{-1/2} Σ_b Σ_w^{-1/2}, captions as the classes of linear discriminant analysis.

    Of n captions, k_i images x_ij of caption i with mean x̄_i, and μ the mean of the n means,

        Σ_b = 1/(n − 1) Σ_i (x̄_i − μ)(x̄_i − μ)ᵀ
        Σ_w = 1/n Σ_i 1/(k_i − 1) Σ_j (x_ij − x̄_i)(x_ij − x̄_i)ᵀ + δ I
        exp(−Σ_k p_k log p_k),        p_k = λ_k / Σ λ + 10⁻⁷,        k = 1 … D

    λ are the eigenvalues of Σ_w^{-1/2} Σ_b Σ_w^{-1/2}. In the paper every class has q views of one image;
    here it has the images of one caption, and their number may differ: each caption weighs alike.

    Args:
        features: The features of the images, neither centred nor normalised by this function; δ is on their
            scale.
        caption_ids: Whole numbers; equal ones mean one caption.
        delta: δ, > 0.

    Shapes:
        features [N, D], caption_ids [N].

    Raises:
        ValueError: If the shapes do not match, a feature is not finite, δ is out of its bounds, or fewer than
            two captions have two images.

    Reference:
        Thilak et al., LiDAR, arXiv 2312.04000, section 3.
    """
    if not delta > 0:
        raise ValueError(f"delta must be > 0, got {delta}")
    x, captions, counts, num_alone = _keep_shared(_check(features).double(), caption_ids)
    if (num_captions := len(counts)) < 2:
        raise ValueError(f"captions with two images or more must be >= 2 for LiDAR, got {num_captions}")
    means = _means(x, captions, counts)
    deviations = (x - means[captions]) / (num_captions * (counts - 1)).sqrt()[captions, None]
    within = deviations.T @ deviations
    within.diagonal().add_(delta)
    between = (means - means.mean(dim=0)) / math.sqrt(num_captions - 1)  # Σ_b = betweenᵀ between
    # With Σ_w = L Lᵀ, the λ are the squared singular values of L⁻¹ betweenᵀ, and none comes out negative.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)
    eigenvalues = torch.linalg.svdvals(whitened).square()
    zeros = eigenvalues.new_zeros(x.shape[1] - len(eigenvalues))  # Σ_b has at most n − 1 that are none
    return Lidar(float(smooth_rank(torch.cat([eigenvalues, zeros]))), num_captions, num_alone)


def covariance_spectrum(features: Tensor) -> Spectrum:
    """Eigenvalues of the covariance 1/(N − 1) Σ (x − x̄)(x − x̄)ᵀ, from the largest.

    Shapes:
        features [N, D] with N >= 2.

    Raises:
        ValueError: If there are fewer than two features, or one is not finite.
    """
    if len(_check(features)) < 2:
        raise ValueError(f"features for a covariance must be >= 2, got {len(features)}")
    covariance = features.double().T.cov()
    values = torch.linalg.eigvalsh(covariance.reshape(features.shape[1], -1)).flip(0).clamp(min=0)
    squares = float(values.square().sum())
    return Spectrum(values, float(values.sum()) ** 2 / squares if squares > 0 else 0.0)


def _check(features: Tensor) -> Tensor:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features must be [N, D] with N, D >= 1, got {list(features.shape)}")
    if not (finite := features.isfinite().all(dim=1)).all():
        raise ValueError(
            f"features must be finite, got {int((~finite).sum())} of {len(features)} that are not"
        )
    return features


def _unit(features: Tensor) -> Tensor:
    x = _check(features).double()
    if num_zero := int((x == 0).all(dim=1).sum()):
        raise ValueError(
            f"features must be other than zero to have a direction, got {num_zero} that are zero"
        )
    return F.normalize(x, dim=1, eps=0.0)


def _draw(features: Tensor, num_samples: int | None, seed: int) -> Tensor:
    if num_samples is None or (num_samples >= len(features) and num_samples >= 1):
        return features
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1 or None, got {num_samples}")
    chosen = np.random.default_rng(seed).choice(len(features), num_samples, replace=False)
    return features[torch.from_numpy(chosen).to(features.device)]


def _keep_shared(x: Tensor, caption_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The rows whose caption another row shares, their captions as 0 … n − 1, n counts, and how many go."""
    if caption_ids.shape != x.shape[:1]:
        raise ValueError(f"caption_ids must be [{len(x)}], got {list(caption_ids.shape)}")
    _, inverse, counts = caption_ids.to(x.device).unique(return_inverse=True, return_counts=True)
    shared = counts[inverse] > 1
    _, captions = inverse[shared].unique(return_inverse=True)
    return x[shared], captions, counts[counts > 1].to(x), int((~shared).sum())


def _means(x: Tensor, captions: Tensor, counts: Tensor) -> Tensor:
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, captions, x)
    return sums / counts[:, None]
