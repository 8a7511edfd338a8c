"""Scores on disk: `results.jsonl`, a score a line, and `predictions.npz`, what they were computed from.

Each line stands for itself: it says what was measured, on what, with which weights and libraries, so that
lines of many runs can be put into one file. `predictions.npz` holds, in the order of the names,

    names                           the examples of the test split
    targets                         what is right for them
    predictions/PROTOCOL/FEATURE    what a protocol answered
    names/… and targets/…           those of a protocol with other examples, such as episodes or captions
    scores/…                        says that the predictions are scores, without targets

and every line that has predictions names its key and the file's SHA-256, so that a line never meets the
predictions of another run.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

SCHEMA_VERSION = 1
RESULTS_FILE, PREDICTIONS_FILE = "results.jsonl", "predictions.npz"
HASH_NAMES = ("weights", "data", "transform")
_ARRAY_KINDS = "biuf"  # bool, integers, floats: what a reader needs no pickle for


@dataclass(frozen=True)
class Row:
    """One score of one protocol on one feature.

    Args:
        protocol: Such as `knn20`, `linear_paper`, `geometry`.
        metric: Such as `accuracy`, `mean_per_class_accuracy`, `map11`, `recall@1`, `alignment`.
        value: The score; accuracies and the like are fractions in [0, 1].
        interval: Its bounds; None if it has none.
        interval_method: How the bounds were found, such as `Wilson, 95 %`; empty without bounds.
        n: Examples, episodes or pairs that the value is over.
        selection: The split on which hyper-parameters were chosen; `none` if nothing was chosen.
        hyperparameters: What was set and what was chosen, in plain types.
        feature: Such as `cls`, `patch_mean`.
        seconds: Time of the protocol; rows of one protocol share it.
        predictions: What was answered for each example. Without targets: a score for each example (whether a
            retrieval hit, the accuracy of an episode), whose mean is the value.
        targets: What is right for each example.
        names: Names of the examples, where they are not the run's test images.

    Shapes:
        predictions [N] or [N, C], targets [N] or [N, C], names [N]; numbers or bool.

    Raises:
        ValueError: If a field is out of its bounds.
    """

    protocol: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    interval_method: str
    n: int
    selection: str
    hyperparameters: Mapping[str, Any]
    feature: str
    seconds: float
    predictions: np.ndarray | None = field(default=None, repr=False, compare=False)
    targets: np.ndarray | None = field(default=None, repr=False, compare=False)
    names: Sequence[str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("protocol", "metric", "selection", "feature"):
            if not getattr(self, name):
                raise ValueError(f"{name} of a row must not be empty")
        where = f"{self.protocol} {self.metric}"
        if not math.isfinite(self.value):
            raise ValueError(f"{where}: value must be finite, got {self.value}")
        if self.interval is not None:
            low, high = self.interval
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"{where}: interval must be (low, high), got ({low}, {high})")
        if self.n < 1:
            raise ValueError(f"{where}: n must be >= 1, got {self.n}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"{where}: seconds must be >= 0, got {self.seconds}")
        self._check_arrays(where)

    def _check_arrays(self, where: str) -> None:
        if self.predictions is None:
            if self.targets is not None or self.names is not None:
                raise ValueError(f"{where}: targets and names come with predictions")
            return
        for name in ("predictions", "targets"):
            array = getattr(self, name)
            if array is None:
                continue
            if array.dtype.kind not in _ARRAY_KINDS:
                raise ValueError(f"{where}: {name} must be numbers or bool, got {array.dtype}")
            if array.ndim not in (1, 2):
                raise ValueError(f"{where}: {name} must be [N] or [N, C], got {list(array.shape)}")
        for name in ("targets", "names"):
            found = getattr(self, name)
            if found is not None and len(found) != len(self.predictions):
                raise ValueError(
                    f"{where}: {name} must be as many as predictions, {len(self.predictions)}, "
                    f"got {len(found)}"
                )

    @property
    def key(self) -> tuple[str, str, str]:
        """Protocol, metric and feature: what tells the rows of a run apart."""
        return self.protocol, self.metric, self.feature


@dataclass(frozen=True)
class Provenance:
    """What the rows of one run share.

    Args:
        model: What was evaluated, as the user gave it.
        data: What it was evaluated on, as the user gave it.
        transform: The evaluation transform in words.
        hashes: SHA-256 of `weights`, `data` and `transform`; more may stand beside them.
        versions: Library → version.

    Raises:
        ValueError: If a hash is missing.
    """

    model: str
    data: str
    transform: str
    hashes: Mapping[str, str]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        missing = [name for name in HASH_NAMES if not self.hashes.get(name)]
        if missing:
            raise ValueError(f"hashes must name {', '.join(HASH_NAMES)}; missing: {', '.join(missing)}")


class Record(NamedTuple):
    """A row and where it is from."""

    row: Row
    provenance: Provenance


@dataclass(frozen=True)
class Results:
    """A run, read back: its rows with their predictions.

    Args:
        folder: Where it was read.
        provenance: What the rows share.
        rows: In the order in which they were written; each has its names, if it has predictions.
        names: The test images.
    """

    folder: Path
    provenance: Provenance
    rows: tuple[Row, ...]
    names: tuple[str, ...]


def check_folder(folder: str | Path, provenance: Provenance) -> None:
    """Refuses a folder that holds the results of another run; to be called before the work, too.

    Raises:
        ValueError: If its results.jsonl is of other weights, data or transform, or cannot be read.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        return
    for record in read_records(path):
        for name in HASH_NAMES:
            found, expected = record.provenance.hashes[name], provenance.hashes[name]
            if found != expected:
                raise ValueError(
                    f"{path} holds results of other {name} ({found[:12]}, now {expected[:12]}): "
                    "name another folder"
                )


