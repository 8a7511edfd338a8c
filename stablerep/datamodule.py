"""The data module: which datasets, in which steps, and where a run goes on.

stablerep.data.order     the captions of each step
stablerep.data.sources   where images lie, and their bytes; verified before use
stablerep.data.stream    steps to batches, in the workers
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from stablerep import distributed
from stablerep.augment import STRONG_VIEW, AugmentationConfig
from stablerep.data.opening import open_dataset
from stablerep.data.order import Order, Position
from stablerep.data.resuming import align_trainer
from stablerep.data.sources import ON_THIS_MACHINE, CacheConfig, ShardedDataset
from stablerep.data.stream import DROP_REASONS, Positives, StepStream, ViewConfig, colour_batch
from stablerep.data.tally import Tally
from stablerep.runs.signals import end_by_kill, ignore_signals, without_signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightedRoot:
    """One of several datasets.

    Attributes:
        root: Its folder or URL.
        weight: Its share of the captions, up to a factor, > 0.
    """

    root: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight of {self.root} must be > 0, got {self.weight}")


class StepLoader:
    """A rank's batches from a position on; each further iteration goes on where the one before ended.

    Args:
        stream: What makes them.
        start: Where the first one begins.
        num_workers: Processes, >= 0.
    """

    def __init__(self, stream: StepStream, start: Position, num_workers: int) -> None:
        self._stream, self._start, self._num_steps = stream, start, 0
        self._loader: DataLoader[Any] | None = DataLoader(
            stream,
            batch_size=None,  # the stream yields whole batches
            collate_fn=_same,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )

    def __len__(self) -> int:
        """Steps of a whole epoch; the first iteration may have fewer."""
        return self._stream.order.num_steps(self._stream.num_captions_per_step)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        self._stream.start_at(self.position_after(self._num_steps))
        with without_signals():
            batches = iter(self._loader)  # starts the workers
        for worker in getattr(batches, "_workers", ()):
            end_by_kill(worker)
        for batch in batches:
            self._num_steps += 1
            yield batch

    def position_after(self, num_steps: int) -> Position:
        """Where the data are after that many steps from the start."""
        return self._stream.order.advance(self._start, num_steps, self._stream.num_captions_per_step)

    def close(self) -> None:
        """Ends the workers."""
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is in the data module's state, alike for all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing; that both are here tells Lightning that the loader can go on within an epoch."""


def _same(batch: Any) -> Any:
    return batch


