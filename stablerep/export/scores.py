"""The figures of `stablerep evaluate` that are of the exported weights."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablerep.evaluation.results import RESULTS_FILE, Provenance, Record, Row, read_records
from stablerep.loading import LoadedModel

_FORMER_RESULTS_FILE = "results.json"
_CLASS_TOKEN = "cls"


def read_scores(path_text: str, model: LoadedModel, checkpoint: str, *, ema: bool) -> list[Record]:
    """The rows of a results file that are of these weights.

    Args:
        path_text: results.jsonl, or results.json as earlier versions wrote it, or the folder of either.
        model: What is exported.
        checkpoint: Its file.
        ema: Whether it is the moving average of that file's weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or has no row of these weights.
    """
    path = _find_file(Path(path_text))
    if path.suffix == ".json":
        return _read_former(path, model, checkpoint, ema)
    records = read_records(path)
    own = [record for record in records if record.provenance.hashes["weights"] == model.digest]
    if not own:
        found = ", ".join(dict.fromkeys(record.provenance.hashes["weights"][:12] for record in records))
        raise ValueError(
            f"results {path} has no row of these weights ({model.digest[:12]}); its rows are of "
            f"{found or 'none'}"
        )
    return own


def _find_file(path: Path) -> Path:
    names = (RESULTS_FILE, _FORMER_RESULTS_FILE)
    candidates = [path / name for name in names] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"results {path} does not exist, or holds neither {' nor '.join(names)}")


def _read_former(path: Path, model: LoadedModel, checkpoint: str, ema: bool) -> list[Record]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        evaluated, data = content["checkpoint"], content["data"]
        provenance = Provenance(
            model=str(evaluated["path"]),
            data=str(data["path"]),
            transform=str(content["transform"]["evaluation"]),
            hashes={
                "weights": model.digest,
                "data": str(data["fingerprint"]),
                "transform": hashlib.sha256(str(content["transform"]["evaluation"]).encode()).hexdigest(),
            },
            versions=content.get("versions", {}),
        )
        rows = [_to_row(score) for score in content["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"results {path} is not of stablerep evaluate: {type(error).__name__} {error}"
        ) from error
    with open(checkpoint, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    of_average = bool(evaluated.get("ema", False))
    if evaluated.get("sha256") != sha256 or evaluated.get("random_init") or of_average != ema:
        raise ValueError(
            f"results {path} has no row of these weights: it is of {evaluated['path']}, sha256 "
            f"{str(evaluated.get('sha256'))[:12]}, random_init {bool(evaluated.get('random_init'))}, ema "
            f"{of_average}"
        )
    return [Record(row, provenance) for row in rows]


def _to_row(score: dict[str, Any]) -> Row:
    interval: Sequence[float] | None = score.get("interval")
    return Row(
        protocol=score["name"],
        metric=score["metric"],
        value=float(score["value"]),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
        interval_method=score.get("interval_method", ""),
        n=int(score["n"]),
        selection=score["selection"],
        hyperparameters=score.get("hyperparameters", {}),
        feature=_CLASS_TOKEN,
        seconds=float(score["seconds"]),
    )
