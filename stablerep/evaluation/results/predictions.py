"""predictions.npz: what was answered for each example, and what is right.

It holds, in the order of the names,

    names                           the examples of the test split
    targets                         what is right for them
    predictions/PROTOCOL/FEATURE    what a protocol answered
    names/… and targets/…           those of a protocol with other examples, such as episodes or captions
    scores/…                        says that the predictions are scores, without targets

Every line of results.jsonl that has predictions names their key and the SHA-256 of what belongs to it, so
that a line never meets the predictions of another run.
"""

import dataclasses
import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stablerep.evaluation.results.rows import Row, RowKey


def collect_arrays(
    rows: Sequence[Row], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[RowKey, str]]:
    """The content of predictions.npz, and for each row with predictions its key there.

    Raises:
        ValueError: If two rows cannot be told apart, or predictions are not as many as the names.
    """
    arrays: dict[str, np.ndarray] = {"names": np.array(list(names), dtype=np.str_)}
    common = next((row.targets for row in rows if row.targets is not None and row.names is None), None)
    if common is not None:
        arrays["targets"] = _shrink(common)
    keys: dict[RowKey, str] = {}
    stored: dict[str, Row] = {}
    seen: set[RowKey] = set()
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


def digest_arrays(arrays: Mapping[str, np.ndarray], key: str) -> str:
    """SHA-256 of the names, targets and predictions that belong to a key."""
    digest = hashlib.sha256()
    for name, array in _find_arrays(arrays, key).items():
        digest.update(f"{name} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of the file; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The content of the file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def attach_arrays(row: Row, arrays: Mapping[str, np.ndarray], key: str, digest: str) -> Row:
    """The row with its predictions, targets and names.

    Raises:
        ValueError: If there are none, or others than those of this digest.
    """
    if f"predictions/{key}" not in arrays:
        raise ValueError(f"predictions.npz has no '{key}'")
    if (found := digest_arrays(arrays, key)) != digest:
        raise ValueError(
            f"'{key}' in predictions.npz is of another run: sha256 must be {digest[:12]}, got {found[:12]}"
        )
    own = _find_arrays(arrays, key)
    return dataclasses.replace(
        row,
        predictions=own["predictions"],
        targets=own.get("targets"),
        names=tuple(map(str, own["names"])),
    )


def _find_arrays(arrays: Mapping[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    """Its own arrays, and the run's where it has none; scores have no targets."""
    is_score = f"scores/{key}" in arrays
    found = {}
    for name in ("names", "predictions") if is_score else ("names", "predictions", "targets"):
        array = arrays.get(f"{name}/{key}", arrays.get(name))
        if array is not None:
            found[name] = array
    return found


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
