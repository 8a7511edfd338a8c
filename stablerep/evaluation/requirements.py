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
from stablerep.evaluation.reporting.formats import describe_metric
from stablerep.evaluation.results import Row

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
DEFAULT_METRIC = "accuracy"
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


def check_protocols(requirements: Iterable[Requirement], protocols: Collection[str]) -> None:
    """Refuses requirements on protocols that will not be run; to be called before the work.

    Args:
        requirements: From `parse_requirement`.
        protocols: Names of the rows to come, such as `knn20`, `linear_heldout`.

    Raises:
        ValueError: If a requirement names none of them.
    """
    for requirement in requirements:
        _split_score(requirement, protocols)


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
    for requirement in requirements:
        row = _find_row(requirement, rows)
        if describe_metric(row.metric).is_fraction and not 0 <= requirement.bound <= 1:
            raise ValueError(
                f"require '{requirement.text}': {row.metric} is a fraction in [0, 1], got "
                f"{requirement.bound:g}; write {requirement.bound:g}% for per cent"
            )
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


def _find_row(requirement: Requirement, rows: Sequence[Row]) -> Row:
    protocol, metric = _split_score(requirement, {row.protocol for row in rows})
    found = [row for row in rows if row.protocol == protocol]
    metrics = list(dict.fromkeys(row.metric for row in found))
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
    found = [row for row in found if row.metric == metric]
    features = [row.feature for row in found]
    if requirement.feature is not None:
        found = [row for row in found if row.feature == requirement.feature]
        if not found:
            raise ValueError(
                f"require '{requirement.text}': {protocol} has no feature '{requirement.feature}'; it has "
                f"{', '.join(features)}"
            )
    if len(found) > 1:
        raise ValueError(
            f"require '{requirement.text}': {protocol} has several features, name one: "
            f"{', '.join(f'{protocol}[{name}]' for name in features)}"
        )
    return found[0]
