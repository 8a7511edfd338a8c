"""Alignment, uniformity, RankMe, LiDAR and the spectrum against closed forms, naive loops and NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stablerep.collapse import NUM_EMBEDDINGS_FOR_RANK
from stablerep.collapse import rank_me as rank_me_in_training
from stablerep.evaluation import geometry
from stablerep.evaluation.config import GeometryConfig
from stablerep.evaluation.geometry import alignment, covariance_spectrum, lidar, rank_me, uniformity


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# 0 to 9 with three images, 10 to 14 with two, 20 alone: numbers that are no indices, in no order.
CAPTION_IDS = torch.tensor([*(7 * i for i in range(10)), 3000] + [7 * i for i in range(15)] * 2)[
    torch.randperm(41, generator=torch.Generator().manual_seed(1))
]


def test_rank_is_of_as_many_images_as_published() -> None:
    assert GeometryConfig().num_images == 25_600  # RankMe, section 3.1


def test_alignment_of_identical_pairs_is_zero_and_of_opposite_ones_four() -> None:
    features, ids = draw(10, 5), torch.arange(10).repeat(3)
    identical = alignment(features.repeat(3, 1) * torch.rand(30, 1).double().add(0.1), ids)
    assert identical.value == pytest.approx(0, abs=1e-12)
    assert alignment(torch.cat([features, -2 * features]), ids[:20]).value == pytest.approx(4)


def test_alignment_equals_a_naive_loop_over_pairs() -> None:
    features = draw(41, 6)
    unit = torch.nn.functional.normalize(features, dim=1)
    distances = [
        float((unit[i] - unit[j]).square().sum())
        for i, j in itertools.combinations(range(41), 2)
        if CAPTION_IDS[i] == CAPTION_IDS[j]
    ]
    result = alignment(features, CAPTION_IDS)
    assert result.value == pytest.approx(np.mean(distances), rel=1e-12)
    assert (result.num_pairs, result.num_captions, result.num_images_alone) == (10 * 3 + 5, 15, 1)


def test_uniformity_equals_torchs_pairwise_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    features = draw(50, 6)
    unit = torch.nn.functional.normalize(features, dim=1)
    for t in (0.5, 2.0, 900.0):
        oracle = float(torch.logsumexp(-t * torch.pdist(unit).square(), dim=0)) - math.log(50 * 49 / 2)
        assert uniformity(features, t=t).value == pytest.approx(oracle, rel=1e-9)
    whole = uniformity(features).value
    for size in (1, 49 * 50, 120):
        monkeypatch.setattr(geometry, "MAX_DISTANCES_IN_MEMORY", size)
        assert uniformity(features).value == pytest.approx(whole, rel=1e-12)


def test_uniformity_has_its_closed_forms() -> None:
    assert uniformity(torch.ones(20, 3)).value == pytest.approx(0, abs=1e-12)
    # All pairs of orthogonal vectors are √2 apart.
    assert uniformity(torch.eye(9), t=2).value == pytest.approx(-4)
    # Of exp(−‖x − y‖²) over the circle: ∫ exp(−2 + 2 cos φ) dφ / 2π = e⁻² I₀(2).
    angles = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)[:-1]
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    expected = math.log(float(torch.special.i0e(torch.tensor(2.0, dtype=torch.float64))))
    assert uniformity(circle, t=1).value == pytest.approx(expected, rel=1e-3)


def test_samples_stand_for_the_whole_and_come_from_their_seed() -> None:
    features = draw(3000, 8)
    whole, part = uniformity(features), uniformity(features, num_samples=1000, seed=3)
    assert (whole.num_features, part.num_features) == (3000, 1000)
    assert part.value == pytest.approx(whole.value, rel=0.02)
    assert part == uniformity(features, num_samples=1000, seed=3)
    assert part != uniformity(features, num_samples=1000, seed=4)
    assert uniformity(features, num_samples=None) == whole
    assert rank_me(features, num_samples=500).num_features == 500


def test_rank_me_of_an_isotropic_gaussian_is_near_the_width() -> None:
    assert rank_me(draw(20_000, 32)).value == pytest.approx(32, rel=1e-3)
    # Singular values of a Gaussian matrix spread, so of few features less comes out.
    assert 25 < rank_me(draw(64, 32)).value < 31.5


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_rank_me_of_evenly_used_directions_is_their_number(rank: int) -> None:
    basis, _ = torch.linalg.qr(draw(200, rank))
    axes, _ = torch.linalg.qr(draw(50, rank, seed=1))
    # 10⁻⁷ is added to each of 50 shares, and 50 · 10⁻⁷ · log 10⁷ is 8 · 10⁻⁵.
    assert rank_me(basis @ axes.T).value == pytest.approx(rank, rel=2e-4)


def test_rank_me_is_the_exponential_of_the_entropy_and_has_no_scale() -> None:
    x = draw(60, 10) * torch.logspace(0, -3, 10, dtype=torch.float64)
    sigma = np.linalg.svd(x.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    oracle = np.exp(-(p * np.log(p)).sum())
    assert rank_me(x).value == pytest.approx(oracle, rel=1e-12)
    assert rank_me(1e-6 * x).value == pytest.approx(oracle, rel=1e-5)


def test_rank_me_agrees_with_the_figure_of_training() -> None:
    x = draw(NUM_EMBEDDINGS_FOR_RANK, 24).float()
    assert rank_me(x).value == pytest.approx(float(rank_me_in_training(x)), rel=1e-4)


def naive_lidar(x: np.ndarray, ids: np.ndarray, delta: float) -> float:
    groups = [x[ids == i] for i in np.unique(ids) if (ids == i).sum() > 1]
    means = np.stack([group.mean(axis=0) for group in groups])
    between = np.cov(means.T)
    within = np.mean([np.cov(group.T) for group in groups], axis=0) + delta * np.eye(x.shape[1])
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(min=0)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("width", [6, 30])
def test_lidar_equals_its_definition_in_numpy(width: int) -> None:
    offsets = draw(15, width, seed=2) * torch.logspace(0, -1, width, dtype=torch.float64)
    _, index = CAPTION_IDS.clamp(max=98).unique(return_inverse=True)
    x = offsets[index] + 0.3 * draw(41, width)
    for delta in (1e-4, 0.5):
        result = lidar(x, CAPTION_IDS, delta=delta)
        oracle = naive_lidar(x.numpy(), CAPTION_IDS.numpy(), delta)
        assert result.value == pytest.approx(oracle, rel=1e-6)
        assert (result.num_captions, result.num_images_alone) == (15, 1)


def test_lidar_counts_the_directions_in_which_captions_differ() -> None:
    # Captions differ evenly in 4 directions; the other 12 hold the same noise in every caption.
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    ids = torch.arange(16).repeat_interleave(24)
    noise = torch.cat([torch.eye(12), -torch.eye(12)]).double().repeat(16, 1)
    x = torch.cat([corners[ids], noise], dim=1)
    assert lidar(x, ids).value == pytest.approx(4, rel=1e-4)
    # RankMe takes the noise for directions in use.
    assert rank_me(x).value > 8


def test_lidar_ignores_an_invertible_map_but_for_delta() -> None:
    ids = torch.arange(12).repeat(20)
    x = draw(12, 5, seed=3)[ids] + draw(240, 5)
    mixed = x @ (draw(5, 5, seed=4) + 3 * torch.eye(5)) + 10
    assert lidar(mixed, ids, delta=1e-12).value == pytest.approx(lidar(x, ids, delta=1e-12).value, rel=1e-6)


def test_spectrum_is_that_of_numpys_covariance() -> None:
    x = draw(40, 9) * torch.arange(1, 10) + 5
    result = covariance_spectrum(x.float())
    oracle = np.linalg.eigvalsh(np.cov(x.float().double().numpy().T))[::-1]
    np.testing.assert_allclose(result.eigenvalues.numpy(), oracle, rtol=1e-9)
    assert result.participation_ratio == pytest.approx(oracle.sum() ** 2 / (oracle**2).sum())


def test_spectrum_has_its_closed_forms() -> None:
    even = covariance_spectrum(torch.cat([torch.eye(6), -torch.eye(6)])[:, :6])
    assert even.eigenvalues.tolist() == pytest.approx([2 / 11] * 6)
    assert even.participation_ratio == pytest.approx(6)
    constant = covariance_spectrum(torch.ones(5, 3))
    assert (constant.eigenvalues.tolist(), constant.participation_ratio) == ([0, 0, 0], 0)
    # More dimensions than images, and one dimension alone.
    assert int((covariance_spectrum(draw(4, 10)).eigenvalues > 1e-9).sum()) == 3
    assert covariance_spectrum(torch.tensor([[1.0], [3.0]])).eigenvalues.tolist() == [2]


def test_arguments_out_of_bounds_are_refused() -> None:
    x, ids = draw(10, 4), torch.arange(5).repeat(2)
    with pytest.raises(ValueError, match=r"caption_ids must be \[10\], got \[9\]"):
        alignment(x, ids[1:])
    with pytest.raises(ValueError, match="alignment needs two images of one caption, got none"):
        alignment(x, torch.arange(10))
    with pytest.raises(ValueError, match="captions with two images or more must be >= 2 for LiDAR, got 1"):
        lidar(x[:6], torch.tensor([0, 1, 2, 3, 4, 0]))
    with pytest.raises(ValueError, match="delta must be > 0, got 0"):
        lidar(x, ids, delta=0)
    with pytest.raises(ValueError, match="t must be > 0, got -1"):
        uniformity(x, t=-1)
    with pytest.raises(ValueError, match="num_samples must be >= 1 or None, got 0"):
        rank_me(x, num_samples=0)
    with pytest.raises(ValueError, match="features for uniformity must be >= 2, got 1"):
        uniformity(x, num_samples=1)
    with pytest.raises(ValueError, match="features for a covariance must be >= 2, got 1"):
        covariance_spectrum(x[:1])
    with pytest.raises(ValueError, match=r"features must be \[N, D\] with N, D >= 1, got \[10\]"):
        rank_me(x[:, 0])
    zero = x.clone()
    zero[2] = 0
    with pytest.raises(ValueError, match="features must be other than zero to have a direction, got 1"):
        alignment(zero, ids)
    x[3, 1] = torch.inf
    for protocol in (uniformity, rank_me, covariance_spectrum):
        with pytest.raises(ValueError, match="features must be finite, got 1 of 10"):
            protocol(x)
