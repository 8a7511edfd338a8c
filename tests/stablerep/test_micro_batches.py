import copy

import pytest
import torch
from torch import Tensor, nn

from stablerep.backbones import build_backbone
from stablerep.micro_batches import run_in_parts

TINY = {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}


def gradients_of(backbone: nn.Module, features: Tensor) -> list[Tensor]:
    """Those of a loss in which every image meets every other."""
    z = nn.functional.normalize(features, dim=1)
    backbone.zero_grad()
    (z @ z.T).exp().sum().backward()
    return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


@pytest.mark.parametrize("num_rows_per_part", [1, 4, 7, 100])
def test_gradient_is_that_of_the_whole_batch(num_rows_per_part: int) -> None:
    backbone = build_backbone("vit_tiny_patch16_224", 16, TINY).double()
    images = torch.randn(10, 3, 16, 16, dtype=torch.float64)
    whole = gradients_of(backbone, backbone(images))
    in_parts = gradients_of(backbone, run_in_parts(backbone, images, num_rows_per_part))
    for a, b in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_backward_drops_what_the_forward_dropped() -> None:
    backbone = build_backbone(
        "vit_tiny_patch16_224", 16, TINY | {"drop_path_rate": 0.5, "proj_drop_rate": 0.3}
    )
    backbone = backbone.double().train()
    images = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(1)
    kept = gradients_of(backbone, torch.cat([backbone(part) for part in images.split(4)]))
    torch.manual_seed(1)
    features = run_in_parts(backbone, images, 4)
    torch.manual_seed(2)  # what is drawn between forward and backward does not matter
    computed_again = gradients_of(backbone, features)
    for a, b in zip(computed_again, kept, strict=True):
        torch.testing.assert_close(a, b)


class CountsSaved(nn.Module):
    """Bytes that the forward keeps for the backward, outside of parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.num_bytes = 0

    def measure(self, images: Tensor, num_rows_per_part: int | None) -> int:
        """Bytes kept after a forward."""
        parameters = {p.data_ptr() for p in self.module.parameters()}
        self.num_bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            if (
                tensor.data_ptr() not in parameters
                and tensor.untyped_storage().data_ptr() != images.data_ptr()
            ):
                self.num_bytes += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run_in_parts(self.module, images, num_rows_per_part)
        return self.num_bytes


def test_forward_in_parts_keeps_no_activations() -> None:
    backbone = build_backbone("vit_tiny_patch16_224", 32, TINY)
    images = torch.randn(16, 3, 32, 32)
    counts = CountsSaved(copy.deepcopy(backbone))
    assert counts.measure(images, 4) < counts.measure(images, None) / 100
