"""Scores in a folder."""

import dataclasses
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablerep.evaluation.results.lines import Line, read_lines, to_plain, write_line
from stablerep.evaluation.results.predictions import (
    attach_arrays,
    collect_arrays,
    digest_arrays,
    pack_arrays,
    read_arrays,
)
from stablerep.evaluation.results.rows import Provenance, Row, RowKey

RESULTS_FILE, PREDICTIONS_FILE = "results.jsonl", "predictions.npz"
logger = logging.getLogger(__name__)
_WAY_OUT = "name another folder, or give --overwrite"


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


def check_folder(
    folder: str | Path,
    provenance: Provenance,
    settings: Mapping[RowKey, Mapping[str, Any]] | None = None,
) -> None:
    """Refuses a folder that holds other results; to be called before the work, too.

    Args:
        folder: Where scores will be written.
        provenance: Of the scores to come.
        settings: Those of each score to come.

    Raises:
        ValueError: If its results.jsonl is of other weights, data or transform, has one of these scores with
            other settings, or cannot be read; or if the predictions of another score are not there.
    """
    folder, settings = Path(folder), settings or {}
    if (folder / RESULTS_FILE).exists():
        lines = read_lines(folder / RESULTS_FILE)
        _check_lines(folder / RESULTS_FILE, lines, provenance, settings)
        _attach_all(folder, [line for line in lines if line.row.key not in settings])


def write_results(
    folder: str | Path,
    rows: Sequence[Row],
    provenance: Provenance,
    names: Sequence[str],
    *,
    overwrite: bool = False,
    sort: Callable[[Iterable[Row]], Iterable[Row]] = tuple,
) -> tuple[Row, ...]:
    """Writes scores; those of the same weights, data and transform that are there stay.

    Each of the two files is written whole or not at all. A kill between them leaves every score; those that
    were being replaced may then have the predictions of their successors, which is seen when they are read.

    Args:
        folder: Where; it exists.
        rows: The scores, no two with the same protocol, metric and feature. One that is there with the same
            settings is replaced.
        provenance: What they share.
        names: Names of the test images, in the order of the predictions.
        overwrite: Replace scores of other settings, too, all results of another run, and scores whose
            predictions are not there any more.
        sort: Puts the scores of the folder in order; they come in that in which they were first written.

    Returns:
        All scores that the folder now has, in their order; names are only with those of other examples.

    Raises:
        ValueError: If there is no row, two rows cannot be told apart, predictions are not as many as the
            names, hyper-parameters are not plain, or the folder holds other results.
        OSError: If a file cannot be written; the old ones stay.
    """
    folder = Path(folder)
    if not rows:
        raise ValueError("there are no rows to write")
    new = {row.key: Record(row, provenance) for row in rows}
    records = _read_earlier(folder, new, provenance, overwrite=overwrite) | new
    kept = [_share_names(record.row, names) for key, record in records.items() if key not in new]
    arrays, keys = collect_arrays([*kept, *rows], names)
    together = {row.key: row for row in [*rows, *kept]}
    ordered = tuple(sort(together[key] for key in records))
    lines = []
    for row in ordered:
        place = keys.get(row.key)
        digest = None if place is None else digest_arrays(arrays, place)
        lines.append(write_line(row, records[row.key].provenance, place, digest))
    # Predictions first: a kill between the two leaves lines whose arrays are still there.
    replace_file(folder / PREDICTIONS_FILE, pack_arrays(arrays))
    replace_file(folder / RESULTS_FILE, "".join(lines).encode())
    return ordered


def read_records(path: str | Path) -> list[Record]:
    """Every line of a results.jsonl, of one run or of many, without predictions.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is none of this version; the message names the file and the line.
    """
    return [Record(line.row, line.provenance) for line in read_lines(Path(path))]


