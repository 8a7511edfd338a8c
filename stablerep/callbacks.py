"""What is watched while training: k-NN accuracy on labelled images, and images per second."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from stablerep import distributed
from stablerep.augment import normalize
from stablerep.evaluation.features import build_eval_transform
from stablerep.evaluation.knn import knn_classify
from stablerep.evaluation.labelled import decode_image

logger = logging.getLogger(__name__)


def read_labelled_images(
    folder: Path, classes: list[str], image_size: int, num_images: int, seed: int
) -> tuple[Tensor, Tensor]:
    """A fixed random selection of an image folder `<class>/<image>`, under the evaluation's transform.

    Labels are places in `classes`, so that a split without images of a class does not shift those after it.

    Shapes:
        -> uint8 [num_images, 3, image_size, image_size], int64 [num_images], or as many as there are.

    Raises:
        FileNotFoundError: If the folder's images are missing.
        ValueError: If the folder has a class that `classes` lacks.
    """
    found = ImageFolder(folder)
    if unknown := sorted(set(found.classes) - set(classes)):
        raise ValueError(f"labelled images {folder} have a class '{unknown[0]}' that train has not")
    samples = [(path, classes.index(found.classes[label])) for path, label in found.samples]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:num_images])
    transform = build_eval_transform(image_size)
    paths = [samples[index][0] for index in chosen]
    images = [transform(decode_image(Path(path).read_bytes(), path)) for path in paths]
    return torch.stack(images), torch.tensor([samples[index][1] for index in chosen])


class OnlineKNN(pl.Callback):
    """Logs `knn_top1`, the weighted k-NN accuracy of the frozen features on labelled images, in [0, 1].

    Rank 0 measures; the other ranks wait at their next gather.

    Args:
        data: Folder with `train/<class>/*` and `test/<class>/*`.
        every_n_steps: Optimizer steps between measurements, >= 1; weights that no step has changed and those
            of the last step are always measured.
        k: Neighbours that vote.
        temperature: Temperature of the votes' weights.
        num_train_images: Labelled images that vote, at most.
        num_test_images: Images that are classified, at most.
        num_images_per_batch: Images that pass the backbone at a time.
    """

    def __init__(
        self,
        data: str,
        every_n_steps: int = 100,
        k: int = 20,
        temperature: float = 0.07,
        num_train_images: int = 2000,
        num_test_images: int = 1000,
        num_images_per_batch: int = 250,
    ) -> None:
        for name, value in [
            ("every_n_steps", every_n_steps),
            ("k", k),
            ("num_train_images", num_train_images),
            ("num_test_images", num_test_images),
            ("num_images_per_batch", num_images_per_batch),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.data = data
        self.every_n_steps = every_n_steps
        self.k = k
        self.temperature = temperature
        self.num_images = {"train": num_train_images, "test": num_test_images}
        self.num_images_per_batch = num_images_per_batch
        self._images: dict[str, tuple[Tensor, Tensor]] = {}
        self.num_seconds = 0.0
        self._last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the images, so that a missing folder is known before the first step.

        Raises:
            FileNotFoundError: If the images are missing; on the other ranks a ValueError says so.
            ValueError: If they are unreadable or too few.
        """
        error: Exception | None = None
        if distributed.rank() == 0 and not self._images:
            try:
                self._read_images(pl_module)
            except (ValueError, OSError) as caught:
                error = caught
        distributed.raise_together(error)

    def _read_images(self, pl_module: pl.LightningModule) -> None:
        backbone: Any = pl_module.backbone
        for split in self.num_images:
            if not (folder := Path(self.data) / split).is_dir():
                raise FileNotFoundError(f"labelled images {folder} do not exist")
        classes, _ = find_classes(str(Path(self.data) / "train"))
        for split, num_images in self.num_images.items():
            self._images[split] = read_labelled_images(
                Path(self.data) / split, classes, backbone.image_size, num_images, seed=0
            )
        if self.k > (num_train := len(self._images["train"][1])):
            raise ValueError(f"k must be <= {num_train}, the images of {self.data}/train, got {self.k}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the weights as they were drawn: what training is to be compared with."""
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures every `every_n_steps` steps."""
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the trained weights, unless the last step already was."""
        if trainer.global_step != self._last_step:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        if distributed.rank() != 0:
            return
        start = time.perf_counter()
        backbone: Any = pl_module.backbone
        was_training = backbone.training
        backbone.eval()
        try:
            features = {split: self._features(backbone, split, pl_module.device) for split in self._images}
        finally:
            backbone.train(was_training)
        labels = {split: labels.to(pl_module.device) for split, (_, labels) in self._images.items()}
        predicted = knn_classify(
            features["train"],
            labels["train"],
            features["test"],
            num_classes=int(labels["train"].max()) + 1,
            k=self.k,
            temperature=self.temperature,
        )
        accuracy = float((predicted == labels["test"]).float().mean())
        logger.info("step %d: k-NN top-1 %.4f", trainer.global_step, accuracy)
        for run_logger in trainer.loggers:
            run_logger.log_metrics({"knn_top1": accuracy}, step=trainer.global_step)
        self.num_seconds += time.perf_counter() - start

    @torch.no_grad()
    def _features(self, backbone: Any, split: str, device: torch.device) -> Tensor:
        images = self._images[split][0]
        parts = [
            backbone(normalize(part.to(device).float() / 255, backbone.mean, backbone.std))
            for part in images.split(self.num_images_per_batch)
        ]
        return torch.cat(parts)


class Throughput(pl.Callback):
    """Logs `images_per_second`: images of all ranks over wall time, without the time of `OnlineKNN`."""

    def __init__(self) -> None:
        self._start = 0.0
        self._num_images = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.perf_counter() - _seconds_in_probes(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step's images; waiting for data is part of its time."""
        num_captions, num_views = batch["images"].shape[:2]
        self._num_images += num_captions * num_views * distributed.world_size()
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            now = time.perf_counter() - _seconds_in_probes(trainer)
            speed = self._num_images / (now - self._start)
            pl_module.log("images_per_second", speed, prog_bar=True, batch_size=num_captions)
            self._start, self._num_images = now, 0


def _seconds_in_probes(trainer: pl.Trainer) -> float:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.num_seconds for callback in callbacks if isinstance(callback, OnlineKNN))
