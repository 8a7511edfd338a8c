"""Images by reference, and what holds for a set of whatever origin."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from stablerep.evaluation.sets import labelled, read_labelled_set
from stablerep.evaluation.sets.labelled import FileRange, LabelledImage, build_set, check_same_classes


def image_of(label: int, name: str = "a.png") -> LabelledImage:
    return LabelledImage(name, (label,), FileRange("a.png", 0, 1))


def test_a_part_of_a_file_is_read_and_compared_with_what_was_recorded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"beforeIMAGEafter")
    sha256 = hashlib.sha256(b"IMAGE").hexdigest()
    content = FileRange(str(tmp_path / "file"), 6, 5, sha256)
    assert LabelledImage("x", (0,), content).read_bytes() == b"IMAGE"
    (tmp_path / "file").write_bytes(b"beforeImageafter")
    with pytest.raises(ValueError, match=rf"^x: sha256 is .*…, expected {sha256[:16]}…$"):
        LabelledImage("x", (0,), content).read_bytes()


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(ValueError, match="^x: an image file may have 4 bytes, got 5$"):
        LabelledImage("x", (0,), FileRange(str(tmp_path / "not there"), 0, 5)).read_bytes()


def test_images_go_to_other_processes(write_folders: Callable[..., Path]) -> None:
    image = read_labelled_set(write_folders(train=1, test=1)).train[0]
    assert pickle.loads(pickle.dumps(image)) == image


def test_the_label_of_several_classes_is_not_one() -> None:
    with pytest.raises(ValueError, match="too many values"):
        _ = LabelledImage("x", (0, 1), FileRange("x", 0, 1)).label


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("a", "c"), "x: class 1 is 'b' in train and 'c' in test: labels must mean the same"),
        (("a", "b", "c"), "x: class 2 is None in train and 'c' in test"),
        (("a",), "x: class 1 is 'b' in train and None in test"),
    ],
)
def test_class_names_that_differ_are_refused(other: tuple[str, ...], message: str) -> None:
    assert check_same_classes("x", {"train": ("a", "b"), "test": ("a", "b")}) == ("a", "b")
    with pytest.raises(ValueError, match=message):
        check_same_classes("x", {"train": ("a", "b"), "test": other})


def test_an_empty_split_is_refused() -> None:
    train = [image_of(0), image_of(1)]
    with pytest.raises(ValueError, match="^x: no images in its test split$"):
        build_set("x", "classes", ["a", "b"], {"train": train, "test": []})


def test_captions_need_not_be_those_of_train() -> None:
    dataset = build_set("x", "captions", ["a", "b"], {"train": [image_of(0)], "test": [image_of(1)]})
    assert list(dataset.splits) == ["train", "test"]
