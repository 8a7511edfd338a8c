"""Weights, gradients and optimizer state split over the ranks: FSDP2 through Lightning.

    trainer:
      strategy:
        class_path: stablerep.distributed.sharding.ShardedStrategy

Each block of a transformer is gathered when it is needed and let go after it. A checkpoint is one file with
the whole weights and optimizer state, the same as without sharding: a run may go on with it or without.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks in one group of data parallelism."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Counts the ranks, then starts the process group."""
        # Nothing here changes an output in place, which is what torch warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: what a checkpoint holds is restored here, in the usual order."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the file on every rank, through the checkpoint plugin and its checks."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's share of the whole weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, numbered as torch's optimizers do; on the first rank, elsewhere empty."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named = get_optimizer_state_dict(self.model, optimizer, options=options)
        if self.global_rank != 0:
            return {}
        number = {name: index for index, name in enumerate(self._names(optimizer))}
        state: Any = named["state"]
        groups: Any = named["param_groups"]
        return {
            "state": {number[name]: value for name, value in state.items()},
            "param_groups": [g | {"params": sorted(number[name] for name in g["params"])} for g in groups],
        }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's share of the whole state."""
        assert self.model is not None
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = self._names(optimizer)
            named: Any = {
                "state": {names[index]: value for index, value in saved["state"].items()},
                "param_groups": [
                    g | {"params": [names[index] for index in g["params"]]} for g in saved["param_groups"]
                ],
            }
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The parameters' names in the optimizer's order."""
        assert self.model is not None
        name_of = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits a module's parameters over the ranks, in place: each transformer block by itself, then the rest.

    Only modules whose `forward` is called can be sharded, and none inside another.
    """
    blocks = getattr(module, "blocks", None) or getattr(getattr(module, "transformer", None), "resblocks", [])
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was here: then all ranks must call it together."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, in place; the tensor itself where it is not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; all ranks call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
