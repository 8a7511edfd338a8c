"""What every run does so that it can go on: checkpoints, and random numbers that the step alone decides."""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

from stablerep import distributed
from stablerep.runs.checkpoint import LAST_CHECKPOINT, drop_superseded
from stablerep.runs.stopping import StopFlag, StoppedEarly, silence_lightning

logger = logging.getLogger(__name__)

_GLOBAL_STREAM = 2  # keeps torch's global random numbers apart from those of the data


class SeedSteps(pl.Callback):
    """Draws torch's global random numbers (drop path) from (seed, step, rank): a resumed step has the same.

    Args:
        seed: Seed of the run, >= 0.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds the step."""
        words = [self.seed, _GLOBAL_STREAM, trainer.global_step, distributed.rank()]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


class RunCheckpoints(Checkpoint):
    """Saves every so many steps, after the last one, and where a signal stops the run, on all ranks at once.

    Always at a step's end, where Lightning's loops can go on from: after the training their state is that of
    an epoch that is over, wherever in it the last step was.

    Args:
        run_folder: Folder of the run.
        every_n_steps: Steps between checkpoints, >= 1.
        resumed_from: The checkpoint that the run goes on from.
        timeout: For how long a rank waits for the others.
        is_saving: Whether anything is saved.
    """

    def __init__(
        self,
        run_folder: Path,
        every_n_steps: int,
        resumed_from: str | None,
        timeout: timedelta,
        is_saving: bool = True,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint_every_n_steps must be >= 1, got {every_n_steps}")
        self.path = run_folder / LAST_CHECKPOINT
        self.every_n_steps = every_n_steps
        self.resumed_from = resumed_from
        self.timeout = timeout
        self.is_saving = is_saving
        self.stop = StopFlag()
        self.has_begun = False
        self._stopped_by: str | None = None
        self._saved_step = 0
        self._are_logs_flushed = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Looks whether all ranks have chosen the same files.

        Raises:
            ValueError: If they have not.
            StoppedEarly: If a signal has come already.
        """
        silence_lightning(trainer)
        distributed.open_cpu_group(self.timeout)
        chosen = distributed.all_gather_objects((str(self.path.parent.parent), self.resumed_from))
        for rank, other in enumerate(chosen):
            if other != chosen[0]:
                raise ValueError(
                    f"rank {rank} would write to {other[0]} and go on from {other[1]}, rank 0 to "
                    f"{chosen[0][0]} and from {chosen[0][1]}: output must be where all machines see it"
                )
        self._stop_before_a_step()

    def close(self) -> None:
        """Gives the signals back, however the run ended."""
        self.stop.remove()
        distributed.close_cpu_group()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says where the run goes on.

        Raises:
            StoppedEarly: If a signal has come meanwhile.
        """
        self.has_begun = True
        self._saved_step = trainer.global_step
        if self.resumed_from is not None:
            logger.info("going on from %s at step %d", self.resumed_from, trainer.global_step)
        self._stop_before_a_step()

    def _stop_before_a_step(self) -> None:
        if (name := self.stop.on_any_rank()) is not None:
            raise StoppedEarly(f"{name} before the first step: nothing new to save")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leaves before the step that follows a signal's.

        Raises:
            StoppedEarly: On all ranks.
        """
        self._flush_logs(trainer)
        self._leave(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time. The step's metrics are logged only after this: leaving comes later."""
        is_last = is_last_step(trainer)
        name = self.stop.on_any_rank()
        if name is not None and not is_last:
            self._stopped_by = name
        if name is not None or is_last or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves before the epoch that follows a signal's.

        Raises:
            StoppedEarly: On all ranks.
        """
        self._flush_logs(trainer)
        self._leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves what another callback ended between two steps."""
        self._save(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        if self._stopped_by is not None:
            what = (
                "--ckpt_path last goes on from there" if self.is_saving else "nothing is saved, as was asked"
            )
            message = f"{self._stopped_by} after step {trainer.global_step}: {what}"
            raise StoppedEarly(message, can_go_on=self.is_saving)

    def _save(self, trainer: pl.Trainer) -> None:
        """Only rank 0 writes, so that its error is shared; each of Lightning's saves ends at a barrier."""
        if not self.is_saving or self._saved_step == trainer.global_step:
            return
        self._are_logs_flushed = False
        self._flush_logs(trainer)
        error: Exception | None = None
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        except Exception as caught:  # whatever it is, the others wait at the barrier
            error = caught
            trainer.strategy.barrier()
        distributed.raise_together(error)
        if trainer.is_global_zero and self.resumed_from is not None:
            drop_superseded(Path(self.resumed_from), self.path)
        self._saved_step, self._are_logs_flushed = trainer.global_step, False

    def _flush_logs(self, trainer: pl.Trainer) -> None:
        """Writes the rows up to a checkpoint: a run that goes on from there does not log them again.

        It comes before saving, and after it once more, for the row of the step itself.
        """
        if not self._are_logs_flushed:
            for writer in trainer.loggers:
                writer.save()
            self._are_logs_flushed = True


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether no step follows the one that ends."""
    if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
