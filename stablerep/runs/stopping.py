"""How a run ends before its time: at the end of a step, on all ranks at once, with a checkpoint.

SIGTERM or SIGUSR1 to any rank sets a flag there; after each step the ranks compare flags over the CPU.
Lightning's own way broadcasts from within the signal's handler, while the other ranks are elsewhere, and
reads a flag back from the accelerator in every step.
"""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from stablerep import distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedEarly(Exception):  # noqa: N818 (no error: the run can go on)
    """A signal ended the training after a step, with a checkpoint."""


class StopFlag:
    """Whether a signal to stop has come, to this rank or to another."""

    def __init__(self) -> None:
        self._received = 0
        self._former: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Takes the signals over, also from who took them since; in the main thread alone."""
        for number in STOP_SIGNALS:
            former = signal.signal(number, self._receive)
            self._former.setdefault(number, former)

    def remove(self) -> None:
        """Gives the signals back to who had them at first."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def on_any_rank(self) -> str | None:
        """The name of the signal that came to any rank, the same on all; None where none came."""
        number = distributed.largest_on_any_rank(self._received)
        return signal.Signals(number).name if number else None


def silence_lightning(trainer: pl.Trainer) -> None:
    """Takes Lightning's own broadcast out of each step: it waits for the device and hides a lost rank."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
