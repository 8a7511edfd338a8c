"""k-NN on corrupted test images, whose features are computed on all ranks."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stablerep import distributed
from stablerep.evaluation.cache.store import load_or_extract
from stablerep.evaluation.corruptions import NOT_COMPARABLE, corrupt
from stablerep.evaluation.features import Features, ImageChange
from stablerep.evaluation.knn import knn_classify
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.rows import accuracy_row, mean_row
from stablerep.evaluation.results import Row

NUM_NEIGHBOURS = 20


def run_robustness(evaluation: Evaluation) -> list[Row]:
    """Accuracy for each corruption and severity, their mean for each corruption, and the mean of those."""
    config = evaluation.config.robustness
    is_first = distributed.rank() == 0
    start = time.perf_counter()
    rows, means = [], []
    train = evaluation.take("train", "cls") if is_first else torch.empty(0)
    train_labels = evaluation.features["train"].labels.to(evaluation.settings.device) if is_first else train
    k = min(NUM_NEIGHBOURS, len(train))
    settings = {"classifier": "k-NN", "k": k, "temperature": evaluation.config.knn.temperature}

    def score(protocol: str, test: Features, **more: Any) -> Row:
        predictions = knn_classify(
            train,
            train_labels,
            test.values["cls"].float().to(evaluation.settings.device),
            num_classes=evaluation.num_classes,
            k=k,
            temperature=evaluation.config.knn.temperature,
        )
        seconds = time.perf_counter() - start
        return accuracy_row(
            protocol, "cls", predictions.cpu(), test.labels, seconds, hyperparameters=settings | more
        )

    if is_first:
        rows.append(score("robustness_clean", evaluation.features["test"]))
    for corruption in config.corruptions:
        found = []
        for severity in config.severities:
            features = load_or_extract(
                evaluation.model,
                evaluation.dataset,
                "test",
                evaluation.settings,
                evaluation.cache,
                evaluation.fingerprint,
                feature_names=["cls"],
                change=build_change(corruption, severity, evaluation.config.seed),
            )
            if features is not None:
                found.append(score(f"robustness_{corruption}_{severity}", features, severity=severity))
        if is_first:
            note = {"comparable": False} if corruption in NOT_COMPARABLE else {}
            means.append(mean_row(f"robustness_{corruption}", found, start, settings | note))
            rows += [means[-1], *found]
    return [*rows, mean_row("robustness", means, start, settings)] if is_first else []


def build_change(corruption: str, severity: int, seed: int) -> ImageChange:
    """A corruption as extraction applies it and as the cache's keys name it."""
    return ImageChange(
        f"{corruption} {severity}, seed {seed}",
        partial(_corrupt, corruption=corruption, severity=severity, seed=seed),
    )


def _corrupt(image: Tensor, name: str, *, corruption: str, severity: int, seed: int) -> Tensor:
    return corrupt(image, corruption, severity, image_name=name, seed=seed)
