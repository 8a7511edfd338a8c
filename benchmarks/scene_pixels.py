"""What can be read in a rendered scene without learning: the floor under the demo's scores.

    python benchmarks/scene_pixels.py [--num_train 2000] [--num_test 1000] [--seed 0]

Each attribute of one-object scenes, from 16 × 16 averaged pixels and from a histogram of colours (four
levels a channel, square roots of the shares), by scikit-learn's ridge classifier (the best of five penalties
on the test scenes, which flatters it) and by 20 nearest neighbours in cosine distance.

Writes benchmarks/results/scene_pixels.md.
"""

from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

from data_gen.scene_rendering import render
from data_gen.scenes import CATEGORIES, attributes_of, sample_scene, scene_rng

RESULTS = Path(__file__).parent / "results"
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
NUM_LEVELS = 4


def measure(num_train: int = 2000, num_test: int = 1000, seed: int = 0) -> None:
    """Measure and print; see the module.

    Args:
        num_train: Rendered scenes on which the classifiers are fitted.
        num_test: Others, on which they are tested.
        seed: Seed of the scenes.
    """
    pictures, attributes = [], []
    for index in tqdm(range(num_train + num_test), "render"):
        rng = scene_rng(seed, "scene-pixels", index)
        scene = sample_scene(rng, num_objects=1)
        pictures.append(render(scene, rng))
        attributes.append(attributes_of(scene))
    images = np.stack(pictures)
    features = {"16 × 16 pixels": average_pixels(images), "histogram of colours": count_colours(images)}
    lines = [
        f"{num_train:,} training and {num_test:,} test scenes, seed {seed}; accuracy, %.",
        "",
        "| attribute (values) | " + " | ".join(f"{name}: linear, k-NN" for name in features) + " |",
        "|---|" + "---|" * len(features),
    ]
    for attribute, values in CATEGORIES.items():
        labels = np.array([found[attribute] for found in attributes])
        scores = [score(some, labels, num_train) for some in features.values()]
        cells = [f"{100 * linear:.1f}, {100 * knn:.1f}" for linear, knn in scores]
        lines.append(f"| {attribute} ({len(values)}) | " + " | ".join(cells) + " |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scene_pixels.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def average_pixels(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Means of squares of 4 × 4 pixels: uint8 [N, 64, 64, 3] -> [N, 768] in [0, 1]."""
    return (images.reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4)) / 255).reshape(len(images), -1)


def count_colours(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Square roots of the shares of 4³ colours: uint8 [N, 64, 64, 3] -> [N, 64], each row of length 1."""
    levels = images.astype(np.int64) * NUM_LEVELS // 256
    colours = levels @ np.array([NUM_LEVELS**2, NUM_LEVELS, 1])
    counts = [np.bincount(some.ravel(), minlength=NUM_LEVELS**3) for some in colours]
    return np.sqrt(np.array(counts) / colours[0].size)


def score(features: NDArray[np.float64], labels: NDArray[np.str_], num_train: int) -> tuple[float, float]:
    """Accuracy on the rows behind `num_train`: (linear, k-NN)."""
    train, test = features[:num_train], features[num_train:]
    probes = (RidgeClassifier(alpha=penalty).fit(train, labels[:num_train]) for penalty in PENALTIES)
    linear = max(probe.score(test, labels[num_train:]) for probe in probes)
    neighbours = KNeighborsClassifier(20, metric="cosine").fit(train, labels[:num_train])
    return linear, neighbours.score(test, labels[num_train:])


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
