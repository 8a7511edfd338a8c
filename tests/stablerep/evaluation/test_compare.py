"""Two runs side by side: matched by score and example; the resampled metrics against the plain ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stablerep.evaluation import metrics
from stablerep.evaluation.compare import (
    CompareConfig,
    Comparison,
    build_table,
    compare_results,
    run,
)
from stablerep.evaluation.resampling import (
    average_precision_interval,
    mean_per_class_interval,
    resample_average_precision,
)
from stablerep.evaluation.results import Provenance, Results, Row, read_results, write_results
from stablerep.evaluation.statistics import bootstrap_difference, mcnemar_test

NUM = 60
TARGETS = np.arange(NUM) % 4
NAMES = [f"test/{index}.jpg" for index in range(NUM)]


def provenance(weights: str, data: str = "d1") -> Provenance:
    return Provenance(
        f"{weights}.ckpt", "clothing", "t", {"weights": weights, "data": data, "transform": "t"}, {}
    )


def draw_predictions(seed: int, accuracy: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.where(random.random(NUM) < accuracy, TARGETS, (TARGETS + 1) % 4)


def row(predictions: np.ndarray, protocol: str = "knn20", /, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "protocol": protocol,
        "metric": "accuracy",
        "value": float((predictions == TARGETS).mean()),
        "interval": None,
        "interval_method": "",
        "n": NUM,
        "selection": "none",
        "hyperparameters": {},
        "feature": "cls",
        "seconds": 1.0,
        "predictions": predictions,
        "targets": TARGETS,
    }
    return Row(**fields | changes)


def write(folder: Path, rows: list[Row], *, data: str = "d1", names: list[str] | None = None) -> Results:
    folder.mkdir(exist_ok=True)
    write_results(folder, rows, provenance(folder.name, data), names or NAMES, overwrite=True)
    return read_results(folder)


A, B = draw_predictions(0, 0.8), draw_predictions(1, 0.6)


def test_a_comparison_is_that_of_the_predictions(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B)])
    (found,) = compare_results(a, b, seed=3)
    right_a, right_b = torch.from_numpy(A == TARGETS), torch.from_numpy(B == TARGETS)
    expected = bootstrap_difference(right_a.double(), right_b.double(), seed=3)
    assert found.difference == pytest.approx(expected.difference)
    assert found.interval == (expected.low, expected.high)
    assert found.mcnemar == mcnemar_test(right_a, right_b)
    assert (found.value_a, found.value_b, found.n) == (a.rows[0].value, b.rows[0].value, NUM)


def test_examples_are_matched_by_name_and_not_by_place(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B)])
    order = np.random.default_rng(0).permutation(NUM)
    shuffled = write(
        tmp_path / "c",
        [row(B, predictions=B[order], targets=TARGETS[order])],
        names=[NAMES[index] for index in order],
    )
    assert compare_results(a, shuffled) == compare_results(a, b)
    assert a.names != shuffled.names


def test_rows_are_matched_by_protocol_metric_and_feature(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [row(A), row(A, "ridge"), row(A, feature="patch_mean")])
    b = write(tmp_path / "b", [row(B, feature="patch_mean"), row(B, "logreg"), row(B)])
    found = compare_results(a, b)
    assert [(one.protocol, one.feature) for one in found] == [("knn20", "cls"), ("knn20", "patch_mean")]
    table = build_table(a, b, found)
    assert "Only A has ridge accuracy of cls." in table
    assert "Only B has logreg accuracy of cls." in table
    assert "neither intervals nor p are corrected for the number of rows" in table


def test_runs_on_other_data_are_refused_and_both_named(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B)], data="d2")
    with pytest.raises(
        ValueError, match=r"a and .*b were evaluated on other data: clothing \(d1\) and clothing \(d2\)"
    ):
        compare_results(a, b)


def test_runs_on_other_names_are_refused_and_both_named(tmp_path: Path) -> None:
    others = [*NAMES[:-2], "test/x.jpg", "test/y.jpg"]
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B)], names=others)
    expected = r"other examples: test/58.jpg, test/59.jpg only in .*a; test/x.jpg, test/y.jpg only in .*b$"
    with pytest.raises(ValueError, match=expected):
        compare_results(a, b)
    twice = write(tmp_path / "c", [row(A)], names=[NAMES[0], *NAMES[:-1]])
    with pytest.raises(ValueError, match="two examples of one name"):
        compare_results(twice, twice)


def test_other_targets_of_the_same_names_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [row(A)])
    b = write(tmp_path / "b", [row(B, targets=(TARGETS + 1) % 4)])
    with pytest.raises(ValueError, match=r"knn20 accuracy: the targets of .* differ for the same examples"):
        compare_results(a, b)


def test_a_value_that_its_predictions_contradict_is_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B, value=0.99)])
    with pytest.raises(ValueError, match=r"b: knn20 accuracy is 0.990000, but its predictions give 0\.\d+"):
        compare_results(a, b)
    scores = np.linspace(0, 1, NUM)
    c = write(tmp_path / "c", [row(A, "fewshot", value=0.9, predictions=scores, targets=None)])
    with pytest.raises(ValueError, match=r"c: fewshot accuracy is 0.900000, but its predictions give 0.5"):
        compare_results(c, c)


def test_a_run_without_predictions_is_compared_by_its_values(tmp_path: Path) -> None:
    alignment = row(A, "geometry", metric="alignment", value=0.3, predictions=None, targets=None)
    a, b = write(tmp_path / "a", [row(A), alignment]), write(tmp_path / "b", [alignment])
    (found,) = compare_results(a, b)
    assert (found.protocol, found.difference, found.interval) == ("geometry", 0.0, None)


def test_runs_without_a_common_score_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B, "ridge")])
    with pytest.raises(
        ValueError, match="no score in common: knn20 accuracy of cls against ridge accuracy of cls"
    ):
        compare_results(a, b)


def test_scores_without_targets_are_compared_by_their_mean(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    episodes, captions = [f"episode {i}" for i in range(20)], [f"caption {i}" for i in range(30)]

    def rows(shift: float) -> list[Row]:
        accuracies = 0.6 + shift + 0.1 * random.random(20)
        hits = random.random(30) < 0.5 + shift
        own = {"targets": None}
        return [
            row(
                A,
                "fewshot",
                predictions=accuracies,
                value=float(accuracies.mean()),
                names=episodes,
                n=20,
                **own,
            ),
            row(
                A,
                "retrieval",
                metric="recall@1",
                predictions=hits,
                value=float(hits.mean()),
                names=captions,
                **own,
            ),
            row(A, "geometry", metric="alignment", value=0.5 + shift, predictions=None, targets=None),
        ]

    found = compare_results(write(tmp_path / "a", rows(0.2)), write(tmp_path / "b", rows(0.0)))
    fewshot, retrieval, geometry = found
    assert fewshot.interval is not None
    assert fewshot.interval[0] < fewshot.difference < fewshot.interval[1]
    assert fewshot.mcnemar is None
    assert retrieval.mcnemar is not None
    assert (geometry.difference, geometry.interval) == (pytest.approx(0.2), None)


def test_rows_of_other_settings_are_compared_and_the_settings_named(tmp_path: Path) -> None:
    def write_rows(name: str, num_views: int | None, seed: int) -> Results:
        settings = {"linear.num_views": num_views, "seed": 0}
        names = [f"seed {seed}: episode {index}" for index in range(NUM)]
        accuracies = np.linspace(0.1, 0.9, NUM)
        episodes = {"predictions": accuracies, "targets": None, "names": names, "value": 0.5}
        fewshot = row(A, "fewshot", **episodes, settings={"fewshot.seed": seed})
        return write(tmp_path / name, [row(A, "linear_paper", settings=settings), fewshot])

    a, b, c = write_rows("a", None, 0), write_rows("b", 4, 0), write_rows("c", None, 1)
    linear, fewshot = compare_results(a, b)
    assert linear.settings == {"linear.num_views": (None, 4)}
    assert linear.interval is not None
    assert (fewshot.settings, fewshot.interval) == ({}, (0.0, 0.0))
    told = "Other settings: linear.num_views is None in A, 4 in B (linear_paper accuracy of cls)."
    assert told in build_table(a, b, [linear, fewshot])
    linear, fewshot = compare_results(a, c)
    assert linear.settings == {}
    assert fewshot.settings == {"fewshot.seed": (0, 1)}
    assert fewshot.interval is None  # other episodes are no pairs


def test_interval_of_mean_per_class_accuracy_is_that_of_resampled_examples(tmp_path: Path) -> None:
    """With a class of one image, which some resamples do not have."""
    targets = np.where(np.arange(NUM) == 0, 7, TARGETS)
    answers = [np.where(predictions == TARGETS, targets, 5) for predictions in (A, B)]

    def score(predictions: np.ndarray, indices: Any = slice(None)) -> float:
        return metrics.mean_per_class_accuracy(
            torch.from_numpy(predictions[indices]), torch.from_numpy(targets[indices])
        )

    runs = [
        write(tmp_path / name, [row(p, metric="mean_per_class_accuracy", value=score(p), targets=targets)])
        for name, p in zip("ab", answers, strict=True)
    ]
    (found,) = compare_results(*runs, num_resamples=20_000)
    draws = np.random.default_rng(6).integers(NUM, size=(4000, NUM))
    naive = [score(answers[0], indices) - score(answers[1], indices) for indices in draws]
    assert found.difference == pytest.approx(score(answers[0]) - score(answers[1]))
    assert found.interval == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])), abs=0.02)
    of_a = [score(answers[0], indices) for indices in draws]
    assert mean_per_class_interval(answers[0], targets) == pytest.approx(
        tuple(np.quantile(of_a, [0.025, 0.975])), abs=0.02
    )


def test_interval_of_average_precision_is_that_of_resampled_examples() -> None:
    random = np.random.default_rng(9)
    shown = np.eye(4)[TARGETS] > 0
    scores = shown + random.standard_normal((NUM, 4))
    draws = random.integers(NUM, size=(1000, NUM))
    naive = [
        metrics.mean_average_precision(torch.from_numpy(scores[i]), torch.from_numpy(shown[i])) for i in draws
    ]
    assert average_precision_interval(scores, shown) == pytest.approx(
        tuple(np.quantile(naive, [0.025, 0.975])), abs=0.03
    )


@pytest.mark.parametrize("has_ties", [False, True])
def test_resampled_average_precision_is_that_of_the_resample(has_ties: bool) -> None:
    random = np.random.default_rng(7)
    targets = random.choice([-1, 0, 0, 1], size=(NUM, 5))
    scores = random.random((NUM, 5)) + 0.4 * (targets == 1)
    if has_ties:
        scores = scores.round(1)
    indices = random.integers(NUM, size=(20, NUM))
    found = resample_average_precision(
        torch.from_numpy(scores), torch.from_numpy(targets.astype(np.int8)), torch.from_numpy(indices)
    )
    expected = [
        metrics.mean_average_precision(
            torch.from_numpy(scores[i]), torch.from_numpy(targets[i] == 1), torch.from_numpy(targets[i] == -1)
        )
        for i in indices
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_metrics_that_are_no_mean_of_examples_get_an_interval(tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    shown = np.eye(4)[TARGETS] > 0

    def rows(predictions: np.ndarray, noise: float) -> list[Row]:
        scores = shown + noise * random.standard_normal((NUM, 4))
        per_class = metrics.mean_per_class_accuracy(torch.from_numpy(predictions), torch.from_numpy(TARGETS))
        precision = metrics.mean_average_precision(torch.from_numpy(scores), torch.from_numpy(shown))
        return [
            row(predictions, metric="mean_per_class_accuracy", value=per_class),
            row(predictions, "logreg", metric="map11", value=precision, predictions=scores, targets=shown),
        ]

    found = compare_results(
        write(tmp_path / "a", rows(A, 0.3)), write(tmp_path / "b", rows(B, 1.5)), num_resamples=2000
    )
    for one in found:
        assert one.interval is not None
        assert one.interval[0] < one.difference < one.interval[1]
        assert one.mcnemar is None
    assert found[1].interval is not None
    assert found[1].interval[0] > 0


def test_the_verb_prints_the_table_and_writes_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B)])
    output = tmp_path / "new" / "folder"
    assert run(CompareConfig(str(a.folder), str(b.folder), output=str(output))) == 0
    (found,) = compare_results(a, b)
    assert found.mcnemar is not None
    assert found.interval is not None
    printed = capsys.readouterr().out
    cells = next(line for line in printed.splitlines() if line.startswith("| knn20"))
    assert [cell.strip() for cell in cells.strip("|").split("|")] == [
        "knn20",
        "accuracy",
        "cls",
        f"{100 * found.value_a:.2f}",
        f"{100 * found.value_b:.2f}",
        f"+{100 * found.difference:.2f}",
        f"+{100 * found.interval[0]:.2f} to +{100 * found.interval[1]:.2f}",
        f"{found.mcnemar.p_value:.2g}",
        str(found.mcnemar.num_only_a_correct),
        str(found.mcnemar.num_only_b_correct),
        str(NUM),
    ]
    content = json.loads((output / "compare.json").read_text())
    assert content["schema_version"] == 1
    assert content["a"]["hashes"]["weights"] == "a"
    (written,) = content["comparisons"]
    assert written["difference"] == found.difference
    assert written["mcnemar"]["p_value"] == found.mcnemar.p_value
    assert [path.name for path in output.iterdir()] == ["compare.json"]


def test_a_difference_below_zero_and_no_difference_are_written_as_such(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [row(A)]), write(tmp_path / "b", [row(B)])
    (found,) = compare_results(b, a)
    assert f"| −{100 * -found.difference:.2f} |" in build_table(b, a, [found]).replace("  ", " ")
    nothing = Comparison("knn20", "accuracy", "cls", 0.5, 0.5, 0.0, (0.0, 0.0), None, 60, {})
    assert "0.00 to 0.00" in build_table(a, b, [nothing])
    sure = replace(nothing, mcnemar=mcnemar_test(torch.ones(60).bool(), torch.zeros(60).bool()))
    assert "< 0.0001" in build_table(a, b, [sure])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_resamples": 10}, "num_resamples must be >= 100, got 10"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_settings_out_of_bounds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig("a", "b", **changes)
