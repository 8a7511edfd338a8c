import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from stablerep.evaluation.ridge import PENALTIES, ridge_classify


def draw_classes(num_images: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(3, 6))
    labels = rng.integers(0, 3, num_images)
    features = centres[labels] + noise * rng.normal(size=(num_images, 6)) * [1, 5, 0.1, 1, 1, 1]
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_predictions_are_scikit_learns_for_the_chosen_penalty() -> None:
    train, labels = draw_classes(200, 0)
    test, _ = draw_classes(300, 1)
    predictions, penalty = ridge_classify(train, labels, test, num_classes=3)
    scaler = StandardScaler().fit(train)
    model = Ridge(alpha=penalty * len(train)).fit(scaler.transform(train), np.eye(3)[labels])
    np.testing.assert_array_equal(predictions, model.predict(scaler.transform(test)).argmax(axis=1))


def test_penalty_is_chosen_without_the_test_features() -> None:
    train, labels = draw_classes(100, 0, noise=3.0)
    chosen = {ridge_classify(train, labels, draw_classes(50, s)[0], num_classes=3).penalty for s in range(4)}
    assert len(chosen) == 1


def test_penalty_is_large_where_features_say_nothing_and_there_are_few() -> None:
    rng = torch.Generator().manual_seed(0)
    train, labels = torch.randn(60, 50, generator=rng), torch.arange(60) % 2
    labels[:50] = 1  # the majority is the best guess
    assert ridge_classify(train, labels, train, num_classes=2).penalty == PENALTIES[-1]


def test_constant_and_repeated_features_do_no_harm() -> None:
    train, labels = draw_classes(50, 0)
    train = torch.cat([train, train, torch.ones(50, 1)], dim=1)
    predictions = ridge_classify(train, labels, train, num_classes=3).predictions
    assert (predictions == labels).float().mean() > 0.6


def test_too_few_or_odd_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="train_features must be >= 5, got 4"):
        ridge_classify(torch.zeros(4, 2), torch.zeros(4), torch.zeros(1, 2), num_classes=2)
    with pytest.raises(ValueError, match=r"train_labels \[N\], got \[6, 2\] and \[5\]"):
        ridge_classify(torch.zeros(6, 2), torch.zeros(5), torch.zeros(1, 2), num_classes=2)
