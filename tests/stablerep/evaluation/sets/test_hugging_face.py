"""Datasets of the Hugging Face library, saved on disk by the library itself."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from stablerep.evaluation.sets import LabelledSet, SetOptions, read_labelled_set

EncodeImage = Callable[[str, int], bytes]
COLOURS = ("blue", "green", "red")


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library caches goes to the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def save(tmp_path: Path, encode_image: EncodeImage) -> Callable[..., str]:
    """`save(train=[0, 1], test=[1])`: a dataset on disk with these labels; returns its address."""

    def write(label: Any = None, column: str = "label", **labels: Sequence[Any]) -> str:
        kind = ClassLabel(names=list(COLOURS)) if label is None else label
        kinds = kind if isinstance(kind, Mapping) else dict.fromkeys(labels, kind)
        tables = {
            split: Dataset.from_dict(
                {
                    "image": [
                        {"bytes": encode_image(COLOURS[i % 3], i), "path": None} for i in range(len(values))
                    ],
                    column: list(values),
                },
                features=Features({"image": Image(), column: kinds[split]}),
            )
            for split, values in labels.items()
        }
        DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
        return f"hf:{tmp_path / 'saved'}"

    return write


def labels_of(dataset: LabelledSet) -> dict[str, list[tuple[int, ...]]]:
    return {split: [image.labels for image in images] for split, images in dataset.splits.items()}


def test_images_are_the_bytes_of_the_table(save: Callable[..., str], encode_image: EncodeImage) -> None:
    dataset = read_labelled_set(save(train=[0, 1, 2, 0], validation=[2], test=[1, 2]))
    assert (dataset.targets, dataset.classes) == ("classes", COLOURS)
    assert labels_of(dataset) == {
        "train": [(0,), (1,), (2,), (0,)],
        "validation": [(2,)],
        "test": [(1,), (2,)],
    }
    assert [image.read_bytes() for image in dataset.train] == [
        encode_image(COLOURS[i % 3], i) for i in range(4)
    ]
    assert dataset.train[2].decode(dataset.train[2].read_bytes()).size == (20, 24)
    assert dataset.test[1].name == "test/000001"


def test_a_folder_of_images_is_read_by_the_library(
    tmp_path: Path, write_folders: Callable[..., Path]
) -> None:
    root = write_folders(train=2, test=1)
    by_library, by_us = read_labelled_set(f"hf:{root}"), read_labelled_set(root)
    assert by_library.classes == by_us.classes
    for split, images in by_us.splits.items():
        found = [(image.label, image.read_bytes()) for image in by_library.splits[split]]
        assert sorted(found) == sorted((image.label, image.read_bytes()) for image in images)


def test_several_classes_an_image(save: Callable[..., str]) -> None:
    kind = List(ClassLabel(names=["a", "b", "c"]))
    dataset = read_labelled_set(save(kind, train=[[0, 2], [1], []], test=[[2, 0]]))
    assert dataset.targets == "multilabel"
    assert labels_of(dataset) == {"train": [(0, 2), (1,), ()], "test": [(0, 2)]}


def test_words_are_sorted_and_numbers_are_themselves(save: Callable[..., str]) -> None:
    dataset = read_labelled_set(save(Value("string"), train=["hat", "bag", "hat"], test=["hat"]))
    assert (dataset.classes, labels_of(dataset)["train"]) == (("bag", "hat"), [(1,), (0,), (1,)])
    dataset = read_labelled_set(save(Value("int64"), train=[3, 0, 3], test=[0]))
    assert (dataset.classes, labels_of(dataset)["train"]) == (("0", "1", "2", "3"), [(3,), (0,), (3,)])


def test_hidden_labels_of_test_make_validation_the_test_split(save: Callable[..., str]) -> None:
    dataset = read_labelled_set(save(train=[0, 1], validation=[1], test=[-1, -1]))
    assert labels_of(dataset) == {"train": [(0,), (1,)], "test": [(1,)]}
    assert dataset.test[0].name == "validation/000000"
    assert [line.split("saved's ")[1] for line in dataset.remarks] == [
        "test split are hidden",
        "validation split is the test split",
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"train": [0, 1]}, "has no test split with labels; it has train"),
        ({"train": [0, 1], "test": [-1]}, "has no test split with labels"),
        ({"train": [0, 1], "test": [1, -1]}, "row 1 of test has no label in 'label'"),
        ({"train": [-1, -1], "test": [1]}, "the labels of its train split are hidden"),
        ({"train": [1, 1], "test": [1]}, "at least 2 classes are needed in train, got 1"),
        ({"train": [0, 1], "test": [2]}, "class 'red' of test has no image in train"),
    ],
)
def test_splits_that_do_not_fit_are_refused(
    save: Callable[..., str], labels: dict[str, list[int]], message: str
) -> None:
    address = save(**labels)
    with pytest.raises(ValueError, match=message):
        read_labelled_set(address)


def test_class_names_that_differ_between_splits_are_refused(save: Callable[..., str]) -> None:
    kinds = {"train": ClassLabel(names=["a", "b"]), "test": ClassLabel(names=["b", "a"])}
    address = save(kinds, train=[0, 1], test=[0])
    with pytest.raises(ValueError, match="(class 0 is 'a' in train and 'b' in test|cannot be loaded)"):
        read_labelled_set(address)


def test_numbers_that_are_no_classes_are_refused(save: Callable[..., str]) -> None:
    address = save(Value("float32"), train=[0.5, 1.0], test=[0.5])
    with pytest.raises(ValueError, match="'label' must hold classes, integers >= 0 or words, got float"):
        read_labelled_set(address)


def test_a_number_that_is_too_large_for_a_class_is_refused(save: Callable[..., str]) -> None:
    address = save(Value("int64"), train=[0, 10**9], test=[0])
    with pytest.raises(ValueError, match="column 'label': a label must be < 1048576, got 1000000000"):
        read_labelled_set(address)


@pytest.mark.parametrize("column", ["caption", "text", "sentences"])
def test_images_without_labels_are_labelled_by_their_captions(save: Callable[..., str], column: str) -> None:
    options = SetOptions(data_caption_column="sentences") if column == "sentences" else None
    dataset = read_labelled_set(save(Value("string"), column, test=["a hat", "a bag ", "a hat"]), options)
    assert (dataset.targets, dataset.classes) == ("captions", ("a hat", "a bag"))
    assert labels_of(dataset) == {"test": [(0,), (1,), (0,)]}
    assert [image.captions for image in dataset.test] == [("a hat",), ("a bag",), ("a hat",)]
    assert dataset.test[0].caption_id == dataset.test[2].caption_id != dataset.test[1].caption_id
    assert dataset.has_captions


def test_an_image_may_have_several_captions(save: Callable[..., str]) -> None:
    rows = [["a hat", "one hat", None], ["a bag", " "], ["one hat", "a hat"]]
    dataset = read_labelled_set(save(List(Value("string")), "captions", test=rows))
    assert [image.captions for image in dataset.test] == [
        ("a hat", "one hat"),
        ("a bag",),
        ("one hat", "a hat"),
    ]
    assert len({image.caption_id for image in dataset.test}) == 3


def test_captions_beside_labels_are_kept(tmp_path: Path, encode_image: EncodeImage) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y"]), "caption": Value("string")})
    rows = {
        "image": [{"bytes": encode_image("red", i), "path": None} for i in range(2)],
        "label": [0, 1],
        "caption": ["a hat", None],
    }
    table = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    dataset = read_labelled_set(f"hf:{tmp_path / 'saved'}")
    assert (dataset.targets, labels_of(dataset)["test"]) == ("classes", [(0,), (1,)])
    assert [image.captions for image in dataset.test] == [("a hat",), ()]
    assert not dataset.has_captions


def test_a_caption_that_is_missing_and_a_column_of_none_are_named(save: Callable[..., str]) -> None:
    address = save(Value("string"), "caption", test=["a hat", None])
    with pytest.raises(ValueError, match="test/000001: it has neither a label nor a caption"):
        read_labelled_set(address)
    with pytest.raises(ValueError, match="has no column 'words'; it has image, caption"):
        read_labelled_set(address, SetOptions(data_caption_column="words"))
    with pytest.raises(ValueError, match="column 'image' must hold texts or lists of them"):
        read_labelled_set(address, SetOptions(data_caption_column="image"))
    address = save(Value("string"), "caption", train=["a hat"])
    with pytest.raises(ValueError, match="has no test split with captions; it has train"):
        read_labelled_set(address)


def test_columns_are_found_or_named(tmp_path: Path, encode_image: EncodeImage) -> None:
    kind = ClassLabel(names=["x", "y"])
    table = Dataset.from_dict(
        {"img": [{"bytes": encode_image("red", 0), "path": None}] * 2, "fine": [0, 1], "coarse": [1, 0]},
        features=Features({"img": Image(), "fine": kind, "coarse": kind}),
    )
    DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    address = f"hf:{tmp_path / 'saved'}"
    with pytest.raises(
        ValueError, match=r"one label column .* found 2 \(fine, coarse\): name it by data_label"
    ):
        read_labelled_set(address)
    dataset = read_labelled_set(address, SetOptions(data_label_column="coarse"))
    assert labels_of(dataset)["train"] == [(1,), (0,)]
    with pytest.raises(ValueError, match="has no column 'colour'; it has img, fine, coarse"):
        read_labelled_set(address, SetOptions(data_label_column="colour"))
    with pytest.raises(ValueError, match="has no column 'photo'"):
        read_labelled_set(address, SetOptions(data_image_column="photo"))


def test_a_row_without_image_is_named_when_it_is_read(tmp_path: Path, encode_image: EncodeImage) -> None:
    table = Dataset.from_dict(
        {"image": [None, {"bytes": encode_image("red", 0), "path": None}], "label": [0, 1]},
        features=Features({"image": Image(), "label": ClassLabel(names=["x", "y"])}),
    )
    DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    first, second = read_labelled_set(f"hf:{tmp_path / 'saved'}").test
    with pytest.raises(ValueError, match="test/000000: the row holds no image"):
        first.read_bytes()
    assert second.read_bytes() == encode_image("red", 0)


def test_a_file_that_is_gone_is_named_when_it_is_read(write_folders: Callable[..., Path]) -> None:
    root = write_folders(train=1, test=1)
    dataset = read_labelled_set(f"hf:{root}")
    (root / "test" / "green" / "000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"test/green/000.png"):
        [image.read_bytes() for image in dataset.test]


def test_what_is_no_dataset_is_named(tmp_path: Path, save: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    for address in ("hf:no-such-dataset-anywhere", f"hf:{tmp_path}/empty"):
        with pytest.raises(FileNotFoundError, match=f"{address} cannot be loaded"):
            read_labelled_set(address)
    save(train=[0, 1], test=[1])
    with pytest.raises(ValueError, match="train is one table: a dataset with the splits train and test"):
        read_labelled_set(f"hf:{tmp_path}/saved/train")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:x needs the library datasets: pip install 'stablerep\[hub\]'"):
        read_labelled_set("hf:x")
