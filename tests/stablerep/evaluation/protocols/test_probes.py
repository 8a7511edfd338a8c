"""Classifiers of an evaluation: what they hold out, what they ignore, where they compute."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.features import Features
from stablerep.evaluation.logreg import multilabel_logistic_regression
from stablerep.evaluation.metrics import mean_average_precision
from stablerep.evaluation.protocols import evaluation as evaluation_module
from stablerep.evaluation.protocols.evaluation import Evaluation, has_float64
from stablerep.evaluation.protocols.geometry import run_geometry
from stablerep.evaluation.protocols.probes import run_logreg, run_ridge
from stablerep.evaluation.results import Row
from stablerep.evaluation.sets import LabelledSet
from stablerep.evaluation.sets.labelled import Targets
from tests.stablerep.evaluation.fake_model import FakeModel


def draw(labels: Tensor, seed: int, num_captions: int = 0, ignored: Tensor | None = None) -> Features:
    """Features that say something of the labels; the images take the captions in turn."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.nn.functional.one_hot(labels).float() if labels.ndim == 1 else labels.float()
    values = shown @ torch.eye(shown.shape[1], 6) + torch.randn(len(labels), 6, generator=generator)
    captions = tuple(
        f"caption {index % num_captions}" if num_captions else "" for index in range(len(labels))
    )
    names = tuple(f"{seed}/{index}" for index in range(len(labels)))
    texts = tuple((caption,) for caption in captions)
    return Features({"cls": values}, labels, names, captions, texts, "", (), ignored)


def build(features: dict[str, Features], settings: ExtractionSettings) -> Evaluation:
    targets: Targets = "classes" if features["train"].labels.ndim == 1 else "multilabel"
    return Evaluation(
        config=EvaluateConfig(checkpoint="x", data="x"),
        model=FakeModel(),  # type: ignore[arg-type]
        dataset=LabelledSet("x", targets, ("a", "b", "c"), (), (), ()),
        settings=settings,
        cache=None,
        fingerprint="",
        features=features,
        feature_names=["cls"],
    )


LABELS = torch.arange(120) % 3


@pytest.mark.parametrize(
    ("num_captions", "has_validation", "expected"),
    [(0, False, "image"), (30, False, "caption"), (3, False, "caption or image"), (30, True, None)],
)
def test_rows_say_what_stayed_whole_when_images_were_held_out(
    settings: ExtractionSettings, num_captions: int, has_validation: bool, expected: str | None
) -> None:
    features = {"train": draw(LABELS, 0, num_captions), "test": draw(LABELS[:60], 1)}
    if has_validation:
        features["validation"] = draw(LABELS[:60], 2)
    evaluation = build(features, settings)
    rows = [*run_logreg(evaluation), *run_ridge(evaluation)]
    assert [row.hyperparameters.get("held_out_by") for row in rows] == [expected] * 3


def test_an_image_without_a_caption_leaves_the_captions_of_the_others_whole(
    settings: ExtractionSettings,
) -> None:
    captioned = draw(LABELS, 0, 30)
    train = dataclasses.replace(captioned, caption_ids=("", "", *captioned.caption_ids[2:]))
    evaluation = build({"train": train, "test": draw(LABELS[:60], 1)}, settings)
    groups = evaluation.train_groups
    assert groups is not None
    assert groups[:2].tolist() == [0, 1]
    assert groups[2:].unique().tolist() == list(range(2, 32))
    rows = [*run_logreg(evaluation), *run_ridge(evaluation)]
    assert [row.hyperparameters["held_out_by"] for row in rows] == ["caption"] * 3


@pytest.mark.parametrize("has_validation", [False, True])
def test_ignored_entries_count_neither_in_fit_choice_nor_score(
    settings: ExtractionSettings, has_validation: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = {}
    for seed, split in enumerate(("train", "test", "validation")[: 3 if has_validation else 2]):
        labels = torch.rand(100, 3, generator=generator) < 0.4
        ignored = (torch.rand(100, 3, generator=generator) < 0.3) & ~labels
        features[split] = draw(labels, seed, ignored=ignored)
    (row,) = run_logreg(build(features, settings))
    sides = {split: (part.values["cls"], part.labels) for split, part in features.items()}
    oracle = multilabel_logistic_regression(
        *sides["train"],
        sides["test"][0],
        train_ignored=features["train"].ignored,
        validation=sides.get("validation"),
        validation_ignored=features["validation"].ignored if has_validation else None,
    )
    assert row.predictions is not None
    assert row.targets is not None
    np.testing.assert_array_equal(row.predictions, oracle.logits)
    test, test_ignored = features["test"], features["test"].ignored
    assert test_ignored is not None
    assert row.value == mean_average_precision(oracle.logits, test.labels, test_ignored)
    assert row.value != mean_average_precision(oracle.logits, test.labels)
    np.testing.assert_array_equal(row.targets == -1, test_ignored)
    np.testing.assert_array_equal(row.targets == 1, test.labels)


def test_protocols_in_float64_run_on_the_cpu_where_the_device_has_none(
    settings: ExtractionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {split: draw(LABELS, seed) for seed, split in enumerate(("train", "test", "validation"))}

    def run(evaluation: Evaluation) -> list[Row]:
        return [*run_logreg(evaluation), *run_ridge(evaluation), *run_geometry(evaluation)]

    expected = run(build(features, settings))
    # A device without any arithmetic: what reaches it cannot come back.
    elsewhere = build(features, dataclasses.replace(settings, device=torch.device("meta")))
    with pytest.raises((NotImplementedError, RuntimeError)):
        run(elsewhere)
    monkeypatch.setattr(evaluation_module, "has_float64", lambda device: device.type == "cpu")
    found = run(elsewhere)
    assert [(row.key, row.value) for row in found] == [(row.key, row.value) for row in expected]


def test_a_device_is_asked_whether_it_has_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_float64(torch.device("cpu"))

    def refuse(*_: object, **__: object) -> Tensor:
        raise TypeError("the MPS framework doesn't support float64")

    monkeypatch.setattr(torch, "ones", refuse)
    assert not has_float64(torch.device("mps"))
