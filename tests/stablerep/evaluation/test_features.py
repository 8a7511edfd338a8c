"""Feature extraction: what a feature depends on, and what stops it."""

import dataclasses
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from stablerep.evaluation.features import (
    ExtractionSettings,
    Features,
    build_eval_transform,
    extract_augmented_features,
    extract_features,
)
from stablerep.evaluation.labelled import LabelledImage, read_labelled_set

WriteFolders = Callable[..., Path]


@pytest.fixture
def images(write_folders: WriteFolders) -> tuple[LabelledImage, ...]:
    return read_labelled_set(write_folders(train=7, test=1)).train


def extract_views(
    backbone: nn.Module,
    images: tuple[LabelledImage, ...],
    settings: ExtractionSettings,
    first_view: int = 0,
    num_views: int = 3,
) -> Features:
    return extract_augmented_features(
        backbone, images, settings, first_view=first_view, num_views=num_views, description="views"
    )


def test_features_equal_a_loop_over_torchvision_transforms(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    oracle = transforms.Compose(
        [
            transforms.Resize(18, interpolation=transforms.InterpolationMode.BICUBIC),  # 16 · 256 / 224
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ]
    )
    expected = torch.cat([backbone(oracle(Image.open(image.path).convert("RGB"))[None]) for image in images])
    features = extract_features(backbone, images, settings, description="train")
    torch.testing.assert_close(features.values[0], expected, atol=1e-5, rtol=1e-5)
    assert features.labels.tolist() == [image.label for image in images]
    assert features.names == tuple(image.name for image in images)


def test_published_size_is_resized_to_256_and_cropped_to_224() -> None:
    view = build_eval_transform(224)(Image.new("RGB", (500, 400)))
    assert view.shape == (3, 224, 224)
    resize = build_eval_transform(224).transforms[0]
    assert resize.size == [256]


def test_features_of_the_same_image_are_identical(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    features = extract_features(backbone, (images[0], images[5], images[0]), settings, description="x")
    assert torch.equal(features.values[0, 0], features.values[0, 2])
    assert not torch.equal(features.values[0, 0], features.values[0, 1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_do_not_depend_on_batch_workers_or_grouping(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings, num_workers: int
) -> None:
    expected = extract_views(backbone, images, settings)
    other = dataclasses.replace(settings, num_images_per_batch=5, num_workers=num_workers)
    last = extract_views(backbone, images[::-1], other, first_view=2, num_views=1)
    torch.testing.assert_close(last.values[0].flip(0), expected.values[2])


def test_workers_do_not_hold_a_file_descriptor_an_image(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = dataclasses.replace(settings, num_images_per_batch=105, num_workers=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        features = extract_features(backbone, images * 20, many, description="x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert features.values.shape == (1, 420, 24)


def test_views_differ_from_one_another_and_with_the_seed(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    views = extract_views(backbone, images, settings).values
    reseeded = extract_views(backbone, images, dataclasses.replace(settings, seed=1)).values
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], reseeded[0])


def test_extraction_leaves_the_global_random_state_alone(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    before = torch.get_rng_state()
    extract_views(backbone, images, settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_features_are_stored_as_float32_and_stay_near(
    images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 12))
    vars(backbone).update(image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    exact = extract_features(backbone, images, settings, description="x").values
    half = extract_features(
        backbone, images, dataclasses.replace(settings, precision="bfloat16"), description="x"
    ).values
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)


def test_digest_changes_with_one_byte_or_one_label(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    digest = extract_features(backbone, images, settings, description="x").digest
    relabelled = (dataclasses.replace(images[0], label=2), *images[1:])
    assert extract_features(backbone, relabelled, settings, description="x").digest != digest
    assert extract_features(backbone, images, settings, description="x").digest == digest
    images[3].path.write_bytes(images[4].read_bytes())
    changed = (*images[:3], dataclasses.replace(images[3], num_bytes=images[4].num_bytes), *images[4:])
    assert extract_features(backbone, changed, settings, description="x").digest != digest


def corrupt(image: LabelledImage) -> None:
    image.path.write_bytes(b"\0" * image.num_bytes)


def test_a_corrupt_image_stops_the_extraction_and_is_named(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    corrupt(images[9])
    with pytest.raises(
        ValueError, match=rf"{images[9].name}: not a readable image.* 1 of 21 images unreadable"
    ):
        extract_features(backbone, images, settings, description="train features")


def test_corrupt_images_within_the_budget_are_left_out_and_named(
    backbone: nn.Module, images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    corrupt(images[0])
    corrupt(images[9])
    tolerant = dataclasses.replace(settings, error_budget_fraction=0.1)
    features = extract_features(backbone, images, tolerant, description="train")
    kept = [image for index, image in enumerate(images) if index not in (0, 9)]
    assert features.names == tuple(image.name for image in kept)
    assert features.labels.tolist() == [image.label for image in kept]
    assert [line.split(":")[0] for line in features.unreadable] == [images[0].name, images[9].name]
    expected = extract_features(backbone, kept, settings, description="train")
    torch.testing.assert_close(features.values, expected.values)


def test_a_feature_that_is_not_finite_stops_the_extraction_and_names_the_image(
    images: tuple[LabelledImage, ...], settings: ExtractionSettings
) -> None:
    class Overflowing(nn.Module):
        image_size, mean, std = 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

        def forward(self, pixels: Tensor) -> Tensor:
            red = pixels[:, 0].mean((1, 2)) > pixels[:, 2].mean((1, 2)) + 0.2
            return torch.where(red[:, None], float("nan"), pixels.flatten(1))

    with pytest.raises(ValueError, match=r"train/red/000.png: the backbone's feature is not finite"):
        extract_features(Overflowing(), images, settings, description="x")
