import math

import pytest
import torch

from stablerep.collapse import embedding_std, positives_per_anchor, rank_me


def test_rank_is_the_number_of_directions_that_are_used_alike() -> None:
    basis, _ = torch.linalg.qr(torch.randn(64, 64))
    for num_directions in (1, 5, 64):
        embeddings = torch.eye(64)[:, :num_directions] @ basis[:num_directions]
        assert float(rank_me(embeddings)) == pytest.approx(num_directions, rel=1e-3)


def test_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = [0.5, 0.25, 0.125, 0.125]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert float(rank_me(torch.diag(sigma))) == pytest.approx(expected, rel=1e-5)


def test_rank_of_many_embeddings_is_that_of_a_part() -> None:
    embeddings = torch.randn(5000, 3)
    assert float(rank_me(embeddings)) == pytest.approx(3, rel=0.01)


def test_spread_is_one_for_even_directions_and_zero_for_one() -> None:
    assert float(embedding_std(torch.randn(20_000, 32))) == pytest.approx(1, rel=0.01)
    assert float(embedding_std(torch.ones(10, 32))) == pytest.approx(0, abs=1e-4)


def test_positives_are_the_others_of_the_label() -> None:
    labels = torch.tensor([1, 1, 1, 2, 2, 3])
    assert float(positives_per_anchor(labels)) == pytest.approx((3 * 2 + 2 + 0) / 6)
    assert float(positives_per_anchor(labels, torch.tensor([3, 3, 2, 9]))) == pytest.approx(
        (6 + 2 + 2 + 2) / 6
    )