class MultiPositiveDataModule(pl.LightningDataModule):
    """Batches of num_captions_per_rank captions, each as num_views_per_caption views.

    Args:
        root: Folder or URL of a dataset that `stablerep generate` wrote, or of WebDataset tars with labels
            (`{key}.jpg`, `{key}.cls`).
        num_captions_per_rank: Captions in a batch of one rank; its images are this times the views.
        num_views_per_caption: Views of each caption, at least 2 (1 with needs_captions); drawn without
            replacement from the caption's images when they are the positives.
        image_size: Side of a view, pixels.
        positives: "caption" makes different images of a caption each other's positives (StableRep), "image"
            crops one of them several times (SimCLR), "class" takes labels from the tars (SupCon); of several
            roots, class 3 of one is class 3 of the others.
        augmentation: Distribution of the views.
        num_workers: Worker processes of each rank that decode and crop, >= 0.
        num_captions_in_shuffle_window: Captions that lie side by side in the shards and are shuffled among
            each other, >= 1; more mixes better, fewer makes disks seek less.
        error_budget_fraction: Share of an epoch's captions, over all ranks, that may be unusable before
            training stops, in [0, 1).
        seed: Seed of order and views, >= 0.
        roots: Several datasets in place of root, mixed by weight. An epoch has as many captions as they have
            together; each dataset is passed over again and again, wherever an epoch begins.
        augment_on: Where colour, blur and normalisation run: on the "device", or in the "worker".
        num_steps_read_ahead: Steps that a worker reads at a time, in the order of the files, >= 1.
        cache: What is kept on this machine of datasets in object stores.
        needs_captions: Refuse datasets without captions: there is a text tower.
    """

    def __init__(
        self,
        root: str = "",
        num_captions_per_rank: int = 64,
        num_views_per_caption: int = 6,
        image_size: int = 224,
        positives: Positives = "caption",
        augmentation: AugmentationConfig = STRONG_VIEW,
        num_workers: int = 8,
        num_captions_in_shuffle_window: int = 16384,
        error_budget_fraction: float = 0.001,
        seed: int = 0,
        roots: list[WeightedRoot] | None = None,
        augment_on: Literal["device", "worker"] = "device",
        num_steps_read_ahead: int = 4,
        cache: CacheConfig = ON_THIS_MACHINE,
        needs_captions: bool = False,
    ) -> None:
        super().__init__()
        for name, value, bound in [
            ("num_captions_per_rank", num_captions_per_rank, 1),
            ("num_views_per_caption", num_views_per_caption, 1 if needs_captions else 2),
            ("image_size", image_size, 1),
            ("num_workers", num_workers, 0),
            ("num_captions_in_shuffle_window", num_captions_in_shuffle_window, 1),
            ("num_steps_read_ahead", num_steps_read_ahead, 1),
            ("seed", seed, 0),
        ]:
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")
        if not 0 <= error_budget_fraction < 1:
            raise ValueError(f"error_budget_fraction must be in [0, 1), got {error_budget_fraction}")
        if augmentation.blur_probability > 0 and augmentation.blur_kernel_size >= 2 * image_size:
            raise ValueError(
                f"blur_kernel_size must be < {2 * image_size}, twice the image_size, "
                f"got {augmentation.blur_kernel_size}"
            )
        if bool(root) == bool(roots):
            raise ValueError(f"one of root and roots must be given, got root {root!r} and roots {roots}")
        self.roots = roots or [WeightedRoot(root)]
        self.num_captions_per_rank = num_captions_per_rank
        self.views = ViewConfig(
            num_views_per_caption, positives, image_size, augmentation, seed, needs_captions
        )
        self.num_workers = num_workers
        self.num_captions_in_shuffle_window = num_captions_in_shuffle_window
        self.error_budget_fraction = error_budget_fraction
        self.augment_on = augment_on
        self.num_steps_read_ahead = num_steps_read_ahead
        self.cache = cache
        self.needs_captions = needs_captions
        self._datasets: list[ShardedDataset] = []
        self._order: Order | None = None
        self._loader: StepLoader | None = None
        self._loader_step = 0
        self._resumed: dict[str, Any] | None = None
        self._tally, self._first_drop = Tally(0), ""

    def setup(self, stage: str) -> None:
        """Opens the datasets, once in a run. Shards are verified later, by the worker that needs one first.

        Raises:
            FileNotFoundError: If a root holds no dataset.
            ValueError: If one has no complete shard, too few images a caption, no captions or no classes
                where they are needed, or all have fewer captions than a step takes.
        """
        if self._order is not None:
            return
        datasets = [open_dataset(root.root, self.cache) for root in self.roots]
        for dataset in datasets:
            self._check(dataset)
            mean_size = dataset.num_captions / len(dataset.num_samples)
            window = self.num_captions_in_shuffle_window
            dataset.num_tables_kept = 4 + 2 * int(window / mean_size)  # of two windows, and what they cut
        order = Order(
            [dataset.num_samples for dataset in datasets],
            [root.weight for root in self.roots] if len(self.roots) > 1 else None,
            self.views.seed,
            self.num_captions_in_shuffle_window,
        )
        if order.num_captions < self._num_captions_per_step:
            raise ValueError(
                f"{self._names} holds {order.num_captions} captions, fewer than the "
                f"{distributed.world_size()} ranks x num_captions_per_rank "
                f"{self.num_captions_per_rank} of one step"
            )
        self._datasets, self._order = datasets, order
        self._explain_plan(order)

    def _check(self, dataset: ShardedDataset) -> None:
        url, positives = dataset.store.url, self.views.positives
        if positives == "class" and not dataset.has_classes:
            raise ValueError(f"positives must be caption or image, as {url} has no classes, got class")
        if positives == "caption" and not dataset.has_captions:
            raise ValueError(f"positives must be class or image, as {url} has no captions, got caption")
        if self.needs_captions and not dataset.has_captions:
            raise ValueError(f"{url} has no captions, which the text tower needs")
        if self.views.num_images > dataset.num_images:
            raise ValueError(
                f"num_views_per_caption must be <= {dataset.num_images}, the images of each caption in "
                f"{url}, got {self.views.num_views}"
            )

    @property
    def _names(self) -> str:
        return ", ".join(root.root for root in self.roots)

    @property
    def order(self) -> Order:
        """Which captions, when; there from `setup` on."""
        if self._order is None:
            raise RuntimeError("setup comes before the order")
        return self._order

    @property
    def _num_captions_per_step(self) -> int:
        return distributed.world_size() * self.num_captions_per_rank

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps of every rank in one pass: ⌊captions / (ranks · num_captions_per_rank)⌋."""
        return self.order.num_steps(self._num_captions_per_step)

    def train_dataloader(self) -> StepLoader:
        """The batches of this rank; the first iteration begins where the run is, after a resume too."""
        self._loader_step = self.trainer.global_step if self.trainer else 0
        start = self._find_start()
        stream = StepStream(
            datasets=self._datasets,
            order=self.order,
            views=self.views,
            num_captions_per_rank=self.num_captions_per_rank,
            rank=distributed.rank(),
            num_ranks=distributed.world_size(),
            num_steps_read_ahead=self.num_steps_read_ahead,
            colours_in_worker=self.augment_on == "worker",
        )
        self._loader = StepLoader(stream, start, min(self.num_workers, self.num_steps_per_epoch))
        return self._loader

    def _find_start(self) -> Position:
        """Where the data are at the trainer's step: as saved, or else by counting from the first step."""
        start, size = Position(0, 0), self._num_captions_per_step
        self._tally, self._first_drop = Tally(0), ""
        if self._loader_step == 0:
            return start
        state, self._resumed = self._resumed, None
        if state is None:
            start = self.order.advance(start, self._loader_step, size)
            self._tally = Tally(start.epoch, start.num_captions)
        elif state["order"] == self._describe_order():
            saved = Position(state["epoch"], state["num_captions"])
            start = self.order.advance(saved, 0, size)  # where less than a step is left, the next epoch
            self._tally = Tally.resume(start, state)
        else:
            start = Position(state["epoch"] + 1, 0)
            self._tally = Tally(start.epoch)
            logger.warning(
                "data, order or seed are not those of the checkpoint: epoch %d begins", start.epoch
            )
        num_left = self.order.num_steps(size, start)
        if self.trainer is not None:
            align_trainer(self.trainer, start.epoch, self.num_steps_per_epoch - num_left)
        return start

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, at the trainer's step."""
        if self._loader is None or not self.trainer:
            return {}
        position = self._loader.position_after(self.trainer.global_step - self._loader_step)
        return {
            "epoch": position.epoch,
            "num_captions": position.num_captions,
            "order": self._describe_order(),
            **self._tally.state_dict(position),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there, also with other ranks, batches or workers."""
        self._resumed = state_dict or None

    def _describe_order(self) -> str:
        """What positions mean: sha256 of whatever the order depends on."""
        parts = [
            [dataset.identity, root.weight] for dataset, root in zip(self._datasets, self.roots, strict=True)
        ]
        settings = [parts, self.views.seed, self.num_captions_in_shuffle_window]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def teardown(self, stage: str) -> None:
        """Lets the workers go; the position stays, for a checkpoint after the end."""
        if self._loader is not None:
            self._loader.close()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Sums over the ranks what could not be used, and raises on all ranks what one of them met.

        Raises:
            ValueError: If a worker of any rank met an error, or more captions than the budget were dropped.
        """
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        dropped = batch.get("num_dropped", [0] * len(DROP_REASONS))
        num_errors, *dropped = distributed.sum_over_ranks([int("error" in batch), *dropped], device)
        if num_errors:
            distributed.raise_together(ValueError(batch["error"]) if "error" in batch else None)
        if batch["epoch"] != self._tally.epoch:
            self._tally, self._first_drop = Tally(batch["epoch"]), ""
        for message in batch["drops"]:
            self._first_drop = self._first_drop or message
            logger.warning("dropped: %s", message)
        self._tally.add(self._num_captions_per_step, dropped)
        if self._tally.num_dropped_in_all > self.error_budget_fraction * self.order.num_captions:
            self._stop()
        if batch["num_steps_left"] == 0:
            self._tally.finish(batch["num_captions_taken"])
        return batch

    def _stop(self) -> None:
        reasons = distributed.all_gather_objects(self._first_drop)
        first = next(filter(None, reasons), "dropped before the last resume")
        raise ValueError(
            f"{first}; {self._tally.num_dropped_in_all} of {self.order.num_captions} captions of epoch "
            f"{self._tally.epoch} dropped{self._tally.describe()}, error_budget_fraction is "
            f"{self.error_budget_fraction}"
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Colour, blur and normalisation on the device, unless the workers have done them."""
        if "colours" not in batch:
            return batch
        colours = batch.pop("colours")
        return colour_batch(batch, colours, self.views.augmentation)

    def _explain_plan(self, order: Order) -> None:
        num_steps, num_ranks = order.num_steps(self._num_captions_per_step), distributed.world_size()
        logger.info(
            "%d captions, %d shards; %d ranks x %d captions x %d views a step, %d steps an epoch, %d over",
            *(order.num_captions, sum(len(dataset.num_samples) for dataset in self._datasets), num_ranks),
            *(self.num_captions_per_rank, self.views.num_views, num_steps),
            order.num_captions - num_steps * self._num_captions_per_step,
        )
        if num_steps < self.num_workers:
            logger.warning(
                "num_workers is reduced from %d to the %d steps of an epoch", self.num_workers, num_steps
            )
