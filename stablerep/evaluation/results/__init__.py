"""Scores on disk: `results.jsonl`, a score a line, and `predictions.npz`, what they were computed from.

Each line stands for itself: it says what was measured, on what, with which options, weights and libraries,
so that lines of many runs can be put into one file.

rows.py           a score, and what those of one run share
lines.py          a row as a line
predictions.py    the arrays of the rows, in one file
files.py          both, in a folder: written after each protocol, rows of earlier commands kept
"""

from stablerep.evaluation.results.files import (
    PREDICTIONS_FILE,
    RESULTS_FILE,
    Record,
    Results,
    check_folder,
    read_records,
    read_results,
    replace_file,
    write_results,
)
from stablerep.evaluation.results.lines import SCHEMA_VERSION, to_plain
from stablerep.evaluation.results.rows import HASH_NAMES, Provenance, Row, RowKey

__all__ = [
    "HASH_NAMES",
    "PREDICTIONS_FILE",
    "RESULTS_FILE",
    "SCHEMA_VERSION",
    "Provenance",
    "Record",
    "Results",
    "Row",
    "RowKey",
    "check_folder",
    "read_records",
    "read_results",
    "replace_file",
    "to_plain",
    "write_results",
]
