"""`stablerep evaluate`: the frozen features of a checkpoint, probed on a labelled set."""

import hashlib
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stablerep import __version__
from stablerep.backbones import load_backbone
from stablerep.evaluation.features import (
    ExtractionSettings,
    Features,
    extract_augmented_features,
    extract_features,
)
from stablerep.evaluation.knn import knn_classify
from stablerep.evaluation.linear import LabelledFeatures, LinearConfig, linear_probe
from stablerep.evaluation.report import Score, build_table, write_report
from stablerep.evaluation.sets import LabelledImage, LabelledSet, read_labelled_set
from stablerep.loading.model import InputFormat, LoadedModel

FEATURE_NAME = "backbone output (class token after the final norm)"
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy")


@dataclass(frozen=True)
class KnnConfig:
    """Settings of the weighted k-nearest-neighbour vote."""

    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """T of the weights exp(cosine / T)."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"knn.k must be >= 1, got {self.k}")
        if self.temperature <= 0:
            raise ValueError(f"knn.temperature must be > 0, got {self.temperature}")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on what, and how."""

    checkpoint: str
    """Checkpoint that `stablerep fit` wrote."""
    data: str
    """Labelled set: train/ and test/ (optionally validation/) with one folder of images a class, or with .tar
    shards of jpg, png or webp + cls."""
    output: str | None = None
    """Folder for results.json, results.md and predictions.npz; null makes one in evaluation/ beside the
    checkpoint."""
    random_init: bool = False
    """Probe the checkpoint's architecture with fresh, seeded weights: the baseline of no training."""
    ema: bool = False
    """Probe the moving average of the weights (`model.optimizer.ema_decay`) in place of the weights."""
    protocols: list[Literal["linear", "knn"]] = field(default_factory=lambda: ["linear", "knn"])
    """Which protocols to run."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """The linear probe."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """The k-nearest-neighbour vote."""
    num_images_per_batch: int = 256
    """Images in one forward pass of the backbone."""
    num_workers: int | None = None
    """Processes that decode images; null takes one a CPU core, at most 8; 0 decodes in the main process."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbone."""
    device: str = "auto"
    """Torch device of the backbone and the probe; auto takes the accelerator if there is one."""
    seed: int = 0
    """Seed of fresh weights, augmentations, initial heads, order and held-out images."""
    error_budget_fraction: float = 0.001
    """Largest share of a split's images that may be unreadable before the evaluation stops, in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.protocols:
            raise ValueError("protocols must name at least one of linear, knn")
        if self.num_images_per_batch < 1:
            raise ValueError(f"num_images_per_batch must be >= 1, got {self.num_images_per_batch}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be null or >= 0, got {self.num_workers}")
        if self.ema and self.random_init:
            raise ValueError("ema and random_init exclude each other: fresh weights have no average")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if not 0 <= self.error_budget_fraction <= 1:
            raise ValueError(f"error_budget_fraction must be in [0, 1], got {self.error_budget_fraction}")


def run(config: EvaluateConfig) -> int:
    """Evaluate, write the report, print the table.

    Returns:
        0.

    Raises:
        ValueError: If the data, the checkpoint or a setting is wrong; the message names it.
        OSError: If a file is missing or the output cannot be written.
    """
    start = time.perf_counter()
    model = _load_model(config)
    dataset = read_labelled_set(config.data)
    _check_against_data(config, dataset)
    folder = _build_output_folder(config)
    settings = _extraction_settings(config)

    features = _extract_splits(model, dataset, settings)
    seconds = {"features": time.perf_counter() - start}
    scores: list[Score] = []
    if "linear" in config.protocols:
        scores.extend(_score_linear(config, model, dataset, features, settings))
        seconds["linear"] = scores[-1].seconds
    if "knn" in config.protocols:
        scores.append(_score_knn(config, features, len(dataset.classes), settings.device))
        seconds["knn"] = scores[-1].seconds
    seconds["total"] = time.perf_counter() - start

    weights = " (random initialisation)" if config.random_init else " (moving average)" if config.ema else ""
    what = f"{Path(config.checkpoint).name}{weights}"
    title = f"{what} on {Path(config.data).resolve().name}"
    facts = _describe(config, model, dataset, features, seconds)
    write_report(folder, scores, features["test"].names, facts, title)
    print(f"{title}\n\n{build_table(scores)}\n\n{folder}")
    return 0


def _load_model(config: EvaluateConfig) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone: Any = load_backbone(config.checkpoint, random_init=config.random_init, ema=config.ema)
    size = int(backbone.image_size)
    resized = round(size * 256 / 224)
    return LoadedModel(
        name=config.checkpoint,
        architecture=str(backbone.architecture),
        kind="checkpoint",
        backbone=backbone,
        input_format=InputFormat(
            size, tuple(backbone.mean), tuple(backbone.std), crop_fraction=size / resized
        ),
    )


def _check_against_data(config: EvaluateConfig, dataset: LabelledSet) -> None:
    """What can be known to fail before an hour of features is computed."""
    if "knn" in config.protocols and config.knn.k > len(dataset.train):
        raise ValueError(
            f"knn.k must be <= {len(dataset.train)}, the number of training images, got {config.knn.k}"
        )
    if "linear" in config.protocols and not dataset.validation:
        label, count = min(Counter(image.label for image in dataset.train).items(), key=lambda item: item[1])
        if count < 2:
            raise ValueError(
                f"class '{dataset.classes[label]}' has 1 training image: the linear probe chooses on "
                "held-out images and needs at least 2 a class, or a validation/ folder"
            )


def _build_output_folder(config: EvaluateConfig) -> Path:
    if config.output is not None:
        folder = Path(config.output)
    else:
        checkpoint = Path(config.checkpoint)
        name = f"{checkpoint.stem}-{Path(config.data).resolve().name}"
        weights = "-random_init" if config.random_init else "-ema" if config.ema else ""
        folder = checkpoint.parent / "evaluation" / f"{name}{weights}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):  # an unwritable folder shows now, not after the work
        return folder


def _extraction_settings(config: EvaluateConfig) -> ExtractionSettings:
    num_workers = config.num_workers
    return ExtractionSettings(
        num_images_per_batch=config.num_images_per_batch,
        num_workers=min(8, os.cpu_count() or 1) if num_workers is None else num_workers,
        precision=config.precision,
        device=_find_device(config.device),
        error_budget_fraction=config.error_budget_fraction,
        seed=config.seed,
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


def _extract_splits(
    model: LoadedModel, dataset: LabelledSet, settings: ExtractionSettings
) -> dict[str, Features]:
    features = {}
    for name, images in dataset.splits.items():
        found = extract_features(
            model, images, dataset, settings, description=f"{name} features", feature_names=["cls"]
        )
        assert found is not None  # there is one rank
        features[name] = found
    return features


def _score_linear(
    config: EvaluateConfig,
    model: LoadedModel,
    dataset: LabelledSet,
    features: dict[str, Features],
    settings: ExtractionSettings,
) -> list[Score]:
    start = time.perf_counter()
    train_views = _build_train_views(config.linear, model, dataset.train, features["train"], settings)
    results = linear_probe(
        train_views,
        features["train"].labels,
        _labelled(features["test"]),
        config.linear,
        num_classes=len(dataset.classes),
        validation=_labelled(features["validation"]) if "validation" in features else None,
        heldout_features=features["train"].values["cls"],
        seed=config.seed,
        device=settings.device,
    )
    seconds = time.perf_counter() - start
    return [
        Score(
            name=("linear_bn" if result.batch_norm else "linear")
            + ("_paper" if result.selection == "test" else "_heldout"),
            selection=result.selection,
            predictions=result.predictions,
            labels=features["test"].labels,
            hyperparameters={
                "base_learning_rate": result.base_learning_rate,
                "epoch": result.epoch,
                "num_epochs": config.linear.num_epochs,
                "batch_norm": result.batch_norm,
                "views_cached": config.linear.num_views,
            },
            seconds=seconds,
        )
        for result in results
    ]


def _build_train_views(
    config: LinearConfig,
    model: LoadedModel,
    images: tuple[LabelledImage, ...],
    expected: Features,
    settings: ExtractionSettings,
) -> Callable[[int], Tensor]:
    """The augmented features of an epoch: computed anew, or taken in turn from views computed once."""

    def extract(first_view: int, num_views: int, description: str) -> Tensor:
        views = extract_augmented_features(
            model, images, settings, first_view=first_view, num_views=num_views, description=description
        )
        assert views is not None  # there is one rank
        if views.digest != expected.digest:
            raise ValueError("the training images have changed while they were being evaluated")
        return views.values

    if config.num_views is None:
        return lambda epoch: extract(epoch, 1, f"views of epoch {epoch + 1}")[0]
    cached = extract(0, min(config.num_views, config.num_epochs), "augmented views")
    return lambda epoch: cached[epoch % len(cached)]


def _score_knn(
    config: EvaluateConfig, features: dict[str, Features], num_classes: int, device: torch.device
) -> Score:
    start = time.perf_counter()
    train, test = features["train"], features["test"]
    predictions = knn_classify(
        train.values["cls"].to(device),
        train.labels.to(device),
        test.values["cls"].to(device),
        num_classes=num_classes,
        k=config.knn.k,
        temperature=config.knn.temperature,
    )
    return Score(
        name=f"knn{config.knn.k}",
        selection="none",
        predictions=predictions.cpu(),
        labels=test.labels,
        hyperparameters={"k": config.knn.k, "temperature": config.knn.temperature},
        seconds=time.perf_counter() - start,
    )


def _labelled(features: Features) -> LabelledFeatures:
    return LabelledFeatures(features.values["cls"], features.labels)


def _describe(
    config: EvaluateConfig,
    model: LoadedModel,
    dataset: LabelledSet,
    features: dict[str, Features],
    seconds: dict[str, float],
) -> dict[str, Any]:
    digests = "".join(f"{name}\t{split.digest}\n" for name, split in features.items())
    image_format = model.input_format
    size = image_format.image_size
    return {
        "checkpoint": {
            "path": config.checkpoint,
            "sha256": _sha256(Path(config.checkpoint)),
            "architecture": model.architecture,
            "random_init": config.random_init,
            "ema": config.ema,
        },
        "data": {
            "path": config.data,
            "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
            "classes": list(dataset.classes),
            "num_images": {name: len(split.names) for name, split in features.items()},
            "unreadable": [line for split in features.values() for line in split.unreadable],
            "num_ignored_files": dict(dataset.num_ignored_files),
        },
        "feature": FEATURE_NAME,
        "transform": {
            "evaluation": f"Resize({image_format.resize_size}, bicubic), CenterCrop({size})",
            "training": f"RandomResizedCrop({size}, scale 0.08 to 1, bicubic), horizontal flip",
            "mean": list(image_format.mean),
            "std": list(image_format.std),
        },
        "settings": asdict(config),
        "versions": {
            "stablerep": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
