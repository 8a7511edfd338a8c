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
from stablerep.runs.signals import STOP_SIGNALS


class StoppedEarly(Exception):  # noqa: N818 (no error: the run can go on)
    """A signal ended the training.

    Args:
        message: Which one, and when.
        can_go_on: Whether a run that goes on loses nothing; False where nothing is saved.
    """

    def __init__(self, message: str, can_go_on: bool = True) -> None:
        super().__init__(message)
        self.can_go_on = can_go_on


class StopFlag:
    """Whether a signal to stop has come, to this rank or to another."""

    def __init__(self) -> None:
        self._received = 0
        self._former: dict[signal.Signals, Any] = {}
        self._former_mask: set[int] = set()

    def install(self) -> None:
        """Takes the signals, those that were held back included; in the main thread alone."""
        self._former = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        self._former_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def remove(self) -> None:
        """Gives the signals back to who had them, or holds them back again."""
        if self._former:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._former_mask)
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
    """Takes out Lightning's handlers of signals, and the broadcast in each step that belongs to them.

    They wait for the device, hide a lost rank, and meet other ranks in other collectives.
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
