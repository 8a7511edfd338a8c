"""Logistic regression against scikit-learn under the same penalty convention, and its guards."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from stablerep.evaluation import logreg
from stablerep.evaluation.logreg import (
    PENALTIES,
    LogisticRegressionResult,
    logistic_regression,
    multilabel_logistic_regression,
)
from stablerep.evaluation.metrics import mean_average_precision, mean_per_class_accuracy
from tests.stablerep.evaluation.memory import measure_peak_bytes, needs_proc

GRID = tuple(float(value) for value in np.logspace(-4, 2, 7))
NUM_CLASSES = 4
EXACT = 1e-8


def draw_classes(
    num_images: int, seed: int, num_features: int = 12, num_classes: int = NUM_CLASSES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of very different scale that depend on each other; the classes overlap."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(99)
    centres = fixed.normal(size=(num_classes, num_features))
    mixing = fixed.normal(size=(num_features, num_features)) * np.logspace(-3, 1, num_features)
    labels = rng.integers(0, num_classes, num_images)
    labels[:num_classes] = np.arange(num_classes)
    features = (centres[labels] + 1.5 * rng.normal(size=(num_images, num_features))) @ mixing.T + 3
    return torch.from_numpy(features), torch.from_numpy(labels)


def draw_labels(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, several labels an image, entries to ignore."""
    rng = np.random.default_rng(seed)
    weight = np.random.default_rng(98).normal(size=(8, 3))
    features = rng.normal(size=(num_images, 8))
    labels = features @ weight + 2 * rng.normal(size=(num_images, 3)) > 1
    ignored = rng.random((num_images, 3)) < 0.15
    return torch.from_numpy(features), torch.from_numpy(labels), torch.from_numpy(ignored)


def fit_with_scikit_learn(
    features: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, inverse_penalty: float
) -> np.ndarray:
    """Decision function of the test features; [M] of two classes."""
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=inverse_penalty, tol=EXACT, max_iter=100_000)
    model.fit(scaler.transform(features), labels)
    decision: np.ndarray = model.decision_function(scaler.transform(test))
    return decision


