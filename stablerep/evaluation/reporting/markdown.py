"""`report.md`: the scores as a table, and what a reader has to know about its rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from stablerep.evaluation.formats import (
    describe_metric,
    format_interval,
    format_setting,
    format_settings,
    format_value,
)
from stablerep.evaluation.reporting.content import ReportContent
from stablerep.evaluation.results import Row


def build_markdown(content: ReportContent) -> str:
    """The report as Markdown."""
    parts = [f"# {content.title}", build_table(content.rows), *list_notes(content)]
    groups = collect_facts(content)
    for heading, facts in groups.items():
        lines = [f"- {name}: {_escape(value)}" for name, value in facts.items()]
        parts += [f"## {heading}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def build_table(rows: Sequence[Row]) -> str:
    """The scores as a Markdown table; fractions are written as per cent."""
    lines = [
        "| protocol | metric | feature | value | 95 % interval | n | chosen on | settings |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        unit = ", %" if describe_metric(row.metric).is_fraction else ""
        cells = [
            row.protocol,
            f"{row.metric}{unit}",
            row.feature,
            format_value(row.value, row.metric),
            format_interval(row),
            f"{row.n}",
            row.selection,
            format_settings(row.hyperparameters),
        ]
        lines.append(f"| {' | '.join(map(_escape, cells))} |")
    return "\n".join(lines)


def list_notes(content: ReportContent) -> list[str]:
    """What the rows do not say by themselves, then the notes of the content."""
    notes = []
    if any(row.selection == "test" for row in content.rows):
        notes.append(
            "Rows chosen on `test`: head and epoch are the best *on the test split*, as in the published "
            "figures, and so optimistic; `heldout` rows are chosen without it."
        )
    if any(row.hyperparameters.get("views_cached") is not None for row in content.rows):
        notes.append(
            "`views_cached`: the probe saw that many augmented views of each image in turn, not a new one in "
            "each epoch; not comparable with published figures."
        )
    if methods := list(dict.fromkeys(row.interval_method for row in content.rows if row.interval_method)):
        notes.append(
            f"Intervals: {'; '.join(methods)}. They are for one set of weights; another training gives other "
            "weights."
        )
    if any(row.protocol.startswith("fewshot") for row in content.rows):
        notes.append(
            "Few-shot intervals are over episodes of the same test images: they say how exactly these images "
            "were measured, not what others would give."
        )
    return [*notes, *content.notes]


def collect_facts(content: ReportContent) -> dict[str, dict[str, str]]:
    """Heading → name → value as text: model, data, hashes, settings, versions, seconds."""
    provenance = content.provenance
    groups: dict[str, Mapping[str, Any]] = {
        "Evaluated": {
            "model": provenance.model,
            "data": provenance.data,
            "transform": provenance.transform,
            **({"command": content.command} if content.command else {}),
        },
        **content.facts,
        "SHA-256": provenance.hashes,
        "Settings": content.settings,
        "Versions": provenance.versions,
        "Seconds": {name: f"{value:,.1f}" for name, value in content.seconds.items()},
    }
    return {heading: flatten(facts) for heading, facts in groups.items() if facts}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name → value as text."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = format_setting(value)
    return flat


def _escape(text: str) -> str:
    """Text that stays in its cell or its line."""
    return " ".join(text.replace("|", "\\|").split())
