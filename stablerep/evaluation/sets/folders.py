"""Splits as folders: of classes, or of plain WebDataset tars.

<root>/train/<class>/*.jpg   <root>/test/<class>/*.jpg   optionally validation/ or val/
<root>/train/*.tar           <root>/test/*.tar           of `{key}.jpg` + `{key}.cls` (an integer) or
                                                         `{key}.txt` (captions, one a line), or both;
                                                         optionally classes.txt in the root

Captions stand as img2dataset writes them, several as in the sets of CLIP_benchmark. Shards of which nothing
is learnt, for retrieval or zero-shot classification, may have `test/` alone.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stablerep.evaluation.sets.decoding import IMAGE_SUFFIXES
from stablerep.evaluation.sets.labelled import (
    FileRange,
    LabelledImage,
    LabelledSet,
    build_set,
    identify_captions,
    label_by_captions,
    name_numbers,
)

VALIDATION_NAMES = ("validation", "val")
CLASSES_NAME = "classes.txt"
TAR_BLOCK_BYTES = 512
MAX_TEXT_BYTES = 2**20
_TEXT_SUFFIXES = (".cls", ".txt")


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits.

    Raises:
        FileNotFoundError: If the root or `test/` is missing, or `train/` where `test/` holds no tars.
        ValueError: If the validation split has two folders.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"labelled set not found: {root} is not a folder")
    splits = {name: root / name for name in ("train", "test")}
    if not splits["train"].is_dir() and any(splits["test"].glob("*.tar")):
        del splits["train"]
    for name, folder in splits.items():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"labelled set {root} has no {name}/ folder (train/ and test/ are needed)"
            )
    validations = [root / name for name in VALIDATION_NAMES if (root / name).is_dir()]
    if len(validations) > 1:
        raise ValueError(f"labelled set {root} has both validation/ and val/: keep one")
    if validations:
        splits["validation"] = validations[0]
    return splits


def read_class_folders(root: Path, splits: dict[str, Path]) -> LabelledSet:
    """The names and labels of `<split>/<class>/<image>`, in the order of their names.

    Raises:
        ValueError: If a class folder is empty, or of a class that train has not.
    """
    ignored: Counter[str] = Counter()
    classes = tuple(folder.name for folder in _class_folders(splits["train"]))
    if not classes:
        raise ValueError(f"no class folders and no .tar shards in {splits['train']}")
    labels = {name: label for label, name in enumerate(classes)}
    images = {}
    for split, split_folder in splits.items():
        members: list[LabelledImage] = []
        for folder in _class_folders(split_folder):
            if folder.name not in labels:
                raise ValueError(
                    f"class '{folder.name}' of {split_folder} has no folder in {splits['train']}"
                )
            found = list(_images_in_folder(root, folder, labels[folder.name], ignored))
            if not found:
                raise ValueError(
                    f"class folder {folder} holds no images (looked for {', '.join(IMAGE_SUFFIXES)})"
                )
            members.extend(found)
        if not members:
            raise ValueError(f"no images in {split_folder} (looked for {', '.join(IMAGE_SUFFIXES)})")
        images[split] = members
    return build_set(str(root), "classes", classes, images, ignored)


def _class_folders(split_folder: Path) -> list[Path]:
    return sorted(
        entry for entry in split_folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _images_in_folder(root: Path, folder: Path, label: int, ignored: Counter[str]) -> Iterator[LabelledImage]:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            ignored[path.suffix.lower() or path.name] += 1
            continue
        content = FileRange(str(path), 0, path.stat().st_size)
        yield LabelledImage(path.relative_to(root).as_posix(), (label,), content)


def read_plain_shards(root: Path, splits: dict[str, Path]) -> LabelledSet:
    """The names, labels and captions of tars of `{key}.jpg` + `{key}.cls` or `.txt`, in their order.

    Without labels, the captions are what the images are labelled by.

    Raises:
        ValueError: If a shard is torn or malformed, a sample has no label where others have one, or no
            caption where none has a label, or classes.txt names too few classes.
    """
    ignored: Counter[str] = Counter()
    images = {
        split: [
            image
            for shard in sorted(folder.glob("*.tar"))
            for image in _images_in_shard(root, shard, ignored)
        ]
        for split, folder in splits.items()
    }
    for split, members in images.items():
        if not members:
            raise ValueError(f"no images in {splits[split]} (looked for .tar shards)")
    every = [image for members in images.values() for image in members]
    if not any(image.labels for image in every):
        captions, labelled = label_by_captions(images)
        return build_set(str(root), "captions", captions, labelled, ignored)
    for image in every:
        if not image.labels:
            raise ValueError(f"{root / image.name}: it has no cls member, as other samples have")
    last = max(every, key=lambda image: image.label)
    classes = name_classes(root, last.name, last.label)
    return build_set(str(root), "classes", classes, images, ignored)


def name_classes(root: Path, where: str, largest: int) -> tuple[str, ...]:
    """The lines of the root's classes.txt, or else the labels themselves.

    Args:
        root: The set.
        where: What error messages call the place of the largest label.
        largest: That label.

    Raises:
        ValueError: If the file names too few, or the label is too large to be a class.
    """
    numbers = name_numbers(where, largest)
    file = root / CLASSES_NAME
    if not file.is_file():
        return numbers
    classes = tuple(file.read_text(encoding="utf-8").splitlines())
    if len(classes) < len(numbers):
        raise ValueError(f"{file} names {len(classes)} classes, but the shards hold label {largest}")
    return classes


def _images_in_shard(root: Path, shard: Path, ignored: Counter[str]) -> Iterator[LabelledImage]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in _read_members(shard):
        folder, _, base = member.name.rpartition("/")
        key, _, extension = base.partition(".")
        suffix = f".{extension.lower()}"
        if suffix not in (*IMAGE_SUFFIXES, *_TEXT_SUFFIXES):
            ignored[suffix] += 1
            continue
        kind = suffix.removeprefix(".") if suffix in _TEXT_SUFFIXES else "image"
        sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        if kind in sample:
            raise ValueError(f"{shard}: sample '{key}' has two members for its {kind}: {member.name}")
        sample[kind] = member
    name_of_shard, path = shard.relative_to(root).as_posix(), str(shard)
    with open(shard, "rb") as file:
        for key, sample in samples.items():
            if sample.keys() == {"txt"}:
                ignored[".txt"] += 1
                continue
            if "image" not in sample:
                raise ValueError(f"{shard}: sample '{key}' has no image member")
            image, where = sample["image"], f"{shard}: sample '{key}'"
            captions = _read_captions(where, file, sample["txt"]) if "txt" in sample else ()
            yield LabelledImage(
                name=f"{name_of_shard}/{image.name}",
                labels=(_read_label(where, file, sample["cls"]),) if "cls" in sample else (),
                content=FileRange(path, image.offset_data, image.size),
                caption_id=identify_captions(captions),
                captions=captions,
            )


def _read_members(shard: Path) -> list[tarfile.TarInfo]:
    """The regular members of an uncompressed tar that ends where a tar must end."""
    try:
        with tarfile.open(shard, mode="r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard}: not a readable, uncompressed tar ({error})") from error
    if not members:
        raise ValueError(f"{shard}: the tar holds no members")
    for member in members:
        if not (member.isreg() or member.isdir()) or member.sparse is not None:
            raise ValueError(f"{shard}: member '{member.name}' is not a regular file")
    # tarfile takes a torn or damaged header for the end: two blocks of zeros have to follow the last member.
    end_bytes = max(member.offset_data + member.size for member in members)
    with open(shard, "rb") as file:
        file.seek(-(-end_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES)
        if file.read(2 * TAR_BLOCK_BYTES) != bytes(2 * TAR_BLOCK_BYTES):
            raise ValueError(f"{shard}: the tar is truncated or damaged after member '{members[-1].name}'")
    return [member for member in members if member.isreg()]


def _read_label(where: str, file: BinaryIO, member: tarfile.TarInfo) -> int:
    file.seek(member.offset_data)
    text = file.read(min(member.size, 20)).strip()
    if not (text.isdigit() and member.size <= 20):
        raise ValueError(f"{where}: its label must be an integer >= 0, got {text!r}")
    return int(text)


def _read_captions(where: str, file: BinaryIO, member: tarfile.TarInfo) -> tuple[str, ...]:
    """One a line; blank lines are none, and only line feeds end a line: texts hold other separators."""
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"{where}: its captions may have {MAX_TEXT_BYTES} bytes, got {member.size}")
    file.seek(member.offset_data)
    try:
        lines = file.read(member.size).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its captions must be UTF-8 ({error.reason})") from error
    return tuple(line.strip() for line in lines if line.strip())
