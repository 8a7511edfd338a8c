"""torchvision's datasets by name, with their published splits: `torchvision:CIFAR10`.

Of image files only the places are taken from torchvision; they are read and decoded like all others. Where
a dataset is one array, its pixels are taken as they are. No other code than torchvision's is run: the pickles
of CIFAR are read by torchvision after their published MD5 was compared, MATLAB files by SciPy.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from stablerep.arguments import suggest
from stablerep.data.decoding import to_rgb
from stablerep.evaluation.prompts import read_imagenet_class_names
from stablerep.evaluation.sets.labelled import (
    FileRange,
    ImageContent,
    LabelledImage,
    LabelledSet,
    build_set,
    check_same_classes,
    name_numbers,
)

PREFIX = "torchvision:"
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)


@dataclass(frozen=True, slots=True, eq=False)
class DatasetItem(ImageContent):
    """An image of a dataset that torchvision holds in memory.

    Args:
        dataset: The dataset.
        index: Place in it.
    """

    dataset: Any
    index: int

    def read(self) -> bytes:
        """Mode, size and pixels."""
        image = self.dataset[self.index][0]
        return f"{image.mode} {image.width} {image.height}\n".encode() + image.tobytes()

    def decode(self, data: bytes, name: str) -> Image.Image:
        """The image in RGB."""
        header, _, pixels = data.partition(b"\n")
        mode, width, height = header.decode().split()
        return to_rgb(Image.frombytes(mode, (int(width), int(height)), pixels))


@dataclass(frozen=True)
class _Recipe:
    """How a dataset's published splits are opened.

    Args:
        read: What takes the images of a split from the opened dataset.
        splits: Keyword arguments by split; where there is no published test labels, validation is test.
        takes_download: Whether it has a `download` argument.
        remark: What a reader of the scores should know.
    """

    read: Callable[[Any, str, Path], list[LabelledImage]]
    splits: Mapping[str, Mapping[str, Any]]
    takes_download: bool = True
    remark: str = ""
    targets: Any = "classes"
    options: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""


def _read_files(dataset: Any, split: str, root: Path) -> list[LabelledImage]:
    """Of a dataset whose loader gives the path back in place of the image."""
    return [
        _file_image(root, path, (int(label),))
        for path, label in (dataset[index] for index in range(len(dataset)))
    ]


def _read_items(dataset: Any, split: str, root: Path) -> list[LabelledImage]:
    return [
        LabelledImage(f"{split}/{index:06d}", (int(dataset[index][1]),), DatasetItem(dataset, index))
        for index in range(len(dataset))
    ]


def _read_pets(dataset: Any, split: str, root: Path) -> list[LabelledImage]:
    # The one dataset of files without a `loader`: its lists spare decoding every image for its label.
    return [
        _file_image(root, path, (int(label),))
        for path, label in zip(dataset._images, dataset._labels, strict=True)
    ]


def _read_voc(dataset: Any, split: str, root: Path) -> list[LabelledImage]:
    return [
        _file_image(root, path, *_read_voc_labels(Path(annotation)))
        for path, annotation in zip(dataset.images, dataset.annotations, strict=True)
    ]


def _read_voc_labels(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The classes of an annotation's objects, and those of which all objects are marked difficult."""
    named: dict[str, list[bool]] = {}
    try:
        for entry in ElementTree.parse(path).getroot().iter("object"):
            is_difficult = entry.findtext("difficult", "0").strip() == "1"
            named.setdefault(str(entry.findtext("name")), []).append(is_difficult)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not readable as XML ({error})") from error
    if unknown := sorted(named.keys() - set(VOC_CLASSES)):
        raise ValueError(f"{path}: unknown class '{unknown[0]}'")
    is_ignored = {VOC_CLASSES.index(name): all(objects) for name, objects in named.items()}
    labels = sorted(label for label, ignored in is_ignored.items() if not ignored)
    return tuple(labels), tuple(sorted(is_ignored.keys() - set(labels)))


def _file_image(
    root: Path, path: Any, labels: tuple[int, ...], ignored_labels: tuple[int, ...] = ()
) -> LabelledImage:
    name = Path(os.path.relpath(path, root)).as_posix()
    content = FileRange(str(path), 0, os.stat(path).st_size)
    return LabelledImage(name, labels, content, ignored_labels=ignored_labels)


_TRAIN_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {**_TRAIN_TEST, "validation": {"split": "val"}}
_TRAIN_VAL = {"train": {"split": "train"}, "test": {"split": "val"}}
_VAL_IS_TEST = "the published validation split is the test split: the test labels are not public"
_PATHS: Mapping[str, Any] = {"loader": os.fspath}

