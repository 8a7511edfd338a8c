"""What an evaluation will do: everything that can be known, and can fail, before the first feature."""

import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from stablerep import __version__, distributed
from stablerep.evaluation.cache.fingerprint import fingerprint_set
from stablerep.evaluation.cache.store import FeatureCache
from stablerep.evaluation.config import FEATURES, PROTOCOLS, EvaluateConfig
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.protocols import (
    OptionError,
    check_protocol,
    describe_limits,
    describe_settings,
    list_scores,
)
from stablerep.evaluation.reporting import check_page_can_be_built
from stablerep.evaluation.requirements import check_requirements, parse_requirement
from stablerep.evaluation.results import Provenance, check_folder
from stablerep.evaluation.sets import LabelledSet, read_labelled_set
from stablerep.evaluation.transforms import describe_eval_transform
from stablerep.loading import LoadedModel, load_model

LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy")
_PROTOCOLS_ON_CLS = {"linear", "robustness", "zeroshot", "retrieval"}
_PROTOCOLS_ON_TEST = {"zeroshot", "retrieval", "geometry"}


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Args:
        config: The options.
        model: The model.
        dataset: The set.
        settings: How features are computed.
        cache: Where they are kept; None keeps none.
        fingerprints: What the bytes of each split are.
        provenance: What all rows will share.
        protocols: What will be run, in the order of `PROTOCOLS` or as they were asked for.
        feature_names: The features that protocols on features are run for.
        notes: What a reader of the scores should know; a line each.
        folder: Where the output goes.
    """

    config: EvaluateConfig
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

    @property
    def needed_features(self) -> list[str]:
        """The features that are computed, in the order of `FEATURES`."""
        needs_cls = _PROTOCOLS_ON_CLS & set(self.protocols)
        names = {*self.feature_names, *(["cls"] if needs_cls else [])}
        if not set(self.protocols) - _PROTOCOLS_ON_CLS:
            names = {"cls"}
        return [name for name in FEATURES if name in names]

    @property
    def needed_splits(self) -> list[str]:
        """The splits whose features are computed: some protocols look at the test images alone."""
        return ["test"] if set(self.protocols) <= _PROTOCOLS_ON_TEST else list(self.dataset.splits)


def make_plan(config: EvaluateConfig) -> Plan:
    """The plan; makes the output folder, unless it is for a dry run. With ranks, each of them calls it.

    Raises:
        ValueError: If the model, the data or an option is wrong, or does not fit the others.
        OSError: If a file is missing or the output folder cannot be written.
    """
    if config.report:
        check_page_can_be_built()
    settings = build_extraction_settings(config)
    requirements = [parse_requirement(text) for text in config.require]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = load_model(config.checkpoint, random_init=config.random_init, ema=config.ema)
    dataset = read_labelled_set(config.data, config)
    protocols, notes = choose_protocols(config, model, dataset)
    feature_names = choose_features(config, model)
    scores = {
        key: describe_settings(config, dataset, protocol)
        for protocol in protocols
        for key in list_scores(config, dataset, [protocol], feature_names)
    }
    check_requirements(requirements, list(scores))
    folder = name_output_folder(config)
    if not config.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):  # an unwritable folder shows now, not after the work
            pass
    cache = None if config.cache is None else FeatureCache(Path(config.cache).expanduser())
    fingerprints = _find_fingerprints(dataset, cache)
    provenance = _describe_provenance(config, model, dataset, fingerprints)
    if not config.overwrite and not config.dry_run:
        check_folder(folder, provenance, scores)
    return Plan(
        config=config,
        model=model,
        dataset=dataset,
        settings=settings,
        cache=cache,
        fingerprints=fingerprints,
        provenance=provenance,
        protocols=protocols,
        feature_names=feature_names,
        notes=[*model.remarks, *dataset.remarks, *notes],
        folder=folder,
    )


def choose_protocols(
    config: EvaluateConfig, model: LoadedModel, dataset: LabelledSet
) -> tuple[list[str], list[str]]:
    """The protocols to run; what is left out of `all` or of one of them, and why, a line each.

    Raises:
        ValueError: If a protocol that is asked for cannot be run on this model or set; names why.
    """
    chosen: list[str] = []
    notes: list[str] = []
    for protocol in PROTOCOLS if config.protocols == "all" else config.protocols:
        try:
            check_protocol(protocol, config, model, dataset)
        except OptionError:
            raise
        except ValueError as error:
            if config.protocols != "all":
                raise
            notes.append(f"left out: {error}")
            continue
        chosen.append(protocol)
        notes += describe_limits(protocol, config, model, dataset)
    return chosen, notes


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


def name_output_folder(config: EvaluateConfig) -> Path:
    """The folder that is asked for, or one beside the checkpoint that says what it is of."""
    if config.output is not None:
        return Path(config.output)
    checkpoint = Path(config.checkpoint)
    parent = checkpoint.parent if checkpoint.is_file() else Path()
    weights = "-random_init" if config.random_init else "-ema" if config.ema else ""
    names = (checkpoint.stem if checkpoint.is_file() else config.checkpoint, name_data(config))
    return parent / "evaluation" / f"{'-'.join(map(_to_file_name, names))}{weights}"


def name_data(config: EvaluateConfig) -> str:
    """The set in few words: the last folder of a path."""
    return config.data if ":" in config.data else Path(config.data).resolve().name


def build_extraction_settings(config: EvaluateConfig) -> ExtractionSettings:
    """The options of extraction.

    Raises:
        ValueError: If this machine has no such device.
    """
    num_workers = config.num_workers
    return ExtractionSettings(
        num_images_per_batch=config.num_images_per_batch,
        num_workers=min(8, os.cpu_count() or 1) if num_workers is None else num_workers,
        precision=config.precision,
        device=find_device(config.device),
        error_budget_fraction=config.error_budget_fraction,
        seed=config.seed,
        storage=config.storage,
    )


def find_device(name: str) -> torch.device:
    """The device of a name; of `auto` the accelerator, if there is one.

    Raises:
        ValueError: If there is no such device.
    """
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


def _find_fingerprints(dataset: LabelledSet, cache: FeatureCache | None) -> Mapping[str, str]:
    """Rank 0 hashes; all ranks have the digests."""
    found: Mapping[str, str] = {}
    error = None
    if distributed.rank() == 0:
        try:
            found = fingerprint_set(dataset, None if cache is None else cache.folder)
        except (ValueError, OSError) as caught:
            error = caught
    distributed.raise_together(error)
    shared: Mapping[str, str] = distributed.all_gather_objects(found)[0]
    return shared


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
            "architecture": model.forward_digest,
            "data": hashlib.sha256(data.encode()).hexdigest(),
            "transform": hashlib.sha256(transform.encode()).hexdigest(),
        },
        versions={
            "stablerep": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
    )


def _to_file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)
