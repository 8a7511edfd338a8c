"""Intervals against SciPy, a naive bootstrap, and their coverage."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from stablerep.evaluation.statistics import paired_difference, wilson_interval


@pytest.mark.parametrize(("num_correct", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (372, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_interval_equals_scipy(num_correct: int, n: int, confidence: float) -> None:
    oracle = binomtest(num_correct, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(num_correct, n, confidence=confidence) == pytest.approx(
        (oracle.low, oracle.high), abs=1e-12
    )


def draw_pair(n: int, only_a: float, only_b: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = (1 - only_a - only_b) / 2
    draws = np.random.default_rng(seed).choice(4, size=n, p=[only_a, only_b, both, both])
    return torch.from_numpy((draws == 0) | (draws == 2)), torch.from_numpy((draws == 1) | (draws == 2))


def test_paired_interval_equals_a_naive_bootstrap() -> None:
    a, b = draw_pair(2000, 0.2, 0.12, seed=1)
    result = paired_difference(a, b)
    differences = a.numpy().astype(float) - b.numpy()
    random = np.random.default_rng(0)
    means = [differences[random.integers(0, 2000, 2000)].mean() for _ in range(4000)]
    assert result.difference == pytest.approx(differences.mean())
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=2e-3)


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(1000):
        result = paired_difference(*draw_pair(150, 0.15, 0.1, seed))
        covered += result.low <= 0.05 <= result.high
    assert 0.93 <= covered / 1000 <= 0.975


def test_paired_interval_changes_sign_with_the_order() -> None:
    a, b = draw_pair(100, 0.3, 0.1, seed=2)
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert (backward.difference, backward.low, backward.high) == pytest.approx(
        (-forward.difference, -forward.high, -forward.low)
    )


def test_paired_interval_of_equal_predictions_holds_zero_and_has_width() -> None:
    correct = torch.tensor([True, False, True])
    result = paired_difference(correct, correct)
    assert result.difference == 0
    assert result.low < 0 < result.high


def test_arguments_out_of_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_correct must be in \[0, 3\], got 4"):
        wilson_interval(4, 3)
    with pytest.raises(ValueError, match="num_examples must be >= 1, got 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1"):
        wilson_interval(1, 3, confidence=1)
    with pytest.raises(ValueError, match=r"got \[3\] and \[2\]"):
        paired_difference(torch.ones(3), torch.ones(2))
