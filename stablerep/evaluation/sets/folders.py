"""Splits as folders: of classes, or of plain WebDataset tars.

<root>/train/<class>/*.jpg   <root>/test/<class>/*.jpg   optionally validation/ or val/
<root>/train/*.tar           <root>/test/*.tar           of `{key}.jpg` + `{key}.cls` (an integer);
                                                         optionally classes.txt in the root
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stablerep.evaluation.sets.decoding import IMAGE_SUFFIXES
from stablerep.evaluation.sets.labelled import FileRange, LabelledImage, LabelledSet, build_set

VALIDATION_NAMES = ("validation", "val")
CLASSES_NAME = "classes.txt"
TAR_BLOCK_BYTES = 512


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits.

    Raises:
        FileNotFoundError: If the root, `train/` or `test/` is missing.
        ValueError: If the validation split has two folders.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"labelled set not found: {root} is not a folder")
    splits = {name: root / name for name in ("train", "test")}
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
    """The names and labels of tars of `{key}.jpg` + `{key}.cls`, in the order of the tars.

    Raises:
        ValueError: If a shard is torn or malformed, or classes.txt names too few classes.
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
    num_classes = max(image.label for members in images.values() for image in members) + 1
    return build_set(str(root), "classes", name_classes(root, num_classes), images, ignored)


def name_classes(root: Path, num_classes: int) -> tuple[str, ...]:
    """The lines of the root's classes.txt, or else the labels themselves.

    Raises:
        ValueError: If the file names too few.
    """
    file = root / CLASSES_NAME
    if not file.is_file():
        return tuple(str(label) for label in range(num_classes))
    classes = tuple(file.read_text(encoding="utf-8").splitlines())
    if len(classes) < num_classes:
        raise ValueError(f"{file} names {len(classes)} classes, but the shards hold label {num_classes - 1}")
    return classes


def _images_in_shard(root: Path, shard: Path, ignored: Counter[str]) -> Iterator[LabelledImage]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in _read_members(shard):
        folder, _, base = member.name.rpartition("/")
        key, _, extension = base.partition(".")
        suffix = f".{extension.lower()}"
        if suffix not in (*IMAGE_SUFFIXES, ".cls"):
            ignored[suffix] += 1
            continue
        kind = "cls" if suffix == ".cls" else "image"
        sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        if kind in sample:
            raise ValueError(f"{shard}: sample '{key}' has two members for its {kind}: {member.name}")
        sample[kind] = member
    name_of_shard, path = shard.relative_to(root).as_posix(), str(shard)
    for key, sample in samples.items():
        if sample.keys() != {"cls", "image"}:
            raise ValueError(
                f"{shard}: sample '{key}' has no {'cls' if 'image' in sample else 'image'} member"
            )
        image = sample["image"]
        label = _read_label(shard, key, sample["cls"])
        content = FileRange(path, image.offset_data, image.size)
        yield LabelledImage(f"{name_of_shard}/{image.name}", (label,), content)


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


def _read_label(shard: Path, key: str, member: tarfile.TarInfo) -> int:
    with open(shard, "rb") as file:
        file.seek(member.offset_data)
        text = file.read(min(member.size, 20)).strip()
    if not (text.isdigit() and member.size <= 20):
        raise ValueError(f"{shard}: label of sample '{key}' must be an integer >= 0, got {text!r}")
    return int(text)
