import logging
import os
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_gen.shards import list_complete_shards
from stablerep.augment import AugmentationConfig
from stablerep.datamodule import MultiPositiveDataModule
from stablerep.stream import (
    Piece,
    ShardStream,
    ViewConfig,
    draw_views,
    label_of,
    plan_epoch,
    share_of_worker,
    shuffle_window,
    take_pieces,
)
from tests.stablerep.datasets import build_sample, write_dataset

IDENTITY = AugmentationConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0)


def build_views(**options: Any) -> ViewConfig:
    defaults: dict[str, Any] = {
        "num_views": 2,
        "positives": "caption",
        "image_size": 16,
        "augmentation": IDENTITY,
        "seed": 0,
    }
    return ViewConfig(**(defaults | options))


def build_data(root: Path, **options: Any) -> MultiPositiveDataModule:
    defaults: dict[str, Any] = {"num_captions_per_rank": 4, "num_views_per_caption": 2, "image_size": 16}
    data = MultiPositiveDataModule(str(root), **(defaults | {"num_workers": 0} | options))
    data.setup("fit")
    return data


def captions_of_epoch(data: MultiPositiveDataModule, num_epochs: int = 1) -> list[list[str]]:
    loader = data.train_dataloader()
    return [[caption for batch in loader for caption in batch["captions"]] for _ in range(num_epochs)]


@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_shares_are_whole_batches_that_tile_the_epoch(
    num_shards: int, num_ranks: int, num_workers: int
) -> None:
    num_captions, per_rank = 50, 3
    num_steps = num_captions // (num_ranks * per_rank)
    seen: Counter[int] = Counter()
    for rank in range(num_ranks):
        shares = [share_of_worker(num_steps, per_rank, rank, w, num_workers) for w in range(num_workers)]
        batches = [len(share) // per_rank for share in shares]
        assert sum(batches) == num_steps  # the same for every rank
        assert (
            sorted(batches, reverse=True) == batches
        )  # the round robin of the loader ends with the last worker
        assert max(batches) - min(batches) <= 1
        for share in shares:
            seen.update(share)
    assert set(seen.values()) == {1}
    assert sorted(seen) == list(range(num_steps * num_ranks * per_rank))


def test_ranks_and_workers_see_every_caption_once_whatever_the_number_of_shards(tmp_path: Path) -> None:
    expected = write_dataset(tmp_path, [5, 11, 8], num_images=2)
    shards = list_complete_shards(tmp_path)
    for num_ranks, num_workers in [(1, 1), (2, 1), (3, 2), (4, 1)]:
        num_steps = len(expected) // (num_ranks * 2)
        seen: list[str] = []
        for rank in range(num_ranks):
            stream = ShardStream(shards, build_views(), 2, num_steps, rank, 4, 0.0)
            for worker in range(num_workers):
                share = share_of_worker(num_steps, 2, rank, worker, num_workers)
                seen += [
                    caption for batch in stream._batches(share, epoch=0) for caption in batch["captions"]
                ]
        assert sorted(seen) == sorted(expected)


def test_worker_processes_change_nothing_about_what_an_epoch_holds(tmp_path: Path) -> None:
    expected = write_dataset(tmp_path, [8, 8], num_images=2)
    first, second = captions_of_epoch(build_data(tmp_path, num_workers=2), num_epochs=2)
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second


def test_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4, 4, 4], num_images=2)
    runs = [captions_of_epoch(build_data(tmp_path, seed=seed), num_epochs=2) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_incomplete_last_step_is_left_out(tmp_path: Path) -> None:
    expected = write_dataset(tmp_path, [11], num_images=2)
    data = build_data(tmp_path)
    (captions,) = captions_of_epoch(data)
    assert data.num_steps_per_epoch == 2
    assert len(captions) == len(set(captions)) == 8
    assert set(captions) < set(expected)


def test_no_caption_is_left_over_in_every_epoch(tmp_path: Path) -> None:
    write_dataset(tmp_path, [11], num_images=2)
    shards = list_complete_shards(tmp_path)
    num_used = 8
    seen = {
        index
        for epoch in range(20)
        for piece in take_pieces(plan_epoch(shards, 0, epoch), 0, num_used)
        for index in range(piece.start, piece.stop)
    }
    assert seen == set(range(11))


def test_pieces_cut_across_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 3], num_images=2)
    pieces = [Piece(shard, 0, 3) for shard in list_complete_shards(tmp_path)]
    assert [(p.start, p.stop) for p in take_pieces(pieces, 2, 5)] == [(2, 3), (0, 2)]
    assert take_pieces(pieces, 6, 9) == []


def test_shuffle_window_keeps_every_item_and_moves_most() -> None:
    items = list(shuffle_window(range(100), 20, np.random.default_rng(0)))
    assert sorted(items) == list(range(100))
    assert sum(place != item for place, item in enumerate(items)) > 80
    assert list(shuffle_window(range(5), 1, np.random.default_rng(0))) == list(range(5))


def test_views_of_a_caption_are_different_images() -> None:
    sample = build_sample("a caption", num_images=5, size=16)
    for epoch in range(10):
        views, label, errors = draw_views(sample, epoch, build_views(num_views=5), "here")
        assert len({tuple(view.flatten().tolist()) for view in views}) == 5
        assert label == label_of(sample.caption_id)
        assert not errors


