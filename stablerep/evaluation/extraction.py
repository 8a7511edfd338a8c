"""Images and texts through a model, batch by batch, on all ranks.

Each rank takes every world_size-th image, so that none is computed twice; rank 0 puts the rows at their
places and is the one that has the result. The ranks go from batch to batch together: what stops one stops
all, with its message.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from stablerep import distributed
from stablerep.evaluation.sets.labelled import LabelledImage
from stablerep.loading.model import InputFormat

StorageType = Literal["float32", "float16", "bfloat16"]
Compute = Callable[[Tensor], Mapping[str, Tensor]]
MakeViews = Callable[[Image.Image, str], Tensor]
"""From a decoded image and its name to its views, uint8 [V, 3, S, S]; workers call it."""
_Value = TypeVar("_Value")


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
class Extracted:
    """What `extract_views` returns.

    Args:
        values: By name, of the images `kept`, in the storage type, on the CPU.
        kept: Places of the images that could be read.
        digests: SHA-256 of what each image is decoded from, as `digest_contents` has it.
        unreadable: One line for each image that could not be read.

    Shapes:
        values [V, len(kept), D]; digests [N].
    """

    values: Mapping[str, Tensor]
    kept: list[int]
    digests: Sequence[str]
    unreadable: tuple[str, ...]


@torch.no_grad()
def extract_views(
    compute: Compute,
    input_format: InputFormat,
    images: Sequence[LabelledImage],
    make_views: MakeViews,
    num_views: int,
    settings: ExtractionSettings,
    description: str,
) -> Extracted | None:
    """What `compute` gives for each view of each image, which is decoded once. Each rank calls it.

    Args:
        compute: From normalised views [B, 3, S, S] to rows [B, D] by name.
        input_format: How views are normalised.
        images: The images, the same on all ranks.
        make_views: Makes the views of an image.
        num_views: How many those are.
        settings: How to compute.
        description: What the progress bar and messages call it.

    Returns:
        The rows on rank 0, None on the others.

    Raises:
        ValueError: If more images are unreadable than the error budget allows, or a row is not finite; on
            every rank.
    """
    dataset = _ViewDataset(images, make_views)
    num_images = len(dataset)
    batch_size = max(1, settings.num_images_per_batch // num_views)
    assembly = _Assembly(num_images, settings.storage_dtype)
    digests, errors = [""] * num_images, dict[int, str]()
    batches = _load_own(dataset, batch_size, settings.num_workers)

    def step() -> tuple[_Report, dict[str, Tensor]]:
        batch = next(batches)
        if not batch.report.indices:
            return batch.report, {}
        rows = _forward(compute, input_format, batch.views, settings)
        names = [images[index].name for index in batch.report.indices]
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
    return Extracted(
        values=assembly.keep(kept),
        kept=kept,
        digests=digests,
        unreadable=tuple(errors[index] for index in sorted(errors)),
    )


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
    def __init__(self, images: Sequence[LabelledImage], make_views: MakeViews) -> None:
        self.images = images
        self.make_views = make_views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Views:
        image = self.images[index]
        sha256 = image.content.recorded_sha256  # of an image that is not what was recorded, too
        try:
            data = image.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            decoded = image.decode(data)
        except OSError as error:
            return _Views(index, None, sha256, f"{image.name}: {error}")
        except ValueError as error:
            return _Views(index, None, sha256, str(error))
        return _Views(index, self.make_views(decoded, image.name), sha256, "")


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
