"""Labelled images by reference: where their bytes lie and what they show."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL import Image

from data_gen.shards import Store
from stablerep.evaluation.sets.decoding import MAX_IMAGE_BYTES, decode_image

Targets = Literal["classes", "multilabel", "captions"]

MAX_NUM_CLASSES = 2**20
"""Classes that a set may have; a larger number among the labels is none of a class."""
_NUMBER_OR_ID = re.compile(r"n?\d+")


class ImageContent(ABC):
    """Where the bytes of one image are."""

    __slots__ = ()

    recorded_sha256: str = ""
    """What the set's own records say of the bytes; "" where they say nothing."""

    @abstractmethod
    def read(self) -> bytes:
        """What the image is hashed by and decoded from.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is not what was listed.
        """

    def decode(self, data: bytes, name: str) -> Image.Image:
        """The upright RGB image of these bytes. Raises ValueError, naming the image."""
        return decode_image(data, name)


@dataclass(frozen=True, slots=True)
class FileRange(ImageContent):
    """A part of a file: the image itself, or a member of a tar.

    Args:
        path: The file.
        offset_bytes: Where the image starts in it.
        num_bytes: Its size.
        recorded_sha256: Its digest, if the set records it.
    """

    path: str
    offset_bytes: int
    num_bytes: int
    recorded_sha256: str = ""

    def read(self) -> bytes:
        """The encoded image."""
        check_num_bytes(self.num_bytes)
        with open(self.path, "rb") as file:
            file.seek(self.offset_bytes)
            data = file.read(self.num_bytes)
        if len(data) != self.num_bytes:
            raise ValueError(f"expected {self.num_bytes} bytes in {self.path}, got {len(data)}")
        check_sha256(data, self.recorded_sha256)
        return data


@dataclass(frozen=True, slots=True)
class StoredRange(ImageContent):
    """A part of a file in an object store.

    Args:
        store: The folder.
        file_name: The file in it.
        offset_bytes: Where the image starts.
        num_bytes: Its size.
        recorded_sha256: Its digest.
    """

    store: Store
    file_name: str
    offset_bytes: int
    num_bytes: int
    recorded_sha256: str

    def read(self) -> bytes:
        """The encoded image."""
        check_num_bytes(self.num_bytes)
        data: bytes = self.store.read_range(self.file_name, self.offset_bytes, self.num_bytes)
        check_sha256(data, self.recorded_sha256)
        return data


def check_num_bytes(num_bytes: int) -> None:
    """Refuses a file that is too large to be an image."""
    if num_bytes > MAX_IMAGE_BYTES:
        raise ValueError(f"an image file may have {MAX_IMAGE_BYTES} bytes, got {num_bytes}")


def check_sha256(data: bytes, recorded: str) -> None:
    """Refuses bytes that are not those that were recorded."""
    if recorded and (actual := hashlib.sha256(data).hexdigest()) != recorded:
        raise ValueError(f"sha256 is {actual[:16]}…, expected {recorded[:16]}…")


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image and its classes: where the bytes lie, not the bytes.

    Args:
        name: Unique within the set and the same on every machine, such as `test/hat/0001.jpg`.
        labels: Class indices: one, or any number of them in a multi-label set.
        content: Where its bytes are.
        caption_id: Identity of its captions; images of the same ones share it. "" where there are none.
        captions: What texts say of it: none, one or several.
        ignored_labels: Classes of a multi-label set that count neither as right nor as wrong for the image.
    """

    name: str
    labels: tuple[int, ...]
    content: ImageContent
    caption_id: str = ""
    captions: tuple[str, ...] = ()
    ignored_labels: tuple[int, ...] = ()

    @property
    def label(self) -> int:
        """The class index of an image that has one class."""
        (label,) = self.labels
        return label

    def read_bytes(self) -> bytes:
        """The bytes that it is hashed by and decoded from.

        Raises:
            OSError: If they cannot be read.
            ValueError: If they are not what was listed; names the image.
        """
        try:
            return self.content.read()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def decode(self, data: bytes) -> Image.Image:
        """The upright RGB image of these bytes. Raises ValueError, naming the image."""
        return self.content.decode(data, self.name)


@dataclass(frozen=True)
class LabelledSet:
    """The splits of a labelled set.

    Args:
        name: What was read: a path, a URL, or a name such as `torchvision:CIFAR10`.
        targets: What labels mean: one class an image, any number of classes, or the image's caption.
        classes: Class names, or captions; a label is an index into them.
        train: Images of the training split; a set of captions may have none.
        validation: Images of the validation split; empty if there is none.
        test: Images of the test split.
        num_ignored_files: Files that are no images, or shard members that are neither image nor label, by
            suffix.
        remarks: What a reader of the scores should know of the splits; one line each.
    """

    name: str
    targets: Targets
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    validation: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    num_ignored_files: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, tuple[LabelledImage, ...]]:
        """The splits that hold images, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: images for name, images in splits.items() if images}

    @property
    def has_captions(self) -> bool:
        """Whether each test image has a caption."""
        return bool(self.test) and all(image.captions for image in self.test)

    @property
    def has_class_names(self) -> bool:
        """Whether the classes are called by words, and not all by numbers or WordNet's ids (n01440764)."""
        if self.targets == "captions":
            return False
        return not all(_NUMBER_OR_ID.fullmatch(name.strip()) for name in self.classes)

    def check_has_classes(self, protocol: str) -> None:
        """Refuses a protocol that learns classes on train and predicts them on test, where that cannot be.

        Raises:
            ValueError: Names the protocol and what is missing.
        """
        if self.targets == "captions":
            raise ValueError(
                f"{protocol} needs classes, but the labels of {self.name} are its captions; a dataset of "
                "`stablerep generate` has classes where it carries a column cls or label"
            )
        if not self.train:
            raise ValueError(f"{protocol} needs a train and a test split, but {self.name} is one split")


