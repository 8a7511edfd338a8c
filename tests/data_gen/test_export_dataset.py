"""Laws of the flat export, checked with open_clip's loader, `datasets`, webdataset and pyarrow."""

import argparse
import functools
import gc
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_gen.export_dataset import ExportDatasetConfig, run
from data_gen.shards import Sample
from data_gen.storage import Store
from tests.data_gen.test_card import NUM_IMAGES, SmallDataset, make_dataset, write_card_of

EXTRA_COLUMNS = {"label": "string", "url": "string", "score": "double"}
IMG2DATASET_COLUMNS = [
    *("url", "caption", "key", "status", "error_message", "width", "height", "original_width"),
    *("original_height", "sha256"),
]


def export(source: str | Path, output: str | Path, num_processes: int = 1) -> int:
    return run(ExportDatasetConfig(str(source), str(output), num_processes=num_processes))


@pytest.fixture
def dataset(tmp_path: Path) -> SmallDataset:
    return make_dataset(tmp_path / "dataset", extra_columns=EXTRA_COLUMNS)


@pytest.fixture
def flat(dataset: SmallDataset, tmp_path: Path) -> Path:
    assert export(dataset.path, tmp_path / "flat") == 0
    return tmp_path / "flat"


def pairs(samples: list[Sample]) -> list[tuple[str, bytes]]:
    """Caption and image of each image, in order."""
    return [(sample.caption, image) for sample in samples for image in sample.images]


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Tars and side-cars, which hold nothing of the hour or machine."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".parquet")}


def test_the_files_are_named_and_filled_as_img2dataset_does(flat: Path, dataset: SmallDataset) -> None:
    with tarfile.open(flat / "00001.tar") as tar:
        names = tar.getnames()
        record = json.load(tar.extractfile("000010002.json"))  # type: ignore[arg-type]
    assert names[:4] == ["000010000.jpg", "000010000.txt", "000010000.json", "000010001.jpg"]
    sample = dataset.samples[7]
    assert record == {
        "url": None,
        "caption": sample.caption,
        "key": "000010002",
        "status": "success",
        "error_message": None,
        "width": 16,
        "height": 12,
        "original_width": 16,
        "original_height": 12,
        "sha256": hashlib.sha256(sample.images[0]).hexdigest(),
        "caption_id": sample.caption_id,
        "occurrence": 0,
        "image_index": 0,
        "image_seed": sample.image_seeds[0],
        "guidance_scale": 2.0,
        "fingerprint": "a" * 12,
        "settings_hash": dataset.manifest.settings_hash,
        "source_key": sample.key,
        "num_bytes": len(sample.images[0]),
        "label": "label 7",
        "extra_url": "label 7",
        "score": 1.75,
    }
    table = pq.read_table(flat / "00001.parquet")
    assert table.column_names[:10] == IMG2DATASET_COLUMNS
    rows = table.to_pylist()
    content = (flat / "00001.tar").read_bytes()
    images = [content[row.pop("tar_offset") :][: row["num_bytes"]] for row in rows]
    assert images == [image for _, image in pairs(dataset.samples[6:])]
    assert rows[2] == record


def test_the_statistics_have_img2datasets_form(flat: Path) -> None:
    stats = json.loads((flat / "00000_stats.json").read_text())
    assert stats["status_dict"] == {"success": 12}
    assert [stats[name] for name in ("count", "successes", "failed_to_download", "failed_to_resize")] == [
        *(12, 12, 0, 0)
    ]
    assert stats["duration"] == pytest.approx(stats["end_time"] - stats["start_time"])


