"""Robustness: each corrupted image against a loop by hand, the means over corruptions, what is done once."""

import dataclasses
import itertools
import operator
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from stablerep.evaluation.cache.fingerprint import fingerprint_set
from stablerep.evaluation.cache.store import FeatureCache
from stablerep.evaluation.config import EvaluateConfig, RobustnessConfig
from stablerep.evaluation.corruptions import corrupt
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.features import extract_features
from stablerep.evaluation.protocols import robustness
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.robustness import run_robustness
from stablerep.evaluation.protocols.scores import list_scores
from stablerep.evaluation.results import Row
from stablerep.evaluation.sets import LabelledImage, read_labelled_set
from stablerep.loading.model import InputFormat, build_eval_transform
from tests.stablerep.evaluation.fake_model import FakeModel
from tests.stablerep.ranks import run_on_ranks

CORRUPTIONS = ("fog", "frost", "contrast")
SEVERITIES = (1, 5)


@pytest.fixture
def evaluation(
    write_folders: Callable[..., Path], settings: ExtractionSettings, tmp_path: Path
) -> Evaluation:
    dataset = read_labelled_set(write_folders(train=7, test=4))
    # By turns: what the colours do not say, so that predictions are not all right.
    train, test = (
        tuple(dataclasses.replace(image, labels=(index % 3,)) for index, image in enumerate(images))
        for images in (dataset.train, dataset.test)
    )
    dataset = dataclasses.replace(dataset, train=train, test=test)
    model = FakeModel()
    model.input_format = InputFormat(32, (0.5,) * 3, (0.25,) * 3)
    features = {}
    for split, images in dataset.splits.items():
        found = extract_features(model, images, dataset, settings, description=split)
        assert found is not None
        features[split] = found
    model.num_images = 0
    return Evaluation(
        config=EvaluateConfig(
            checkpoint="x",
            data="x",
            robustness=RobustnessConfig(corruptions=CORRUPTIONS, severities=SEVERITIES),
        ),
        model=model,  # type: ignore[arg-type]
        dataset=dataset,
        settings=settings,
        cache=FeatureCache(tmp_path / "cache"),
        fingerprint=fingerprint_set(dataset, None)["test"],
        features=features,
        feature_names=["cls"],
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are decoded."""
    names: list[str] = []
    original = LabelledImage.decode

    def spy(image: LabelledImage, data: bytes) -> Image.Image:
        names.append(image.name)
        return original(image, data)

    monkeypatch.setattr(LabelledImage, "decode", spy)
    return names


def run(evaluation: Evaluation) -> dict[str, Row]:
    rows = run_robustness(evaluation)
    assert len({row.protocol for row in rows}) == len(rows)
    return {row.protocol: row for row in rows}


def count_model_images(evaluation: Evaluation) -> int:
    model: FakeModel = evaluation.model  # type: ignore[assignment]
    return model.num_images


def predict(evaluation: Evaluation, corruption: str, severity: int, num_neighbours: int) -> list[int]:
    """One image after the other; votes of the nearest, weighted exp(cosine / 0.07)."""
    train, predictions = evaluation.features["train"], []
    for image in evaluation.dataset.test:
        view = build_eval_transform(32)(image.decode(image.read_bytes()))
        changed: Tensor = corrupt(view, corruption, severity, image_name=image.name)
        feature = FakeModel().backbone((changed.float()[None] / 255 - 0.5) / 0.25)
        cosines = (normalize(train.values["cls"]) @ normalize(feature).T).flatten()
        votes = torch.zeros(3)
        for index in cosines.argsort(descending=True)[:num_neighbours]:
            votes[train.labels[index]] += torch.exp(cosines[index] / 0.07)
        predictions.append(int(votes.argmax()))
    return predictions


@pytest.mark.parametrize("num_neighbours", [1, 20])
def test_each_row_is_what_a_loop_over_corrupted_images_gives(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, num_neighbours: int
) -> None:
    monkeypatch.setattr(robustness, "NUM_NEIGHBOURS", num_neighbours)
    rows = run(evaluation)
    for corruption, severity in itertools.product(CORRUPTIONS, SEVERITIES):
        row = rows[f"robustness_{corruption}_{severity}"]
        predictions = predict(evaluation, corruption, severity, num_neighbours)
        labels = [image.label for image in evaluation.dataset.test]
        assert row.predictions is not None
        assert row.predictions.tolist() == predictions
        assert row.value == sum(map(operator.eq, predictions, labels)) / 12
        assert row.hyperparameters["severity"] == severity
    assert num_neighbours == 20 or len({row.value for row in rows.values()}) > 2


def test_there_is_a_mean_over_all_corruptions_and_one_without_frost(evaluation: Evaluation) -> None:
    rows = run(evaluation)
    means = {c: sum(rows[f"robustness_{c}_{s}"].value for s in SEVERITIES) / 2 for c in CORRUPTIONS}
    for corruption, mean in means.items():
        assert rows[f"robustness_{corruption}"].value == pytest.approx(mean)
    assert rows["robustness"].value == pytest.approx(sum(means.values()) / 3)
    assert rows["robustness_without_frost"].value == pytest.approx((means["fog"] + means["contrast"]) / 2)
    assert {row.n for row in rows.values()} == {12}
    config = evaluation.config
    scores = list_scores(config, evaluation.dataset, ["robustness"], ["cls"])
    assert {protocol for protocol, _, _ in scores} == set(rows)
    alone = RobustnessConfig(corruptions=("fog",), severities=(1,))
    only_fog = run(dataclasses.replace(evaluation, config=dataclasses.replace(config, robustness=alone)))
    assert set(only_fog) == {"robustness_clean", "robustness_fog_1", "robustness_fog", "robustness"}


@pytest.mark.parametrize("size", [32, 224])
def test_rows_of_frost_and_of_other_sizes_are_not_comparable(evaluation: Evaluation, size: int) -> None:
    evaluation.model.input_format = InputFormat(size, (0.5,) * 3, (0.25,) * 3)
    rows = run(evaluation)
    comparable = {name for name, row in rows.items() if row.hyperparameters.get("comparable")}
    published = {name for name in rows if "fog" in name or "contrast" in name}
    assert comparable == (published | {"robustness_without_frost"} if size == 224 else set())


@pytest.mark.parametrize(("max_views", "num_passes"), [(2**19, 1), (40, 2), (1, 6)])
def test_a_pass_decodes_an_image_once_for_all_corruptions_that_fit_into_memory(
    evaluation: Evaluation,
    decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    max_views: int,
    num_passes: int,
) -> None:
    monkeypatch.setattr(robustness, "MAX_VIEWS_PER_PASS", max_views)
    rows = run(evaluation)
    assert sorted(decoded) == sorted(image.name for image in evaluation.dataset.test * num_passes)
    assert count_model_images(evaluation) == 12 * 6
    decoded.clear()
    again = run(evaluation)
    assert decoded == []
    assert count_model_images(evaluation) == 12 * 6
    assert {name: row.value for name, row in again.items()} == {n: row.value for n, row in rows.items()}


def test_the_seconds_of_a_row_are_its_own(evaluation: Evaluation) -> None:
    start = time.perf_counter()
    rows = run(evaluation)
    elapsed = time.perf_counter() - start
    parts = {name: row for name, row in rows.items() if "severity" in row.hyperparameters}
    assert 0 < sum(row.seconds for row in parts.values()) <= elapsed
    for corruption in CORRUPTIONS:
        of_corruption = sum(row.seconds for name, row in parts.items() if corruption in name)
        assert rows[f"robustness_{corruption}"].seconds == pytest.approx(of_corruption)
    assert rows["robustness"].seconds == pytest.approx(sum(row.seconds for row in parts.values()))


def fail_to_decode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk of the network: an image that could be read can be no more."""
    original = LabelledImage.decode

    def decode(image: LabelledImage, data: bytes) -> Image.Image:
        if image.name == name:
            raise ValueError(f"{name}: not a readable image")
        return original(image, data)

    monkeypatch.setattr(LabelledImage, "decode", decode)


def test_a_pass_without_an_image_of_the_test_features_stops_robustness(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerant = dataclasses.replace(evaluation.settings, error_budget_fraction=0.1)
    name = evaluation.dataset.test[4].name
    fail_to_decode(name, monkeypatch)
    with pytest.raises(ValueError, match=f"{name}: could be read for its features or for its corrupted"):
        run(dataclasses.replace(evaluation, settings=tolerant))


def test_test_images_that_have_changed_stop_robustness(evaluation: Evaluation) -> None:
    before = dataclasses.replace(evaluation.features["test"], digest="of other bytes")
    changed = dataclasses.replace(evaluation, features={**evaluation.features, "test": before})
    with pytest.raises(ValueError, match="images of test have changed while they were being evaluated"):
        run(changed)


def run_on_rank(rank: int, root: Path, settings: ExtractionSettings) -> str:
    """What stops a rank."""
    model = FakeModel()
    model.input_format = InputFormat(32, (0.5,) * 3, (0.25,) * 3)
    dataset = read_labelled_set(root)
    found = {
        split: extract_features(model, images, dataset, settings, description=split)
        for split, images in dataset.splits.items()
    }
    evaluation = Evaluation(
        config=EvaluateConfig(
            checkpoint="x", data="x", robustness=RobustnessConfig(corruptions=("fog",), severities=(1, 2))
        ),
        model=model,  # type: ignore[arg-type]
        dataset=dataset,
        settings=settings,
        cache=None,
        fingerprint="",
        features={split: features for split, features in found.items() if features is not None},
        feature_names=["cls"],
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        fail_to_decode(dataset.test[4].name, monkeypatch)
        try:
            run_robustness(evaluation)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.distributed
def test_a_pass_over_other_images_stops_all_ranks_together(
    write_folders: Callable[..., Path], settings: ExtractionSettings
) -> None:
    root = write_folders(train=3, test=4)
    messages = run_on_ranks(run_on_rank, 2, root, dataclasses.replace(settings, error_budget_fraction=0.1))
    assert messages == [messages[0]] * 2
    assert "could be read for its features" in messages[0]
