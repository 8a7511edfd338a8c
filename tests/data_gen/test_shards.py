"""Laws of the on-disk contract, checked with tarfile, webdataset and pyarrow as outside readers."""

import contextlib
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_gen.captions import caption_id
from data_gen.images import decode_image, encode_image
from data_gen.shard_writer import ShardTakenError, ShardWriter, write_manifest
from data_gen.shards import (
    Sample,
    Shard,
    ShardError,
    list_complete_shards,
    read_manifest,
    read_samples,
    verify_shard,
)
from data_gen.storage import Store
from data_gen.verify import VerifyConfig, run, verify_images
from tests.data_gen.datasets import FINGERPRINT, build_manifest, read_stats, write_shard


def make_samples(num_samples: int = 3, num_images: int = 2) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for index in range(num_samples):
        images = rng.integers(0, 256, (num_images, 12, 16, 3), dtype=np.uint8)
        identity = caption_id(f"caption {index}")
        samples.append(
            Sample(
                key=identity,
                caption_id=identity,
                caption=f"caption {index}",
                images=tuple(encode_image(pixels, "jpg", 90, None)[0] for pixels in images),
                image_extension="jpg",
                image_seeds=tuple(f"{index:016x}{image:016x}" for image in range(num_images)),
                width=16,
                height=12,
                guidance_scales=(2.0,) * num_images,
                fingerprints=(FINGERPRINT,) * num_images,
            )
        )
    return samples


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return write_shard(tmp_path / "dataset", make_samples())


def test_what_was_written_is_read_back(shard: Shard) -> None:
    assert list(read_samples(shard)) == make_samples()
    verify_shard(shard)
    verify_images(shard)
    assert list_complete_shards(shard.path.parent) == [shard]


def test_tar_and_parquet_are_byte_identical_from_run_to_run(tmp_path: Path, shard: Shard) -> None:
    again = write_shard(tmp_path / "again", make_samples())
    assert again.path.read_bytes() == shard.path.read_bytes()
    assert again.parquet_path.read_bytes() == shard.parquet_path.read_bytes()


def test_tarfile_reads_it_and_finds_nothing_of_this_machine_or_hour(shard: Shard) -> None:
    with tarfile.open(shard.path) as tar:
        members = tar.getmembers()
    first = make_samples()[0].key
    assert [member.name for member in members[:4]] == [
        f"{first}.json",
        f"{first}.txt",
        f"{first}.0.jpg",
        f"{first}.1.jpg",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert shard.num_bytes == shard.path.stat().st_size
    assert shard.sha256 == hashlib.sha256(shard.path.read_bytes()).hexdigest()


# webdataset leaves the tar that it opened to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same_samples(shard: Shard) -> None:
    import webdataset

    items = webdataset.WebDataset(str(shard.path), shardshuffle=False)
    read = [(item["__key__"], item["txt"].decode(), (item["0.jpg"], item["1.jpg"])) for item in items]
    assert read == [(sample.key, sample.caption, sample.images) for sample in make_samples()]


def test_parquet_has_a_row_an_image_with_its_place_in_the_tar(shard: Shard) -> None:
    rows = pq.read_table(shard.parquet_path).to_pylist()
    content = shard.path.read_bytes()
    images = [image for sample in make_samples() for image in sample.images]
    assert [content[row["tar_offset"] :][: row["num_bytes"]] for row in rows] == images
    assert [row["sha256"] for row in rows] == [hashlib.sha256(image).hexdigest() for image in images]
    assert [(row["index"], row["width"], row["height"]) for row in rows] == [(0, 16, 12), (1, 16, 12)] * 3


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_truncated_shard_is_refused_before_its_first_sample(shard: Shard, fraction: float) -> None:
    content = shard.path.read_bytes()
    shard.path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ShardError, match=r"00000.tar: has \d+ bytes, expected"):
        next(read_samples(shard))
    with pytest.raises(ShardError, match=r"00000.tar"):
        verify_shard(shard)


