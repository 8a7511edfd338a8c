"""Classifiers on features that were computed once: logreg, knn, ridge, fewshot."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stablerep.evaluation.fewshot import FewShotConfig, few_shot_classify
from stablerep.evaluation.knn import knn_classify_by_k
from stablerep.evaluation.logreg import (
    LogisticRegressionResult,
    logistic_regression,
    multilabel_logistic_regression,
)
from stablerep.evaluation.metrics import mean_average_precision, mean_per_class_accuracy
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.rows import BOOTSTRAP, accuracy_row, describe_split
from stablerep.evaluation.resampling import average_precision_interval, mean_per_class_interval
from stablerep.evaluation.results import Row
from stablerep.evaluation.ridge import ridge_classify


def run_logreg(evaluation: Evaluation) -> list[Row]:
    """Accuracy and its mean over classes; mean average precision where images have several classes."""
    return [row for feature in evaluation.feature_names for row in _score_logreg(evaluation, feature)]


def _score_logreg(evaluation: Evaluation, feature: str) -> Iterator[Row]:
    start = time.perf_counter()
    config, device, features = evaluation.config, evaluation.float64_device, evaluation.features
    sides = (
        evaluation.take("train", feature, device),
        features["train"].labels.to(device),
        evaluation.take("test", feature, device),
    )
    shared: dict[str, Any] = {
        "validation": evaluation.take_validation(feature),
        "groups": evaluation.train_groups,
        "heldout_fraction": config.logreg.heldout_fraction,
        "seed": config.seed,
    }
    if evaluation.dataset.targets == "multilabel":
        result = multilabel_logistic_regression(
            *sides,
            train_ignored=features["train"].ignored,
            validation_ignored=features["validation"].ignored if "validation" in features else None,
            **shared,
        )
        logits, labels, ignored = result.logits.cpu(), evaluation.labels, features["test"].ignored
        targets = (labels if ignored is None else labels.to(torch.int8).masked_fill(ignored, -1)).numpy()
        yield Row(
            protocol="logreg",
            metric="map11",
            value=mean_average_precision(logits, labels, ignored),
            interval=average_precision_interval(logits.numpy(), targets),
            interval_method=BOOTSTRAP,
            n=len(labels),
            selection=result.selection,
            hyperparameters=_describe_logreg(result),
            feature=feature,
            seconds=time.perf_counter() - start,
            predictions=logits.numpy(),
            targets=targets,
        )
        return
    result = logistic_regression(
        *sides, num_classes=evaluation.num_classes, metric=config.logreg.metric, **shared
    )
    predictions, seconds = result.predictions.cpu(), time.perf_counter() - start
    row = accuracy_row(
        "logreg",
        feature,
        predictions,
        evaluation.labels,
        seconds,
        selection=result.selection,
        hyperparameters=_describe_logreg(result),
    )
    yield row
    yield Row(
        protocol="logreg",
        metric="mean_per_class_accuracy",
        value=mean_per_class_accuracy(predictions, evaluation.labels),
        interval=mean_per_class_interval(predictions.numpy(), evaluation.labels.numpy()),
        interval_method=BOOTSTRAP,
        n=row.n,
        selection=row.selection,
        hyperparameters=row.hyperparameters,
        feature=feature,
        seconds=seconds,
        predictions=row.predictions,
        targets=row.targets,
    )


def _describe_logreg(result: LogisticRegressionResult) -> dict[str, Any]:
    return {
        "penalty": result.penalty,
        "chosen_by": result.metric,
        "num_penalties": len(result.penalties),
        "converged": sum(result.converged),
        "refit_converged": result.refit_converged,
        **describe_split(result.split_by),
        **({"warnings": list(result.warnings)} if result.warnings else {}),
    }


def run_knn(evaluation: Evaluation) -> list[Row]:
    """A row for each number of neighbours, all from one search."""
    config, device, rows = evaluation.config.knn, evaluation.settings.device, []
    for feature in evaluation.feature_names:
        start = time.perf_counter()
        predictions = knn_classify_by_k(
            evaluation.take("train", feature),
            evaluation.features["train"].labels.to(device),
            evaluation.take("test", feature),
            num_classes=evaluation.num_classes,
            ks=choose_numbers_of_neighbours(config.k, len(evaluation.features["train"].names)),
            temperature=config.temperature,
        )
        seconds = time.perf_counter() - start
        rows += [
            accuracy_row(
                f"knn{k}",
                feature,
                found.cpu(),
                evaluation.labels,
                seconds,
                hyperparameters={"k": k, "temperature": config.temperature},
            )
            for k, found in predictions.items()
        ]
    return rows


def choose_numbers_of_neighbours(ks: Sequence[int], num_train: int) -> list[int]:
    """Those that are not more than the training images.

    Raises:
        ValueError: If none is.
    """
    possible = [k for k in ks if k <= num_train]
    if not possible:
        raise ValueError(
            f"knn.k must be <= {num_train}, the number of training images, got {min(ks)} as the smallest"
        )
    return possible


def run_ridge(evaluation: Evaluation) -> list[Row]:
    """Ridge regression onto the classes."""
    rows = []
    for feature in evaluation.feature_names:
        start = time.perf_counter()
        device = evaluation.float64_device
        result = ridge_classify(
            evaluation.take("train", feature, device),
            evaluation.features["train"].labels.to(device),
            evaluation.take("test", feature, device),
            num_classes=evaluation.num_classes,
            validation=evaluation.take_validation(feature),
            groups=evaluation.train_groups,
            seed=evaluation.config.seed,
        )
        rows.append(
            accuracy_row(
                "ridge",
                feature,
                result.predictions.cpu(),
                evaluation.labels,
                time.perf_counter() - start,
                selection=result.selection,
                hyperparameters={"penalty": result.penalty, **describe_split(result.split_by)},
            )
        )
    return rows


def run_fewshot(evaluation: Evaluation) -> list[Row]:
    """Mean accuracy over episodes of test images; the training images give the mean that is subtracted."""
    config, rows = evaluation.config.fewshot, []
    for feature in evaluation.feature_names:
        start = time.perf_counter()
        base = evaluation.features["train"].values[feature].float().mean(dim=0)
        result = few_shot_classify(
            evaluation.features["test"].values[feature].float(), evaluation.labels, config, base
        )
        rows.append(
            Row(
                protocol=name_fewshot(config),
                metric="accuracy",
                value=result.accuracy,
                interval=result.interval,
                interval_method="normal over episodes, 95 %",
                n=config.num_episodes,
                selection="none",
                hyperparameters={
                    "num_queries_per_class": config.num_queries_per_class,
                    "normalization": config.normalization,
                    "seed": config.seed,
                },
                feature=feature,
                seconds=time.perf_counter() - start,
                predictions=result.episode_accuracies.numpy(),
                names=_name_episodes(config),
            )
        )
    return rows


def _name_episodes(config: FewShotConfig) -> list[str]:
    """Names that two runs share where the images of the episodes are the same."""
    draw = f"{config.num_ways} of {config.num_shots} + {config.num_queries_per_class}, seed {config.seed}"
    return [f"{draw}: episode {index}" for index in range(config.num_episodes)]


def name_fewshot(config: FewShotConfig) -> str:
    """What rows call the preset."""
    return f"fewshot_{config.num_ways}way_{config.num_shots}shot"
