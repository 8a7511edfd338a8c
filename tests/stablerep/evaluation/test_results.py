"""results.jsonl and predictions.npz: whole, readable, and never mixed between runs."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stablerep.evaluation.results import (
    Provenance,
    Row,
    check_folder,
    read_records,
    read_results,
    write_results,
)

TARGETS = np.arange(40) % 3
NAMES = [f"test/{index}.jpg" for index in range(40)]


def provenance(weights: str = "w1", data: str = "d1") -> Provenance:
    return Provenance(
        model="last.ckpt",
        data="clothing",
        transform="Resize(256), CenterCrop(224)",
        hashes={"weights": weights, "data": data, "transform": "t1"},
        versions={"torch": "2.15"},
    )


def row(protocol: str = "knn20", num_wrong: int = 4, **changes: Any) -> Row:
    predictions = TARGETS.copy()
    predictions[:num_wrong] += 1
    fields: dict[str, Any] = {
        "protocol": protocol,
        "metric": "accuracy",
        "value": 1 - num_wrong / 40,
        "interval": (0.5, 1.0),
        "interval_method": "Wilson, 95 %",
        "n": 40,
        "selection": "none",
        "hyperparameters": {"k": 20, "temperature": 0.07},
        "feature": "cls",
        "seconds": 1.25,
        "settings": {"precision": "float32"},
        "predictions": predictions,
        "targets": TARGETS,
    }
    return Row(**fields | changes)


def assert_same_arrays(a: np.ndarray | None, b: np.ndarray | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        np.testing.assert_array_equal(a, b)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    hits = random.random(7) < 0.5
    rows = [
        row(),
        row(metric="mean_per_class_accuracy", value=0.875),
        row(feature="patch_mean", num_wrong=9),
        row("logreg", metric="map11", predictions=random.random((40, 3)), targets=np.eye(3)[TARGETS] > 0),
        row(
            "retrieval",
            metric="recall@1",
            n=7,
            predictions=hits,
            targets=None,
            names=[f"caption {i}" for i in range(7)],
        ),
        row("retrieval", metric="recall@5", predictions=~hits, targets=None, names=list("abcdefg")),
        row("linear_heldout", predictions=np.where(TARGETS == 0, -1, 300)),
        row(
            "geometry", metric="alignment", interval=None, interval_method="", predictions=None, targets=None
        ),
    ]
    write_results(tmp_path, rows, provenance(), NAMES)
    results = read_results(tmp_path)
    assert results.provenance == provenance()
    assert results.names == tuple(NAMES)
    assert list(results.rows) == rows
    for found, written in zip(results.rows, rows, strict=True):
        assert_same_arrays(found.predictions, written.predictions)
        assert_same_arrays(found.targets, written.targets)
        if written.predictions is not None:
            assert list(found.names or ()) == list(written.names or NAMES)
    assert [record.row for record in read_records(tmp_path / "results.jsonl")] == rows


def test_metrics_of_the_same_predictions_share_them(tmp_path: Path) -> None:
    rows = [row(), row(metric="mean_per_class_accuracy"), row(metric="top5_accuracy", num_wrong=1)]
    write_results(tmp_path, rows, provenance(), NAMES)
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert set(arrays) == {
            "names",
            "targets",
            "predictions/knn20/cls",
            "predictions/knn20/cls/top5_accuracy",
        }


def test_every_line_stands_for_itself(tmp_path: Path) -> None:
    write_results(tmp_path, [row(), row("ridge")], provenance(), NAMES)
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        content = json.loads(line)
        assert content["schema_version"] == 2
        assert content["hashes"] == {"weights": "w1", "data": "d1", "transform": "t1"}
        assert content["versions"] == {"torch": "2.15"}
        assert content["hyperparameters"] == {"k": 20, "temperature": 0.07}
        assert content["settings"] == {"precision": "float32"}
        assert content["interval"] == [0.5, 1.0]


def test_lines_of_many_runs_can_be_put_into_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, [row()], provenance(weights=name), NAMES)
    texts = [(tmp_path / name / "results.jsonl").read_text() for name in ("a", "b")]
    (tmp_path / "results.jsonl").write_text("".join(texts))
    records = read_records(tmp_path / "results.jsonl")
    assert [record.provenance.hashes["weights"] for record in records] == ["a", "b"]
    with pytest.raises(ValueError, match=r"results.jsonl, line 2: is of another run than line 1"):
        read_results(tmp_path)


def test_scores_of_the_same_run_join_those_that_are_there(tmp_path: Path) -> None:
    hits = np.arange(7) % 2 == 0
    captions = [f"caption {i}" for i in range(7)]
    retrieval = row("retrieval", n=7, predictions=hits, targets=None, names=captions)
    write_results(tmp_path, [row(), row("ridge"), retrieval], provenance(), NAMES)
    together = write_results(tmp_path, [row("logreg", num_wrong=1), row(num_wrong=8)], provenance(), NAMES)
    expected = [row(num_wrong=8), row("ridge"), retrieval, row("logreg", num_wrong=1)]
    for found in (read_results(tmp_path).rows, together):
        assert list(found) == expected
        for one, wanted in zip(found, expected, strict=True):
            assert_same_arrays(one.predictions, wanted.predictions)
            assert_same_arrays(one.targets, wanted.targets)
    assert [list(one.names or ()) for one in read_results(tmp_path).rows] == [NAMES, NAMES, captions, NAMES]
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "predictions.npz"}


def test_scores_keep_the_examples_that_they_were_computed_from(tmp_path: Path) -> None:
    write_results(tmp_path, [row()], provenance(), NAMES)
    fewer = row("ridge", n=39, predictions=TARGETS[1:], targets=TARGETS[1:])
    write_results(tmp_path, [fewer], provenance(), NAMES[1:])
    first, second = read_results(tmp_path).rows
    assert (list(first.names or ()), list(second.names or ())) == (NAMES, NAMES[1:])
    assert_same_arrays(first.targets, TARGETS)
    assert_same_arrays(second.targets, TARGETS[1:])


def test_results_of_another_run_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path, [row()], provenance(), NAMES)
    with pytest.raises(ValueError, match=r"results of other weights \(w1, now w2\): name another folder"):
        write_results(tmp_path, [row()], provenance(weights="w2"), NAMES)
    with pytest.raises(ValueError, match="results of other data"):
        check_folder(tmp_path, provenance(data="d2"))
    other_heads = replace(provenance(), hashes={**provenance().hashes, "architecture": "f2"})
    with pytest.raises(ValueError, match="results of other architecture"):
        check_folder(tmp_path, other_heads)
    check_folder(tmp_path / "new", provenance())
    assert read_results(tmp_path).provenance == provenance()
    write_results(tmp_path, [row("ridge")], provenance(weights="w2"), NAMES, overwrite=True)
    assert read_results(tmp_path).provenance.hashes["weights"] == "w2"
    assert [found.protocol for found in read_results(tmp_path).rows] == ["ridge"]


def test_a_score_of_other_settings_is_refused(tmp_path: Path) -> None:
    exact = row(settings={"linear.num_views": None, "seed": 0})
    quick = row(settings={"linear.num_views": 4, "seed": 0}, num_wrong=8)
    write_results(tmp_path, [exact, row("ridge")], provenance(), NAMES)
    told = (
        r"knn20 accuracy of cls of other settings \(linear.num_views was None, now 4\): name another folder"
    )
    with pytest.raises(ValueError, match=told):
        write_results(tmp_path, [quick], provenance(), NAMES)
    with pytest.raises(ValueError, match=told):
        check_folder(tmp_path, provenance(), {quick.key: quick.settings})
    check_folder(tmp_path, provenance(), {("logreg", "accuracy", "cls"): quick.settings})
    assert list(read_results(tmp_path).rows) == [exact, row("ridge")]
    write_results(tmp_path, [quick], provenance(), NAMES, overwrite=True)
    assert list(read_results(tmp_path).rows) == [quick, row("ridge")]


def test_equal_results_are_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        write_results(tmp_path, [row()], provenance(), NAMES)
        contents.append([(tmp_path / name).read_bytes() for name in ("results.jsonl", "predictions.npz")])
    assert contents[0] == contents[1]


def test_a_full_disk_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, [row()], provenance(), NAMES)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path, [row(num_wrong=20)], provenance(), NAMES)
    assert [found.value for found in read_results(tmp_path).rows] == [0.9]
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "predictions.npz"}


def test_a_kill_between_the_two_files_loses_no_score(tmp_path: Path) -> None:
    write_results(tmp_path, [row()], provenance(), NAMES)
    before = (tmp_path / "results.jsonl").read_bytes()
    write_results(tmp_path, [row("ridge", num_wrong=2)], provenance(), NAMES)
    (tmp_path / "results.jsonl").write_bytes(before)  # as if killed after the predictions were written
    assert list(read_results(tmp_path).rows) == [row()]
    write_results(tmp_path, [row("ridge", num_wrong=2)], provenance(), NAMES)
    assert list(read_results(tmp_path).rows) == [row(), row("ridge", num_wrong=2)]


def test_predictions_of_another_run_are_seen(tmp_path: Path) -> None:
    write_results(tmp_path, [row(num_wrong=20)], provenance(), NAMES)
    other = (tmp_path / "predictions.npz").read_bytes()
    write_results(tmp_path, [row()], provenance(), NAMES)
    (tmp_path / "predictions.npz").write_bytes(other)
    told = r"results.jsonl, line 1: 'knn20/cls' in predictions.npz is of another run: sha256 must be"
    with pytest.raises(ValueError, match=told):
        read_results(tmp_path)
    with pytest.raises(ValueError, match=told):
        write_results(tmp_path, [row("ridge")], provenance(), NAMES)
    (tmp_path / "predictions.npz").write_bytes(other[: len(other) // 2])
    with pytest.raises(ValueError, match=r"predictions.npz is damaged"):
        read_results(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "damaged", "of another run"])
def test_scores_whose_predictions_are_gone_are_refused_before_the_work(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    alignment = row("geometry", interval=None, predictions=None, targets=None)
    path = tmp_path / "predictions.npz"
    write_results(tmp_path, [row(num_wrong=20), row("logreg"), alignment], provenance(), NAMES)
    other = path.read_bytes()
    write_results(tmp_path, [row()], provenance(), NAMES)
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(other if fault == "of another run" else other[:100])
    ridge = row("ridge")
    for refuse in (
        lambda: check_folder(tmp_path, provenance(), {ridge.key: ridge.settings}),
        lambda: write_results(tmp_path, [ridge], provenance(), NAMES),
    ):
        with pytest.raises(ValueError, match="name another folder, or give --overwrite"):
            refuse()
    # What is computed anew needs no predictions of its own from before.
    new = [row(), row("logreg")]
    check_folder(tmp_path, provenance(), {one.key: one.settings for one in new})
    # Only what is lost is given up, and it is named.
    together = write_results(tmp_path, [ridge], provenance(), NAMES, overwrite=True)
    left = [row("logreg")] if fault == "of another run" else []
    assert list(together) == list(read_results(tmp_path).rows) == [*left, alignment, ridge]
    assert "knn20 of cls" in caplog.text
    assert ("logreg of cls" in caplog.text) == (fault != "of another run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be an object, got list"),
        ({"schema_version": 1}, "schema_version must be 2, got 1"),
        ({"value": "0.5"}, 'value must be a number, got "0.5"'),
        ({"value": True}, "value must be a number, got true"),
        ({"value": None}, "value must be a number, got null"),
        ({"n": 1.5}, "n must be a whole number, got 1.5"),
        ({"n": 0}, "ridge accuracy: n must be >= 1, got 0"),
        ({"interval": [0.5]}, r"interval must be two numbers or null, got \[0.5\]"),
        ({"interval": [0.9, 0.5]}, r"interval must be \(low, high\), got \(0.9, 0.5\)"),
        ({"hyperparameters": None}, "hyperparameters must be an object, got null"),
        ({"settings": []}, r"settings must be an object, got \[\]"),
        ({"hashes": {"data": "x"}}, "missing: weights, transform"),
        ({"predictions": {"key": "knn20/cls"}}, "predictions must be an object with key and sha256"),
        ({"protocol": ""}, "protocol of a row must not be empty"),
    ],
)
def test_a_damaged_line_is_named_with_its_file(tmp_path: Path, change: Any, message: str) -> None:
    write_results(tmp_path, [row(), row("ridge")], provenance(), NAMES)
    path = tmp_path / "results.jsonl"
    first, second = path.read_text().splitlines()
    if not isinstance(change, str):
        change = json.dumps(json.loads(second) | change)
    path.write_text(f"{first}\n{change}\n")
    with pytest.raises(ValueError, match=f"results.jsonl, line 2: .*{message}"):
        read_records(path)


def test_a_line_without_a_field_or_with_nan_is_refused(tmp_path: Path) -> None:
    write_results(tmp_path, [row()], provenance(), NAMES)
    path = tmp_path / "results.jsonl"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name != "seconds"}))
    with pytest.raises(ValueError, match="line 1: has no seconds"):
        read_records(path)
    path.write_text(json.dumps(content | {"value": float("nan")}))
    with pytest.raises(ValueError, match="line 1: is not JSON .NaN is no number"):
        read_records(path)


def test_missing_files_and_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results\.jsonl"):
        read_results(tmp_path)
    (tmp_path / "results.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"results\.jsonl has no rows"):
        read_results(tmp_path)
    (tmp_path / "results.jsonl").unlink()
    write_results(tmp_path, [row()], provenance(), NAMES)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace("knn20/cls", "knn5/cls"))
    with pytest.raises(ValueError, match=r"line 1: predictions.npz has no 'knn5/cls'"):
        read_results(tmp_path)
    (tmp_path / "predictions.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"predictions\.npz"):
        read_results(tmp_path)


def test_numbers_of_libraries_become_plain_and_what_is_not_plain_is_refused(tmp_path: Path) -> None:
    hyperparameters = {
        "penalty": np.float64(0.5),
        "epoch": torch.tensor(3),
        "converged": np.bool_(True),
        "grid": (1, np.int64(2)),
        "inner": {"path": Path("a/b"), "none": None},
    }
    write_results(tmp_path, [row(hyperparameters=hyperparameters)], provenance(), NAMES)
    (found,) = read_results(tmp_path).rows
    assert found.hyperparameters == {
        "penalty": 0.5,
        "epoch": 3,
        "converged": True,
        "grid": [1, 2],
        "inner": {"path": "a/b", "none": None},
    }
    with pytest.raises(ValueError, match=r"knn20 accuracy: hyperparameters\.x must be finite, got inf"):
        write_results(tmp_path, [row(hyperparameters={"x": np.inf})], provenance(), NAMES)
    with pytest.raises(ValueError, match=r"hyperparameters\.x must be a plain value, got object"):
        write_results(tmp_path, [row(hyperparameters={"x": object()})], provenance(), NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": float("nan")}, "knn20 accuracy: value must be finite, got nan"),
        ({"interval": (0.5, float("inf"))}, "interval must be"),
        ({"seconds": -1.0}, "seconds must be >= 0, got -1.0"),
        ({"targets": TARGETS[:5]}, "targets must be as many as predictions, 40, got 5"),
        ({"names": ["a"]}, "names must be as many as predictions, 40, got 1"),
        ({"predictions": None}, "targets and names come with predictions"),
        ({"predictions": np.array(["a"] * 40)}, "predictions must be numbers or bool, got <U1"),
        ({"predictions": np.zeros((40, 2, 2))}, r"must be \[N\] or \[N, C\], got \[40, 2, 2\]"),
    ],
)
def test_a_row_out_of_bounds_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(**changes)


def test_rows_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no rows to write"):
        write_results(tmp_path, [], provenance(), NAMES)
    with pytest.raises(ValueError, match="two rows are knn20 accuracy of cls"):
        write_results(tmp_path, [row(), row(num_wrong=2)], provenance(), NAMES)
    with pytest.raises(ValueError, match="predictions must be as many as the names, 39, got 40"):
        write_results(tmp_path, [row()], provenance(), NAMES[1:])
    with pytest.raises(ValueError, match="missing: transform"):
        Provenance("m", "d", "t", {"weights": "a", "data": "b"}, {})
    assert list(tmp_path.iterdir()) == []
