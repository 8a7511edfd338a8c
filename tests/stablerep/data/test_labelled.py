import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_gen.shards import ShardError, Store
from stablerep.data.labelled import read_labelled_tar
from tests.stablerep.datasets import encode_noise, write_labelled_tar, write_tar

IMAGE = encode_noise(np.random.default_rng(0), 8)


def read(path: Path):  # type: ignore[no-untyped-def]
    return read_labelled_tar(Store(path.parent), path.name)


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "0.tar", num_samples=9)
    with (tmp_path / "0.tar").open("rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": "0.tar", "stream": file}])))
    expected = [(int(sample["cls"]), sample["jpg"]) for sample in samples]
    found, content = read(tmp_path / "0.tar"), (tmp_path / "0.tar").read_bytes()
    images = [content[o : o + n] for o, n in zip(found.offsets, found.num_bytes, strict=True)]
    assert list(zip(found.labels.tolist(), images, strict=True)) == expected
    assert len(set(found.ids.tolist())) == 9


def test_equal_keys_of_two_tars_are_two_samples(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        write_labelled_tar(tmp_path / name, num_samples=4)
    ids = [read(tmp_path / name).ids.tolist() for name in ("0.tar", "1.tar")]
    assert len({*ids[0], *ids[1]}) == 8


def test_suffix_in_capitals_is_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.JPG", IMAGE), ("a.CLS", b"1")])
    assert read(tmp_path / "0.tar").labels.tolist() == [1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", IMAGE)], "sample 'a' has no cls member"),
        ([("a.cls", b"1")], "sample 'a' has no image member"),
        ([], "holds no samples"),
        (
            [("a.cls", b"1"), ("a.b.jpg", IMAGE)],
            "member a.b.jpg has more than one dot: .* takes 'a' for its key",
        ),
        (
            [("a.cls", b"1"), ("a.jpg", IMAGE), ("a.png", IMAGE)],
            "sample 'a' has two members for its image: a.png",
        ),
        ([("a.cls", b"cat"), ("a.jpg", IMAGE)], "label a.cls must be an integer >= 0, got b'cat'"),
        ([("a.cls", b"-1"), ("a.jpg", IMAGE)], "label a.cls must be an integer >= 0, got b'-1'"),
        ([("a.cls", b"1" * 21), ("a.jpg", IMAGE)], "member a.cls must have 1 to 20 bytes, got 21"),
        ([("a.cls", b"1"), ("a.jpg", b"")], "member a.jpg must have 1 to"),
        ([("a.cls", b"1"), ("a.pickle", b"x")], "members must be jpg, jpeg, png, webp, cls, .* got a.pickle"),
    ],
)
def test_what_is_not_allowed_is_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ShardError, match=rf"0\.tar: {message}"):
        read(tmp_path / "0.tar")


def test_link_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ShardError, match=r"member a\.jpg is not a regular file"):
        read(tmp_path / "0.tar")


def test_truncated_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_labelled_tar(path, num_samples=4)
    whole = path.read_bytes()
    num_refused = 0
    for cut in range(700, len(whole) - tarfile.RECORDSIZE, 700):
        path.write_bytes(whole[:cut])
        with pytest.raises(ShardError):
            read(path)
        num_refused += 1
    assert num_refused > 2
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ShardError, match="not a readable, uncompressed tar"):
        read(path)
