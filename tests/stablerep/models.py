"""Small models with random weights in the files that each form of them comes in."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stablerep.module import StableRep
from stablerep.optimizer import OptimizerConfig
from stablerep.text import TextConfig
from tests.stablerep.training import build_module

SMALL_VIT = {"patch_size": 8, "depth": 4, "embed_dim": 16, "num_heads": 2}
SMALL_TEXT: dict[str, Any] = {
    "out_features": 6,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 10,
    "hidden_features": 12,
}
TEXTS = ["a red cube", "two dogs on a sofa in the rain, seen from above, at night"]


def disturb(module: nn.Module) -> nn.Module:
    """Random values where a fresh model has zeros and ones, so that no weight is without effect."""
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.randn_like(value).abs())
    return module


def save_checkpoint(
    path: Path, text: TextConfig | None = None, image_size: int = 16, ema: bool = False, **options: Any
) -> StableRep:
    """A checkpoint of `stablerep fit`, without the optimizer; returns its module in eval mode."""
    ema_decay = 0.9 if ema else None
    module = build_module(
        **{"backbone_options": SMALL_VIT, "image_size": image_size, "text": text} | options,
        optimizer=OptimizerConfig(learning_rate=1e-3, num_warmup_steps=2, ema_decay=ema_decay),
    )
    disturb(module)
    checkpoint: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "global_step": 7,
        "epoch": 1,
    }
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return module.eval()


def draw_images(image_size: int = 16, num_images: int = 3) -> Tensor:
    return torch.randn(num_images, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def draw_picture(width: int = 53, height: int = 41) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))
