"""What an evaluation leaves in its folder.

results.jsonl, predictions.npz    the scores, and what they were computed from, written as they come
run.json                          the last command's settings and times, and what could not be read
report.md, report.html            for people
model-index.yml                   the scores as the Hugging Face hub reads them
"""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stablerep import distributed
from stablerep.evaluation.features import Features
from stablerep.evaluation.knn import find_neighbours
from stablerep.evaluation.plan import Plan, name_data
from stablerep.evaluation.protocols import Evaluation
from stablerep.evaluation.reporting import NeighbourRow, Picture, ReportContent, write_report
from stablerep.evaluation.reporting.analysis import choose_queries, list_confusable_rows
from stablerep.evaluation.reporting.model_index import build_model_index
from stablerep.evaluation.results import Row, replace_file

RUN_FILE, MODEL_INDEX_FILE = "run.json", "model-index.yml"
RUN_SCHEMA_VERSION = 1
_NUM_NEIGHBOURS = 5


def write_output(
    plan: Plan,
    evaluation: Evaluation,
    rows: Sequence[Row],
    seconds: Mapping[str, float],
    command: str | None,
    failures: Sequence[str] = (),
) -> ReportContent:
    """Writes every file but the scores themselves, and returns what the report says.

    Args:
        plan: What was done.
        evaluation: The features that were computed.
        rows: The scores of the folder, those of earlier commands included.
        seconds: Step → seconds.
        command: What was run, if it was a command.
        failures: Which protocols failed, and why, a line each.

    Raises:
        OSError: If a file cannot be written.
    """
    report = build_report(plan, evaluation, rows, seconds, command, failures)
    content = {
        "schema_version": RUN_SCHEMA_VERSION,
        "command": command,
        "settings": report.settings,
        "facts": report.facts,
        "seconds": report.seconds,
        "notes": report.notes,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(plan.folder / RUN_FILE, text.encode())
    index = build_model_index(report.rows, plan.provenance, model_name=Path(plan.provenance.model).name)
    replace_file(plan.folder / MODEL_INDEX_FILE, index.encode())
    write_report(plan.folder, report, page=plan.config.report)
    return report


def build_report(
    plan: Plan,
    evaluation: Evaluation,
    rows: Sequence[Row],
    seconds: Mapping[str, float],
    command: str | None,
    failures: Sequence[str] = (),
) -> ReportContent:
    """What the report says; the arguments are those of `write_output`."""
    test, dataset = evaluation.features["test"], plan.dataset
    has_classes = dataset.targets == "classes"
    feature = "cls" if "cls" in test.values else next(iter(test.values))
    content = ReportContent(
        title=f"{Path(plan.provenance.model).name} on {Path(name_data(plan.config)).name}",
        rows=rows,
        provenance=plan.provenance,
        names=test.names,
        class_names=dataset.classes if has_classes else (),
        targets=test.labels.numpy() if has_classes else None,
        features=test.values[feature].float(),
        feature=feature,
        facts=_list_facts(plan, evaluation),
        settings=asdict(plan.config),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        notes=[*failures, *_list_notes(plan, evaluation, rows)],
        command=command,
        seed=plan.config.seed,
    )
    if not has_classes or not plan.config.report or "train" not in evaluation.features:
        return content
    first = next(iter(list_confusable_rows(content, 1)), None)
    predictions = None if first is None else first.predictions
    return dataclasses.replace(content, neighbours=_show_neighbours(plan, evaluation, feature, predictions))


def _list_notes(plan: Plan, evaluation: Evaluation, rows: Sequence[Row]) -> list[str]:
    notes = list(plan.notes)
    if num_unreadable := sum(len(split.unreadable) for split in evaluation.features.values()):
        images = "1 image" if num_unreadable == 1 else f"{num_unreadable} images"
        notes.append(f"{images} could not be read and left out; {RUN_FILE} has the names.")
    for row in rows:
        warnings = row.hyperparameters.get("warnings", [])
        notes += [f"{row.protocol} of {row.feature}: {text}" for text in warnings]
    return list(dict.fromkeys(notes))


def _list_facts(plan: Plan, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    model, dataset = plan.model, plan.dataset
    return {
        "model": {
            "given as": plan.provenance.model,
            "architecture": model.architecture,
            "kind": model.kind,
            "sha256 of the weights": model.digest,
        },
        "data": {
            "given as": dataset.name,
            "classes": len(dataset.classes),
            "images": {name: len(split.names) for name, split in evaluation.features.items()},
            "unreadable": [line for split in evaluation.features.values() for line in split.unreadable],
            "ignored files": dict(dataset.num_ignored_files),
        },
        "machine": {
            "device": str(plan.settings.device),
            "processes": distributed.world_size(),
            "threads of each": torch.get_num_threads(),
            "system": platform.platform(),
        },
    }


def _show_neighbours(
    plan: Plan, evaluation: Evaluation, feature: str, predictions: np.ndarray | None
) -> list[NeighbourRow]:
    """Some test images, right and wrong ones, with the training images nearest to them."""
    train, test = evaluation.features["train"], evaluation.features["test"]
    chosen = choose_queries(test.labels.numpy(), predictions, seed=plan.config.seed)
    found = find_neighbours(
        train.values[feature].float(),
        test.values[feature][torch.from_numpy(chosen)].float(),
        min(_NUM_NEIGHBOURS, len(train.names)),
    )
    images = {image.name: image for split in plan.dataset.splits.values() for image in split}

    def show(features: Features, row: int) -> Picture:
        image = images[features.names[row]]
        return Picture(image.decode(image.read_bytes()), image.name, int(features.labels[row]))

    return [
        NeighbourRow(
            query=show(test, int(query)),
            neighbours=[show(train, int(row)) for row in indices],
            similarities=similarities.tolist(),
        )
        for query, indices, similarities in zip(chosen, found.indices, found.similarities, strict=True)
    ]
