"""Labelled sets for evaluation, from wherever they are.

    <root>/train/<class>/*.jpg   class folders; test/ beside train/, optionally validation/ or val/
    <root>/train/*.tar           plain WebDataset shards of `{key}.jpg` + `{key}.cls` or `{key}.txt`
    <root>/dataset.json          a dataset of `stablerep generate`, labelled by its captions; or one a split
    torchvision:CIFAR10          a dataset of torchvision's, under data_root
    hf:NAME[:CONFIG]             a dataset of the Hugging Face hub, or a folder of its library

Reading a set reads names, labels and places; the images are read and decoded later, one by one.
"""

from dataclasses import dataclass
from pathlib import Path

from stablerep.evaluation.sets.folders import find_splits, read_class_folders, read_plain_shards
from stablerep.evaluation.sets.generated import read_generated_set
from stablerep.evaluation.sets.hugging_face import PREFIX as HUGGING_FACE_PREFIX
from stablerep.evaluation.sets.hugging_face import read_hugging_face_set
from stablerep.evaluation.sets.labelled import LabelledImage, LabelledSet

__all__ = ["LabelledImage", "LabelledSet", "SetOptions", "read_labelled_set"]

_MANIFEST_NAME = "dataset.json"
_TORCHVISION_PREFIX = "torchvision:"


@dataclass(frozen=True)
class SetOptions:
    """What some kinds of sets need to be told beside their name."""

    data_root: str | None = None
    """For torchvision: the folder that holds its datasets."""
    data_download: bool = False
    """For torchvision: fetch what is missing there."""
    data_image_column: str | None = None
    """For Hugging Face: column of the images; null takes the only one."""
    data_label_column: str | None = None
    """For Hugging Face and datasets of `stablerep generate`: column of the classes; null finds it."""
    data_caption_column: str | None = None
    """For Hugging Face: column of the captions, a text or a list of them an image; null finds it."""


def read_labelled_set(data: str | Path, options: SetOptions | None = None) -> LabelledSet:
    """The names and labels of a labelled set, in a fixed order.

    Args:
        data: A folder, a URL of a dataset of `stablerep generate`, or a name with its prefix.
        options: What the set needs to be told.

    Raises:
        FileNotFoundError: If the set or a split is missing.
        ValueError: If a split or a class is empty, a class of another split is not in `train`, classes differ
            between splits, there are fewer than two, or a shard is torn or malformed; the message names the
            place.
    """
    options = options or SetOptions()
    text = str(data)
    if text.startswith(_TORCHVISION_PREFIX):
        # Not at the top: torchvision's datasets take a while to import.
        from stablerep.evaluation.sets.torchvision_sets import read_torchvision_set

        name = text.removeprefix(_TORCHVISION_PREFIX)
        return read_torchvision_set(name, options.data_root, options.data_download)
    if text.startswith(HUGGING_FACE_PREFIX):
        return read_hugging_face_set(
            text.removeprefix(HUGGING_FACE_PREFIX),
            image_column=options.data_image_column,
            label_column=options.data_label_column,
            caption_column=options.data_caption_column,
        )
    root = Path(text)
    if "://" in text or (root / _MANIFEST_NAME).is_file():
        return read_generated_set(text, {"test": text}, options.data_label_column)
    splits = find_splits(root)
    generated = [split for split, folder in splits.items() if (folder / _MANIFEST_NAME).is_file()]
    if generated:
        if others := sorted(splits.keys() - set(generated)):
            raise ValueError(
                f"labelled set {root}: {generated[0]}/ holds a dataset of `stablerep generate`, "
                f"{others[0]}/ does not"
            )
        return read_generated_set(text, splits, options.data_label_column)
    if "train" not in splits or any(splits["train"].glob("*.tar")):
        return read_plain_shards(root, splits)
    return read_class_folders(root, splits)
