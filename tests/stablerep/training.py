"""A small module and a trainer over batches in memory, on one rank or as one of several."""

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from stablerep import distributed
from stablerep.module import StableRep
from stablerep.optimizer import OptimizerConfig
from stablerep.runs.checkpoint import AtomicCheckpointIO

TINY_VIT = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


def build_module(**options: Any) -> StableRep:
    defaults: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": TINY_VIT,
        "image_size": 16,
        "projection_hidden_features": 16,
        "projection_out_features": 8,
        "optimizer": OptimizerConfig(learning_rate=1e-3, num_warmup_steps=2),
        "num_captions_per_rank": 4,
        "num_views_per_caption": 3,
    }
    return StableRep(**(defaults | options))


def build_batches(num_batches: int = 6, num_captions: int = 4, num_views: int = 3) -> list[dict[str, Any]]:
    captions = [f"a drawing of number {index}" for index in range(num_captions)]
    return [
        {
            "images": torch.randn(num_captions, num_views, 3, 16, 16),
            "labels": torch.arange(num_captions),
            "captions": captions,
        }
        for _ in range(num_batches)
    ]


class Loader(torch.utils.data.Dataset[Any]):
    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


class DataModule(pl.LightningDataModule):
    """The batches, and how many there are in an epoch."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        super().__init__()
        self.batches = batches

    @property
    def num_steps_per_epoch(self) -> int:
        return len(self.batches)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Loader(self.batches), batch_size=None)


def train(
    module: StableRep,
    folder: Path,
    batches: list[dict[str, Any]],
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Fits with as many steps as batches; the batches are in memory, so Lightning's advice does not apply."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|smaller than the logging)")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")  # inside Lightning
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": folder,
            "max_steps": len(batches),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "plugins": [AtomicCheckpointIO()],
            "logger": False,
        }
        trainer = pl.Trainer(**(defaults | options))
        trainer.fit(module, datamodule=DataModule(batches), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def train_as_rank(
    rank: int,
    module: StableRep,
    folder: Path,
    batches: list[dict[str, Any]],
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """As `train`, on this rank's share of each batch's captions; the process group is up already."""
    num_ranks = distributed.world_size()
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",  # Lightning then takes the ranks as torchrun made them
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    share = [
        {
            name: value[rank * len(value) // num_ranks : (rank + 1) * len(value) // num_ranks]
            for name, value in b.items()
        }
        for b in batches
    ]
    return train(module, folder, share, ckpt_path, devices=num_ranks, **({"strategy": "ddp"} | options))


class Recorder(pl.loggers.Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def read(self, name: str) -> list[float]:
        """The values of one figure, in order."""
        return [row[name] for _, row in self.rows if name in row]
