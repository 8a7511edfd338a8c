"""The cache of features: what is taken from it, what never is, and what a full disk leaves."""

import dataclasses
import errno
import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from stablerep.evaluation.cache import store
from stablerep.evaluation.cache.files import list_files, verify_file
from stablerep.evaluation.cache.fingerprint import fingerprint_set
from stablerep.evaluation.cache.store import (
    FeatureCache,
    FeatureKey,
    build_keys,
    load_or_embed_texts,
    load_or_extract,
    load_or_extract_changed,
)
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.features import Features
from stablerep.evaluation.sets import LabelledImage, LabelledSet, read_labelled_set
from stablerep.evaluation.sets.labelled import FileRange
from stablerep.evaluation.transforms import ImageChange
from stablerep.loading.model import InputFormat
from tests.stablerep.datasets import write_dataset
from tests.stablerep.evaluation.fake_model import FakeModel
from tests.stablerep.ranks import run_on_ranks

WriteFolders = Callable[..., Path]
NUM_IMAGES = 9


@pytest.fixture
def dataset(write_folders: WriteFolders) -> LabelledSet:
    return read_labelled_set(write_folders(train=3, test=1))


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def load(
    model: FakeModel,
    dataset: LabelledSet,
    settings: ExtractionSettings,
    cache: FeatureCache | None,
    **options: Any,
) -> Features:
    fingerprint = fingerprint_set(dataset, None)["train"]
    features = load_or_extract(model, dataset, "train", settings, cache, fingerprint, **options)
    assert features is not None
    return features


def load_changed(
    model: FakeModel,
    dataset: LabelledSet,
    settings: ExtractionSettings,
    cache: FeatureCache | None,
    changes: Sequence[ImageChange | None],
) -> list[Features]:
    fingerprint = fingerprint_set(dataset, None)["train"]
    found = load_or_extract_changed(model, dataset, "train", settings, cache, fingerprint, changes)
    assert found is not None
    return found


def assert_equal(found: Features, expected: Features) -> None:
    for field in dataclasses.fields(Features):
        if field.name not in ("values", "labels", "ignored"):
            assert getattr(found, field.name) == getattr(expected, field.name)
    assert torch.equal(found.labels, expected.labels)
    assert list(found.values) == list(expected.values)
    for name, values in expected.values.items():
        assert found.values[name].dtype == values.dtype
        assert torch.equal(found.values[name], values)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_features_come_from_the_cache_as_they_were(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache, storage: Any
) -> None:
    settings = dataclasses.replace(settings, storage=storage)
    expected = load(FakeModel(), dataset, settings, None)
    computing, reading = FakeModel(), FakeModel()
    assert_equal(load(computing, dataset, settings, cache), expected)
    assert_equal(load(reading, dataset, settings, cache), expected)
    assert (computing.num_images, reading.num_images) == (NUM_IMAGES, 0)


