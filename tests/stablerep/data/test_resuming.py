"""Resume within an epoch, with Lightning's own trainer: which captions each step sees, and as which views."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from stablerep.datamodule import MultiPositiveDataModule
from tests.stablerep.datasets import write_dataset
from tests.stablerep.ranks import run_on_ranks

SIZES = [5, 11, 8, 13]
NUM_CAPTIONS = sum(SIZES)
PER_RANK = 2


class Recorder(pl.LightningModule):
    """Writes down what each step of this rank sees: captions, and the sum of each caption's pixels."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.path = path

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        sums = [round(float(x.double().sum()), 3) for x in batch["images"]]
        with self.path.open("a") as file:
            seen = list(zip(batch["captions"], sums, strict=True))
            file.write(json.dumps([self.global_step, self.current_epoch, batch["epoch"], seen]) + "\n")
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OneOfSeveral(LightningEnvironment):
    """A rank of a process group that is there already."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__()
        self._rank, self._num_ranks = rank, num_ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self._num_ranks

    def global_rank(self) -> int:
        return self._rank

    def local_rank(self) -> int:
        return self._rank


def train(
    rank: int,
    num_ranks: int,
    folder: Path,
    until: dict[str, Any],
    ckpt_path: Path | None = None,
    num_workers: int = 0,
    **options: Any,
) -> None:
    """Trains to `until`; writes `rank-R.jsonl`, a checkpoint a step, and one after the end."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    data = MultiPositiveDataModule(
        str(folder.parent / "shards"),
        **({"num_captions_per_rank": PER_RANK, "num_views_per_caption": 2, "image_size": 16} | options),
        num_workers=num_workers,
        num_captions_in_shuffle_window=7,
    )
    several: dict[str, Any] = {"strategy": "ddp", "plugins": [OneOfSeveral(rank, num_ranks)]}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        **({"max_epochs": -1} | until),
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(several if num_ranks > 1 else {}),
    )
    trainer.fit(Recorder(folder / f"rank-{rank}.jsonl"), data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")


def run(num_ranks: int, folder: Path, until: dict[str, Any], *args: Any, **options: Any) -> list[Any]:
    """Trains; returns [step, epoch of the trainer, epoch of the data, what all ranks saw] a step."""
    if num_ranks == 1:
        train(0, 1, folder, until, *args, **options)
    else:
        run_on_ranks(_train_rank, num_ranks, num_ranks, folder, until, args, options)
    ranks = [
        [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]
        for rank in range(num_ranks)
    ]
    return [
        [*rows[0][:3], [tuple(seen) for row in rows for seen in row[3]]] for rows in zip(*ranks, strict=True)
    ]


def _train_rank(
    rank: int, num_ranks: int, folder: Path, until: dict[str, Any], args: Any, options: Any
) -> None:
    train(rank, num_ranks, folder, until, *args, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "shards", SIZES, num_images=3)
    return tmp_path


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed|Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]


@pytest.mark.e2e
def test_resumed_run_is_the_uninterrupted_one(folder: Path) -> None:
    whole = run(1, folder / "whole", {"max_steps": 40})
    assert [row[0] for row in whole] == list(range(40))
    for num_steps in (7, 18, 35):  # within an epoch, at its end, and within the next
        saved = folder / "whole" / f"step={num_steps}.ckpt"
        assert run(1, folder / f"hook-{num_steps}", {"max_steps": 40}, saved) == whole[num_steps:]
        before = run(1, folder / f"before-{num_steps}", {"max_steps": num_steps})
        saved = folder / f"before-{num_steps}" / "end.ckpt"
        after = run(1, folder / f"after-{num_steps}", {"max_steps": 40}, saved, num_workers=2)
        assert before + after == whole


@pytest.mark.e2e
def test_run_over_epochs_ends_after_as_many_when_it_was_cut_off_by_steps(folder: Path) -> None:
    whole = run(1, folder / "whole", {"max_epochs": 2})
    assert len(whole) == 36
    assert all(row[1] == row[2] for row in whole)
    run(1, folder / "before", {"max_steps": 5})
    after = run(1, folder / "after", {"max_epochs": 2}, folder / "before" / "end.ckpt")
    assert after == whole[5:]


@pytest.mark.e2e
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks_before", "num_steps", "ranks_after", "per_rank_after"),
    [(1, 7, 2, 2), (2, 8, 1, 3), (2, 5, 2, 2)],
)
def test_epoch_goes_on_with_other_ranks_and_no_caption_comes_again(
    folder: Path, ranks_before: int, num_steps: int, ranks_after: int, per_rank_after: int
) -> None:
    before = run(ranks_before, folder / "before", {"max_steps": num_steps})
    after = run(
        ranks_after,
        folder / "after",
        {"max_epochs": 2},
        folder / "before" / f"step={num_steps}.ckpt",
        num_captions_per_rank=per_rank_after,
        num_workers=1,
    )
    size = ranks_after * per_rank_after
    num_taken = num_steps * ranks_before * PER_RANK
    first = [seen[0] for row in before + after if row[2] == 0 for seen in row[3]]
    assert len(set(first)) == len(first) == num_taken + (NUM_CAPTIONS - num_taken) // size * size
    second = [seen[0] for row in after if row[2] == 1 for seen in row[3]]
    assert len(set(second)) == len(second) == NUM_CAPTIONS // size * size
    assert [row[0] for row in after] == list(range(num_steps, num_steps + len(after)))


@pytest.mark.e2e
@pytest.mark.distributed
def test_views_and_order_do_not_depend_on_ranks_or_workers(folder: Path) -> None:
    one = run(1, folder / "one", {"max_steps": 9}, num_captions_per_rank=4)
    two = run(2, folder / "two", {"max_steps": 9}, num_workers=2)
    assert one == two


@pytest.mark.e2e
def test_other_data_than_those_of_the_checkpoint_begin_the_next_epoch(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(1, folder / "before", {"max_steps": 5})
    with caplog.at_level(logging.WARNING):
        after = run(1, folder / "after", {"max_steps": 6}, folder / "before" / "end.ckpt", seed=1)
    assert "data, order or seed are not those of the checkpoint: epoch 1 begins" in caplog.text
    assert [row[:3] for row in after] == [[5, 1, 1]]
