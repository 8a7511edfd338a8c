import math

import pytest
import torch

from stablerep.runs.finite import FiniteWatch, NonFiniteLossError


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_on_the_cpu_that_is_not_finite_raises_at_once(value: float) -> None:
    with pytest.raises(
        NonFiniteLossError, match=f"loss is {value} at step 7 with learning rate 0.1: training"
    ):
        FiniteWatch().watch("loss", torch.tensor(value), 7, 0.1)


def test_finite_numbers_pass() -> None:
    watch = FiniteWatch()
    watch.watch("loss", torch.tensor(1e38), 0, 0.1)
    watch.settle()


@pytest.mark.gpu
def test_number_on_an_accelerator_raises_when_it_is_settled_and_is_not_waited_for() -> None:
    watch = FiniteWatch()
    torch.cuda.set_sync_debug_mode("error")  # any wait for the device raises
    try:
        watch.watch("loss", torch.full((), math.nan, device="cuda"), 3, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 3"):
        watch.settle()
    watch.settle()  # said once
