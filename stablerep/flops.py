"""How much of its device's arithmetic a training uses.

What is counted is the model's own work in a forward and a backward, backbones and heads; the loss, and what
gradient caching computes again, are not: a run that computes less is not worse for it.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stablerep.module import StableRep

_TERA = 1e12
# Dense products in bfloat16 (float16 for V100), from the makers' data sheets, by words of the device's name;
# the first that fits.
_PEAKS = {
    "B200": 2250 * _TERA,
    "H200": 989 * _TERA,
    "H100 PCIe": 756 * _TERA,
    "H100 NVL": 835 * _TERA,
    "H100": 989 * _TERA,
    "A100": 312 * _TERA,
    "L40S": 362 * _TERA,
    "L4": 121 * _TERA,
    "A10": 125 * _TERA,
    "RTX 4090": 165 * _TERA,
    "V100": 125 * _TERA,
}
_SIZE = {"cpu": 1024, "cuda": 8192}


def count_flops_per_caption(hyper_parameters: Mapping[str, Any]) -> float:
    """Floating-point operations of a forward and a backward, for all views of one caption and its text.

    The module is built once more, without memory for its weights.

    Args:
        hyper_parameters: The module's.
    """
    options = dict(hyper_parameters) | {"gradient_checkpointing": False, "queue_size": 0}
    num_captions = 2  # BatchNorm takes no fewer
    with torch.device("meta"):
        module = StableRep(**options)
        side, num_views = options["image_size"], options["num_views_per_caption"]
        images = torch.empty(num_captions * num_views, 3, side, side)
        length = options["text"]["context_length"] if options["text"] else 1
        tokens = torch.empty(num_captions, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        features = module.backbone(images).unflatten(0, (num_captions, num_views))
        outputs: list[Tensor] = []
        if module.projection_head is not None:
            outputs.append(module.projection_head(features))
        if module.text_tower is not None and module.text_head is not None:
            outputs += module.text_head.project(features, module.text_tower(tokens))
        torch.stack([output.sum() for output in outputs]).sum().backward()
    return counter.get_total_flops() / num_captions


def find_peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Floating-point operations a second that one device can do at most, and where the figure is from.

    Args:
        device: The device.
        dtype: Type of the numbers that are multiplied; the table is for 16 bits.
    """
    if device.type == "cuda" and dtype.itemsize == 2:
        name = torch.cuda.get_device_name(device)
        for known, peak in _PEAKS.items():
            if re.search(rf"\b{known}\b", name):
                return peak, f"data sheet of {known}"
    return measure_peak_flops(device, dtype), "a measured matrix product"


def measure_peak_flops(device: torch.device, dtype: torch.dtype, num_repeats: int = 3) -> float:
    """Operations a second of the fastest of some products of square matrices."""
    size = _SIZE.get(device.type, _SIZE["cuda"])
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(num_repeats + 1):  # the first is for what is set up once
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
