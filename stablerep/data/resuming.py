"""Lightning's own counters, brought in line with the position in the data when a run goes on.

The trainer counts batches of the epoch to know when it ends. After a resume these counts may be of steps of
another size (other ranks), or of an epoch that `max_steps` cut off and that the trainer takes for finished.
Measured on Lightning 2.6; the tests resume with its real trainer.
"""

from typing import Any

import lightning.pytorch as pl


def align_trainer(trainer: pl.Trainer, epoch: int, num_steps_done: int) -> None:
    """Tells a trainer that is about to go on where it is.

    Args:
        trainer: Its loops are restored, and not running yet.
        epoch: Index of the epoch, and so the number of finished ones.
        num_steps_done: Steps of it that are done, out of those that a whole epoch has now.
    """
    fit_loop: Any = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    batches = epoch_loop.batch_progress
    if batches.total.completed < batches.total.processed:  # saved within the last hook of a step
        batches.increment_completed()
        epoch_loop._batches_that_stepped += 1  # what Lightning does there itself
    for name in ("ready", "started", "processed", "completed"):
        setattr(batches.current, name, num_steps_done)
    batches.is_last_batch = False
    is_within = num_steps_done > 0
    for progress in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
        progress.ready = progress.started = epoch + is_within
        progress.processed = progress.completed = epoch
    fit_loop.restarting = True  # within an epoch: Lightning's setter looks at the counts above
