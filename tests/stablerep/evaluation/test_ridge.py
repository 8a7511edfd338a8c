"""Ridge regression against scikit-learn, its choice, its memory and its bounds."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from stablerep.evaluation import ridge
from stablerep.evaluation.holdout import hold_out
from stablerep.evaluation.ridge import PENALTIES, ridge_classify
from tests.stablerep.evaluation.memory import measure_peak_bytes, needs_proc


def draw_classes(num_images: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(3, 6))
    labels = rng.integers(0, 3, num_images)
    features = centres[labels] + noise * rng.normal(size=(num_images, 6)) * [1, 5, 0.1, 1, 1, 1]
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def fit_with_scikit_learn(
    features: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, penalty: float
) -> np.ndarray:
    """Scores of the test features."""
    scaler = StandardScaler().fit(features.double())
    model = Ridge(alpha=penalty * len(features)).fit(scaler.transform(features.double()), np.eye(3)[labels])
    scores: np.ndarray = model.predict(scaler.transform(test.double()))
    return scores


def test_scores_are_scikit_learns_for_the_chosen_penalty() -> None:
    train, labels = draw_classes(200, 0)
    test, _ = draw_classes(300, 1)
    result = ridge_classify(train, labels, test, num_classes=3)
    scores = fit_with_scikit_learn(train, labels, test, result.penalty)
    np.testing.assert_allclose(result.scores, scores, atol=1e-4)  # 1e-6 is added to each deviation
    np.testing.assert_array_equal(result.predictions, scores.argmax(axis=1))


def test_penalty_and_scores_on_a_validation_split_are_scikit_learns() -> None:
    train, labels = draw_classes(60, 0, noise=3.0)
    validation = draw_classes(90, 1, noise=3.0)
    test, _ = draw_classes(300, 2, noise=3.0)
    result = ridge_classify(train, labels, test, num_classes=3, validation=validation)
    oracle = [
        np.mean(
            fit_with_scikit_learn(train, labels, validation[0], p).argmax(axis=1) == validation[1].numpy()
        )
        for p in PENALTIES
    ]
    np.testing.assert_allclose(result.validation_accuracies, oracle, atol=1e-12)
    assert len(set(oracle)) > 3
    assert result.penalty == max(p for p, hit in zip(PENALTIES, oracle, strict=True) if hit == max(oracle))
    assert result.selection == "validation"
    both = torch.cat([train, validation[0]]), torch.cat([labels, validation[1]])
    scores = fit_with_scikit_learn(*both, test, result.penalty)
    np.testing.assert_allclose(result.scores, scores, atol=1e-4)


def test_penalty_without_a_validation_split_is_scikit_learns_on_the_held_out_fifth() -> None:
    train, labels = draw_classes(100, 0, noise=3.0)
    test = draw_classes(50, 1)[0]
    result = ridge_classify(train, labels, test, num_classes=3, seed=3)
    assert (result.selection, result.split_by) == ("held-out part of train", "image")
    fitted, held_out, _ = hold_out(labels, None, fraction=0.2, seed=3)
    on_split = ridge_classify(
        train[fitted],
        labels[fitted],
        test,
        num_classes=3,
        validation=(train[held_out], labels[held_out]),
    )
    assert result.penalty == on_split.penalty
    assert result.validation_accuracies == on_split.validation_accuracies
    scores = fit_with_scikit_learn(train, labels, test, result.penalty)  # of all of train
    np.testing.assert_allclose(result.scores, scores, atol=1e-4)


def test_choice_is_not_made_on_copies_of_what_was_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = torch.arange(400).repeat(2)
    features = torch.randn(400, 600, generator=generator)[captions]
    labels = torch.randint(2, (400,), generator=generator)[captions]  # says nothing of other captions
    by_image, by_caption = (
        ridge_classify(features, labels, features, num_classes=2, groups=groups)
        for groups in (None, captions)
    )
    assert max(by_image.validation_accuracies) > 0.75
    assert max(by_caption.validation_accuracies) < 0.65
    assert by_caption.split_by == "caption"


@pytest.mark.parametrize("num_values", [60, 200, 10**9])
def test_slices_do_not_change_the_result(num_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = draw_classes(103, 0, noise=3.0)
    whole = ridge_classify(train, labels, train, num_classes=3)
    monkeypatch.setattr(ridge, "MAX_VALUES_PER_SLICE", num_values)
    sliced = ridge_classify(train, labels, train, num_classes=3)
    torch.testing.assert_close(sliced.scores, whole.scores, atol=1e-10, rtol=0)
    assert sliced.validation_accuracies == whole.validation_accuracies


@needs_proc
def test_memory_is_that_of_slices_and_not_of_one_hot_labels() -> None:
    setup = """
from stablerep.evaluation import ridge
ridge.MAX_VALUES_PER_SLICE = 2**19
features, labels = torch.randn(60_000, 8), torch.arange(60_000) % 200
def fit(num_images):
    x, y = features[:num_images], labels[:num_images]
    ridge.ridge_classify(x, y, x[:10], num_classes=200)
fit(4000)
"""
    assert measure_peak_bytes(setup, "fit(60_000)") < 60_000 * 200 * 8 / 2


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
    with pytest.raises(ValueError, match=r"train_labels must be \[6\], got \[5\]"):
        ridge_classify(torch.zeros(6, 2), torch.zeros(5), torch.zeros(1, 2), num_classes=2)
    train, labels = draw_classes(20, 0)
    with pytest.raises(ValueError, match=r"test_features must be \[N, 6\], got \[1, 2\]"):
        ridge_classify(train, labels, torch.zeros(1, 2), num_classes=3)
    with pytest.raises(ValueError, match=r"train_labels must be in \[0, 2\), got 0 to 2"):
        ridge_classify(train, labels, train, num_classes=2)
    with pytest.raises(ValueError, match="validation_features must be >= 1, got 0"):
        ridge_classify(train, labels, train, num_classes=3, validation=(train[:0], labels[:0]))
    with pytest.raises(ValueError, match=r"validation_features must be \[N, 6\], got \[20, 5\]"):
        ridge_classify(train, labels, train, num_classes=3, validation=(train[:, 1:], labels))
