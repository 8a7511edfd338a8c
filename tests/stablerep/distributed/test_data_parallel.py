import numpy as np
import pytest
import torch
from torch import nn

from stablerep.distributed.data_parallel import SettledDDP
from tests.stablerep.ranks import run_on_ranks

NUM_RANKS, NUM_STEPS, NUM_BEFORE_RESTART = 3, 5, 2


def build(state: dict[str, torch.Tensor] | None = None) -> SettledDDP:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(24, 24), nn.LayerNorm(24), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(24, 1))
    if state is not None:
        model.load_state_dict(state)
    return SettledDDP(model, bucket_cap_mb=0.01)  # several buckets


def step(model: SettledDDP, rank: int, index: int) -> None:
    rows = torch.randn(8, 24, generator=torch.Generator().manual_seed(100 * index + rank))
    model.zero_grad()
    model(rows).pow(2).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1)


def flatten(model: nn.Module) -> np.ndarray:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy()


def train_and_restart(rank: int) -> dict[str, np.ndarray]:
    """The weights after all steps, of one process and of one that began with a later step."""
    model = build()
    state: dict[str, torch.Tensor] = {}
    for index in range(NUM_STEPS):
        if index == NUM_BEFORE_RESTART:
            state = {name: value.clone() for name, value in model.module.state_dict().items()}
        step(model, rank, index)
    later = build(state)
    for index in range(NUM_BEFORE_RESTART, NUM_STEPS):
        step(later, rank, index)
    first = build()
    step(first, rank, 0)
    gradients = torch.cat([p.grad.flatten() for p in first.parameters() if p.grad is not None])
    return {"all": flatten(model), "restarted": flatten(later), "gradients": gradients.numpy()}


@pytest.fixture(scope="module")
def trained() -> list[dict[str, np.ndarray]]:
    return run_on_ranks(train_and_restart, NUM_RANKS)


@pytest.mark.distributed
def test_sums_over_ranks_do_not_depend_on_when_a_process_was_started(
    trained: list[dict[str, np.ndarray]],
) -> None:
    for weights in trained:
        np.testing.assert_array_equal(weights["restarted"], weights["all"])


@pytest.mark.distributed
def test_gradient_is_the_mean_over_ranks(trained: list[dict[str, np.ndarray]]) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(24, 24), nn.LayerNorm(24), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(24, 1))
    for rank in range(NUM_RANKS):
        rows = torch.randn(8, 24, generator=torch.Generator().manual_seed(rank))
        (model(rows).pow(2).mean() / NUM_RANKS).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy()
    for weights in trained:
        np.testing.assert_allclose(weights["gradients"], expected, atol=1e-6)
