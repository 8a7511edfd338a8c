"""Intervals of metrics and of their differences, in closed form and by resampling, and McNemar's test."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
import torch
from torch import Tensor

MAX_DRAWS_IN_MEMORY = 2**22
"""Indices or counts of resamples held at a time: 32 MiB."""
MAX_DISTINCT_DIFFERENCES = 256
"""So many values of a per-example difference are counted; more are drawn one example at a time."""


@dataclass(frozen=True)
class Estimate:
    """A metric on the examples, and its percentile interval over resamples of them."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Metric of A less metric of B on the same examples, with its interval; of accuracies, in [-1, 1]."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemarTest:
    """How A and B disagree on the same examples, and how likely that is if neither is better.

    Args:
        num_only_a_correct: Examples that A alone has right.
        num_only_b_correct: Examples that B alone has right.
        p_value: Exact and two-sided, in [0, 1]; 0 is below every other float.
        mid_p_value: The same less half the probability of what was observed: closer to its nominal level,
            which the exact test stays well below.
    """

    num_only_a_correct: int
    num_only_b_correct: int
    p_value: float
    mid_p_value: float


@dataclass(frozen=True)
class SeedSummary:
    """Mean of a metric over seeds with Student's interval of the mean, and the spread of the seeds."""

    mean: float
    low: float
    high: float
    standard_deviation: float
    num_seeds: int


