"""`stablerep evaluate`: a frozen model's features, computed once, under the protocols of the field.

    stablerep evaluate --checkpoint LAST.ckpt --data DIR --protocols all
    stablerep evaluate compare RUN_A RUN_B          two runs on the same images, example by example
    stablerep evaluate cache ls | verify | prune    the features that are kept for later runs

A run leaves, in its output folder, `results.jsonl` and `predictions.npz` (see
`stablerep.evaluation.results`), `report.md` and `report.html`, and `run.json` with settings and times.
"""

import dataclasses
import hashlib
import importlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from stablerep import __version__, distributed
from stablerep.distributed import launch
from stablerep.evaluation.cache.fingerprint import fingerprint_set
from stablerep.evaluation.cache.store import FeatureCache, build_keys, load_or_extract
from stablerep.evaluation.config import (
    CLASS_PROTOCOLS,
    FEATURES,
    PROTOCOLS,
    TEXT_PROTOCOLS,
    EvaluateConfig,
)
from stablerep.evaluation.features import (
    ExtractionSettings,
    Features,
    describe_eval_transform,
    extract_features,
)
from stablerep.evaluation.knn import find_neighbours
from stablerep.evaluation.prompts import read_templates
from stablerep.evaluation.protocols import (
    COLLECTIVE_PROTOCOLS,
    Evaluation,
    choose_numbers_of_neighbours,
    count_augmented_images,
    list_row_protocols,
    read_class_names,
    run_protocol,
)
from stablerep.evaluation.reporting import (
    NeighbourRow,
    Picture,
    ReportContent,
    check_page_can_be_built,
    write_report,
)
from stablerep.evaluation.reporting.analysis import choose_queries, list_confusable_rows
from stablerep.evaluation.reporting.markdown import build_table
from stablerep.evaluation.requirements import check_protocols, find_unmet, parse_requirement
from stablerep.evaluation.results import Provenance, Row, check_folder, replace_file, write_results
from stablerep.evaluation.sets import LabelledImage, LabelledSet, read_labelled_set
from stablerep.loading import LoadedModel, load_model

RUN_FILE = "run.json"
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy")
_TIMEOUT = timedelta(minutes=30)
"""What a rank waits for another at most: the probes are rank 0's work."""
_NUM_NEIGHBOURS = 5
_NUM_TIMED_IMAGES = 64
_SUBCOMMANDS = {
    ("compare",): ("stablerep.evaluation.compare", "CompareConfig", "two runs on the same images"),
    ("cache", "ls"): ("stablerep.evaluation.cache.ls", "ListConfig", "list the features that are kept"),
    ("cache", "verify"): ("stablerep.evaluation.cache.verify", "VerifyConfig", "check the kept features"),
    ("cache", "prune"): ("stablerep.evaluation.cache.prune", "PruneConfig", "delete kept features"),
}

logger = logging.getLogger(__name__)


def main(args: list[str]) -> int:
    """Runs the verb, or one of its subcommands, on the words after it.

    Returns:
        0; 1 if a requirement is not met.

    Raises:
        UsageError: If the words cannot be understood.
        ValueError: If the data, the model or a setting is wrong; the message names it.
        OSError: If a file is missing or the output cannot be written.
    """
    from stablerep.cli import VERBS, parse_config

    if args and not args[0].startswith("-"):
        return _run_subcommand(args)
    config = parse_config(EvaluateConfig, args, prog="stablerep evaluate", description=VERBS["evaluate"].help)
    if config.devices > 1 and not launch.is_started_by_us() and not config.dry_run:
        return launch.run_ranks(launch.rank_command("evaluate", args), config.devices)
    if config.devices == 1 or config.dry_run:
        return run(config)
    launch.watch_parent()
    return _run_as_rank(config)


