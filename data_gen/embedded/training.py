"""One loop for the three networks: AdamW, warm-up, constant rate, linear decay, a moving average, resume.

Whatever a step draws is a function of (seed, stage, step): a run that is killed and started again takes the
steps that it would have taken.
"""

import csv
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

_SECONDS_BETWEEN_CHECKPOINTS = 120
_STEPS_BETWEEN_LOGS = 50


@dataclass(frozen=True)
class StageConfig:
    """How one network is trained.

    Args:
        num_steps: Updates, >= 1.
        num_examples_per_step: Examples in one update, >= 1.
        learning_rate: Peak of AdamW's rate.
        weight_decay: Of AdamW.
        num_warmup_steps: Updates in which the rate rises to its peak.
        decay_fraction: Share of the steps, at the end, in which the rate falls to zero along a line.
        ema_decay: Of the moving average of the weights, which is what is kept.
    """

    num_steps: int
    num_examples_per_step: int
    learning_rate: float
    weight_decay: float = 0.01
    num_warmup_steps: int = 200
    decay_fraction: float = 0.3
    ema_decay: float = 0.999

    def learning_rate_at(self, step: int) -> float:
        """Rate of update `step`, counted from 0."""
        num_decay_steps = max(1, round(self.num_steps * self.decay_fraction))
        warmup = min(1.0, (step + 1) / max(1, self.num_warmup_steps))
        return self.learning_rate * min(warmup, (self.num_steps - step) / num_decay_steps, 1.0)


@dataclass(frozen=True)
class Draws:
    """The randomness of one step.

    Args:
        step: Counted from 0.
        numpy: For indices and words.
        torch: For noise, on the CPU whatever the device.
    """

    step: int
    numpy: np.random.Generator
    torch: torch.Generator


def draws_of(seed: int, stage: str, step: int) -> Draws:
    """Return the randomness of a step, a function of its arguments alone."""
    sequence = np.random.SeedSequence([seed, step, *stage.encode()])
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
    return Draws(step, np.random.Generator(np.random.Philox(sequence)), generator)


def indices_of(step: int, num_examples: int, num_examples_per_step: int, seed: int) -> NDArray[np.int64]:
    """Return which examples a step takes; every epoch has a new order and leaves out what fills no batch."""
    num_steps_per_epoch = num_examples // num_examples_per_step
    epoch, position = divmod(step, num_steps_per_epoch)
    start = position * num_examples_per_step
    return np.sort(_order(seed, epoch, num_examples)[start : start + num_examples_per_step])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(
        num_examples
    )


def train_stage(
    name: str,
    model: nn.Module,
    loss_of: Callable[[Draws], Tensor],
    config: StageConfig,
    folder: Path,
    seed: int,
    upstream: str = "",
) -> None:
    """Train `model` in place and leave it with the moving average of its weights, in evaluation mode.

    Progress is in `<name>.pt` (about every two minutes and at the end) and `<name>.csv` of `folder`; where a
    checkpoint is found, training goes on from it.

    Args:
        name: Of the stage; part of all that it draws.
        model: The network.
        loss_of: Loss of one step, from its randomness.
        config: The settings.
        folder: Holds checkpoint and log.
        seed: Of everything drawn.
        upstream: Digest of the networks whose outputs it learns from.

    Raises:
        ValueError: The checkpoint found was made with other settings or on other networks' outputs;
            `num_steps` and `decay_fraction` may change as long as the rate has begun to fall by neither plan.
        FloatingPointError: The loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    device = next(model.parameters()).device
    ema.to(device)
    checkpoint = folder / f"{name}.pt"
    first = _resume(checkpoint, model, optimizer, ema, config, upstream)
    _drop_log_after(folder / f"{name}.csv", first)
    saved, losses = time.monotonic(), []
    model.train()
    for step in tqdm(range(first, config.num_steps), name, config.num_steps, initial=first, mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        loss = loss_of(draws_of(seed, name, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        losses.append(loss.detach())
        done = step + 1
        if done % _STEPS_BETWEEN_LOGS == 0 or done == config.num_steps:
            _log(
                folder / f"{name}.csv", done, torch.stack(losses).mean().item(), config.learning_rate_at(step)
            )
            losses.clear()
            if done == config.num_steps or time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                _save(checkpoint, model, optimizer, ema, config, done, upstream)
                saved = time.monotonic()
    ema.copy_to(model.parameters())
    model.eval()


def digest_weights(*models: nn.Module) -> str:
    """SHA-256 of the models' parameters, in hexadecimal."""
    digest = hashlib.sha256()
    for model in models:
        for parameter in model.parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write a whole file or none."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _resume(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    config: StageConfig,
    upstream: str,
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    wanted, found, step = asdict(config), state["config"], state["step"]
    falling = step > min(c["num_steps"] * (1 - c["decay_fraction"]) for c in (found, wanted))
    if state["upstream"] != upstream:
        raise ValueError(f"{path} learnt from the outputs of networks that are no longer there: remove it")
    for name, value in wanted.items():
        if found[name] != value and (name not in ("num_steps", "decay_fraction") or falling):
            raise ValueError(f"{path} was made with {name} {found[name]}, asked for is {value}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return int(step)


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    config: StageConfig,
    step: int,
    upstream: str,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "config": asdict(config),
        "step": step,
        "upstream": upstream,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _log(path: Path, step: int, loss: float, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of {path.stem} is {loss} at step {step}")
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "loss", "learning_rate", "unix_seconds"])
        writer.writerow([step, f"{loss:.6f}", f"{learning_rate:.3e}", round(time.time())])


def _drop_log_after(path: Path, step: int) -> None:
    """Forget what a killed run logged after its last checkpoint."""
    if path.exists() and (lines := path.read_text().splitlines()):
        kept = [lines[0], *(line for line in lines[1:] if int(line.split(",")[0]) <= step)]
        if kept != lines:
            replace_file(path, "\n".join(kept) + "\n")
