import os
import signal

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from stablerep.runs.stopping import STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_is_noted_and_its_former_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    flag = StopFlag()
    flag.install()
    try:
        assert flag.on_any_rank() is None
        signal.signal(number, signal.SIG_IGN)  # as Lightning takes it over meanwhile
        flag.install()
        os.kill(os.getpid(), number)
        assert flag.on_any_rank() == number.name
    finally:
        flag.remove()
    assert signal.getsignal(number) == before


def test_what_is_taken_out_of_lightnings_steps_is_there() -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
