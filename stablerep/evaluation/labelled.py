"""Labelled images for evaluation: class folders, or WebDataset shards with `cls` members.

    <root>/train/<class>/*.jpg   <root>/test/<class>/*.jpg   optionally validation/ or val/
    <root>/train/*.tar           <root>/test/*.tar           of `{key}.jpg` + `{key}.cls` (an integer);
                                                             optionally classes.txt in the root

Reading a set reads names, labels and places; the images are read and decoded later, one by one.
"""

import io
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
VALIDATION_NAMES = ("validation", "val")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 2**26
TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class LabelledImage:
    """One image and its class: where the bytes lie, not the bytes.

    Args:
        name: Unique within the set and the same on every machine, such as `test/hat/0001.jpg`.
        label: Class index.
        path: The file that holds the bytes: the image itself, or a tar.
        offset_bytes: Where the image starts in that file.
        num_bytes: Its size.
    """

    name: str
    label: int
    path: Path
    offset_bytes: int
    num_bytes: int

    def read_bytes(self) -> bytes:
        """The encoded image. Raises ValueError, naming the image, if the file is shorter than it was."""
        if self.num_bytes > MAX_IMAGE_BYTES:
            raise ValueError(
                f"{self.name}: an image file may have {MAX_IMAGE_BYTES} bytes, got {self.num_bytes}"
            )
        with open(self.path, "rb") as file:
            file.seek(self.offset_bytes)
            data = file.read(self.num_bytes)
        if len(data) != self.num_bytes:
            raise ValueError(f"{self.name}: expected {self.num_bytes} bytes in {self.path}, got {len(data)}")
        return data


@dataclass(frozen=True)
class LabelledSet:
    """The splits of a labelled set.

    Args:
        root: The folder that was read.
        classes: Class names; a label is an index into them.
        train: Images of the training split.
        validation: Images of the validation split; empty if there is none.
        test: Images of the test split.
        num_ignored_files: Files that are no images, or shard members that are neither image nor label, by
            suffix.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    validation: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    num_ignored_files: dict[str, int]


def read_labelled_set(root: str | Path) -> LabelledSet:
    """The names and labels of a labelled set, in a fixed order.

    Args:
        root: A folder with `train/` and `test/`, and optionally `validation/` or `val/`; each split holds one
            folder a class, or `.tar` shards.

    Raises:
        FileNotFoundError: If the folder or a split is missing.
        ValueError: If a split or a class is empty, a class of another split is not in `train/`, there are
            fewer than two classes, or a shard is torn or malformed; the message names the place.
    """
    root = Path(root)
    splits = _find_splits(root)
    ignored: Counter[str] = Counter()
    if any(splits["train"].glob("*.tar")):
        classes, images = _read_shards(root, splits, ignored)
    else:
        classes, images = _read_class_folders(root, splits, ignored)
    for split, members in images.items():
        if not members:
            raise ValueError(f"no images in {splits[split]} (looked for {', '.join(IMAGE_SUFFIXES)})")
    present = {image.label for image in images["train"]}
    if len(present) < 2:
        raise ValueError(f"at least 2 classes are needed in {splits['train']}, got {len(present)}")
    for split, members in images.items():
        for image in members:
            if image.label not in present:
                raise ValueError(
                    f"{image.name}: class '{classes[image.label]}' of {split} has no image in train"
                )
    return LabelledSet(
        root=root,
        classes=classes,
        train=images["train"],
        validation=images.get("validation", ()),
        test=images["test"],
        num_ignored_files=dict(sorted(ignored.items())),
    )


def decode_image(data: bytes, name: str) -> Image.Image:
    """The upright RGB image of encoded bytes.

    Raises:
        ValueError: If the bytes are no whole JPEG, PNG or WebP image or hold too many pixels; names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"at most {MAX_IMAGE_PIXELS} pixels, got {image.width}×{image.height}")
        upright = ImageOps.exif_transpose(image)
        # A palette with transparency has to pass through RGBA; Pillow warns otherwise.
        return (upright.convert("RGBA") if "transparency" in upright.info else upright).convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(f"{name}: not a readable image ({' '.join(str(error).split())})") from error


def _find_splits(root: Path) -> dict[str, Path]:
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


def _read_class_folders(
    root: Path, splits: dict[str, Path], ignored: Counter[str]
) -> tuple[tuple[str, ...], dict[str, tuple[LabelledImage, ...]]]:
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
        images[split] = tuple(members)
    return classes, images


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
        yield LabelledImage(path.relative_to(root).as_posix(), label, path, 0, path.stat().st_size)


def _read_shards(
    root: Path, splits: dict[str, Path], ignored: Counter[str]
) -> tuple[tuple[str, ...], dict[str, tuple[LabelledImage, ...]]]:
    images = {
        split: tuple(
            image
            for shard in sorted(folder.glob("*.tar"))
            for image in _images_in_shard(root, shard, ignored)
        )
        for split, folder in splits.items()
    }
    num_classes = max((image.label for members in images.values() for image in members), default=-1) + 1
    names_file = root / "classes.txt"
    if not names_file.is_file():
        return tuple(str(label) for label in range(num_classes)), images
    classes = tuple(names_file.read_text(encoding="utf-8").splitlines())
    if len(classes) < num_classes:
        raise ValueError(
            f"{names_file} names {len(classes)} classes, but the shards hold label {num_classes - 1}"
        )
    return classes, images


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
    name_of_shard = shard.relative_to(root).as_posix()
    for key, sample in samples.items():
        if sample.keys() != {"cls", "image"}:
            raise ValueError(
                f"{shard}: sample '{key}' has no {'cls' if 'image' in sample else 'image'} member"
            )
        image = sample["image"]
        label = _read_label(shard, key, sample["cls"])
        yield LabelledImage(f"{name_of_shard}/{image.name}", label, shard, image.offset_data, image.size)


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
