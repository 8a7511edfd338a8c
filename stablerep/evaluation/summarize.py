"""`stablerep evaluate summarize A B C`: runs that differ in their seed, as mean and spread.

    mean        over the runs
    interval    Student's, of that mean: x̄ ± t s/√k of k runs
    s           standard deviation of the runs

A run's own interval is over its test images; this one is over what a seed changes: weights, order, views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stablerep.evaluation.formats import format_value
from stablerep.evaluation.results import RESULTS_FILE, Record, RowKey, read_records
from stablerep.evaluation.statistics import SeedSummary, summarize_seeds

_NO_SETTINGS = ("seed", "fewshot.seed")


@dataclass(frozen=True)
class SummarizeConfig:
    """Which runs to summarize."""

    folders: list[str] = field(default_factory=list)
    """Folders of `stablerep evaluate`, at least two, of one data set and of weights of other seeds."""
    confidence: float = 0.95
    """Coverage of the intervals, in (0, 1)."""

    def __post_init__(self) -> None:
        if len(self.folders) < 2:
            raise ValueError(f"folders must be at least 2, got {len(self.folders)}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")


def run(config: SummarizeConfig) -> int:
    """Prints the table.

    Returns:
        0.

    Raises:
        FileNotFoundError: If a folder has no results.
        ValueError: If a file cannot be read, or the runs cannot be put together; see `summarize_runs`.
    """
    runs = [read_records(Path(folder) / RESULTS_FILE) for folder in config.folders]
    summaries = summarize_runs(runs, config.folders, confidence=config.confidence)
    print(build_table(summaries, config.confidence))
    for key in dict.fromkeys(record.row.key for records in runs for record in records):
        if key not in summaries:
            protocol, metric, feature = key
            print(f"\nNot in every run: {protocol} {metric} of {feature}.")
    return 0


def summarize_runs(
    runs: Sequence[Sequence[Record]], names: Sequence[str], *, confidence: float = 0.95
) -> dict[RowKey, SeedSummary]:
    """Mean and spread of every score that all runs have.

    Args:
        runs: The lines of each run.
        names: What errors call the runs.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If the runs are of other data, transforms or architectures, have other settings than the
            seed, two are of the same weights, or they have no score in common.
    """
    first = runs[0]
    keys = [record.row.key for record in first]
    for records, name in zip(runs, names, strict=True):
        _check_same_setting(first, records, names[0], name)
        keys = [key for key in keys if key in {record.row.key for record in records}]
    if not keys:
        raise ValueError(f"{', '.join(names)} have no score in common")
    weights: dict[str, str] = {}
    for records, name in zip(runs, names, strict=True):
        if other := weights.get(digest := records[0].provenance.hashes["weights"]):
            raise ValueError(f"{other} and {name} are of the same weights ({digest[:12]}): no two seeds")
        weights[digest] = name
    rows = [{record.row.key: record.row for record in records} for records in runs]
    for key in keys:
        for found, name in zip(rows, names, strict=True):
            old, new = rows[0][key].settings, found[key].settings
            for option in {**old, **new}:
                if option not in _NO_SETTINGS and old.get(option) != new.get(option):
                    raise ValueError(
                        f"{' '.join(key)}: {option} is {old.get(option)} in {names[0]} and {new.get(option)} "
                        f"in {name}"
                    )
    return {key: summarize_seeds([found[key].value for found in rows], confidence=confidence) for key in keys}


def build_table(summaries: dict[RowKey, SeedSummary], confidence: float = 0.95) -> str:
    """The summaries as a Markdown table; fractions are written as per cent."""
    lines = [
        f"| protocol | metric | feature | mean | {100 * confidence:g} % interval | s | runs |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for key, found in summaries.items():
        values = (found.mean, found.low, found.high, found.standard_deviation)
        mean, low, high, deviation = (format_value(value, key[1]) for value in values)
        cells = [*key, mean, f"{low} to {high}", deviation, str(found.num_seeds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _check_same_setting(a: Sequence[Record], b: Sequence[Record], name_a: str, name_b: str) -> None:
    for records, name in ((a, name_a), (b, name_b)):
        if not records:
            raise ValueError(f"{name} has no rows")
    for kind in ("data", "transform", "architecture"):
        hash_a, hash_b = (records[0].provenance.hashes.get(kind, "") for records in (a, b))
        if hash_a != hash_b:
            raise ValueError(f"{name_a} and {name_b} are of other {kind} ({hash_a[:12]} and {hash_b[:12]})")
