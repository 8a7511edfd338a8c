"""Intervals and tests against SciPy, a naive bootstrap, and their coverage."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, bootstrap
from scipy.stats import t as student

from stablerep.evaluation import statistics
from stablerep.evaluation.statistics import (
    bootstrap_difference,
    bootstrap_indices,
    bootstrap_kinds,
    mcnemar_test,
    paired_difference,
    summarize_seeds,
    wilson_interval,
)


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


@pytest.mark.parametrize("kind", ["right or wrong", "continuous"])
def test_bootstrap_equals_scipy(kind: str) -> None:
    a, b = (correct.double() for correct in draw_pair(400, 0.2, 0.12, seed=3))
    if kind == "continuous":
        a, b = a + torch.rand(400, dtype=torch.float64), b + torch.rand(400, dtype=torch.float64)
    result = bootstrap_difference(a, b, num_resamples=20_000)
    oracle = bootstrap(
        (a.numpy(), b.numpy()),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        batch=1000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert result.difference == pytest.approx(float(a.mean() - b.mean()))
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high), abs=3e-3)


def test_bootstrap_of_counts_equals_that_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = statistics._draw_resamples, list[int]()

    def count(num_examples: int, num_resamples: int, seed: int) -> Iterator[torch.Tensor]:
        calls.append(num_resamples)
        return draw(num_examples, num_resamples, seed)

    monkeypatch.setattr(statistics, "_draw_resamples", count)
    a, b = (correct.double() for correct in draw_pair(500, 0.2, 0.1, seed=4))
    by_counts = bootstrap_difference(a, b, num_resamples=20_000)
    monkeypatch.setattr(statistics, "MAX_DISTINCT_DIFFERENCES", 0)
    assert calls == []
    by_examples = bootstrap_difference(a, b, num_resamples=20_000)
    assert calls == [20_000]
    assert (by_counts.low, by_counts.high) == pytest.approx((by_examples.low, by_examples.high), abs=2.1e-3)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(600):
        a, b = draw_pair(150, 0.15, 0.1, seed)
        result = bootstrap_difference(a.double(), b.double(), num_resamples=1000)
        covered += result.low <= 0.05 <= result.high
    assert 0.92 <= covered / 600 <= 0.975


def test_bootstrap_follows_its_seed_and_not_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.rand(2, 301, dtype=torch.float64)
    results = [bootstrap_difference(a, b, num_resamples=999, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0] != results[2]
    monkeypatch.setattr(statistics, "MAX_DRAWS_IN_MEMORY", 10 * 301)
    in_chunks = bootstrap_difference(a, b, num_resamples=999, seed=0)
    assert (in_chunks.low, in_chunks.high) == pytest.approx((results[0].low, results[0].high), abs=1e-12)


def test_bootstrap_of_a_metric_equals_a_naive_loop_over_the_same_draws() -> None:
    random = np.random.default_rng(5)
    a, b = random.random(60), random.random(60)

    def difference(indices: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(a)[indices].median(dim=1).values - torch.from_numpy(b)[indices].std(dim=1)

    result = bootstrap_indices(difference, 60, num_resamples=500, seed=7)
    draws = np.random.default_rng(7).integers(60, size=(500, 60))
    naive = [np.sort(a[row])[29] - b[row].std(ddof=1) for row in draws]
    assert result.value == pytest.approx(np.sort(a)[29] - b.std(ddof=1))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])))


def test_bootstrap_of_equal_scores_has_no_width() -> None:
    scores = torch.rand(50)
    result = bootstrap_difference(scores, scores)
    assert (result.difference, result.low, result.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 1), (1, 0), (3, 3), (1, 1), (0, 12), (7, 19), (40, 25), (501, 430), (900, 2)]
)
def test_mcnemar_equals_scipy(only_a: int, only_b: int) -> None:
    a = torch.cat([torch.ones(only_a + 9), torch.zeros(only_b + 5)]).bool()
    b = torch.cat([torch.zeros(only_a), torch.ones(9 + only_b), torch.zeros(5)]).bool()
    result = mcnemar_test(a, b)
    n = only_a + only_b
    assert (result.num_only_a_correct, result.num_only_b_correct) == (only_a, only_b)
    assert result.p_value == pytest.approx(binomtest(only_a, n).pvalue, rel=1e-9)
    smaller = min(only_a, only_b)
    below = binom.cdf(smaller - 1, n, 0.5) + 0.5 * binom.pmf(smaller, n, 0.5)
    expected = 1 - 0.5 * binom.pmf(only_a, n, 0.5) if only_a == only_b else 2 * below
    assert result.mid_p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_disagreement_is_one() -> None:
    correct = torch.tensor([True, False])
    assert mcnemar_test(correct, correct).p_value == 1
    assert mcnemar_test(correct, correct).mid_p_value == 1


def test_mcnemar_of_many_examples_is_exact() -> None:
    """Where 2ⁿ is beyond any float."""
    a = torch.arange(5000) < 2600
    result = mcnemar_test(a, ~a)
    assert result.p_value == pytest.approx(binomtest(2600, 5000).pvalue, rel=1e-9)
    one_sided = mcnemar_test(torch.arange(5000) < 4990, torch.arange(5000) >= 4990)
    assert (one_sided.p_value, one_sided.mid_p_value) == (0, 0)  # about 10⁻¹⁴⁷⁰, which is below every float


@pytest.mark.parametrize("num_seeds", [2, 3, 4, 5, 10, 31])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_interval_over_seeds_equals_scipy(num_seeds: int, confidence: float) -> None:
    values = np.random.default_rng(num_seeds).normal(0.7, 0.02, num_seeds)
    result = summarize_seeds(values.tolist(), confidence=confidence)
    scale = values.std(ddof=1) / np.sqrt(num_seeds)
    expected = student.interval(confidence, num_seeds - 1, loc=values.mean(), scale=scale)
    assert (result.low, result.high) == pytest.approx(tuple(expected), rel=1e-9)
    assert (result.mean, result.standard_deviation) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert result.num_seeds == num_seeds


def test_arguments_of_resampling_and_tests_out_of_bounds_are_refused() -> None:
    scores = torch.rand(5)
    with pytest.raises(ValueError, match=r"must be \[N\] with N >= 1, got \[5\] and \[4\]"):
        bootstrap_difference(scores, scores[:4])
    with pytest.raises(ValueError, match="num_resamples must be >= 100, got 99"):
        bootstrap_difference(scores, scores, num_resamples=99)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        bootstrap_difference(scores, scores, confidence=95)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        bootstrap_difference(scores, scores, seed=-1)
    with pytest.raises(ValueError, match="must be finite, that of example 2 is not"):
        bootstrap_difference(scores, torch.tensor([0, 0, torch.nan, 0, 0]))
    with pytest.raises(ValueError, match="counts must be of >= 1 examples, got 0"):
        bootstrap_kinds(lambda counts: counts[:, 0], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_examples must be >= 1, got 0"):
        bootstrap_indices(lambda indices: indices[:, 0], 0)
    with pytest.raises(ValueError, match="the metric of a resample is not finite"):
        bootstrap_indices(lambda indices: indices[:, 0] / 0, 3)
    with pytest.raises(ValueError, match=r"must be \[N\], got \[5\] and \[4\]"):
        mcnemar_test(scores > 0, scores[:4] > 0)
    with pytest.raises(ValueError, match="an interval over seeds needs >= 2 values, got 1"):
        summarize_seeds([0.5])
    with pytest.raises(ValueError, match="must be finite"):
        summarize_seeds([0.5, float("nan")])
