"""Frozen features of labelled images: every feature in one pass, on all ranks; augmented views; texts.

With ranks, each takes every world_size-th image, so that none is computed twice; rank 0 puts the rows at
their places and is the one that has the result. The ranks go from batch to batch together: what stops one
stops all, with its message.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from stablerep import distributed
from stablerep.evaluation.sets.labelled import LabelledImage, LabelledSet
from stablerep.loading.model import InputFormat

StorageType = Literal["float32", "float16", "bfloat16"]
Compute = Callable[[Tensor], Mapping[str, Tensor]]
_Value = TypeVar("_Value")


class FeatureModel(Protocol):
    """What extraction needs of a model; `stablerep.loading.LoadedModel` has it."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features that it offers."""

    @property
    def input_format(self) -> InputFormat:
        """What it takes."""

    @property
    def backbone(self) -> nn.Module:
        """Normalised images [N, 3, S, S] to the pooled feature [N, D]."""

    def extract(self, images: Tensor) -> Mapping[str, Tensor]:
        """Every feature of `feature_names`, [N, D] each."""

    def to(self, device: torch.device) -> Any:
        """Moves it, in place."""


class TextModel(Protocol):
    """What text embeddings need of a model."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Normalised embeddings [M, E]."""

    def to(self, device: torch.device) -> Any:
        """Moves it, in place."""


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are computed.

    Args:
        num_images_per_batch: Images in one forward pass of a rank; a view counts as an image.
        num_workers: Processes that decode, of each rank; 0 decodes in this one.
        precision: Arithmetic of the model.
        device: Where the model runs.
        error_budget_fraction: Largest share of a split's images that may be unreadable, in [0, 1].
        seed: Key of the augmentations.
        storage: Type in which features are kept.
    """

    num_images_per_batch: int
    num_workers: int
    precision: Literal["float32", "bfloat16"]
    device: torch.device
    error_budget_fraction: float = 0.001
    seed: int = 0
    storage: StorageType = "float32"

    @property
    def storage_dtype(self) -> torch.dtype:
        """The type in which features are kept, as torch names it."""
        dtype: torch.dtype = getattr(torch, self.storage)
        return dtype


@dataclass(frozen=True)
class Features:
    """Features of the readable images of one split, in the order of the split.

    Args:
        values: Features by name, in the storage type, on the CPU.
        labels: Class indices, or which classes an image has.
        names: The images' names.
        caption_ids: Identity of each image's caption; images of one caption share it. "" without captions.
        captions: The captions; "" where there are none.
        digest: `digest_images` of the whole split.
        unreadable: One line for each image that could not be read.
        ignored: Of a multi-label set, the entries of `labels` that count neither as right nor as wrong.

    Shapes:
        values [N, D_name]; labels int64 [N], or bool [N, C] of a multi-label set, as is `ignored`.
    """

    values: Mapping[str, Tensor]
    labels: Tensor
    names: tuple[str, ...]
    caption_ids: tuple[str, ...]
    captions: tuple[str, ...]
    digest: str
    unreadable: tuple[str, ...]
    ignored: Tensor | None = None

    @property
    def caption_labels(self) -> Tensor:
        """Numbers of the captions, in the order of their first images: int64 [N]."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in self.caption_ids])


@dataclass(frozen=True)
class ImageChange:
    """What is done with an image after the crop and before the normalisation, such as a corruption.

    Args:
        name: All that the outcome depends on, in words: it is a part of the transform, and of a cache's key.
        apply: From an image and its name to the image that the model sees; workers call it.

    Shapes:
        apply: uint8 [3, S, S] -> uint8 [3, S, S]
    """

    name: str
    apply: Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class ViewFeatures:
    """The pooled feature of augmented views of the readable images of a split, in the order of the split.

    Args:
        values: The features, in the storage type, on the CPU.
        names: The images' names.
        digest: `digest_images` of the whole split.
        unreadable: One line for each image that could not be read.

    Shapes:
        values [num_views, N, D].
    """

    values: Tensor
    names: tuple[str, ...]
    digest: str
    unreadable: tuple[str, ...]


