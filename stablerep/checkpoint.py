"""Checkpoints that are written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stablerep.backbones import read_checkpoint

_TRAINING_STATE = {"loops", "lr_schedulers", "optimizer_states", "pytorch-lightning_version"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, flushes to disk, then renames: a kill leaves the older checkpoint whole.

    Lightning's own writer stages in the system's temporary folder, which may be another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint.

        Raises:
            OSError: If the folder cannot be written.
        """
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint; never runs code that it holds.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the path is a web address, whose content Lightning would run, or the file is torn,
                of another model, or without the state of a training to go on from.
        """
        if "://" in str(path):
            raise ValueError(f"checkpoint must be a local file, got {path}")
        checkpoint = read_checkpoint(Path(path))
        if missing := sorted(_TRAINING_STATE - checkpoint.keys()):
            raise ValueError(f"checkpoint {path} holds weights alone: no {missing[0]} to resume from")
        return checkpoint