def _run_subcommand(args: list[str]) -> int:
    from stablerep.cli import UsageError, parse_config

    words = next((words for words in _SUBCOMMANDS if tuple(args[: len(words)]) == words), None)
    if words is None:
        known = ", ".join(" ".join(words) for words in _SUBCOMMANDS)
        raise UsageError(
            f"unknown word '{' '.join(args[:2])}' after evaluate; there are {known}, and options"
        )
    module_name, class_name, text = _SUBCOMMANDS[words]
    module = importlib.import_module(module_name)
    rest = args[len(words) :]
    folders: list[str] = []
    if words == ("compare",):  # the two folders may stand alone
        while len(folders) < 2 and rest and not rest[0].startswith("-"):
            folders.append(rest.pop(0))
        rest = [f"--{name}={folder}" for name, folder in zip("ab", folders, strict=False)] + rest
    config = parse_config(
        getattr(module, class_name), rest, prog=f"stablerep evaluate {' '.join(words)}", description=text
    )
    code: int = module.run(config)
    return code


def _run_as_rank(config: EvaluateConfig) -> int:
    rank = int(os.environ["LOCAL_RANK"])
    device = _find_device(config.device)
    if device.type != "cpu":
        device = torch.device(device.type, rank)
        torch.accelerator.set_device_index(rank)
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, rank=rank, world_size=config.devices, timeout=_TIMEOUT)
    distributed.open_cpu_group(_TIMEOUT)
    try:
        return run(dataclasses.replace(config, device=str(device)))
    except (ValueError, OSError) as error:
        told = distributed.tell_failure(error)
        if not told.startswith(f"rank {rank}:"):
            return 1  # another rank has said it
        raise
    finally:
        distributed.close_cpu_group()


@dataclass(frozen=True)
class _Plan:
    """What will be done, known before the first feature."""

    model: LoadedModel
    dataset: LabelledSet
    settings: ExtractionSettings
    cache: FeatureCache | None
    fingerprints: Mapping[str, str]
    provenance: Provenance
    protocols: Sequence[str]
    feature_names: Sequence[str]
    notes: Sequence[str]
    folder: Path


