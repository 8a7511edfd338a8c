"""Shards to batches: which steps a worker makes, and how a step's captions become views.

    order     `stablerep.data.order`: the captions of step k, of all ranks, from (seed, epoch, k) alone
    ranks     rank r takes the r-th B of a step's captions
    workers   worker w of W takes the steps w, w + W, …: the sequence of steps is the same for any W
    views     of a caption depend on (seed, pass over its dataset, caption): ranks and workers change nothing

A worker reads some of its steps ahead, in the order of the files, while it decodes those before. A caption
that cannot be used is counted by reason, and another of the batch takes its place with fresh views: labels
are those of content, so the repeat is an exact positive.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data_gen.shards import ShardError
from stablerep.augment import (
    AugmentationConfig,
    Colours,
    augment_batch,
    draw_views,
    flatten_colours,
    stack_colours,
)
from stablerep.backbones import IMAGENET_MEAN, IMAGENET_STD
from stablerep.data.decoding import decode_views
from stablerep.data.order import Order, Position
from stablerep.data.sources import Extent, ShardedDataset, ShardTable

Positives = Literal["caption", "image", "class"]

DROP_REASONS = ("shard broken", "image unreadable", "image undecodable", "caption empty")
_VIEWS, _SUBSTITUTE = range(2)  # keep the random numbers of the two apart


class Batch(TypedDict):
    """What a step sees.

    Shapes:
        images: uint8 [num_captions, num_views, 3, H, W] from the worker, normalised float32 on the device.
        labels: int64 [num_captions]: equal numbers are each other's positives. 63 bits of the caption's id,
            of the image's with positives="image", the class with positives="class": of several datasets,
            class 3 of one is class 3 of the others.
        captions: num_captions texts, "" where the data have none.
        colours: Parameters of the stage of colours, while that is to come.
        epoch: Index of the epoch.
        num_captions_taken: Captions of the epoch up to the end of this step, over all ranks.
        num_steps_left: Steps of the epoch that come after this one.
        num_dropped: By reason, as `DROP_REASONS`.
        drops: Why, each message once.
    """

    images: Tensor
    labels: Tensor
    captions: list[str]
    colours: NotRequired[Colours]
    epoch: int
    num_captions_taken: int
    num_steps_left: int
    num_dropped: list[int]
    drops: list[str]


@dataclass(frozen=True)
class ViewConfig:
    """How a caption becomes views.

    Attributes:
        num_views: Views of each caption in a batch.
        positives: "caption" draws views from different images of the caption; "image" crops one image again
            and again, SimCLR's positives; "class" does so too, and images of a class are positives.
        image_size: Side of a view, pixels.
        augmentation: Distribution of the views.
        seed: Seed of every draw.
        needs_captions: Drop captions without a word: there is a text tower.
    """

    num_views: int
    positives: Positives
    image_size: int
    augmentation: AugmentationConfig
    seed: int
    needs_captions: bool = False

    @property
    def num_images(self) -> int:
        """Images of a caption that its views are drawn from."""
        return self.num_views if self.positives == "caption" else 1


@dataclass(frozen=True)
class EncodedCaption:
    """A caption whose images are read and not decoded yet.

    Attributes:
        key: Keys its random numbers, with the seed.
        label: See `Batch`.
        caption: Its text.
        names: What messages call the images.
        images: The files.
    """

    key: tuple[int, ...]
    label: int
    caption: str
    names: tuple[str, ...]
    images: tuple[bytes, ...]


@dataclass(frozen=True)
class _Wanted:
    """A caption whose images are to be read; otherwise as `EncodedCaption`."""

    key: tuple[int, ...]
    label: int
    caption: str
    names: tuple[str, ...]
    extents: tuple[Extent, ...]

    def fill(self, contents: Sequence[bytes | OSError]) -> "EncodedCaption | Drop":
        for content in contents:
            if isinstance(content, OSError):
                return Drop("image unreadable", str(content))
        images = tuple(content for content in contents if isinstance(content, bytes))
        return EncodedCaption(self.key, self.label, self.caption, self.names, images)


@dataclass(frozen=True)
class Drop:
    """A caption that cannot be used: one of `DROP_REASONS`, and the error."""

    reason: str
    message: str


def label_of(dataset: int, identity: int, occurrence: int, image: int) -> int:
    """A number for one image of all datasets, of 63 bits, as that of a caption.

    Args:
        dataset: Index of the dataset.
        identity: Number of the caption.
        occurrence: Which time the caption occurs in the dataset; each has images of its own.
        image: Index of the image among those.
    """
    state = np.random.SeedSequence([dataset, identity, occurrence, image]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


@dataclass
class StepStream(IterableDataset[dict[str, Any]]):
    """This rank's batches, from `start_at` to the end of the epoch.

    An error is handed over as a batch {"error": text}: the loader would wrap it into a worker's traceback.

    Attributes:
        datasets: What is read.
        order: Which captions, when.
        views: How views are drawn.
        num_captions_per_rank: Captions in a batch.
        rank: Index of this rank.
        num_ranks: Number of ranks.
        num_steps_read_ahead: Steps that a worker reads at a time, in the order of the files, >= 1.
        colours_in_worker: Whether the stage of colours runs here, and views leave as float32.
    """

    datasets: Sequence[ShardedDataset]
    order: Order
    views: ViewConfig
    num_captions_per_rank: int
    rank: int = 0
    num_ranks: int = 1
    num_steps_read_ahead: int = 4
    colours_in_worker: bool = False

    def __post_init__(self) -> None:
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()  # workers outlive an epoch

    def start_at(self, position: Position) -> None:
        """Where the next iteration begins, in this process and the workers'."""
        self._start[0], self._start[1] = position.epoch, position.num_captions

    @property
    def num_captions_per_step(self) -> int:
        """G = ranks · B."""
        return self.num_ranks * self.num_captions_per_rank

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = Position(*self._start.tolist())
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        num_steps = self.order.num_steps(self.num_captions_per_step, start)
        try:
            for step, captions in self._read_ahead(start, range(worker, num_steps, num_workers)):
                batch = self._build_batch(captions)
                batch |= {"epoch": start.epoch, "num_steps_left": num_steps - 1 - step}
                batch["num_captions_taken"] = start.num_captions + (step + 1) * self.num_captions_per_step
                yield batch
        except (ValueError, OSError) as error:
            yield {"error": str(error)}

    def positions(self, start: Position, step: int) -> range:
        """This rank's share of the positions of a step, counted from `start`."""
        first = start.num_captions + step * self.num_captions_per_step
        first += self.rank * self.num_captions_per_rank
        return range(first, first + self.num_captions_per_rank)

    def _read_ahead(self, start: Position, steps: range) -> Iterator[tuple[int, list[EncodedCaption | Drop]]]:
        """The captions of each step, while a thread reads those of the next few."""
        blocks = [
            steps[first : first + self.num_steps_read_ahead]
            for first in range(0, len(steps), self.num_steps_read_ahead)
        ]
        with ThreadPoolExecutor(1, "read-ahead") as thread:
            pending = [thread.submit(self._read_steps, start, block) for block in blocks[:1]]
            for number, block in enumerate(blocks):
                captions = pending.pop().result()
                if number + 1 < len(blocks):
                    pending.append(thread.submit(self._read_steps, start, blocks[number + 1]))
                for index, step in enumerate(block):
                    first = index * self.num_captions_per_rank
                    yield step, captions[first : first + self.num_captions_per_rank]

    def _read_steps(self, start: Position, steps: range) -> list[EncodedCaption | Drop]:
        """The captions of some steps, one after the other; their images are read as the files have them."""
        positions = np.array([p for step in steps for p in self.positions(start, step)], dtype=np.int64)
        places = self.order.locate(start.epoch, positions)
        found: list[EncodedCaption | Drop] = [Drop("", "")] * len(positions)
        for index, dataset in enumerate(self.datasets):
            own = np.flatnonzero(places.dataset == index)
            own = own[np.lexsort((places.sample[own], places.shard[own]))]
            tables = dataset.tables(self._shuffle_for_this_process(np.unique(places.shard[own])))
            wanted = [
                self._look_up(
                    index,
                    tables[int(places.shard[i])],
                    *(int(places.passes[i]), int(places.shard[i]), int(places.sample[i])),
                )
                for i in own
            ]
            extents = [extent for want in wanted if isinstance(want, _Wanted) for extent in want.extents]
            contents = iter(dataset.read(extents))
            for place, want in zip(own.tolist(), wanted, strict=True):
                found[place] = (
                    want if isinstance(want, Drop) else want.fill([next(contents) for _ in want.extents])
                )
        return found

    def _shuffle_for_this_process(self, shards: NDArray[np.int64]) -> list[int]:
        """In an order of its own, so that processes verify or fetch different shards at the same time."""
        info = get_worker_info()
        rng = np.random.default_rng([self.rank, info.id if info else 0])
        return [int(shard) for shard in rng.permutation(shards)]

    def _look_up(
        self,
        index: int,
        table: ShardTable | ShardError | OSError,
        index_of_pass: int,
        shard: int,
        sample: int,
    ) -> "_Wanted | Drop":
        """Which images of a caption of a dataset are drawn, and where they lie."""
        if isinstance(table, ShardError):
            return Drop("shard broken", str(table))
        if isinstance(table, OSError):
            return Drop("image unreadable", str(table))
        dataset = self.datasets[index]
        caption = "" if table.captions is None else table.captions[sample].as_py()
        if self.views.needs_captions and not caption.strip():
            return Drop("caption empty", f"sample {sample} of {dataset.name_of(shard)} has an empty caption")
        identity = int(table.ids[sample])
        occurrence = int(table.occurrences[sample])
        key = (index_of_pass, identity, occurrence)
        images = self._rng(key).permutation(dataset.num_images)[: self.views.num_images].tolist()
        labels = {
            "caption": lambda: identity,
            "image": lambda: label_of(index, identity, occurrence, images[0]),
            "class": lambda: int(table.labels[sample]),
        }
        extents = tuple(table.extent(shard, sample, image) for image in images)
        where = dataset.name_of(shard)
        return _Wanted(
            key=key,
            label=labels[self.views.positives](),
            caption=caption,
            names=tuple(f"{table.image_name(sample, image)} of {where}" for image in images),
            extents=extents,
        )

    def _rng(self, key: Sequence[int]) -> np.random.Generator:
        return np.random.default_rng([self.views.seed, _VIEWS, *key])

    def _build_batch(self, captions: list[EncodedCaption | Drop]) -> dict[str, Any]:
        """Decodes a step's captions; those that cannot be used give way to others of the batch."""
        size = self.views.image_size
        # Channels side by side, as they are decoded: they are put apart where the colours run.
        shape = (len(captions), self.views.num_views, size, size, 3)
        images = torch.empty(shape, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        good: dict[int, tuple[EncodedCaption, Colours]] = {}
        drops: dict[int, Drop] = {}
        for place, caption in enumerate(captions):
            if isinstance(caption, Drop):
                drops[place] = caption
                continue
            try:
                good[place] = caption, self._draw(caption, self._rng(caption.key), images[place])
            except ValueError as error:
                drops[place] = Drop("image undecodable", str(error))
        places = list(good)
        for place, drop in drops.items():
            if not places:
                raise ValueError(f"{drop.message}; none of the {len(captions)} captions of a step is usable")
            key = good[places[0]][0].key
            rng = np.random.default_rng([self.views.seed, _SUBSTITUTE, place, *key])
            other = good[places[int(rng.integers(len(places)))]][0]
            good[place] = other, self._draw(other, rng, images[place])
        used = [good[place] for place in range(len(captions))]
        reasons = [drop.reason for drop in drops.values()]
        batch = {
            "images": images,
            "labels": torch.tensor([caption.label for caption, _ in used]),
            "captions": [caption.caption for caption, _ in used],
            "num_dropped": [reasons.count(reason) for reason in DROP_REASONS],
            "drops": list(dict.fromkeys(drop.message for drop in drops.values())),
        }
        colours = stack_colours([colours for _, colours in used])
        if self.colours_in_worker:
            return colour_batch(batch, colours, self.views.augmentation)
        return batch | {"colours": colours}

    def _draw(self, caption: EncodedCaption, rng: np.random.Generator, out: Tensor) -> Colours:
        draws = draw_views(rng, self.views.num_views, self.views.augmentation)
        decode_views(caption.images, caption.names, draws, self.views.augmentation, out)
        return draws.colours


def colour_batch(batch: dict[str, Any], colours: Colours, augmentation: AugmentationConfig) -> dict[str, Any]:
    """The batch after the stage of colours, on the device where its images are."""
    images = batch["images"]
    flat = flatten_colours(colours)
    views = augment_batch(images.flatten(0, 1), flat, augmentation, IMAGENET_MEAN, IMAGENET_STD)
    return batch | {"images": views.unflatten(0, images.shape[:2])}
