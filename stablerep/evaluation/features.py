"""Frozen features of labelled images: every feature in one pass, on all ranks; augmented views."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from stablerep.evaluation.extraction import ExtractionSettings, extract_views
from stablerep.evaluation.sets.labelled import LabelledImage, LabelledSet
from stablerep.evaluation.transforms import ImageChange, build_train_transform
from stablerep.loading.model import InputFormat, build_eval_transform


class FeatureModel(Protocol):
    """What extraction needs of a model; `stablerep.loading.LoadedModel` has it."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features that it offers."""

    @property
    def input_format(self) -> InputFormat:
        """What it takes."""

    @property
    def backbone(self) -> nn.Module:
        """Normalised images [N, 3, S, S] to the pooled feature [N, D]."""

    def extract(self, images: Tensor) -> Mapping[str, Tensor]:
        """Every feature of `feature_names`, [N, D] each."""

    def to(self, device: torch.device) -> Any:
        """Moves it, in place."""


@dataclass(frozen=True)
class Features:
    """Features of the readable images of one split, in the order of the split.

    Args:
        values: Features by name, in the storage type, on the CPU.
        labels: Class indices, or which classes an image has.
        names: The images' names.
        caption_ids: Identity of each image's captions; images of the same ones share it. "" without any.
        captions: What texts say of each image: none, one or several.
        digest: `digest_images` of the whole split.
        unreadable: One line for each image that could not be read.
        ignored: Of a multi-label set, the entries of `labels` that count neither as right nor as wrong.

    Shapes:
        values [N, D_name]; labels int64 [N], or bool [N, C] of a multi-label set, as is `ignored`.
    """

    values: Mapping[str, Tensor]
    labels: Tensor
    names: tuple[str, ...]
    caption_ids: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    digest: str
    unreadable: tuple[str, ...]
    ignored: Tensor | None = None

    @property
    def caption_labels(self) -> Tensor:
        """Numbers of the captions, in the order of their first images: int64 [N].

        An image without a caption has a number of its own.
        """
        numbers: dict[str | int, int] = {}
        keys = [caption_id or index for index, caption_id in enumerate(self.caption_ids)]
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


@dataclass(frozen=True)
class ViewFeatures:
    """The pooled feature of augmented views of the readable images of a split, in the order of the split.

    Args:
        values: The features, in the storage type, on the CPU.
        names: The images' names.
        digest: `digest_images` of the whole split.
        unreadable: One line for each image that could not be read.

    Shapes:
        values [num_views, N, D].
    """

    values: Tensor
    names: tuple[str, ...]
    digest: str
    unreadable: tuple[str, ...]


def digest_images(images: Sequence[LabelledImage], sha256_of_images: Sequence[str]) -> str:
    """SHA-256 over names, labels, ignored labels, captions' ids and digests of the images, 64 hex digits.

    Args:
        images: A split.
        sha256_of_images: Digest of what each image is decoded from; "" for one that could not be read.
    """
    digest = hashlib.sha256()
    for image, sha256 in zip(images, sha256_of_images, strict=True):
        entry: list[object] = [image.name, image.labels, image.caption_id, sha256]
        if image.ignored_labels:
            entry.append(image.ignored_labels)
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def build_targets(images: Sequence[LabelledImage], dataset: LabelledSet) -> Tensor:
    """What protocols predict: int64 [N], or bool [N, C] of a multi-label set."""
    if dataset.targets != "multilabel":
        return torch.tensor([image.label for image in images], dtype=torch.int64)
    return _mark([image.labels for image in images], len(dataset.classes))


def build_ignored(images: Sequence[LabelledImage], dataset: LabelledSet) -> Tensor | None:
    """What of the targets is not known and does not count: bool [N, C] of a multi-label set, else None."""
    if dataset.targets != "multilabel":
        return None
    return _mark([image.ignored_labels for image in images], len(dataset.classes))