@pytest.fixture(params=[15, 1, 2])
def num_penalties_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All penalties of the small grid side by side, or one or two after each other."""
    monkeypatch.setattr(logreg, "NUM_PENALTIES_AT_ONCE", request.param)


@pytest.mark.parametrize("penalty", [1e-5, 1e-3, 0.1, 10.0, 1e4])
@pytest.mark.parametrize(("num_images", "num_features"), [(300, 12), (40, 60)])
def test_probabilities_are_scikit_learns_at_the_stated_conversion(
    penalty: float, num_images: int, num_features: int
) -> None:
    train, labels = draw_classes(num_images, 0, num_features)
    validation, test = draw_classes(30, 1, num_features), draw_classes(50, 2, num_features)[0]
    result = logistic_regression(
        train,
        labels,
        test,
        num_classes=NUM_CLASSES,
        validation=validation,
        penalties=[penalty],
        tolerance=EXACT,
    )
    both = torch.cat([train, validation[0]]), torch.cat([labels, validation[1]])
    oracle = fit_with_scikit_learn(*both, test, 1 / ((num_images + 30) * penalty))
    assert result.refit_converged
    np.testing.assert_allclose(result.logits.softmax(1), softmax(oracle, axis=1), atol=2e-4)
    np.testing.assert_array_equal(result.predictions, oracle.argmax(axis=1))


def test_two_classes_are_scikit_learns_at_the_stated_conversion() -> None:
    train, labels = draw_classes(200, 0, num_classes=2)
    validation, test = draw_classes(40, 1, num_classes=2), draw_classes(50, 2, num_classes=2)[0]
    result = logistic_regression(
        train, labels, test, num_classes=2, validation=validation, penalties=[0.03], tolerance=EXACT
    )
    both = torch.cat([train, validation[0]]), torch.cat([labels, validation[1]])
    oracle = fit_with_scikit_learn(*both, test, 2 / (240 * 0.03))
    np.testing.assert_allclose(result.logits[:, 1] - result.logits[:, 0], oracle, atol=1e-5)


@pytest.mark.usefixtures("num_penalties_at_once")
def test_validation_scores_and_choice_are_scikit_learns() -> None:
    train, labels = draw_classes(120, 0)
    validation, test = draw_classes(200, 1), draw_classes(50, 2)[0]
    result = logistic_regression(
        train,
        labels,
        test,
        num_classes=NUM_CLASSES,
        validation=validation,
        penalties=GRID,
        tolerance=EXACT,
    )
    oracle = [
        np.mean(
            fit_with_scikit_learn(train, labels, validation[0], 1 / (120 * p)).argmax(axis=1)
            == validation[1].numpy()
        )
        for p in GRID
    ]
    np.testing.assert_allclose(result.validation_scores, oracle, atol=1e-12)
    assert len(set(oracle)) > 3
    assert result.penalty == max(p for p, hit in zip(GRID, oracle, strict=True) if hit == max(oracle))
    assert result.penalties == GRID
    assert all(result.converged)
    assert result.selection == "validation"
    assert result.metric == "accuracy"


def test_gradient_in_the_original_coordinates_is_within_the_tolerance() -> None:
    train, labels = draw_classes(300, 0)
    tolerance, penalty = 1e-5, 1e-3
    # The training features are the test features, and validation adds nothing: one logit a fitted image.
    result = logistic_regression(
        train[30:],
        labels[30:],
        train,
        num_classes=NUM_CLASSES,
        validation=(train[:30], labels[:30]),
        penalties=[penalty],
        tolerance=tolerance,
    )
    x = StandardScaler().fit_transform(train)
    design = np.c_[x, np.ones(300)]
    weight = np.linalg.lstsq(design, result.logits.numpy(), rcond=None)[0]
    np.testing.assert_allclose(design @ weight, result.logits, atol=1e-9)  # the logits are linear
    gradient = design.T @ (softmax(result.logits.numpy(), axis=1) - np.eye(NUM_CLASSES)[labels]) / 300
    gradient[:-1] += penalty * weight[:-1]
    assert np.abs(gradient).max() <= tolerance


def test_default_grid_is_the_published_one() -> None:
    np.testing.assert_allclose(PENALTIES, np.logspace(-6, 5, 45))
    train, labels = draw_classes(150, 0)
    result = logistic_regression(
        train, labels, train, num_classes=NUM_CLASSES, validation=draw_classes(100, 1)
    )
    assert len(result.validation_scores) == len(result.converged) == len(result.num_iterations) == 45
    assert all(result.converged)


def test_held_out_part_is_chosen_by_seed_and_the_refit_is_on_all_of_train() -> None:
    train, labels = draw_classes(200, 0)
    test = draw_classes(50, 2)[0]
    results = [
        logistic_regression(
            train, labels, test, num_classes=NUM_CLASSES, penalties=GRID, seed=seed, tolerance=EXACT
        )
        for seed in (0, 0, 1, 2)
    ]
    assert results[0].validation_scores == results[1].validation_scores
    assert len({result.validation_scores for result in results}) > 1
    for result in results:
        assert result.selection == "held-out part of train"
        oracle = fit_with_scikit_learn(train, labels, test, 1 / (200 * result.penalty))
        np.testing.assert_allclose(result.logits.softmax(1), softmax(oracle, axis=1), atol=2e-4)


def test_choice_is_not_made_on_copies_of_what_was_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = torch.arange(400).repeat(2)
    features = torch.randn(400, 600, generator=generator)[captions]
    labels = torch.randint(2, (400,), generator=generator)[captions]  # says nothing of other captions
    by_image, by_caption = (
        logistic_regression(features, labels, features, num_classes=2, penalties=GRID, groups=groups)
        for groups in (None, captions)
    )
    assert max(by_image.validation_scores) > 0.75
    assert max(by_caption.validation_scores) < 0.65
    assert (by_image.split_by, by_caption.split_by) == ("image", "caption")


@pytest.mark.parametrize("num_values", [100, 900, 10**9])
def test_slices_do_not_change_the_result(num_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = draw_classes(203, 0)
    shown, drawn, ignored = draw_labels(103, 0)

    def fit() -> list[LogisticRegressionResult]:
        settings: Any = {"penalties": [0.1, 1.0], "tolerance": EXACT}
        return [
            logistic_regression(train, labels, train[:77], num_classes=NUM_CLASSES, **settings),
            multilabel_logistic_regression(shown, drawn, shown[:77], train_ignored=ignored, **settings),
        ]

    whole = fit()
    monkeypatch.setattr(logreg, "MAX_VALUES_PER_SLICE", num_values)
    for sliced, expected in zip(fit(), whole, strict=True):
        assert sliced.validation_scores == expected.validation_scores
        torch.testing.assert_close(sliced.logits, expected.logits, atol=1e-6, rtol=1e-6)


@needs_proc
def test_memory_is_that_of_slices_and_not_of_all_logits() -> None:
    setup = """
