"""The script that trains the embedded generator, in little."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_gen.diffusion.generator import DiffusionGenerator
from data_gen.diffusion.models import GeneratorConfig, find_model
from data_gen.embedded import examples
from data_gen.embedded.autoencoder import build_autoencoder, standardise_latents, to_signed
from data_gen.embedded.denoiser import build_scheduler, velocity
from data_gen.embedded.examples import SceneBank, build_bank, scene_at
from data_gen.embedded.text import CONTEXT_LENGTH, answers_of, build_tokenizer
from data_gen.embedded.train import train
from data_gen.embedded.training import (
    Draws,
    StageConfig,
    digest_weights,
    draws_of,
    indices_of,
    train_stage,
)
from data_gen.scenes import HELD_OUT_COMBINATIONS, Description, Mention, sample_captions

UNICODE = "naïve 日本語 🦄 ça ﬀ\u0301 Ωμέγα, \t tab"
SHORT = StageConfig(
    num_steps=12, num_examples_per_step=4, learning_rate=0.01, num_warmup_steps=2, decay_fraction=0.5
)


class KilledError(Exception):
    pass


def train_line(folder: Path, config: StageConfig, kill_at: int | None = None) -> Tensor:
    """Fit a line with the stage's own randomness; returns its weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(draws: Draws) -> Tensor:
        if draws.step == kill_at:
            raise KilledError
        inputs = torch.randn(config.num_examples_per_step, 3, generator=draws.torch)
        return (model(inputs) - inputs.sum(dim=1, keepdim=True) - float(draws.numpy.random())).square().mean()

    train_stage("line", model, loss_of, config, folder, seed=0)
    return torch.cat([parameter.flatten() for parameter in model.parameters()]).detach()


@pytest.fixture
def checkpoint_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_gen.embedded.training._STEPS_BETWEEN_LOGS", 1)
    monkeypatch.setattr("data_gen.embedded.training._SECONDS_BETWEEN_CHECKPOINTS", -1)


@pytest.mark.usefixtures("checkpoint_every_step")
def test_killed_stage_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = train_line(tmp_path / "whole", SHORT)
    with pytest.raises(KilledError):
        train_line(tmp_path / "broken", SHORT, kill_at=7)
    assert torch.equal(train_line(tmp_path / "broken", SHORT), whole)
    logs = [(tmp_path / name / "line.csv").read_text().splitlines() for name in ("whole", "broken")]
    assert [line.split(",")[:3] for line in logs[0]] == [line.split(",")[:3] for line in logs[1]]


@pytest.mark.usefixtures("checkpoint_every_step")
def test_more_steps_continue_a_run_until_its_rate_falls(tmp_path: Path) -> None:
    longer = replace(SHORT, num_steps=20)
    for name in ("whole", "early", "late"):
        (tmp_path / name).mkdir()
    whole = train_line(tmp_path / "whole", longer)
    with pytest.raises(KilledError):
        train_line(tmp_path / "early", SHORT, kill_at=5)
    assert torch.equal(train_line(tmp_path / "early", longer), whole)
    train_line(tmp_path / "late", SHORT)
    for num_steps in (20, 8):  # the rate has fallen, or would have begun to
        with pytest.raises(ValueError, match=f"made with num_steps 12, asked for is {num_steps}"):
            train_line(tmp_path / "late", replace(SHORT, num_steps=num_steps))


@pytest.mark.usefixtures("checkpoint_every_step")
def test_fewer_steps_end_a_run_only_before_its_rate_would_have_fallen(tmp_path: Path) -> None:
    shorter = replace(SHORT, num_steps=8)
    for name in ("whole", "early", "late"):
        (tmp_path / name).mkdir()
    whole = train_line(tmp_path / "whole", shorter)
    with pytest.raises(KilledError):
        train_line(tmp_path / "early", SHORT, kill_at=4)
    assert torch.equal(train_line(tmp_path / "early", shorter), whole)
    with pytest.raises(KilledError):
        train_line(tmp_path / "late", SHORT, kill_at=5)
    with pytest.raises(ValueError, match=r"made with num_steps 12, asked for is 8"):
        train_line(tmp_path / "late", shorter)