def _mark(labels: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    marks = torch.zeros(len(labels), num_classes, dtype=torch.bool)
    for row, marked in enumerate(labels):
        marks[row, list(marked)] = True
    return marks


def extract_features(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    dataset: LabelledSet,
    settings: ExtractionSettings,
    *,
    description: str,
    feature_names: Sequence[str] | None = None,
) -> Features | None:
    """Features under the evaluation transform. With ranks, each of them calls it.

    Args:
        model: The model, in eval mode.
        images: A split of the set, the same on all ranks.
        dataset: The set, for what labels mean.
        settings: How to compute.
        description: What the progress bar and messages call it.
        feature_names: Those of the model's features that are kept; None keeps all.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        ValueError: If more images are unreadable than the error budget allows, or a feature is not finite;
            on every rank.
    """
    found = extract_changed_features(
        model, images, dataset, settings, [None], description=description, feature_names=feature_names
    )
    return None if found is None else found[0]


def extract_changed_features(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    dataset: LabelledSet,
    settings: ExtractionSettings,
    changes: Sequence[ImageChange | None],
    *,
    description: str,
    feature_names: Sequence[str] | None = None,
) -> list[Features] | None:
    """Features of images that are changed in several ways, each image being decoded once.

    Args:
        model: As for `extract_features`.
        images: The split.
        dataset: The set.
        settings: How to compute.
        changes: What else is done with each image, at least one; None leaves it as it is.
        description: What the progress bar and messages call it.
        feature_names: As for `extract_features`.

    Returns:
        The features for each change on rank 0, None on the others.

    Raises:
        ValueError: As for `extract_features`.
    """
    names = model.feature_names if feature_names is None else tuple(feature_names)
    if unknown := sorted(set(names) - set(model.feature_names)):
        raise ValueError(f"feature '{unknown[0]}' is none of the model's: {', '.join(model.feature_names)}")
    image_format = model.input_format
    transform = build_eval_transform(
        image_format.image_size, image_format.resize_size, image_format.interpolation
    )
    model.to(settings.device)

    def compute(pixels: Tensor) -> Mapping[str, Tensor]:
        found = model.extract(pixels)
        return {name: found[name] for name in names}

    views = _ChangedViews(transform, changes)
    found = extract_views(compute, image_format, images, views, len(changes), settings, description)
    if found is None:
        return None
    kept = [images[index] for index in found.kept]
    shared: dict[str, Any] = {
        "labels": build_targets(kept, dataset),
        "names": tuple(image.name for image in kept),
        "caption_ids": tuple(image.caption_id for image in kept),
        "captions": tuple(image.captions for image in kept),
        "digest": digest_images(images, found.digests),
        "unreadable": found.unreadable,
        "ignored": build_ignored(kept, dataset),
    }
    return [
        Features(values={name: values[view] for name, values in found.values.items()}, **shared)
        for view in range(len(changes))
    ]


def extract_augmented_features(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    settings: ExtractionSettings,
    *,
    first_view: int,
    num_views: int,
    description: str,
) -> ViewFeatures | None:
    """Features of the augmented views `first_view`, …, `first_view + num_views − 1` of each image.

    A view is a function of (seed, view, name of the image) alone: not of the order, the batch, the workers
    or the ranks.

    Args:
        model: As for `extract_features`; its backbone's output is taken.
        images: The split.
        settings: How to compute.
        first_view: Index of the first view.
        num_views: Number of views, at least 1.
        description: What the progress bar is called.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        ValueError: As for `extract_features`.
    """
    seeds = [f"{settings.seed}/{view}" for view in range(first_view, first_view + num_views)]
    transform = build_train_transform(model.input_format.image_size)
    model.to(settings.device)
    found = extract_views(
        lambda pixels: {"pooled": model.backbone(pixels)},
        model.input_format,
        images,
        _AugmentedViews(transform, seeds),
        num_views,
        settings,
        description,
    )
    if found is None:
        return None
    names = tuple(images[index].name for index in found.kept)
    digest = digest_images(images, found.digests)
    return ViewFeatures(found.values["pooled"], names, digest, found.unreadable)


@dataclass(frozen=True)
class _ChangedViews:
    """The evaluation transform's view of an image, and what each change makes of it."""

    transform: v2.Transform
    changes: Sequence[ImageChange | None]

    def __call__(self, image: Image.Image, name: str) -> Tensor:
        view = self.transform(image)
        return torch.stack([view if change is None else change.apply(view, name) for change in self.changes])


@dataclass(frozen=True)
class _AugmentedViews:
    """A view of an image for each seed."""

    transform: v2.Transform
    seeds: Sequence[str]

    def __call__(self, image: Image.Image, name: str) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return torch.stack([self._draw(image, f"{seed}/{name}") for seed in self.seeds])

    def _draw(self, image: Image.Image, key: str) -> Tensor:
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"))
        view: Tensor = self.transform(image)
        return view