from stablerep.evaluation import logreg
logreg.MAX_VALUES_PER_SLICE = 2**19
features, labels = torch.randn(60_000, 8), torch.arange(60_000) % 200
def fit(num_images):
    x, y = features[:num_images], labels[:num_images]
    logreg.logistic_regression(x, y, x[:10], num_classes=200, penalties=[1.0], max_iterations=1)
fit(4000)
"""
    assert measure_peak_bytes(setup, "fit(60_000)") < 60_000 * 200 * 8 / 2


def test_test_features_do_not_change_the_choice() -> None:
    train, labels = draw_classes(100, 0)
    chosen = {
        logistic_regression(
            train, labels, draw_classes(50, s)[0], num_classes=NUM_CLASSES, penalties=GRID
        ).validation_scores
        for s in range(3)
    }
    assert len(chosen) == 1


def test_choice_by_mean_per_class_accuracy_is_the_choice_by_that_score() -> None:
    train, labels = draw_classes(200, 0)
    keep = (labels != 0) | (torch.arange(200) < 30)
    validation = draw_classes(100, 1)
    rare = (validation[1] != 0) | (torch.arange(100) < 20)
    result = logistic_regression(
        train[keep],
        labels[keep],
        validation[0][rare],
        num_classes=NUM_CLASSES,
        validation=(validation[0][rare], validation[1][rare]),
        metric="mean_per_class_accuracy",
        penalties=GRID,
        tolerance=EXACT,
    )
    oracle = [
        mean_per_class_accuracy(
            torch.from_numpy(
                fit_with_scikit_learn(
                    train[keep], labels[keep], validation[0][rare], 1 / (int(keep.sum()) * p)
                ).argmax(axis=1)
            ),
            validation[1][rare],
        )
        for p in GRID
    ]
    np.testing.assert_allclose(result.validation_scores, oracle, atol=1e-12)


def test_constant_and_repeated_features_do_no_harm() -> None:
    train, labels = draw_classes(120, 0)
    validation = draw_classes(60, 1)
    arguments: Any = {"num_classes": NUM_CLASSES, "penalties": [0.01], "tolerance": EXACT}
    plain = logistic_regression(train, labels, train, validation=(validation[0], validation[1]), **arguments)
    # 0.1 has no exact float, so its computed deviation need not be 0; at test the constant is another one.
    wide, wide_validation, wide_test = (
        torch.cat([x, torch.full((len(x), 1), c, dtype=x.dtype)], dim=1)
        for x, c in ((train, 0.1), (validation[0], 0.1), (train, 1e6))
    )
    constant = logistic_regression(
        wide, labels, wide_test, validation=(wide_validation, validation[1]), **arguments
    )
    np.testing.assert_allclose(constant.logits, plain.logits, atol=1e-5)
    # Twice the same features at twice the penalty is once.
    twice = logistic_regression(
        torch.cat([train, train], 1),
        labels,
        torch.cat([train, train], 1),
        validation=(torch.cat([validation[0]] * 2, 1), validation[1]),
        num_classes=NUM_CLASSES,
        penalties=[0.02],
        tolerance=EXACT,
    )
    np.testing.assert_allclose(twice.logits, plain.logits, atol=1e-5)


def test_class_without_a_training_image_is_never_predicted() -> None:
    train, labels = draw_classes(120, 0)
    validation = draw_classes(60, 1)
    shifted = labels * 2  # classes 1, 3, 5 and 7 of 8 have no image
    result = logistic_regression(
        train, shifted, train, num_classes=8, validation=(validation[0], validation[1] * 2), penalties=GRID
    )
    plain = logistic_regression(train, labels, train, num_classes=4, validation=validation, penalties=GRID)
    assert (result.logits[:, 1::2] == -math.inf).all()
    assert torch.equal(result.logits[:, ::2], plain.logits)
    assert torch.equal(result.predictions, plain.predictions * 2)


def test_separable_classes_converge_at_the_smallest_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    train = 20 * torch.eye(3)[labels].repeat(1, 40) + torch.randn(60, 120, generator=generator)
    result = logistic_regression(train, labels, train, num_classes=3)
    assert all(result.converged)
    assert torch.equal(result.predictions, labels)
    assert result.logits.isfinite().all()


def test_choice_at_the_edge_of_the_grid_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rng = torch.Generator().manual_seed(0)
    train, labels = torch.randn(60, 50, generator=rng), torch.arange(60) % 2
    labels[:50] = 1  # the features say nothing: the majority is the best guess
    with caplog.at_level(logging.WARNING, logger="stablerep.evaluation.logreg"):
        result = logistic_regression(train, labels, train, num_classes=2)
    assert result.penalty == pytest.approx(1e5)
    assert len(result.warnings) == 1
    assert "penalty 100000 lies at the edge of the grid [1e-06, 100000]" in result.warnings[0]
    assert [record.message for record in caplog.records] == [f"logistic regression: {result.warnings[0]}"]


def test_choice_within_the_grid_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    train, labels = draw_classes(120, 0)
    result = logistic_regression(
        train, labels, train, num_classes=NUM_CLASSES, validation=draw_classes(200, 1)
    )
    assert PENALTIES[0] < result.penalty < PENALTIES[-1]
    assert result.warnings == ()
    assert not caplog.records


def test_fit_that_is_given_up_is_said() -> None:
    train, labels = draw_classes(120, 0)
    result = logistic_regression(
        train, labels, train, num_classes=NUM_CLASSES, penalties=[1e-5], tolerance=EXACT, max_iterations=3
    )
    assert result.converged == (False,)
    assert result.num_iterations == (3,)
    assert (result.refit_converged, result.refit_num_iterations) == (False, 3)
    assert any("the refit did not converge in 3 iterations" in warning for warning in result.warnings)


@pytest.mark.usefixtures("num_penalties_at_once")
def test_several_labels_are_scikit_learns_one_against_the_rest() -> None:
    train, labels, ignored = draw_labels(200, 0)
    features, validation_labels, validation_ignored = draw_labels(150, 1)
    test = draw_labels(50, 2)[0]

    def fit(
        x: torch.Tensor, y: torch.Tensor, skip: torch.Tensor, images: torch.Tensor, penalty: float
    ) -> np.ndarray:
        """One class after the other, the standardisation by all images."""
        scaler = StandardScaler().fit(x)
        columns = []
        for c in range(3):
            rows = ~skip[:, c]
            model = LogisticRegression(C=1 / (int(rows.sum()) * penalty), tol=EXACT, max_iter=100_000)
            model.fit(scaler.transform(x)[rows], y[rows, c])
            columns.append(model.decision_function(scaler.transform(images)))
        return np.stack(columns, axis=1)

    result = multilabel_logistic_regression(
        train,
        labels,
        test,
        train_ignored=ignored,
        validation=(features, validation_labels),
        validation_ignored=validation_ignored,
        penalties=GRID,
        tolerance=EXACT,
    )
    oracle = [
        mean_average_precision(
            torch.from_numpy(fit(train, labels, ignored, features, p)), validation_labels, validation_ignored
        )
        for p in GRID
    ]
    np.testing.assert_allclose(result.validation_scores, oracle, atol=1e-9)
    assert result.penalty == GRID[int(np.argmax(oracle))]
    assert result.metric == "map11"
    both = [
        torch.cat(pair)
        for pair in ((train, features), (labels, validation_labels), (ignored, validation_ignored))
    ]
    logits = fit(*both, test, result.penalty)  # type: ignore[call-arg,arg-type]
    np.testing.assert_allclose(result.logits.sigmoid(), expit(logits), atol=1e-5)
    np.testing.assert_array_equal(result.predictions, logits > 0)


def test_several_labels_without_validation_are_chosen_on_a_seeded_part() -> None:
    features, drawn, ignored = draw_labels(150, 0)
    results = [
        multilabel_logistic_regression(
            features, drawn, features, train_ignored=ignored, penalties=GRID, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert results[0].validation_scores == results[1].validation_scores != results[2].validation_scores
    assert (results[0].selection, results[0].split_by) == ("held-out part of train", "image")


def test_class_that_every_image_shows_does_no_harm() -> None:
    features, labels, _ = draw_labels(100, 0)
    labels[:, 1], labels[:, 2] = True, False
    result = multilabel_logistic_regression(features, labels, features, penalties=GRID)
    assert result.logits.isfinite().all()
    assert result.predictions[:, 1].all()
    assert not result.predictions[:, 2].any()


@pytest.mark.parametrize("seed", range(4))
def test_class_that_counts_in_a_single_image_does_no_harm(seed: int) -> None:
    features, labels, ignored = draw_labels(40, 0)
    ignored[:, 2] = torch.arange(40) != 7  # held out with some seeds, fitted with others
    result = multilabel_logistic_regression(
        features, labels, features, train_ignored=ignored, penalties=GRID, seed=seed
    )
    assert result.logits.isfinite().all()
    assert all(result.converged)


def test_bad_input_is_refused() -> None:
    train, labels = draw_classes(40, 0)

    def fit(**changed: object) -> None:
        arguments = {
            "train_features": train,
            "train_labels": labels,
            "test_features": train,
            "num_classes": NUM_CLASSES,
        }
        logistic_regression(**(arguments | changed))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="num_classes must be >= 2, got 1"):
        fit(num_classes=1)
    with pytest.raises(ValueError, match=r"train_labels must be in \[0, 3\), got 0 to 3"):
        fit(num_classes=3)
    with pytest.raises(ValueError, match=r"train_labels must be \[40\], got \[39\]"):
        fit(train_labels=labels[1:])
    with pytest.raises(ValueError, match="train_labels must have at least 2 classes, got 1"):
        fit(train_labels=torch.zeros(40).long())
    with pytest.raises(ValueError, match=r"test_features must be \[N, 12\], got \[40, 11\]"):
        fit(test_features=train[:, 1:])
    with pytest.raises(ValueError, match="train_features must be >= 2, got 1"):
        fit(train_features=train[:1])
    with pytest.raises(ValueError, match="validation_features must be >= 1, got 0"):
        fit(validation=(train[:0], labels[:0]))
    with pytest.raises(ValueError, match=r"validation_labels must be \[40\], got \[3\]"):
        fit(validation=(train, labels[:3]))
    with pytest.raises(ValueError, match=r"penalties must all be > 0 and finite, got \[0.0\]"):
        fit(penalties=[0.0])
    with pytest.raises(ValueError, match=r"heldout_fraction must be in \(0, 1\), got 1"):
        fit(heldout_fraction=1)
    with pytest.raises(ValueError, match="tolerance must be > 0, got 0"):
        fit(tolerance=0)
    with pytest.raises(ValueError, match="max_iterations must be >= 1, got 0"):
        fit(max_iterations=0)
    with pytest.raises(ValueError, match="held-out training images needs a class of at least 2 images"):
        fit(train_features=train[:4], train_labels=torch.arange(4))
    with pytest.raises(ValueError, match=r"groups must be \[40\], got \[39\]"):
        fit(groups=torch.arange(39))
    broken = train.clone()
    broken[7, 2] = math.nan
    with pytest.raises(ValueError, match="train_features must be finite, got a row 7 that is not"):
        fit(train_features=broken)


def test_bad_input_of_several_labels_is_refused() -> None:
    features, labels, ignored = draw_labels(30, 0)
    fit = multilabel_logistic_regression
    with pytest.raises(ValueError, match=r"train_labels must be \[30, C\], got \[30\]"):
        fit(features, labels[:, 0], features)
    with pytest.raises(ValueError, match="train_labels must be 0 or 1, got 0 to 2"):
        fit(features, labels.long() * 2, features)
    with pytest.raises(ValueError, match=r"train_ignored must be \[30, 3\], got \[30, 2\]"):
        fit(features, labels, features, train_ignored=ignored[:, :2])
    with pytest.raises(ValueError, match=r"validation_labels must be \[V, 3\], got \[30, 2\]"):
        fit(features, labels, features, validation=(features, labels[:, :2]))
    ignored[:, 2] = True
    with pytest.raises(
        ValueError, match="train_ignored must leave an image to each class, got none for class 2"
    ):
        fit(features, labels, features, train_ignored=ignored)