def test_failed_images_have_a_row_and_no_member(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", num_failed=1)
    assert export(dataset.path, tmp_path / "flat") == 0
    rows = pq.read_table(tmp_path / "flat" / "00001.parquet").to_pylist()
    assert [(row["status"], row["error_message"]) for row in rows] == [
        *[("success", None)] * 2,
        *[("failed_to_generate", "safety_checker")] * 2,
    ]
    assert [row["key"] for row in rows] == [f"00001000{index}" for index in range(4)]
    with tarfile.open(tmp_path / "flat" / "00001.tar") as tar:
        assert len(tar.getnames()) == 3 * 2
    stats = json.loads((tmp_path / "flat" / "00001_stats.json").read_text())
    assert stats["status_dict"] == {"safety_checker": 2, "success": 2}
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (4, 2, 2)
    assert json.loads((tmp_path / "flat" / "sizes.json").read_text()) == {"00000.tar": 12, "00001.tar": 2}


def test_keys_grow_where_a_shard_has_more_than_10_000_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.data_gen.test_card.NUM_CAPTIONS_PER_SHARD", 5_001)
    dataset = make_dataset(tmp_path / "dataset", num_captions=2)
    assert export(dataset.path, tmp_path / "flat") == 0
    assert pq.read_table(tmp_path / "flat" / "00000.parquet")["key"][0].as_py() == "0000000000"


# Readers


def leaves_tars_open(test: Callable[..., None]) -> Callable[..., None]:
    """For webdataset, which leaves the tars that it opened to the garbage collector."""
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")(test)


@pytest.fixture
def garbage_collected() -> Iterator[None]:
    """What a test leaves open is closed at its end, not in the midst of another."""
    yield
    gc.collect()


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@leaves_tars_open
@pytest.mark.usefixtures("garbage_collected")
def test_open_clip_trains_on_the_pairs(
    tmp_path: Path, extension: str, is_train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pytest.importorskip("open_clip_train.data", reason="the reader of the layout; not installed")
    # Since webdataset 0.2.87 a tar's end is marked, which open_clip takes for a member (open_clip #935).
    expand = functools.partial(data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(data, "tar_file_expander", expand)
    dataset = make_dataset(tmp_path / "dataset", extension)
    assert export(dataset.path, tmp_path / "flat") == 0
    shards = f"{tmp_path}/flat/{{00000..00001}}.tar"
    args = argparse.Namespace(
        train_data=shards,
        val_data=shards,
        train_num_samples=None,  # sizes.json says it
        val_num_samples=None,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=0,
        batch_size=4,
        world_size=1,
    )
    info = data.get_wds_dataset(args, np.array, is_train, tokenizer=lambda text: [text])
    assert not is_train or info.dataloader.num_samples == 16
    read = [
        (text, pixels.numpy().tobytes())
        for images, texts in info.dataloader
        for pixels, text in zip(images, texts, strict=True)
    ]
    assert sorted(read) == sorted(
        (caption, np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).tobytes())
        for caption, image in pairs(dataset.samples)
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by_card", [False, True])
def test_datasets_reads_the_pairs(
    flat: Path, dataset: SmallDataset, tmp_path: Path, streaming: bool, by_card: bool
) -> None:
    datasets = pytest.importorskip("datasets", reason="a reader of the layout; not installed")
    options: dict[str, Any] = {"split": "train", "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    if by_card:
        loaded = datasets.load_dataset(str(flat), **options)
    else:
        # Without the card it takes the columns from the first samples, which lack a label; one shard has all.
        loaded = datasets.load_dataset("webdataset", data_files=f"{flat}/00001.tar", **options)
    rows = list(loaded.cast_column("jpg", datasets.Image(decode=False)))
    samples = dataset.samples if by_card else dataset.samples[6:]
    assert [(row["txt"], row["jpg"]["bytes"]) for row in rows] == pairs(samples)
    assert [row["json"]["image_index"] for row in rows] == [0, 1] * len(samples)
    assert [row["json"]["label"] for row in rows[::2]] == [sample.extra["label"] for sample in samples]
    assert {row["json"]["url"] for row in rows} == {None}


@leaves_tars_open
@pytest.mark.usefixtures("garbage_collected")
def test_webdataset_reads_the_pairs(flat: Path, dataset: SmallDataset) -> None:
    import webdataset

    items = webdataset.WebDataset(f"{flat}/{{00000..00001}}.tar", shardshuffle=False)
    assert [(item["txt"].decode(), item["jpg"]) for item in items] == pairs(dataset.samples)


# Stopping, damage, refusal


def test_a_finished_shard_is_not_written_again(flat: Path, dataset: SmallDataset) -> None:
    before = {path.name: path.stat().st_ino for path in flat.iterdir() if path.name[0].isdigit()}
    assert export(dataset.path, flat) == 0
    assert {path.name: path.stat().st_ino for path in flat.iterdir() if path.name[0].isdigit()} == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "left", ["no marker", "cut tar", "cut side-car", "cut marker", "other tar, no marker"]
)
def test_an_export_that_was_stopped_or_damaged_ends_with_the_same_bytes(
    flat: Path, dataset: SmallDataset, left: str
) -> None:
    expected, sound = read_bytes(flat), (flat / "00000.tar").stat().st_ino
    match left:
        case "cut tar":
            cut(flat / "00001.tar")
        case "cut side-car":
            cut(flat / "00001.parquet")
        case "cut marker":
            cut(flat / "00001_stats.json")
            cut(flat / "00001_stats.json")
        case _:
            (flat / "00001_stats.json").unlink()
    if left == "other tar, no marker":
        (flat / "00001.tar").write_bytes(b"other")
        (flat / ".00001.tar.0a.host.1.tmp").write_bytes(b"of a killed process of another host")
    assert export(dataset.path, flat) == 0
    assert read_bytes(flat) == expected
    assert (flat / "00000.tar").stat().st_ino == sound
    assert json.loads((flat / "00001_stats.json").read_text())["successes"] == 4


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "gone", "no marker", "bad marker"])
def test_a_damaged_shard_is_named_and_the_others_exported(
    dataset: SmallDataset, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, marker = dataset.path / "00000.tar", dataset.path / "00000_stats.json"
    sound = {path: path.read_bytes() for path in (tar, marker)}
    content = bytearray(sound[tar])
    match damage:
        case "cut":
            cut(tar)
        case "flipped bit":  # of a seed, which no digest but the tar's covers
            content[content.index(b'"image_seeds": ["0') + len(b'"image_seeds": ["')] ^= 1
            tar.write_bytes(content)
        case "gone":
            tar.unlink()
        case "no marker":
            marker.unlink()
        case "bad marker":
            marker.write_bytes(b"{}")
    flat = tmp_path / "flat"
    assert export(dataset.path, flat) == (75 if damage == "no marker" else 1)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stablerep export")]
    assert len(told) == 1
    assert f"{dataset.path}/00000" in told[0]
    assert not list(flat.glob("00000*"))
    assert json.loads((flat / "sizes.json").read_text()) == {"00001.tar": 4}
    for path, whole in sound.items():
        path.write_bytes(whole)
    assert export(dataset.path, flat) == 0
    assert export(dataset.path, tmp_path / "undisturbed") == 0
    assert read_bytes(flat) == read_bytes(tmp_path / "undisturbed")


def test_a_shard_that_was_made_again_is_exported_again(flat: Path, dataset: SmallDataset) -> None:
    marker = dataset.path / "00000_stats.json"
    there = json.loads((flat / "00000_stats.json").read_text())
    (flat / "00000_stats.json").write_text(json.dumps(there | {"source_sha256": "0" * 64}))
    assert export(dataset.path, flat) == 0
    now = json.loads((flat / "00000_stats.json").read_text())
    assert now["source_sha256"] == json.loads(marker.read_text())["tar"]["sha256"]


@pytest.mark.parametrize("name", ["thesis.tex", "photos/00000.tar", "00000.tar"])
def test_an_output_that_holds_other_files_is_refused(
    dataset: SmallDataset, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "flat" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"holds {name} but no export.json"):
        export(dataset.path, tmp_path / "flat")
    assert [found for found in (tmp_path / "flat").rglob("*") if found.is_file()] == [path]
    assert path.read_bytes() == b"mine"


def test_a_file_that_joined_an_export_is_refused(flat: Path, dataset: SmallDataset) -> None:
    (flat / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no part of an export"):
        export(dataset.path, flat)


def test_the_dataset_itself_and_the_export_of_another_are_refused(
    flat: Path, dataset: SmallDataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"but no export\.json: not an export"):
        export(dataset.path, dataset.path)
    other = make_dataset(tmp_path / "other")
    there, here = dataset.manifest.settings_hash, other.manifest.settings_hash
    with pytest.raises(ValueError, match=f"settings_hash is '{there}' there and '{here}' here"):
        export(other.path, flat)


def test_processes_are_counted_from_one(dataset: SmallDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_processes must be >= 1, got 0"):
        export(dataset.path, tmp_path / "flat", num_processes=0)


def test_another_process_writes_what_this_one_does(tmp_path: Path) -> None:
    dataset = make_dataset(
        tmp_path / "dataset", num_captions=2
    )  # one shard: a process takes seconds to start
    assert export(dataset.path, tmp_path / "here") == 0
    assert export(dataset.path, tmp_path / "there", num_processes=2) == 0
    assert read_bytes(tmp_path / "there") == read_bytes(tmp_path / "here")


def test_urls_on_both_sides_are_exported_and_gone_on_with(flat: Path, tmp_path: Path) -> None:
    memory = f"memory://{tmp_path.name}"
    source = make_dataset(f"{memory}/dataset", extra_columns=EXTRA_COLUMNS)
    output = Store(f"{memory}/flat")
    assert export(source.store.url, output.url) == 0
    assert {name: output.read(name) for name in read_bytes(flat)} == read_bytes(flat)
    output.delete("00001_stats.json")
    output.replace("00001.tar", b"cut")
    assert export(source.store.url, output.url) == 0
    assert output.read("00001.tar") == (flat / "00001.tar").read_bytes()
    source.store.replace("00000.tar", source.store.read("00000.tar")[:-1])
    assert export(source.store.url, f"{memory}/flat2") == 1


def test_the_card_takes_over_the_licence(dataset: SmallDataset, tmp_path: Path) -> None:
    card = write_card_of(dataset).replace("license: unknown", "license: cc-by-4.0")
    dataset.store.replace("README.md", card.encode())
    assert export(dataset.path, tmp_path / "flat") == 0
    exported = (tmp_path / "flat" / "README.md").read_text()
    assert "license: cc-by-4.0" in exported
    assert f"{NUM_IMAGES * len(dataset.samples)} images" in exported
