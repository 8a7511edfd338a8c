"""The batched heads against plain PyTorch, and what each choice may look at."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablerep.evaluation.linear import (
    LabelledFeatures,
    LinearConfig,
    LinearHeads,
    LinearResult,
    choose_head,
    cosine_factor,
    linear_probe,
)

NUM_CLASSES, NUM_FEATURES = 4, 10


def draw(n: int, seed: int, spread: float = 1.0) -> LabelledFeatures:
    centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % NUM_CLASSES
    return LabelledFeatures(
        centres[labels] + spread * torch.randn(n, NUM_FEATURES, generator=generator), labels
    )


def views_of(train: LabelledFeatures) -> Callable[[int], Tensor]:
    def views(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(epoch)
        return train.features + 0.1 * torch.randn(train.features.shape, generator=generator)

    return views


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_equals_plain_pytorch_sgd(batch_norm: bool) -> None:
    data, num_steps, rate = draw(240, seed=0), 30, 0.4
    heads = LinearHeads(NUM_FEATURES, NUM_CLASSES, 1, batch_norm=batch_norm, seed=5)
    linear = nn.Linear(NUM_FEATURES, NUM_CLASSES)
    with torch.no_grad():
        linear.weight.copy_(heads.weight[0].T)
        linear.bias.zero_()
    model = (
        nn.Sequential(nn.BatchNorm1d(NUM_FEATURES, affine=False, eps=1e-6), linear) if batch_norm else linear
    )
    optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    for step in range(num_steps):
        rows = torch.arange(40) + 40 * (step % 6)
        heads.step(
            data.features[rows], data.labels[rows], torch.tensor([rate * cosine_factor(step, num_steps)])
        )
        optimizer.zero_grad()
        F.cross_entropy(model(data.features[rows]), data.labels[rows]).backward()
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(heads.weight[0].T, linear.weight.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(heads.bias[0], linear.bias.detach(), atol=1e-5, rtol=0)
    test = draw(100, seed=1).features
    assert torch.equal(heads.predict(test)[0].long(), model.eval()(test).argmax(dim=1))


def test_initial_weights_have_the_published_deviation() -> None:
    heads = LinearHeads(500, 100, 2, batch_norm=False, seed=0)
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert heads.weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert not heads.bias.any()


def test_ten_heads_at_once_equal_ten_separate_runs() -> None:
    train, test, validation = draw(120, 0), draw(200, 1, spread=3), draw(80, 2, spread=3)
    together = LinearConfig(num_epochs=4, num_images_per_batch=50)

    def probe(config: LinearConfig) -> list[LinearResult]:
        return linear_probe(
            views_of(train),
            train.labels,
            test,
            config,
            num_classes=NUM_CLASSES,
            validation=validation,
            seed=3,
        )

    alone = {
        rate: probe(LinearConfig(num_epochs=4, num_images_per_batch=50, base_learning_rates=(rate,)))
        for rate in together.base_learning_rates
    }
    for index, result in enumerate(probe(together)):
        if result.selection == "test":
            best = max(int((runs[index].predictions == test.labels).sum()) for runs in alone.values())
            assert int((result.predictions == test.labels).sum()) == best
        single = alone[result.base_learning_rate][index]
        if single.epoch == result.epoch:
            assert torch.equal(single.predictions, result.predictions)


def test_weights_of_heads_do_not_depend_on_the_other_heads() -> None:
    data = draw(60, 0)
    rates = torch.tensor([0.01, 0.3, 2.0])
    together = LinearHeads(NUM_FEATURES, NUM_CLASSES, 3, batch_norm=True, seed=1)
    alone = [LinearHeads(NUM_FEATURES, NUM_CLASSES, 1, batch_norm=True, seed=1) for _ in rates]
    for _ in range(10):
        together.step(data.features, data.labels, rates)
        for head, rate in zip(alone, rates, strict=True):
            head.step(data.features, data.labels, rate[None])
    torch.testing.assert_close(
        together.weight, torch.cat([head.weight for head in alone]), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("has_validation", [True, False])
def test_heldout_choice_never_looks_at_the_test_labels(has_validation: bool) -> None:
    train, test, validation = draw(120, 0, spread=3), draw(200, 1, spread=3), draw(80, 2, spread=3)
    shuffled = test.labels[torch.randperm(200, generator=torch.Generator().manual_seed(7))]

    def choices(labels: Tensor) -> list[tuple[float, int, Tensor]]:
        results = linear_probe(
            views_of(train),
            train.labels,
            LabelledFeatures(test.features, labels),
            LinearConfig(num_epochs=6, num_images_per_batch=50),
            num_classes=NUM_CLASSES,
            validation=validation if has_validation else None,
            heldout_features=train.features,
        )
        return [(r.base_learning_rate, r.epoch, r.predictions) for r in results if r.selection != "test"]

    for before, after in zip(choices(test.labels), choices(shuffled), strict=True):
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])


def test_paper_choice_is_never_below_the_heldout_choice() -> None:
    train, test = draw(100, 0, spread=3), draw(150, 1, spread=3)
    config = LinearConfig(num_epochs=5, num_images_per_batch=32)
    results = linear_probe(
        views_of(train), train.labels, test, config, num_classes=NUM_CLASSES, heldout_features=train.features
    )
    assert [(r.batch_norm, r.selection) for r in results] == [
        (False, "test"),
        (False, "held-out part of train"),
        (True, "test"),
        (True, "held-out part of train"),
    ]
    accuracies = [int((r.predictions == test.labels).sum()) for r in results]
    assert accuracies[0] >= accuracies[1]
    assert accuracies[2] >= accuracies[3]


def test_separable_classes_are_learnt() -> None:
    train, test = draw(200, 0, spread=0.05), draw(100, 1, spread=0.05)
    config = LinearConfig(num_epochs=20, num_images_per_batch=50)
    for result in linear_probe(
        views_of(train), train.labels, test, config, num_classes=NUM_CLASSES, heldout_features=train.features
    ):
        assert torch.equal(result.predictions, test.labels)


def test_heldout_choice_is_made_on_whole_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is there twice; the run that the choice is made from sees no copy of a held-out one."""
    half = draw(60, 0)
    captions = torch.arange(60).repeat(2)
    features, labels = half.features.repeat(2, 1), half.labels.repeat(2)
    trained: list[set[int]] = []
    original = LinearHeads.step

    def spy(heads: LinearHeads, x: Tensor, y: Tensor, rates: Tensor) -> None:
        rows = (x[:, None] == half.features).all(dim=2).nonzero()[:, 1]
        trained.append(set(rows.tolist()))
        original(heads, x, y, rates)

    monkeypatch.setattr(LinearHeads, "step", spy)
    config = LinearConfig(num_epochs=1, num_images_per_batch=120, heldout_fraction=0.2)
    results = linear_probe(
        lambda epoch: features,
        labels,
        draw(20, 1),
        config,
        num_classes=NUM_CLASSES,
        heldout_features=features,
        groups=captions,
    )
    # One batch an epoch; per probe the run on all of train, then the run that leaves the held-out part out.
    assert [len(captions) for captions in trained] == [60, 48, 60, 48]
    assert [result.split_by for result in results] == [None, "caption", None, "caption"]


def test_of_equal_heads_the_latest_epoch_and_the_first_head_are_chosen() -> None:
    right, wrong = [1, 1], [0, 1]
    predictions = torch.tensor([[right, wrong, wrong], [wrong, right, right], [wrong, wrong, wrong]])
    assert choose_head(predictions, torch.tensor([1, 1])) == (1, 1)


def test_a_diverged_head_is_never_right() -> None:
    heads = LinearHeads(NUM_FEATURES, NUM_CLASSES, 2, batch_norm=False, seed=0)
    heads.weight[1] = float("nan")
    predictions = heads.predict(draw(20, 0).features)
    assert (predictions[0] >= 0).all()
    assert (predictions[1] == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "linear.num_epochs must be >= 1, got 0"),
        ({"num_views": 0}, "linear.num_views must be null or >= 1, got 0"),
        ({"base_learning_rates": (0.1, -1.0)}, "linear.base_learning_rates must all be > 0"),
        ({"heldout_fraction": 1.0}, r"linear.heldout_fraction must be in \(0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_bounds_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearConfig(**options)  # type: ignore[arg-type]
