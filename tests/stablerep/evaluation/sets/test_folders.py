"""Class folders and plain shards: what is found, and one clear line for each thing that is wrong."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder
from webdataset import tariterators

from stablerep.evaluation.sets import LabelledImage, read_labelled_set
from stablerep.evaluation.sets.labelled import FileRange

WriteTar = Callable[[Path, dict[str, bytes]], Path]
EncodeImage = Callable[[str, int], bytes]


def path_of(image: LabelledImage) -> str:
    assert isinstance(image.content, FileRange)
    return image.content.path


def test_class_folders_are_read_as_torchvision_reads_them(write_folders: Callable[..., Path]) -> None:
    root = write_folders(train=3, test=2, validation=1)
    dataset = read_labelled_set(root)
    for split in ("train", "validation", "test"):
        oracle = ImageFolder(str(root / split))
        images = getattr(dataset, split)
        assert [(path_of(image), image.label) for image in images] == oracle.samples
        assert list(dataset.classes) == oracle.classes
        assert all(image.read_bytes() == Path(path_of(image)).read_bytes() for image in images)


def test_val_is_a_name_of_the_validation_split(write_folders: Callable[..., Path]) -> None:
    assert len(read_labelled_set(write_folders(train=2, test=1, val=2)).validation) == 6


def test_shards_are_read_as_webdataset_reads_them(shards: Path) -> None:
    dataset = read_labelled_set(shards)
    oracle = []
    for path in sorted((shards / "train").glob("*.tar")):
        with open(path, "rb") as stream:
            files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            oracle.extend(tariterators.group_by_keys(files))
    assert [image.read_bytes() for image in dataset.train] == [sample["png"] for sample in oracle]
    assert [image.label for image in dataset.train] == [int(sample["cls"]) for sample in oracle]
    assert dataset.classes == ("0", "1", "2")
    assert len(dataset.test) == 6


def test_shards_that_webdataset_wrote_are_read(tmp_path: Path, encode_image: EncodeImage) -> None:
    import webdataset

    images = {f"{index:03d}": (encode_image("red", index), index % 2) for index in range(6)}
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        with webdataset.TarWriter(str(tmp_path / split / "00000.tar")) as writer:
            for key, (image, label) in images.items():
                writer.write({"__key__": key, "png": image, "cls": label})
    dataset = read_labelled_set(tmp_path)
    for found in (dataset.train, dataset.test):
        assert [(image.read_bytes(), image.label) for image in found] == list(images.values())


def test_classes_txt_names_the_labels_of_shards(shards: Path) -> None:
    (shards / "classes.txt").write_text("blue\ngreen\nred\n")
    assert read_labelled_set(shards).classes == ("blue", "green", "red")
    (shards / "classes.txt").write_text("blue\n")
    with pytest.raises(ValueError, match=r"classes.txt names 1 classes, but the shards hold label 2"):
        read_labelled_set(shards)


def test_files_that_are_no_images_are_counted(write_folders: Callable[..., Path]) -> None:
    root = write_folders(train=2, test=1)
    (root / "train" / "red" / "notes.txt").write_text("x")
    (root / "test" / "red" / "scan.TIFF").write_bytes(b"x")
    assert read_labelled_set(root).num_ignored_files == {".tiff": 1, ".txt": 1}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(write_folders: Callable[..., Path], split: str) -> None:
    root = write_folders(train=1, test=1)
    shutil.rmtree(root / split)
    with pytest.raises(FileNotFoundError, match=f"has no {split}/ folder"):
        read_labelled_set(root)


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_labelled_set(tmp_path / "nowhere")


def test_a_test_class_without_training_images_is_refused(write_folders: Callable[..., Path]) -> None:
    root = write_folders(train=1, test=1)
    shutil.rmtree(root / "train" / "green")
    with pytest.raises(ValueError, match=r"class 'green' of .*test has no folder in .*train"):
        read_labelled_set(root)


def test_an_empty_class_is_named(write_folders: Callable[..., Path]) -> None:
    root = write_folders(train=1, test=1)
    (root / "test" / "red" / "000.png").unlink()
    with pytest.raises(ValueError, match=r"test/red holds no images"):
        read_labelled_set(root)


def test_a_split_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"no class folders and no .tar shards in .*train"):
        read_labelled_set(tmp_path)


def test_test_shards_without_samples_are_named(shards: Path) -> None:
    (shards / "test" / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"no images in .*test"):
        read_labelled_set(shards)


def test_a_single_class_is_refused(write_folders: Callable[..., Path]) -> None:
    root = write_folders(train=1, test=1)
    for split in ("train", "test"):
        for name in ("red", "green"):
            shutil.rmtree(root / split / name)
    with pytest.raises(ValueError, match=r"folders: at least 2 classes are needed in train, got 1"):
        read_labelled_set(root)


def test_a_shard_label_that_train_lacks_is_refused(
    shards: Path, write_tar: WriteTar, encode_image: EncodeImage
) -> None:
    write_tar(shards / "test" / "9.tar", {"a.png": encode_image("red", 1), "a.cls": b"7"})
    with pytest.raises(ValueError, match=r"test/9.tar/a.png: class '7' of test has no image in train"):
        read_labelled_set(shards)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.cls": b"1"}, "sample 'a' has no image member"),
        ({"a.png": b"x", "a.cls": b"hat"}, "sample 'a': its label must be an integer >= 0, got b'hat'"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, "sample 'a' has two members for its image"),
        ({"a.png": b"x", "a.txt": b"x", "b.cls": b"1"}, "sample 'b' has no image member"),
        ({"a.png": b"x", "a.txt": b"\xff"}, r"sample 'a': its captions must be UTF-8 \(invalid start byte\)"),
        (
            {"a.png": b"x", "a.txt": b"x" * (2**20 + 1)},
            "sample 'a': its captions may have 1048576 bytes, got 1048577",
        ),
        ({}, "the tar holds no members"),
    ],
)
def test_a_malformed_shard_is_named(
    shards: Path, write_tar: WriteTar, members: dict[str, bytes], message: str
) -> None:
    write_tar(shards / "train" / "bad.tar", members)
    with pytest.raises(ValueError, match=f"bad.tar: {message}"):
        read_labelled_set(shards)


def test_captions_stand_beside_the_images_of_shards(
    tmp_path: Path, write_tar: WriteTar, encode_image: EncodeImage
) -> None:
    """Without a label: several captions, one a line; nothing is learnt, so `test/` may be alone."""
    images = [encode_image("red", seed) for seed in range(3)]
    texts = ["a hat\n\n  two hats \r\n", "ein Hütchen", "a hat\ntwo hats"]
    members: dict[str, bytes] = {}
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        members |= {f"{index}.jpg": image, f"{index}.txt": text.encode(), f"{index}.json": b"{}"}
    write_tar(tmp_path / "test" / "0.tar", members | {"licence.txt": b"CC0"})
    dataset = read_labelled_set(tmp_path)
    assert (dataset.targets, dataset.has_captions, list(dataset.splits)) == ("captions", True, ["test"])
    assert [image.captions for image in dataset.test] == [
        ("a hat", "two hats"),
        ("ein Hütchen",),
        ("a hat", "two hats"),
    ]
    assert [image.read_bytes() for image in dataset.test] == images
    assert [image.label for image in dataset.test] == [0, 1, 0]
    assert dataset.classes == ("a hat", "ein Hütchen")
    assert dataset.num_ignored_files == {".json": 3, ".txt": 1}
    first, second, third = (image.caption_id for image in dataset.test)
    assert first == third != second
    with pytest.raises(ValueError, match="knn needs classes, but the labels of .* are its captions"):
        dataset.check_has_classes("knn")


def test_only_line_feeds_part_captions(tmp_path: Path, write_tar: WriteTar) -> None:
    texts = ["a hat\u2028of felt", "a\u0085hat", "a\vhat", "a\fhat\r"]
    write_tar(tmp_path / "test" / "0.tar", {"a.png": b"x", "a.txt": "\n".join(texts).encode()})
    assert read_labelled_set(tmp_path).test[0].captions == (*texts[:3], "a\fhat")


def test_samples_of_shards_may_have_labels_and_captions(
    shards: Path, write_tar: WriteTar, encode_image: EncodeImage
) -> None:
    image = encode_image("red", 1)
    write_tar(shards / "test" / "00000.tar", {"a.png": image, "a.cls": b"2", "a.txt": b"a hat"})
    dataset = read_labelled_set(shards)
    assert dataset.targets == "classes"
    assert (dataset.test[0].label, dataset.test[0].captions) == (2, ("a hat",))
    assert dataset.has_captions
    assert dataset.train[0].captions == ()


def test_shards_with_classes_may_have_test_alone(shards: Path) -> None:
    shutil.rmtree(shards / "train")
    dataset = read_labelled_set(shards)
    assert (dataset.targets, len(dataset.test)) == ("classes", 6)
    with pytest.raises(ValueError, match="knn needs a train and a test split, but .* is one split"):
        dataset.check_has_classes("knn")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "bad.tar/a.png: it has no cls member, as other samples have"),
        ({"a.png": b"x", "a.txt": b"a hat"}, "bad.tar/a.png: it has no cls member, as other samples have"),
        (
            {"a.png": b"x", "a.cls": b"1000000000"},
            "bad.tar/a.png: a label must be < 1048576, got 1000000000",
        ),
    ],
)
def test_a_sample_that_does_not_fit_the_others_is_named(
    shards: Path, write_tar: WriteTar, members: dict[str, bytes], message: str
) -> None:
    write_tar(shards / "train" / "bad.tar", members)
    with pytest.raises(ValueError, match=message):
        read_labelled_set(shards)


def test_an_image_without_label_and_caption_is_named(tmp_path: Path, write_tar: WriteTar) -> None:
    for text in ({}, {"b.txt": b"\n \n"}):
        write_tar(tmp_path / "test" / "0.tar", {"a.png": b"x", "a.txt": b"a hat", "b.png": b"x"} | text)
        with pytest.raises(ValueError, match=r"test/0.tar/b.png: it has neither a label nor a caption"):
            read_labelled_set(tmp_path)


@pytest.mark.parametrize("names", [["0", "1", "12"], ["n01440764", "n01443537"], ["007", "2"]])
def test_classes_that_are_called_by_numbers_have_no_names(
    tmp_path: Path, encode_image: EncodeImage, names: list[str]
) -> None:
    def write(name: str) -> None:
        for split in ("train", "test"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(encode_image("red", 1))

    for name in names:
        write(name)
    assert not read_labelled_set(tmp_path).has_class_names
    write("n1 road")
    assert read_labelled_set(tmp_path).has_class_names


def test_a_truncated_shard_is_refused_wherever_it_is_cut(shards: Path) -> None:
    shard = shards / "train" / "00001.tar"
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for cut in range(0, end, 256):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"00001.tar"):
            read_labelled_set(shards)


def test_a_damaged_header_does_not_end_a_shard_silently(shards: Path) -> None:
    shard = shards / "train" / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"00002.png")] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"00000.tar: the tar is truncated or damaged after member '00001.cls'"
    ):
        read_labelled_set(shards)


def test_a_compressed_shard_is_refused(shards: Path) -> None:
    shard = shards / "train" / "00000.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match=r"00000.tar: not a readable, uncompressed tar"):
        read_labelled_set(shards)


def test_a_file_that_shrank_since_it_was_listed_is_named(write_folders: Callable[..., Path]) -> None:
    image = read_labelled_set(write_folders(train=1, test=1)).train[0]
    Path(path_of(image)).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"train/blue/000.png: expected \d+ bytes"):
        image.read_bytes()


def test_a_class_that_only_train_has_is_no_error(write_folders: Callable[..., Path]) -> None:
    root = write_folders(train=2, test=1)
    shutil.rmtree(root / "test" / "green")
    dataset = read_labelled_set(root)
    assert dataset.classes == ("blue", "green", "red")
    assert [image.label for image in dataset.test] == [0, 2]


def test_class_folders_and_shards_have_classes(write_folders: Callable[..., Path], shards: Path) -> None:
    for root in (write_folders(train=2, test=1), shards):
        dataset = read_labelled_set(root)
        assert dataset.targets == "classes"
        assert list(dataset.splits) == ["train", "test"]
        assert not dataset.has_captions
        dataset.check_has_classes("knn")
