"""Gathers over ranks, and what a rank has to say when it fails. Without a process group there is one rank.

Flags, sizes and small objects pass over the CPU: a reduction on the accelerator would make every step wait
for its end.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_cpu_group: Any = None  # torch's types hold a number for the case of a rank outside the group
_LOST_RANK_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class FailedElsewhereError(ValueError):
    """Another rank failed; the text is that rank's."""


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Index of this rank, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def gather_sizes(num_rows: int, device: torch.device) -> list[int]:
    """The number of rows that each rank holds, in rank order."""
    if not is_distributed():
        return [num_rows]
    own = torch.tensor([num_rows], device=device if _cpu_group is None else "cpu")
    sizes = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(sizes, own, group=_cpu_group)
    return [int(size) for size in sizes]


def all_gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Concatenates the rows of all ranks in rank order, without a gradient.

    Args:
        rows: This rank's; their number may differ from rank to rank.
        sizes: What `gather_sizes` says of them: asked once, it serves all that have as many rows.

    Shapes:
        rows [N_local, ...] -> [N, ...] with N = Σ sizes
    """
    if not is_distributed():
        return rows
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # as a collective wants equal parts
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def open_cpu_group(timeout: timedelta) -> None:
    """Opens a group over the CPU, where the ranks' own is NCCL's; every rank calls it."""
    global _cpu_group
    if is_distributed() and dist.get_backend() != "gloo":
        _cpu_group = dist.new_group(backend="gloo", timeout=timeout)


def close_cpu_group() -> None:
    """Forgets the group of `open_cpu_group`."""
    global _cpu_group
    _cpu_group = None


def all_gather_objects(value: Any) -> list[Any]:
    """One small picklable value from each rank, in rank order."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def largest_on_any_rank(value: int, device: torch.device | None = None) -> int:
    """The largest of the ranks' numbers.

    Args:
        value: This rank's number.
        device: Where the group's tensors live, while no group over the CPU is open.
    """
    if not is_distributed():
        return value
    uses_cpu = _cpu_group is not None or dist.get_backend() == "gloo"
    largest = torch.tensor(value, device="cpu" if uses_cpu else device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_cpu_group)
    return int(largest)


def sum_over_ranks(values: list[int], device: torch.device | None = None) -> list[int]:
    """The sum of each of the ranks' numbers; `device` as for `largest_on_any_rank`."""
    if not is_distributed():
        return values
    uses_cpu = _cpu_group is not None or dist.get_backend() == "gloo"
    sums = torch.tensor(values, device="cpu" if uses_cpu else device)
    dist.all_reduce(sums, group=_cpu_group)
    return [int(value) for value in sums]


def is_true_on_any_rank(value: bool, device: torch.device | None = None) -> bool:
    """Whether it is; `device` as for `largest_on_any_rank`."""
    return bool(largest_on_any_rank(int(value), device))


def raise_together(error: Exception | None) -> None:
    """Raises this rank's error, or else another rank's as a ValueError; does nothing where no rank has one.

    A rank that stops alone leaves the others in a collective, until they are killed or time out.
    """
    messages = all_gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for message in messages:
        if message is not None:
            raise FailedElsewhereError(message)


def tell_failure(error: BaseException) -> str:
    """Tells the other ranks that this one failed.

    Returns:
        The failure that was told first, by whichever rank; this one's where none can be told any more.
    """
    own = f"rank {rank()}: {' '.join(str(error).split()) or type(error).__name__}"
    try:
        store = dist.distributed_c10d._get_default_store()
        return str(store.compare_set("stablerep/failure", "", own).decode())
    except (RuntimeError, ValueError):  # the rank that holds the store is gone
        return own


def is_lost_rank(error: BaseException) -> bool:
    """Whether it says no more than that another rank no longer answers."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_RANK_WORDS)