def write_results(
    folder: str | Path,
    rows: Sequence[Row],
    provenance: Provenance,
    names: Sequence[str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes results.jsonl and predictions.npz, each whole or not at all; those of the same run are replaced.

    Args:
        folder: Where; it exists.
        rows: The scores, no two with the same protocol, metric and feature.
        provenance: What they share.
        names: Names of the test images, in the order of the predictions.
        overwrite: Replace the results of another run, too.

    Raises:
        ValueError: If there is no row, two rows cannot be told apart, predictions are not as many as the
            names, hyper-parameters are not plain, or the folder holds another run.
        OSError: If a file cannot be written; the old ones stay.
    """
    folder = Path(folder)
    if not rows:
        raise ValueError("there are no rows to write")
    if not overwrite:
        check_folder(folder, provenance)
    arrays, keys = _collect_arrays(rows, names)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    predictions = buffer.getvalue()
    digest = hashlib.sha256(predictions).hexdigest()
    lines = [_to_line(row, provenance, keys.get(row.key), digest) for row in rows]
    # The lines name the digest of the predictions: a kill between the two is seen when they are read.
    replace_file(folder / PREDICTIONS_FILE, predictions)
    replace_file(folder / RESULTS_FILE, "".join(lines).encode())


def read_records(path: str | Path) -> list[Record]:
    """Every line of a results.jsonl, of one run or of many, without predictions.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is none of this version; the message names the file and the line.
    """
    return [Record(line.row, line.provenance) for line in _read_lines(Path(path))]


def read_results(folder: str | Path) -> Results:
    """A run with its predictions.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is none of this version, lines are of several runs, or predictions.npz is not
            the file that they name.
    """
    folder = Path(folder)
    path = folder / RESULTS_FILE
    lines = _read_lines(path)
    if not lines:
        raise ValueError(f"{path} has no rows")
    for line in lines[1:]:
        if line.provenance.hashes != lines[0].provenance.hashes:
            raise ValueError(f"{path}, line {line.number}: is of another run than line {lines[0].number}")
    arrays = _read_arrays(folder / PREDICTIONS_FILE, lines) if any(line.key for line in lines) else {}
    names = tuple(map(str, arrays.get("names", ())))
    rows = tuple(_attach_arrays(line, arrays, names, path) for line in lines)
    return Results(folder, lines[0].provenance, rows, names)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: under another name in its folder, then renamed.

    Raises:
        OSError: If it cannot be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _Line(NamedTuple):
    number: int
    row: Row
    provenance: Provenance
    key: str | None
    digest: str | None


def _collect_arrays(
    rows: Sequence[Row], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[tuple[str, str, str], str]]:
    """The content of predictions.npz, and for each row with predictions its key there."""
    arrays: dict[str, np.ndarray] = {"names": np.array(list(names), dtype=np.str_)}
    common = next((row.targets for row in rows if row.targets is not None and row.names is None), None)
    if common is not None:
        arrays["targets"] = _shrink(common)
    keys: dict[tuple[str, str, str], str] = {}
    stored: dict[str, Row] = {}
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        if row.key in seen:
            raise ValueError(f"two rows are {row.protocol} {row.metric} of {row.feature}")
        seen.add(row.key)
        if row.predictions is None:
            continue
        if row.names is None and len(row.predictions) != len(names):
            raise ValueError(
                f"{row.protocol} {row.metric}: predictions must be as many as the names, {len(names)}, "
                f"got {len(row.predictions)}"
            )
        key = f"{row.protocol}/{row.feature}"
        if key in stored and not _share_arrays(stored[key], row):
            key = f"{key}/{row.metric}"
        if key not in stored:
            _add_arrays(arrays, row, key)
            stored[key] = row
        keys[row.key] = key
    return arrays, keys


def _add_arrays(arrays: dict[str, np.ndarray], row: Row, key: str) -> None:
    """Adds what a row needs; targets that are the run's are not repeated."""
    assert row.predictions is not None
    arrays[f"predictions/{key}"] = _shrink(row.predictions)
    if row.targets is None:
        arrays[f"scores/{key}"] = np.array(True)  # the predictions are scores, which have no targets
    elif not _are_equal(arrays.get("targets"), row.targets):
        arrays[f"targets/{key}"] = _shrink(row.targets)
    if row.names is not None:
        arrays[f"names/{key}"] = np.array(list(row.names), dtype=np.str_)


def _share_arrays(a: Row, b: Row) -> bool:
    """Whether two rows are metrics of the same predictions."""
    return (
        _are_equal(a.predictions, b.predictions)
        and _are_equal(a.targets, b.targets)
        and (a.names is None) == (b.names is None)
        and list(a.names or ()) == list(b.names or ())
    )


def _are_equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    kinds = {"u": "i"}  # what is stored may be shrunk
    return kinds.get(a.dtype.kind, a.dtype.kind) == kinds.get(b.dtype.kind, b.dtype.kind) and np.array_equal(
        a, b
    )


def _shrink(array: np.ndarray) -> np.ndarray:
    """Integers in the smallest type that holds them all."""
    if array.dtype.kind not in "iu" or array.size == 0:
        return array
    dtype = np.promote_types(np.min_scalar_type(int(array.min())), np.min_scalar_type(int(array.max())))
    return array.astype(dtype)


def _to_line(row: Row, provenance: Provenance, key: str | None, digest: str) -> str:
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


def _read_lines(path: Path) -> list[_Line]:
    lines = []
    with open(path, encoding="utf-8") as file:
        try:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    lines.append(_parse_line(text, number, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text") from error
    return lines


def _parse_line(text: str, number: int, where: str) -> _Line:
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
            **{name: content[name] for name in _ROW_FIELDS},
            interval=None if interval is None else (float(interval[0]), float(interval[1])),
        )
        provenance = Provenance(**{name: content[name] for name in _PROVENANCE_FIELDS})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    predictions = content["predictions"] or {}
    return _Line(number, row, provenance, predictions.get("key"), predictions.get("sha256"))


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


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
    "hyperparameters": ("an object", lambda value: isinstance(value, dict)),
    "transform": ("text", _is_text),
    "hashes": ("an object of texts", _is_object_of_texts),
    "versions": ("an object of texts", _is_object_of_texts),
    "seconds": ("a number", _is_number),
    "predictions": ("an object with key and sha256, or null", _is_reference),
}
_PROVENANCE_FIELDS = ("model", "data", "transform", "hashes", "versions")
_ROW_FIELDS = (
    "protocol",
    "metric",
    "value",
    "interval_method",
    "n",
    "selection",
    "hyperparameters",
    "feature",
    "seconds",
)


def _read_arrays(path: Path, lines: Sequence[_Line]) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for line in lines:
        if line.digest is not None and line.digest != digest:
            raise ValueError(
                f"{path} is not the file that {path.with_name(RESULTS_FILE)}, line {line.number}, names: "
                f"sha256 must be {line.digest[:12]}, got {digest[:12]}"
            )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def _attach_arrays(line: _Line, arrays: Mapping[str, np.ndarray], names: tuple[str, ...], path: Path) -> Row:
    """The row of a line with its predictions, targets and names."""
    if line.key is None:
        return line.row
    if f"predictions/{line.key}" not in arrays:
        raise ValueError(f"{path}, line {line.number}: {PREDICTIONS_FILE} has no '{line.key}'")
    own_names = arrays.get(f"names/{line.key}")
    fields = {name: getattr(line.row, name) for name in (*_ROW_FIELDS, "interval")}
    is_score = f"scores/{line.key}" in arrays
    try:
        return Row(
            **fields,
            predictions=arrays[f"predictions/{line.key}"],
            targets=None if is_score else arrays.get(f"targets/{line.key}", arrays.get("targets")),
            names=names if own_names is None else tuple(map(str, own_names)),
        )
    except ValueError as error:
        raise ValueError(f"{path}, line {line.number}: {error}") from error
