"""Feature extraction: what a feature depends on, and what stops it."""

import dataclasses
import os
import re
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from stablerep.backbones import build_backbone
from stablerep.evaluation.extraction import ExtractionSettings, embed_texts
from stablerep.evaluation.features import (
    FeatureModel,
    Features,
    ViewFeatures,
    extract_augmented_features,
    extract_changed_features,
    extract_features,
)
from stablerep.evaluation.sets import LabelledImage, LabelledSet, read_labelled_set
from stablerep.evaluation.transforms import ImageChange, describe_eval_transform
from stablerep.loading.model import InputFormat, LoadedModel, build_eval_transform
from tests.stablerep.evaluation.fake_model import FakeModel
from tests.stablerep.ranks import run_on_ranks

WriteFolders = Callable[..., Path]
Images = tuple[LabelledImage, ...]


@pytest.fixture
def dataset(write_folders: WriteFolders) -> LabelledSet:
    return read_labelled_set(write_folders(train=7, test=1))


@pytest.fixture
def images(dataset: LabelledSet) -> Images:
    return dataset.train


def extract(
    model: FeatureModel, images: Sequence[LabelledImage], settings: ExtractionSettings, **options: Any
) -> Features:
    dataset = LabelledSet("x", "classes", ("blue", "green", "red"), tuple(images), (), tuple(images))
    features = extract_features(model, images, dataset, settings, description="train features", **options)
    assert features is not None
    return features


def extract_changed(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    settings: ExtractionSettings,
    changes: Sequence[ImageChange | None],
) -> list[Features]:
    dataset = LabelledSet("x", "classes", ("blue", "green", "red"), tuple(images), (), tuple(images))
    found = extract_changed_features(model, images, dataset, settings, changes, description="x")
    assert found is not None
    return found


def extract_views(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    settings: ExtractionSettings,
    first_view: int = 0,
    num_views: int = 3,
) -> ViewFeatures:
    views = extract_augmented_features(
        model, images, settings, first_view=first_view, num_views=num_views, description="views"
    )
    assert views is not None
    return views


def path_of(image: LabelledImage) -> Path:
    return Path(image.content.path)  # type: ignore[attr-defined]


