"""Runs of several seeds as one: mean, spread and interval."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from scipy.stats import t as student

from stablerep.cli import main
from stablerep.evaluation.results import Provenance, Row, write_results


def write(
    folder: Path, values: dict[str, float], settings: Any = None, *, data: str = "d", heads: str = "h"
) -> str:
    folder.mkdir()
    rows = [
        Row(protocol, "accuracy", value, None, "", 40, "none", {}, "cls", 1.0, settings or {})
        for protocol, value in values.items()
    ]
    hashes = {"weights": folder.name, "data": data, "transform": "t", "architecture": heads}
    write_results(folder, rows, Provenance("last.ckpt", "clothing", "t", hashes, {}), [])
    return str(folder)


def test_mean_and_students_interval_over_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [0.61, 0.64, 0.59]
    folders = [
        write(tmp_path / f"run {seed},", {"knn20": value, "ridge": 0.5 + seed / 100}, {"seed": seed})
        for seed, value in enumerate(values)
    ]
    write(tmp_path / "alone", {"logreg": 0.5})
    assert main(["evaluate", "summarize", *folders]) == 0
    printed = capsys.readouterr().out
    half_width = student.ppf(0.975, 2) * stdev(values) / 3**0.5
    low, high = 100 * (mean(values) - half_width), 100 * (mean(values) + half_width)
    assert (
        f"| knn20 | accuracy | cls | {100 * mean(values):.2f} | {low:.2f} to {high:.2f} | "
        f"{100 * stdev(values):.2f} | 3 |" in printed
    )
    assert "| ridge | accuracy | cls | 51.00 |" in printed


def test_a_score_that_one_run_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {"knn20": 0.5, "ridge": 0.5})
    b = write(tmp_path / "b", {"knn20": 0.6})
    assert main(["evaluate", "summarize", a, b]) == 0
    assert "Not in every run: ridge accuracy of cls." in capsys.readouterr().out


def test_runs_that_are_no_seeds_of_one_experiment_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "first", {"knn20": 0.5}, {"knn.temperature": 0.07})
    others = {
        "are of other data": write(tmp_path / "b", {"knn20": 0.5}, {"knn.temperature": 0.07}, data="e"),
        "knn.temperature is 0.07 in": write(tmp_path / "c", {"knn20": 0.5}, {"knn.temperature": 0.1}),
        "are of other architecture": write(tmp_path / "e", {"knn20": 0.5}, heads="i"),
        "have no score in common": write(tmp_path / "d", {"ridge": 0.5}),
        "are of the same weights": first,
    }
    for message, other in others.items():
        assert main(["evaluate", "summarize", first, other]) == 1
        assert message in capsys.readouterr().err
    assert main(["evaluate", "summarize", first]) == 1
    assert "folders must be at least 2, got 1" in capsys.readouterr().err
