"""From features to scores: each protocol of `stablerep evaluate`, as rows of results.jsonl.

linear       the paper's probe on augmented views; computes features of its own, on all ranks
robustness   k-NN on corrupted test images; likewise
logreg, knn, ridge, fewshot, geometry     on features that were computed once, for each feature
zeroshot, retrieval                       in the space of images and texts
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablerep import distributed
from stablerep.evaluation.cache.store import FeatureCache, load_or_embed_texts, load_or_extract
from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.corruptions import NOT_COMPARABLE, corrupt
from stablerep.evaluation.features import (
    ExtractionSettings,
    Features,
    ImageChange,
    extract_augmented_features,
)
from stablerep.evaluation.fewshot import few_shot_classify
from stablerep.evaluation.geometry import alignment, lidar, rank_me, uniformity
from stablerep.evaluation.knn import knn_classify, knn_classify_by_k
from stablerep.evaluation.linear import LabelledFeatures, linear_probe
from stablerep.evaluation.logreg import (
    LogisticRegressionResult,
    logistic_regression,
    multilabel_logistic_regression,
)
from stablerep.evaluation.metrics import mean_average_precision, mean_per_class_accuracy
from stablerep.evaluation.prompts import fill_templates, read_templates
from stablerep.evaluation.results import Row
from stablerep.evaluation.retrieval import pair_captions, retrieval_recall
from stablerep.evaluation.ridge import ridge_classify
from stablerep.evaluation.sets import LabelledSet
from stablerep.evaluation.statistics import wilson_interval
from stablerep.evaluation.zeroshot import embed_classes, zero_shot_classify
from stablerep.loading import LoadedModel

JOINT_FEATURE = "image_text"
"""What rows call the space that images and texts share."""
_WILSON = "Wilson, 95 %"
_RETRIEVAL_RANKS = (1, 5, 10)
_ROBUSTNESS_NEIGHBOURS = 20


@dataclass(frozen=True)
class Evaluation:
    """What protocols have to work with.

    Args:
        config: The options.
        model: The model.
        dataset: The set.
        settings: How features are computed.
        cache: Where they are kept.
        fingerprint: Of the test split, on rank 0.
        features: Of each split, on rank 0; empty elsewhere.
        feature_names: Those that the protocols on features are run for.
    """

    config: EvaluateConfig
    model: LoadedModel
    dataset: LabelledSet
    settings: ExtractionSettings
    cache: FeatureCache | None
    fingerprint: str
    features: Mapping[str, Features]
    feature_names: Sequence[str]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.dataset.classes)

    @property
    def labels(self) -> Tensor:
        """Of the test images."""
        return self.features["test"].labels

    def take(self, split: str, feature: str) -> Tensor:
        """A feature of a split, float32, on the device."""
        return self.features[split].values[feature].float().to(self.settings.device)

    def take_validation(self, feature: str) -> tuple[Tensor, Tensor] | None:
        """That of the validation split with its labels, if there is one."""
        if "validation" not in self.features:
            return None
        return self.take("validation", feature), self.features["validation"].labels.to(self.settings.device)


def run_protocol(name: str, evaluation: Evaluation) -> list[Row]:
    """The rows of one protocol, on rank 0; with ranks, each of them calls it."""
    return _PROTOCOLS[name](evaluation)


def list_row_protocols(config: EvaluateConfig, protocols: Sequence[str]) -> list[str]:
    """What the rows to come may be called, for requirements on them."""
    few = config.fewshot
    names: dict[str, list[str]] = {
        "linear": [f"linear{bn}_{chosen}" for bn in ("", "_bn") for chosen in ("paper", "heldout")],
        "knn": [f"knn{k}" for k in config.knn.k],
        "fewshot": [f"fewshot_{few.num_ways}way_{few.num_shots}shot"],
        "retrieval": ["retrieval_image_to_text", "retrieval_text_to_image"],
        "robustness": [
            "robustness",
            "robustness_clean",
            *(f"robustness_{corruption}" for corruption in config.robustness.corruptions),
            *(
                f"robustness_{corruption}_{severity}"
                for corruption in config.robustness.corruptions
                for severity in config.robustness.severities
            ),
        ],
    }
    return [row for name in protocols for row in names.get(name, [name])]


def count_augmented_images(config: EvaluateConfig, dataset: LabelledSet) -> int:
    """Images that the linear probe passes through the model beside those of the cached features."""
    num_views = config.linear.num_views
    num_epochs = config.linear.num_epochs
    return len(dataset.train) * (num_epochs if num_views is None else min(num_views, num_epochs))


def _run_linear(evaluation: Evaluation) -> list[Row]:
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
        seed=config.seed,
        device=evaluation.settings.device,
    )
    seconds = time.perf_counter() - start
    return [
        _accuracy_row(
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
        if views is None:
            return torch.empty(0)
        if views.digest != evaluation.features["train"].digest:
            raise ValueError("the training images have changed while they were being evaluated")
        return views.values

    if config.num_views is None:
        return lambda epoch: extract(epoch, 1, f"views of epoch {epoch + 1}").float().squeeze(0)
    cached = extract(0, min(config.num_views, config.num_epochs), "augmented views")
    return lambda epoch: cached[epoch % len(cached)].float() if len(cached) else cached


def _run_robustness(evaluation: Evaluation) -> list[Row]:
    config = evaluation.config.robustness
    is_first = distributed.rank() == 0
    start = time.perf_counter()
    rows, means = [], []
    train = evaluation.take("train", "cls") if is_first else torch.empty(0)
    train_labels = evaluation.features["train"].labels.to(evaluation.settings.device) if is_first else train
    k = min(_ROBUSTNESS_NEIGHBOURS, len(train))
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
        return _accuracy_row(
            protocol, "cls", predictions.cpu(), test.labels, seconds, hyperparameters=settings | more
        )

    if is_first:
        rows.append(score("robustness_clean", evaluation.features["test"]))
    for corruption in config.corruptions:
        found = []
        for severity in config.severities:
            seed = evaluation.config.seed
            change = ImageChange(
                f"{corruption} {severity}, seed {seed}",
                partial(_corrupt, corruption=corruption, severity=severity, seed=seed),
            )
            features = load_or_extract(
                evaluation.model,
                evaluation.dataset,
                "test",
                evaluation.settings,
                evaluation.cache,
                evaluation.fingerprint,
                feature_names=["cls"],
                change=change,
            )
            if features is not None:
                found.append(score(f"robustness_{corruption}_{severity}", features, severity=severity))
        if is_first:
            note = {"comparable": False} if corruption in NOT_COMPARABLE else {}
            means.append(_mean_row(f"robustness_{corruption}", found, start, settings | note))
            rows += [means[-1], *found]
    return [*rows, _mean_row("robustness", means, start, settings)] if is_first else []


def _corrupt(image: Tensor, name: str, *, corruption: str, severity: int, seed: int) -> Tensor:
    return corrupt(image, corruption, severity, image_name=name, seed=seed)


def _run_logreg(evaluation: Evaluation) -> list[Row]:
    return [row for feature in evaluation.feature_names for row in _score_logreg(evaluation, feature)]


def _score_logreg(evaluation: Evaluation, feature: str) -> Iterator[Row]:
    start = time.perf_counter()
    config, device = evaluation.config, evaluation.settings.device
    sides = (
        evaluation.take("train", feature),
        evaluation.features["train"].labels.to(device),
        evaluation.take("test", feature),
    )
    shared: dict[str, Any] = {
        "validation": evaluation.take_validation(feature),
        "heldout_fraction": config.logreg.heldout_fraction,
        "seed": config.seed,
    }
    if evaluation.dataset.targets == "multilabel":
        result = multilabel_logistic_regression(*sides, **shared)
        yield Row(
            protocol="logreg",
            metric="map11",
            value=mean_average_precision(result.logits.cpu(), evaluation.labels),
            interval=None,
            interval_method="",
            n=len(evaluation.labels),
            selection=result.selection,
            hyperparameters=_describe_logreg(result),
            feature=feature,
            seconds=time.perf_counter() - start,
            predictions=result.logits.cpu().numpy(),
            targets=evaluation.labels.numpy(),
        )
        return
    result = logistic_regression(
        *sides, num_classes=evaluation.num_classes, metric=config.logreg.metric, **shared
    )
    predictions, seconds = result.predictions.cpu(), time.perf_counter() - start
    row = _accuracy_row(
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
        interval=None,
        interval_method="",
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
        **({"warnings": list(result.warnings)} if result.warnings else {}),
    }


def _run_knn(evaluation: Evaluation) -> list[Row]:
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
            _accuracy_row(
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


def _run_ridge(evaluation: Evaluation) -> list[Row]:
    rows = []
    for feature in evaluation.feature_names:
        start = time.perf_counter()
        result = ridge_classify(
            evaluation.take("train", feature),
            evaluation.features["train"].labels.to(evaluation.settings.device),
            evaluation.take("test", feature),
            num_classes=evaluation.num_classes,
            validation=evaluation.take_validation(feature),
            seed=evaluation.config.seed,
        )
        rows.append(
            _accuracy_row(
                "ridge",
                feature,
                result.predictions.cpu(),
                evaluation.labels,
                time.perf_counter() - start,
                selection=result.selection,
                hyperparameters={"penalty": result.penalty},
            )
        )
    return rows


def _run_fewshot(evaluation: Evaluation) -> list[Row]:
    config, rows = evaluation.config.fewshot, []
    for feature in evaluation.feature_names:
        start = time.perf_counter()
        base = evaluation.features["train"].values[feature].float().mean(dim=0)
        result = few_shot_classify(
            evaluation.features["test"].values[feature].float(), evaluation.labels, config, base
        )
        rows.append(
            Row(
                protocol=f"fewshot_{config.num_ways}way_{config.num_shots}shot",
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
                names=[f"episode {index}" for index in range(config.num_episodes)],
            )
        )
    return rows


def _run_zeroshot(evaluation: Evaluation) -> list[Row]:
    start = time.perf_counter()
    config = evaluation.config.zeroshot
    names = read_class_names(evaluation.config, evaluation.dataset)
    templates = read_templates(config.templates)
    prompts = [prompt for name in names for prompt in fill_templates(templates, name)]
    embedded = load_or_embed_texts(
        evaluation.model, prompts, evaluation.settings, evaluation.cache, description="class prompts"
    )
    if embedded is None:
        return []
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    classes = embed_classes(lambda texts: embedded[[row_of[text] for text in texts]], names, templates)
    images = _embed_images(evaluation)
    result = zero_shot_classify(images, classes.to(images.device), evaluation.labels.to(images.device))
    settings = {"templates": config.templates, "num_templates": len(templates)}
    seconds = time.perf_counter() - start
    rows = [
        _accuracy_row(
            "zeroshot",
            JOINT_FEATURE,
            result.predictions.cpu(),
            evaluation.labels,
            seconds,
            hyperparameters=settings,
        )
    ]
    if result.top5 is not None:
        rows.append(
            Row(
                protocol="zeroshot",
                metric="top5_accuracy",
                value=result.top5,
                interval=result.top5_interval,
                interval_method=_WILSON,
                n=len(images),
                selection="none",
                hyperparameters=settings,
                feature=JOINT_FEATURE,
                seconds=seconds,
                predictions=result.in_top5.cpu().numpy().astype(np.float32),
            )
        )
    return rows


def read_class_names(config: EvaluateConfig, dataset: LabelledSet) -> list[str]:
    """The names that prompts are filled with.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it has not a name for each class.
    """
    if config.zeroshot.class_names is None:
        return list(dataset.classes)
    path = Path(config.zeroshot.class_names)
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if len(names) != len(dataset.classes) or not all(names):
        raise ValueError(
            f"{path} must have a name a line for each of the {len(dataset.classes)} classes, got "
            f"{sum(map(bool, names))}"
        )
    return names


def _run_retrieval(evaluation: Evaluation) -> list[Row]:
    start = time.perf_counter()
    captions = sorted({image.caption for image in evaluation.dataset.test})
    embedded = load_or_embed_texts(
        evaluation.model, captions, evaluation.settings, evaluation.cache, description="captions"
    )
    if embedded is None:
        return []
    test = evaluation.features["test"]
    texts, pairs = pair_captions([[caption] for caption in test.captions])
    place = {caption: row for row, caption in enumerate(captions)}
    images = _embed_images(evaluation)
    result = retrieval_recall(
        images,
        embedded[[place[text] for text in texts]].float().to(images.device),
        pairs.to(images.device),
        ks=[k for k in _RETRIEVAL_RANKS if k <= min(len(texts), len(images))],
    )
    seconds = time.perf_counter() - start
    sides = (
        ("image_to_text", result.image_to_text, result.image_ranks, test.names),
        ("text_to_image", result.text_to_image, result.text_ranks, texts),
    )
    return [
        Row(
            protocol=f"retrieval_{direction}",
            metric=f"recall@{recall.k}",
            value=recall.value,
            interval=recall.interval,
            interval_method=_WILSON,
            n=recall.num_queries,
            selection="none",
            hyperparameters={"num_images": len(images), "num_texts": len(texts)},
            feature=JOINT_FEATURE,
            seconds=seconds,
            predictions=(ranks <= recall.k).cpu().numpy().astype(np.float32),
            names=names,
        )
        for direction, recalls, ranks, names in sides
        for recall in recalls
    ]


def _embed_images(evaluation: Evaluation) -> Tensor:
    """The test images in the joint space."""
    model = evaluation.model.to(evaluation.settings.device)
    with torch.no_grad():
        parts = evaluation.take("test", "cls").split(evaluation.settings.num_images_per_batch)
        return torch.cat([model.encode_image_features(part).float() for part in parts])


def _run_geometry(evaluation: Evaluation) -> list[Row]:
    rows = []
    num_images, seed = evaluation.config.geometry.num_images, evaluation.config.seed
    for feature in evaluation.feature_names:
        start = time.perf_counter()
        x = evaluation.take("test", feature)
        found: list[tuple[str, float, int, dict[str, Any]]] = []
        if evaluation.dataset.has_captions:
            captions = evaluation.features["test"].caption_labels.to(x.device)
            if int(captions.max()) + 1 < len(x):  # two images share one
                aligned, spread = alignment(x, captions), lidar(x, captions)
                found.append(("alignment", aligned.value, aligned.num_pairs, {}))
                found.append(("lidar", spread.value, spread.num_captions, {}))
        if len(x) > 1:
            uniform = uniformity(x, num_samples=num_images, seed=seed)
            found.append(("uniformity", uniform.value, uniform.num_features, {"t": 2, "seed": seed}))
        rank = rank_me(x, num_samples=num_images, seed=seed)
        found.append(("rank_me", rank.value, rank.num_features, {"seed": seed}))
        seconds = time.perf_counter() - start
        rows += [
            Row("geometry", metric, value, None, "", n, "none", settings, feature, seconds)
            for metric, value, n, settings in found
        ]
    return rows


def _accuracy_row(
    protocol: str,
    feature: str,
    predictions: Tensor,
    labels: Tensor,
    seconds: float,
    *,
    selection: str = "none",
    hyperparameters: Mapping[str, Any],
) -> Row:
    num_correct, num_images = int((predictions == labels).sum()), len(labels)
    return Row(
        protocol=protocol,
        metric="accuracy",
        value=num_correct / num_images,
        interval=wilson_interval(num_correct, num_images),
        interval_method=_WILSON,
        n=num_images,
        selection=selection,
        hyperparameters=hyperparameters,
        feature=feature,
        seconds=seconds,
        predictions=predictions.numpy(),
        targets=labels.numpy(),
    )


def _mean_row(protocol: str, rows: Sequence[Row], start: float, hyperparameters: Mapping[str, Any]) -> Row:
    """The mean of accuracies; without an interval, as they are of the same images."""
    return Row(
        protocol=protocol,
        metric="accuracy",
        value=sum(row.value for row in rows) / len(rows),
        interval=None,
        interval_method="",
        n=sum(row.n for row in rows),
        selection="none",
        hyperparameters=hyperparameters,
        feature="cls",
        seconds=time.perf_counter() - start,
    )


_PROTOCOLS: dict[str, Callable[[Evaluation], list[Row]]] = {
    "linear": _run_linear,
    "logreg": _run_logreg,
    "knn": _run_knn,
    "ridge": _run_ridge,
    "fewshot": _run_fewshot,
    "zeroshot": _run_zeroshot,
    "retrieval": _run_retrieval,
    "geometry": _run_geometry,
    "robustness": _run_robustness,
}
COLLECTIVE_PROTOCOLS = ("linear", "robustness", "zeroshot", "retrieval")
"""Those that every rank takes part in."""
