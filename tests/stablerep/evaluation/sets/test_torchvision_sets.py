"""torchvision's datasets by name, from small copies of their formats; torchvision itself is the oracle."""

import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.models import ResNet18_Weights

from stablerep.evaluation.features import build_ignored
from stablerep.evaluation.sets import LabelledSet, SetOptions, read_labelled_set
from stablerep.evaluation.sets.torchvision_sets import RECIPES, VOC_CLASSES

EncodeImage = Callable[[str, int], bytes]


def read(name: str, root: Path) -> LabelledSet:
    return read_labelled_set(f"torchvision:{name}", SetOptions(data_root=str(root)))


def write_mnist(root: Path, name: str = "MNIST", num_labels: int = 10) -> None:
    """The four files of MNIST, in the format of its authors."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 10)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % num_labels).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">II", 0x801, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def write_dtd(root: Path, encode_image: EncodeImage) -> None:
    """Textures with a list of images for each split."""
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    lists = {"train": range(3), "val": range(3, 4), "test": range(4, 6)}
    for split, numbers in lists.items():
        lines = [f"{name}/{name}_{number:04}.jpg" for name in ("banded", "dotted") for number in numbers]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
        for number, line in enumerate(lines):
            path = base / "images" / line
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image("red", number))


def write_pets(root: Path, encode_image: EncodeImage) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    (base / "images").mkdir()
    for split, numbers in {"trainval": (1, 2), "test": (3,)}.items():
        names = [f"{breed}_{number}" for breed in ("Abyssinian", "beagle") for number in numbers]
        lines = [f"{name} {1 + name.startswith('b')} 1 1" for name in names]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for number, name in enumerate(names):
            (base / "images" / f"{name}.jpg").write_bytes(encode_image("blue", number))


def write_voc(root: Path, encode_image: EncodeImage) -> None:
    """Objects by image: name and whether it is difficult."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (base / folder).mkdir(parents=True)
    images = {
        "000001": [("dog", 0), ("dog", 0), ("person", 0)],
        "000002": [("person", 1)],
        "000003": [("cat", 0), ("dog", 1)],
        "000004": [("person", 0), ("person", 1), ("cat", 0)],
    }
    for split, names in {"train": ("000001", "000003"), "val": ("000002",), "test": ("000004",)}.items():
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    for number, (name, objects) in enumerate(images.items()):
        (base / "JPEGImages" / f"{name}.jpg").write_bytes(encode_image("green", number))
        found = "".join(
            f"<object><name>{what}</name><difficult>{difficult}</difficult></object>"
            for what, difficult in objects
        )
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{found}</annotation>")


def test_a_set_of_arrays_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    dataset = read("MNIST", tmp_path)
    for is_train, images in ((True, dataset.train), (False, dataset.test)):
        oracle = datasets.MNIST(tmp_path, train=is_train)
        assert [image.label for image in images] == oracle.targets.tolist()
        for image, (expected, _) in zip(images, oracle, strict=True):
            decoded = image.decode(image.read_bytes())
            assert decoded.mode == "RGB"
            assert np.array_equal(np.asarray(decoded), np.asarray(expected.convert("RGB")))
    assert dataset.classes == tuple(datasets.MNIST.classes)
    assert dataset.train[0].name == "train/000000"


def test_a_set_of_files_is_read_as_torchvision_reads_it(tmp_path: Path, encode_image: EncodeImage) -> None:
    write_dtd(tmp_path, encode_image)
    dataset = read("DTD", tmp_path)
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        oracle = datasets.DTD(tmp_path, split=name)
        images = dataset.splits[split]
        assert [image.label for image in images] == [label for _, label in oracle]
        for image, (expected, _) in zip(images, oracle, strict=True):
            decoded = image.decode(image.read_bytes())
            assert np.array_equal(np.asarray(decoded), np.asarray(expected))
    assert dataset.classes == ("banded", "dotted")
    assert dataset.train[0].name == "dtd/dtd/images/banded/banded_0000.jpg"


def test_pets_are_read_as_torchvision_reads_them(tmp_path: Path, encode_image: EncodeImage) -> None:
    write_pets(tmp_path, encode_image)
    dataset = read("OxfordIIITPet", tmp_path)
    assert dataset.classes == ("Abyssinian", "Beagle")
    for split, images in {"trainval": dataset.train, "test": dataset.test}.items():
        oracle = datasets.OxfordIIITPet(tmp_path, split=split)
        assert [image.label for image in images] == [label for _, label in oracle]
        for image, (expected, _) in zip(images, oracle, strict=True):
            assert np.array_equal(np.asarray(image.decode(image.read_bytes())), np.asarray(expected))