def test_features_equal_a_loop_over_torchvision_transforms(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    oracle = transforms.Compose(
        [
            transforms.Resize(18, interpolation=transforms.InterpolationMode.BICUBIC),  # 16 · 256 / 224
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ]
    )
    inputs = torch.stack([oracle(Image.open(path_of(image)).convert("RGB")) for image in images])
    features = extract(model, images, settings)
    for name, expected in model.extract(inputs).items():
        torch.testing.assert_close(features.values[name], expected, atol=1e-5, rtol=1e-5)
    assert features.labels.tolist() == [image.label for image in images]
    assert features.names == tuple(image.name for image in images)


def test_published_size_is_resized_to_256_and_cropped_to_224() -> None:
    view = build_eval_transform(224)(Image.new("RGB", (500, 400)))
    assert view.shape == (3, 224, 224)
    resize = build_eval_transform(224).transforms[0]
    assert resize.size == [256]


def test_features_of_the_same_image_are_identical(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    values = extract(model, (images[0], images[5], images[0]), settings).values["cls"]
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_do_not_depend_on_batch_workers_or_grouping(
    model: FakeModel, images: Images, settings: ExtractionSettings, num_workers: int
) -> None:
    expected = extract_views(model, images, settings)
    other = dataclasses.replace(settings, num_images_per_batch=5, num_workers=num_workers)
    last = extract_views(model, images[::-1], other, first_view=2, num_views=1)
    torch.testing.assert_close(last.values[0].flip(0), expected.values[2])


def test_workers_do_not_hold_a_file_descriptor_an_image(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = dataclasses.replace(settings, num_images_per_batch=105, num_workers=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        features = extract(model, images * 20, many)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert features.values["cls"].shape == (420, 24)


def test_views_differ_from_one_another_and_with_the_seed(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    views = extract_views(model, images, settings).values
    reseeded = extract_views(model, images, dataclasses.replace(settings, seed=1)).values
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], reseeded[0])


def test_extraction_leaves_the_global_random_state_alone(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    before = torch.get_rng_state()
    extract_views(model, images, settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_arithmetic_stays_near_and_is_stored_as_float32(
    images: Images, settings: ExtractionSettings
) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 12))
    model = LoadedModel(
        name="x",
        architecture="linear",
        kind="timm",
        backbone=linear,
        input_format=InputFormat(16, (0.5,) * 3, (0.25,) * 3),
    )
    exact = extract(model, images, settings).values["cls"]
    half = extract(model, images, dataclasses.replace(settings, precision="bfloat16")).values["cls"]
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_features_are_kept_in_the_type_that_is_asked_for(
    model: FakeModel, images: Images, settings: ExtractionSettings, storage: Any
) -> None:
    exact = extract(model, images, settings)
    half = extract(model, images, dataclasses.replace(settings, storage=storage))
    dtype = getattr(torch, storage)
    for name, values in half.values.items():
        assert torch.equal(values, exact.values[name].to(dtype))
    assert half.digest == exact.digest


def test_only_the_features_that_are_asked_for_are_kept(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    features = extract(model, images, settings, feature_names=["patch_mean"])
    assert list(features.values) == ["patch_mean"]
    with pytest.raises(ValueError, match=r"feature 'cls_last4' is none of the model's: cls, patch_mean"):
        extract(model, images, settings, feature_names=["cls_last4"])


def test_every_feature_of_a_vision_transformer_comes_from_one_pass(
    images: Images, settings: ExtractionSettings
) -> None:
    vit = build_backbone(
        "vit_tiny_patch16_224", 16, {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    )
    loaded = LoadedModel(
        name="vit",
        architecture="vit",
        kind="checkpoint",
        backbone=vit,
        input_format=InputFormat(16, (0.5,) * 3, (0.25,) * 3),
        projection_head=nn.Linear(32, 7),
    )
    passes = []
    loaded.backbone.get_submodule("patch_embed").register_forward_hook(lambda *_: passes.append(1))
    features = extract(loaded, images, settings)
    widths = {name: values.shape[1] for name, values in features.values.items()}
    assert widths == {"cls": 32, "patch_mean": 32, "cls_last4": 128, "projection": 7}
    assert len(passes) == 3  # 21 images, 8 a batch


def test_targets_of_a_multilabel_set_are_one_truth_value_a_class(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    several = tuple(
        dataclasses.replace(image, labels=labels)
        for image, labels in zip(images, [(0, 2), (), (1,)], strict=False)
    )
    dataset = LabelledSet("voc", "multilabel", ("a", "b", "c"), several, (), several)
    features = extract_features(model, several, dataset, settings, description="x")
    assert features is not None
    assert features.labels.dtype == torch.bool
    assert features.labels.tolist() == [[True, False, True], [False, False, False], [False, True, False]]


def test_digest_changes_with_one_byte_or_one_label(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    digest = extract(model, images, settings).digest
    relabelled = (dataclasses.replace(images[0], labels=(2,)), *images[1:])
    assert extract(model, relabelled, settings).digest != digest
    assert extract(model, images, settings).digest == digest
    path_of(images[3]).write_bytes(images[4].read_bytes())
    changed = (*images[:3], dataclasses.replace(images[4], name=images[3].name), *images[4:])
    assert extract(model, changed, settings).digest != digest


def corrupt(image: LabelledImage) -> None:
    path_of(image).write_bytes(bytes(path_of(image).stat().st_size))


def test_a_corrupt_image_stops_the_extraction_and_is_named(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    corrupt(images[9])
    with pytest.raises(
        ValueError, match=rf"{images[9].name}: not a readable image.* 1 of 21 images unreadable"
    ):
        extract(model, images, settings)


def test_corrupt_images_within_the_budget_are_left_out_and_named(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    corrupt(images[0])
    corrupt(images[9])
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.1)
    features = extract(model, images, tolerant)
    kept = [image for index, image in enumerate(images) if index not in (0, 9)]
    assert features.names == tuple(image.name for image in kept)
    assert features.labels.tolist() == [image.label for image in kept]
    assert [line.split(":")[0] for line in features.unreadable] == [images[0].name, images[9].name]
    expected = extract(model, kept, settings)
    for name, values in features.values.items():
        torch.testing.assert_close(values, expected.values[name])


class Overflowing(FakeModel):
    """Its features are not finite for red images."""

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        red = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2)) + 0.2
        return {"cls": images.flatten(1), "patch_mean": torch.where(red[:, None], float("nan"), 1.0)}

    def encode_texts(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float("inf") if "red" in text else 1.0] for text in texts])


def test_a_feature_that_is_not_finite_stops_the_extraction_and_names_the_image(
    images: Images, settings: ExtractionSettings
) -> None:
    with pytest.raises(ValueError, match=r"train/red/000.png: its feature 'patch_mean' is not finite$"):
        extract(Overflowing(), images, settings)


def test_a_feature_beyond_the_storage_type_is_named(images: Images, settings: ExtractionSettings) -> None:
    class Large(FakeModel):
        def extract(self, images: Tensor) -> dict[str, Tensor]:
            return {name: values * 1e6 for name, values in super().extract(images).items()}

    with pytest.raises(ValueError, match=r"blue/000.png: its feature 'cls' is not finite in the storage"):
        extract(Large(), images, dataclasses.replace(settings, storage="float16"))


def test_transforms_are_described_apart() -> None:
    formats = [
        InputFormat(16, (0.5,) * 3, (0.25,) * 3),
        InputFormat(16, (0.5,) * 3, (0.25,) * 3, crop_fraction=1.0),
        InputFormat(16, (0.5,) * 3, (0.25,) * 3, interpolation="bilinear"),
        InputFormat(16, (0.4,) * 3, (0.25,) * 3),
        InputFormat(32, (0.5,) * 3, (0.25,) * 3),
    ]
    assert len({describe_eval_transform(image_format) for image_format in formats}) == len(formats)


def invert(image: Tensor, name: str) -> Tensor:
    """Upside down in brightness, but for one image."""
    return image if name == "train/blue/001.png" else 255 - image


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_change_is_made_to_what_the_model_sees(
    model: FakeModel, images: Images, settings: ExtractionSettings, num_workers: int
) -> None:
    settings = dataclasses.replace(settings, num_workers=num_workers)
    plain = extract(model, images, settings)
    unchanged, changed = extract_changed(model, images, settings, [None, ImageChange("inverted", invert)])
    before, after = (features.values["patch_mean"] for features in (plain, changed))
    torch.testing.assert_close(unchanged.values["patch_mean"], before)
    torch.testing.assert_close(after[1], before[1])
    # Means of pixels that are normalised by (x − ½) / ¼ change their sign.
    torch.testing.assert_close(after[2:], -before[2:])
    assert changed.digest == plain.digest
    format_ = model.input_format
    assert "inverted" in describe_eval_transform(format_, ImageChange("inverted", invert))


def test_changes_are_made_to_one_decoded_image(
    model: FakeModel, images: Images, settings: ExtractionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    original = LabelledImage.decode

    def spy(image: LabelledImage, data: bytes) -> Image.Image:
        decoded.append(image.name)
        return original(image, data)

    monkeypatch.setattr(LabelledImage, "decode", spy)
    changes = [ImageChange(f"{shift} darker", partial(darken, shift=shift)) for shift in range(1, 21)]
    found = extract_changed(model, images, settings, changes)  # more changes than images in a batch
    assert decoded == [image.name for image in images]
    for change, features in zip(changes, found, strict=True):
        (alone,) = extract_changed(model, images, settings, [change])
        for name, values in alone.values.items():
            torch.testing.assert_close(features.values[name], values)


def darken(image: Tensor, name: str, *, shift: int) -> Tensor:
    return image - image.clamp(max=shift)


def test_captions_are_numbered_by_their_first_image(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    ids = ["b", "b", "a", "b", "c"]
    captioned = [dataclasses.replace(i, caption_id=c) for i, c in zip(images, ids, strict=False)]
    assert extract(model, captioned, settings).caption_labels.tolist() == [0, 0, 1, 0, 2]


def test_images_without_a_caption_share_no_number(
    model: FakeModel, images: Images, settings: ExtractionSettings
) -> None:
    ids = ["", "b", "", "b", "a"]
    captioned = [dataclasses.replace(i, caption_id=c) for i, c in zip(images, ids, strict=False)]
    assert extract(model, captioned, settings).caption_labels.tolist() == [0, 1, 2, 1, 3]


def test_text_embeddings_are_in_the_order_of_the_texts(
    model: FakeModel, settings: ExtractionSettings
) -> None:
    texts = [f"{'x' * length} caption" for length in range(1, 20)]
    embeddings = embed_texts(model, texts, settings, description="captions")
    assert embeddings is not None
    assert torch.equal(embeddings, FakeModel().encode_texts(texts))


def test_a_text_whose_embedding_is_not_finite_is_named(settings: ExtractionSettings) -> None:
    with pytest.raises(ValueError, match=r"'a red hat': its feature 'text' is not finite"):
        embed_texts(Overflowing(), ["a hat", "a red hat"], settings, description="captions")


def extract_on_rank(rank: int, root: Path, settings: ExtractionSettings) -> dict[str, Any]:
    """What each of the ranks gets, in one process group for all tests."""
    dataset, model = read_labelled_set(root), FakeModel()
    images = dataset.train
    found: dict[str, Any] = {}
    for name, part in (("all", images), ("one", images[:1])):
        features = extract_features(model, part, dataset, settings, description="train")
        found[name] = features and (
            {name: values.numpy() for name, values in features.values.items()},
            features.names,
            features.labels.numpy(),
            features.digest,
        )
    found["num_images"] = model.num_images
    views = extract_augmented_features(model, images, settings, first_view=1, num_views=2, description="v")
    found["views"] = views and views.values.numpy()
    texts = embed_texts(model, [f"{i:05d}" * i for i in range(1, 12)], settings, description="captions")
    found["texts"] = texts is not None and texts.numpy()
    found["num_texts"] = model.num_texts
    try:
        extract_features(Overflowing(), images, dataset, settings, description="train")
    except ValueError as error:
        found["not finite"] = str(error)
    if rank == 0:
        corrupt(images[3])
    dist.barrier()
    try:
        extract_features(model, images, dataset, settings, description="train")
    except ValueError as error:
        found["unreadable"] = str(error)
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.1)
    partial = extract_features(model, images, dataset, tolerant, description="train")
    found["partial"] = partial and (partial.names, partial.values["cls"].numpy(), partial.unreadable)
    return found


@pytest.mark.distributed
def test_ranks_compute_each_image_once_and_give_what_one_process_gives(
    write_folders: WriteFolders, settings: ExtractionSettings
) -> None:
    root = write_folders(train=7, test=1)
    settings = dataclasses.replace(settings, num_images_per_batch=4)
    dataset, model = read_labelled_set(root), FakeModel()
    expected = extract(model, dataset.train, settings)
    expected_views = extract_views(model, dataset.train, settings, first_view=1, num_views=2)
    first, second = run_on_ranks(extract_on_rank, 2, root, settings)
    values, names, labels, digest = first["all"]
    for name, expected_values in expected.values.items():
        assert np.array_equal(values[name], expected_values.numpy())
    assert (names, digest) == (expected.names, expected.digest)
    assert labels.tolist() == expected.labels.tolist()
    assert first["one"][1] == expected.names[:1]
    assert (first["num_images"], second["num_images"]) == (11 + 1, 10 + 0)
    assert np.array_equal(first["views"], expected_views.values.numpy())
    assert first["texts"].tolist() == [[5.0 * i, 48.0] for i in range(1, 12)]
    assert (first["num_texts"], second["num_texts"]) == (6, 5)
    assert not any(second[name] for name in ("all", "one", "views", "texts", "partial"))
    for words in (first, second):
        # Those of the first batch that has any, of each rank.
        assert re.fullmatch(r"train/red/00[01].png: its feature .* is not finite", words["not finite"])
        assert "train/blue/003.png: not a readable image" in words["unreadable"]
        assert "1 of 21 images unreadable" in words["unreadable"]
    kept_names, kept_values, unreadable = first["partial"]
    kept = [index for index in range(21) if index != 3]
    assert kept_names == tuple(expected.names[index] for index in kept)
    assert np.array_equal(kept_values, expected.values["cls"][kept].numpy())
    assert len(unreadable) == 1
