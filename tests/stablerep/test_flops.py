from itertools import pairwise

import pytest
import torch

from stablerep import flops
from stablerep.flops import count_flops_per_caption, find_peak_flops, measure_peak_flops
from stablerep.text import TextConfig
from tests.stablerep.training import build_module


def count_linear(num_rows: int, *widths: int, has_input_gradient: bool = True) -> int:
    """A forward (2 a weight and row) and a backward of as much for the weights, and for the input."""
    first, *others = [2 * num_rows * a * b for a, b in pairwise(widths)]
    return (3 if has_input_gradient else 2) * first + 3 * sum(others)


def count_transformer(num_tokens: int, width: int, depth: int) -> int:
    layers = count_linear(num_tokens, width, 3 * width) + count_linear(num_tokens, width, width)
    layers += count_linear(num_tokens, width, 4 * width, width)
    return depth * (layers + 3 * 4 * num_tokens**2 * width)  # QKᵀ and its product with V


def test_flops_are_those_of_the_formulas() -> None:
    options = {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
    module = build_module(backbone_options=options, image_size=32, num_views_per_caption=3)
    image = count_linear(16, 3 * 8 * 8, 16, has_input_gradient=False) + count_transformer(17, 16, 2)
    head = count_linear(1, 16, 16, 16, 8)
    assert count_flops_per_caption(module.hparams) == pytest.approx(3 * (image + head), rel=0.01)


def test_text_is_counted_once_a_caption() -> None:
    text = TextConfig(out_features=8, width=16, num_layers=2, num_heads=2, context_length=12)
    with_text, without = (
        count_flops_per_caption(build_module(text=config, gradient_checkpointing=config is not None).hparams)
        for config in (text, None)
    )
    tower = count_transformer(12, 16, 2) + count_linear(1, 16, 8)
    assert with_text - without == pytest.approx(tower + 3 * count_linear(1, 16, 8), rel=0.01)


def test_published_backbone_takes_its_known_work() -> None:
    with torch.device("meta"):
        module = build_module(backbone="vit_base_patch16_224", backbone_options={}, image_size=224)
    forward = count_flops_per_caption(module.hparams) / 3 / 3
    assert forward == pytest.approx(2 * 17.56e9, rel=0.02)  # multiply-adds that papers name for ViT-B/16


def test_counting_draws_no_random_numbers() -> None:
    module = build_module()
    before = torch.get_rng_state()
    count_flops_per_caption(module.hparams)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100X", None),
    ],
)
def test_peak_is_that_of_the_very_device(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "measure_peak_flops", lambda device, dtype: -1.0)
    assert find_peak_flops(torch.device("cuda"), torch.bfloat16)[0] == (peak or -1.0)


def test_peak_of_a_processor_is_measured() -> None:
    peak, source = find_peak_flops(torch.device("cpu"), torch.float32)
    assert source == "a measured matrix product"
    assert 1e8 < peak < 1e14


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_peak_of_a_known_device_is_its_data_sheets(
    name: str, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_peak_flops(torch.device("cuda"), torch.bfloat16)[0] == peak


@pytest.mark.gpu
def test_measured_product_is_below_the_data_sheet() -> None:
    device = torch.device("cuda")
    measured = measure_peak_flops(device, torch.bfloat16)
    assert 0.2 < measured / find_peak_flops(device, torch.bfloat16)[0] <= 1.05
