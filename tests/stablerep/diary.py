"""A callback for trainings that tests disturb: what each rank did, and faults on purpose."""

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from stablerep import distributed


class Diary(pl.Callback):
    """Writes `RANK.json` after each step: process and number of steps; steps are slow enough to be met.

    The training ends, as if it had made all its steps, when there is a file `finish`.

    Args:
        folder: Where.
        bug_after_step: Step after which one rank meets a bug.
        rank_with_bug: That rank.
    """

    def __init__(self, folder: str, bug_after_step: int | None = None, rank_with_bug: int = 1) -> None:
        self.folder = Path(folder)
        self.bug_after_step = bug_after_step
        self.rank_with_bug = rank_with_bug

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes, then waits."""
        path = self.folder / f"{distributed.rank()}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid(), "step": trainer.global_step}))
        path.with_suffix(".tmp").replace(path)
        time.sleep(0.05)
        if trainer.global_step == self.bug_after_step and distributed.rank() == self.rank_with_bug:
            raise RuntimeError(f"a bug that rank {self.rank_with_bug} met")
        if distributed.is_true_on_any_rank((self.folder / "finish").exists()):
            trainer.should_stop = True