def test_voc_has_any_number_of_classes_an_image(tmp_path: Path, encode_image: EncodeImage) -> None:
    write_voc(tmp_path, encode_image)
    dataset = read("VOC2007", tmp_path)
    assert (dataset.targets, dataset.classes) == ("multilabel", VOC_CLASSES)
    named = {
        split: [[dataset.classes[label] for label in image.labels] for image in images]
        for split, images in dataset.splits.items()
    }
    assert named == {"train": [["dog", "person"], ["cat"]], "validation": [[]], "test": [["cat", "person"]]}
    assert dataset.remarks == (
        "classes of which an image shows difficult objects alone are ignored there, as published",
    )


def test_a_class_of_voc_shown_by_difficult_objects_alone_is_ignored(
    tmp_path: Path, encode_image: EncodeImage
) -> None:
    write_voc(tmp_path, encode_image)
    dataset = read("VOC2007", tmp_path)
    named = {
        split: [[dataset.classes[label] for label in image.ignored_labels] for image in images]
        for split, images in dataset.splits.items()
    }
    assert named == {"train": [[], ["dog"]], "validation": [["person"]], "test": [[]]}
    features = {split: build_ignored(images, dataset) for split, images in dataset.splits.items()}
    assert features["train"] is not None
    assert features["train"].nonzero().tolist() == [[1, VOC_CLASSES.index("dog")]]


def test_a_class_of_voc_that_train_lacks_is_refused(tmp_path: Path, encode_image: EncodeImage) -> None:
    write_voc(tmp_path, encode_image)
    annotation = tmp_path / "VOCdevkit/VOC2007/Annotations/000004.xml"
    annotation.write_text(annotation.read_text().replace("person", "sheep"))
    with pytest.raises(ValueError, match=r"000004.jpg: class 'sheep' of test has no image in train"):
        read("VOC2007", tmp_path)


def write_imagenet(root: Path, num_classes: int = 1000) -> list[str]:
    """An image a class and split, and the list of classes; returns torchvision's names for its models."""
    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"][:num_classes]
    wnids = [f"n{label:08d}" for label in range(num_classes)]
    torch.save(({wnid: (name, "x") for wnid, name in zip(wnids, names, strict=True)}, []), root / "meta.bin")
    for split in ("train", "val"):
        for wnid in wnids:
            (root / split / wnid).mkdir(parents=True)
            (root / split / wnid / "0.png").write_bytes(b"x")
    return list(names)


def test_the_classes_of_imagenet_have_the_names_of_published_zero_shot_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open_clip")
    names = write_imagenet(tmp_path)
    dataset = read("ImageNet", tmp_path)
    assert (dataset.classes[134], dataset.classes[517]) == ("crane bird", "construction crane")
    same = sum(ours.lower() == theirs.lower() for ours, theirs in zip(dataset.classes, names, strict=True))
    assert same > 650  # most are called alike: the order is that of the labels
    assert any("class names are open_clip's" in remark for remark in dataset.remarks)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    without = read("ImageNet", tmp_path)
    assert list(without.classes) == names
    assert not any("open_clip" in remark for remark in without.remarks)


def test_a_part_of_imagenet_keeps_its_own_names(tmp_path: Path) -> None:
    names = write_imagenet(tmp_path, num_classes=5)
    assert list(read("ImageNet", tmp_path).classes) == names


def test_the_classes_of_voc_are_its_twenty() -> None:
    assert len(set(VOC_CLASSES)) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_a_damaged_annotation_is_named(tmp_path: Path, encode_image: EncodeImage) -> None:
    write_voc(tmp_path, encode_image)
    annotation = tmp_path / "VOCdevkit/VOC2007/Annotations/000001.xml"
    annotation.write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"000001.xml: not readable as XML"):
        read("VOC2007", tmp_path)
    annotation.write_text("<annotation><object><name>unicorn</name></object></annotation>")
    with pytest.raises(ValueError, match=r"000001.xml: unknown class 'unicorn'"):
        read("VOC2007", tmp_path)


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_a_pickle_that_is_not_the_published_one_is_never_loaded(tmp_path: Path, name: str) -> None:
    published = getattr(datasets, name)
    folder = tmp_path / published.base_folder
    folder.mkdir()
    for file_name, _ in (*published.train_list, *published.test_list, (published.meta["filename"], "")):
        (folder / file_name).write_bytes(pickle.dumps(Payload(tmp_path / "was-run")))
    with pytest.raises(FileNotFoundError, match=rf"torchvision:{name} cannot be read from .*corrupted"):
        read(name, tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_set_that_is_not_there_is_named_and_not_fetched(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(FileNotFoundError, match=f"torchvision:{name} cannot be read from {tmp_path}"):
        read(name, tmp_path)


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torchvision:CIFAR-10 is not a dataset .*CIFAR10"):
        read("CIFAR-10", tmp_path)
    with pytest.raises(ValueError, match=r"torchvision:CIFAR10 needs data_root"):
        read_labelled_set("torchvision:CIFAR10")


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, num_labels=1)
    with pytest.raises(ValueError, match=r"torchvision:MNIST: at least 2 classes are needed in train, got 1"):
        read("MNIST", tmp_path)
