import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stablerep.losses import multi_positive_contrastive_loss, normalize_embeddings
from tests.stablerep.ranks import run_on_ranks


def naive_loss(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The paper's formula, written as loops: mean over anchors of −Σ_j p_ij log q_ij."""
    z = [row / row.norm() for row in embeddings]
    losses = []
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        if not positives:
            continue
        weights = [torch.exp(z[i] @ z[j] / temperature) for j in range(len(z)) if j != i]
        log_q = [(z[i] @ z[j] / temperature) - torch.log(sum(weights, torch.tensor(0.0))) for j in positives]
        losses.append(-sum(log_q) / len(positives))
    return torch.stack(losses).mean()


def naive_nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR's equation 1, for the 2K views of K images."""
    views = nn.functional.normalize(torch.cat([first, second]), dim=1)
    s = views @ views.T / temperature
    s.fill_diagonal_(-1e30)
    k = len(first)
    return nn.functional.cross_entropy(s, torch.cat([torch.arange(k) + k, torch.arange(k)]))


def draw(num_rows: int, seed: int = 0, width: int = 8) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STRUCTURES = {
    "four views of three captions": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
    "views interleaved": [0, 1, 2, 0, 1, 2],
    "unequal numbers of views": [5, 5, 5, 2, 2, 9, 9, 9, 9],
    "some without a positive": [0, 0, 1, 2, 2, 3],
    "one caption": [7, 7, 7],
    "63-bit labels": [2**63 - 1, 2**63 - 1, 2**63 - 2, 2**63 - 2],
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_loss_and_gradient_equal_the_naive_loop(structure: str, temperature: float) -> None:
    labels = torch.tensor(STRUCTURES[structure])
    ours, theirs = (draw(len(labels)).requires_grad_() for _ in range(2))
    loss = multi_positive_contrastive_loss(ours, labels, temperature).loss
    expected = naive_loss(theirs, labels, temperature)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("num_images", [4, 16, 1024])
def test_loss_of_identical_embeddings_is_log_of_n_minus_1(num_images: int) -> None:
    labels = torch.arange(num_images) // 2
    loss = multi_positive_contrastive_loss(torch.ones(num_images, 4), labels, 0.1).loss
    assert loss.item() == pytest.approx(math.log(num_images - 1), rel=1e-5)


def test_loss_ignores_sample_order_and_scale() -> None:
    embeddings, labels = draw(12), torch.arange(12) // 3
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    first = multi_positive_contrastive_loss(embeddings, labels).loss
    second = multi_positive_contrastive_loss(embeddings[order] * 7.0, labels[order]).loss
    torch.testing.assert_close(first, second)


def test_loss_depends_on_which_labels_are_equal_and_not_on_their_values() -> None:
    embeddings = draw(6)
    first = multi_positive_contrastive_loss(embeddings, torch.tensor([0, 0, 1, 1, 2, 2])).loss
    renamed = multi_positive_contrastive_loss(embeddings, torch.tensor([9, 9, -4, -4, 1, 1])).loss
    other = multi_positive_contrastive_loss(embeddings, torch.tensor([0, 1, 1, 2, 2, 0])).loss
    torch.testing.assert_close(first, renamed)
    assert abs((first - other).item()) > 1e-3


def test_a_caption_that_occurs_twice_is_its_own_positive() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    as_duplicate = multi_positive_contrastive_loss(embeddings, torch.tensor([0, 0, 0, 0, 1, 1])).loss
    as_negative = multi_positive_contrastive_loss(embeddings, torch.tensor([0, 0, 2, 2, 1, 1])).loss
    torch.testing.assert_close(as_duplicate, naive_loss(embeddings, torch.tensor([0, 0, 0, 0, 1, 1]), 0.1))
    assert as_duplicate <= as_negative + 1e-6


def test_two_views_of_an_image_give_nt_xent() -> None:
    first, second = draw(10, seed=1), draw(10, seed=2)
    loss = multi_positive_contrastive_loss(torch.cat([first, second]), torch.arange(10).repeat(2), 0.5).loss
    torch.testing.assert_close(loss, naive_nt_xent(first, second, 0.5))


def test_anchors_without_positive_are_counted_and_left_out_of_the_mean() -> None:
    embeddings = draw(5)
    result = multi_positive_contrastive_loss(embeddings, torch.tensor([0, 0, 1, 2, 3]))
    assert int(result.num_anchors_without_positive) == 3
    torch.testing.assert_close(result.loss, naive_loss(embeddings, torch.tensor([0, 0, 1, 2, 3]), 0.1))


def test_no_positive_at_all_gives_zero_loss_and_gradient() -> None:
    embeddings = draw(4).requires_grad_()
    result = multi_positive_contrastive_loss(embeddings, torch.arange(4))
    result.loss.backward()
    assert result.loss.item() == 0
    assert int(result.num_anchors_without_positive) == 4
    assert embeddings.grad is not None
    assert not embeddings.grad.any()


def test_half_precision_inside_autocast_stays_finite_and_close() -> None:
    exact, labels = draw(32, width=64), torch.arange(32) // 4
    half = (exact * 100).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = multi_positive_contrastive_loss(half, labels, 0.02)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert half.grad is not None
    assert torch.isfinite(half.grad).all()
    assert result.loss.item() == pytest.approx(naive_loss(exact, labels, 0.02).item(), rel=5e-3)


def test_zero_vector_gives_finite_loss_and_gradient() -> None:
    embeddings = torch.cat([torch.zeros(2, 4), torch.randn(4, 4)]).requires_grad_()
    loss = multi_positive_contrastive_loss(embeddings, torch.tensor([0, 1, 0, 1, 2, 2])).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()
    assert not normalize_embeddings(torch.zeros(1, 4)).any()


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        multi_positive_contrastive_loss(draw(4), torch.arange(4), temperature)


def test_labels_must_match_embeddings() -> None:
    with pytest.raises(
        ValueError, match=r"embeddings must be \[N, D\] and labels \[N\], got \[4, 8\], \[3\]"
    ):
        multi_positive_contrastive_loss(draw(4), torch.arange(3))


SPLITS = {
    "equal": ([6, 6], [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 3, 3]),
    "unequal rows": ([3, 7], [0, 0, 1, 1, 2, 2, 0, 3, 3, 4]),
    "a rank with no positive": ([2, 6], [8, 9, 1, 1, 2, 2, 2, 1]),
    "positives only across ranks": ([3, 3], [0, 1, 2, 0, 1, 2]),
}


def _train_one_step(rank: int, split: str) -> tuple[float, list[np.ndarray]]:
    sizes, labels = SPLITS[split]
    inputs, start = draw(sum(sizes), seed=5), sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    model = DistributedDataParallel(_build_model())
    loss = multi_positive_contrastive_loss(model(inputs[own]), torch.tensor(labels)[own]).loss
    loss.backward()
    return loss.item(), [parameter.grad.numpy() for parameter in model.parameters()]  # type: ignore[union-attr]


def _train_one_step_of_each_split(rank: int) -> dict[str, tuple[float, list[np.ndarray]]]:
    return {split: _train_one_step(rank, split) for split in SPLITS}


def _build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)).double()


@pytest.mark.distributed
def test_two_ranks_give_the_single_process_loss_and_gradient() -> None:
    per_rank = run_on_ranks(_train_one_step_of_each_split, 2)  # starting ranks is what takes the time
    for split, (sizes, labels) in SPLITS.items():
        model = _build_model()
        loss = naive_loss(model(draw(sum(sizes), seed=5)), torch.tensor(labels), 0.1)
        loss.backward()
        assert np.mean([steps[split][0] for steps in per_rank]) == pytest.approx(loss.item(), rel=1e-12), (
            split
        )
        for steps in per_rank:
            for ours, parameter in zip(steps[split][1], model.parameters(), strict=True):
                np.testing.assert_allclose(ours, parameter.grad, atol=1e-13, err_msg=split)  # type: ignore[arg-type]


def _fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 is broken")


@pytest.mark.distributed
def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="rank 1 is broken"):
        run_on_ranks(_fail_on_rank_1, 2)
