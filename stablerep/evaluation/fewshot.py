"""Few-shot episodes: nearest-prototype classification of frozen features.

An episode draws `num_ways` classes and from each `num_shots` support and `num_queries_per_class` query
images, all distinct. With the prototype c_y, the mean of the prepared support features of class y,

    prediction(x) = argmin_y ‖x − c_y‖,        accuracy = mean over episodes of the share of right queries,

with the interval ± 1.96 · std / √episodes over the episodes' accuracies. How features are prepared:

    UN      x
    L2N     x / ‖x‖
    CL2N    (x − μ) / ‖x − μ‖,  μ the mean of the base features, which no episode draws from

Reference: Snell et al., Prototypical Networks (NeurIPS 2017), for the classifier; Wang et al., SimpleShot,
arXiv 1911.04623, for the three preparations, the 15 queries and the interval; Chen et al., A Closer Look at
Few-shot Classification (ICLR 2019), for the 600 episodes.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stablerep.evaluation.inputs import check_features, check_labels

MAX_FEATURE_VALUES_IN_MEMORY = 2**25  # 128 MiB of float32 features of episodes at a time


@dataclass(frozen=True)
class FewShotConfig:
    """Settings of the episodes; the defaults are the 5-way 5-shot protocol."""

    num_ways: int = 5
    """Classes of an episode."""
    num_shots: int = 5
    """Labelled (support) images a class."""
    num_queries_per_class: int = 15
    """Images to classify, a class."""
    num_episodes: int = 600
    """Episodes. 600 is the custom; 5000 narrows the interval almost threefold. The first 600 are the same."""
    normalization: Literal["CL2N", "L2N", "UN"] = "CL2N"
    """CL2N subtracts the mean of the base features and normalises, L2N normalises, UN leaves the features."""
    seed: int = 0
    """Seed of the draws, >= 0."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_ways", 2),
            ("num_shots", 1),
            ("num_queries_per_class", 1),
            ("num_episodes", 2),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"fewshot.{name} must be >= {least}, got {getattr(self, name)}")
        if self.normalization not in ("CL2N", "L2N", "UN"):
            raise ValueError(f"fewshot.normalization must be CL2N, L2N or UN, got {self.normalization}")


class FewShotResult(NamedTuple):
    """What `few_shot_classify` returns.

    Attributes:
        accuracy: Mean over the episodes, a fraction.
        interval: 95 % interval over the episodes, cut to [0, 1]. It says how well the mean over episodes *of
            these images* is known, not how the accuracy would vary with other images.
        episode_accuracies: Share of right queries of each episode, float64 [num_episodes].
    """

    accuracy: float
    interval: tuple[float, float]
    episode_accuracies: Tensor


def few_shot_classify(
    features: Tensor, labels: Tensor, config: FewShotConfig, base_mean: Tensor | None = None
) -> FewShotResult:
    """Accuracy of the nearest prototype over episodes, in float32 (float64 for float64 features).

    Of equally near prototypes the one drawn first wins; where all features are equal, the accuracy is chance.

    Args:
        features: Features of the images that episodes are drawn from.
        labels: Their class indices.
        config: The episodes.
        base_mean: Mean of the base features; needed with CL2N, and unused otherwise.

    Shapes:
        features [N, D], labels [N], base_mean [D].

    Returns:
        The mean accuracy, its 95 % interval, and the accuracy of each episode.

    Raises:
        ValueError: If the shapes do not match, a feature is not finite, `base_mean` is missing, or there are
            too few classes or images for an episode.

    Reference:
        Wang et al., SimpleShot, arXiv 1911.04623, section 3.
    """
    _check_features(features, labels, config, base_mean)
    if config.normalization != "CL2N":
        base_mean = None
    episodes = draw_episodes(labels, config).to(features.device)
    values_per_episode = episodes[0].numel() * features.shape[1]
    accuracies = torch.cat(
        [
            _classify_queries(_prepare(features[some], config, base_mean), config.num_shots)
            for some in episodes.split(max(1, MAX_FEATURE_VALUES_IN_MEMORY // values_per_episode))
        ]
    )
    mean = float(accuracies.mean())
    half_width = 1.96 * float(accuracies.std(correction=0)) / math.sqrt(len(accuracies))
    return FewShotResult(mean, (max(0.0, mean - half_width), min(1.0, mean + half_width)), accuracies.cpu())


def draw_episodes(labels: Tensor, config: FewShotConfig) -> Tensor:
    """The images of each episode; the first `num_shots` of each class are its support.

    Episode e depends on the labels, the seed and e alone, so more episodes only append.

    Args:
        labels: Class indices of the images.
        config: The episodes.

    Shapes:
        [N] -> int64 [num_episodes, num_ways, num_shots + num_queries_per_class]

    Raises:
        ValueError: If there are fewer classes than `num_ways`, or a class has too few images.
    """
    num_images = config.num_shots + config.num_queries_per_class
    classes = labels.cpu().numpy()
    names, counts = np.unique(classes, return_counts=True)
    if len(names) < config.num_ways:
        raise ValueError(f"few-shot classes must be >= {config.num_ways} (num_ways), got {len(names)}")
    if counts.min() < num_images:
        raise ValueError(
            f"few-shot images of each class must be >= {num_images} ({config.num_shots} shots + "
            f"{config.num_queries_per_class} queries), got {counts.min()} of class {names[counts.argmin()]} "
            f"({int((counts < num_images).sum())} of {len(names)} classes have too few)"
        )
    members = np.split(classes.argsort(kind="stable"), counts.cumsum()[:-1])
    episodes = np.empty((config.num_episodes, config.num_ways, num_images), dtype=np.int64)
    for index, episode in enumerate(episodes):
        random = np.random.default_rng((config.seed, index))
        for way, chosen in enumerate(random.choice(len(names), config.num_ways, replace=False)):
            episode[way] = random.choice(members[chosen], num_images, replace=False)
    return torch.from_numpy(episodes)


def _prepare(features: Tensor, config: FewShotConfig, base_mean: Tensor | None) -> Tensor:
    x = features if features.dtype == torch.float64 else features.float()
    if base_mean is not None:
        x = x - base_mean.to(x)
    return x if config.normalization == "UN" else F.normalize(x, dim=-1)


def _classify_queries(x: Tensor, num_shots: int) -> Tensor:
    """Share of right queries; [episodes, ways, shots + queries, D] -> [episodes]."""
    prototypes = x[:, :, :num_shots].mean(dim=2)  # [E, W, D]
    queries = x[:, :, num_shots:]
    # argmin ‖x − c‖ is argmax x·c − ½‖c‖².
    scores = torch.einsum("ewqd,evd->ewqv", queries, prototypes)
    scores = scores - 0.5 * prototypes.square().sum(dim=2)[:, None, None, :]
    own = torch.arange(x.shape[1], device=x.device)[None, :, None]
    return (scores.argmax(dim=3) == own).double().mean(dim=(1, 2))


def _check_features(
    features: Tensor, labels: Tensor, config: FewShotConfig, base_mean: Tensor | None
) -> None:
    check_features("features", features)
    check_labels("labels", labels, len(features))
    if config.normalization == "CL2N":
        if base_mean is None:
            raise ValueError("base_mean must be given where fewshot.normalization is CL2N, got None")
        if base_mean.shape != features.shape[1:]:
            raise ValueError(f"base_mean must be [{features.shape[1]}], got {list(base_mean.shape)}")
