"""The scores as Hugging Face `model-index`, which the hub shows beside a model card.

Reference: the model card specification, https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from stablerep.evaluation.formats import describe_metric, describe_protocol, write_as_heading
from stablerep.evaluation.results import Provenance, Row

_TASKS = {
    "zeroshot": ("zero-shot-image-classification", "Zero-shot image classification"),
    "retrieval": ("image-feature-extraction", "Image–text retrieval"),
    "geometry": ("image-feature-extraction", "Geometry of the features"),
}
_PROBE = ("image-classification", "Classification from frozen features")


def build_eval_results(
    rows: Sequence[Row],
    provenance: Provenance,
    *,
    dataset_type: str | None = None,
    dataset_name: str | None = None,
    split: str = "test",
) -> list[EvalResult]:
    """The rows as huggingface_hub has them, for `ModelCardData(eval_results=…)`.

    Args:
        rows: The scores.
        provenance: What they share.
        dataset_type: The dataset's id on the hub; the last part of the data's name if it has none, so that no
            folder of this machine is published.
        dataset_name: Its name for people; `dataset_type` if not given.
        split: On which the scores were computed.
    """
    data = dataset_type or PurePath(provenance.data).name or provenance.data
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=data,
            dataset_name=dataset_name or data,
            dataset_split=split,
            dataset_args={"fingerprint": provenance.hashes["data"]},
            metric_type=row.metric,
            metric_name=_name_score(row),
            metric_value=row.value,
            metric_args=_describe_score(row),
        )
        for row in rows
        for task_type, task_name in [_find_task(row.protocol)]
    ]


def build_model_index(
    rows: Sequence[Row],
    provenance: Provenance,
    *,
    model_name: str,
    dataset_type: str | None = None,
    dataset_name: str | None = None,
    split: str = "test",
) -> str:
    """The rows as YAML with the one key `model-index`, for the head of a model card.

    Args:
        rows: The scores.
        provenance: What they share.
        model_name: Name of the model on its card.
        dataset_type: The dataset's id on the hub.
        dataset_name: Its name for people.
        split: On which the scores were computed.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("a model-index needs at least one row")
    results = build_eval_results(
        rows, provenance, dataset_type=dataset_type, dataset_name=dataset_name, split=split
    )
    return ModelCardData(model_name=model_name, eval_results=results).to_yaml() + "\n"


def _find_task(protocol: str) -> tuple[str, str]:
    return next((task for prefix, task in _TASKS.items() if protocol.startswith(prefix)), _PROBE)


def _name_score(row: Row) -> str:
    title = write_as_heading(describe_protocol(row.protocol))
    return f"{title}: {describe_metric(row.metric).title} ({row.feature})"


def _describe_score(row: Row) -> dict[str, Any]:
    described: dict[str, Any] = {
        "protocol": row.protocol,
        "feature": row.feature,
        "n": row.n,
        "chosen_on": row.selection,
    }
    if row.interval is not None:
        described |= {
            "interval": [float(bound) for bound in row.interval],
            "interval_method": row.interval_method,
        }
    if row.hyperparameters.get("views_cached") is not None or row.hyperparameters.get("comparable") is False:
        described["comparable_with_published"] = False
    return described
