"""Shards to batches: a global order that depends on (seed, epoch) alone, shared out by construction.

    order     the epoch's shards, shuffled, laid end to end in a ring and cut anywhere: captions 0 … T − 1
    steps     S = T // (R · B) for R ranks and B captions a rank and step, the same for every rank
    share     a rank takes S · B consecutive captions, a worker a run of whole batches among them
    shuffle   within a window of the share

A share may begin and end inside a shard, so any number of shards feeds any number of ranks and workers; the
fewer than R · B captions that are left over differ from epoch to epoch. The views of a caption depend on
(seed, epoch, caption): neither ranks nor workers change them.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data_gen.shards import Sample, Shard, read_samples
from stablerep.augment import AugmentationConfig, crop_view, decode_image

logger = logging.getLogger(__name__)

Positives = Literal["caption", "image"]


class Batch(TypedDict):
    """What a step sees.

    Shapes:
        images: uint8 [num_captions, num_views, 3, H, W] from the worker, normalised float32 on the device.
        labels: int64 [num_captions], 63 bits of the caption's id (of the image's, when positives="image").
    """

    images: Tensor
    labels: Tensor
    captions: list[str]
    num_images_dropped: int


@dataclass(frozen=True)
class ViewConfig:
    """How a caption becomes views.

    Attributes:
        num_views: Views of each caption in a batch.
        positives: "caption" draws views from different images of the caption, "image" crops one image again
            and again: SimCLR's positives.
        image_size: Side of a view, pixels.
        augmentation: Distribution of the views.
        seed: Seed of every draw.
    """

    num_views: int
    positives: Positives
    image_size: int
    augmentation: AugmentationConfig
    seed: int

    @property
    def num_images(self) -> int:
        """Images of a caption that its views are drawn from."""
        return self.num_views if self.positives == "caption" else 1


@dataclass(frozen=True)
class Piece:
    """Consecutive samples [start, stop) of one shard."""

    shard: Shard
    start: int
    stop: int


def plan_epoch(shards: list[Shard], seed: int, epoch: int) -> list[Piece]:
    """The epoch's global order, drawn from (seed, epoch): every caption once.

    It begins anywhere, so that what is left over at its end is left over by chance, with one shard too.
    """
    rng = np.random.default_rng([seed, epoch])
    pieces = [Piece(shards[i], 0, shards[i].num_samples) for i in rng.permutation(len(shards))]
    num_captions = sum(shard.num_samples for shard in shards)
    start = int(rng.integers(num_captions))
    return take_pieces(pieces, start, num_captions) + take_pieces(pieces, 0, start)


def take_pieces(pieces: Iterable[Piece], start: int, stop: int) -> list[Piece]:
    """The captions [start, stop) of pieces laid end to end."""
    taken, first = [], 0
    for piece in pieces:
        last = first + piece.stop - piece.start
        low, high = max(start, first), min(stop, last)
        if low < high:
            taken.append(Piece(piece.shard, piece.start + low - first, piece.start + high - first))
        first = last
    return taken


def share_of_worker(
    num_steps: int, num_captions_per_rank: int, rank: int, worker: int, num_workers: int
) -> range:
    """The captions of the global order that a worker of a rank reads: whole batches, none shared.

    Workers take turns at handing out batches, so the first `num_steps % num_workers` of them have one more.
    """
    base, extra = divmod(num_steps, num_workers)
    first_batch = rank * num_steps + worker * base + min(worker, extra)
    num_batches = base + (worker < extra)
    return range(first_batch * num_captions_per_rank, (first_batch + num_batches) * num_captions_per_rank)


def label_of(caption_id: str, image_index: int | None = None) -> int:
    """63 bits of the caption's id; with an index, another such number for each image of the caption."""
    label = int(caption_id[:16], 16) >> 1
    if image_index is not None:
        label = int(np.random.SeedSequence([label, image_index]).generate_state(1, np.uint64)[0]) >> 1
    return label


