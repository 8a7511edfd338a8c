"""The k-NN search and vote against scikit-learn, their ties, their memory and their bounds."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from stablerep.evaluation import knn
from stablerep.evaluation.knn import find_neighbours, knn_classify, knn_classify_by_k
from tests.stablerep.evaluation.memory import measure_peak_bytes, needs_proc


def draw(num_train: int, num_test: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (num_train,), generator=generator)
    train = centres[labels] + torch.randn(num_train, 12, generator=generator, dtype=torch.float64)
    test = torch.randn(num_test, 12, generator=generator, dtype=torch.float64)
    return train, labels, test


@pytest.fixture(params=[None, (7, 30), (64, 64 * 3)])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the slices: as they are, and two that leave ragged ends."""
    if request.param is not None:
        monkeypatch.setattr(knn, "NUM_TRAIN_ROWS_PER_SLICE", request.param[0])
        monkeypatch.setattr(knn, "MAX_SIMILARITIES_IN_MEMORY", request.param[1])


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.5])
def test_predictions_of_every_k_equal_those_of_scikit_learn(temperature: float) -> None:
    train, labels, test = draw(300, 200)
    predictions = knn_classify_by_k(
        train, labels, test, num_classes=7, ks=(1, 10, 20, 100, 300), temperature=temperature
    )
    assert list(predictions) == [1, 10, 20, 100, 300]
    for k, predicted in predictions.items():
        oracle = KNeighborsClassifier(
            n_neighbors=k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distances: np.exp((1 - distances) / temperature),
        ).fit(train.numpy(), labels.numpy())
        np.testing.assert_array_equal(predicted.numpy(), oracle.predict(test.numpy()))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("k", [1, 5, 40, 301])
def test_neighbours_equal_those_of_scikit_learn(k: int) -> None:
    train, _, test = draw(301, 50)
    oracle = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(train.numpy())
    distances, rows = oracle.kneighbors(test.numpy())
    neighbours = find_neighbours(train, test, k)
    np.testing.assert_array_equal(neighbours.indices, rows)
    np.testing.assert_allclose(neighbours.similarities, 1 - distances, atol=1e-12)


def test_one_k_is_that_of_several() -> None:
    train, labels, test = draw(90, 50)
    several = knn_classify_by_k(train, labels, test, num_classes=7, ks=(50, 5))
    for k in (50, 5):
        assert torch.equal(knn_classify(train, labels, test, num_classes=7, k=k), several[k])


@pytest.mark.usefixtures("slices")
def test_of_equal_neighbours_the_first_rows_are_taken_in_order() -> None:
    # Whole numbers of norm 5: the similarities are exact in any order of summation.
    base = torch.tensor([[5.0, 0.0], [3.0, 4.0], [0.0, 5.0]])
    train = base[torch.arange(200) % 3]
    neighbours = find_neighbours(train, base[:1], 100).indices[0]
    nearest, next_nearest = list(range(0, 200, 3)), list(range(1, 200, 3))
    assert neighbours.tolist() == (nearest + next_nearest)[:100]


@pytest.mark.usefixtures("slices")
def test_rows_that_are_all_equal_are_taken_in_order() -> None:
    assert find_neighbours(torch.ones(150, 4), torch.ones(3, 4), 9).indices.tolist() == [list(range(9))] * 3


def test_of_classes_with_equal_votes_the_lowest_wins() -> None:
    train, labels = torch.ones(6, 3), torch.tensor([4, 2, 4, 2, 6, 6])
    assert knn_classify(train, labels, torch.ones(2, 3), num_classes=7, k=6).tolist() == [2, 2]


def test_scale_of_features_does_not_change_the_predictions() -> None:
    train, labels, test = draw(90, 50)
    scales = torch.rand(90, 1, dtype=torch.float64) + 0.1
    assert torch.equal(
        knn_classify(train * scales, labels, test * 7, num_classes=7),
        knn_classify(train, labels, test, num_classes=7),
    )


def test_tiny_temperature_is_the_nearest_neighbour() -> None:
    train, labels, test = draw(90, 50)
    assert torch.equal(
        knn_classify(train, labels, test, num_classes=7, k=20, temperature=1e-6),
        knn_classify(train, labels, test, num_classes=7, k=1),
    )


def test_no_test_feature_gives_no_prediction() -> None:
    train, labels, test = draw(30, 5)
    assert knn_classify(train, labels, test[:0], num_classes=7).shape == (0,)
    assert find_neighbours(train, test[:0], 3).indices.shape == (0, 3)


@needs_proc
def test_memory_is_that_of_slices_and_not_of_all_similarities() -> None:
    setup = """
from stablerep.evaluation.knn import knn_classify_by_k
train, test, labels = torch.randn(20_000, 8), torch.randn(4_000, 8), torch.arange(20_000) % 10
knn_classify_by_k(train, labels, test[:10], num_classes=10)
"""
    peak = measure_peak_bytes(setup, "knn_classify_by_k(train, labels, test, num_classes=10)")
    assert peak < 20_000 * 4_000 * 4 / 2


def test_more_neighbours_than_training_features_are_refused() -> None:
    train, labels, test = draw(10, 5)
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\].*got 11"):
        knn_classify(train, labels, test, num_classes=7, k=11)
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\].*got 20"):
        knn_classify_by_k(train, labels, test, num_classes=7, ks=(10, 20))
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\].*got 0"):
        find_neighbours(train, test, 0)
    with pytest.raises(ValueError, match="ks must name at least 1 number of neighbours"):
        knn_classify_by_k(train, labels, test, num_classes=7, ks=())


def test_arguments_out_of_bounds_are_refused() -> None:
    train, labels, test = draw(30, 5)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        knn_classify(train, labels, test, num_classes=7, temperature=0)
    with pytest.raises(ValueError, match=r"train_labels must be in \[0, 3\)"):
        knn_classify(train, labels, test, num_classes=3)
    with pytest.raises(ValueError, match=r"train_labels must be \[30\], got \[29\]"):
        knn_classify(train, labels[1:], test, num_classes=7)
    with pytest.raises(ValueError, match=r"test_features must be \[N, 12\], got \[5, 11\]"):
        knn_classify(train, labels, test[:, 1:], num_classes=7)
    test[3, 2] = float("nan")
    with pytest.raises(ValueError, match="test_features must be finite, got a row 3 that is not"):
        knn_classify(train, labels, test, num_classes=7)