def test_captions_and_their_ids_are_kept(
    tmp_path: Path, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    captions = write_dataset(tmp_path / "set", [3], num_images=2)
    dataset = read_labelled_set(tmp_path / "set")
    fingerprint = fingerprint_set(dataset, None)["test"]
    for _ in range(2):
        features = load_or_extract(FakeModel(), dataset, "test", settings, cache, fingerprint)
        assert features is not None
        assert features.captions == tuple((caption,) for caption in captions for _ in range(2))
        assert features.caption_ids == tuple(image.caption_id for image in dataset.test)


def test_truth_values_of_several_classes_are_kept(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    images = tuple(dataclasses.replace(image, ignored_labels=(0,)) for image in dataset.train)
    several = dataclasses.replace(dataset, targets="multilabel", train=images)
    for model in (FakeModel(), FakeModel()):
        features = load(model, several, settings, cache)
        assert features.labels.dtype == torch.bool
        assert torch.equal(features.labels, torch.eye(3, dtype=torch.bool).repeat_interleave(3, dim=0))
        assert features.ignored is not None
        assert features.ignored.tolist() == [[True, False, False]] * NUM_IMAGES
    assert model.num_images == 0
    assert load(FakeModel(), dataset, settings, cache).ignored is None


def test_only_missing_features_are_computed(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    first, second, third = FakeModel(), FakeModel(), FakeModel()
    assert list(load(first, dataset, settings, cache, feature_names=["patch_mean"]).values) == ["patch_mean"]
    assert list(load(second, dataset, settings, cache).values) == ["cls", "patch_mean"]
    assert list(load(third, dataset, settings, cache, feature_names=["cls"]).values) == ["cls"]
    assert [model.num_images for model in (first, second, third)] == [NUM_IMAGES, NUM_IMAGES, 0]
    assert len(list_files(cache.folder)) == 2


def darken(image: torch.Tensor, name: str) -> torch.Tensor:
    return image // 2


@pytest.mark.parametrize(
    "changed", ["weights", "change", "transform", "image", "label", "precision", "storage"]
)
def test_features_of_anything_else_are_never_used(
    dataset: LabelledSet,
    settings: ExtractionSettings,
    cache: FeatureCache,
    changed: str,
    encode_image: Callable[[str, int], bytes],
) -> None:
    load(FakeModel(), dataset, settings, cache)
    model = FakeModel("other weights" if changed == "weights" else "fake")
    if changed == "transform":
        model.input_format = InputFormat(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_fraction=1.0)
    if changed in ("precision", "storage"):
        settings = dataclasses.replace(settings, **{changed: "bfloat16"})  # type: ignore[arg-type]
    image = dataset.train[4]
    if changed == "image":
        Path(image.content.path).write_bytes(encode_image("green", 99))  # type: ignore[attr-defined]
        dataset = read_labelled_set(dataset.name)
    if changed == "label":
        train = (*dataset.train[:4], dataclasses.replace(image, labels=(2,)), *dataset.train[5:])
        dataset = dataclasses.replace(dataset, train=train)
    change = [ImageChange("darker", darken)] if changed == "change" else [None]
    (expected,) = load_changed(model, dataset, settings, None, change)
    model.num_images = 0
    (found,) = load_changed(model, dataset, settings, cache, change)
    assert_equal(found, expected)
    assert model.num_images == NUM_IMAGES
    assert len(list_files(cache.folder)) == 4


def test_what_the_cache_lacks_of_several_changes_is_computed_from_one_decoded_image(
    dataset: LabelledSet,
    settings: ExtractionSettings,
    cache: FeatureCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    darker, negative = ImageChange("darker", darken), ImageChange("negative", invert)
    expected = [load_changed(FakeModel(), dataset, settings, None, [c])[0] for c in (None, darker, negative)]
    load_changed(FakeModel(), dataset, settings, cache, [darker])
    decoded: list[str] = []
    original = LabelledImage.decode

    def spy(image: LabelledImage, data: bytes) -> Image.Image:
        decoded.append(image.name)
        return original(image, data)

    monkeypatch.setattr(LabelledImage, "decode", spy)
    for num_views, num_decoded in ((2, NUM_IMAGES), (0, 0)):
        decoded.clear()
        model = FakeModel()
        found = load_changed(model, dataset, settings, cache, [None, darker, negative])
        for one, other in zip(found, expected, strict=True):
            assert one.names == other.names
            for name, values in other.values.items():
                torch.testing.assert_close(one.values[name], values)
        assert (model.num_images, len(decoded)) == (num_views * NUM_IMAGES, num_decoded)


def invert(image: torch.Tensor, name: str) -> torch.Tensor:
    return 255 - image


def test_every_part_of_a_key_changes_it() -> None:
    key = FeatureKey("weights", "forward", "data", "transform", "cls", "float32", "float32")
    changed = [
        FeatureKey(**{**dataclasses.asdict(key), field.name: "other"})  # whatever its type
        for field in dataclasses.fields(FeatureKey)
    ]
    assert len({entry.digest for entry in (key, *changed)}) == 9


def test_a_file_under_the_name_of_another_is_not_used(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    load(FakeModel(), dataset, settings, cache)
    fingerprint = fingerprint_set(dataset, None)["train"]
    keys, others = (build_keys(FakeModel(name), settings, fingerprint) for name in ("fake", "other"))
    os.replace(cache.path(keys["cls"]), cache.path(others["cls"]))
    assert cache.load(others["cls"]) is None
    assert f"{cache.path(others['cls'])} is of another key" in caplog.text


def test_a_damaged_file_is_named_and_computed_anew_wherever_it_is_damaged(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(FakeModel(), dataset, settings, cache, feature_names=["cls"])
    (file,) = list_files(cache.folder)
    whole = file.path.read_bytes()
    damages = [whole[:cut] for cut in (0, 4, 100, len(whole) - 1)]
    damages += [whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in range(0, len(whole), 97)]
    for damaged in damages:
        file.path.write_bytes(damaged)
        caplog.clear()
        model = FakeModel()
        assert_equal(load(model, dataset, settings, cache, feature_names=["cls"]), expected)
        assert model.num_images == NUM_IMAGES
        assert f"{file.path} is" in caplog.text
        verify_file(file.path)


def test_the_file_says_what_it_is_of(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    features = load(FakeModel(), dataset, settings, cache, feature_names=["cls"])
    (file,) = list_files(cache.folder)
    with safe_open(file.path, framework="pt") as content:
        metadata = content.metadata()
        assert torch.equal(content.get_tensor("values"), features.values["cls"])
        names = json.loads(bytes(content.get_tensor("images").numpy()))["names"]
    assert tuple(names) == features.names
    assert (metadata["model"], metadata["data"], metadata["split"]) == ("fake", dataset.name, "train")
    assert metadata["digest"] == features.digest
    assert {"torch", "python", "pillow"} <= json.loads(metadata["versions"]).keys()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow further, as a full disk does; not that of the progress bars."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)


def test_a_disk_that_fills_up_leaves_the_old_file_and_the_evaluation(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(FakeModel(), dataset, settings, cache)
    fingerprint = fingerprint_set(dataset, None)["train"]
    keys = build_keys(FakeModel(), settings, fingerprint)
    before = {file.path: file.path.read_bytes() for file in list_files(cache.folder)}
    with largest_file(1000):
        cache.save(keys["cls"], expected, {"model": "fake", "data": "x", "split": "train"})
        assert_equal(load(FakeModel("other"), dataset, settings, cache), expected)
    assert caplog.text.count("features are not kept in") == 3
    assert str(cache.path(keys["cls"])) in caplog.text
    assert {path: path.read_bytes() for path in cache.folder.iterdir()} == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_last_moment_leaves_the_old_file(
    dataset: LabelledSet,
    settings: ExtractionSettings,
    cache: FeatureCache,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    features = load(FakeModel(), dataset, settings, cache, feature_names=["cls"])
    (file,) = list_files(cache.folder)
    before = file.path.read_bytes()
    key = build_keys(FakeModel(), settings, features.digest)["cls"]

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, call, fail)
    other = dataclasses.replace(features, values={"cls": features.values["cls"] + 1})
    cache.save(key, other, {"model": "fake", "data": "x", "split": "train"})
    assert f"features are not kept in {file.path}: [Errno 28] No space left on device" in caplog.text
    assert [path.read_bytes() for path in cache.folder.iterdir()] == [before]


def test_a_folder_that_cannot_be_made_is_a_warning(
    dataset: LabelledSet, settings: ExtractionSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("x")
    cache = FeatureCache(tmp_path / "file" / "cache")
    assert_equal(load(FakeModel(), dataset, settings, cache), load(FakeModel(), dataset, settings, None))
    assert caplog.text.count(f"features are not kept in {tmp_path}/file/cache") == 2


def test_unreadable_images_are_remembered_and_still_count(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    Path(dataset.train[2].content.path).write_bytes(b"\0" * 300)  # type: ignore[attr-defined]
    dataset = read_labelled_set(dataset.name)
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.2)
    expected = load(FakeModel(), dataset, tolerant, cache)
    model = FakeModel()
    assert_equal(load(model, dataset, tolerant, cache), expected)
    assert (model.num_images, len(expected.unreadable)) == (0, 1)
    with pytest.raises(ValueError, match=r"blue/002.png: not a readable image.* 1 of 9 images unreadable"):
        load(model, dataset, settings, cache)


def test_features_are_of_the_same_images_where_one_could_be_read_only_once(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    """The cached feature lacks an image that the other has: both are computed."""
    whole = load(FakeModel(), dataset, settings, cache)
    key = build_keys(FakeModel(), settings, whole.digest)["cls"]
    partial = dataclasses.replace(
        whole,
        values={"cls": whole.values["cls"][1:]},
        labels=whole.labels[1:],
        names=whole.names[1:],
        caption_ids=whole.caption_ids[1:],
        captions=whole.captions[1:],
        unreadable=(f"{whole.names[0]}: I/O error",),
    )
    cache.save(key, partial, {"model": "fake", "data": "x", "split": "train"})
    cache.path(build_keys(FakeModel(), settings, whole.digest)["patch_mean"]).unlink()
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.2)
    assert_equal(load(FakeModel(), dataset, tolerant, cache), whole)
    reading = FakeModel()
    assert_equal(load(reading, dataset, settings, cache), whole)
    assert reading.num_images == 0


def test_cached_features_of_unlike_images_are_computed_anew(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    """Nothing is missing, but one of the two lacks an image that no decoder here can read."""
    damaged = Path(dataset.train[2].content.path)  # type: ignore[attr-defined]
    damaged.write_bytes(b"\0" * 300)
    dataset = read_labelled_set(dataset.name)
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.2)
    expected = load(FakeModel(), dataset, tolerant, cache)
    key = build_keys(FakeModel(), settings, expected.digest)["cls"]
    of_all = dataclasses.replace(
        expected,
        values={"cls": torch.cat([expected.values["cls"], torch.ones(1, 24)])},
        labels=torch.cat([expected.labels, torch.zeros(1, dtype=torch.int64)]),
        names=tuple(image.name for image in dataset.train),
        caption_ids=("",) * NUM_IMAGES,
        captions=((),) * NUM_IMAGES,
        unreadable=(),
    )
    cache.save(key, of_all, {"model": "fake", "data": "x", "split": "train"})
    model = FakeModel()
    assert_equal(load(model, dataset, tolerant, cache), expected)
    assert model.num_images == NUM_IMAGES - 1


def test_an_image_that_is_not_what_was_recorded_is_left_out_of_the_cache_until_it_is(
    dataset: LabelledSet, settings: ExtractionSettings, cache: FeatureCache
) -> None:
    content = dataset.train[2].content
    assert isinstance(content, FileRange)
    data = Path(content.path).read_bytes()
    recorded = dataclasses.replace(content, recorded_sha256=hashlib.sha256(data).hexdigest())
    train = list(dataset.train)
    train[2] = dataclasses.replace(train[2], content=recorded)
    dataset = dataclasses.replace(dataset, train=tuple(train))
    Path(content.path).write_bytes(data[:-20] + bytes(20))
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.2)
    for num_images in (NUM_IMAGES - 1, 0):
        model = FakeModel()
        features = load(model, dataset, tolerant, cache)
        assert model.num_images == num_images
        assert train[2].name not in features.names
        assert len(features.unreadable) == 1
    Path(content.path).write_bytes(data)
    for num_images in (NUM_IMAGES, 0):
        model = FakeModel()
        assert load(model, dataset, settings, cache).names == tuple(image.name for image in train)
        assert model.num_images == num_images


def test_texts_are_embedded_once(settings: ExtractionSettings, cache: FeatureCache) -> None:
    model = FakeModel()
    one, other = ["a hat", "two shoes"], ["two shoes", "a hat"]
    for texts, num_texts in ((one, 2), (one, 2), (other, 4)):
        found = load_or_embed_texts(model, texts, settings, cache, description="captions")
        assert found is not None
        assert model.num_texts == num_texts
        assert torch.equal(found, FakeModel().encode_texts(texts))


def load_on_rank(rank: int, root: Path, folder: Path, settings: ExtractionSettings) -> Any:
    dataset, model = read_labelled_set(root), FakeModel()
    fingerprint = fingerprint_set(dataset, None)["train"] if rank == 0 else ""
    found = []
    for _ in range(2):
        features = load_or_extract(model, dataset, "train", settings, FeatureCache(folder), fingerprint)
        texts = load_or_embed_texts(
            model, ["a", "bb", "ccc"], settings, FeatureCache(folder), description="captions"
        )
        found.append(
            (
                model.num_images,
                model.num_texts,
                features and features.values["cls"].numpy().tolist(),
                texts is not None and texts.tolist(),
            )
        )
    return found


@pytest.mark.distributed
def test_ranks_share_what_rank_0_finds(
    write_folders: WriteFolders, settings: ExtractionSettings, tmp_path: Path
) -> None:
    root = write_folders(train=3, test=1)
    expected = load(FakeModel(), read_labelled_set(root), settings, None).values["cls"].tolist()
    first, second = run_on_ranks(load_on_rank, 2, root, tmp_path / "cache", settings)
    texts = FakeModel().encode_texts(["a", "bb", "ccc"]).tolist()
    assert first == [(5, 2, expected, texts)] * 2
    assert second == [(4, 1, None, False)] * 2