def run(config: EvaluateConfig) -> int:
    """Evaluates as one process, or as one rank of a group that is up; see `main`."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    plan = _make_plan(config)
    if config.dry_run:
        print(_describe_plan(config, plan))
        return 0
    seconds["preparation"] = time.perf_counter() - start
    evaluation = _compute_features(config, plan)
    seconds["features"] = time.perf_counter() - start - seconds["preparation"]
    rows: list[Row] = []
    is_first = distributed.rank() == 0
    for protocol in sorted(plan.protocols, key=lambda name: name not in COLLECTIVE_PROTOCOLS):
        if is_first or protocol in COLLECTIVE_PROTOCOLS:
            protocol_start = time.perf_counter()
            rows += run_protocol(protocol, evaluation)
            seconds[protocol] = time.perf_counter() - protocol_start
    if not is_first:
        return 0
    rows.sort(key=lambda row: next(i for i, name in enumerate(PROTOCOLS) if row.protocol.startswith(name)))
    seconds["total"] = time.perf_counter() - start
    return _write(config, plan, evaluation, rows, {name: round(value, 3) for name, value in seconds.items()})


def _make_plan(config: EvaluateConfig) -> _Plan:
    """Everything that can be known to fail before an hour of features is computed."""
    if config.report:
        check_page_can_be_built()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = load_model(config.checkpoint, random_init=config.random_init, ema=config.ema)
    dataset = read_labelled_set(config.data, config)
    protocols, notes = choose_protocols(config, model, dataset)
    check_protocols(
        [parse_requirement(text) for text in config.require], list_row_protocols(config, protocols)
    )
    feature_names = choose_features(config, model)
    folder = _build_output_folder(config)
    cache_folder = None if config.cache is None else Path(config.cache).expanduser()
    is_first = distributed.rank() == 0
    fingerprints = fingerprint_set(dataset, cache_folder) if is_first else {}
    provenance = None
    if is_first:
        provenance = _describe_provenance(config, model, dataset, fingerprints)
        if not config.overwrite and not config.dry_run:
            check_folder(folder, provenance)
    return _Plan(
        model=model,
        dataset=dataset,
        settings=_extraction_settings(config),
        cache=None if cache_folder is None else FeatureCache(cache_folder),
        fingerprints=fingerprints,
        provenance=provenance,  # type: ignore[arg-type]  # rank 0 alone writes
        protocols=protocols,
        feature_names=feature_names,
        notes=[*dataset.remarks, *notes],
        folder=folder,
    )


def choose_protocols(
    config: EvaluateConfig, model: LoadedModel, dataset: LabelledSet
) -> tuple[list[str], list[str]]:
    """The protocols to run, and why others of `all` are not.

    Raises:
        ValueError: If a protocol that is asked for cannot be run on this model or set; names why.
    """
    if config.protocols != "all":
        asked: list[str] = list(config.protocols)
        for name in asked:
            _check_protocol(name, config, model, dataset)
        return asked, []
    chosen: list[str] = []
    notes = []
    for protocol in PROTOCOLS:
        try:
            _check_protocol(protocol, config, model, dataset)
            chosen.append(protocol)
        except ValueError as error:
            notes.append(f"{protocol} was left out: {error}")
    return chosen, notes


def _check_protocol(protocol: str, config: EvaluateConfig, model: LoadedModel, dataset: LabelledSet) -> None:
    if protocol in TEXT_PROTOCOLS and not model.has_text:
        raise ValueError(f"{protocol} needs a text tower, and {model.name} has none")
    if protocol == "retrieval":
        if not dataset.has_captions:
            raise ValueError(f"retrieval needs captions, and the images of {dataset.name} have none")
        return
    if protocol == "geometry":
        return
    if protocol == "zeroshot":
        if dataset.targets != "classes":
            raise ValueError(
                f"zeroshot needs one class an image, and the labels of {dataset.name} are others"
            )
        read_class_names(config, dataset)
        read_templates(config.zeroshot.templates)
        return
    dataset.check_has_classes(protocol)
    if dataset.targets == "multilabel" and protocol in CLASS_PROTOCOLS:
        raise ValueError(
            f"{protocol} needs one class an image, those of {dataset.name} have several; logreg takes them"
        )
    if protocol == "knn":
        choose_numbers_of_neighbours(config.knn.k, len(dataset.train))
    if protocol == "linear" and not dataset.validation:
        label, count = min(Counter(image.label for image in dataset.train).items(), key=lambda item: item[1])
        if count < 2:
            raise ValueError(
                f"class '{dataset.classes[label]}' has 1 training image: the linear probe chooses on "
                "held-out images and needs at least 2 a class, or a validation/ folder"
            )


def choose_features(config: EvaluateConfig, model: LoadedModel) -> list[str]:
    """The features that protocols are run for.

    Raises:
        ValueError: If the model has not one that is asked for.
    """
    if config.features == "all":
        return [name for name in FEATURES if name in model.feature_names]
    if unknown := [name for name in config.features if name not in model.feature_names]:
        raise ValueError(
            f"features: {model.name} has no {unknown[0]}; it has {', '.join(model.feature_names)}"
        )
    return list(config.features)


def _build_output_folder(config: EvaluateConfig) -> Path:
    if config.output is not None:
        folder = Path(config.output)
    else:
        checkpoint = Path(config.checkpoint)
        parent = checkpoint.parent if checkpoint.is_file() else Path()
        weights = "-random_init" if config.random_init else "-ema" if config.ema else ""
        names = [
            _to_file_name(name)
            for name in (checkpoint.stem if checkpoint.is_file() else config.checkpoint, _name_data(config))
        ]
        folder = parent / "evaluation" / f"{'-'.join(names)}{weights}"
    if not config.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):  # an unwritable folder shows now, not after the work
            pass
    return folder


def _name_data(config: EvaluateConfig) -> str:
    return config.data if ":" in config.data else Path(config.data).resolve().name


def _to_file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)


def _extraction_settings(config: EvaluateConfig) -> ExtractionSettings:
    num_workers = config.num_workers
    return ExtractionSettings(
        num_images_per_batch=config.num_images_per_batch,
        num_workers=min(8, os.cpu_count() or 1) if num_workers is None else num_workers,
        precision=config.precision,
        device=_find_device(config.device),
        error_budget_fraction=config.error_budget_fraction,
        seed=config.seed,
        storage=config.storage,
    )


def _find_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"device must be auto, cpu or an accelerator of this machine, got {name} ({reason})"
        ) from error
    return device


def _describe_provenance(
    config: EvaluateConfig, model: LoadedModel, dataset: LabelledSet, fingerprints: Mapping[str, str]
) -> Provenance:
    transform = describe_eval_transform(model.input_format)
    weights = " (random initialisation)" if config.random_init else " (moving average)" if config.ema else ""
    data = "".join(f"{split}\t{digest}\n" for split, digest in fingerprints.items())
    return Provenance(
        model=f"{model.name}{weights}",
        data=dataset.name,
        transform=transform,
        hashes={
            "weights": model.digest,
            "data": hashlib.sha256(data.encode()).hexdigest(),
            "transform": hashlib.sha256(transform.encode()).hexdigest(),
        },
        versions={
            "stablerep": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
    )


def _list_needed_features(plan: _Plan) -> list[str]:
    needs_cls = {"linear", "robustness", "zeroshot", "retrieval"} & set(plan.protocols)
    names = {*plan.feature_names, *(["cls"] if needs_cls else [])}
    return [name for name in FEATURES if name in names]


def _list_needed_splits(plan: _Plan) -> list[str]:
    """A set without classes, and protocols on the test split alone, need no training features."""
    if set(plan.protocols) <= {"zeroshot", "retrieval", "geometry"}:
        return ["test"]
    return list(plan.dataset.splits)


def _compute_features(config: EvaluateConfig, plan: _Plan) -> Evaluation:
    features: dict[str, Features] = {}
    for split in _list_needed_splits(plan):
        found = load_or_extract(
            plan.model,
            plan.dataset,
            split,
            plan.settings,
            plan.cache,
            plan.fingerprints.get(split, ""),
            feature_names=_list_needed_features(plan),
        )
        if found is not None:
            features[split] = found
    return Evaluation(
        config=config,
        model=plan.model,
        dataset=plan.dataset,
        settings=plan.settings,
        cache=plan.cache,
        fingerprint=plan.fingerprints.get("test", ""),
        features=features,
        feature_names=plan.feature_names,
    )


def _describe_plan(config: EvaluateConfig, plan: _Plan) -> str:
    """The plan for a person, with the time that one batch takes as measure of the rest."""
    lines = [
        f"model       {plan.provenance.model}: {plan.model.architecture}, "
        f"{plan.model.input_format.image_size} px, weights {plan.model.digest[:12]}",
        f"data        {plan.dataset.name}: {len(plan.dataset.classes)} classes",
        f"transform   {plan.provenance.transform}",
        f"protocols   {', '.join(plan.protocols)}, on {', '.join(plan.feature_names)}",
        f"output      {plan.folder}",
        "",
        "split        images  features that are cached / to compute",
    ]
    names, num_images = _list_needed_features(plan), 0
    for split in _list_needed_splits(plan):
        images = plan.dataset.splits[split]
        keys = build_keys(plan.model, plan.settings, plan.fingerprints[split], names)
        missing = [name for name in names if plan.cache is None or not plan.cache.has(keys[name])]
        num_images += len(images) if missing else 0
        cached = [name for name in names if name not in missing]
        lines.append(
            f"{split:<11} {len(images):>7}  {', '.join(cached) or '-'} / {', '.join(missing) or '-'}"
        )
    more = {
        "linear": count_augmented_images(config, plan.dataset),
        "robustness": len(plan.dataset.test)
        * len(config.robustness.corruptions)
        * len(config.robustness.severities),
    }
    for protocol in plan.protocols:
        if extra := more.get(protocol, 0):
            lines.append(f"{protocol:<11} {extra:>7}  more images through the model")
            num_images += extra
    seconds = _time_images(plan) * num_images / config.devices
    lines += ["", f"time        about {_format_seconds(seconds)} for {num_images} images, and the probes'"]
    return "\n".join([*lines, *(f"note        {note}" for note in plan.notes)])


def _time_images(plan: _Plan) -> float:
    """Seconds an image, from files to features."""
    images = plan.dataset.test[:_NUM_TIMED_IMAGES]
    settings = dataclasses.replace(plan.settings, num_workers=0, error_budget_fraction=1.0)
    seconds = []
    for _ in range(2):  # the first is for what is set up once
        start = time.perf_counter()
        extract_features(plan.model, images, plan.dataset, settings, description="timing")
        seconds.append(time.perf_counter() - start)
    return seconds[-1] / len(images)


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _write(
    config: EvaluateConfig,
    plan: _Plan,
    evaluation: Evaluation,
    rows: list[Row],
    seconds: Mapping[str, float],
) -> int:
    test = evaluation.features["test"]
    write_results(plan.folder, rows, plan.provenance, test.names, overwrite=config.overwrite)
    facts = _list_facts(plan, evaluation)
    content = {
        "settings": asdict(config),
        "facts": facts,
        "seconds": dict(seconds),
        "notes": list(plan.notes),
    }
    replace_file(plan.folder / RUN_FILE, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    report = _build_report(config, plan, evaluation, rows, seconds, facts)
    write_report(plan.folder, report, page=config.report)
    unmet = find_unmet([parse_requirement(text) for text in config.require], rows)
    print(f"{report.title}\n\n{build_table(rows)}\n\n{plan.folder}")
    for miss in unmet:
        print(f"stablerep evaluate: not met: {miss}", file=sys.stderr)
    return 1 if unmet else 0


def _list_facts(plan: _Plan, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    model, dataset = plan.model, plan.dataset
    unreadable = [line for split in evaluation.features.values() for line in split.unreadable]
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
            "unreadable": unreadable,
            "ignored files": dict(dataset.num_ignored_files),
        },
        "machine": {
            "device": str(plan.settings.device),
            "processes": distributed.world_size(),
            "system": platform.platform(),
        },
    }


def _build_report(
    config: EvaluateConfig,
    plan: _Plan,
    evaluation: Evaluation,
    rows: Sequence[Row],
    seconds: Mapping[str, float],
    facts: dict[str, dict[str, Any]],
) -> ReportContent:
    test, dataset = evaluation.features["test"], plan.dataset
    has_classes = dataset.targets == "classes"
    feature = "cls" if "cls" in test.values else next(iter(test.values))
    notes = list(plan.notes)
    if num_unreadable := sum(len(split.unreadable) for split in evaluation.features.values()):
        notes.append(f"{num_unreadable} images could not be read and were left out; run.json names them.")
    for row in rows:
        notes += [
            f"{row.protocol} of {row.feature}: {text}" for text in row.hyperparameters.get("warnings", [])
        ]
    content = ReportContent(
        title=f"{Path(plan.provenance.model).name} on {Path(_name_data(config)).name}",
        rows=rows,
        provenance=plan.provenance,
        names=test.names,
        class_names=dataset.classes if has_classes else (),
        targets=test.labels.numpy() if has_classes else None,
        features=test.values[feature].float(),
        feature=feature,
        facts=facts,
        settings=asdict(config),
        seconds=seconds,
        notes=list(dict.fromkeys(notes)),
        seed=config.seed,
    )
    if not has_classes or not config.report:
        return content
    first = next(iter(list_confusable_rows(content, 1)), None)
    predictions = None if first is None else first.predictions
    return dataclasses.replace(content, neighbours=_show_neighbours(plan, evaluation, feature, predictions))


def _show_neighbours(
    plan: _Plan, evaluation: Evaluation, feature: str, predictions: np.ndarray | None
) -> list[NeighbourRow]:
    """Some test images, right and wrong ones, with the training images nearest to them."""
    if "train" not in evaluation.features:
        return []
    train, test = evaluation.features["train"], evaluation.features["test"]
    chosen = choose_queries(test.labels.numpy(), predictions, seed=plan.settings.seed)
    found = find_neighbours(
        train.values[feature].float(),
        test.values[feature][torch.from_numpy(chosen)].float(),
        min(_NUM_NEIGHBOURS, len(train.names)),
    )
    images = {image.name: image for split in plan.dataset.splits.values() for image in split}

    def show(features: Features, row: int) -> Picture:
        image: LabelledImage = images[features.names[row]]
        return Picture(image.decode(image.read_bytes()), image.name, int(features.labels[row]))

    return [
        NeighbourRow(
            query=show(test, int(query)),
            neighbours=[show(train, int(row)) for row in indices],
            similarities=similarities.tolist(),
        )
        for query, indices, similarities in zip(chosen, found.indices, found.similarities, strict=True)
    ]
