"""A row as a line of results.jsonl, and back."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from stablerep.evaluation.results.rows import Provenance, Row

SCHEMA_VERSION = 2


class Line(NamedTuple):
    """A line that was read.

    Attributes:
        number: Its number in the file, from 1.
        row: The score, without its arrays.
        provenance: What it was computed from.
        key: Of its arrays in predictions.npz; None if it has none.
        digest: Their SHA-256.
    """

    number: int
    row: Row
    provenance: Provenance
    key: str | None
    digest: str | None


def write_line(row: Row, provenance: Provenance, key: str | None, digest: str | None) -> str:
    """The line of a row, whose arrays have this key and SHA-256 in predictions.npz.

    Raises:
        ValueError: If a hyper-parameter or setting is not plain.
    """
    where = f"{row.protocol} {row.metric}"
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": provenance.model,
        "data": provenance.data,
        "protocol": row.protocol,
        "metric": row.metric,
        "feature": row.feature,
        "value": float(row.value),
        "interval": None if row.interval is None else [float(bound) for bound in row.interval],
        "interval_method": row.interval_method,
        "n": int(row.n),
        "selection": row.selection,
        "hyperparameters": to_plain(row.hyperparameters, f"{where}: hyperparameters"),
        "settings": to_plain(row.settings, f"{where}: settings"),
        "transform": provenance.transform,
        "hashes": dict(provenance.hashes),
        "versions": dict(provenance.versions),
        "seconds": round(float(row.seconds), 3),
        "predictions": None if key is None else {"key": key, "sha256": digest},
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def to_plain(value: Any, where: str) -> Any:
    """The value in the types of JSON: numbers of NumPy and torch as numbers, tuples as lists, paths as text.

    Raises:
        ValueError: If there is no such type, or a number is not finite; the message begins with `where`.
    """
    if isinstance(value, Mapping):
        return {str(name): to_plain(inner, f"{where}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner, where) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} must be a plain value, got {type(value).__name__}")


def read_lines(path: Path) -> list[Line]:
    """Every line of a results.jsonl.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is none of this version; the message names the file and the line.
    """
    lines = []
    with open(path, encoding="utf-8") as file:
        try:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    lines.append(_parse_line(text, number, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text") from error
    return lines


def _parse_line(text: str, number: int, where: str) -> Line:
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be an object, got {type(content).__name__}")
    if content.get("schema_version") != SCHEMA_VERSION:
        version = content.get("schema_version")
        raise ValueError(f"{where}: schema_version must be {SCHEMA_VERSION}, got {version}")
    for name, (kind, is_right) in _FIELDS.items():
        if name not in content:
            raise ValueError(f"{where}: has no {name}")
        if not is_right(content[name]):
            raise ValueError(f"{where}: {name} must be {kind}, got {json.dumps(content[name])[:80]}")
    try:
        interval = content["interval"]
        row = Row(
            **{name: content[name] for name in ROW_FIELDS},
            interval=None if interval is None else (float(interval[0]), float(interval[1])),
        )
        provenance = Provenance(**{name: content[name] for name in _PROVENANCE_FIELDS})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    predictions = content["predictions"] or {}
    return Line(number, row, provenance, predictions.get("key"), predictions.get("sha256"))


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))


def _is_object_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_reference(value: Any) -> bool:
    return value is None or (_is_object_of_texts(value) and {"key", "sha256"} <= value.keys())


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("text", _is_text),
    "data": ("text", _is_text),
    "protocol": ("text", _is_text),
    "metric": ("text", _is_text),
    "feature": ("text", _is_text),
    "value": ("a number", _is_number),
    "interval": ("two numbers or null", _is_interval),
    "interval_method": ("text", _is_text),
    "n": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "selection": ("text", _is_text),
    "hyperparameters": ("an object", _is_object),
    "settings": ("an object", _is_object),
    "transform": ("text", _is_text),
    "hashes": ("an object of texts", _is_object_of_texts),
    "versions": ("an object of texts", _is_object_of_texts),
    "seconds": ("a number", _is_number),
    "predictions": ("an object with key and sha256, or null", _is_reference),
}
_PROVENANCE_FIELDS = ("model", "data", "transform", "hashes", "versions")
ROW_FIELDS = (
    "protocol",
    "metric",
    "value",
    "interval_method",
    "n",
    "selection",
    "hyperparameters",
    "feature",
    "seconds",
    "settings",
)
