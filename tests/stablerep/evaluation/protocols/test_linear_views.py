"""The linear probe's views: which are computed when, and that their rows are those of the labels."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stablerep.evaluation.cache.fingerprint import fingerprint_set
from stablerep.evaluation.cache.store import FeatureCache, load_or_extract
from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.features import Features, extract_augmented_features
from stablerep.evaluation.linear import LinearConfig
from stablerep.evaluation.protocols import linear
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.linear import run_linear
from stablerep.evaluation.sets import LabelledImage, LabelledSet, read_labelled_set
from tests.stablerep.evaluation.fake_model import FakeModel
from tests.stablerep.ranks import run_on_ranks

Seen = list[tuple[Tensor, Tensor]]


@pytest.fixture
def dataset(write_folders: Callable[..., Path]) -> LabelledSet:
    return read_labelled_set(write_folders(train=6, test=3))


def build(
    dataset: LabelledSet,
    settings: ExtractionSettings,
    cache: FeatureCache | None = None,
    num_views: int | None = None,
) -> Evaluation:
    """With the features of both splits, from the cache where it has them."""
    model = FakeModel()
    fingerprints = dict.fromkeys(dataset.splits, "")
    if cache is not None:
        fingerprints = dict(fingerprint_set(dataset, cache.folder))
    features: dict[str, Features] = {}
    for split in dataset.splits:
        found = load_or_extract(
            model, dataset, split, settings, cache, fingerprints[split], feature_names=["cls"]
        )
        if found is not None:
            features[split] = found
    return Evaluation(
        config=EvaluateConfig(checkpoint="x", data="x", linear=LinearConfig(3, 4, (0.1,), num_views)),
        model=model,  # type: ignore[arg-type]
        dataset=dataset,
        settings=settings,
        cache=cache,
        fingerprint=fingerprints["test"],
        features=features,
        feature_names=["cls"],
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Views of each epoch and the labels that the probe is given."""
    found: Seen = []
    original = linear.linear_probe

    def spy(views: Callable[[int], Tensor], labels: Tensor, *args: Any, **options: Any) -> Any:
        def watch(epoch: int) -> Tensor:
            found.append((views(epoch), labels))
            return found[-1][0]

        return original(watch, labels, *args, **options)

    monkeypatch.setattr(linear, "linear_probe", spy)
    return found


@pytest.mark.parametrize(
    ("num_views", "views_of_epochs", "passes"),
    [(None, [0, 1, 2], 3), (2, [0, 1, 0], 2), (1, [0, 0, 0], 1), (9, [0, 1, 2], 3)],
)
def test_a_view_is_new_in_every_epoch_unless_cached_ones_are_used_in_turn(
    dataset: LabelledSet,
    settings: ExtractionSettings,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    num_views: int | None,
    views_of_epochs: list[int],
    passes: int,
) -> None:
    computed: list[int] = []

    def spy(*args: Any, first_view: int, num_views: int, **options: Any) -> Any:
        computed.extend(range(first_view, first_view + num_views))
        return extract_augmented_features(*args, first_view=first_view, num_views=num_views, **options)

    monkeypatch.setattr(linear, "extract_augmented_features", spy)
    rows = run_linear(build(dataset, settings, num_views=num_views))
    assert computed == list(range(passes))
    oracle = extract_augmented_features(
        FakeModel(), dataset.train, settings, first_view=0, num_views=3, description="views"
    )
    assert oracle is not None
    assert not torch.equal(oracle.values[0], oracle.values[1])
    for (views, _), view in zip(seen, views_of_epochs, strict=True):
        torch.testing.assert_close(views, oracle.values[view])
    assert {row.hyperparameters["views_cached"] for row in rows} == {num_views}


@pytest.mark.parametrize("num_views", [None, 1])
@pytest.mark.parametrize("is_cached", [False, True])
def test_rows_of_views_and_labels_agree_without_an_unreadable_image(
    dataset: LabelledSet,
    settings: ExtractionSettings,
    tmp_path: Path,
    seen: Seen,
    num_views: int | None,
    is_cached: bool,
) -> None:
    Path(dataset.train[4].content.path).write_bytes(b"broken")  # type: ignore[attr-defined]
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.1)
    cache = FeatureCache(tmp_path / "cache") if is_cached else None
    if is_cached:
        build(dataset, tolerant, cache)
    run_linear(build(dataset, tolerant, cache, num_views))
    readable = dataset.train[:4] + dataset.train[5:]
    assert len(seen) == 3
    for epoch, (views, labels) in enumerate(seen):
        oracle = extract_augmented_features(
            FakeModel(),
            readable,
            settings,
            first_view=0 if num_views else epoch,
            num_views=1,
            description="views",
        )
        assert oracle is not None
        torch.testing.assert_close(views, oracle.values[0])
        assert labels.tolist() == [image.label for image in readable]


def fail_to_decode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with another version of the library that decodes: equal bytes, another outcome."""
    original = LabelledImage.decode

    def decode(image: LabelledImage, data: bytes) -> Any:
        if image.name == name:
            raise ValueError(f"{name}: not a readable image")
        return original(image, data)

    monkeypatch.setattr(LabelledImage, "decode", decode)


def test_an_image_that_is_read_once_and_not_again_stops_the_probe(
    dataset: LabelledSet, settings: ExtractionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = build(dataset, dataclasses.replace(settings, error_budget_fraction=0.1))
    fail_to_decode(dataset.train[4].name, monkeypatch)
    with pytest.raises(ValueError, match=f"{dataset.train[4].name}: could be read for its features"):
        run_linear(evaluation)


def test_images_that_have_changed_stop_the_probe(dataset: LabelledSet, settings: ExtractionSettings) -> None:
    evaluation = build(dataset, settings)
    before = dataclasses.replace(evaluation.features["train"], digest="of other bytes")
    evaluation = dataclasses.replace(evaluation, features={**evaluation.features, "train": before})
    with pytest.raises(ValueError, match="images of train have changed while they were being evaluated"):
        run_linear(evaluation)


def run_on_rank(rank: int, root: Path, settings: ExtractionSettings) -> str:
    """What stops a rank."""
    dataset = read_labelled_set(root)
    evaluation = build(dataset, settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fail_to_decode(dataset.train[4].name, monkeypatch)
        try:
            run_linear(evaluation)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.distributed
def test_rows_that_differ_stop_all_ranks_together(dataset: LabelledSet, settings: ExtractionSettings) -> None:
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.1)
    messages = run_on_ranks(run_on_rank, 2, Path(dataset.name), tolerant)
    assert messages == [messages[0]] * 2
    assert messages[0].startswith(f"{dataset.train[4].name}: could be read for its features")
