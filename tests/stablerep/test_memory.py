from typing import Any

import numpy as np
import pytest
import torch

from stablerep import distributed
from stablerep.losses import multi_positive_contrastive_loss, normalize_embeddings
from stablerep.memory import EmbeddingMemory
from tests.stablerep.ranks import run_on_ranks
from tests.stablerep.test_losses import naive_loss


def test_memory_holds_the_newest_normalised_embeddings() -> None:
    memory = EmbeddingMemory(5, 2)
    assert memory.read() is None
    steps = [(torch.randn(2, 2), torch.tensor([2 * i, 2 * i + 1])) for i in range(4)]
    for index, (embeddings, labels) in enumerate(steps):
        memory.push(embeddings, labels)
        queue = memory.read()
        assert queue is not None
        assert len(queue.labels) == min(5, 2 * (index + 1))
    assert queue is not None
    assert queue.labels.tolist() == [6, 7, 4, 5, 2]
    newest = normalize_embeddings(torch.cat([steps[3][0], steps[2][0], steps[1][0][:1]]))
    torch.testing.assert_close(queue.embeddings, newest)


def test_caption_that_comes_again_is_a_positive() -> None:
    memory = EmbeddingMemory(8, 4)
    old = torch.randn(2, 4)
    memory.push(old, torch.tensor([1, 2]))
    new, labels = torch.randn(3, 4), torch.tensor([1, 3, 3])
    result = multi_positive_contrastive_loss(new, labels, 0.1, memory.read())
    assert int(result.num_anchors_without_positive) == 0  # the first has its old image alone
    s = torch.cat([new, old]).double()
    s = torch.nn.functional.normalize(s, dim=1)
    s = s @ s.T / 0.1
    positives = [[3], [2], [1]]
    losses = [
        torch.logsumexp(torch.cat([s[i, :i], s[i, i + 1 :]]), 0) - s[i, positives[i]].mean() for i in range(3)
    ]
    torch.testing.assert_close(result.loss.double(), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_checkpoint_gives_the_memory_back() -> None:
    memory, other = EmbeddingMemory(6, 2), EmbeddingMemory(6, 2)
    memory.push(torch.randn(4, 2), torch.arange(4))
    other.load_state_dict(memory.state_dict())
    assert len(other) == 4
    ours, theirs = memory.read(), other.read()
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.embeddings, theirs.embeddings)
    assert torch.equal(ours.labels, theirs.labels)


def test_step_larger_than_the_memory_fills_it() -> None:
    memory = EmbeddingMemory(3, 2)
    memory.push(torch.randn(7, 2), torch.arange(7))
    queue = memory.read()
    assert queue is not None
    assert queue.labels.tolist() == [0, 1, 2]


def _train_with_memory(rank: int, num_steps: int) -> dict[str, Any]:
    num_ranks = distributed.world_size()
    generator = torch.Generator().manual_seed(0)
    memory, losses, gradients = EmbeddingMemory(10, 3), [], []
    for _ in range(num_steps):
        embeddings = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 5, (6,), generator=generator)
        own = slice(rank * 6 // num_ranks, (rank + 1) * 6 // num_ranks)
        rows = embeddings[own].clone().requires_grad_()
        loss = multi_positive_contrastive_loss(rows, labels[own], 0.1, memory.read()).loss
        loss.backward()
        memory.push(rows, labels[own])
        losses.append(loss.item())
        assert rows.grad is not None
        gradients.append((rows.grad / num_ranks).numpy())
    queue = memory.read()
    assert queue is not None
    return {
        "losses": np.array(losses),
        "gradients": np.stack(gradients),
        "labels": queue.labels.numpy(),
        "embeddings": queue.embeddings.numpy(),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_train_as_one_process_with_the_same_memory(num_ranks: int) -> None:
    alone = _train_with_memory(0, 4)
    ranks = run_on_ranks(_train_with_memory, num_ranks, 4)
    np.testing.assert_allclose(np.mean([r["losses"] for r in ranks], axis=0), alone["losses"], atol=1e-6)
    together = np.concatenate([r["gradients"] for r in ranks], axis=1)
    np.testing.assert_allclose(together, alone["gradients"], atol=1e-6)
    for result in ranks:
        np.testing.assert_array_equal(result["labels"], alone["labels"])
        np.testing.assert_allclose(result["embeddings"], alone["embeddings"], atol=1e-6)


def test_empty_memory_changes_nothing() -> None:
    embeddings, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])
    memory = EmbeddingMemory(4, 4)
    loss = multi_positive_contrastive_loss(embeddings, labels, 0.2, memory.read()).loss
    torch.testing.assert_close(loss, naive_loss(embeddings, labels, 0.2))


def test_memory_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        EmbeddingMemory(0, 4)