def test_image_positives_are_crops_of_one_image_with_a_label_of_its_own() -> None:
    sample = build_sample("a caption", num_images=3, size=16)
    config = build_views(num_views=3, positives="image")
    drawn = [draw_views(sample, epoch, config, "here") for epoch in range(20)]
    for views, _, _ in drawn:
        assert torch.equal(views[0], views[1])  # the identity augmentation leaves no difference
        assert torch.equal(views[0], views[2])
    assert {label for _, label, _ in drawn} == {label_of(sample.caption_id, index) for index in range(3)}


def test_labels_are_63_bits_of_the_content() -> None:
    assert label_of("f" * 32) == 2**63 - 1
    assert label_of("0" * 16 + "f" * 16) == 0
    assert len({label_of("f" * 32, index) for index in range(100)} | {2**63 - 1}) == 101


def test_batch_has_the_agreed_shapes_and_types(tmp_path: Path) -> None:
    write_dataset(tmp_path, [8], num_images=4, size=24)
    data = build_data(tmp_path, num_views_per_caption=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 3, 3, 16, 16)
    assert batch["images"].dtype == torch.uint8
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].shape == (4,)
    assert len(batch["captions"]) == 4
    on_device = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    assert on_device["images"].shape == (4, 3, 3, 16, 16)
    assert on_device["images"].dtype == torch.float32


def test_undecodable_image_past_the_budget_stops_and_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [8], num_images=2, corrupt={3})
    data = build_data(tmp_path)
    with pytest.raises(ValueError, match=r"image [0-9a-f]{32}\.0 of 00000\.tar cannot be decoded: .*1 of 16"):
        deque((data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()), maxlen=0)


def test_undecodable_images_within_the_budget_are_counted_and_steps_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path, [16], num_images=2, corrupt={3, 7})
    data = build_data(tmp_path, error_budget_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        batches = list(data.train_dataloader())
    assert len(batches) == 4
    assert all(len(batch["captions"]) == 4 for batch in batches)
    assert sum(batch["num_images_dropped"] for batch in batches) == len(caplog.records) >= 2
    assert not {"caption number 3", "caption number 7"} & {c for batch in batches for c in batch["captions"]}


def test_another_image_takes_the_place_of_an_undecodable_one() -> None:
    sample = build_sample("a caption", num_images=3, size=16, corrupt=True)
    views, _, _ = draw_views(sample, 0, build_views(num_views=2), "here")
    assert len(views) == 2
    views, _, errors = draw_views(sample, 0, build_views(num_views=3), "here")
    assert len(views) == 0
    assert len(errors) == 1


def test_truncated_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4], num_images=2)
    os.truncate(tmp_path / "00001.tar", 2000)
    with pytest.raises(ValueError, match=r"00001\.tar: has 2000 bytes, expected \d+; 1 of 2 shards broken"):
        build_data(tmp_path)


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], num_images=2)
    content = bytearray((tmp_path / "00000.tar").read_bytes())
    content[3000] ^= 1
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"00000\.tar: sha256 is"):
        build_data(tmp_path)


def test_broken_shard_within_the_budget_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path, [4, 12], num_images=2)
    os.truncate(tmp_path / "00000.tar", 2000)
    with caplog.at_level(logging.WARNING):
        data = build_data(tmp_path, error_budget_fraction=0.25)
    assert "dropped shard with 4 captions" in caplog.text
    assert data.num_steps_per_epoch == 3


def test_unmarked_shard_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path, [4, 4], num_images=2)
    (tmp_path / "00001_stats.json").unlink()
    assert build_data(tmp_path).num_steps_per_epoch == 1
    assert "1 of 2 planned shards are not complete and are left out" in caplog.text


def test_no_complete_shard_is_an_error(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], num_images=2)
    (tmp_path / "00000_stats.json").unlink()
    with pytest.raises(ValueError, match=r"holds no complete shard \(of 1 planned\)"):
        build_data(tmp_path)


def test_folder_without_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a dataset"):
        build_data(tmp_path)


def test_more_views_than_images_is_an_error(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], num_images=2)
    with pytest.raises(ValueError, match="num_views_per_caption must be <= 2, .* got 3"):
        build_data(tmp_path, num_views_per_caption=3)
    assert build_data(tmp_path, num_views_per_caption=3, positives="image").num_steps_per_epoch == 1


def test_fewer_captions_than_a_step_takes_is_an_error(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3], num_images=2)
    with pytest.raises(
        ValueError, match="holds 3 captions, fewer than the 1 ranks x num_captions_per_rank 4"
    ):
        build_data(tmp_path)


def test_fewer_shards_than_workers_is_said_and_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_dataset(tmp_path, [8], num_images=2)
    with caplog.at_level(logging.WARNING):
        data = build_data(tmp_path, num_workers=3)
    assert "holds 1 shards, fewer than the 3 workers" in caplog.text
    assert "num_workers is reduced from 3 to the 2 steps" in caplog.text
    assert sorted(captions_of_epoch(data)[0]) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_views_per_caption": 1}, "num_views_per_caption must be >= 2, got 1"),
        ({"num_captions_per_rank": 0}, "num_captions_per_rank must be >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be >= 0, got -1"),
        ({"error_budget_fraction": 1.0}, r"error_budget_fraction must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiPositiveDataModule("nowhere", **options)