RECIPES: Mapping[str, _Recipe] = {
    "CIFAR10": _Recipe(_read_items, _TRAIN_FLAG),
    "CIFAR100": _Recipe(_read_items, _TRAIN_FLAG),
    "Country211": _Recipe(_read_files, {**_TRAIN_TEST, "validation": {"split": "valid"}}, options=_PATHS),
    "DTD": _Recipe(_read_files, _TRAIN_VAL_TEST, options=_PATHS),
    "FGVCAircraft": _Recipe(_read_files, _TRAIN_VAL_TEST, options=_PATHS),
    "FashionMNIST": _Recipe(_read_items, _TRAIN_FLAG),
    "Flowers102": _Recipe(_read_files, _TRAIN_VAL_TEST, options=_PATHS),
    "Food101": _Recipe(_read_files, _TRAIN_TEST, options=_PATHS),
    "ImageNet": _Recipe(_read_files, _TRAIN_VAL, takes_download=False, remark=_VAL_IS_TEST, options=_PATHS),
    "Imagenette": _Recipe(_read_files, _TRAIN_VAL, remark=_VAL_IS_TEST, options=_PATHS),
    "KMNIST": _Recipe(_read_items, _TRAIN_FLAG),
    "MNIST": _Recipe(_read_items, _TRAIN_FLAG),
    "OxfordIIITPet": _Recipe(_read_pets, {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "RenderedSST2": _Recipe(_read_files, _TRAIN_VAL_TEST, options=_PATHS),
    "STL10": _Recipe(_read_items, _TRAIN_TEST),
    "SVHN": _Recipe(_read_items, _TRAIN_TEST),
    "StanfordCars": _Recipe(_read_files, _TRAIN_TEST, options=_PATHS),
    "VOC2007": _Recipe(
        _read_voc,
        {"train": {"image_set": "train"}, "validation": {"image_set": "val"}, "test": {"image_set": "test"}},
        targets="multilabel",
        options={"year": "2007"},
        dataset="VOCDetection",
        remark="classes of which an image shows difficult objects alone are ignored there, as published",
    ),
}


def read_torchvision_set(name: str, root: str | None, download: bool) -> LabelledSet:
    """The published splits of a dataset of torchvision's.

    Args:
        name: torchvision's name of it, or VOC2007.
        root: The folder that torchvision calls `root`.
        download: Whether torchvision may fetch what is missing there.

    Raises:
        FileNotFoundError: If the dataset is not in the folder, or not whole.
        ValueError: If the name is unknown, the root is missing, or the splits do not fit together.
    """
    if (recipe := RECIPES.get(name)) is None:
        hint = suggest(name, RECIPES) or f"; known: {', '.join(RECIPES)}"
        raise ValueError(f"{PREFIX}{name} is not a dataset with published splits that is read here{hint}")
    if root is None:
        raise ValueError(f"{PREFIX}{name} needs data_root, the folder that holds torchvision's datasets")
    images: dict[str, list[LabelledImage]] = {}
    classes: dict[str, list[str]] = {}
    for split, options in recipe.splits.items():
        dataset = _open(name, recipe, root, download, options)
        images[split] = recipe.read(dataset, split, Path(root))
        classes[split] = [_name_class(entry) for entry in getattr(dataset, "classes", ())]
    if recipe.targets == "multilabel":
        names: tuple[str, ...] = VOC_CLASSES
    else:
        names = check_same_classes(f"{PREFIX}{name}", classes)
    if not names:
        largest = max(image.label for members in images.values() for image in members)
        names = name_numbers(f"{PREFIX}{name}", largest)
    remarks = [recipe.remark] if recipe.remark else []
    if name == "ImageNet" and (known := read_imagenet_class_names()) and len(known) == len(names):
        names = known
        remarks.append("class names are open_clip's, as zero-shot figures are published with")
    return build_set(f"{PREFIX}{name}", recipe.targets, names, images, remarks=remarks)


def _open(name: str, recipe: _Recipe, root: str, download: bool, options: Mapping[str, Any]) -> Any:
    keywords = {**recipe.options, **options, **({"download": download} if recipe.takes_download else {})}
    try:
        return getattr(datasets, recipe.dataset or name)(root, **keywords)
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).replace("You can use download=True to download it", "").split())
        advice = "" if download or not recipe.takes_download else "; data_download fetches it"
        raise FileNotFoundError(f"{PREFIX}{name} cannot be read from {root} ({reason}){advice}") from error


def _name_class(entry: Any) -> str:
    """ImageNet's classes are tuples of synonyms, of which two are the first of several classes."""
    return entry[0] if isinstance(entry, tuple) else str(entry)
