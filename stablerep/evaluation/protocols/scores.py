"""Which scores an evaluation will give, so that requirements on others are refused before the work."""

from collections.abc import Iterator, Sequence

from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.protocols.probes import choose_numbers_of_neighbours, name_fewshot
from stablerep.evaluation.protocols.texts import JOINT_FEATURE, RETRIEVAL_RANKS
from stablerep.evaluation.requirements import ScoreKey
from stablerep.evaluation.sets import LabelledSet

_GEOMETRY = ("alignment", "lidar", "uniformity", "rankme")


def list_scores(
    config: EvaluateConfig, dataset: LabelledSet, protocols: Sequence[str], feature_names: Sequence[str]
) -> list[ScoreKey]:
    """Protocol, metric and feature of each row to come; a small set may lack some of them."""
    scores: list[ScoreKey] = []
    for protocol in protocols:
        features = _list_features(protocol, feature_names)
        for name, metric in _list_names(protocol, config, dataset):
            scores += [(name, metric, feature) for feature in features]
    return scores


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
        yield from (("zeroshot", metric) for metric in ("accuracy", "top5_accuracy"))
    elif protocol == "retrieval":
        for direction in ("image_to_text", "text_to_image"):
            yield from ((f"retrieval_{direction}", f"recall@{k}") for k in RETRIEVAL_RANKS)
    elif protocol == "geometry":
        yield from (("geometry", metric) for metric in _GEOMETRY)
    elif protocol == "robustness":
        yield from _list_robustness(config)
    else:
        yield protocol, "accuracy"


def _list_robustness(config: EvaluateConfig) -> Iterator[tuple[str, str]]:
    yield "robustness", "accuracy"
    yield "robustness_clean", "accuracy"
    for corruption in config.robustness.corruptions:
        yield f"robustness_{corruption}", "accuracy"
        for severity in config.robustness.severities:
            yield f"robustness_{corruption}_{severity}", "accuracy"
