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

    Args:
        folder: Where.
        bug_after_step: Step after which rank 1 meets a bug.
    """

    def __init__(self, folder: str, bug_after_step: int | None = None) -> None:
        self.folder = Path(folder)
        self.bug_after_step = bug_after_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes, then waits."""
        path = self.folder / f"{distributed.rank()}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid(), "step": trainer.global_step}))
        path.with_suffix(".tmp").replace(path)
        time.sleep(0.05)
        if trainer.global_step == self.bug_after_step and distributed.rank() == 1:
            raise RuntimeError("a bug that rank 1 met")
