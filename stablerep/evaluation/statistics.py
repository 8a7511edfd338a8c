"""Intervals for accuracies and for differences of accuracies, in closed form."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of A less accuracy of B on the same examples, with its interval; fractions in [-1, 1]."""

    difference: float
    low: float
    high: float


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


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
