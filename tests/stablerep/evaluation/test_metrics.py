"""The scores against scikit-learn, torchmetrics and cases counted by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_curve
from torchmetrics.functional.classification import multiclass_accuracy

from stablerep.evaluation.metrics import (
    accuracy,
    mean_average_precision,
    mean_per_class_accuracy,
    voc_average_precision,
)


def draw_classes(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, num_images, p=[0.5, 0.3, 0.1, 0.06, 0.04])
    predictions = np.where(rng.random(num_images) < 0.6, labels, rng.integers(0, 5, num_images))
    return torch.from_numpy(predictions), torch.from_numpy(labels)


@pytest.mark.parametrize("seed", range(5))
def test_accuracies_are_those_of_scikit_learn_and_torchmetrics(seed: int) -> None:
    predictions, labels = draw_classes(400, seed)
    assert accuracy(predictions, labels) == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    by_class = mean_per_class_accuracy(predictions, labels)
    assert by_class == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-12)
    oracle = multiclass_accuracy(predictions, labels, num_classes=5, average="macro")
    assert by_class == pytest.approx(float(oracle), abs=1e-6)
    assert by_class != pytest.approx(
        accuracy(predictions, labels), abs=1e-3
    )  # the classes are not of one size


def test_class_without_an_image_does_not_count() -> None:
    labels, predictions = torch.tensor([0, 0, 3, 3]), torch.tensor([0, 1, 3, 3])
    assert mean_per_class_accuracy(predictions, labels) == 0.75  # of 1/2 and 1


def test_prediction_of_no_class_is_wrong() -> None:
    labels, predictions = torch.tensor([0, 0, 1, 1]), torch.tensor([-1, 0, 1, -1])
    assert accuracy(predictions, labels) == 0.5
    assert mean_per_class_accuracy(predictions, labels) == 0.5


def test_average_precision_counted_by_hand() -> None:
    # Ranked: right, wrong, right, wrong, right. Recall 1/3, 2/3, 1 at precision 1, 2/3, 3/5.
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([1, 0, 1, 0, 1]).bool()
    # Levels 0 to 0.3 take 1, 0.4 to 0.6 take 2/3, 0.7 to 1 take 3/5.
    assert voc_average_precision(scores, labels) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)


def test_precision_of_a_level_is_the_best_at_any_higher_recall() -> None:
    # Ranked: wrong, right, right. Precision 1/2 at recall 1/2, 2/3 at recall 1.
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 1]).bool()
    assert voc_average_precision(scores, labels) == pytest.approx(2 / 3)


def test_recall_of_three_tenths_reaches_the_level_three_tenths() -> None:
    # As floats 3/10 < 3 · 0.1. Ranked: 3 right, 10 wrong, 7 right.
    labels = torch.tensor([1] * 3 + [0] * 10 + [1] * 7).bool()
    scores = torch.linspace(1, 0, 20)
    assert voc_average_precision(scores, labels) == pytest.approx((4 * 1 + 7 * 10 / 20) / 11)


def test_perfect_and_worst_rankings() -> None:
    labels = torch.tensor([1, 1, 0, 0, 0, 0]).bool()
    scores = torch.arange(6.0)
    assert voc_average_precision(-scores, labels) == 1
    assert voc_average_precision(scores, labels) == pytest.approx(2 / 6)


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_that_of_scikit_learns_curve(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(60) < rng.uniform(0.1, 0.9)
    labels[0] = True
    scores = np.round(rng.normal(size=60) + labels, 1)  # with ties
    precision, recall, _ = precision_recall_curve(labels, scores)
    precision, recall = precision[:-1], recall[:-1]  # the last point is no threshold's
    levels = [precision[recall >= level - 1e-9].max(initial=0) for level in np.linspace(0, 1, 11)]
    ours = voc_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    assert ours == pytest.approx(np.mean(levels), abs=1e-12)


def test_order_of_images_does_not_change_average_precision() -> None:
    scores, labels = torch.zeros(50), torch.arange(50) % 5 == 0
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert voc_average_precision(scores, labels) == pytest.approx(0.2)
    assert voc_average_precision(scores, labels[order]) == pytest.approx(0.2)


def test_ignored_images_are_as_if_they_were_not_there() -> None:
    rng = np.random.default_rng(0)
    scores, labels = torch.from_numpy(rng.normal(size=(80, 3))), torch.from_numpy(rng.random((80, 3)) < 0.3)
    ignored = torch.from_numpy(rng.random((80, 3)) < 0.2)
    by_hand = [voc_average_precision(scores[~ignored[:, c], c], labels[~ignored[:, c], c]) for c in range(3)]
    assert mean_average_precision(scores, labels, ignored) == pytest.approx(np.mean(by_hand))
    assert mean_average_precision(scores, labels) != pytest.approx(np.mean(by_hand))


def test_class_that_no_image_shows_does_not_count_in_the_mean() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.1, 0.2]])
    labels = torch.tensor([[True, False], [False, False]])
    assert mean_average_precision(scores, labels) == 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"both be \[N\] with N >= 1, got \[3\] and \[2\]"):
        accuracy(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"N >= 1, got \[0\] and \[0\]"):
        mean_per_class_accuracy(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="labels must be >= 0, got -1"):
        mean_per_class_accuracy(torch.zeros(2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="at least 1 positive, got 0"):
        voc_average_precision(torch.zeros(3), torch.zeros(3).bool())
    with pytest.raises(ValueError, match="scores must be numbers, got 1 NaN"):
        voc_average_precision(torch.tensor([0.0, float("nan")]), torch.ones(2).bool())
    with pytest.raises(ValueError, match=r"both be \[N\], got \[3\] and \[2\]"):
        voc_average_precision(torch.zeros(3), torch.ones(2).bool())
    with pytest.raises(ValueError, match=r"ignored must be \[3\], got \[2\]"):
        voc_average_precision(torch.zeros(3), torch.ones(3).bool(), torch.ones(2).bool())
    with pytest.raises(ValueError, match=r"both be \[N, C\], got \[3\] and \[3\]"):
        mean_average_precision(torch.zeros(3), torch.ones(3).bool())
    with pytest.raises(ValueError, match=r"ignored must be \[3, 2\], got \[3, 1\]"):
        mean_average_precision(torch.zeros(3, 2), torch.ones(3, 2).bool(), torch.ones(3, 1).bool())
    with pytest.raises(ValueError, match="at least 1 positive, got 0"):
        mean_average_precision(torch.zeros(3, 2), torch.zeros(3, 2).bool())