def read_results(folder: str | Path) -> Results:
    """A run with its predictions.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is none of this version, lines are of several runs, or predictions.npz has not
            what they name.
    """
    folder = Path(folder)
    path = folder / RESULTS_FILE
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"{path} has no rows")
    for line in lines[1:]:
        if line.provenance.hashes != lines[0].provenance.hashes:
            raise ValueError(f"{path}, line {line.number}: is of another run than line {lines[0].number}")
    arrays = _read_arrays_of(folder, lines)
    rows = tuple(_attach(line, arrays, path) for line in lines)
    return Results(folder, lines[0].provenance, rows, tuple(map(str, arrays.get("names", ()))))


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: under another name in its folder, then renamed.

    Raises:
        OSError: If it cannot be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_lines(
    path: Path,
    lines: Sequence[Line],
    provenance: Provenance,
    settings: Mapping[RowKey, Mapping[str, Any]],
) -> None:
    for line in lines:
        for name, expected in provenance.hashes.items():
            found = line.provenance.hashes.get(name, "")
            if found != expected:
                raise ValueError(
                    f"{path} holds results of other {name} ({found[:12]}, now {expected[:12]}): {_WAY_OUT}"
                )
    for line in lines:
        if line.row.key not in settings:
            continue
        old, new = line.row.settings, to_plain(settings[line.row.key], "settings")
        if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            protocol, metric, feature = line.row.key
            told = ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in changed)
            raise ValueError(
                f"{path} holds {protocol} {metric} of {feature} of other settings ({told}): {_WAY_OUT}"
            )


def _read_earlier(
    folder: Path, new: Mapping[RowKey, Record], provenance: Provenance, *, overwrite: bool
) -> dict[RowKey, Record]:
    """The scores that are there; those that will be replaced keep their place, without arrays."""
    path = folder / RESULTS_FILE
    if not path.exists():
        return {}
    try:
        lines = read_lines(path)
        settings = {} if overwrite else {key: record.row.settings for key, record in new.items()}
        _check_lines(path, lines, provenance, settings)
    except ValueError:
        if not overwrite:
            raise
        return {}
    attached = _attach_all(folder, [line for line in lines if line.row.key not in new], drop=overwrite)
    return {
        line.row.key: Record(attached.get(line.row.key, line.row), line.provenance)
        for line in lines
        if line.row.key in new or line.row.key in attached
    }


def _attach_all(folder: Path, lines: Sequence[Line], *, drop: bool = False) -> dict[RowKey, Row]:
    """Lines that will stay, with their arrays; those whose arrays are not there are refused, or dropped."""
    arrays: dict[str, np.ndarray] = {}
    rows = {}
    try:
        arrays = _read_arrays_of(folder, lines)
    except (ValueError, FileNotFoundError) as error:
        if not drop:
            raise ValueError(f"{error}: {_WAY_OUT}") from error
    for line in lines:
        try:
            rows[line.row.key] = _attach(line, arrays, folder / RESULTS_FILE)
        except ValueError as error:
            if not drop:
                raise ValueError(f"{error}: {_WAY_OUT}") from error
            logger.warning("given up, as it has no predictions: %s of %s: %s", *line.row.key[::2], error)
    return rows


def _read_arrays_of(folder: Path, lines: Sequence[Line]) -> dict[str, np.ndarray]:
    return read_arrays(folder / PREDICTIONS_FILE) if any(line.key for line in lines) else {}


def _attach(line: Line, arrays: Mapping[str, np.ndarray], path: Path) -> Row:
    """The row of a line with its arrays."""
    if line.key is None:
        return line.row
    try:
        return attach_arrays(line.row, arrays, line.key, line.digest or "")
    except ValueError as error:
        raise ValueError(f"{path}, line {line.number}: {error}") from error


def _share_names(row: Row, names: Sequence[str]) -> Row:
    """The row without names where they are the run's."""
    return dataclasses.replace(row, names=None) if list(row.names or ()) == list(names) else row
