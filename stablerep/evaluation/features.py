"""Frozen features of labelled images: the evaluation transform once, or augmented views."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from stablerep.evaluation.labelled import LabelledImage, decode_image

FEATURE_NAME = "backbone output (class token after the final norm)"


@dataclass(frozen=True)
class InputFormat:
    """What a backbone takes: the side of its square input in pixels, mean and deviation of its channels."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_input_format(backbone: nn.Module) -> InputFormat:
    """The input format that a backbone carries as its attributes `image_size`, `mean` and `std`."""
    attributes: Any = backbone
    return InputFormat(int(attributes.image_size), tuple(attributes.mean), tuple(attributes.std))


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are computed.

    Args:
        num_images_per_batch: Images in one forward pass; a view counts as an image.
        num_workers: Processes that decode; 0 decodes in this one.
        precision: Arithmetic of the backbone; the features are stored as float32 either way.
        device: Where the backbone runs.
        error_budget_fraction: Largest share of a split's images that may be unreadable, in [0, 1].
        seed: Key of the augmentations.
    """

    num_images_per_batch: int
    num_workers: int
    precision: Literal["float32", "bfloat16"]
    device: torch.device
    error_budget_fraction: float = 0.001
    seed: int = 0


@dataclass(frozen=True)
class Features:
    """Features of the readable images of one split, in the order of the split.

    Args:
        values: The features, float32, on the CPU.
        labels: Class indices.
        names: The images' names.
        digest: SHA-256 over names, labels and the bytes of the images.
        unreadable: One line for each image that could not be read.

    Shapes:
        values [num_views, N, D], labels [N].
    """

    values: Tensor
    labels: Tensor
    names: tuple[str, ...]
    digest: str
    unreadable: tuple[str, ...]


def build_eval_transform(image_size: int) -> v2.Transform:
    """The shorter side to 256/224 of the size (bicubic), then the central square; uint8 [3, size, size]."""
    return v2.Compose(
        [
            v2.Resize(round(image_size * 256 / 224), interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(image_size),
            v2.PILToTensor(),
        ]
    )


def build_train_transform(image_size: int) -> v2.Transform:
    """RandomResizedCrop of scale (0.08, 1), bicubic, and a horizontal flip; uint8 [3, size, size]."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )


def extract_features(
    backbone: nn.Module, images: Sequence[LabelledImage], settings: ExtractionSettings, *, description: str
) -> Features:
    """Features under the evaluation transform: one view an image.

    Args:
        backbone: Maps normalised [B, 3, S, S] to features [B, D]; has `image_size`, `mean` and `std`.
        images: The split.
        settings: How to compute.
        description: What the progress bar is called.

    Raises:
        ValueError: If more images are unreadable than the error budget allows, or a feature is not finite.
    """
    transform = build_eval_transform(read_input_format(backbone).image_size)
    dataset = _ViewDataset(images, transform, seeds=None)
    return _extract(backbone, dataset, settings, description)


def extract_augmented_features(
    backbone: nn.Module,
    images: Sequence[LabelledImage],
    settings: ExtractionSettings,
    *,
    first_view: int,
    num_views: int,
    description: str,
) -> Features:
    """Features of the augmented views `first_view`, …, `first_view + num_views − 1` of each image.

    A view is a function of (seed, view, name of the image) alone: not of the order, the batch or the workers.

    Args:
        backbone: As for `extract_features`.
        images: The split.
        settings: How to compute.
        first_view: Index of the first view.
        num_views: Number of views, at least 1.
        description: What the progress bar is called.

    Raises:
        ValueError: As for `extract_features`.
    """
    seeds = [f"{settings.seed}/{view}" for view in range(first_view, first_view + num_views)]
    transform = build_train_transform(read_input_format(backbone).image_size)
    return _extract(backbone, _ViewDataset(images, transform, seeds), settings, description)


@dataclass(frozen=True)
class _Views:
    """Of one image: views uint8 [V, 3, S, S] and the digest of the bytes, or the error."""

    index: int
    views: Tensor | None
    sha256: str
    error: str


@dataclass(frozen=True)
class _Batch:
    """What a worker hands over: views [B, V, 3, S, S] of the images that it could read, and the errors."""

    indices: tuple[int, ...]
    digests: tuple[str, ...]
    views: Tensor
    errors: tuple[str, ...]


