"""Datasets of `stablerep generate` as labelled sets: captions are labels, or a column is."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_gen.shard_writer import ShardWriter, write_manifest
from data_gen.shards import SCHEMA_VERSION, DatasetManifest, hash_settings, list_complete_shards, read_samples
from stablerep.evaluation.sets import LabelledSet, SetOptions, read_labelled_set
from tests.stablerep.datasets import build_sample, write_dataset


def write_with_column(
    root: Path, rows: Sequence[tuple[str, Any]], kind: str, column: str = "cls", num_images: int = 2
) -> None:
    """A dataset of one shard whose captions carry a column."""
    root.mkdir(parents=True)
    settings: Mapping[str, Any] = {"generator": {"model": "none"}, "column": column, "kind": kind}
    manifest = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        settings_hash=hash_settings(settings),
        captions_source={"files": []},
        caption_files=(),
        extra_columns={column: kind},
        num_captions=len(rows),
        num_images_per_caption=num_images,
        num_captions_per_shard=len(rows),
        num_shards=1,
        fingerprint={},
    )
    write_manifest(root, manifest)
    with ShardWriter(root, manifest, 0) as writer:
        for caption, value in rows:
            sample = build_sample(caption, num_images, 16)
            writer.write(dataclasses.replace(sample, extra={column: value}))
        writer.publish(num_planned=len(rows), seconds=1.0)


def check_against_shards(dataset: LabelledSet, root: Path) -> None:
    """Bytes, captions and ids are those that the format's own reader finds."""
    expected = [
        (image, (sample.caption,), sample.caption_id)
        for shard in list_complete_shards(root)
        for sample in read_samples(shard)
        for image in sample.images
    ]
    assert [(i.read_bytes(), i.captions, i.caption_id) for i in dataset.test] == expected


def test_captions_are_the_labels_of_a_generated_dataset(tmp_path: Path) -> None:
    captions = write_dataset(tmp_path / "set", [3, 2], num_images=4)
    dataset = read_labelled_set(tmp_path / "set")
    assert (dataset.targets, dataset.has_captions) == ("captions", True)
    assert dataset.classes == tuple(captions)
    assert list(dataset.splits) == ["test"]
    assert Counter(image.label for image in dataset.test) == dict.fromkeys(range(5), 4)
    assert all((dataset.classes[image.label],) == image.captions for image in dataset.test)
    assert len({image.name for image in dataset.test}) == 20
    check_against_shards(dataset, tmp_path / "set")


def test_a_dataset_by_url_is_the_same(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [2])
    by_path, by_url = (read_labelled_set(root) for root in (tmp_path / "set", f"file://{tmp_path}/set"))
    assert by_path.test == by_url.test


def test_images_of_an_object_store_are_read_and_compared(tmp_path: Path) -> None:
    import fsspec  # type: ignore[import-untyped]

    write_dataset(tmp_path / "set", [2], num_images=2)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/set/", "/stored/", recursive=True)
    dataset = read_labelled_set("memory://stored")
    check_against_shards(dataset, tmp_path / "set")
    memory.pipe("/stored/00000.tar", bytes(memory.size("/stored/00000.tar")))
    with pytest.raises(ValueError, match=rf"^{dataset.test[0].name}: sha256 is .*, expected "):
        dataset.test[0].read_bytes()


def test_classes_are_learnt_and_predicted_where_the_captions_carry_them(tmp_path: Path) -> None:
    rows = [("a hat", "hat"), ("a shoe", "shoe"), ("the hat", "hat")]
    write_with_column(tmp_path / "train", rows, "string")
    write_with_column(tmp_path / "test", [("one shoe", "shoe")], "string")
    dataset = read_labelled_set(tmp_path)
    assert (dataset.targets, dataset.classes) == ("classes", ("hat", "shoe"))
    assert [image.label for image in dataset.train] == [0, 0, 1, 1, 0, 0]
    assert [image.label for image in dataset.test] == [1, 1]
    assert dataset.test[0].captions == ("one shoe",)
    dataset.check_has_classes("knn")


