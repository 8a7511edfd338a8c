"""k-NN on corrupted test images, whose features are computed on all ranks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from stablerep import distributed
from stablerep.evaluation.cache.store import load_or_extract_changed
from stablerep.evaluation.config import RobustnessConfig
from stablerep.evaluation.corruptions import IMAGENET_C_SIZE, NOT_COMPARABLE, corrupt
from stablerep.evaluation.features import Features
from stablerep.evaluation.knn import knn_classify
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.rows import BOOTSTRAP, accuracy_row
from stablerep.evaluation.resampling import mean_interval
from stablerep.evaluation.results import Row
from stablerep.evaluation.transforms import ImageChange

NUM_NEIGHBOURS = 20
MAX_VIEWS_PER_PASS = 2**19
"""Features of corrupted images that rank 0 holds at a time: 1.6 GB in float32 at width 768."""
PUBLISHED_MEAN = f"robustness_without_{'_'.join(NOT_COMPARABLE)}"
"""What rows call the mean over the corruptions that are as ImageNet-C has them."""


def run_robustness(evaluation: Evaluation) -> list[Row]:
    """Accuracy for each corruption and severity, their mean for each corruption, and the mean of those.

    That mean is written twice where some of the corruptions cannot be compared with ImageNet-C's: over all,
    and over the others alone. Rows say whether they can be compared.
    """
    config = evaluation.config.robustness
    found: dict[tuple[str, int], Row] = {}
    for corruption, severity, features, seconds in _extract(evaluation):
        name = f"robustness_{corruption}_{severity}"
        note = {"severity": severity, **_note(evaluation, [corruption])}
        found[corruption, severity] = _score(evaluation, name, features, seconds, note)
    if distributed.rank() != 0:
        return []
    rows = [_score(evaluation, "robustness_clean", evaluation.features["test"], 0.0, {})]
    means: dict[str, Row] = {}
    for corruption in config.corruptions:
        parts = [found[corruption, severity] for severity in config.severities]
        means[corruption] = _average(f"robustness_{corruption}", parts, _note(evaluation, [corruption]))
        rows += [means[corruption], *parts]
    for name, corruptions in list_means(config).items():
        parts = [means[corruption] for corruption in corruptions]
        rows.append(_average(name, parts, _note(evaluation, corruptions)))
    return rows


def list_means(config: RobustnessConfig) -> dict[str, list[str]]:
    """What each mean over corruptions is called and over which it is."""
    means = {"robustness": list(config.corruptions)}
    published = [corruption for corruption in config.corruptions if corruption not in NOT_COMPARABLE]
    if 0 < len(published) < len(config.corruptions):
        means[PUBLISHED_MEAN] = published
    return means


def build_change(corruption: str, severity: int, seed: int) -> ImageChange:
    """A corruption as extraction applies it and as the cache's keys name it."""
    return ImageChange(
        f"{corruption} {severity}, seed {seed}",
        partial(_corrupt, corruption=corruption, severity=severity, seed=seed),
    )


def _corrupt(image: Tensor, name: str, *, corruption: str, severity: int, seed: int) -> Tensor:
    return corrupt(image, corruption, severity, image_name=name, seed=seed)


def _extract(evaluation: Evaluation) -> Iterator[tuple[str, int, Features, float]]:
    """Corruption, severity, features and their share of the seconds, on rank 0; nothing on the others.

    A pass decodes each image once and corrupts it in as many ways as fit into memory; one of other
    images than the test features stops every rank.
    """
    config, num_images = evaluation.config.robustness, len(evaluation.dataset.test)
    kinds = [(corruption, severity) for corruption in config.corruptions for severity in config.severities]
    num_per_pass = max(1, min(MAX_VIEWS_PER_PASS // num_images, evaluation.settings.num_images_per_batch))
    for first in range(0, len(kinds), num_per_pass):
        start = time.perf_counter()
        own = kinds[first : first + num_per_pass]
        features = load_or_extract_changed(
            evaluation.model,
            evaluation.dataset,
            "test",
            evaluation.settings,
            evaluation.cache,
            evaluation.fingerprint,
            [build_change(corruption, severity, evaluation.config.seed) for corruption, severity in own],
            feature_names=["cls"],
        )
        evaluation.check_images("test", features[0] if features else None, "corrupted versions")
        seconds = (time.perf_counter() - start) / len(own)
        for (corruption, severity), part in zip(own, features or [], strict=False):
            yield corruption, severity, part, seconds


def _score(
    evaluation: Evaluation, protocol: str, test: Features, seconds: float, note: Mapping[str, Any]
) -> Row:
    """The accuracy of k-NN; its time is added to that of the features."""
    start = time.perf_counter()
    train = evaluation.take("train", "cls")
    k, temperature = min(NUM_NEIGHBOURS, len(train)), evaluation.config.knn.temperature
    predictions = knn_classify(
        train,
        evaluation.features["train"].labels.to(train.device),
        test.values["cls"].float().to(train.device),
        num_classes=evaluation.num_classes,
        k=k,
        temperature=temperature,
    ).cpu()
    return accuracy_row(
        protocol,
        "cls",
        predictions,
        test.labels,
        seconds + time.perf_counter() - start,
        hyperparameters={"classifier": "k-NN", "k": k, "temperature": temperature, **note},
    )


def _note(evaluation: Evaluation, corruptions: Sequence[str]) -> dict[str, bool]:
    """Whether figures of these corruptions can be compared with those of ImageNet-C's images."""
    is_size = evaluation.model.input_format.image_size == IMAGENET_C_SIZE
    return {"comparable": is_size and not set(corruptions) & set(NOT_COMPARABLE)}


def _average(protocol: str, rows: Sequence[Row], note: Mapping[str, Any]) -> Row:
    """The mean of accuracies on the same images: for each image, the share of its versions that are right."""
    scores = np.mean([_score_images(row) for row in rows], axis=0).round(9)  # equal shares, equal numbers
    shared = {name: value for name, value in rows[0].hyperparameters.items() if name != "severity"}
    return Row(
        protocol=protocol,
        metric="accuracy",
        value=float(scores.mean()),
        interval=mean_interval(scores),
        interval_method=BOOTSTRAP,
        n=rows[0].n,
        selection="none",
        hyperparameters=shared | dict(note),
        feature="cls",
        seconds=sum(row.seconds for row in rows),
        predictions=scores,
    )


def _score_images(row: Row) -> np.ndarray:
    assert row.predictions is not None
    return row.predictions if row.targets is None else row.predictions == row.targets
