"""What a protocol needs of the model and the set, so that it is known before hours of features."""

import dataclasses
from collections import Counter

import torch

from stablerep.evaluation.config import CLASS_PROTOCOLS, TEXT_PROTOCOLS, EvaluateConfig
from stablerep.evaluation.corruptions import IMAGENET_C_SIZE, SMALLEST_SIDE
from stablerep.evaluation.fewshot import draw_episodes
from stablerep.evaluation.protocols.probes import choose_numbers_of_neighbours
from stablerep.evaluation.protocols.scores import count_shared_captions
from stablerep.evaluation.protocols.texts import read_class_names
from stablerep.evaluation.sets import LabelledSet
from stablerep.evaluation.zeroshot import check_class_names
from stablerep.loading import LoadedModel

_NUM_IMAGES_FOR_RIDGE = 5


class OptionError(ValueError):
    """What was given for a protocol is wrong, whatever the model and the set."""


def check_protocol(protocol: str, config: EvaluateConfig, model: LoadedModel, dataset: LabelledSet) -> None:
    """Refuses what cannot be run.

    Raises:
        FileNotFoundError: If a file that the protocol reads is missing.
        OptionError: If an option of the protocol is wrong.
        ValueError: Names the protocol and what it lacks.
    """
    if protocol in TEXT_PROTOCOLS and not model.has_text:
        raise ValueError(f"{protocol} needs a text tower, and {model.name} has none")
    if protocol == "geometry":
        return
    if protocol == "retrieval":
        if not dataset.has_captions:
            raise ValueError(f"retrieval needs captions, and the images of {dataset.name} have none")
        return
    if protocol == "zeroshot":
        _check_zeroshot(config, dataset)
        return
    dataset.check_has_classes(protocol)
    if dataset.targets == "multilabel" and protocol in CLASS_PROTOCOLS:
        raise ValueError(
            f"{protocol} needs one class an image, those of {dataset.name} have several; logreg takes them"
        )
    if protocol == "knn":
        choose_numbers_of_neighbours(config.knn.k, len(dataset.train))
    if protocol == "fewshot":
        _check_fewshot(config, dataset)
    if protocol == "robustness" and (size := model.input_format.image_size) < SMALLEST_SIDE:
        raise ValueError(
            f"robustness needs images of at least {SMALLEST_SIDE} pixels, and {model.name} takes {size}"
        )
    if protocol == "ridge" and not dataset.validation and len(dataset.train) < _NUM_IMAGES_FOR_RIDGE:
        raise ValueError(
            f"ridge chooses on held-out images and needs at least {_NUM_IMAGES_FOR_RIDGE} training images, "
            f"or a validation/ folder, got {len(dataset.train)}"
        )
    if protocol in ("linear", "logreg") and dataset.targets == "classes" and not dataset.validation:
        _check_can_hold_out(protocol, dataset)


def describe_limits(
    protocol: str, config: EvaluateConfig, model: LoadedModel, dataset: LabelledSet
) -> list[str]:
    """What a protocol that runs will leave out, or does otherwise than published, a line each."""
    num_train = len(dataset.train)
    if protocol == "knn" and (left_out := [k for k in config.knn.k if k > num_train]):
        numbers = ", ".join(map(str, left_out))
        return [f"knn: no k of {numbers}, as there are {num_train} training images"]
    if protocol == "geometry" and (num_shared := count_shared_captions(dataset)) < 2:
        lacks = "no LiDAR, which needs" if num_shared else "no alignment and no LiDAR, which need"
        return [f"geometry: {lacks} several images of the same captions"]
    if protocol == "robustness" and (size := model.input_format.image_size) != IMAGENET_C_SIZE:
        return [
            f"robustness: at {size} pixels, not ImageNet-C's {IMAGENET_C_SIZE}, figures are not comparable "
            "with its own"
        ]
    return []


def _check_zeroshot(config: EvaluateConfig, dataset: LabelledSet) -> None:
    if dataset.targets != "classes":
        kinds = {"multilabel": "have several", "captions": "have captions"}
        raise ValueError(
            f"zeroshot needs one class an image, those of {dataset.name} {kinds[dataset.targets]}"
        )
    try:
        check_class_names(read_class_names(config, dataset))
    except ValueError as error:
        kind = ValueError if config.zeroshot.class_names is None else OptionError
        raise kind(f"zeroshot: {error}") from error


def _check_fewshot(config: EvaluateConfig, dataset: LabelledSet) -> None:
    labels = torch.tensor([image.label for image in dataset.test])
    try:
        draw_episodes(labels, dataclasses.replace(config.fewshot, num_episodes=2))
    except ValueError as error:
        raise ValueError(f"fewshot draws from the test split of {dataset.name}: {error}") from error


def _check_can_hold_out(protocol: str, dataset: LabelledSet) -> None:
    label, count = min(Counter(image.label for image in dataset.train).items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            f"class '{dataset.classes[label]}' has 1 training image: {protocol} chooses on held-out images "
            "and needs at least 2 a class, or a validation/ folder"
        )
