"""Gathers over ranks. Without a process group each function is the identity on one rank.

torch's own gathers with gradient are deprecated, so the one that the loss needs is written out here.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    own = torch.tensor([num_rows], device=device)
    sizes = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(sizes, own)
    return [int(size) for size in sizes]


def _gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Concatenates the rows of all ranks; short ranks are padded for the collective, then cut."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    """Forward: concatenate over ranks. Backward: sum the gradient over ranks and keep the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.start = sum(sizes[: rank()])
        ctx.num_rows = rows.shape[0]
        return _gather_rows(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.num_rows], None


def all_gather_with_gradient(rows: Tensor) -> Tensor:
    """Concatenates the rows of all ranks in rank order; the gradient flows back to every rank.

    Args:
        rows: This rank's rows; the number of rows may differ from rank to rank.

    Shapes:
        rows [N_local, ...] -> [N, ...] with N = sum of N_local over ranks.
    """
    if not is_distributed():
        return rows
    gathered: Tensor = _GatherWithGradient.apply(rows, gather_sizes(rows.shape[0], rows.device))
    return gathered


def all_gather_rows(rows: Tensor) -> Tensor:
    """As `all_gather_with_gradient`, for what has no gradient: labels and counts."""
    if not is_distributed():
        return rows
    return _gather_rows(rows.detach(), gather_sizes(rows.shape[0], rows.device))


def all_gather_objects(value: Any) -> list[Any]:
    """One small picklable value from each rank, in rank order."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def is_true_on_any_rank(value: bool, device: torch.device) -> bool:
    """Whether it is, by one small sum over the ranks; `device` is where the group's tensors live."""
    if not is_distributed():
        return value
    count = torch.tensor(int(value), device=device)
    dist.all_reduce(count)
    return bool(count)


def raise_together(error: Exception | None) -> None:
    """Raises this rank's error, or else another rank's as a ValueError; does nothing where no rank has one.

    A rank that stops alone leaves the others in a collective, until they are killed or time out.
    """
    messages = all_gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for message in messages:
        if message is not None:
            raise ValueError(message)
