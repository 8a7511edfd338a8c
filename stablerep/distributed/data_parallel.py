"""DDP whose sums do not depend on when a process was started.

torch's DDP puts gradients into buckets twice: before the first backward by a guess, and anew after it, in the
order in which they came. A sum over three ranks or more rounds by its place in a bucket, so the first step of
a resumed run differed in the last bit from the same step of the run that was not stopped, and the losses of
four ranks by 1e-5 to 1e-2 some ten steps later (benchmarks/resume.py). Here the first buckets stay.
"""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class SettledDDP(DistributedDataParallel):
    """DDP with its buckets settled before the first step: the last parameters first, as gradients come."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self.reducer._push_all_rebuilt_params()  # as if the gradients had come in the reducer's order

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, expect_sparse_gradient = super()._build_params_for_reducer()
        return parameters[::-1], expect_sparse_gradient[::-1]


class SettledDDPStrategy(DDPStrategy):
    """Lightning's DDP strategy with `SettledDDP`."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        devices = self.determine_ddp_device_ids()
        # On a stream of its own, as Lightning does: https://pytorch.org/docs/stable/notes/cuda.html#id5
        stream = torch.cuda.stream(torch.cuda.Stream()) if devices is not None else nullcontext()
        with stream:
            return SettledDDP(model, device_ids=devices, **self._ddp_kwargs)
