"""What is watched while training: probes on labelled images, speed, and the views as the model sees them."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from stablerep import distributed
from stablerep.augment import normalize
from stablerep.distributed.sharding import ShardedStrategy
from stablerep.evaluation.knn import knn_classify
from stablerep.evaluation.ridge import ridge_classify
from stablerep.evaluation.sets.decoding import decode_image
from stablerep.flops import count_flops_per_caption, find_peak_flops
from stablerep.loading.model import build_eval_transform

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


class OnlineProbes(pl.Callback):
    """Logs the accuracy of the frozen features on labelled images, in [0, 1], of two probes in closed form.

    `knn_top1` is the weighted k-NN's, `ridge_top1` the ridge regression's. Rank 0 measures; the other ranks
    wait at their next gather, or help where the weights are sharded.

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
        if self._takes_part(trainer) and not self._images:
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
        if not self._takes_part(trainer):
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
        num_classes = int(labels["train"].max()) + 1
        sides = features["train"], labels["train"], features["test"]
        predictions = {
            "knn_top1": knn_classify(*sides, num_classes=num_classes, k=self.k, temperature=self.temperature),
            "ridge_top1": ridge_classify(*sides, num_classes=num_classes).predictions,
        }
        scores = {name: float((p == labels["test"]).float().mean()) for name, p in predictions.items()}
        logger.info("step %d: k-NN top-1 %.4f, ridge top-1 %.4f", trainer.global_step, *scores.values())
        for run_logger in trainer.loggers:
            run_logger.log_metrics(scores, step=trainer.global_step)
        self.num_seconds += time.perf_counter() - start

    @staticmethod
    def _takes_part(trainer: pl.Trainer) -> bool:
        return distributed.rank() == 0 or isinstance(trainer.strategy, ShardedStrategy)

    @torch.no_grad()
    def _features(self, backbone: Any, split: str, device: torch.device) -> Tensor:
        images = self._images[split][0]
        # A compiled backbone that meets batches of another size takes every size from then on, more slowly.
        with torch.compiler.set_stance("force_eager"):
            parts = [
                backbone(normalize(part.to(device).float() / 255, backbone.mean, backbone.std))
                for part in images.split(self.num_images_per_batch)
            ]
        return torch.cat(parts)


class Throughput(pl.Callback):
    """Logs `images_per_second` of all ranks, and `share_of_peak`, the useful share of their arithmetic.

    Time is wall time without that of `OnlineProbes`. What arithmetic counts is said in `stablerep.flops`.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._num_images = 0
        self._peak_captions_per_second = math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the model's work, finds the device's speed, starts the clock."""
        if distributed.rank() == 0:
            is_16_bit = str(trainer.precision).startswith(("16", "bf16"))
            dtype = torch.bfloat16 if is_16_bit else torch.float32
            peak, source = find_peak_flops(pl_module.device, dtype)
            num_flops = count_flops_per_caption(pl_module.hparams)
            self._peak_captions_per_second = distributed.world_size() * peak / num_flops
            logger.info(
                "%.4g GFLOP forward and backward a caption; peak %.4g TFLOP/s a device (%s)",
                *(num_flops / 1e9, peak / 1e12, source),
            )
        self._start = time.perf_counter() - _seconds_in_probes(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step's images; waiting for data is part of its time."""
        num_captions, num_views = batch["images"].shape[:2]
        self._num_images += num_captions * num_views * distributed.world_size()
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            if pl_module.device.type != "cpu":
                torch.accelerator.synchronize(pl_module.device)  # the host runs ahead of it
            now = time.perf_counter() - _seconds_in_probes(trainer)
            speed = self._num_images / (now - self._start)
            pl_module.log("images_per_second", speed, prog_bar=True, batch_size=num_captions)
            share = speed / num_views / self._peak_captions_per_second
            pl_module.log("share_of_peak", share, batch_size=num_captions)
            self._start, self._num_images = now, 0


def _seconds_in_probes(trainer: pl.Trainer) -> float:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.num_seconds for callback in callbacks if isinstance(callback, OnlineProbes))


class FitProgressBar(RichProgressBar):
    """Lightning's bar, which reads its figures when they are logged and not at each step.

    Reading one makes the host wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, Any] = {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The figures of the last step that was logged."""
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._figures = super().get_metrics(trainer, pl_module)
        return self._figures


class ViewGrid(pl.Callback):
    """Draws views as the model sees them, a caption a row: `views/step_00000000.png`, and TensorBoard.

    Args:
        every_n_steps: Optimizer steps between pictures, >= 1; the first is before the first step.
        num_captions: Rows, at most, >= 1.
        num_views: Columns, at most, >= 1.
    """

    def __init__(self, every_n_steps: int = 10_000, num_captions: int = 8, num_views: int = 8) -> None:
        for name, value in [
            ("every_n_steps", every_n_steps),
            ("num_captions", num_captions),
            ("num_views", num_views),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.every_n_steps = every_n_steps
        self.num_captions = num_captions
        self.num_views = num_views

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draws the batch, on rank 0."""
        if distributed.rank() != 0 or trainer.global_step % self.every_n_steps:
            return
        backbone: Any = pl_module.backbone
        images = batch["images"][: self.num_captions, : self.num_views].float().cpu()
        grid = draw_grid(images, backbone.mean, backbone.std)
        folder = Path(trainer.default_root_dir) / "views"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).save(folder / f"step_{trainer.global_step:08d}.png")
        for run_logger in trainer.loggers:
            if isinstance(run_logger, TensorBoardLogger):
                run_logger.experiment.add_image("views", grid, trainer.global_step, dataformats="HWC")


def draw_grid(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.uint8]:
    """Normalised images as one picture, rows of the first dimension.

    Shapes:
        float [R, C, 3, H, W] -> uint8 [R · H, C · W, 3]
    """
    shape = (3, 1, 1)
    pixels = images * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    rows, columns, _, height, width = pixels.shape
    grid = pixels.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return (grid.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
