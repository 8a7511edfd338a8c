import math
from typing import Any

import pytest
import torch
from torch import nn

from stablerep.optimizer import OptimizerConfig, Schedule, split_by_decay, update_average
from tests.stablerep.training import build_module


def test_published_rule_gives_the_published_learning_rate() -> None:
    assert OptimizerConfig().peak_learning_rate(43 * 32 * 6) == pytest.approx(3.225e-3)
    assert OptimizerConfig(learning_rate=0.5).peak_learning_rate(8256) == 0.5


def test_arithmetic_of_the_learning_rate_is_told() -> None:
    assert OptimizerConfig().explain_peak(8256) == "0.0002 x 8256 / 256 x (1 crop of an image / 2) = 0.003225"
    assert OptimizerConfig(learning_rate=0.5).explain_peak(8256) == "0.5, as given"


def test_schedule_is_linear_warm_up_then_cosine_to_zero() -> None:
    schedule = Schedule(num_warmup_steps=4, num_steps=12)
    factors = [schedule.factor(step) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 13):
        assert factors[step] == pytest.approx((1 + math.cos(math.pi * (step - 4) / 8)) / 2)
    assert factors[12] == pytest.approx(0)


@pytest.mark.parametrize(("before", "now"), [(100, 50), (100, 200), (100, 100), (7, 3)])
def test_schedule_of_a_resumed_run_stands_where_its_epochs_do(before: int, now: int) -> None:
    first, second = (
        Schedule(peak=1.0, num_warmup_steps=n, num_steps=10 * n, num_steps_per_epoch=n) for n in (before, now)
    )
    resumed = second.resume(first, 4 * before)
    for epoch in range(6):
        assert resumed.factor(4 * before + epoch * now) == pytest.approx(second.factor((4 + epoch) * now))
    again = first.resume(resumed, 4 * before + 2 * now)  # and back
    assert again.factor(4 * before + 2 * now) == pytest.approx(first.factor(6 * before))


def test_schedule_that_counts_steps_goes_on_at_its_step() -> None:
    first, second = Schedule(num_steps=20), Schedule(num_steps=20, peak=2.0)
    assert second.resume(first, 5).factor(5) == first.factor(5)


def test_warm_up_is_counted_in_steps_or_in_epochs() -> None:
    assert OptimizerConfig(num_warmup_steps=7).count_warmup_steps(None) == 7
    assert OptimizerConfig(num_warmup_epochs=0.45).count_warmup_steps(1000) == 450
    with pytest.raises(ValueError, match="num_warmup_epochs 0.5 needs a data module that counts"):
        OptimizerConfig(num_warmup_epochs=0.5).count_warmup_steps(None)


def test_biases_and_norms_alone_are_not_decayed() -> None:
    module = build_module()
    decayed, others = split_by_decay(module.parameters())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(p)] for p in others} == {
        n for n, p in module.named_parameters() if n.endswith("bias") or ("norm" in n) or p.ndim == 1
    }
    assert {"backbone.cls_token", "backbone.pos_embed"} <= {names[id(p)] for p in decayed}
    assert len(decayed) + len(others) == len(list(module.parameters()))


def test_average_is_the_exponential_one_of_the_weights() -> None:
    module, average = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = average.weight.detach().double().clone()
    for _ in range(3):
        with torch.no_grad():
            module.weight.normal_()
        update_average(average, module, 0.9)
        expected = 0.9 * expected + 0.1 * module.weight.detach().double()
    torch.testing.assert_close(average.weight.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"num_warmup_steps": -1}, "num_warmup_steps must be >= 0, got -1"),
        ({"num_warmup_epochs": math.nan}, "num_warmup_epochs must be >= 0, got nan"),
        (
            {"num_warmup_steps": 9, "num_warmup_epochs": 0.5},
            "num_warmup_epochs must be 0 where num_warmup_steps",
        ),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be > 0, got 0.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_optimizer_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)
