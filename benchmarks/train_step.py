"""Images per second of a training step, against the published step written out directly.

    python benchmarks/train_step.py                             a small model, on the CPU
    python benchmarks/train_step.py --task.device cuda --task.backbone vit_base_patch16_224 \\
        --task.backbone_options "{}" --task.image_size 224 --task.num_captions 43 --task.num_views 6 \\
        --task.hidden_features 4096 --task.compile true --task.num_steps 30 --largest_batch true \\
        --name train_step_cuda

Both sides have the same batch in memory, backbone, heads, AdamW and number of steps. Direct: autocast to
float16 with a loss scaler (bfloat16 on the CPU), an N×N mask and log-softmax, the loss read back in each
step, a device that is waited for, nothing compiled. Ours: the module under Lightning's trainer in bfloat16,
its figures logged at every tenth step as `stablerep fit` does; neither side reads or augments data, probes or
saves. The recipes leave `model.compile_backbone` false: compare with `--task.compile` as you mean to train.

Each measurement has a process of its own, in turns; a ratio is that of two neighbours. Steps before
`num_warmup_steps` are not counted. Memory is the device's peak, or that of the process on the CPU. The useful
share of the peak is what `stablerep.flops` says of it. The largest batch is found by doubling, and then
halving the distance four times, without compiling, in one process a side.

Writes {output}/{name}.{json,md}.
"""

import gc
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import CSVLogger
from loss import direct_image_loss
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stablerep.backbones import ProjectionHead, build_backbone
from stablerep.flops import count_flops_per_caption, find_peak_flops
from stablerep.machine import describe_processor
from stablerep.module import StableRep
from stablerep.optimizer import OptimizerConfig, split_by_decay

RESULTS = Path(__file__).parent / "results"
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
SIDES = ("direct", "ours")


@dataclass(frozen=True)
class Task:
    """What both sides have in common.

    Args:
        device: "cpu" or "cuda".
        backbone: timm name.
        backbone_options: Further arguments of the timm model.
        image_size: Side of an image, pixels.
        num_captions: Captions of a step.
        num_views: Images of each.
        hidden_features: Width of the projection head.
        num_steps: Steps that count.
        num_warmup_steps: Steps before them.
        compile: Compile our backbone.
        num_captions_per_microbatch: Of ours; null is the whole batch.
    """

    device: str = "cpu"
    backbone: str = "vit_tiny_patch16_224"
    backbone_options: dict[str, Any] = field(default_factory=lambda: {"depth": 4})
    image_size: int = 64
    num_captions: int = 32
    num_views: int = 4
    hidden_features: int = 1024
    num_steps: int = 10
    num_warmup_steps: int = 3
    compile: bool = False
    num_captions_per_microbatch: int | None = None

    def build_batch(self) -> dict[str, Tensor]:
        """Random images and the numbers of their captions, on the device."""
        shape = (self.num_captions, self.num_views, 3, self.image_size, self.image_size)
        labels = torch.arange(self.num_captions, device=self.device)
        return {"images": torch.randn(shape, device=self.device), "labels": labels}

    def build_module(self) -> StableRep:
        """Ours."""
        return StableRep(
            self.backbone,
            self.backbone_options,
            image_size=self.image_size,
            projection_hidden_features=self.hidden_features,
            optimizer=OPTIMIZER,
            num_captions_per_microbatch=self.num_captions_per_microbatch,
            compile_backbone=self.compile,
            num_captions_per_rank=self.num_captions,
            num_views_per_caption=self.num_views,
        )


def measure(
    task: Task = Task(),
    num_repeats: int = 3,
    largest_batch: bool = False,
    largest_batch_limit: int = 4096,
    output: str = str(RESULTS),
    name: str = "train_step",
) -> None:
    """Measure and print; see the module.

    Args:
        task: What both sides have in common.
        num_repeats: Turns of each side.
        largest_batch: Search the largest batch, too; on an accelerator.
        largest_batch_limit: Captions at which the search ends.
        output: Folder of the results.
        name: Name of the result files.
    """
    if largest_batch and task.device == "cpu":
        raise ValueError("largest_batch needs an accelerator, whose memory ends with an error, got cpu")
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(num_repeats):
        for side, taken in turns.items():
            taken.append(run_alone(_time_steps, side, task))
            print(side, taken[-1], flush=True)
    result: dict[str, Any] = {"torch": torch.__version__, "task": asdict(task), "turns": turns}
    result |= run_alone(_describe, task)
    if largest_batch:
        result["largest_batch"] = {
            "direct": run_alone(_find_largest_batch, "direct", task, largest_batch_limit),
            "ours": run_alone(_find_largest_batch, "ours", task, largest_batch_limit),
            "ours, gradient caching": run_alone(
                _find_largest_batch, "ours", task, largest_batch_limit, task.num_captions
            ),
        }
    table = build_table(result)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _describe(task: Task) -> dict[str, Any]:
    module = task.build_module()
    peak, source = find_peak_flops(torch.device(task.device), torch.bfloat16)
    return {
        "processor": describe_processor() if task.device == "cpu" else torch.cuda.get_device_name(),
        "flops_per_image": count_flops_per_caption(module.hparams) / task.num_views,
        "peak_flops": peak,
        "peak_source": source,
    }


