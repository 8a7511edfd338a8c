"""A model that needs no training and whose features can be computed by hand."""

import hashlib

import torch
from torch import Tensor, nn

from stablerep.loading.model import InputFormat


class ColourBackbone(nn.Module):
    """Features: mean and deviation of each channel in each quadrant; they tell colours apart."""

    def forward(self, images: Tensor) -> Tensor:
        half = images.shape[-1] // 2
        quadrants = images.unflatten(3, (2, half)).unflatten(2, (2, half))
        return torch.cat([quadrants.mean((3, 5)).flatten(1), quadrants.std((3, 5)).flatten(1)], dim=1)


class FakeModel(nn.Module):
    """Offers two features of different width, and a text tower; counts what it is asked for."""

    feature_names = ("cls", "patch_mean")
    input_format = InputFormat(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def __init__(self, name: str = "fake") -> None:
        super().__init__()
        self.backbone = ColourBackbone()
        self.name = name
        self.digest = hashlib.sha256(name.encode()).hexdigest()
        self.forward_digest = hashlib.sha256(b"forward").hexdigest()
        self.num_images = 0
        self.num_texts = 0

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        self.num_images += len(images)
        return {"cls": self.backbone(images), "patch_mean": images.mean((2, 3))}

    def encode_texts(self, texts: list[str]) -> Tensor:
        self.num_texts += len(texts)
        return torch.tensor([[float(len(text)), float(ord(text[0]))] for text in texts])
