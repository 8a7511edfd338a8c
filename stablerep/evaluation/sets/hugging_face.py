"""Datasets of the Hugging Face hub, or of its library on disk: `hf:NAME[:CONFIG]`, `hf:FOLDER`.

Images are taken as encoded bytes and decoded like all others. The library is an extra, imported when it is
asked for; a dataset of the hub is fetched through its cache, which `HF_HUB_OFFLINE=1` keeps from the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablerep.evaluation.sets.labelled import (
    ImageContent,
    LabelledImage,
    LabelledSet,
    Targets,
    build_set,
    check_num_bytes,
    check_same_classes,
    identify_captions,
    label_by_captions,
    name_numbers,
)

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
CAPTION_COLUMNS = ("caption", "captions", "text")
_HIDDEN = (None, -1)  # labels that are not public


@dataclass(frozen=True, slots=True, eq=False)
class TableRow(ImageContent):
    """An image of a table.

    Args:
        table: A dataset whose one column holds undecoded images.
        index: Row.
    """

    table: Any
    index: int

    def read(self) -> bytes:
        """The encoded image: of the table, or of the file that the table names."""
        (value,) = self.table[self.index].values()
        if value is None:
            raise ValueError("the row holds no image")
        if value["bytes"] is not None:
            check_num_bytes(len(value["bytes"]))
            return bytes(value["bytes"])
        check_num_bytes(Path(value["path"]).stat().st_size)
        return Path(value["path"]).read_bytes()


@dataclass(frozen=True)
class _Split:
    """Labels of one split as the table holds them; None each where there is no column of them."""

    name: str
    table: "Dataset"
    values: list[Any]

    @property
    def is_hidden(self) -> bool:
        return bool(self.values) and all(value in _HIDDEN for value in self.values)


def read_hugging_face_set(
    address: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
) -> LabelledSet:
    """The splits train, validation and test of a dataset.

    A dataset without public labels of a test split is tested on its validation split, and says so in its
    remarks. One without labels is labelled by its captions and may have a test split alone.

    Args:
        address: What stands behind `hf:`.
        image_column: Column of the images; None takes the only one.
        label_column: Column of the labels; None takes the only one of class labels, or else `label`.
        caption_column: Column of the captions; None takes the first of `CAPTION_COLUMNS` that holds texts.

    Raises:
        FileNotFoundError: If there is no such dataset, here or on the hub.
        ValueError: If the library is missing, there is no such split or column, or the splits do not fit
            together.
    """
    name = f"{PREFIX}{address}"
    tables = _load(name, address)
    first = next(iter(tables.values()))
    image_column = _find_image_column(name, first.features, image_column)
    caption_column = _find_caption_column(name, first.features, caption_column)
    if label_column is not None or caption_column is None or _has_labels(first.features):
        label_column = _find_label_column(name, first.features, label_column)
    for split, table in tables.items():
        for column in (image_column, label_column, caption_column):
            if column is not None and column not in table.column_names:
                raise ValueError(f"{name}: split {split} has no column '{column}'")
    splits, remarks = _choose_splits(name, tables, label_column)
    images = {split: _build_images(found, image_column, caption_column) for split, found in splits.items()}
    if label_column is None:
        captions, labelled = label_by_captions(images)
        return build_set(name, "captions", captions, labelled, remarks=remarks)
    targets, classes, labels = _read_labels(name, splits, label_column)
    labelled = {
        split: [replace(image, labels=own) for image, own in zip(members, labels[split], strict=True)]
        for split, members in images.items()
    }
    return build_set(name, targets, classes, labelled, remarks=remarks)


def _load(name: str, address: str) -> "Mapping[str, Dataset]":
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name} needs the library datasets: pip install 'stablerep[hub]'") from error
    folder = Path(address)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(address)
        elif folder.is_dir():
            loaded = datasets.load_dataset(address)
        else:
            dataset, _, config = address.partition(":")
            loaded = datasets.load_dataset(dataset, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(f"{name} cannot be loaded ({reason})") from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"{name} is one table: a dataset with the splits train and test is needed")
    return {str(split): table for split, table in loaded.items()}


def _find_image_column(name: str, features: Mapping[str, Any], asked: str | None) -> str:
    from datasets import Image

    columns = [column for column, feature in features.items() if isinstance(feature, Image)]
    return _find_column(name, "image", features, asked, columns)


def _find_label_column(name: str, features: Mapping[str, Any], asked: str | None) -> str:
    columns = [column for column, feature in features.items() if _class_names(feature) is not None]
    if not columns and "label" in features:
        columns = ["label"]
    return _find_column(name, "label", features, asked, columns)


def _has_labels(features: Mapping[str, Any]) -> bool:
    return "label" in features or any(_class_names(feature) is not None for feature in features.values())


def _find_caption_column(name: str, features: Mapping[str, Any], asked: str | None) -> str | None:
    if asked is None:
        found = (column for column in CAPTION_COLUMNS if _holds_texts(features.get(column)))
        return next(found, None)
    if asked not in features:
        raise ValueError(f"{name} has no column '{asked}'; it has {', '.join(features)}")
    if not _holds_texts(features[asked]):
        raise ValueError(f"{name}: column '{asked}' must hold texts or lists of them")
    return asked


def _holds_texts(feature: Any) -> bool:
    return getattr(getattr(feature, "feature", feature), "dtype", "") in ("string", "large_string")


def _find_column(
    name: str, what: str, features: Mapping[str, Any], asked: str | None, found: list[str]
) -> str:
    if asked is not None:
        if asked not in features:
            raise ValueError(f"{name} has no column '{asked}'; it has {', '.join(features)}")
        return asked
    if len(found) != 1:
        those = f"{len(found)} ({', '.join(found)})" if found else "none"
        raise ValueError(
            f"{name}: expected one {what} column among {', '.join(features)}, found {those}: name it by "
            f"data_{what}_column"
        )
    return found[0]


def _class_names(feature: Any) -> list[str] | None:
    """Of a column of class labels, or of lists of them; else None."""
    from datasets import ClassLabel

    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _choose_splits(
    name: str, tables: "Mapping[str, Dataset]", label_column: str | None
) -> tuple[dict[str, _Split], list[str]]:
    splits: dict[str, _Split] = {}
    remarks = []
    for split, names in SPLIT_NAMES.items():
        if (found := next((other for other in names if other in tables), None)) is not None:
            table = tables[found]
            values = [None] * len(table) if label_column is None else list(table[label_column])
            splits[split] = _Split(found, table, values)
    if label_column is not None and "test" in splits and splits["test"].is_hidden:
        remarks.append(f"the labels of {name}'s {splits['test'].name} split are hidden")
        del splits["test"]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        remarks.append(f"{name}'s {splits['test'].name} split is the test split")
    for split in ("test",) if label_column is None else ("train", "test"):
        if split not in splits:
            what = "captions" if label_column is None else "labels"
            raise ValueError(f"{name} has no {split} split with {what}; it has {', '.join(tables)}")
    for found_split in splits.values() if label_column is not None else ():
        if found_split.is_hidden:
            raise ValueError(f"{name}: the labels of its {found_split.name} split are hidden")
    return splits, remarks


def _read_labels(
    name: str, splits: Mapping[str, _Split], column: str
) -> tuple[Targets, tuple[str, ...], dict[str, list[tuple[int, ...]]]]:
    feature = splits["train"].table.features[column]
    is_multilabel = hasattr(feature, "feature")  # a list of what it says
    for split in splits.values():
        for row, value in enumerate(split.values):
            if value in _HIDDEN or (is_multilabel and not set(_HIDDEN).isdisjoint(value)):
                raise ValueError(f"{name}: row {row} of {split.name} has no label in '{column}'")
    if _class_names(feature) is not None:
        named = {split: _class_names(found.table.features[column]) or [] for split, found in splits.items()}
        classes = check_same_classes(name, named)
        numbers: Mapping[Any, int] = {label: label for label in range(len(classes))}
    else:
        classes, numbers = _number_values(name, column, splits)
    labels: dict[str, list[tuple[int, ...]]] = {}
    for split_name, split in splits.items():
        try:
            labels[split_name] = [
                tuple(sorted({numbers[v] for v in value})) if is_multilabel else (numbers[value],)
                for value in split.values
            ]
        except KeyError as error:
            raise ValueError(
                f"{name}: label {error.args[0]!r} of {split.name} is none of the {len(classes)} classes"
            ) from error
    return "multilabel" if is_multilabel else "classes", classes, labels


def _number_values(
    name: str, column: str, splits: Mapping[str, _Split]
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Numbers stand for themselves; words and truth values are sorted."""
    values: set[Any] = set()
    for split in splits.values():
        for value in split.values:
            values.update(value if isinstance(value, list) else [value])
    kinds = {type(value) for value in values}
    if kinds == {int} and min(values) >= 0:
        return name_numbers(f"{name}, column '{column}'", max(values)), {value: value for value in values}
    if kinds in ({str}, {bool}):
        ordered = sorted(values)
        return tuple(str(value) for value in ordered), {value: label for label, value in enumerate(ordered)}
    kind_names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(f"{name}: column '{column}' must hold classes, integers >= 0 or words, got {kind_names}")


def _build_images(split: _Split, image_column: str, caption_column: str | None) -> list[LabelledImage]:
    """The images, still without labels."""
    from datasets import Image

    table = split.table.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    texts = [None] * len(table) if caption_column is None else list(split.table[caption_column])
    captions = map(_list_captions, texts)
    return [
        LabelledImage(f"{split.name}/{row:06d}", (), TableRow(table, row), identify_captions(own), own)
        for row, own in enumerate(captions)
    ]


def _list_captions(value: str | Sequence[str | None] | None) -> tuple[str, ...]:
    """Blank ones and nulls are none."""
    texts = [value] if value is None or isinstance(value, str) else value
    return tuple(text.strip() for text in texts if text is not None and text.strip())