def _time_steps(side: str, task: Task) -> dict[str, float]:
    torch.manual_seed(0)
    seconds = {"direct": run_directly, "ours": run_ours}[side](task)
    num_images = task.num_captions * task.num_views * task.num_steps
    if task.device == "cpu":
        num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        num_bytes = torch.cuda.max_memory_allocated()
    return {"images_per_second": num_images / seconds, "bytes": num_bytes}


def run_directly(task: Task) -> float:
    """Seconds of the published step, written out."""
    backbone = build_backbone(task.backbone, task.image_size, task.backbone_options).to(task.device)
    head = ProjectionHead(int(backbone.num_features), task.hidden_features).to(task.device)  # type: ignore[arg-type]
    decayed, others = split_by_decay([*backbone.parameters(), *head.parameters()])
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98))
    is_cpu = task.device == "cpu"
    scaler = torch.amp.GradScaler(task.device, enabled=not is_cpu)
    batch = task.build_batch()
    labels = batch["labels"].repeat(task.num_views)
    start = 0.0
    for step in range(task.num_warmup_steps + task.num_steps):
        if step == task.num_warmup_steps:
            start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(task.device, torch.bfloat16 if is_cpu else torch.float16):
            features = backbone(batch["images"].flatten(0, 1)).unflatten(0, batch["images"].shape[:2])
            z = torch.cat([head(view) for view in features.unbind(dim=1)])
            loss = direct_image_loss(z, z, labels)
        if not math.isfinite(loss.item()):
            raise ValueError(f"loss is {loss.item()} at step {step}")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        _wait(task)
    return time.perf_counter() - start


class _Batches(IterableDataset[dict[str, Tensor]]):
    """One batch again and again."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        while True:
            yield self.batch


class _Clock(pl.Callback):
    """Seconds of the steps after the warm-up."""

    def __init__(self, task: Task) -> None:
        self.task, self.start, self.seconds = task, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Starts when the warm-up is over."""
        if trainer.global_step == self.task.num_warmup_steps:
            _wait(self.task)
            self.start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops when the device is done."""
        _wait(self.task)
        self.seconds = time.perf_counter() - self.start


def run_ours(task: Task) -> float:
    """Seconds of the module's step under Lightning's trainer."""
    warnings.filterwarnings("ignore")  # a loader in memory, a trainer without a log
    clock = _Clock(task)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if task.device == "cuda" else task.device,
            devices=1,
            precision="bf16-mixed",
            max_steps=task.num_warmup_steps + task.num_steps,
            default_root_dir=folder,
            callbacks=[clock],
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task.build_module(), DataLoader(_Batches(task.build_batch()), batch_size=None))
    return clock.seconds


def _wait(task: Task) -> None:
    if task.device != "cpu":
        torch.accelerator.synchronize()


def _find_largest_batch(
    side: str, task: Task, limit: int, num_captions_per_microbatch: int | None = None
) -> int:
    """Captions of the largest batch of which two steps run; 0 where none does."""

    def runs(num_captions: int) -> bool:
        changes = {
            "num_captions": num_captions,
            "num_captions_per_microbatch": num_captions_per_microbatch,
            "num_steps": 1,
            "num_warmup_steps": 1,
            "compile": False,
        }
        try:
            {"direct": run_directly, "ours": run_ours}[side](Task(**(asdict(task) | changes)))
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return True

    good, bad = 0, min(task.num_captions, limit)
    while bad <= limit and runs(bad):
        good, bad = bad, 2 * bad
    if good * 2 > limit:
        return good
    for _ in range(4):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if runs(middle) else (good, middle)
    return good


def build_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    task, turns = result["task"], result["turns"]
    speeds = {side: [turn["images_per_second"] for turn in turns[side]] for side in SIDES}
    ratios = [ours / direct for direct, ours in zip(speeds["direct"], speeds["ours"], strict=True)]
    lines = [
        f"{task['backbone']} {task['backbone_options']}, {task['image_size']} pixels, {task['num_captions']} "
        f"captions of {task['num_views']} images, {result['processor']}, torch {result['torch']}; peak "
        f"{result['peak_flops'] / 1e12:.4g} TFLOP/s ({result['peak_source']}). Ours over direct, images a "
        f"second: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}).",
        "",
        "| step | images/s | useful share of the peak | memory, GB |",
        "|---|---|---|---|",
    ]
    for side in SIDES:
        speed = statistics.median(speeds[side])
        share = speed * result["flops_per_image"] / result["peak_flops"]
        memory = max(turn["bytes"] for turn in turns[side]) / 1e9
        lines.append(f"| {side} | {speed:,.4g} | {share:.1%} | {memory:.3g} |")
    if "largest_batch" in result:
        lines += ["", "| step | captions of the largest batch |", "|---|---|"]
        lines += [f"| {side} | {captions:,} |" for side, captions in result["largest_batch"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(measure)