def test_flipped_bit_is_named(shard: Shard) -> None:
    content = bytearray(shard.path.read_bytes())
    for position in np.random.default_rng(1).integers(0, len(content), 50):
        content[position] ^= 1 << int(position) % 8
        shard.path.write_bytes(content)
        with pytest.raises(ShardError, match=r"00000\.tar: sha256"):
            verify_shard(shard)
        content[position] ^= 1 << int(position) % 8


def test_flipped_bit_yields_an_error_or_the_sample_that_was_written(shard: Shard) -> None:
    content, written = bytearray(shard.path.read_bytes()), make_samples()
    for position in np.random.default_rng(2).integers(0, len(content), 200):
        content[position] ^= 1 << int(position) % 8
        shard.path.write_bytes(content)
        read: list[Sample] = []
        with contextlib.suppress(ShardError):
            read.extend(map(without_provenance, read_samples(shard)))
        expected = list(map(without_provenance, written))
        assert read == expected[: len(read)]
        content[position] ^= 1 << int(position) % 8


def test_a_short_sample_is_refused(tmp_path: Path, shard: Shard) -> None:
    members = read_members(shard.path)
    del members[f"{make_samples()[1].key}.1.jpg"]
    with pytest.raises(ShardError, match=rf"sample {make_samples()[1].key} is incomplete"):
        list(read_samples(rewrite(shard, members)))


def test_a_member_that_occurs_twice_is_refused(shard: Shard) -> None:
    member = tarfile.TarInfo("a.txt")
    shard.path.write_bytes(2 * member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ShardError, match=r"00000\.tar: a\.txt: duplicate file name"):
        list(read_samples(dataclasses.replace(shard, num_bytes=shard.path.stat().st_size)))


def test_a_missing_sample_is_counted(shard: Shard) -> None:
    key = make_samples()[2].key
    members = {
        name: content for name, content in read_members(shard.path).items() if not name.startswith(key)
    }
    with pytest.raises(ShardError, match="holds 2 samples, expected 3"):
        list(read_samples(rewrite(shard, members)))


def test_an_image_under_another_caption_is_refused(shard: Shard) -> None:
    members, (first, second, _) = read_members(shard.path), make_samples()
    members[f"{first.key}.0.jpg"] = members[f"{second.key}.0.jpg"]
    with pytest.raises(ShardError, match=rf"sample {first.key}: an image differs from its sha256"):
        list(read_samples(rewrite(shard, members)))


@pytest.mark.parametrize("name", ["a.pyd", "a.pickle", "../a.0.jpg", "a.b.0.jpg", "a.0.gif"])
def test_a_member_outside_the_schema_is_refused(shard: Shard, name: str) -> None:
    with pytest.raises(ShardError, match="unexpected member"):
        list(read_samples(rewrite(shard, {name: b"x"})))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_regular_file_is_refused(shard: Shard, kind: bytes) -> None:
    member = tarfile.TarInfo("a.0.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    shard.path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ShardError, match=r"00000\.tar"):
        list(read_samples(dataclasses.replace(shard, num_bytes=shard.path.stat().st_size)))


def test_a_member_beyond_the_size_cap_is_refused_unread(shard: Shard) -> None:
    member = tarfile.TarInfo("a.txt")
    member.size = 1 << 33
    shard.path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ShardError, match="at most 1048576 expected"):
        list(read_samples(dataclasses.replace(shard, num_bytes=shard.path.stat().st_size)))


def test_a_compressed_tar_is_refused(shard: Shard) -> None:
    import gzip

    shard.path.write_bytes(gzip.compress(shard.path.read_bytes()))
    with pytest.raises(ShardError, match="not a readable tar"):
        list(read_samples(dataclasses.replace(shard, num_bytes=shard.path.stat().st_size)))


