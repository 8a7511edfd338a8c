"""Few-shot episodes against scikit-learn's nearest centroid and closed forms."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from stablerep.evaluation import fewshot
from stablerep.evaluation.fewshot import FewShotConfig, draw_episodes, few_shot_classify


def draw(num_classes: int, num_per_class: int, noise: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, 16, generator=generator, dtype=torch.float64) + 3
    labels = torch.arange(num_classes).repeat(num_per_class)
    offsets = torch.randn(len(labels), 16, generator=generator, dtype=torch.float64)
    return centres[labels] + noise * offsets, labels


@pytest.mark.parametrize("normalization", ["UN", "L2N", "CL2N"])
def test_episodes_equal_scikit_learns_nearest_centroid(normalization: Literal["UN", "L2N", "CL2N"]) -> None:
    features, labels = draw(9, 40)
    base_mean = features.mean(dim=0) + 0.1
    config = FewShotConfig(num_episodes=30, num_shots=3, normalization=normalization, seed=4)
    result = few_shot_classify(features, labels, config, base_mean)
    x = features.numpy() - (base_mean.numpy() if normalization == "CL2N" else 0)
    if normalization != "UN":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    oracle = []
    for episode in draw_episodes(labels, config).numpy():
        support, queries = episode[:, :3].ravel(), episode[:, 3:].ravel()
        classifier = NearestCentroid().fit(x[support], labels.numpy()[support])
        oracle.append(classifier.score(x[queries], labels.numpy()[queries]))
    assert 0.5 < np.mean(oracle) < 0.99  # neither chance nor a task that anything solves
    assert result.episode_accuracies.tolist() == pytest.approx(oracle, abs=1e-12)
    assert result.accuracy == pytest.approx(np.mean(oracle))
    half_width = 1.96 * np.std(oracle) / math.sqrt(30)
    assert result.interval == pytest.approx((np.mean(oracle) - half_width, np.mean(oracle) + half_width))


def test_an_episode_holds_distinct_images_of_distinct_classes() -> None:
    _, labels = draw(7, 25)
    episodes = draw_episodes(labels, FewShotConfig(num_episodes=50))
    assert episodes.shape == (50, 5, 20)
    for episode in episodes:
        assert len(episode.unique()) == 100
        classes = labels[episode]
        assert (classes == classes[:, :1]).all()
        assert len(classes[:, 0].unique()) == 5
    # Over many draws every image takes part, as support and as query.
    assert len(episodes[:, :, :5].unique()) == len(episodes[:, :, 5:].unique()) == 175


def test_more_episodes_only_append() -> None:
    _, labels = draw(6, 21)
    few = draw_episodes(labels, FewShotConfig(num_episodes=10, seed=1))
    assert torch.equal(few, draw_episodes(labels, FewShotConfig(num_episodes=25, seed=1))[:10])
    assert not torch.equal(few, draw_episodes(labels, FewShotConfig(num_episodes=10, seed=2)))


def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = draw(6, 30)
    config = FewShotConfig(num_episodes=11, normalization="L2N")
    whole = few_shot_classify(features, labels, config)
    monkeypatch.setattr(fewshot, "MAX_FEATURE_VALUES_IN_MEMORY", 4000)  # two episodes
    sliced = few_shot_classify(features, labels, config)
    assert torch.equal(sliced.episode_accuracies, whole.episode_accuracies)


def test_equal_features_give_chance_and_separated_ones_everything() -> None:
    features, labels = draw(8, 20)
    config = FewShotConfig(num_episodes=5, normalization="UN")
    collapsed = few_shot_classify(torch.ones_like(features), labels, config)
    assert collapsed.accuracy == pytest.approx(0.2)
    assert few_shot_classify(torch.eye(8)[labels], labels, config).interval == (1.0, 1.0)


def test_centring_undoes_a_common_offset() -> None:
    features, labels = draw(8, 30, noise=0.5)
    offset = torch.full((16,), 200.0, dtype=torch.float64)
    config = FewShotConfig(num_episodes=20)
    plain = few_shot_classify(features, labels, config, features.mean(dim=0))
    moved = few_shot_classify(features + offset, labels, config, features.mean(dim=0) + offset)
    assert plain.accuracy > 0.9
    assert torch.equal(moved.episode_accuracies, plain.episode_accuracies)


def test_too_few_classes_or_images_are_refused() -> None:
    features, labels = draw(5, 20)
    config = FewShotConfig(normalization="L2N")
    with pytest.raises(ValueError, match=r"classes must be >= 5 \(num_ways\), got 4"):
        few_shot_classify(features[labels < 4], labels[labels < 4], config)
    keep = torch.ones(100, dtype=torch.bool)
    keep[[3, 8, 2]] = False
    with pytest.raises(
        ValueError,
        match=r"must be >= 20 \(5 shots \+ 15 queries\), got 18 of class 3 \(2 of 5 classes have too few\)",
    ):
        few_shot_classify(features[keep], labels[keep], config)


def test_arguments_out_of_bounds_are_refused() -> None:
    features, labels = draw(5, 20)
    with pytest.raises(ValueError, match="base_mean must be given where fewshot.normalization is CL2N"):
        few_shot_classify(features, labels, FewShotConfig())
    with pytest.raises(ValueError, match=r"base_mean must be \[16\], got \[15\]"):
        few_shot_classify(features, labels, FewShotConfig(), torch.zeros(15))
    with pytest.raises(ValueError, match=r"labels must be \[100\], got \[99\]"):
        few_shot_classify(features, labels[1:], FewShotConfig())
    features[7, 0] = torch.nan
    with pytest.raises(ValueError, match="features must be finite, got a row 7 that is not"):
        few_shot_classify(features, labels, FewShotConfig(normalization="UN"))
    with pytest.raises(ValueError, match="fewshot.num_ways must be >= 2, got 1"):
        FewShotConfig(num_ways=1)
    with pytest.raises(ValueError, match="fewshot.normalization must be CL2N, L2N or UN, got l2"):
        FewShotConfig(normalization="l2")  # type: ignore[arg-type]  # what a config file may say
