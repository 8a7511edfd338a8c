import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch

from data_gen.shards import Store
from stablerep.augment import AugmentationConfig
from stablerep.data import sources
from stablerep.data.opening import open_dataset
from stablerep.data.order import Order, Position
from stablerep.data.sources import ON_THIS_MACHINE, CacheConfig, GeneratedDataset, ShardTable
from stablerep.data.stream import StepStream, ViewConfig, label_of
from tests.stablerep.datasets import write_dataset, write_labelled_tar

IDENTITY = AugmentationConfig((1.0, 1.0), (1.0, 1.0), flip_probability=0.0)
NUM_CAPTIONS = 24
START = Position(0, 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "shards", [9, 15], num_images=3)
    return tmp_path / "shards"


@pytest.fixture
def remote(root: Path) -> Iterator[str]:
    """The same in an object store."""
    store = Store("memory://streamed/shards")
    for path in sorted(root.iterdir()):
        store.replace(path.name, path.read_bytes())
    yield store.url
    fsspec.filesystem("memory").store.clear()


def build_stream(
    root: Path | str, cache: CacheConfig = ON_THIS_MACHINE, positives: Any = "caption", **options: Any
) -> StepStream:
    views = ViewConfig(options.pop("num_views", 2), positives, 16, IDENTITY, seed=0)
    datasets = [open_dataset(str(root), cache)]
    order = Order([datasets[0].num_samples], None, 0, 8)
    return StepStream(datasets, order, views, **({"num_captions_per_rank": 4} | options))


def batches(stream: StepStream, start: Position = START) -> list[dict[str, Any]]:
    stream.start_at(start)
    found = list(stream)
    assert all("error" not in batch for batch in found), found
    return found


def views_by_caption(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        caption: images
        for batch in found
        for caption, images in zip(batch["captions"], batch["images"], strict=True)
    }


def test_ranks_share_each_step_of_one_rank() -> None:
    order, views = Order([[50]], None, 0, 8), ViewConfig(2, "caption", 16, IDENTITY, seed=0)
    start = Position(0, 2)
    for step in range(4):
        parts = [StepStream([], order, views, 3, rank, 4).positions(start, step) for rank in range(4)]
        alone = StepStream([], order, views, 12).positions(start, step)
        assert [position for part in parts for position in part] == list(alone)


def test_views_of_a_caption_do_not_depend_on_its_batch(root: Path) -> None:
    one, other = (views_by_caption(batches(build_stream(root, num_captions_per_rank=n))) for n in (4, 6))
    assert len(one) == len(other) == NUM_CAPTIONS
    for caption, images in one.items():
        assert torch.equal(images, other[caption])


def test_views_of_a_caption_differ_from_epoch_to_epoch(root: Path) -> None:
    stream = build_stream(root)
    one, other = (views_by_caption(batches(stream, Position(epoch, 0))) for epoch in (0, 1))
    assert sum(not torch.equal(images, other[caption]) for caption, images in one.items()) > NUM_CAPTIONS / 3


def test_store_on_disk_or_remote_or_cached_gives_the_same_batches(
    root: Path, remote: str, tmp_path: Path
) -> None:
    expected = batches(build_stream(root))
    for cache in (ON_THIS_MACHINE, CacheConfig(str(tmp_path / "cache"))):
        for batch, other in zip(batches(build_stream(remote, cache)), expected, strict=True):
            assert batch["captions"] == other["captions"]
            assert torch.equal(batch["images"], other["images"])


def test_views_of_a_caption_are_different_images(root: Path) -> None:
    for images in views_by_caption(batches(build_stream(root, num_views=3))).values():
        assert len({tuple(view.flatten().tolist()) for view in images}) == 3


def test_image_positives_are_crops_of_one_image_with_a_label_of_its_own(root: Path) -> None:
    stream = build_stream(root, positives="image", num_views=3)
    labels = set()
    for epoch in range(8):
        for batch in batches(stream, Position(epoch, 0)):
            assert torch.equal(
                batch["images"][:, 0], batch["images"][:, 1]
            )  # the identity leaves no difference
            assert torch.equal(batch["images"][:, 0], batch["images"][:, 2])
            labels |= set(batch["labels"].tolist())
    assert NUM_CAPTIONS < len(labels) <= 3 * NUM_CAPTIONS


def test_stream_goes_on_within_an_epoch(root: Path) -> None:
    stream = build_stream(root)
    whole, rest = batches(stream), batches(stream, Position(0, 8))
    assert [batch["captions"] for batch in rest] == [batch["captions"] for batch in whole[2:]]
    assert rest[-1]["num_captions_taken"] == NUM_CAPTIONS
    assert [batch["num_steps_left"] for batch in rest] == [3, 2, 1, 0]


def test_labels_of_images_are_63_bits_and_differ() -> None:
    places = [*itertools.product(range(2), [5, 2**63 - 1], range(3), range(10))]
    labels = {label_of(*place) for place in places}
    assert len(labels) == len(places)
    assert all(0 <= label < 2**63 for label in labels)


def test_images_of_datasets_that_share_their_captions_have_labels_of_their_own(root: Path) -> None:
    views = ViewConfig(2, "image", 16, IDENTITY, seed=0)
    datasets = [open_dataset(str(root), ON_THIS_MACHINE) for _ in range(2)]
    order = Order([dataset.num_samples for dataset in datasets], [1.0, 1.0], 0, 8)
    found = batches(StepStream(datasets, order, views, 4))
    labels = [label for batch in found for label in batch["labels"].tolist()]
    assert len(set(labels)) == len(labels) == 2 * NUM_CAPTIONS


def test_processes_ask_for_shards_in_orders_of_their_own(root: Path) -> None:
    streams = [build_stream(root, rank=rank, num_ranks=4) for rank in range(4)]
    orders = [stream._shuffle_for_this_process(np.arange(20)) for stream in streams]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_shard_that_cannot_be_read_is_tried_once_for_all_its_captions(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = build_stream(root, num_captions_per_rank=12)
    calls: list[int] = []
    read_table = GeneratedDataset._read_table

    def fail(dataset: GeneratedDataset, shard: int) -> ShardTable:
        calls.append(shard)
        if shard == 0:
            raise OSError("the store is away")
        return read_table(dataset, shard)

    monkeypatch.setattr(GeneratedDataset, "_read_table", fail)
    clock = [0.0]
    monkeypatch.setattr(sources.time, "monotonic", lambda: clock[0])
    for epoch in range(2):  # a shard's captions are in both steps of an epoch
        found = batches(stream, Position(epoch, 0))
        assert sum(sum(batch["num_dropped"]) for batch in found) == 9
        assert {message for batch in found for message in batch["drops"]} == {"the store is away"}
    assert calls.count(0) == 1
    clock[0] = 61.0
    batches(stream, Position(2, 0))
    assert calls.count(0) == 2


def test_images_of_equal_keys_in_two_tars_have_labels_of_their_own(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        write_labelled_tar(tmp_path / name, num_samples=8)
    found = batches(build_stream(tmp_path, positives="image"))
    labels = [label for batch in found for label in batch["labels"].tolist()]
    assert len(set(labels)) == len(labels) == 16
