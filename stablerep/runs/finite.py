"""Stops a run whose loss or gradient is not finite.

A look at a number on an accelerator makes the host wait for all work before it. So there the number is copied
beside the work and looked at one step later; what has been seen is settled before anything is saved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class NonFiniteLossError(ValueError):
    """The loss or its gradient is NaN or infinite: nothing is saved after it."""


@dataclass(frozen=True)
class _Seen:
    name: str
    value: Tensor
    step: int
    learning_rate: float
    copied: "torch.cuda.Event | None"


class FiniteWatch:
    """Raises at a loss or gradient norm that is not finite: at once on a CPU, a step later elsewhere.

    All ranks stop together where they watch what all share: a loss that holds the embeddings of all ranks,
    the norm of the averaged gradient.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def watch(self, name: str, value: Tensor, step: int, learning_rate: float) -> None:
        """Notes a scalar; where it is on the CPU, `settle` follows at once.

        Raises:
            NonFiniteLossError: If it is on the CPU and not finite.
        """
        value = value.detach()
        if value.device.type == "cpu":
            self._seen.append(_Seen(name, value, step, learning_rate, None))
            self.settle()
            return
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        copy.copy_(value, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._seen.append(_Seen(name, copy, step, learning_rate, copied))

    def settle(self) -> None:
        """Looks at all that was noted.

        Raises:
            NonFiniteLossError: At the first that is not finite.
        """
        seen, self._seen = self._seen, []
        for one in seen:
            if one.copied is not None:
                one.copied.synchronize()
            if not torch.isfinite(one.value):
                raise NonFiniteLossError(
                    f"{one.name} is {one.value.item()} at step {one.step} with learning rate "
                    f"{one.learning_rate:.3g}: training stops and saves nothing more"
                )