def draw_views(sample: Sample, epoch: int, config: ViewConfig, where: str) -> tuple[Tensor, int, list[str]]:
    """Decodes and crops the views of one caption.

    Args:
        sample: The caption and its images.
        epoch: Index of the pass over the data.
        config: How views are drawn.
        where: What an error message calls the sample's place.

    Returns:
        The views uint8 [num_views, 3, size, size], the label, and the images that could not be decoded; with
        fewer good images than the views need the first is empty.
    """
    rng = np.random.default_rng([config.seed, epoch, label_of(sample.caption_id)])
    images: list[Tensor] = []
    errors: list[str] = []
    index = 0
    for index in map(int, rng.permutation(len(sample.images))):
        try:
            images.append(decode_image(sample.images[index], f"{sample.key}.{index} of {where}"))
        except ValueError as error:
            errors.append(str(error))
        if len(images) == config.num_images:
            break
    if len(images) < config.num_images:
        return torch.empty(0), 0, errors
    if config.positives == "image":
        images *= config.num_views
    views = [crop_view(image, rng, config.image_size, config.augmentation) for image in images]
    return (
        torch.stack(views),
        label_of(sample.caption_id, index if config.positives == "image" else None),
        errors,
    )


@dataclass
class _Drops:
    """Counts what one worker could not use in this pass, and stops past the budget."""

    num_images_expected: int
    error_budget_fraction: float
    num_images: int = 0

    def add(self, errors: list[str]) -> None:
        for error in errors:
            self.num_images += 1
            if self.num_images > self.error_budget_fraction * self.num_images_expected:
                raise ValueError(
                    f"{error}; {self.num_images} of {self.num_images_expected} images undecodable, "
                    f"error_budget_fraction is {self.error_budget_fraction}"
                )
            logger.warning("dropped: %s", error)


@dataclass
class ShardStream(IterableDataset[dict[str, Any]]):
    """This rank's batches of one epoch; each further iteration is the next epoch.

    An error is handed over as a batch {"error": text}: the loader would wrap it into a worker's traceback.

    Attributes:
        shards: The verified shards.
        views: How views are drawn.
        num_captions_per_rank: Captions in a batch.
        num_steps: Batches of this rank in an epoch.
        rank: Index of this rank.
        num_captions_in_shuffle_window: Captions held in a worker, of which the next is drawn.
        error_budget_fraction: Share of images that may be undecodable.
        epoch: Index of the first pass.
    """

    shards: list[Shard]
    views: ViewConfig
    num_captions_per_rank: int
    num_steps: int
    rank: int
    num_captions_in_shuffle_window: int
    error_budget_fraction: float
    epoch: int = 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, self.epoch = self.epoch, self.epoch + 1  # workers persist, so each keeps this count
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        share = share_of_worker(self.num_steps, self.num_captions_per_rank, self.rank, worker, num_workers)
        try:
            yield from self._batches(share, epoch)
        except (ValueError, OSError) as error:
            yield {"error": str(error)}

    def _batches(self, share: range, epoch: int) -> Iterator[dict[str, Any]]:
        drops = _Drops(len(share) * self.views.num_images, self.error_budget_fraction)
        samples = self._samples(share, epoch, drops)
        for _ in range(len(share) // self.num_captions_per_rank):
            num_before = drops.num_images
            views, labels, captions = zip(*islice(samples, self.num_captions_per_rank), strict=True)
            batch: dict[str, Any] = {"images": torch.stack(views), "labels": torch.tensor(labels)}
            yield batch | {"captions": list(captions), "num_images_dropped": drops.num_images - num_before}

    def _samples(self, share: range, epoch: int, drops: _Drops) -> Iterator[tuple[Tensor, int, str]]:
        """The share's captions, shuffled within a window, and then again from its start.

        So a worker that lost a caption still hands out the number of batches that was planned.
        """
        pieces = take_pieces(plan_epoch(self.shards, self.views.seed, epoch), share.start, share.stop)
        while True:
            num_used = 0
            rng = np.random.default_rng([self.views.seed, epoch, share.start])
            for sample, where in shuffle_window(_read(pieces), self.num_captions_in_shuffle_window, rng):
                views, label, errors = draw_views(sample, epoch, self.views, where)
                drops.add(errors)
                if len(views):
                    num_used += 1
                    yield views, label, sample.caption
            if not num_used:
                raise ValueError(
                    f"none of {len(share)} captions has {self.views.num_images} decodable images"
                )


def _read(pieces: list[Piece]) -> Iterator[tuple[Sample, str]]:
    for piece in pieces:
        for sample in islice(read_samples(piece.shard), piece.start, piece.stop):
            yield sample, piece.shard.tar_name


def shuffle_window(items: Iterable[Any], window: int, rng: np.random.Generator) -> Iterator[Any]:
    """Every item once, each drawn from the next `window` unread ones."""
    held: list[Any] = []
    for item in items:
        held.append(item)
        if len(held) >= window:
            yield _draw(held, rng)
    while held:
        yield _draw(held, rng)


def _draw(held: list[Any], rng: np.random.Generator) -> Any:
    place = int(rng.integers(len(held)))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()