def _collate(items: list[_Views]) -> _Batch:
    # One tensor a batch: each tensor that crosses from a worker holds a file descriptor open.
    views = [item.views for item in items if item.views is not None]
    readable = [item for item in items if item.views is not None]
    return _Batch(
        indices=tuple(item.index for item in readable),
        digests=tuple(item.sha256 for item in readable),
        views=torch.stack(views) if views else torch.empty(0),
        errors=tuple(item.error for item in items if item.views is None),
    )


class _ViewDataset(Dataset[_Views]):
    def __init__(
        self, images: Sequence[LabelledImage], transform: v2.Transform, seeds: list[str] | None
    ) -> None:
        self.images = images
        self.transform = transform
        self.seeds = seeds

    @property
    def num_views(self) -> int:
        return len(self.seeds) if self.seeds is not None else 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Views:
        image = self.images[index]
        try:
            data = image.read_bytes()
            decoded = decode_image(data, image.name)
        except OSError as error:
            return _Views(index, None, "", f"{image.name}: {error}")
        except ValueError as error:
            return _Views(index, None, "", str(error))
        if self.seeds is None:
            views = self.transform(decoded)[None]
        else:
            with torch.random.fork_rng(devices=[]):
                views = torch.stack([self._draw(decoded, f"{seed}/{image.name}") for seed in self.seeds])
        return _Views(index, views, hashlib.sha256(data).hexdigest(), "")

    def _draw(self, decoded: object, key: str) -> Tensor:
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"))
        view: Tensor = self.transform(decoded)
        return view


@torch.no_grad()
def _extract(
    backbone: nn.Module, dataset: _ViewDataset, settings: ExtractionSettings, description: str
) -> Features:
    loader = DataLoader(
        dataset,
        batch_size=max(1, settings.num_images_per_batch // dataset.num_views),
        num_workers=settings.num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the global state
    )
    backbone = backbone.eval().to(settings.device)
    values: list[Tensor] = []
    kept: list[LabelledImage] = []
    lines: list[str] = []
    unreadable: list[str] = []
    with tqdm(total=len(dataset), desc=description, unit=" images", leave=False) as progress:
        for batch in loader:
            unreadable.extend(batch.errors)
            _check_budget(unreadable, len(dataset), settings.error_budget_fraction, description)
            images = [dataset.images[index] for index in batch.indices]
            if images:
                values.append(_forward(backbone, batch.views, settings))
                _check_finite(values[-1], images)
            kept.extend(images)
            lines.extend(
                f"{image.name}\t{image.label}\t{digest}\n"
                for image, digest in zip(images, batch.digests, strict=True)
            )
            progress.update(len(images) + len(batch.errors))
    if not kept:
        raise ValueError(f"{description}: none of the {len(dataset)} images could be read")
    return Features(
        values=torch.cat(values).transpose(0, 1).contiguous(),
        labels=torch.tensor([image.label for image in kept]),
        names=tuple(image.name for image in kept),
        digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        unreadable=tuple(unreadable),
    )


def _forward(backbone: nn.Module, views: Tensor, settings: ExtractionSettings) -> Tensor:
    """Features float32 [B, V, D] of uint8 views [B, V, 3, S, S]."""
    image_format = read_input_format(backbone)
    mean, std = (
        torch.tensor(channels, dtype=torch.float32, device=settings.device).view(3, 1, 1)
        for channels in (image_format.mean, image_format.std)
    )
    pixels = (views.to(settings.device).flatten(0, 1).float() / 255 - mean) / std
    bfloat16 = settings.precision == "bfloat16"
    with torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        features: Tensor = backbone(pixels)
    return features.float().cpu().unflatten(0, views.shape[:2])


def _check_finite(features: Tensor, images: list[LabelledImage]) -> None:
    finite = features.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(f"{images[int((~finite).nonzero()[0])].name}: the backbone's feature is not finite")


def _check_budget(
    unreadable: list[str], num_images: int, error_budget_fraction: float, description: str
) -> None:
    if len(unreadable) > error_budget_fraction * num_images:
        raise ValueError(
            f"{unreadable[-1]}; {description}: {len(unreadable)} of {num_images} images unreadable, "
            f"more than error_budget_fraction {error_budget_fraction} allows"
        )
