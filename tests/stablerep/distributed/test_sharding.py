from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from stablerep.distributed.sharding import ShardedStrategy
from stablerep.module import StableRep
from stablerep.optimizer import OptimizerConfig
from stablerep.text import TextConfig
from tests.stablerep.ranks import run_on_ranks
from tests.stablerep.training import Recorder, build_batches, build_module, train_as_rank

SMALL_TEXT = TextConfig(out_features=8, width=16, num_layers=1, num_heads=2, context_length=12)
STRATEGIES = ("ddp", "sharded")


def build(seed: int) -> StableRep:
    torch.manual_seed(seed)
    optimizer = OptimizerConfig(learning_rate=1e-2, ema_decay=0.9, max_gradient_norm=1.0)
    return build_module(text=SMALL_TEXT, queue_size=12, projection_norm="layernorm", optimizer=optimizer)


def _train_and_go_on(rank: int, folder: str) -> dict[str, list[float]]:
    """Losses of four steps, and of the last two where a run of either kind goes on from the second."""

    def run(strategy: str, name: str, seed: int, first_step: int, ckpt_path: Path | None = None) -> None:
        recorder = Recorder()
        train_as_rank(
            *(rank, build(seed), Path(folder), batches[first_step:] + batches[:first_step], ckpt_path),
            strategy=ShardedStrategy() if strategy == "sharded" else "ddp",
            logger=recorder,
            log_every_n_steps=1,
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint(Path(folder) / name, "{step}", every_n_train_steps=2, save_top_k=-1)],
        )
        losses[name] = recorder.read("loss")

    losses: dict[str, list[float]] = {}
    torch.manual_seed(0)
    batches = build_batches(4)
    for first in STRATEGIES:
        run(first, first, 1, 0)
        for second in STRATEGIES:
            run(second, f"{first} then {second}", 2, 2, Path(folder) / first / "step=2.ckpt")
    return losses


@pytest.mark.distributed
def test_run_goes_on_exactly_with_sharding_or_without(tmp_path: Path) -> None:
    losses = run_on_ranks(_train_and_go_on, 2, str(tmp_path))[0]
    whole = losses["ddp"]
    assert len(whole) == 4
    for name, values in losses.items():
        assert values == pytest.approx(whole[2:] if "then" in name else whole, abs=1e-4), name
    files = [torch.load(tmp_path / name / "step=4.ckpt", weights_only=True) for name in STRATEGIES]
    ours, theirs = (file["optimizer_states"][0] for file in files)
    assert [group["params"] for group in ours["param_groups"]] == [
        g["params"] for g in theirs["param_groups"]
    ]
    for number, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][number]["exp_avg"], state["exp_avg"], atol=1e-4, rtol=1e-2)
