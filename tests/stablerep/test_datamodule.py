import logging
import multiprocessing
import os
import signal
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from stablerep.augment import AugmentationConfig
from stablerep.data.sources import CacheConfig
from stablerep.datamodule import MultiPositiveDataModule, WeightedRoot
from tests.processes import MAX_SECONDS
from tests.stablerep.datasets import write_dataset, write_labelled_tar
from tests.stablerep.ranks import run_on_ranks


def build_data(root: Path | str, **options: Any) -> MultiPositiveDataModule:
    defaults: dict[str, Any] = {"num_captions_per_rank": 4, "num_views_per_caption": 2, "image_size": 16}
    data = MultiPositiveDataModule(str(root), **(defaults | {"num_workers": 0} | options))
    data.setup("fit")
    return data


def batches_of_epoch(data: MultiPositiveDataModule) -> list[Any]:
    """As the trainer has them."""
    return [
        data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        for batch in data.train_dataloader()
    ]


def captions_of_epochs(data: MultiPositiveDataModule, num_epochs: int = 1) -> list[list[str]]:
    loader = data.train_dataloader()
    return [[caption for batch in loader for caption in batch["captions"]] for _ in range(num_epochs)]


def exhaust(data: MultiPositiveDataModule) -> None:
    deque(batches_of_epoch(data), maxlen=0)


def test_epoch_holds_every_caption_and_the_next_one_too_in_another_order(tmp_path: Path) -> None:
    expected = write_dataset(tmp_path, [5, 11, 8], num_images=2)
    first, second = captions_of_epochs(build_data(tmp_path), num_epochs=2)
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_change_nothing(tmp_path: Path, num_workers: int) -> None:
    write_dataset(tmp_path, [11, 12], num_images=3)
    alone, shared = (build_data(tmp_path, num_workers=n) for n in (0, num_workers))
    for first, second in zip(alone.train_dataloader(), shared.train_dataloader(), strict=True):
        assert first["captions"] == second["captions"]
        assert torch.equal(first["images"], second["images"])


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path, [11, 12], num_images=3)
    orders = [captions_of_epochs(build_data(tmp_path, num_steps_read_ahead=n)) for n in (1, 3, 100)]
    assert orders[0] == orders[1] == orders[2]