def digest_images(images: Sequence[LabelledImage], sha256_of_images: Sequence[str]) -> str:
    """SHA-256 over names, labels, ignored labels, captions' ids and digests of the images, 64 hex digits.

    Args:
        images: A split.
        sha256_of_images: Digest of what each image is decoded from; "" for one that could not be read.
    """
    digest = hashlib.sha256()
    for image, sha256 in zip(images, sha256_of_images, strict=True):
        entry: list[object] = [image.name, image.labels, image.caption_id, sha256]
        if image.ignored_labels:
            entry.append(image.ignored_labels)
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def build_targets(images: Sequence[LabelledImage], dataset: LabelledSet) -> Tensor:
    """What protocols predict: int64 [N], or bool [N, C] of a multi-label set."""
    if dataset.targets != "multilabel":
        return torch.tensor([image.label for image in images], dtype=torch.int64)
    return _mark([image.labels for image in images], len(dataset.classes))


def build_ignored(images: Sequence[LabelledImage], dataset: LabelledSet) -> Tensor | None:
    """What of the targets is not known and does not count: bool [N, C] of a multi-label set, else None."""
    if dataset.targets != "multilabel":
        return None
    return _mark([image.ignored_labels for image in images], len(dataset.classes))


def _mark(labels: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    marks = torch.zeros(len(labels), num_classes, dtype=torch.bool)
    for row, marked in enumerate(labels):
        marks[row, list(marked)] = True
    return marks


def build_eval_transform(
    image_size: int, resize_size: int | None = None, interpolation: str = "bicubic"
) -> v2.Transform:
    """The shorter side to `resize_size`, then the central square; uint8 [3, image_size, image_size].

    Args:
        image_size: Side of the square, pixels.
        resize_size: What the shorter side is resized to, pixels; None takes 256/224 of the square.
        interpolation: One of torchvision's.
    """
    resize_size = round(image_size * 256 / 224) if resize_size is None else resize_size
    return v2.Compose(
        [
            v2.Resize(resize_size, interpolation=InterpolationMode(interpolation)),
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


def describe_eval_transform(input_format: InputFormat, change: ImageChange | None = None) -> str:
    """The evaluation transform in words, the same for equal transforms."""
    return (
        f"Resize({input_format.resize_size}, {input_format.interpolation}), "
        f"CenterCrop({input_format.image_size}), {f'{change.name}, ' if change else ''}"
        f"mean {list(input_format.mean)}, std {list(input_format.std)}"
    )


def extract_features(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    dataset: LabelledSet,
    settings: ExtractionSettings,
    *,
    description: str,
    feature_names: Sequence[str] | None = None,
    change: ImageChange | None = None,
) -> Features | None:
    """Features under the evaluation transform. With ranks, each of them calls it.

    Args:
        model: The model, in eval mode.
        images: A split of the set, the same on all ranks.
        dataset: The set, for what labels mean.
        settings: How to compute.
        description: What the progress bar and messages call it.
        feature_names: Those of the model's features that are kept; None keeps all.
        change: What else is done with each image.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        ValueError: If more images are unreadable than the error budget allows, or a feature is not finite;
            on every rank.
    """
    names = model.feature_names if feature_names is None else tuple(feature_names)
    if unknown := sorted(set(names) - set(model.feature_names)):
        raise ValueError(f"feature '{unknown[0]}' is none of the model's: {', '.join(model.feature_names)}")
    image_format = model.input_format
    transform = build_eval_transform(
        image_format.image_size, image_format.resize_size, image_format.interpolation
    )
    model.to(settings.device)

    def compute(pixels: Tensor) -> Mapping[str, Tensor]:
        found = model.extract(pixels)
        return {name: found[name] for name in names}

    views = _ViewDataset(images, transform, seeds=None, change=change)
    found = _extract(compute, image_format, views, settings, description)
    if found is None:
        return None
    kept = [images[index] for index in found.kept]
    return Features(
        values={name: values[0] for name, values in found.values.items()},
        labels=build_targets(kept, dataset),
        names=tuple(image.name for image in kept),
        caption_ids=tuple(image.caption_id for image in kept),
        captions=tuple(image.caption for image in kept),
        digest=found.digest,
        unreadable=found.unreadable,
        ignored=build_ignored(kept, dataset),
    )


def extract_augmented_features(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    settings: ExtractionSettings,
    *,
    first_view: int,
    num_views: int,
    description: str,
) -> ViewFeatures | None:
    """Features of the augmented views `first_view`, …, `first_view + num_views − 1` of each image.

    A view is a function of (seed, view, name of the image) alone: not of the order, the batch, the workers
    or the ranks.

    Args:
        model: As for `extract_features`; its backbone's output is taken.
        images: The split.
        settings: How to compute.
        first_view: Index of the first view.
        num_views: Number of views, at least 1.
        description: What the progress bar is called.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        ValueError: As for `extract_features`.
    """
    seeds = [f"{settings.seed}/{view}" for view in range(first_view, first_view + num_views)]
    transform = build_train_transform(model.input_format.image_size)
    model.to(settings.device)
    found = _extract(
        lambda pixels: {"pooled": model.backbone(pixels)},
        model.input_format,
        _ViewDataset(images, transform, seeds),
        settings,
        description,
    )
    if found is None:
        return None
    names = tuple(images[index].name for index in found.kept)
    return ViewFeatures(found.values["pooled"], names, found.digest, found.unreadable)


@torch.no_grad()
def embed_texts(
    model: TextModel, texts: Sequence[str], settings: ExtractionSettings, *, description: str
) -> Tensor | None:
    """Text embeddings, in the order of the texts. With ranks, each of them calls it.

    Args:
        model: A model with a text tower.
        texts: Captions or prompts, at least one; equal texts are computed each time that they occur.
        settings: How to compute; a text counts as an image.
        description: What the progress bar is called.

    Shapes:
        -> [len(texts), E], on the CPU, in the storage type

    Returns:
        The embeddings on rank 0, None on the others.

    Raises:
        ValueError: If the model has no text tower, or an embedding is not finite; names the text.
    """
    if not texts:
        raise ValueError(f"{description}: no texts")
    model.to(settings.device)
    batch_size = settings.num_images_per_batch
    batches = _split_own(len(texts), batch_size)
    assembly = _Assembly(len(texts), settings.storage_dtype)

    def step() -> tuple[_Report, dict[str, Tensor]]:
        indices = next(batches)
        if not indices:
            return _Report(), {}
        own = [texts[index] for index in indices]
        with _autocast(settings):
            rows = model.encode_texts(own).float()
        _check_finite({"text": rows}, [repr(text) for text in own], settings.storage_dtype)
        return _Report(tuple(indices)), {"text": rows[:, None]}

    with _progress(len(texts), description, "texts") as progress:
        for _ in range(_num_rounds(len(texts), batch_size)):
            report, rows = _in_step(step)
            progress.update(_gather_into(assembly, _tell(report, rows), rows, settings.device))
    return assembly.values["text"][0] if distributed.rank() == 0 else None


@dataclass(frozen=True)
class _Views:
    """Of one image: views uint8 [V, 3, S, S], or the error; the digest of the bytes that could be read."""

    index: int
    views: Tensor | None
    sha256: str
    error: str


@dataclass(frozen=True)
class _Report:
    """What a rank says of its batch: which images it could read and which not, and the features' [V, D]."""

    indices: tuple[int, ...] = ()
    digests: Mapping[int, str] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """What a worker hands over: views [B, V, 3, S, S] of the images that it could read."""

    report: _Report
    views: Tensor


def _collate(items: list[_Views]) -> _Batch:
    # One tensor a batch: each tensor that crosses from a worker holds a file descriptor open.
    views = [item.views for item in items if item.views is not None]
    report = _Report(
        indices=tuple(item.index for item in items if item.views is not None),
        digests={item.index: item.sha256 for item in items},
        errors={item.index: item.error for item in items if item.views is None},
    )
    return _Batch(report, torch.stack(views) if views else torch.empty(0))


class _ViewDataset(Dataset[_Views]):
    def __init__(
        self,
        images: Sequence[LabelledImage],
        transform: v2.Transform,
        seeds: list[str] | None,
        change: ImageChange | None = None,
    ) -> None:
        self.images = images
        self.transform = transform
        self.seeds = seeds
        self.change = change

    @property
    def num_views(self) -> int:
        return len(self.seeds) if self.seeds is not None else 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Views:
        image = self.images[index]
        sha256 = ""
        try:
            data = image.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            decoded = image.decode(data)
        except OSError as error:
            return _Views(index, None, sha256, f"{image.name}: {error}")
        except ValueError as error:
            return _Views(index, None, sha256, str(error))
        if self.seeds is None:
            view = self.transform(decoded)
            views = (view if self.change is None else self.change.apply(view, image.name))[None]
        else:
            with torch.random.fork_rng(devices=[]):
                views = torch.stack([self._draw(decoded, f"{seed}/{image.name}") for seed in self.seeds])
        return _Views(index, views, sha256, "")

    def _draw(self, decoded: object, key: str) -> Tensor:
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"))
        view: Tensor = self.transform(decoded)
        return view


@dataclass(frozen=True)
class _Extracted:
    """Values by name [V, N, D] of the images `kept`, on rank 0."""

    values: Mapping[str, Tensor]
    kept: list[int]
    digest: str
    unreadable: tuple[str, ...]


@torch.no_grad()
def _extract(
    compute: Compute,
    input_format: InputFormat,
    dataset: _ViewDataset,
    settings: ExtractionSettings,
    description: str,
) -> _Extracted | None:
    num_images = len(dataset)
    batch_size = max(1, settings.num_images_per_batch // dataset.num_views)
    assembly = _Assembly(num_images, settings.storage_dtype)
    digests, errors = [""] * num_images, dict[int, str]()
    batches = _load_own(dataset, batch_size, settings.num_workers)

    def step() -> tuple[_Report, dict[str, Tensor]]:
        batch = next(batches)
        if not batch.report.indices:
            return batch.report, {}
        rows = _forward(compute, input_format, batch.views, settings)
        names = [dataset.images[index].name for index in batch.report.indices]
        _check_finite(rows, names, settings.storage_dtype)
        return batch.report, rows

    with _progress(num_images, description, "images") as progress:
        for _ in range(_num_rounds(num_images, batch_size)):
            report, rows = _in_step(step)
            reports = _tell(report, rows)
            for part in reports:
                errors.update(part.errors)
                for index, sha256 in part.digests.items():
                    digests[index] = sha256
                progress.update(len(part.errors))
            check_error_budget(list(errors.values()), num_images, settings.error_budget_fraction, description)
            progress.update(_gather_into(assembly, reports, rows, settings.device))
    if len(errors) == num_images:
        raise ValueError(f"{description}: none of the {num_images} images could be read")
    if distributed.rank() != 0:
        return None
    kept = [index for index in range(num_images) if index not in errors]
    return _Extracted(
        values=assembly.keep(kept),
        kept=kept,
        digest=digest_images(dataset.images, digests),
        unreadable=tuple(errors[index] for index in sorted(errors)),
    )


def _num_rounds(num_items: int, batch_size: int) -> int:
    """Batches of the rank that has most of them; the others' last ones may be empty."""
    return math.ceil(math.ceil(num_items / distributed.world_size()) / batch_size)


def _split_own(num_items: int, batch_size: int) -> Iterator[list[int]]:
    """The batches of this rank's share, as many as any rank has."""
    own = list(range(distributed.rank(), num_items, distributed.world_size()))
    for number in range(_num_rounds(num_items, batch_size)):
        yield own[number * batch_size : (number + 1) * batch_size]


def _load_own(dataset: _ViewDataset, batch_size: int, num_workers: int) -> Iterator[_Batch]:
    """The batches of this rank's share, then empty ones."""
    loader = DataLoader(
        Subset(dataset, range(distributed.rank(), len(dataset), distributed.world_size())),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the global state
    )
    yield from loader
    while True:
        yield _Batch(_Report(), torch.empty(0))


def _in_step(function: Callable[[], _Value]) -> _Value:
    """What it returns; an error on one rank is raised on all."""
    value: Any = None
    error = None
    try:
        value = function()
    except Exception as caught:  # whatever it is, the other ranks would wait for ever
        error = caught
    distributed.raise_together(error)
    result: _Value = value
    return result


class _Assembly:
    """The rows of all ranks at their places, in one allocation for each feature.

    Args:
        num_rows: Rows of the whole split.
        dtype: Type in which they are kept.

    Shapes:
        values [V, num_rows, D]
    """

    def __init__(self, num_rows: int, dtype: torch.dtype) -> None:
        self.num_rows, self.dtype = num_rows, dtype
        self.values: dict[str, Tensor] = {}

    def put(self, indices: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Puts rows [B, V, D] at their places."""
        for name, part in rows.items():
            if name not in self.values:
                _, num_views, width = part.shape
                self.values[name] = torch.empty(num_views, self.num_rows, width, dtype=self.dtype)
            self.values[name][:, indices] = part.transpose(0, 1).to("cpu", self.dtype)

    def keep(self, kept: list[int]) -> dict[str, Tensor]:
        """The rows that were put, moved together in place: a second copy may not fit into memory."""
        if len(kept) == self.num_rows:
            return self.values
        places = torch.tensor(kept)
        for values in self.values.values():
            for start in range(0, len(kept), 4096):
                part = places[start : start + 4096]
                values[:, start : start + len(part)] = values[:, part]  # from places that are never before
        return {name: values[:, : len(kept)] for name, values in self.values.items()}


def _tell(report: _Report, rows: Mapping[str, Tensor]) -> list[_Report]:
    """What every rank says of its batch, in rank order."""
    widths = {name: (part.shape[1], part.shape[2]) for name, part in rows.items()}
    return distributed.all_gather_objects(replace(report, widths=widths))


def _gather_into(
    assembly: _Assembly, reports: list[_Report], rows: Mapping[str, Tensor], device: torch.device
) -> int:
    """Puts the rows [B, V, D] of all ranks in rank 0's assembly; returns how many they are."""
    indices = torch.tensor([index for report in reports for index in report.indices], dtype=torch.int64)
    if not distributed.is_distributed():
        assembly.put(indices, rows)
        return len(indices)
    widths = next((report.widths for report in reports if report.widths), None)
    if widths is None:
        return 0
    sizes = [num_views * width for num_views, width in widths.values()]
    own = [part.flatten(1) for part in rows.values()]
    flat = torch.cat(own, dim=1) if own else torch.zeros(0, sum(sizes), device=device)
    num_rows = [len(report.indices) for report in reports]
    gathered = distributed.all_gather_rows(flat, num_rows)  # those of rank 0, then those of rank 1, …
    if distributed.rank() == 0:
        columns = gathered.split(sizes, dim=1)
        parts = zip(widths.items(), columns, strict=True)
        assembly.put(indices, {name: part.unflatten(1, shape) for (name, shape), part in parts})
    return len(indices)


def _forward(
    compute: Compute, input_format: InputFormat, views: Tensor, settings: ExtractionSettings
) -> dict[str, Tensor]:
    """Features float32 [B, V, D] of uint8 views [B, V, 3, S, S], on the device."""
    mean, std = (
        torch.tensor(channels, dtype=torch.float32, device=settings.device).view(3, 1, 1)
        for channels in (input_format.mean, input_format.std)
    )
    pixels = (views.to(settings.device).flatten(0, 1).float() / 255 - mean) / std
    with _autocast(settings):
        found = compute(pixels)
    return {name: part.float().unflatten(0, views.shape[:2]) for name, part in found.items()}


def _autocast(settings: ExtractionSettings) -> torch.autocast:
    is_on = settings.precision == "bfloat16"
    return torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=is_on)


def _progress(total: int, description: str, unit: str) -> "tqdm[Any]":
    is_first = distributed.rank() == 0
    return tqdm(total=total, desc=description, unit=f" {unit}", leave=False, disable=not is_first)


def _check_finite(rows: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype) -> None:
    for feature, values in rows.items():
        finite = values.to(dtype).isfinite().flatten(1).all(dim=1)
        if not finite.all():
            where = names[int((~finite).nonzero()[0])]
            overflow = " in the storage type, of which it exceeds the range"
            reason = overflow if values.isfinite().all() else ""
            raise ValueError(f"{where}: its feature '{feature}' is not finite{reason}")


def check_error_budget(
    unreadable: Sequence[str], num_images: int, error_budget_fraction: float, description: str
) -> None:
    """Stops where too many images of a split are unreadable.

    Args:
        unreadable: One line for each.
        num_images: Images of the split.
        error_budget_fraction: Largest share that may be.
        description: What the message calls the split.

    Raises:
        ValueError: Names the last of them.
    """
    if len(unreadable) > error_budget_fraction * num_images:
        raise ValueError(
            f"{unreadable[-1]}; {description}: {len(unreadable)} of {num_images} images unreadable, "
            f"more than error_budget_fraction {error_budget_fraction} allows"
        )
