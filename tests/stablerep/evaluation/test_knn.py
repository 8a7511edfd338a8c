"""The k-NN vote against scikit-learn, and its bounds."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from stablerep.evaluation import knn
from stablerep.evaluation.knn import knn_classify


def draw(num_train: int, num_test: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (num_train,), generator=generator)
    train = centres[labels] + torch.randn(num_train, 12, generator=generator, dtype=torch.float64)
    test = torch.randn(num_test, 12, generator=generator, dtype=torch.float64)
    return train, labels, test


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 0.5), (300, 0.02)])
def test_predictions_equal_those_of_scikit_learn(k: int, temperature: float) -> None:
    train, labels, test = draw(300, 200)
    oracle = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / temperature),
    ).fit(train.numpy(), labels.numpy())
    predictions = knn_classify(train, labels, test, num_classes=7, k=k, temperature=temperature)
    np.testing.assert_array_equal(predictions.numpy(), oracle.predict(test.numpy()))


def test_slices_do_not_change_the_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test = draw(90, 101)
    whole = knn_classify(train, labels, test, num_classes=7)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES_IN_MEMORY", 90 * 4)
    assert torch.equal(knn_classify(train, labels, test, num_classes=7), whole)


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


def test_more_neighbours_than_training_features_are_refused() -> None:
    train, labels, test = draw(10, 5)
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\].*got 11"):
        knn_classify(train, labels, test, num_classes=7, k=11)


def test_arguments_out_of_bounds_are_refused() -> None:
    train, labels, test = draw(30, 5)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        knn_classify(train, labels, test, num_classes=7, temperature=0)
    with pytest.raises(ValueError, match=r"train_labels must be in \[0, 3\)"):
        knn_classify(train, labels, test, num_classes=3)
    with pytest.raises(ValueError, match=r"train_labels must be \[30\], got \[29\]"):
        knn_classify(train, labels[1:], test, num_classes=7)
    with pytest.raises(ValueError, match=r"\[N, D\] and \[M, D\], got \[30, 12\] and \[5, 11\]"):
        knn_classify(train, labels, test[:, 1:], num_classes=7)
