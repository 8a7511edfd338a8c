"""The data module: which shards, verified, in which batches; and the batched stage of the augmentation.

`stablerep.stream` says in which order captions are read and how ranks and workers share them.
"""

import logging
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from data_gen.shards import Shard, ShardError, list_complete_shards, read_manifest, verify_shard
from stablerep import distributed
from stablerep.augment import STRONG_VIEW, AugmentationConfig, augment_batch
from stablerep.backbones import IMAGENET_MEAN, IMAGENET_STD
from stablerep.stream import Positives, ShardStream, ViewConfig

logger = logging.getLogger(__name__)

_DEVICE_STREAM = 1  # keeps the device stage's random numbers apart from those of shards and captions


class MultiPositiveDataModule(pl.LightningDataModule):
    """Batches of num_captions_per_rank captions, each as num_views_per_caption views.

    Args:
        root: Folder of a dataset that `stablerep generate` wrote.
        num_captions_per_rank: Captions in a batch of one rank; its images are this times the views.
        num_views_per_caption: Views of each caption, at least 2; drawn without replacement from the caption's
            images when they are the positives.
        image_size: Side of a view, pixels.
        positives: "caption" makes different images of a caption each other's positives (StableRep), "image"
            crops one of them several times (SimCLR).
        augmentation: Distribution of the views.
        num_workers: Worker processes of each rank that decode and crop, >= 0.
        num_captions_in_shuffle_window: Captions that a worker holds, encoded, to draw the next from.
        error_budget_fraction: Share of unusable shards' captions and of undecodable images at which training
            stops, in [0, 1).
        seed: Seed of order and views, >= 0.
    """

    def __init__(
        self,
        root: str,
        num_captions_per_rank: int = 64,
        num_views_per_caption: int = 6,
        image_size: int = 224,
        positives: Positives = "caption",
        augmentation: AugmentationConfig = STRONG_VIEW,
        num_workers: int = 8,
        num_captions_in_shuffle_window: int = 512,
        error_budget_fraction: float = 0.001,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, bound in [
            ("num_captions_per_rank", num_captions_per_rank, 1),
            ("num_views_per_caption", num_views_per_caption, 2),
            ("image_size", image_size, 1),
            ("num_workers", num_workers, 0),
            ("num_captions_in_shuffle_window", num_captions_in_shuffle_window, 1),
            ("seed", seed, 0),
        ]:
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")
        if not 0 <= error_budget_fraction < 1:
            raise ValueError(f"error_budget_fraction must be in [0, 1), got {error_budget_fraction}")
        self.root = root
        self.num_captions_per_rank = num_captions_per_rank
        self.views = ViewConfig(num_views_per_caption, positives, image_size, augmentation, seed)
        self.num_workers = num_workers
        self.num_captions_in_shuffle_window = num_captions_in_shuffle_window
        self.error_budget_fraction = error_budget_fraction
        self._shards: list[Shard] = []

    def setup(self, stage: str) -> None:
        """Verifies the shards, each rank its part, once in a run.

        Raises:
            FileNotFoundError: If root holds no dataset.
            ValueError: If it has no complete shard, too few images a caption, fewer captions than a step
                takes, or more broken shards than the error budget allows.
        """
        if self._shards:
            return
        manifest, shards = read_manifest(self.root), list_complete_shards(self.root)
        if not shards:
            raise ValueError(f"{self.root} holds no complete shard (of {manifest.num_shards} planned)")
        if len(shards) < manifest.num_shards:
            logger.warning(
                "%s: %d of %d planned shards are not complete and are left out",
                *(self.root, manifest.num_shards - len(shards), manifest.num_shards),
            )
        if self.views.num_images > manifest.num_images_per_caption:
            raise ValueError(
                f"num_views_per_caption must be <= {manifest.num_images_per_caption}, the images of each "
                f"caption in {self.root}, got {self.views.num_views}"
            )
        self._shards = verify_shards(shards, self.error_budget_fraction)
        num_captions = sum(shard.num_samples for shard in self._shards)
        num_ranks = distributed.world_size()
        if num_captions < num_ranks * self.num_captions_per_rank:
            raise ValueError(
                f"{self.root} holds {num_captions} captions, fewer than the {num_ranks} ranks x "
                f"num_captions_per_rank {self.num_captions_per_rank} of one step"
            )
        self._explain_plan(num_captions, num_ranks)

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps of every rank in one pass: ⌊captions / (ranks · num_captions_per_rank)⌋."""
        num_captions = sum(shard.num_samples for shard in self._shards)
        return num_captions // (distributed.world_size() * self.num_captions_per_rank)

    def train_dataloader(self) -> DataLoader[Any]:
        """The loader of this rank; its n-th iteration is epoch n after the trainer's current one."""
        num_workers = min(self.num_workers, self.num_steps_per_epoch)
        stream = ShardStream(
            shards=self._shards,
            views=self.views,
            num_captions_per_rank=self.num_captions_per_rank,
            num_steps=self.num_steps_per_epoch,
            rank=distributed.rank(),
            num_captions_in_shuffle_window=self.num_captions_in_shuffle_window,
            error_budget_fraction=self.error_budget_fraction,
            epoch=self.trainer.current_epoch if self.trainer else 0,
        )
        return DataLoader(
            stream,
            batch_size=None,  # the stream yields whole batches
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raises, on all ranks, the error that a worker of any rank met."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if distributed.is_true_on_any_rank("error" in batch, device):
            distributed.raise_together(ValueError(batch["error"]) if "error" in batch else None)
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Colour, blur and normalisation on the device; random numbers from (seed, step, rank)."""
        step = self.trainer.global_step if self.trainer else 0
        rng = np.random.default_rng([self.views.seed, _DEVICE_STREAM, step, distributed.rank()])
        images = batch["images"]
        views = augment_batch(images.flatten(0, 1), self.views.augmentation, rng, IMAGENET_MEAN, IMAGENET_STD)
        return batch | {"images": views.unflatten(0, images.shape[:2])}

    def _explain_plan(self, num_captions: int, num_ranks: int) -> None:
        num_consumers = num_ranks * self.num_workers
        num_steps = self.num_steps_per_epoch
        logger.info(
            "%d captions, %d shards; %d ranks x %d captions x %d views a step, %d steps an epoch, %d over",
            *(num_captions, len(self._shards), num_ranks, self.num_captions_per_rank, self.views.num_views),
            *(num_steps, num_captions - num_steps * num_ranks * self.num_captions_per_rank),
        )
        if num_steps < self.num_workers:
            logger.warning(
                "num_workers is reduced from %d to the %d steps of an epoch", self.num_workers, num_steps
            )
        if len(self._shards) < num_consumers:
            logger.warning(
                "%s holds %d shards, fewer than the %d workers of %d ranks: some are read by several",
                *(self.root, len(self._shards), num_consumers, num_ranks),
            )


def verify_shards(shards: list[Shard], error_budget_fraction: float) -> list[Shard]:
    """The shards whose sizes and sha256 are as recorded; each rank reads its part of them.

    Args:
        shards: Complete shards, the same on every rank.
        error_budget_fraction: Share of captions that may be in broken shards, in [0, 1).

    Raises:
        ShardError: If more captions than the budget are in broken shards; names the first.
    """
    errors: dict[str, str] = {}
    for shard in shards[distributed.rank() :: distributed.world_size()]:
        try:
            verify_shard(shard)
        except ShardError as error:
            errors[shard.name] = str(error)
    for other in distributed.all_gather_objects(errors):
        errors |= other
    broken = [shard for shard in shards if shard.name in errors]
    num_lost, num_captions = (sum(shard.num_samples for shard in group) for group in (broken, shards))
    if broken and num_lost > error_budget_fraction * num_captions:
        raise ShardError(
            f"{errors[broken[0].name]}; {len(broken)} of {len(shards)} shards broken with {num_lost} of "
            f"{num_captions} captions, error_budget_fraction is {error_budget_fraction}"
        )
    for shard in broken:
        logger.warning("dropped shard with %d captions: %s", shard.num_samples, errors[shard.name])
    return [shard for shard in shards if shard.name not in errors]
