"""A first-in first-out memory of embeddings: more columns for the loss than a small batch has."""

import torch
from torch import Tensor, nn

from stablerep.distributed import all_gather_rows, gather_sizes
from stablerep.losses import Queue, normalize_embeddings


class EmbeddingMemory(nn.Module):
    """The last `size` normalised embeddings of all ranks with their labels, newest first, in the checkpoint.

    Every rank holds the same, as each step's are gathered. They have no gradient and were computed with older
    weights; a caption that comes again meets its own old images as positives.

    Args:
        size: Embeddings held, >= 1.
        num_features: Width of the embeddings.

    Reference:
        The queue of He et al., MoCo, arXiv 1911.05722, section 3.2, without the momentum encoder.
    """

    embeddings: Tensor
    labels: Tensor
    num_filled: Tensor

    def __init__(self, size: int, num_features: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self.register_buffer("embeddings", torch.zeros(size, num_features))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("num_filled", torch.tensor(0))
        self._num_filled: int | None = 0  # num_filled, without asking the device at each step
        self.register_load_state_dict_post_hook(_forget_count)

    def __len__(self) -> int:
        if self._num_filled is None:
            self._num_filled = int(self.num_filled)
        return self._num_filled

    def read(self) -> Queue | None:
        """What is held; None while that is nothing.

        Shapes:
            embeddings [len(self), D], labels [len(self)]
        """
        if not len(self):
            return None
        return Queue(self.embeddings[: len(self)], self.labels[: len(self)])

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor) -> None:
        """Puts the embeddings of all ranks in; the oldest drop out.

        Args:
            embeddings: This rank's, not normalised.
            labels: This rank's labels.

        Shapes:
            embeddings [N_local, D], labels [N_local]
        """
        size = len(self.labels)
        sizes = gather_sizes(len(labels), labels.device)
        rows = all_gather_rows(normalize_embeddings(embeddings), sizes).to(self.embeddings.dtype)
        new_labels = all_gather_rows(labels, sizes)
        self.embeddings = torch.cat([rows, self.embeddings])[:size]
        self.labels = torch.cat([new_labels, self.labels])[:size]
        self._num_filled = min(size, len(self) + len(rows))
        self.num_filled = torch.full_like(self.num_filled, self._num_filled)


def _forget_count(memory: EmbeddingMemory, _: object) -> None:
    memory._num_filled = None
