"""From features to scores: each protocol of `stablerep evaluate`, as rows of results.jsonl.

linear.py       the paper's probe on augmented views; computes features of its own, on all ranks
robustness.py   k-NN on corrupted test images; likewise
probes.py       logreg, knn, ridge, fewshot on features that were computed once, for each feature
texts.py        zeroshot, retrieval in the space of images and texts
geometry.py     alignment, uniformity, RankMe, LiDAR
checks.py       what a protocol needs of the model and the set, known before the work
scores.py       which scores it will give
"""

import dataclasses
from collections.abc import Callable

from stablerep.evaluation.protocols.checks import OptionError, check_protocol, describe_limits
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.geometry import run_geometry
from stablerep.evaluation.protocols.linear import run_linear
from stablerep.evaluation.protocols.probes import run_fewshot, run_knn, run_logreg, run_ridge
from stablerep.evaluation.protocols.robustness import run_robustness
from stablerep.evaluation.protocols.rows import sort_rows
from stablerep.evaluation.protocols.scores import describe_settings, list_scores
from stablerep.evaluation.protocols.texts import run_retrieval, run_zeroshot
from stablerep.evaluation.results import Row

__all__ = [
    "COLLECTIVE_PROTOCOLS",
    "Evaluation",
    "OptionError",
    "check_protocol",
    "describe_limits",
    "describe_settings",
    "list_scores",
    "run_protocol",
    "sort_rows",
]

_PROTOCOLS: dict[str, Callable[[Evaluation], list[Row]]] = {
    "linear": run_linear,
    "logreg": run_logreg,
    "knn": run_knn,
    "ridge": run_ridge,
    "fewshot": run_fewshot,
    "zeroshot": run_zeroshot,
    "retrieval": run_retrieval,
    "geometry": run_geometry,
    "robustness": run_robustness,
}
COLLECTIVE_PROTOCOLS = ("linear", "robustness", "zeroshot", "retrieval")
"""Those that every rank takes part in."""


def run_protocol(name: str, evaluation: Evaluation) -> list[Row]:
    """The rows of one protocol, on rank 0; of a collective one each rank calls it, and others get none."""
    settings = describe_settings(evaluation.config, evaluation.dataset, name)
    return [dataclasses.replace(row, settings=settings) for row in _PROTOCOLS[name](evaluation)]
