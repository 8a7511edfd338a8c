"""The paper's linear probe, on augmented views that it computes itself, on all ranks."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from stablerep import distributed
from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.features import extract_augmented_features
from stablerep.evaluation.linear import LabelledFeatures, linear_probe
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.rows import accuracy_row, describe_split
from stablerep.evaluation.results import Row
from stablerep.evaluation.sets import LabelledSet


def run_linear(evaluation: Evaluation) -> list[Row]:
    """The best of the ten heads, with and without BatchNorm, chosen on test and on held-out images."""
    start = time.perf_counter()
    config, features = evaluation.config, evaluation.features
    views = _build_train_views(evaluation)
    if distributed.rank() != 0:
        for epoch in range(config.linear.num_epochs):
            views(epoch)
        return []
    test, train = features["test"], features["train"]
    results = linear_probe(
        views,
        train.labels,
        LabelledFeatures(test.values["cls"].float(), test.labels),
        config.linear,
        num_classes=evaluation.num_classes,
        validation=LabelledFeatures(
            features["validation"].values["cls"].float(), features["validation"].labels
        )
        if "validation" in features
        else None,
        heldout_features=train.values["cls"].float(),
        groups=evaluation.train_groups,
        seed=config.seed,
        device=evaluation.settings.device,
    )
    seconds = time.perf_counter() - start
    return [
        accuracy_row(
            "linear"
            + ("_bn" if result.batch_norm else "")
            + ("_paper" if result.selection == "test" else "_heldout"),
            "cls",
            result.predictions,
            test.labels,
            seconds,
            selection=result.selection,
            hyperparameters={
                "base_learning_rate": result.base_learning_rate,
                "epoch": result.epoch,
                "num_epochs": config.linear.num_epochs,
                "batch_norm": result.batch_norm,
                "views_cached": config.linear.num_views,
                **describe_split(result.split_by),
            },
        )
        for result in results
    ]


def _build_train_views(evaluation: Evaluation) -> Callable[[int], Tensor]:
    """The augmented features of an epoch: computed anew, or taken in turn from views computed once."""
    config, model, dataset = evaluation.config.linear, evaluation.model, evaluation.dataset

    def extract(first_view: int, num_views: int, description: str) -> Tensor:
        views = extract_augmented_features(
            model,
            dataset.train,
            evaluation.settings,
            first_view=first_view,
            num_views=num_views,
            description=description,
        )
        evaluation.check_images("train", views, "augmented views")
        return torch.empty(0) if views is None else views.values

    if config.num_views is None:
        return lambda epoch: extract(epoch, 1, f"views of epoch {epoch + 1}").float().squeeze(0)
    cached = extract(0, min(config.num_views, config.num_epochs), "augmented views")
    return lambda epoch: cached[epoch % len(cached)].float() if len(cached) else cached


def count_augmented_images(config: EvaluateConfig, dataset: LabelledSet) -> int:
    """Images that the linear probe passes through the model beside those of the cached features."""
    num_views = config.linear.num_views
    num_epochs = config.linear.num_epochs
    return len(dataset.train) * (num_epochs if num_views is None else min(num_views, num_epochs))