def test_order_is_a_function_of_the_seed(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4, 4, 4], num_images=2)
    runs = [captions_of_epochs(build_data(tmp_path, seed=seed), num_epochs=2) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_incomplete_last_step_is_left_out(tmp_path: Path) -> None:
    expected = write_dataset(tmp_path, [11], num_images=2)
    data = build_data(tmp_path)
    (captions,) = captions_of_epochs(data)
    assert data.num_steps_per_epoch == 2
    assert len(captions) == len(set(captions)) == 8
    assert set(captions) < set(expected)


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
    assert "colours" not in on_device


def test_colours_are_the_same_in_the_worker_and_on_the_device(tmp_path: Path) -> None:
    write_dataset(tmp_path, [8], num_images=2, size=24)
    worker, device = (
        batches_of_epoch(build_data(tmp_path, augment_on=place)) for place in ("worker", "device")
    )
    for first, second in zip(worker, device, strict=True):
        assert torch.equal(first["images"], second["images"])


def test_epoch_of_a_mixture_draws_by_weight(tmp_path: Path) -> None:
    for name, size, marker in (("small", 8, "a"), ("large", 24, "b")):
        write_dataset(tmp_path / name, [size], num_images=2, prefix=marker)
    roots = [WeightedRoot(str(tmp_path / "small"), 3.0), WeightedRoot(str(tmp_path / "large"), 1.0)]
    data = build_data("", roots=roots)
    captions = [caption for epoch in captions_of_epochs(data, num_epochs=16) for caption in epoch]
    assert len(captions) == 16 * 32
    num_small = sum(caption.startswith("a ") for caption in captions)
    assert num_small == 16 * 24
    assert len(set(captions)) == 32


def test_class_positives_take_the_labels_of_the_tars(tmp_path: Path) -> None:
    labels = write_labelled_tar(tmp_path / "0.tar", num_samples=8)
    batches = batches_of_epoch(build_data(tmp_path, positives="class"))
    found = [label for batch in batches for label in batch["labels"].tolist()]
    assert sorted(found) == sorted(labels)
    assert {caption for batch in batches for caption in batch["captions"]} == {""}


@pytest.mark.parametrize("colours", ["worker", "device"])
def test_unusable_caption_gives_way_to_fresh_views_of_another_of_its_batch(
    tmp_path: Path, colours: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path, [16], num_images=2, size=24, corrupt={3, 7})
    data = build_data(tmp_path, error_budget_fraction=0.2, augment_on=colours)
    with caplog.at_level(logging.INFO):
        batches = batches_of_epoch(data)
    assert "16 captions expected = 14 used + 2 dropped (image undecodable 2)" in caplog.text
    assert not {"caption number 3", "caption number 7"} & {c for b in batches for c in b["captions"]}
    for batch in batches:
        assert len(batch["captions"]) == 4
        assert len(set(batch["labels"].tolist())) == 4 - sum(batch["num_dropped"])
        pixels = batch["images"].flatten(1)
        assert len({tuple(row.tolist()) for row in pixels}) == 4  # equal labels, other views


def test_undecodable_image_past_the_budget_stops_and_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [8], num_images=2, corrupt={3})
    message = r"image [0-9a-f]{32}\.0 of .*00000\.tar cannot be decoded: .*1 of 8 captions of epoch 0 dropped"
    with pytest.raises(ValueError, match=message):
        exhaust(build_data(tmp_path))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_shard_is_dropped_by_reason_or_stops(
    tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path, [4, 12], num_images=2)
    os.truncate(tmp_path / "00000.tar", 2000)
    data = build_data(tmp_path, error_budget_fraction=0.25, num_workers=num_workers, num_captions_per_rank=8)
    with caplog.at_level(logging.INFO):
        assert sum(len(batch["captions"]) for batch in batches_of_epoch(data)) == 16
    assert "16 captions expected = 12 used + 4 dropped (shard broken 4)" in caplog.text
    with pytest.raises(ValueError, match=r"00000\.tar: has 2000 bytes, expected \d+; .* of 16 captions"):
        exhaust(build_data(tmp_path, num_captions_per_rank=8))


@pytest.mark.parametrize("name", ["00000.tar", "00000.parquet"])
def test_one_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path, [4, 4], num_images=2)
    content = bytearray((tmp_path / name).read_bytes())
    content[3000] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: sha256 is"):
        exhaust(build_data(tmp_path))


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4], num_images=2)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"00001\.tar: missing, though its completion marker is there"):
        exhaust(build_data(tmp_path))


def test_workers_outlive_signals_and_end_with_their_rank(tmp_path: Path) -> None:
    write_dataset(tmp_path, [16], num_images=2)
    before = set(multiprocessing.active_children())
    data = build_data(tmp_path, num_workers=2)
    batches = iter(data.train_dataloader())
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGTERM)
    assert len(list(batches)) == 3
    assert all(worker.is_alive() for worker in workers)
    handles: list[Any] = [handle for worker in workers for handle in (worker, worker._popen)]  # type: ignore
    assert all(handle.terminate == handle.kill for handle in handles)
    del batches
    data.teardown("fit")
    for worker in workers:
        worker.join(MAX_SECONDS)
        assert worker.exitcode == 0


def test_empty_caption_is_dropped_where_there_is_a_text_tower(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path, [16], num_images=2, empty={5})
    with caplog.at_level(logging.INFO):
        options = {"num_captions_per_rank": 8, "error_budget_fraction": 0.1}
        found = batches_of_epoch(build_data(tmp_path, needs_captions=True, **options))
    assert all(caption for batch in found for caption in batch["captions"])
    assert "16 captions expected = 15 used + 1 dropped (caption empty 1)" in caplog.text
    assert "" in [
        caption for batch in batches_of_epoch(build_data(tmp_path)) for caption in batch["captions"]
    ]


