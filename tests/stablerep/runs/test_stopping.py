import multiprocessing
import os
import signal
import subprocess
import threading
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from stablerep.runs.signals import STOP_SIGNALS, end_by_kill, ignore_signals, without_signals
from stablerep.runs.stopping import StopFlag
from tests.processes import MAX_SECONDS


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_is_noted_and_its_former_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    flag = StopFlag()
    flag.install()
    try:
        assert flag.on_any_rank() is None
        os.kill(os.getpid(), number)
        assert flag.on_any_rank() == number.name
    finally:
        flag.remove()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_that_was_held_back_is_noted_and_a_later_one_held_back_again(number: signal.Signals) -> None:
    this_thread = threading.get_ident()  # others of the test's process hold nothing back
    flag = StopFlag()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        signal.pthread_kill(this_thread, number)
        flag.install()
        assert flag.on_any_rank() == number.name
        flag.remove()
        signal.pthread_kill(this_thread, number)  # as one that comes while the process ends
        assert signal.sigtimedwait([number], 0) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def answer(pipe: Connection) -> None:
    """A data worker."""
    ignore_signals(0)
    while True:
        pipe.send(pipe.recv())


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT])
def test_data_worker_is_ended_by_its_rank_alone(number: signal.Signals) -> None:
    resource_tracker.ensure_running()  # as it starts, it lets signals through again
    pipe, other_end = multiprocessing.Pipe()
    with without_signals():
        worker = multiprocessing.get_context("spawn").Process(target=answer, args=(other_end,))
        worker.start()
    other_end.close()
    try:
        for _ in range(2):  # before its first answer and after it
            subprocess.run(["kill", f"-{number.name[3:]}", str(worker.pid)], check=True)
            pipe.send("there?")
            assert pipe.recv() == "there?"
        end_by_kill(worker)
        worker.terminate()
        worker.join(MAX_SECONDS)
        assert worker.exitcode == -signal.SIGKILL
    finally:
        worker.kill()


def test_what_is_taken_out_of_lightning_is_there() -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert callable(_SignalConnector.register_signal_handlers)
