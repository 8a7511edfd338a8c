"""How features lie on the sphere, and how many directions they use."""

import time
from typing import Any

from torch import Tensor

from stablerep.evaluation.geometry import alignment, lidar, rank_me, uniformity
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.results import Row

_DELTA = 1e-4
_T = 2.0


def run_geometry(evaluation: Evaluation) -> list[Row]:
    """Uniformity and RankMe of the test images; alignment and LiDAR where images share captions."""
    rows = []
    num_images, seed = evaluation.config.geometry.num_images, evaluation.config.seed
    for feature in evaluation.feature_names:
        start = time.perf_counter()
        x = evaluation.take("test", feature, evaluation.float64_device)
        found = _compare_captions(evaluation, x)
        if len(x) > 1:
            uniform = uniformity(x, t=_T, num_samples=num_images, seed=seed)
            found.append(("uniformity", uniform.value, uniform.num_features, {"t": _T, "seed": seed}))
        rank = rank_me(x, num_samples=num_images, seed=seed)
        found.append(("rankme", rank.value, rank.num_features, {"seed": seed}))
        seconds = time.perf_counter() - start
        rows += [
            Row("geometry", metric, value, None, "", n, "none", settings, feature, seconds)
            for metric, value, n, settings in found
        ]
    return rows


def _compare_captions(evaluation: Evaluation, x: Tensor) -> list[tuple[str, float, int, dict[str, Any]]]:
    """Metric, value, n and settings of what needs several images a caption."""
    found: list[tuple[str, float, int, dict[str, Any]]] = []
    if not evaluation.dataset.has_captions:
        return found
    captions = evaluation.features["test"].caption_labels.to(x.device)
    num_shared = int((captions.bincount() > 1).sum())
    if num_shared >= 1:
        aligned = alignment(x, captions)
        found.append(("alignment", aligned.value, aligned.num_pairs, {}))
    if num_shared >= 2:
        spread = lidar(x, captions, delta=_DELTA)
        found.append(("lidar", spread.value, spread.num_captions, {"delta": _DELTA}))
    return found
