"""The report's files: whole, readable, and enough for a paired comparison."""

import json
from pathlib import Path

import pytest
import torch

from stablerep.evaluation.report import Score, build_table, compare_runs, read_results, write_report
from stablerep.evaluation.statistics import paired_difference

LABELS = torch.arange(40) % 3
NAMES = [f"test/{index}" for index in range(40)]


def score(name: str, num_wrong: int, selection: str = "none", **hyperparameters: object) -> Score:
    predictions = LABELS.clone()
    predictions[:num_wrong] += 1
    return Score(name, selection, predictions, LABELS, hyperparameters, seconds=1.5)


def test_paired_comparison_of_two_runs_equals_the_one_of_their_predictions(tmp_path: Path) -> None:
    for folder, num_wrong in (("a", 4), ("b", 15)):
        (tmp_path / folder).mkdir()
        write_report(tmp_path / folder, [score("knn20", num_wrong)], NAMES, {}, "title")
    expected = paired_difference(torch.arange(40) >= 4, torch.arange(40) >= 15)
    assert compare_runs(tmp_path / "a", tmp_path / "b", "knn20") == expected
    assert expected.difference == pytest.approx(11 / 40)


def test_runs_on_other_test_images_are_not_compared(tmp_path: Path) -> None:
    for folder, names in (("a", NAMES), ("b", NAMES[::-1])):
        (tmp_path / folder).mkdir()
        write_report(tmp_path / folder, [score("knn20", 3)], names, {}, "title")
    with pytest.raises(ValueError, match="were evaluated on other test images"):
        compare_runs(tmp_path / "a", tmp_path / "b", "knn20")
    with pytest.raises(ValueError, match=r"predictions.npz has no score 'knn5'"):
        compare_runs(tmp_path / "a", tmp_path / "a", "knn5")


def test_a_report_leaves_nothing_but_its_three_files(tmp_path: Path) -> None:
    write_report(tmp_path, [score("knn20", 3)], NAMES, {}, "title")
    write_report(tmp_path, [score("knn20", 5)], NAMES, {"checkpoint": "x"}, "title")
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "predictions.npz"}
    results = read_results(tmp_path)
    assert results["checkpoint"] == "x"
    assert results["results"][0]["num_correct"] == 35


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ValueError, match=r"results.json: schema_version must be 1, got 99"):
        read_results(tmp_path)


def test_the_table_says_which_rows_were_chosen_on_test_and_which_views_were_cached() -> None:
    plain = build_table([score("knn20", 4, k=20)])
    assert "| knn20 | 90.00 | 76.95 to 96.04 | 40 | none | k 20 |" in plain
    assert "on the test split" not in plain
    table = build_table(
        [score("linear_paper", 2, "test", views_cached=4), score("linear_heldout", 2, "validation")]
    )
    assert "*on the test split*" in table
    assert "not comparable with published figures" in table