def test_step_without_a_usable_caption_stops(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], num_images=2, corrupt={0, 1, 2, 3})
    with pytest.raises(ValueError, match="none of the 4 captions of a step is usable"):
        exhaust(build_data(tmp_path, error_budget_fraction=0.9))


@pytest.mark.distributed
def test_drops_of_one_rank_stop_all_with_its_reason(tmp_path: Path) -> None:
    write_dataset(tmp_path, [16], num_images=2, corrupt={5})
    errors = run_on_ranks(_error_of_rank, 2, tmp_path)
    assert errors[0] == errors[1]
    assert "cannot be decoded" in errors[0]
    assert "1 of 16 captions of epoch 0 dropped (image undecodable 1)" in errors[0]


def _error_of_rank(rank: int, root: Path) -> str:
    try:
        exhaust(build_data(root, num_captions_per_rank=2))
    except ValueError as error:
        return str(error)
    return ""


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


def test_data_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", [4], num_images=2)
    (tmp_path / "tars").mkdir()
    write_labelled_tar(tmp_path / "tars" / "0.tar", num_samples=4)
    with pytest.raises(ValueError, match="shards has no classes, got class"):
        build_data(tmp_path / "shards", positives="class")
    with pytest.raises(ValueError, match="tars has no captions, got caption"):
        build_data(tmp_path / "tars")
    with pytest.raises(ValueError, match="tars has no captions, which the text tower needs"):
        build_data(tmp_path / "tars", positives="image", needs_captions=True)


def test_fewer_captions_than_a_step_takes_is_an_error(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3], num_images=2)
    with pytest.raises(
        ValueError, match="holds 3 captions, fewer than the 1 ranks x num_captions_per_rank 4"
    ):
        build_data(tmp_path)


def test_more_workers_than_steps_is_said_and_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = write_dataset(tmp_path, [7], num_images=2)
    data = build_data(tmp_path, num_workers=2, num_captions_per_rank=7)
    assert "num_workers is reduced from 2 to the 1 steps" in caplog.text
    assert sorted(captions_of_epochs(data)[0]) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_views_per_caption": 1}, "num_views_per_caption must be >= 2, got 1"),
        ({"num_captions_per_rank": 0}, "num_captions_per_rank must be >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be >= 0, got -1"),
        ({"num_steps_read_ahead": 0}, "num_steps_read_ahead must be >= 1, got 0"),
        ({"num_captions_in_shuffle_window": 0}, "num_captions_in_shuffle_window must be >= 1, got 0"),
        ({"image_size": 6}, "blur_kernel_size must be < 12, twice the image_size, got 13"),
        ({"error_budget_fraction": 1.0}, r"error_budget_fraction must be in \[0, 1\), got 1.0"),
        ({"roots": [WeightedRoot("a")]}, "one of root and roots must be given, got root 'nowhere'"),
    ],
)
def test_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiPositiveDataModule("nowhere", **options)


def test_impossible_part_of_an_option_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of a must be > 0, got -1"):
        WeightedRoot("a", -1)
    with pytest.raises(ValueError, match=r"cache\.max_bytes must be >= 1, got 0"):
        CacheConfig(max_bytes=0)


def test_weak_augmentation_is_an_option(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], num_images=2, size=16)
    identity = AugmentationConfig((1.0, 1.0), (1.0, 1.0), 0.0, jitter_probability=0.0, blur_probability=0.0)
    data = build_data(tmp_path, augmentation=identity, positives="image")
    (batch,) = list(data.train_dataloader())
    assert torch.equal(batch["images"][:, 0], batch["images"][:, 1])
