"""`--require 'knn20>=0.55'`: scores that an evaluation must reach, for the exit code of a pipeline.

    PROTOCOL[.METRIC][FEATURE] OPERATOR VALUE        knn20>=0.55    logreg.accuracy > 61%    knn20[cls]>=0.5

The metric may be left out where the protocol has one, or has an accuracy; the feature where it has one.
OPERATOR is one of >=, >, <=, <. A value with % is divided by 100.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from stablerep.arguments import suggest
from stablerep.evaluation.formats import describe_metric
from stablerep.evaluation.results import Row

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
DEFAULT_METRIC = "accuracy"
ScoreKey = tuple[str, str, str]
"""Protocol, metric and feature, as `Row.key`."""
_PATTERN = re.compile(
    r"\s*(?P<score>[^\s<>=\[\]]+)\s*(?:\[\s*(?P<feature>[^\s\[\]]+)\s*\])?\s*"
    r"(?P<operator>>=|<=|>|<)\s*(?P<value>[^\s%<>=]+)\s*(?P<percent>%?)\s*"
)


@dataclass(frozen=True)
class Requirement:
    """A bound on one score.

    Args:
        text: What was written.
        score: Protocol, or protocol and metric with a dot between.
        feature: None where it was left out.
        operator: One of `OPERATORS`.
        bound: What the score is compared with.
    """

    text: str
    score: str
    feature: str | None
    operator: str
    bound: float


@dataclass(frozen=True)
class Unmet:
    """A requirement that a score does not reach; as text, one line that says both."""

    requirement: Requirement
    row: Row

    def __str__(self) -> str:
        row, wanted = self.row, self.requirement
        return (
            f"{row.protocol} {row.metric} of {row.feature} must be {wanted.operator} {wanted.bound:g}, "
            f"got {row.value:.6g}"
        )


def parse_requirement(text: str) -> Requirement:
    """Reads `knn20>=0.55`.

    Raises:
        ValueError: If the text is no requirement, or its value no finite number.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(
            f"require must be PROTOCOL[.METRIC] OPERATOR VALUE with one of {', '.join(OPERATORS)}, such as "
            f"'knn20>=0.55', got '{text}'"
        )
    try:
        bound = float(match["value"])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise ValueError(f"require '{text}': the value must be a finite number, got '{match['value']}'")
    return Requirement(
        text=text.strip(),
        score=match["score"],
        feature=match["feature"],
        operator=match["operator"],
        bound=bound / 100 if match["percent"] else bound,
    )


def check_requirements(requirements: Iterable[Requirement], scores: Sequence[ScoreKey]) -> None:
    """Refuses what no score can answer; to be called before the work.

    Args:
        requirements: From `parse_requirement`.
        scores: Protocol, metric and feature of the scores to come; some may not.

    Raises:
        ValueError: As `find_unmet`.
    """
    for requirement in requirements:
        _find_score(requirement, scores)


def find_unmet(requirements: Iterable[Requirement], rows: Sequence[Row]) -> list[Unmet]:
    """The requirements that the scores do not reach, each with its score.

    Args:
        requirements: From `parse_requirement`.
        rows: The scores.

    Raises:
        ValueError: If a requirement names no score or more than one, or compares a fraction with a number
            outside of [0, 1].
    """
    unmet = []
    found = {row.key: row for row in rows}
    for requirement in requirements:
        row = found[_find_score(requirement, list(found))]
        if not OPERATORS[requirement.operator](row.value, requirement.bound):
            unmet.append(Unmet(requirement, row))
    return unmet


def _split_score(requirement: Requirement, protocols: Collection[str]) -> tuple[str, str | None]:
    """Protocol and metric; a protocol's own name may have a dot."""
    if requirement.score in protocols:
        return requirement.score, None
    protocol, _, metric = requirement.score.rpartition(".")
    if protocol in protocols:
        return protocol, metric
    name = protocol or requirement.score
    raise ValueError(
        f"require '{requirement.text}': there is no protocol '{name}' in this evaluation"
        f"{suggest(name, protocols)}; it has {', '.join(sorted(protocols))}"
    )


def _find_score(requirement: Requirement, scores: Sequence[ScoreKey]) -> ScoreKey:
    protocol, metric = _split_score(requirement, {score[0] for score in scores})
    found = [score for score in scores if score[0] == protocol]
    metrics = list(dict.fromkeys(score[1] for score in found))
    if metric is None:
        metric = metrics[0] if len(metrics) == 1 else DEFAULT_METRIC
        if metric not in metrics:
            raise ValueError(
                f"require '{requirement.text}': {protocol} has several metrics, name one: "
                f"{', '.join(f'{protocol}.{name}' for name in metrics)}"
            )
    elif metric not in metrics:
        raise ValueError(
            f"require '{requirement.text}': {protocol} has no metric '{metric}'{suggest(metric, metrics)}; "
            f"it has {', '.join(metrics)}"
        )
    if describe_metric(metric).is_fraction and not 0 <= requirement.bound <= 1:
        raise ValueError(
            f"require '{requirement.text}': {metric} is a fraction in [0, 1], got {requirement.bound:g}; "
            f"write {requirement.bound:g}% for per cent"
        )
    return protocol, metric, _find_feature(requirement, protocol, [s[2] for s in found if s[1] == metric])


def _find_feature(requirement: Requirement, protocol: str, features: Sequence[str]) -> str:
    feature = requirement.feature
    if feature is not None and feature not in features:
        raise ValueError(
            f"require '{requirement.text}': {protocol} has no feature '{feature}'; it has "
            f"{', '.join(features)}"
        )
    if feature is None and len(features) > 1:
        raise ValueError(
            f"require '{requirement.text}': {protocol} has several features, name one: "
            f"{', '.join(f'{protocol}[{name}]' for name in features)}"
        )
    return features[0] if feature is None else feature