def test_a_corrupt_jpeg_under_a_fresh_marker_is_found_by_decoding(tmp_path: Path) -> None:
    sample = make_samples()[0]
    broken = dataclasses.replace(sample, images=(sample.images[0], sample.images[1][:100]))
    shard = write_shard(tmp_path / "dataset", [broken])
    verify_shard(shard)
    with pytest.raises(ShardError, match=rf"image {sample.key}.1.jpg: not a readable jpg"):
        verify_images(shard)
    assert run(VerifyConfig(str(tmp_path / "dataset"))) == 0
    assert run(VerifyConfig(str(tmp_path / "dataset"), deep=True)) == 1


def test_an_image_of_another_format_is_not_decoded() -> None:
    buffer = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (4, 4)).save(buffer, format="GIF")
    with pytest.raises(ValueError, match="not a readable png"):
        decode_image(buffer.getvalue(), "png")


def test_key_with_a_dot_or_twice_is_refused(tmp_path: Path) -> None:
    sample = make_samples()[0]
    with ShardWriter(tmp_path, build_manifest(2), 0) as writer:
        writer.write(sample)
        for key in (sample.key, "a.b", "a/b"):
            with pytest.raises(ShardError, match="must be new and without dot or slash"):
                writer.write(dataclasses.replace(sample, key=key))


def test_a_sample_with_another_number_of_images_is_refused(tmp_path: Path) -> None:
    sample = make_samples(num_images=3)[0]
    with (
        ShardWriter(tmp_path, build_manifest(1), 0) as writer,
        pytest.raises(ShardError, match="must have 2 images"),
    ):
        writer.write(sample)


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def write_and_break() -> None:
        with ShardWriter(tmp_path, build_manifest(3), 0) as writer:
            writer.write(make_samples()[0])
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write_and_break()
    assert list(tmp_path.iterdir()) == []


def test_planned_equals_written_plus_failed(tmp_path: Path) -> None:
    first, second, _ = make_samples()
    write_manifest(tmp_path, build_manifest(2))
    with ShardWriter(tmp_path, build_manifest(2), 0) as writer:
        writer.write(first)
        with pytest.raises(ShardError, match="2 captions were planned, but 1 written and 0 failed"):
            writer.publish(num_planned=2, seconds=1.0)
        writer.fail(second.key, second.caption, "safety_checker")
        shard = writer.publish(num_planned=2, seconds=1.0)
    assert (shard.num_samples, shard.num_failed) == (1, 1)
    stats = read_stats(tmp_path)
    assert stats["failures_by_reason"] == {"safety_checker": 1}
    assert stats["failed_captions"] == [
        {
            "key": second.key,
            "caption_id": second.caption_id,
            "caption": second.caption,
            "reason": "safety_checker",
        }
    ]


def test_a_shard_without_its_marker_is_not_complete(shard: Shard) -> None:
    (shard.path.parent / "00000_stats.json").unlink()
    assert list_complete_shards(shard.path.parent) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tar": 3}'])
def test_a_damaged_marker_is_named(shard: Shard, content: str) -> None:
    (shard.path.parent / "00000_stats.json").write_text(content)
    with pytest.raises(ShardError, match=r"00000_stats\.json"):
        list_complete_shards(shard.path.parent)


def test_a_shard_of_other_settings_is_refused(shard: Shard) -> None:
    marker = shard.path.parent / "00000_stats.json"
    marker.write_text(json.dumps({**read_stats(shard.path.parent), "settings_hash": "0" * 64}))
    with pytest.raises(ShardError, match="settings hash 0000000000000000 differs from"):
        list_complete_shards(shard.path.parent)


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no dataset.json"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_schema_is_refused(shard: Shard) -> None:
    path = shard.path.parent / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 1}))
    with pytest.raises(ShardError, match="schema_version must be 2, got 1"):
        read_manifest(shard.path.parent)


@pytest.mark.parametrize("value", ["3", -1, 2.5, None, True])
def test_a_count_that_is_none_is_named(shard: Shard, value: object) -> None:
    path = shard.path.parent / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_shards": value}))
    with pytest.raises(ShardError, match="num_shards must be an integer >= 0, got "):
        read_manifest(shard.path.parent)