def build_set(
    name: str,
    targets: Targets,
    classes: Sequence[str],
    images: Mapping[str, Sequence[LabelledImage]],
    num_ignored_files: Mapping[str, int] | None = None,
    remarks: Sequence[str] = (),
) -> LabelledSet:
    """A set of splits that fit together.

    Args:
        name: What was read.
        targets: What labels mean.
        classes: Class names.
        images: Images by split: `test`, and `train` and `validation` if there are such.
        num_ignored_files: As in `LabelledSet`.
        remarks: As in `LabelledSet`.

    Raises:
        ValueError: If a split is empty, a class of another split is not in train, or train has fewer than two
            classes.
    """
    for split, members in images.items():
        if not members:
            raise ValueError(f"{name}: no images in its {split} split")
    if targets != "captions" and "train" in images:
        _check_classes(name, classes, images)
    return LabelledSet(
        name=name,
        targets=targets,
        classes=tuple(classes),
        train=tuple(images.get("train", ())),
        validation=tuple(images.get("validation", ())),
        test=tuple(images["test"]),
        num_ignored_files=dict(sorted((num_ignored_files or {}).items())),
        remarks=tuple(remarks),
    )


def _check_classes(name: str, classes: Sequence[str], images: Mapping[str, Sequence[LabelledImage]]) -> None:
    present = {label for image in images["train"] for label in image.labels}
    if len(present) < 2:
        raise ValueError(f"{name}: at least 2 classes are needed in train, got {len(present)}")
    for split, members in images.items():
        for image in members:
            for label in image.labels:
                if label not in present:
                    raise ValueError(
                        f"{image.name}: class '{classes[label]}' of {split} has no image in train"
                    )


def name_numbers(where: str, largest: int) -> tuple[str, ...]:
    """The names of classes 0 … largest that have no others.

    Args:
        where: What error messages call the place of the largest label.
        largest: That label.

    Raises:
        ValueError: If it is too large to be a class.
    """
    if largest >= MAX_NUM_CLASSES:
        raise ValueError(f"{where}: a label must be < {MAX_NUM_CLASSES}, got {largest}")
    return tuple(str(label) for label in range(largest + 1))


def identify_captions(captions: Sequence[str]) -> str:
    """The `caption_id` of an image with these captions in this order; "" without any."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:32] if captions else ""


def label_by_captions(
    images: Mapping[str, Sequence[LabelledImage]],
) -> tuple[tuple[str, ...], dict[str, list[LabelledImage]]]:
    """The captions as classes, in the order in which they first occur, and the images with such labels.

    Where images have several captions, a class is called by the first.

    Args:
        images: Images by split.

    Raises:
        ValueError: If an image has no caption; names it.
    """
    classes: dict[str, tuple[int, str]] = {}
    labelled: dict[str, list[LabelledImage]] = {}
    for split, members in images.items():
        labelled[split] = []
        for image in members:
            if not image.captions:
                raise ValueError(f"{image.name}: it has neither a label nor a caption")
            label, _ = classes.setdefault(image.caption_id, (len(classes), image.captions[0]))
            labelled[split].append(replace(image, labels=(label,)))
    return tuple(caption for _, caption in classes.values()), labelled


def check_same_classes(name: str, classes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The class names that all splits share, in one order.

    Args:
        name: The set.
        classes: Class names by split, train among them.

    Raises:
        ValueError: If two splits differ; names the first difference.
    """
    train = tuple(classes["train"])
    for split, others in classes.items():
        if tuple(others) == train:
            continue
        for label in range(max(len(train), len(others))):
            names = [part[label] if label < len(part) else None for part in (train, others)]
            if names[0] != names[1]:
                raise ValueError(
                    f"{name}: class {label} is {names[0]!r} in train and {names[1]!r} in {split}: labels "
                    "must mean the same in all splits"
                )
    return train
