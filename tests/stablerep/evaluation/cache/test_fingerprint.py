"""What the bytes of a split are: the content counts, whatever names and times say."""

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import Features as HubFeatures
from datasets import Image as HubImage
from PIL import Image

from stablerep.evaluation.cache import fingerprint
from stablerep.evaluation.cache.fingerprint import KnownDigests, digest_contents, fingerprint_set
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.features import extract_features
from stablerep.evaluation.sets import LabelledImage, LabelledSet, read_labelled_set
from stablerep.evaluation.sets.hugging_face import TableRow
from stablerep.evaluation.sets.labelled import build_set
from stablerep.evaluation.sets.torchvision_sets import DatasetItem
from tests.stablerep.datasets import write_dataset
from tests.stablerep.evaluation.fake_model import FakeModel

WriteFolders = Callable[..., Path]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were just made count as old enough to be remembered."""
    monkeypatch.setattr(fingerprint, "_SETTLED_NANOSECONDS", 0)


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were read, in order of reading."""
    names: list[str] = []
    original = LabelledImage.read_bytes

    def spy(image: LabelledImage) -> bytes:
        names.append(image.name)
        return original(image)

    monkeypatch.setattr(LabelledImage, "read_bytes", spy)
    return names


def overwrite(path: Path, data: bytes) -> None:
    """In place, with the times as they were: what an archive's tool or a careless copy does."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_digests_are_those_of_the_bytes(write_folders: WriteFolders) -> None:
    images = read_labelled_set(write_folders(train=70, test=1)).train  # more than one task
    expected = [hashlib.sha256(image.read_bytes()).hexdigest() for image in images]
    assert digest_contents(images, KnownDigests(None, "x"), "x") == expected


def test_the_fingerprint_is_the_digest_that_features_will_have(
    write_folders: WriteFolders, shards: Path, tmp_path: Path, model: FakeModel, settings: ExtractionSettings
) -> None:
    write_dataset(tmp_path / "generated", [2])
    for root in (write_folders(train=3, test=2), shards, tmp_path / "generated"):
        dataset = read_labelled_set(root)
        found = fingerprint_set(dataset, None)
        assert list(found) == list(dataset.splits)
        for split, images in dataset.splits.items():
            features = extract_features(model, images, dataset, settings, description="x")
            assert features is not None
            assert features.digest == found[split]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_same_holds_for_images_that_libraries_hold(
    tmp_path: Path,
    model: FakeModel,
    settings: ExtractionSettings,
    num_workers: int,
    encode_image: Callable[[str, int], bytes],
) -> None:
    files = [{"bytes": encode_image("red", number), "path": None} for number in range(5)]
    table = Dataset.from_dict({"image": files}, features=HubFeatures({"image": HubImage(decode=False)}))
    array = [(Image.fromarray(np.full((20, 24), number, dtype=np.uint8)), 0) for number in range(5)]
    images = [
        *(LabelledImage(f"table/{row}", (0,), TableRow(table, row)) for row in range(5)),
        *(LabelledImage(f"array/{row}", (0,), DatasetItem(array, row)) for row in range(5)),
    ]
    dataset = build_set("x", "captions", ["a"], {"test": images})
    settings = dataclasses.replace(settings, num_workers=num_workers)
    features = extract_features(model, images, dataset, settings, description="x")
    assert features is not None
    assert features.digest == fingerprint_set(dataset, tmp_path / "cache")["test"]
    assert not (tmp_path / "cache").exists()


def test_names_labels_and_bytes_make_the_fingerprint_and_the_place_does_not(
    write_folders: WriteFolders, tmp_path: Path, encode_image: Callable[[str, int], bytes]
) -> None:
    root = write_folders(train=2, test=1)

    def found() -> str:
        return fingerprint_set(read_labelled_set(root), None)["train"]

    before = found()
    shutil.copytree(root, tmp_path / "copy")
    assert fingerprint_set(read_labelled_set(tmp_path / "copy"), None)["train"] == before
    image = root / "train" / "red" / "000.png"
    original = image.read_bytes()
    image.write_bytes(encode_image("red", 77))
    assert found() != before
    image.write_bytes(original)
    assert found() == before
    image.rename(root / "train" / "red" / "100.png")
    assert found() != before
    (root / "train" / "red" / "100.png").rename(root / "train" / "green" / "000a.png")
    assert found() != before


def test_what_is_ignored_is_a_part_of_the_fingerprint(write_folders: WriteFolders) -> None:
    dataset = read_labelled_set(write_folders(train=2, test=1))
    ignoring = tuple(dataclasses.replace(image, ignored_labels=(1,)) for image in dataset.train)
    found = [fingerprint_set(dataclasses.replace(dataset, train=t), None) for t in (dataset.train, ignoring)]
    assert found[0]["train"] != found[1]["train"]
    assert found[0]["test"] == found[1]["test"]


@pytest.mark.usefixtures("settled")
def test_what_was_hashed_is_not_read_again(
    write_folders: WriteFolders, shards: Path, tmp_path: Path, read_names: list[str]
) -> None:
    for root in (write_folders(train=3, test=2), shards):
        dataset = read_labelled_set(root)
        first = fingerprint_set(dataset, tmp_path / "cache")
        assert len(read_names) == len(dataset.train) + len(dataset.test)
        read_names.clear()
        assert fingerprint_set(read_labelled_set(root), tmp_path / "cache") == first
        assert read_names == []


@pytest.mark.usefixtures("settled")
def test_an_image_that_changed_under_the_same_size_and_time_is_hashed_again(
    write_folders: WriteFolders, tmp_path: Path, read_names: list[str]
) -> None:
    root = write_folders(train=3, test=2)
    before = fingerprint_set(read_labelled_set(root), tmp_path / "cache")
    read_names.clear()
    image = root / "train" / "red" / "001.png"
    data = bytearray(image.read_bytes())
    data[-20] ^= 1
    overwrite(image, bytes(data))
    after = fingerprint_set(read_labelled_set(root), tmp_path / "cache")
    assert read_names == ["train/red/001.png"]
    assert after["train"] != before["train"]
    assert after["test"] == before["test"]


def test_a_file_of_this_moment_is_not_remembered(
    write_folders: WriteFolders, tmp_path: Path, read_names: list[str]
) -> None:
    root = write_folders(train=1, test=1)
    for _ in range(2):
        fingerprint_set(read_labelled_set(root), tmp_path / "cache")
    assert len(read_names) == 12
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("settled")
def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    write_folders: WriteFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folders(train=1, test=1)
    original = LabelledImage.read_bytes

    def read_and_touch(image: LabelledImage) -> bytes:
        data = original(image)
        if image.name == "train/red/000.png":
            time.sleep(0.02)
            (root / image.name).write_bytes(data)
        return data

    monkeypatch.setattr(LabelledImage, "read_bytes", read_and_touch)
    fingerprint_set(read_labelled_set(root), tmp_path / "cache")
    known = KnownDigests(tmp_path / "cache", str(root))
    assert sorted(Path(place.path).relative_to(root).as_posix() for place in known._digests) == [
        "test/blue/000.png",
        "test/green/000.png",
        "test/red/000.png",
        "train/blue/000.png",
        "train/green/000.png",
    ]


@pytest.mark.usefixtures("settled")
def test_damaged_notes_are_written_anew(
    write_folders: WriteFolders, tmp_path: Path, caplog: pytest.LogCaptureFixture, read_names: list[str]
) -> None:
    root = write_folders(train=1, test=1)
    expected = fingerprint_set(read_labelled_set(root), tmp_path / "cache")
    (notes,) = (tmp_path / "cache" / "digests").iterdir()
    content = bytearray(notes.read_bytes())
    for damaged in (b"", b"no parquet", bytes(content[: len(content) // 2])):
        notes.write_bytes(damaged)
        read_names.clear()
        caplog.clear()
        assert fingerprint_set(read_labelled_set(root), tmp_path / "cache") == expected
        assert len(read_names) == 6
        assert f"{notes} is damaged and written anew" in caplog.text
        assert len(KnownDigests(tmp_path / "cache", str(root))._digests) == 6


@pytest.mark.usefixtures("settled")
def test_a_folder_that_cannot_be_written_is_a_warning(
    write_folders: WriteFolders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    dataset = read_labelled_set(write_folders(train=1, test=1))
    assert fingerprint_set(dataset, tmp_path / "cache") == fingerprint_set(dataset, None)
    assert "digests of images cannot be kept in" in caplog.text


def test_an_image_that_cannot_be_read_has_no_digest(write_folders: WriteFolders) -> None:
    dataset: LabelledSet = read_labelled_set(write_folders(train=2, test=1))
    Path(dataset.train[1].content.path).unlink()  # type: ignore[attr-defined]
    Path(dataset.train[2].content.path).write_bytes(b"short")  # type: ignore[attr-defined]
    found = digest_contents(dataset.train, KnownDigests(None, "x"), "x")
    assert [bool(sha256) for sha256 in found] == [True, False, False, True, True, True]


def test_recorded_digests_are_taken_as_they_are(tmp_path: Path, read_names: list[str]) -> None:
    write_dataset(tmp_path / "set", [2])
    fingerprint_set(read_labelled_set(tmp_path / "set"), None)
    assert read_names == []