def write_again(root: Path, samples: list[Sample], replaces: str | None = None) -> Shard:
    """A second writer of the first shard of three captions; those without a sample failed."""
    with ShardWriter(root, read_manifest(root), 0) as writer:
        for sample in samples:
            writer.write(sample)
        for index in range(len(samples), 3):
            writer.fail(f"key{index}", "a caption", "safety_checker")
        return writer.publish(num_planned=3, seconds=1.0, replaces=replaces)


def test_the_first_writer_wins(shard: Shard) -> None:
    files = {path.name: path.read_bytes() for path in shard.path.parent.iterdir()}
    with pytest.raises(ShardTakenError, match=r"00000\.tar: another writer has published another tar"):
        write_again(shard.path.parent, make_samples()[:2])
    assert write_again(shard.path.parent, make_samples()) == shard
    assert {path.name: path.read_bytes() for path in shard.path.parent.iterdir()} == files


def test_a_tar_without_its_marker_gets_it_from_a_writer_of_the_same_bytes(shard: Shard) -> None:
    files = {path.name: path.read_bytes() for path in shard.path.parent.iterdir()}
    shard.path.with_name("00000_stats.json").unlink()
    shard.parquet_path.unlink()
    assert write_again(shard.path.parent, make_samples()) == shard
    assert {path.name: path.read_bytes() for path in shard.path.parent.iterdir()} == files


def test_no_marker_stands_beside_a_tar_that_it_does_not_describe(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar whose marker was taken away is replaced, and the process dies before the next file."""
    root = shard.path.parent
    shard.path.with_name("00000_stats.json").unlink()
    replace = Store.replace

    def die(self: Store, name: str, content: bytes | Path) -> None:
        replace(self, name, content)
        raise OSError("power")

    with monkeypatch.context() as context:
        context.setattr(Store, "replace", die)
        with pytest.raises(OSError, match="power"):
            write_again(root, make_samples()[:2], replaces=shard.sha256)
    assert list_complete_shards(root) == []
    replaced = write_again(root, make_samples()[:2])
    verify_shard(replaced)
    verify_images(replaced)
    assert (replaced.num_samples, replaced.num_failed) == (2, 1)


def test_of_two_writers_that_replace_a_tar_no_marker_stays_that_is_not_the_tars(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen the tar without its marker; one publishes all of its shard before the other replaces."""
    root = shard.path.parent
    shard.path.with_name("00000_stats.json").unlink()
    replace = Store.replace

    def be_overtaken(self: Store, name: str, content: bytes | Path) -> None:
        monkeypatch.setattr(Store, "replace", replace)
        write_again(root, make_samples()[:1], replaces=shard.sha256)
        replace(self, name, content)

    monkeypatch.setattr(Store, "replace", be_overtaken)
    with pytest.raises(ShardTakenError, match="two writers have replaced it"):
        write_again(root, make_samples()[:2], replaces=shard.sha256)
    assert list_complete_shards(root) == []
    verify_shard(write_again(root, make_samples()[:2]))


def test_shard_names_sort_by_index() -> None:
    manifest = dataclasses.replace(build_manifest(1), num_shards=123_457)
    names = [manifest.shard_name(index) for index in (0, 9, 10, 99_999, 100_000, 123_456)]
    assert names == sorted(names)
    assert build_manifest(1).shard_name(7) == "00007"


def test_the_contract_imports_no_torch() -> None:
    code = "import sys, data_gen.shards; print({'torch', 'diffusers', 'pyarrow', 'PIL'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def without_provenance(sample: Sample) -> Sample:
    return dataclasses.replace(
        sample, image_seeds=(), width=0, height=0, guidance_scales=(), fingerprints=(), occurrence=0, extra={}
    )


def read_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def rewrite(shard: Shard, members: dict[str, bytes]) -> Shard:
    """The shard with other members, and a marker that knows its new size."""
    with tarfile.open(shard.path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return dataclasses.replace(shard, num_bytes=shard.path.stat().st_size)
