"""Time and memory of the losses, forward and backward, against the formula written out with masks.

    python benchmarks/loss.py                                   on the CPU
    python benchmarks/loss.py --device cuda --sizes "[8192, 32768, 65536]" --name loss_cuda

The direct implementation is the formula as it stands: an N×N matrix of similarities, a mask of positives as
target distribution, log-softmax, their product. Of the image loss there are two: by the steps of the
published code, with masks in float32 and the largest similarity of each row taken off, and a lean one
without. In bfloat16 they multiply in bfloat16, as under autocast; ours computes in float32 at any precision.

Each measurement has a process of its own, in turns; a ratio is that of two neighbours. Time is processor time
on the CPU, the device's own clock elsewhere; of one thread unless `num_threads` says more, as threads that
wait for each other count as busy. Memory is the peak of one forward and backward above what the inputs take.
The relative error of the gradient is against float64 at the smallest size.

Writes {output}/{name}.{json,md}.
"""

import json
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

from stablerep.losses import image_text_contrastive_loss, multi_positive_contrastive_loss
from stablerep.machine import describe_processor

RESULTS = Path(__file__).parent / "results"
NUM_VIEWS = 4
TEMPERATURE = 0.1
Loss = Callable[..., Tensor]


def direct_image_loss(z: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """mean_i H(p_i, q_i) with p and q as matrices, by the steps of the published code."""
    z = normalize(z, dim=1)
    others = 1.0 - torch.eye(len(z), device=z.device)
    positive = (labels[:, None] == labels[None, :]).float() * others
    s = _at_least_float32(z @ z.T / TEMPERATURE) - (1.0 - others) * 1e9
    s = s - s.max(dim=1, keepdim=True).values.detach()
    p = positive / positive.sum(dim=1, keepdim=True).clamp(min=1.0)
    return -(p * log_softmax(s, dim=1)).sum(dim=1).mean()


def lean_image_loss(z: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """The same with boolean masks."""
    z = normalize(z, dim=1)
    s = _at_least_float32(z @ z.T / TEMPERATURE)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    s = s.masked_fill(own, -1e9)
    positive = (labels[:, None] == labels[None, :]).to(s.dtype).masked_fill(own, 0.0)
    p = positive / positive.sum(dim=1, keepdim=True).clamp(min=1.0)
    return -(p * log_softmax(s, dim=1)).sum(dim=1).mean()


def direct_image_text_loss(scale: float, z: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """½ · both cross-entropies, with the targets as matrices."""
    s = _at_least_float32(scale * normalize(z, dim=1) @ normalize(texts, dim=1).T)
    pairs = (labels[:, None] == labels[None, ::NUM_VIEWS]).to(s.dtype)
    targets = pairs / pairs.sum(dim=1, keepdim=True), pairs.T / pairs.T.sum(dim=1, keepdim=True)
    return (cross_entropy(s, targets[0]) + cross_entropy(s.T, targets[1])) / 2


def _at_least_float32(s: Tensor) -> Tensor:
    return s if s.dtype == torch.float64 else s.float()


def our_image_loss(z: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """The library's."""
    return multi_positive_contrastive_loss(z, labels, TEMPERATURE).loss


def our_image_text_loss(scale: float, z: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """The library's."""
    factor = torch.tensor(scale, device=z.device)
    return image_text_contrastive_loss(z, texts, labels, labels[::NUM_VIEWS], factor).loss


LOSSES: dict[str, dict[str, Loss]] = {
    "image": {"direct": direct_image_loss, "direct, lean": lean_image_loss, "ours": our_image_loss},
    **{
        f"image-text, scale {round(scale)}": {
            "direct": partial(direct_image_text_loss, scale),
            "ours": partial(our_image_text_loss, scale),
        }
        for scale in (1 / 0.07, 100.0)  # where the learnt one begins, and where it is kept from going on
    },
}


def measure(
    device: str = "cpu",
    sizes: tuple[int, ...] = (2048, 8192, 16384),
    width: int = 256,
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    num_repeats: int = 5,
    num_threads: int = 1,
    output: str = str(RESULTS),
    name: str = "loss",
) -> None:
    """Measure and print; see the module.

    Args:
        device: "cpu", or an accelerator.
        sizes: Numbers of images, multiples of four; the texts are a quarter.
        width: Width of the embeddings.
        dtypes: Precision of the embeddings.
        num_repeats: Turns of each side.
        num_threads: Threads of a measurement on the CPU.
        output: Folder of the results.
        name: Name of the result files.
    """
    rows = []
    for loss in LOSSES:
        for dtype in dtypes:
            for size in sizes:
                turns: dict[str, list[dict[str, float]]] = {side: [] for side in LOSSES[loss]}
                for _ in range(num_repeats):
                    for side, taken in turns.items():
                        taken.append(run_alone(loss, side, size, width, dtype, device, num_threads))
                rows.append({"loss": loss, "dtype": dtype, "num_images": size, "turns": turns})
                print(describe(rows[-1]), flush=True)
    errors = {loss: measure_error(loss, min(sizes), width, device) for loss in LOSSES}
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''} of {describe_processor()}"
    processor = torch.cuda.get_device_name() if device != "cpu" else threads
    result = {
        "processor": processor,
        "num_threads": num_threads,
        "torch": torch.__version__,
        "width": width,
        "num_views": NUM_VIEWS,
        "gradient_error_float32": errors,
        "rows": rows,
    }
    table = build_table(result)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)


def run_alone(
    loss: str, side: str, size: int, width: int, dtype: str, device: str, num_threads: int
) -> dict[str, float]:
    """Seconds and bytes of one forward and backward, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, loss, side, size, width, dtype, device, num_threads)
    process = context.Process(target=_serve, args=arguments)
    process.start()
    sender.close()
    try:
        seconds, num_bytes = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"{side} of the {loss} loss at {size} images failed") from None
        seconds, num_bytes = float("nan"), float("nan")  # killed, for want of memory
    process.join()
    return {"seconds": seconds, "bytes": num_bytes}


def _serve(
    sender: Any, loss: str, side: str, size: int, width: int, dtype: str, device: str, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    function = LOSSES[loss][side]
    _step(function, *_inputs(512, width, dtype, device))  # what is set up once
    inputs = _inputs(size, width, dtype, device)
    try:
        if device != "cpu":
            _step(function, *inputs)
            _clear(inputs)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _step(function, *inputs)
            end.record()
            torch.cuda.synchronize()
            sender.send((start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before))
            return
        before = _read_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start_seconds = time.process_time()
        _step(function, *inputs)
        seconds = time.process_time() - start_seconds
        sender.send((seconds, _read_status("VmHWM") - before))
    except torch.OutOfMemoryError:
        sender.send((float("nan"), float("nan")))


def _inputs(size: int, width: int, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, texts = (torch.randn(num, width, generator=generator) for num in (size, size // NUM_VIEWS))
    kind = getattr(torch, dtype)
    labels = torch.arange(size, device=device) // NUM_VIEWS
    return (*(x.to(device, kind).requires_grad_() for x in (z, texts)), labels)  # type: ignore[return-value]


def _clear(inputs: tuple[Tensor, ...]) -> None:
    for x in inputs:
        x.grad = None


def _step(function: Loss, z: Tensor, texts: Tensor, labels: Tensor) -> None:
    function(z, texts, labels).backward()


def _read_status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_error(loss: str, size: int, width: int, device: str) -> float:
    """‖g − g64‖ / ‖g64‖ of our gradients in float32, g64 being the direct ones in float64."""
    gradients = []
    for side, dtype in (("ours", "float32"), ("direct", "float64")):
        z, texts, labels = _inputs(size, width, "float32", device)
        exact = [x.detach().to(getattr(torch, dtype)).requires_grad_() for x in (z, texts)]
        _step(LOSSES[loss][side], exact[0], exact[1], labels)
        gradients.append(torch.cat([x.grad.double() for x in exact if x.grad is not None]))
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def describe(row: dict[str, Any]) -> str:
    """The rows of the table for one size: one for each direct implementation."""
    return "\n".join(_compare(row, side) for side in row["turns"] if side != "ours")


def _compare(row: dict[str, Any], side: str) -> str:
    cells = [row["loss"], side, row["dtype"], f"{row['num_images']:,}"]
    for figure, unit, factor in (("seconds", "s", 1.0), ("bytes", "MB", 1e-6)):
        direct, ours = ([turn[figure] for turn in row["turns"][name]] for name in (side, "ours"))
        ratios = [a / b for a, b in zip(direct, ours, strict=True)]
        cells += [
            f"{statistics.median(direct) * factor:,.3g} {unit}",
            f"{statistics.median(ours) * factor:,.3g} {unit}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        ]
    return "| " + " | ".join(cells) + " |"


def build_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    errors = ", ".join(f"{loss} {error:.1e}" for loss, error in result["gradient_error_float32"].items())
    head = (
        f"Forward and backward, {result['width']} dimensions, {result['num_views']} images a caption, "
        f"{result['processor']}, torch {result['torch']}. Relative error of our gradient in float32 against "
        f"float64: {errors}.\n\n"
        "| loss | against | embeddings | images | time, direct | ours | ratio | extra memory, direct | ours "
        "| ratio |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(describe, result["rows"])) + "\n"


if __name__ == "__main__":
    auto_cli(measure)