def wilson_interval(num_correct: int, num_examples: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion p̂ = num_correct / n.

        (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    Args:
        num_correct: Successes, in [0, num_examples].
        num_examples: Trials n, at least 1.
        confidence: Coverage, in (0, 1).

    Returns:
        The bounds, fractions in [0, 1].

    Raises:
        ValueError: If an argument is out of its bounds.

    Reference:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples must be >= 1, got {num_examples}")
    if not 0 <= num_correct <= num_examples:
        raise ValueError(f"num_correct must be in [0, {num_examples}], got {num_correct}")
    z = _normal_quantile(confidence)
    p, n = num_correct / num_examples, num_examples
    centre = p + z * z / (2 * n)
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half_width) / (1 + z * z / n), (centre + half_width) / (1 + z * z / n)
    # At p̂ = 0 and 1 the bound is 0 and 1 exactly; rounding must not say otherwise.
    return (0.0 if num_correct == 0 else low), (1.0 if num_correct == num_examples else high)


def paired_difference(correct_a: Tensor, correct_b: Tensor, *, confidence: float = 0.95) -> PairedDifference:
    """Bonett and Price's interval for the difference of two accuracies on the same examples.

    With n₁₀ examples that only A has right, n₀₁ that only B has right and p̃ = (count + 1)/(n + 2),

        (p̃₁₀ − p̃₀₁) ± z √((p̃₁₀ + p̃₀₁ − (p̃₁₀ − p̃₀₁)²) / (n + 2))

    Args:
        correct_a: Whether A is right, one entry an example.
        correct_b: Whether B is right, in the same order.
        confidence: Coverage, in (0, 1).

    Shapes:
        correct_a, correct_b [N] bool.

    Returns:
        The plain difference (n₁₀ − n₀₁)/n and the interval's bounds.

    Raises:
        ValueError: If the shapes differ, there is no example, or the confidence is out of its bounds.

    Reference:
        D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of binomial
        proportions based on paired data", Journal of Educational and Behavioral Statistics 2012.
    """
    if correct_a.ndim != 1 or correct_a.shape != correct_b.shape or len(correct_a) == 0:
        shapes = f"{list(correct_a.shape)} and {list(correct_b.shape)}"
        raise ValueError(f"correct_a and correct_b must be [N] with N >= 1, got {shapes}")
    a, b, n = correct_a.bool(), correct_b.bool(), len(correct_a)
    only_a, only_b = int(torch.sum(a & ~b)), int(torch.sum(b & ~a))
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half_width = _normal_quantile(confidence) * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
    return PairedDifference(
        difference=(only_a - only_b) / n,
        low=max(-1.0, p_a - p_b - half_width),
        high=min(1.0, p_a - p_b + half_width),
    )


def bootstrap_difference(
    scores_a: Tensor,
    scores_b: Tensor,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Percentile interval of mean(a) − mean(b), by resampling the examples with both their scores.

    The mean of a resample depends on how often each distinct difference is drawn, and those counts are
    multinomial: where there are few, as for right and wrong, they are drawn in place of the examples, which
    is the same distribution at a fraction of the time.

    Args:
        scores_a: A score of A for each example: whether it is right, or any other whose mean is the metric.
        scores_b: Those of B, in the same order.
        num_resamples: Bootstrap samples, at least 100.
        confidence: Coverage, in (0, 1).
        seed: Of the draws, >= 0; the same seed gives the same interval.

    Shapes:
        scores_a, scores_b [N], finite.

    Returns:
        The plain difference of means, and the quantiles (1 ∓ confidence)/2 of the resampled ones.

    Raises:
        ValueError: If the shapes differ, there is no example, a score is not finite, or a number is out of
            its bounds.

    Reference:
        B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
    """
    if scores_a.ndim != 1 or scores_a.shape != scores_b.shape or len(scores_a) == 0:
        shapes = f"{list(scores_a.shape)} and {list(scores_b.shape)}"
        raise ValueError(f"scores_a and scores_b must be [N] with N >= 1, got {shapes}")
    differences = scores_a.double() - scores_b.double()
    if not differences.isfinite().all():
        index = int((~differences.isfinite()).nonzero()[0])
        raise ValueError(f"the scores must be finite, that of example {index} is not")
    values, counts = differences.unique(return_counts=True)
    resampling = {"num_resamples": num_resamples, "seed": seed}
    if len(values) > MAX_DISTINCT_DIFFERENCES:
        found = bootstrap_indices(
            lambda indices: differences[indices].mean(dim=1),
            len(differences),
            confidence=confidence,
            **resampling,
        )
    else:
        found = bootstrap_kinds(
            lambda counts: counts @ values / len(differences), counts, confidence=confidence, **resampling
        )
    return PairedDifference(found.value, found.low, found.high)


def bootstrap_kinds(
    metric: Callable[[Tensor], Tensor],
    counts: Tensor,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile interval of a metric that depends only on how many examples are of each kind.

    The counts of a resample are multinomial, so they are drawn in place of the examples.

    Args:
        metric: Takes counts of kinds [R, V], float64, a resample a row, and returns the metric of each row,
            [R]; a difference of two metrics is one, too.
        counts: How many examples are of each kind, such as right by A alone; at least one in all.
        num_resamples: Bootstrap samples, at least 100; they are drawn in chunks of bounded memory.
        confidence: Coverage, in (0, 1).
        seed: Of the draws, >= 0; the same seed gives the same interval.

    Shapes:
        counts [V] int.

    Returns:
        The metric on all examples, and the quantiles (1 ∓ confidence)/2 of the resampled ones.

    Raises:
        ValueError: If there is no example, a number is out of its bounds, or the metric of a resample is not
            finite.
    """
    num_examples = int(counts.sum())
    if num_examples < 1:
        raise ValueError(f"counts must be of >= 1 examples, got {num_examples}")
    _check_resampling(num_resamples, confidence, seed)
    generator = np.random.default_rng(seed)
    shares = counts.double().numpy() / num_examples
    resampled = []
    for num_rows in _chunk(num_resamples, len(counts)):
        draws = torch.from_numpy(generator.multinomial(num_examples, shares, size=num_rows))  # [R', V]
        resampled.append(metric(draws.double()).double())
    observed = float(metric(counts.double()[None])[0])
    return _percentile_interval(observed, torch.cat(resampled), confidence)


def bootstrap_indices(
    metric: Callable[[Tensor], Tensor],
    num_examples: int,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile interval of any metric over examples.

    Args:
        metric: Takes indices of examples [R, N], a resample a row, and returns the metric of each row, [R];
            a difference of two metrics is one, too.
        num_examples: N, at least 1.
        num_resamples: Bootstrap samples, at least 100; they are drawn in chunks of bounded memory.
        confidence: Coverage, in (0, 1).
        seed: Of the draws, >= 0; the same seed gives the same interval.

    Returns:
        The metric on all examples, and the quantiles (1 ∓ confidence)/2 of the resampled ones.

    Raises:
        ValueError: If a number is out of its bounds, or the metric of a resample is not finite.

    Reference:
        B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples must be >= 1, got {num_examples}")
    _check_resampling(num_resamples, confidence, seed)
    observed = float(metric(torch.arange(num_examples)[None])[0])
    resampled = torch.cat(
        [metric(indices).double() for indices in _draw_resamples(num_examples, num_resamples, seed)]
    )
    return _percentile_interval(observed, resampled, confidence)


def mcnemar_test(correct_a: Tensor, correct_b: Tensor) -> McNemarTest:
    """McNemar's exact test that A and B are equally often right alone.

    With n₁₀ examples that only A has right, n₀₁ that only B has right and n = n₁₀ + n₀₁, under the hypothesis
    n₁₀ is binomial(n, ½), so that

        p = min(1, 2 Σ_{i ≤ min(n₁₀, n₀₁)} C(n, i) / 2ⁿ),        mid-p = p − C(n, min(n₁₀, n₀₁)) / 2ⁿ,

    and mid-p = 1 − ½ C(n, n₁₀) / 2ⁿ where n₁₀ = n₀₁.

    Args:
        correct_a: Whether A is right, one entry an example.
        correct_b: Whether B is right, in the same order.

    Shapes:
        correct_a, correct_b [N] bool.

    Returns:
        The two counts and both p values; each is 1 where A and B never disagree.

    Raises:
        ValueError: If the shapes differ.

    Reference:
        Q. McNemar, "Note on the sampling error of the difference between correlated proportions or
        percentages", Psychometrika 1947; M. W. Fagerland, S. Lydersen and P. Laake, "The McNemar test for
        binary matched-pairs data: mid-p and asymptotic are better than exact conditional", BMC Medical
        Research Methodology 2013.
    """
    if correct_a.ndim != 1 or correct_a.shape != correct_b.shape:
        shapes = f"{list(correct_a.shape)} and {list(correct_b.shape)}"
        raise ValueError(f"correct_a and correct_b must be [N], got {shapes}")
    a, b = correct_a.bool(), correct_b.bool()
    only_a, only_b = int(torch.sum(a & ~b)), int(torch.sum(b & ~a))
    num_discordant, smaller = only_a + only_b, min(only_a, only_b)
    term = tail = 1  # C(n, 0); integers of any size, so that nothing is rounded before the one division
    for index in range(smaller):
        term = term * (num_discordant - index) // (index + 1)
        tail += term
    if num_discordant == 0:
        return McNemarTest(0, 0, 1.0, 1.0)
    if only_a == only_b:  # the two tails share the middle, so it counts once, and mid-p takes off half of it
        return McNemarTest(only_a, only_b, 1.0, 1.0 - term / 2 ** (num_discordant + 1))
    return McNemarTest(
        num_only_a_correct=only_a,
        num_only_b_correct=only_b,
        p_value=2 * tail / 2**num_discordant,
        mid_p_value=(2 * tail - term) / 2**num_discordant,
    )


def summarize_seeds(values: Sequence[float], *, confidence: float = 0.95) -> SeedSummary:
    """Mean over seeds and Student's interval of it, x̄ ± t s/√k with k − 1 degrees of freedom.

    The interval is over what a seed changes; that of one run is over its test examples.

    Args:
        values: The metric of k >= 2 runs that differ in the seed alone.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If there are fewer than two values, one is not finite, or the confidence is out of its
            bounds.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs >= 2 values, got {len(values)}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the values of seeds must be finite, got {list(values)}")
    deviation = stdev(values)
    half_width = _student_quantile(confidence, len(values) - 1) * deviation / math.sqrt(len(values))
    mean = fmean(values)
    return SeedSummary(mean, mean - half_width, mean + half_width, deviation, len(values))


def _check_resampling(num_resamples: int, confidence: float, seed: int) -> None:
    if num_resamples < 100:
        raise ValueError(f"num_resamples must be >= 100, got {num_resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")


def _draw_resamples(num_examples: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """Indices [R', N] with replacement, in chunks that hold the same draws whatever their size."""
    generator = np.random.default_rng(seed)
    for num_rows in _chunk(num_resamples, num_examples):
        yield torch.from_numpy(generator.integers(num_examples, size=(num_rows, num_examples)))


def _chunk(num_rows: int, num_columns: int) -> Iterator[int]:
    """Numbers of rows that fit into memory at a time, `num_rows` in all."""
    most = max(1, MAX_DRAWS_IN_MEMORY // num_columns)
    for first in range(0, num_rows, most):
        yield min(most, num_rows - first)


def _percentile_interval(observed: float, resampled: Tensor, confidence: float) -> Estimate:
    if not resampled.isfinite().all():
        raise ValueError("the metric of a resample is not finite")
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    low, high = np.quantile(resampled.numpy(), tails)
    return Estimate(observed, float(low), float(high))


def _student_quantile(confidence: float, degrees_of_freedom: int) -> float:
    """t with P(|T| ≤ t) = confidence, by bisection over t = √ν tan θ, in which the closed form is written."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student_coverage(middle, degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan((low + high) / 2)


def _student_coverage(theta: float, degrees_of_freedom: int) -> float:
    """P(|T| ≤ √ν tan θ) for whole ν: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    cosine, is_odd = math.cos(theta), degrees_of_freedom % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for index in range(1 + is_odd, degrees_of_freedom, 2):
        total += term
        term *= index / (index + 1) * cosine**2
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if is_odd else total


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
