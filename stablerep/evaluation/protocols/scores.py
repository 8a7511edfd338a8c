"""Which scores an evaluation will give, so that requirements on others are refused before the work."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.protocols.probes import choose_numbers_of_neighbours, name_fewshot
from stablerep.evaluation.protocols.robustness import list_means
from stablerep.evaluation.protocols.texts import JOINT_FEATURE, RETRIEVAL_RANKS, read_class_names
from stablerep.evaluation.requirements import ScoreKey
from stablerep.evaluation.sets import LabelledSet

_SHARED_SETTINGS = ("precision", "storage", "seed")
_IN_THE_NAME = ("knn.k",)
_MANY = 5  # classes, up to which the right one is always among the first five


def list_scores(
    config: EvaluateConfig, dataset: LabelledSet, protocols: Sequence[str], feature_names: Sequence[str]
) -> list[ScoreKey]:
    """Protocol, metric and feature of each row to come."""
    scores: list[ScoreKey] = []
    for protocol in protocols:
        features = _list_features(protocol, feature_names)
        for name, metric in _list_names(protocol, config, dataset):
            scores += [(name, metric, feature) for feature in features]
    return scores


def describe_settings(config: EvaluateConfig, dataset: LabelledSet, protocol: str) -> dict[str, Any]:
    """What the scores of a protocol depend on beside model and images, such as `linear.num_epochs`."""
    own = asdict(getattr(config, protocol)) if hasattr(config, protocol) else {}
    named = {f"{protocol}.{name}": value for name, value in own.items()}
    if protocol == "zeroshot":
        names = "\n".join(read_class_names(config, dataset))
        named["zeroshot.class_names"] = f"sha256 {hashlib.sha256(names.encode()).hexdigest()[:16]}"
    if protocol == "robustness":
        named["knn.temperature"] = config.knn.temperature
    shared = {name: getattr(config, name) for name in _SHARED_SETTINGS}
    return {name: value for name, value in (named | shared).items() if name not in _IN_THE_NAME}


def _list_features(protocol: str, feature_names: Sequence[str]) -> Sequence[str]:
    if protocol in ("linear", "robustness"):
        return ["cls"]
    return [JOINT_FEATURE] if protocol in ("zeroshot", "retrieval") else feature_names


def _list_names(protocol: str, config: EvaluateConfig, dataset: LabelledSet) -> Iterator[tuple[str, str]]:
    """Names and metrics of a protocol's rows."""
    if protocol == "linear":
        for norm in ("", "_bn"):
            yield from ((f"linear{norm}_{chosen}", "accuracy") for chosen in ("paper", "heldout"))
    elif protocol == "logreg":
        one_class = ("accuracy", "mean_per_class_accuracy")
        yield from (
            ("logreg", metric) for metric in (("map11",) if dataset.targets == "multilabel" else one_class)
        )
    elif protocol == "knn":
        numbers = choose_numbers_of_neighbours(config.knn.k, len(dataset.train))
        yield from ((f"knn{k}", "accuracy") for k in numbers)
    elif protocol == "fewshot":
        yield name_fewshot(config.fewshot), "accuracy"
    elif protocol == "zeroshot":
        yield "zeroshot", "accuracy"
        if len(dataset.classes) > _MANY:
            yield "zeroshot", "top5_accuracy"
    elif protocol == "retrieval":
        num_texts = len({caption for image in dataset.test for caption in image.captions})
        ranks = [k for k in RETRIEVAL_RANKS if k <= min(num_texts, len(dataset.test))]
        for direction in ("image_to_text", "text_to_image"):
            yield from ((f"retrieval_{direction}", f"recall@{k}") for k in ranks)
    elif protocol == "geometry":
        yield from (("geometry", metric) for metric in _list_geometry(dataset))
    elif protocol == "robustness":
        yield from _list_robustness(config)
    else:
        yield protocol, "accuracy"


def count_shared_captions(dataset: LabelledSet) -> int:
    """Captions that several test images have: alignment needs one, LiDAR two."""
    if not dataset.has_captions:
        return 0
    counts = Counter(image.caption_id for image in dataset.test)
    return sum(count > 1 for count in counts.values())


def _list_geometry(dataset: LabelledSet) -> Iterator[str]:
    num_shared = count_shared_captions(dataset)
    if num_shared >= 1:
        yield "alignment"
    if num_shared >= 2:
        yield "lidar"
    if len(dataset.test) > 1:
        yield "uniformity"
    yield "rankme"


def _list_robustness(config: EvaluateConfig) -> Iterator[tuple[str, str]]:
    yield "robustness_clean", "accuracy"
    yield from ((name, "accuracy") for name in list_means(config.robustness))
    for corruption in config.robustness.corruptions:
        yield f"robustness_{corruption}", "accuracy"
        for severity in config.robustness.severities:
            yield f"robustness_{corruption}_{severity}", "accuracy"
