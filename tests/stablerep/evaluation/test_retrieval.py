"""Retrieval against torchmetrics and a naive ranking; ties, duplicates and several positives by hand."""

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_hit_rate

from stablerep.evaluation import retrieval
from stablerep.evaluation.retrieval import Recall, pair_captions, retrieval_recall
from stablerep.evaluation.statistics import wilson_interval
from tests.stablerep.evaluation.memory import measure_peak_bytes, needs_proc


def draw(num_texts: int, noise: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Two or three images a text; every fourth image has a second text."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(num_texts, 8, generator=generator, dtype=torch.float64)
    own = torch.cat([torch.arange(num_texts), torch.arange(num_texts), torch.arange(num_texts // 2)])
    images = texts[own] + noise * torch.randn(len(own), 8, generator=generator, dtype=torch.float64)
    pairs = torch.stack([torch.arange(len(own)), own], dim=1)
    second = pairs[::4].clone()
    second[:, 1] = (second[:, 1] + 3) % num_texts
    shuffled = torch.cat([pairs, second])
    return images, texts, shuffled[torch.randperm(len(shuffled), generator=generator)]


def hit_rate(queries: Tensor, candidates: Tensor, pairs: Tensor, k: int) -> float:
    similarities = torch.nn.functional.cosine_similarity(queries[:, None], candidates[None], dim=2)
    positive = torch.zeros_like(similarities, dtype=torch.bool)
    positive[pairs[:, 0], pairs[:, 1]] = True
    hits = [retrieval_hit_rate(s, p, top_k=k) for s, p in zip(similarities, positive, strict=True)]
    return float(torch.stack(hits).mean())


def test_recalls_equal_torchmetrics_both_ways() -> None:
    images, texts, pairs = draw(30)
    result = retrieval_recall(7 * images, texts, pairs)
    for recall in result.image_to_text:
        assert recall.value == pytest.approx(hit_rate(images, texts, pairs, recall.k))
        assert recall.interval == wilson_interval(round(recall.value * 75), 75)
    for recall in result.text_to_image:
        assert recall.value == pytest.approx(hit_rate(texts, images, pairs.flip(1), recall.k))
    assert [recall.k for recall in result.image_to_text] == [1, 5, 10]
    assert 0.1 < result.image_to_text[0].value < result.image_to_text[2].value < 1


def test_ranks_equal_a_naive_count() -> None:
    images, texts, pairs = draw(20)
    result = retrieval_recall(images, texts, pairs)
    positives = {(int(image), int(text)) for image, text in pairs}
    for image, rank in enumerate(result.image_ranks.tolist()):
        cosines = torch.nn.functional.cosine_similarity(images[image], texts, dim=1).tolist()
        best = max(cosine for text, cosine in enumerate(cosines) if (image, text) in positives)
        assert rank == 1 + sum(c >= best for t, c in enumerate(cosines) if (image, t) not in positives)


def test_slices_do_not_change_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, pairs = draw(24)
    whole = retrieval_recall(images, texts, pairs)
    monkeypatch.setattr(retrieval, "MAX_SIMILARITIES_IN_MEMORY", 130)  # five images or two texts
    sliced = retrieval_recall(images, texts, pairs)
    assert torch.equal(sliced.image_ranks, whole.image_ranks)
    assert torch.equal(sliced.text_ranks, whole.text_ranks)


@needs_proc
def test_memory_is_that_of_slices_and_not_of_all_similarities() -> None:
    setup = """
from stablerep.evaluation import retrieval
retrieval.MAX_SIMILARITIES_IN_MEMORY = 2**21
images, texts = torch.randn(20_000, 8), torch.randn(2_000, 8)
pairs = torch.stack([torch.arange(20_000), torch.arange(20_000) % 2_000], dim=1)
retrieval.retrieval_recall(images[:2_000], texts, pairs[:2_000])
"""
    peak = measure_peak_bytes(setup, "retrieval.retrieval_recall(images, texts, pairs)")
    assert peak < 20_000 * 2_000 * 4 / 2


def test_ties_count_against_the_model() -> None:
    pairs = torch.arange(6)[:, None].expand(-1, 2)
    collapsed = retrieval_recall(torch.ones(6, 4), torch.ones(6, 4), pairs, ks=(1, 5, 6))
    assert [recall.value for recall in collapsed.image_to_text] == [0, 0, 1]
    assert collapsed.text_ranks.tolist() == [6] * 6


def test_other_positives_are_no_rivals() -> None:
    # Three images of text 0 all lie before text 0's only rival; each is a hit, and so is text 0.
    images = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    pairs = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 1]])
    result = retrieval_recall(images, torch.eye(2), pairs, ks=(1,))
    assert result.image_to_text == (Recall(1, 1.0, wilson_interval(4, 4), 4),)
    assert result.text_to_image == (Recall(1, 1.0, wilson_interval(2, 2), 2),)
    # A hit if any is: the second image's two texts lie on both sides of a rival.
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    any_hit = retrieval_recall(texts, texts, torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2]]), ks=(1,))
    assert any_hit.image_ranks.tolist() == [1, 1, 1]


def test_equal_captions_are_one_text_with_all_their_images() -> None:
    texts, pairs = pair_captions([["a dog", "a pet"], ["a cat", "a pet", "a cat"], ["a dog"]])
    assert texts == ["a dog", "a pet", "a cat"]
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 2], [1, 1], [2, 0]]
    # Were 'a dog' there twice, one of the two would be a rival of the other image at the same similarity.
    axes = torch.eye(3)
    result = retrieval_recall(axes[[0, 2, 0]], axes, pairs, ks=(1,))
    assert result.image_to_text[0].value == 1


def test_a_pair_named_twice_counts_once() -> None:
    images, texts, pairs = draw(20)
    twice = retrieval_recall(images, texts, torch.cat([pairs, pairs]))
    assert torch.equal(twice.image_ranks, retrieval_recall(images, texts, pairs).image_ranks)


def test_arguments_out_of_bounds_are_refused() -> None:
    images, texts, pairs = draw(20)
    with pytest.raises(
        ValueError, match=r"ks must be in \[1, 20\] \(the number of candidates\), got \[1, 21\]"
    ):
        retrieval_recall(images, texts, pairs, ks=(1, 21))
    with pytest.raises(ValueError, match=r"text indices of pairs must be in \[0, 19\), got 0 to 19"):
        retrieval_recall(images, texts[1:], pairs)
    with pytest.raises(ValueError, match="each image must occur in pairs, got 1 of 51 that do not"):
        retrieval_recall(torch.cat([images, images[:1]]), texts, pairs)
    with pytest.raises(ValueError, match=r"pairs must be \[P, 2\] with P >= 1, got \[0, 2\]"):
        retrieval_recall(images, texts, pairs[:0])
    with pytest.raises(ValueError, match=r"\[N, E\] and \[M, E\], got \[50, 7\] and \[20, 8\]"):
        retrieval_recall(images[:, 1:], texts, pairs)
    with pytest.raises(ValueError, match="captions of each image must be >= 1, got 0 of image 1"):
        pair_captions([["a dog"], []])
    images[0] = torch.nan
    with pytest.raises(ValueError, match="image embeddings must be finite and other than zero"):
        retrieval_recall(images, texts, pairs)