def test_whole_numbers_are_their_own_labels(tmp_path: Path) -> None:
    write_with_column(tmp_path / "set", [("a", 2), ("b", 0)], "int64", column="label")
    dataset = read_labelled_set(tmp_path / "set")
    assert dataset.classes == ("0", "1", "2")
    assert [image.label for image in dataset.test] == [2, 2, 0, 0]


def test_another_column_is_named_and_a_missing_one_refused(tmp_path: Path) -> None:
    write_with_column(tmp_path / "set", [("a", True), ("b", False)], "bool", column="is_sunny")
    assert read_labelled_set(tmp_path / "set").targets == "captions"
    dataset = read_labelled_set(tmp_path / "set", SetOptions(data_label_column="is_sunny"))
    assert (dataset.targets, dataset.classes) == ("classes", ("False", "True"))
    with pytest.raises(ValueError, match=r"set has no column 'colour'; .*: is_sunny"):
        read_labelled_set(tmp_path / "set", SetOptions(data_label_column="colour"))


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([("a", 0.5)], "double", r"column 'cls' must hold classes \(string, int64, bool\), got double"),
        ([("a", -1)], "int64", r"a label must be >= 0, got -1"),
        ([("a", 10**9)], "int64", r"set: a label must be < 1048576, got 1000000000"),
        ([("a", "x"), ("b", None)], "string", r"test/00000/\w+.0: its column 'cls' is empty"),
    ],
)
def test_a_column_that_holds_no_classes_is_refused(
    tmp_path: Path, rows: list[tuple[str, Any]], kind: str, message: str
) -> None:
    write_with_column(tmp_path / "set", rows, kind)
    with pytest.raises(ValueError, match=message):
        read_labelled_set(tmp_path / "set")


def test_a_class_that_train_lacks_is_refused(tmp_path: Path) -> None:
    write_with_column(tmp_path / "train", [("a", "hat"), ("b", "shoe")], "string")
    write_with_column(tmp_path / "test", [("c", "bag")], "string")
    with pytest.raises(ValueError, match=r"test/00000/.*: class 'bag' of test has no image in train"):
        read_labelled_set(tmp_path)


def test_protocols_of_classes_refuse_captions_and_a_single_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "captions", [2])
    with pytest.raises(ValueError, match=r"knn needs classes, but the labels of .*captions are its captions"):
        read_labelled_set(tmp_path / "captions").check_has_classes("knn")
    write_with_column(tmp_path / "one", [("a", "x"), ("b", "y")], "string")
    with pytest.raises(ValueError, match=r"knn needs a train and a test split, but .*one is one split"):
        read_labelled_set(tmp_path / "one").check_has_classes("knn")


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [2])
    tar = tmp_path / "set" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000.tar: sha256 is .*, expected"):
        read_labelled_set(tmp_path / "set")


def test_a_damaged_side_car_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [2])
    parquet = tmp_path / "set" / "00000.parquet"
    content = bytearray(parquet.read_bytes())
    content[100] ^= 1
    parquet.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000.parquet: sha256 is .*, expected"):
        read_labelled_set(tmp_path / "set")


def test_unfinished_shards_are_left_out_and_said(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [2, 2])
    (tmp_path / "set" / "00001_stats.json").unlink()
    dataset = read_labelled_set(tmp_path / "set")
    assert len(dataset.classes) == 2
    assert dataset.remarks == (f"{tmp_path}/set: 1 of 2 planned shards are complete",)
    (tmp_path / "set" / "00000_stats.json").unlink()
    with pytest.raises(ValueError, match=r"set holds no complete shard \(of 2 planned\)"):
        read_labelled_set(tmp_path / "set")


def test_splits_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [2])
    (tmp_path / "test" / "hat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train/ holds a dataset of `stablerep generate`, test/ does not"):
        read_labelled_set(tmp_path)


def test_recorded_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [1])
    for image in read_labelled_set(tmp_path / "set").test:
        assert image.content.recorded_sha256 == hashlib.sha256(image.read_bytes()).hexdigest()