@pytest.mark.usefixtures("checkpoint_every_step")
def test_stage_that_learnt_from_another_network_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def loss_of(_: Draws) -> Tensor:
        return model(torch.ones(1, 1)).square().sum()

    train_stage("line", model, loss_of, SHORT, tmp_path, seed=0, upstream="a")
    train_stage("line", model, loss_of, SHORT, tmp_path, seed=0, upstream="a")
    with pytest.raises(ValueError, match=r"line\.pt learnt from the outputs of networks that are no longer"):
        train_stage("line", model, loss_of, SHORT, tmp_path, seed=0, upstream="b")


def test_digest_is_of_the_weights() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert digest_weights(first) != digest_weights(second)
    second.load_state_dict(first.state_dict())
    assert digest_weights(first) == digest_weights(second)
    assert digest_weights(first, second) != digest_weights(first)


@pytest.mark.usefixtures("checkpoint_every_step")
def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train_line(tmp_path, SHORT)
    with pytest.raises(ValueError, match=r"line\.pt was made with learning_rate 0\.01, asked for is 0\.1"):
        train_line(tmp_path, replace(SHORT, learning_rate=0.1))


def test_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match=r"the loss of nan is nan at step 12"):
        train_stage(
            "nan", model, lambda _: model(torch.ones(1, 1)).sum() * torch.nan, SHORT, tmp_path, seed=0
        )
    assert not (tmp_path / "nan.pt").exists()


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    config = StageConfig(100, 1, 1.0, num_warmup_steps=10, decay_fraction=0.2)
    rates = [config.learning_rate_at(step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert set(rates[10:80]) == {1.0}
    np.testing.assert_allclose(rates[80:], np.arange(20, 0, -1) / 20)


def test_every_epoch_takes_each_example_once_in_another_order() -> None:
    epochs = [
        np.concatenate([indices_of(epoch * 25 + step, 100, 4, seed=3) for step in range(25)])
        for epoch in range(2)
    ]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_steps_and_stages_draw_independently() -> None:
    first = draws_of(0, "a", 1)
    again, other_step, other_stage = draws_of(0, "a", 1), draws_of(0, "a", 2), draws_of(0, "b", 1)
    value = torch.rand(4, generator=first.torch)
    assert torch.equal(value, torch.rand(4, generator=again.torch))
    assert not torch.equal(value, torch.rand(4, generator=other_step.torch))
    assert not torch.equal(value, torch.rand(4, generator=other_stage.torch))
    assert first.numpy.random() == again.numpy.random() != other_step.numpy.random()


def test_training_scenes_hold_no_held_out_combination() -> None:
    pairs = {(o.shape, o.colour) for index in range(1500) for o in scene_at(0, index).objects}
    assert not pairs & HELD_OUT_COMBINATIONS
    assert len(pairs) == 8 * 10 - len(HELD_OUT_COMBINATIONS)


def test_bank_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_CHUNK", 4)
    monkeypatch.setattr(examples, "ProcessPoolExecutor", _InThisProcess)
    bank = build_bank(tmp_path, 8, seed=0, num_workers=1)
    images = np.array(bank.images)
    progress = json.loads((tmp_path / "scenes.json").read_text())
    (tmp_path / "scenes.json").write_text(json.dumps(progress | {"chunks": [0]}))
    memory = np.lib.format.open_memmap(tmp_path / "scenes.npy", mode="r+")
    memory[4:] = 0
    memory.flush()
    assert np.array_equal(build_bank(tmp_path, 8, seed=0, num_workers=1).images, images)
    assert images.reshape(8, -1).std(axis=1).min() > 5
    with pytest.raises(ValueError, match=r"'num_scenes': 8, 'seed': 0.*asked for is .*'num_scenes': 12"):
        build_bank(tmp_path, 12, seed=0, num_workers=1)
    with pytest.raises(ValueError, match=r"num_scenes must be a positive multiple of 4, got 6"):
        build_bank(tmp_path / "other", 6, seed=0, num_workers=1)


class _InThisProcess:
    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "_InThisProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


def test_any_unicode_is_written_in_known_tokens() -> None:
    tokenizer = build_tokenizer(seed=0, num_captions=300)
    ids = tokenizer(UNICODE).input_ids
    assert all(0 <= token < len(tokenizer) for token in ids)
    spelt = str(tokenizer.decode(ids, skip_special_tokens=True)).replace(" ", "")
    assert "日本語" in spelt
    assert "🦄" in spelt
    assert "naïve" in spelt
    every_byte = "".join(map(chr, range(1, 0x250)))
    assert tokenizer.unk_token_id not in tokenizer(every_byte, add_special_tokens=False).input_ids


def test_the_grammars_captions_fit_and_its_words_are_short() -> None:
    tokenizer = build_tokenizer(seed=0)
    lengths = [len(tokenizer(caption).input_ids) for caption in sample_captions(1000, seed=9)]
    assert max(lengths) <= CONTEXT_LENGTH
    for word in ("triangle", "turquoise", "checkered", "crescent", "bricks"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) <= 2, word


def test_standard_latents_reconstruct_the_same() -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    torch.nn.init.normal_(autoencoder.quant_conv.bias)
    bank = SceneBank(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), seed=0)
    images = to_signed(bank.images, torch.device("cpu"))
    with torch.inference_mode():
        before = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(before.mean).sample
    standardise_latents(autoencoder, bank)
    with torch.inference_mode():
        after = autoencoder.encode(images).latent_dist
        torch.testing.assert_close(autoencoder.decode(after.mean).sample, decoded, rtol=1e-3, atol=1e-4)
    scale = before.mean.std(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(8), rtol=1e-3, atol=0)
    torch.testing.assert_close(after.std, before.std / scale, rtol=1e-3, atol=1e-5)


def test_answers_name_what_a_caption_says() -> None:
    mention = Mention(shape="circle", colour=None, size="large", fill="solid")
    answers = answers_of(Description("…", (mention,), "snow", None))
    assert answers == [1, 0, 3, 1, *[0] * 8, 6, 0]


def test_denoiser_and_sampler_agree_on_their_task() -> None:
    """What the denoiser is taught to say of a noisy latent, the sampler turns back into the latent."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(10)
    assert scheduler.alphas_cumprod[-1] < 1e-4
    latents, noise = torch.randn(2, 1, 8, 16, 16)
    for index, timestep in enumerate(scheduler.timesteps[1:-1], start=1):
        scheduler._step_index = index
        squared = scheduler.alphas_cumprod[timestep]
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        given = scheduler.convert_model_output(
            velocity(latents, noise, alpha, sigma), sample=alpha * latents + sigma * noise
        )
        torch.testing.assert_close(given, latents, rtol=0, atol=1e-2)


@pytest.mark.e2e
def test_training_writes_a_pipeline_that_the_generator_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "_CHUNK", 16)
    monkeypatch.setattr(examples, "ProcessPoolExecutor", _InThisProcess)
    few = StageConfig(num_steps=2, num_examples_per_step=4, learning_rate=1e-3)
    train(
        output=tmp_path,
        num_scenes=32,
        autoencoder=few,
        text_encoder=few,
        denoiser=few,
        denoiser_restart=few,
        decoder=few,
        device="cpu",
        num_threads=1,
        compiled=False,
    )
    folder = tmp_path / "pipeline"
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 16e6
    config = GeneratorConfig(model=str(folder), num_inference_steps=2, device="cpu")
    generator = DiffusionGenerator(config, find_model(config), num_images_per_batch=2)
    assert (generator.height, generator.width) == (64, 64)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["denoiser"]["num_steps"] == 2
