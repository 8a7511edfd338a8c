import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stablerep import blockwise
from stablerep.losses import (
    Queue,
    image_text_contrastive_loss,
    multi_positive_contrastive_loss,
    normalize_embeddings,
    number_labels_without_waiting,
)
from tests.stablerep.ranks import run_on_ranks


@pytest.fixture(params=["one block", "many blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every law holds whatever the blocks: here also where they do not divide the numbers of rows."""
    if request.param == "many blocks":
        monkeypatch.setitem(blockwise._BLOCK, "cpu", 5)
        monkeypatch.setitem(blockwise._STRIP_ELEMENTS, "cpu", 50)


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


def naive_image_text_loss(
    images: Tensor, texts: Tensor, image_labels: Tensor, text_labels: Tensor, scale: Tensor
) -> Tensor:
    """½ cross-entropy of images over texts + ½ of texts over images, each target uniform over the caption."""
    a, b = nn.functional.normalize(images, dim=1), nn.functional.normalize(texts, dim=1)
    logits, halves = scale * a @ b.T, []
    is_pair = (image_labels[:, None] == text_labels[None, :]).to(logits.dtype)
    for s, pairs in ((logits, is_pair), (logits.T, is_pair.T)):
        kept = pairs.sum(dim=1) > 0
        targets = pairs[kept] / pairs[kept].sum(dim=1, keepdim=True)
        halves.append(nn.functional.cross_entropy(s[kept], targets))
    return (halves[0] + halves[1]) / 2


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


@pytest.mark.usefixtures("block_size")
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


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("seed", range(20))
def test_random_label_structures_with_and_without_a_queue(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_images, num_queued = int(rng.integers(2, 40)), int(rng.integers(0, 20)) * (seed % 2)
    labels = torch.from_numpy(rng.integers(0, rng.integers(1, 20), size=num_images + num_queued))
    temperature = float(rng.choice([0.011, 0.05, 0.1, 0.5]))  # 1 / 0.011 is past what goes without a maximum
    rows = draw(num_images + num_queued, seed)
    ours, theirs = (rows[:num_images].clone().requires_grad_() for _ in range(2))
    queue = Queue(normalize_embeddings(rows[num_images:]), labels[num_images:]) if num_queued else None
    result = multi_positive_contrastive_loss(ours, labels[:num_images], temperature, queue)
    z = nn.functional.normalize(torch.cat([theirs, rows[num_images:]]), dim=1)
    s = (z[:num_images] @ z.T / temperature).masked_fill(
        torch.eye(num_images, len(z), dtype=torch.bool), -torch.inf
    )
    positive = (labels[:num_images, None] == labels) & ~torch.eye(num_images, len(z), dtype=torch.bool)
    kept = positive.any(dim=1)
    assert int(result.num_anchors_without_positive) == int((~kept).sum())
    if not kept.any():
        assert result.loss.item() == 0
        return
    log_q = torch.log_softmax(s[kept], dim=1).masked_fill(~positive[kept], 0.0)
    expected = (-log_q.sum(dim=1) / positive[kept].sum(dim=1)).mean()
    result.loss.backward()
    expected.backward()
    torch.testing.assert_close(result.loss, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-6)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_image_text_loss_and_its_gradients_equal_the_masked_formula(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    num_images, num_texts = (int(rng.integers(2, 30)) for _ in range(2))
    image_labels, text_labels = (
        torch.from_numpy(np.append(rng.integers(0, 12, size=num - 1), 0)) for num in (num_images, num_texts)
    )
    drawn = [draw(num_images, 1), draw(num_texts, 2), torch.tensor(scale, dtype=torch.float64)]
    ours, theirs = ([x.clone().requires_grad_() for x in drawn] for _ in range(2))
    result = image_text_contrastive_loss(ours[0], ours[1], image_labels, text_labels, ours[2])
    expected = naive_image_text_loss(theirs[0], theirs[1], image_labels, text_labels, theirs[2])
    (3 * result.loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(result.loss, expected, atol=1e-9, rtol=1e-9)
    for mine, naive in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, naive.grad, atol=1e-9, rtol=1e-6)
    lonely = (~torch.isin(image_labels, text_labels)).sum() + (~torch.isin(text_labels, image_labels)).sum()
    assert int(result.num_anchors_without_positive) == int(lonely)


def test_image_text_loss_of_one_image_a_caption_is_clips() -> None:
    images, texts = draw(9, 1), draw(9, 2)
    labels, scale = torch.arange(9), torch.tensor(14.0, dtype=torch.float64)
    logits = scale * nn.functional.normalize(images, dim=1) @ nn.functional.normalize(texts, dim=1).T
    clip = sum(nn.functional.cross_entropy(s, labels) for s in (logits, logits.T)) / 2
    torch.testing.assert_close(image_text_contrastive_loss(images, texts, labels, labels, scale).loss, clip)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_float32_is_within_1e_6_of_float64(temperature: float) -> None:
    exact, labels = draw(96, width=32).requires_grad_(), torch.arange(96) // 6
    single = exact.detach().float().requires_grad_()
    losses = [multi_positive_contrastive_loss(rows, labels, temperature).loss for rows in (single, exact)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert exact.grad is not None
    assert single.grad is not None
    assert (single.grad - exact.grad).norm() < 2e-6 * exact.grad.norm()


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


@pytest.mark.usefixtures("block_size")
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


def test_a_queue_that_holds_an_anchors_caption_gives_it_positives_and_itself_no_gradient() -> None:
    embeddings, labels = draw(4).requires_grad_(), torch.tensor([0, 1, 2, 3])
    assert int(multi_positive_contrastive_loss(embeddings, labels).num_anchors_without_positive) == 4
    queued = normalize_embeddings(draw(3, seed=1)).requires_grad_()
    result = multi_positive_contrastive_loss(embeddings, labels, 0.1, Queue(queued, torch.tensor([1, 1, 9])))
    assert int(result.num_anchors_without_positive) == 3
    result.loss.backward()
    assert queued.grad is None


def test_image_text_shapes_are_checked() -> None:
    scale = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"texts must be \[N, D\] and text_labels \[N\], got .*\[3\]"):
        image_text_contrastive_loss(draw(4), draw(4), torch.arange(4), torch.arange(3), scale)
    with pytest.raises(ValueError, match=r"must have one width, got \[4, 8\] and \[4, 6\]"):
        image_text_contrastive_loss(draw(4), draw(4, width=6), torch.arange(4), torch.arange(4), scale)


@pytest.mark.usefixtures("block_size")
def test_half_precision_zero_vectors_and_extreme_scales_stay_finite() -> None:
    images = torch.cat([draw(6).half() * 1000, torch.zeros(2, 8).half()]).requires_grad_()
    texts = torch.cat([draw(3, 1), torch.zeros(1, 8)]).bfloat16().requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    for value in (1e-3, 69.0, 100.0):
        scale = torch.tensor(value, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = image_text_contrastive_loss(images, texts, labels, torch.arange(4), scale).loss
            loss = loss + multi_positive_contrastive_loss(images, labels, 1 / value).loss
        loss.backward()
        for tensor in (loss, images.grad, texts.grad, scale.grad):
            assert tensor is not None
            assert torch.isfinite(tensor).all()


SPLITS = {
    "equal": ([6, 6], [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 3, 3]),
    "unequal rows": ([3, 7], [0, 0, 1, 1, 2, 2, 0, 3, 3, 4]),
    "a rank with no positive": ([2, 6], [8, 9, 1, 1, 2, 2, 2, 1]),
    "positives only across ranks": ([3, 3], [0, 1, 2, 0, 1, 2]),
}


def _split(labels: list[int], num_ranks: int, rank: int) -> slice:
    """The rows of a rank: unequal numbers, the first rank one row alone."""
    bounds = [0, *np.linspace(1, len(labels), num_ranks).round().astype(int)]
    return slice(bounds[rank], bounds[rank + 1])


class _TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)).double()
        self.texts = nn.Linear(8, 6).double()
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.images(images), self.texts(texts), self.log_scale.exp()


Gradients = list[np.ndarray]


def _train_one_step(rank: int, own: slice, labels: list[int], queued: int) -> tuple[float, Gradients]:
    all_labels = torch.tensor(labels)
    model = DistributedDataParallel(_TwoTowers())
    inputs, texts = draw(len(labels), seed=5), draw(len(labels), seed=6)
    z, t, scale = model(inputs[own], texts[own])
    loss = multi_positive_contrastive_loss(z, all_labels[own], 0.1, _queue_of(queued)).loss
    loss = loss + image_text_contrastive_loss(z, t, all_labels[own], all_labels[own], scale).loss
    loss.backward()
    return loss.item(), [parameter.grad.numpy() for parameter in model.parameters()]  # type: ignore[union-attr]


def _queue_of(num_queued: int) -> Queue | None:
    if not num_queued:
        return None
    return Queue(normalize_embeddings(draw(num_queued, seed=9, width=6)), torch.arange(num_queued))


def _train_one_step_of_each_split(rank: int) -> dict[str, tuple[float, Gradients]]:
    num_ranks = torch.distributed.get_world_size()
    blockwise._STRIP_ELEMENTS["cpu"] = 20
    results = {}
    for split, (sizes, labels) in SPLITS.items():
        start = sum(sizes[:rank])
        own = slice(start, start + sizes[rank]) if num_ranks == 2 else _split(labels, num_ranks, rank)
        for queued in (0, 3):
            results[f"{split}, {queued} queued"] = _train_one_step(rank, own, labels, queued)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_give_the_single_process_loss_and_gradient(num_ranks: int) -> None:
    per_rank = run_on_ranks(_train_one_step_of_each_split, num_ranks)  # starting ranks is what takes the time
    for split, (_, labels) in SPLITS.items():
        for queued in (0, 3):
            model, all_labels = _TwoTowers(), torch.tensor(labels)
            z, t, scale = model(draw(len(labels), seed=5), draw(len(labels), seed=6))
            loss = multi_positive_contrastive_loss(z, all_labels, 0.1, _queue_of(queued)).loss
            if not queued:
                torch.testing.assert_close(loss, naive_loss(z, all_labels, 0.1))
            loss = loss + naive_image_text_loss(z, t, all_labels, all_labels, scale)
            loss.backward()
            name = f"{split}, {queued} queued"
            assert np.mean([steps[name][0] for steps in per_rank]) == pytest.approx(loss.item(), rel=1e-12)
            for steps in per_rank:
                for ours, parameter in zip(steps[name][1], model.parameters(), strict=True):
                    assert parameter.grad is not None
                    np.testing.assert_allclose(ours, parameter.grad, atol=1e-12, err_msg=name)


def _fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 is broken")


@pytest.mark.distributed
def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="rank 1 is broken"):
        run_on_ranks(_fail_on_rank_1, 2)


@pytest.mark.parametrize("num_labels", [1, 2, 50])
def test_labels_are_numbered_without_waiting_as_with(num_labels: int) -> None:
    labels = torch.randint(-5, 20, (num_labels,))
    distinct, numbers, counts = labels.unique(return_inverse=True, return_counts=True)
    ours, our_counts = number_labels_without_waiting(labels)
    assert torch.equal(ours, numbers)
    assert torch.equal(our_counts[: len(distinct)], counts)
    assert not our_counts[len(distinct) :].any()


@pytest.mark.gpu
def test_losses_do_not_make_the_host_wait_for_the_device() -> None:
    z, texts = (torch.randn(n, 32, device="cuda", requires_grad=True) for n in (64, 16))
    labels, scale = torch.arange(64, device="cuda") // 4, torch.ones((), device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = multi_positive_contrastive_loss(z, labels).loss
        loss = loss + image_text_contrastive_loss(z, texts, labels, labels[::4], scale).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
