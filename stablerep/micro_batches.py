"""Large batches on little memory: gradient caching, by recomputation.

The backbone treats each image by itself, so it may see the batch in parts; head and loss, which do not, see
all features at once. The forward keeps no activation of the backbone, and the backward computes those of one
part at a time again: the gradient is that of the whole batch, at the price of a second forward.

Each parameter's gradient is complete before autograd hands it out, so DDP averages it once, as ever.

Reference: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv
2101.06983.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_in_parts(function: Callable[[Tensor], Tensor], rows: Tensor, num_rows_per_part: int | None) -> Tensor:
    """`function(rows)` for a function of each row alone, with the activations of one part in memory.

    The backward runs the function again with the forward's random numbers, so drop path drops the same.

    Args:
        function: Maps rows to rows, each by itself.
        rows: Its input.
        num_rows_per_part: Rows at a time; None for all in one, with nothing computed again.

    Shapes:
        rows [N, ...] -> [N, ...]
    """
    if num_rows_per_part is None:
        return function(rows)
    parts = rows.split(num_rows_per_part)
    return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts])
