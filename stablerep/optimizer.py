"""AdamW as published: its decay groups, the rule of the learning rate, warm-up and cosine.

The published rule is lr = blr · (captions · ranks · views / 256) · (crops / 2), where a view is one image of
the caption and crops are those of one image: 1 for StableRep, whose views are crops of different images, so
that lr = blr · images_per_step / 512. SimCLR's two crops of one image are two of our views: the same formula.
The published run: 43 captions · 32 ranks · 6 views = 8256 images a step, 2e-4 · 8256 / 256 · 1/2 = 3.225e-3.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from stablerep.distributed.sharding import local


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine to 0, per step.

    Attributes:
        base_learning_rate: blr of the published rule lr = blr · images_per_step / 512.
        learning_rate: Peak learning rate in place of the rule's.
        weight_decay: Decoupled decay of parameters with two or more dimensions; the others have none.
        betas: Decay rates of AdamW's two moments.
        num_warmup_steps: Steps of the linear warm-up.
        num_warmup_epochs: Its length in epochs instead, as published: 0.5 for 15 epochs.
        max_gradient_norm: Longer gradients are cut to this length, > 0; the published runs cut none.
        ema_decay: In [0, 1); the backbone's moving average becomes decay · average + (1 − decay) · weights
            after each step. Null keeps none.
    """

    base_learning_rate: float = 2e-4
    learning_rate: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    num_warmup_steps: int = 0
    num_warmup_epochs: float = 0.0
    max_gradient_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a checkpoint holds a list
        for name in ("base_learning_rate", "learning_rate", "max_gradient_norm"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        for name in ("weight_decay", "num_warmup_steps", "num_warmup_epochs"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.num_warmup_steps and self.num_warmup_epochs:
            raise ValueError(
                "num_warmup_epochs must be 0 where num_warmup_steps is given, got "
                f"{self.num_warmup_epochs} and {self.num_warmup_steps}"
            )

    def peak_learning_rate(self, num_images_per_step: int) -> float:
        """learning_rate where given, else base_learning_rate · num_images_per_step / 512."""
        return self.learning_rate or self.base_learning_rate * num_images_per_step / 512

    def explain_peak(self, num_images_per_step: int) -> str:
        """How the peak comes about, for the log."""
        peak = f"{self.peak_learning_rate(num_images_per_step):.4g}"
        if self.learning_rate:
            return f"{peak}, as given"
        return (
            f"{self.base_learning_rate:g} x {num_images_per_step} / 256 x (1 crop of an image / 2) = {peak}"
        )

    def count_warmup_steps(self, num_steps_per_epoch: int | None) -> int:
        """num_warmup_steps, or the steps of num_warmup_epochs.

        Args:
            num_steps_per_epoch: Steps of one pass over the data; None where that is not known.

        Raises:
            ValueError: If epochs are asked for and their length is not known.
        """
        if not self.num_warmup_epochs:
            return self.num_warmup_steps
        if num_steps_per_epoch is None:
            raise ValueError(
                f"num_warmup_epochs {self.num_warmup_epochs} needs a data module that counts an epoch's steps"
            )
        return round(self.num_warmup_epochs * num_steps_per_epoch)

    def to_plain(self) -> dict[str, Any]:
        """The settings in types that a checkpoint may hold."""
        return asdict(self) | {"betas": list(self.betas)}


PUBLISHED_OPTIMIZER = OptimizerConfig()


@dataclass(frozen=True)
class Schedule:
    """The learning rate by step: linear to the peak, then ½(1 + cos π t), 0 at the end.

    Attributes:
        peak: Learning rate at the end of the warm-up.
        num_warmup_steps: Steps of the warm-up.
        num_steps: Steps of the run.
        num_steps_per_epoch: Steps of one pass over the data, where the run ends with its epochs.
        num_skipped_steps: What is added to the trainer's count of steps: a run that goes on with larger steps
            stands where it would, had it made such steps from the beginning.
    """

    peak: float = 0.0
    num_warmup_steps: int = 0
    num_steps: int = 0
    num_steps_per_epoch: int | None = None
    num_skipped_steps: int = 0

    def factor(self, step: int) -> float:
        """Share of the peak at one of the trainer's steps."""
        step += self.num_skipped_steps
        if step < self.num_warmup_steps:
            return (step + 1) / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def resume(self, before: "Schedule", step: int) -> "Schedule":
        """This schedule for a run that was at `step` of another: at as many epochs, if both count epochs.

        Args:
            before: The schedule until then.
            step: Steps that the trainer counts by now.
        """
        if self.num_steps_per_epoch is None or before.num_steps_per_epoch is None:
            return replace(self, num_skipped_steps=before.num_skipped_steps)
        position = (step + before.num_skipped_steps) * self.num_steps_per_epoch / before.num_steps_per_epoch
        return replace(self, num_skipped_steps=round(position) - step)


def split_by_decay(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay (two or more dimensions; class and position tokens too) and without."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · module, by parameter; buffers are copied."""
    averages, weights = ([local(p) for p in m.parameters()] for m in (average, module))
    torch._foreach_lerp_(averages, weights, 1 - decay)
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
