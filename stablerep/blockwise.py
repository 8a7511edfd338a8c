"""Sums over the exponentials of all pairs of rows and columns, a block at a time.

With s_ij = scale · row_i · column_j, of N rows and M columns, nothing of size N×M is ever kept: the forward
keeps the sums, and the backward computes each block again. Two ways to the same sums:

    both ways   each block serves its rows and its columns; where the columns are the rows, the blocks above
                the diagonal suffice. No maximum is taken off, so |s| must be within `MAX_UNSHIFTED`.
    by rows     a strip of rows against all columns, any s: for rows of one rank against those of all.

exp(s) is computed as 2^(s log₂ e), log₂ e being in the product's factor: on processors torch's exp2 takes a
third of the time of its exp.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_UNSHIFTED = 70.0
"""exp(±70), summed over 65,536 columns, is far from both ends of float32."""

_BLOCK = {"cpu": 512, "cuda": 8192}
_STRIP_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def sum_exponentials(rows: Tensor, columns: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Σ_j exp(s_ij) for each row and Σ_i exp(s_ij) for each column, both ways.

    Args:
        rows: The rows.
        columns: The columns; None stands for the rows themselves, without i = j.
        scale: Factor of the products.

    Shapes:
        rows [N, D], columns [M, D] -> [N], [M]
    """
    others = rows if columns is None else columns
    of_rows, of_columns = rows.new_zeros(len(rows)), rows.new_zeros(len(others))
    for i, j, block in _exponentials(rows, columns, scale):
        of_rows[i] += block.sum(dim=1)
        if columns is not None or i != j:
            of_columns[j] += block.sum(dim=0)
    if columns is None:
        of_rows += of_columns
        return of_rows, of_rows
    return of_rows, of_columns


def multiply_exponentials(
    rows: Tensor, columns: Tensor | None, scale: float, row_weights: Tensor, column_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_j w_ij column_j for each row and Σ_i w_ij row_i for each column, w_ij = (a_i + b_j) exp(s_ij).

    Args:
        rows: As for `sum_exponentials`.
        columns: As for `sum_exponentials`; None leaves out i = j.
        scale: As for `sum_exponentials`.
        row_weights: a.
        column_weights: b.

    Shapes:
        rows [N, D], columns [M, D], row_weights [N], column_weights [M] -> [N, D], [M, D]
    """
    others = rows if columns is None else columns
    of_rows, of_columns = torch.zeros_like(rows), torch.zeros_like(others)
    weights = None
    for i, j, block in _exponentials(rows, columns, scale):
        if weights is None or weights.shape != block.shape:
            weights = torch.empty_like(block)
        torch.add(row_weights[i, None], column_weights[j], out=weights)
        weights *= block
        of_rows[i].addmm_(weights, others[j])
        if columns is not None or i != j:
            of_columns[j].addmm_(weights.T, rows[i])
    if columns is None:
        of_rows += of_columns
        return of_rows, of_rows
    return of_rows, of_columns


def _exponentials(
    rows: Tensor, columns: Tensor | None, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """exp(scale · rows[i] · columns[j]ᵀ) block by block, in one buffer that the next block overwrites."""
    size = _BLOCK.get(rows.device.type, _BLOCK["cuda"])
    others = rows if columns is None else columns
    buffer = rows.new_empty(min(size, len(rows)) * min(size, len(others)))
    for start in range(0, len(rows), size):
        i = slice(start, min(start + size, len(rows)))
        for first in range(start if columns is None else 0, len(others), size):
            j = slice(first, min(first + size, len(others)))
            shape = (i.stop - i.start, j.stop - j.start)
            block = buffer[: shape[0] * shape[1]].view(shape)
            torch.addmm(block, rows[i], others[j].T, beta=0, alpha=scale * math.log2(math.e), out=block)
            block.exp2_()
            if columns is None and i == j:
                block.fill_diagonal_(0.0)
            yield i, j, block


def log_sum_exp_by_rows(
    rows: Tensor, columns: Tensor, scale: float | Tensor, own: int | None = None
) -> Tensor:
    """log Σ_j exp(s_ij) for each row.

    Args:
        rows: The rows.
        columns: The columns.
        scale: Factor of the products, a number or a scalar tensor.
        own: Where the rows themselves begin among the columns; row i leaves out column own + i.

    Shapes:
        rows [N, D], columns [M, D] -> [N]
    """
    parts = [torch.logsumexp(s, dim=1) for _, s in _strips(rows, columns, scale, own)]
    return torch.cat(parts) if parts else rows.new_zeros(0)


def multiply_softmax_by_rows(
    rows: Tensor,
    columns: Tensor,
    scale: float | Tensor,
    row_logs: Tensor,
    column_logs: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    own: int | None = None,
) -> Tensor:
    """Σ_j (a_i exp(s_ij − l_i) + b_j exp(s_ij − k_j)) column_j for each row.

    Args:
        rows: The rows.
        columns: The columns.
        scale: As for `log_sum_exp_by_rows`.
        row_logs: l, at least the row's log-sum-exp less rounding.
        column_logs: k, likewise; anything finite where the weight is 0.
        row_weights: a.
        column_weights: b.
        own: As for `log_sum_exp_by_rows`.

    Shapes:
        rows [N, D], columns [M, D], row_* [N], column_* [M] -> [N, D]
    """
    used = column_weights != 0
    logs = torch.where(used, column_logs, torch.inf)  # exp(s − ∞) = 0
    result = torch.empty_like(rows)
    for i, s in _strips(rows, columns, scale, own):
        weights = torch.exp(s - row_logs[i, None]).mul_(row_weights[i, None])
        weights += torch.exp(s - logs).mul_(column_weights)
        torch.mm(weights, columns, out=result[i])
    return result


def _strips(
    rows: Tensor, columns: Tensor, scale: float | Tensor, own: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows against all columns, as many at a time as the strip's size allows."""
    num_elements = _STRIP_ELEMENTS.get(rows.device.type, _STRIP_ELEMENTS["cuda"])
    size = max(1, num_elements // max(1, len(columns)))
    for start in range(0, len(rows), size):
        i = slice(start, min(start + size, len(rows)))
        s = (rows[i] * scale) @ columns.T
        if own is not None:
            s.diagonal(own + start).fill_(-torch.inf)
        yield i, s
