"""Weights, gradients and optimizer state split over the ranks: FSDP2 through Lightning.

    trainer:
      strategy: stablerep.sharding.ShardedStrategy

Each block of a transformer is gathered when it is needed and let go after it. A checkpoint holds the whole
weights in one file, as without sharding.
"""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks in one group of data parallelism.

    Args:
        timeout_seconds: How long a rank waits for the others.
    """

    def __init__(self, timeout_seconds: int = 300) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def setup_environment(self) -> None:
        """Counts the ranks, then starts the process group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


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
