"""Laws of guidance scales that differ from image to image, against diffusers' own runs with one scale."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_gen.captions import caption_id
from data_gen.diffusion.generator import DiffusionGenerator, GeneratedCaption, ImageRequest
from data_gen.diffusion.guidance import GuidanceRange, GuidanceScale, draw_guidance_scale, guide_each_image
from data_gen.diffusion.models import GeneratorConfig, find_model, generator_config_from
from data_gen.diffusion.noise import draw_noise, image_seed
from stablerep.cli import parse_config
from tests.data_gen.datasets import save_tiny_sdxl_pipeline

TEXTS = ("a red cube", "two green spheres", "ein blauer Ring", "猫と犬", "a dog")
SCALES = [0.0, 1.5, 4.0, 7.5]


@pytest.fixture
def build(tiny_pipeline: Path) -> Callable[..., DiffusionGenerator]:
    def make(num_images_per_batch: int = 4, **settings: Any) -> DiffusionGenerator:
        sampling = {"model": str(tiny_pipeline), "num_inference_steps": 2, "device": "cpu", **settings}
        config = GeneratorConfig(**sampling)
        return DiffusionGenerator(config, find_model(config), num_images_per_batch)

    return make


def ask(texts: Sequence[str] = TEXTS, num_images: int = 3) -> list[ImageRequest]:
    return [ImageRequest(caption_id(text), text, tuple(range(num_images))) for text in texts]


def by_seed(generated: Sequence[GeneratedCaption]) -> dict[str, bytes]:
    return {
        seed: image.tobytes()
        for result in generated
        for seed, image in zip(result.image_seeds, result.images, strict=True)
    }


def plain_run(pipeline: Any, text: str, seed: str, scale: float) -> Any:
    """The image that diffusers makes of the same latents with this scale for the whole batch."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [text],
        latents=torch.from_numpy(draw_noise(seed, (4, 8, 8)))[None],
        num_inference_steps=2,
        guidance_scale=scale,
        height=16,
        width=16,
        output_type="np",
    ).images[0]


def assert_every_image_is_that_of_its_scale(made: list[GeneratedCaption], pipeline: Any) -> None:
    for result in made:
        rows = zip(result.images, result.image_seeds, result.guidance_scales, strict=True)
        for image, seed, scale in rows:
            expected = 255 * plain_run(pipeline, result.request.text, seed, scale)
            assert np.abs(image - expected).max() < 1.0, scale


def test_each_image_of_a_mixed_batch_is_that_of_diffusers_with_its_scale_alone(
    build: Callable[..., DiffusionGenerator], tiny_pipeline: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    made = list(build(guidance_scale=SCALES).generate(ask(), seed=0))
    assert {scale for result in made for scale in result.guidance_scales} == set(SCALES)
    plain = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    assert_every_image_is_that_of_its_scale(made, plain)
    first = made[0]
    other = 255 * plain_run(plain, TEXTS[0], first.image_seeds[0], first.guidance_scales[0] + 3)
    assert np.abs(first.images[0] - other).max() > 2.0  # the scale does show in these images


def test_sdxl_mixes_scales_in_the_same_way(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = save_tiny_sdxl_pipeline(tmp_path, tiny_pipeline)
    config = GeneratorConfig(str(tmp_path), num_inference_steps=2, guidance_scale=SCALES, device="cpu")
    generator = DiffusionGenerator(config, find_model(config), 4)
    made = list(generator.generate(ask(TEXTS[:2]), seed=0))
    assert_every_image_is_that_of_its_scale(made, pipeline)


def test_mixing_scales_costs_half_precision_no_more_than_its_rounding(
    build: Callable[..., DiffusionGenerator],
) -> None:
    mixed, scalar, exact = (
        build(guidance_scale=scale, dtype=dtype).generate(ask(num_images=4), seed=0)
        for scale, dtype in (([3.0, 3.0], "bfloat16"), (3.0, "bfloat16"), (3.0, "float32"))
    )
    errors = []
    for some, all_alike, reference in zip(mixed, scalar, exact, strict=True):
        truth = np.stack(reference.images).astype(float)
        errors.append([np.abs(np.stack(made.images) - truth).mean() for made in (some, all_alike)])
    of_mixed, of_scalar = np.mean(errors, axis=0)
    assert 0 < of_mixed < 1.5 * of_scalar


def test_a_mixed_image_is_the_same_whatever_the_batch_mates(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build(guidance_scale=GuidanceRange(0.0, 8.0))
    together = by_seed(list(generator.generate(ask(), seed=0)))
    alone = by_seed(list(generator.generate(ask(TEXTS[3:4]), seed=0)))
    backwards = by_seed(list(generator.generate(ask(TEXTS[::-1], 2), seed=0)))
    assert alone == {seed: together[seed] for seed in alone}
    assert backwards == {seed: together[seed] for seed in backwards}


def test_one_scale_leaves_the_network_alone(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build(guidance_scale=3.0)
    hooks: list[int] = []
    generator.pipeline.unet.register_forward_pre_hook(lambda unet, _: hooks.append(len(unet._forward_hooks)))
    made = list(generator.generate(ask(), seed=0))
    assert set(hooks) == {0}
    assert {scale for result in made for scale in result.guidance_scales} == {3.0}


def test_the_scale_of_an_image_follows_from_its_seed_alone() -> None:
    seeds = [image_seed(0, "x", index) for index in range(2000)]
    for seed in seeds[:20]:
        digest = hashlib.sha256(f"{seed}/guidance".encode()).digest()
        uniform = (int.from_bytes(digest[:8]) >> 12) / 2**52
        assert draw_guidance_scale(GuidanceRange(2.0, 6.0), seed) == 2.0 + 4.0 * uniform
        assert draw_guidance_scale([2.0, 5.0, 9.0], seed) == [2.0, 5.0, 9.0][int(3 * uniform)]
    drawn = np.array([draw_guidance_scale(GuidanceRange(2.0, 6.0), seed) for seed in seeds])
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), [2.4, 4.0, 5.6], atol=0.15)
    chosen = [draw_guidance_scale([1.0, 2.0, 3.0, 4.0], seed) for seed in seeds]
    counts = [chosen.count(scale) for scale in (1.0, 2.0, 3.0, 4.0)]
    assert max(abs(count - 500) for count in counts) < 90
    assert {draw_guidance_scale(3, seed) for seed in seeds} == {3.0}
    assert draw_guidance_scale(GuidanceRange(2.5, 2.5), seeds[0]) == 2.5


def test_a_pipeline_of_another_structure_is_refused(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GeneratorConfig(model=str(tiny_pipeline), guidance_scale=[2.0, 4.0], device="cpu")
    monkeypatch.setattr("data_gen.diffusion.generator._has_known_embeddings", lambda *_: False)
    message = (
        r"guidance_scale must be one number for model tiny-pipeline \(StableDiffusionPipeline\), got \[2"
    )
    with pytest.raises(ValueError, match=message):
        DiffusionGenerator(config, find_model(config), 4)


def test_a_distilled_network_that_takes_the_scale_has_one_for_all(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

    pipeline = LatentConsistencyModelPipeline.from_pretrained(
        tiny_pipeline, scheduler=LCMScheduler(), safety_checker=None
    )
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "time_cond_proj_dim": 8})
    pipeline.save_pretrained(tmp_path)
    config = GeneratorConfig(str(tmp_path), num_inference_steps=2, guidance_scale=8.0, device="cpu")
    generator = DiffusionGenerator(config, find_model(config), 4)
    assert len(by_seed(list(generator.generate(ask(), seed=0)))) == 15
    mixed = dataclasses.replace(config, guidance_scale=[4.0, 8.0])
    with pytest.raises(ValueError, match="its UNet takes the scale as an input"):
        DiffusionGenerator(mixed, find_model(mixed), 4)


def test_a_network_that_answers_for_other_than_two_halves_is_refused() -> None:
    network = torch.nn.Linear(1, 1)
    with guide_each_image(network, [2.0, 3.0]), pytest.raises(ValueError, match="two halves of 2 images"):
        network(torch.zeros(6, 1))
    assert network(torch.zeros(6, 1)).shape == (6, 1)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (-1.0, "guidance_scale must be >= 0 and finite, got -1.0"),
        (float("nan"), "guidance_scale must be >= 0 and finite, got nan"),
        ([2.0, -1.0], r"guidance_scale\[1\] must be >= 0 and finite, got -1.0"),
        ([], r"guidance_scale must hold at least one scale, got \[\]"),
        (GuidanceRange(2.0, float("inf")), "guidance_scale.high must be >= 0 and finite, got inf"),
        (GuidanceRange(4.0, 2.0), "guidance_scale.low must be <= guidance_scale.high, got 4.0 and 2.0"),
    ],
)
def test_a_scale_out_of_its_range_is_named(scale: GuidanceScale, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(guidance_scale=scale).check()


@dataclass(frozen=True)
class Options:
    """As a verb has them.

    Args:
        generator: The model.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("2", 2.0),
        ("2.5", 2.5),
        ("[2,4]", [2.0, 4.0]),
        ("{low: 2, high: 4}", GuidanceRange(2.0, 4.0)),
    ],
)
def test_every_form_is_read_from_the_command_line_and_from_yaml(
    words: str, expected: GuidanceScale, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"generator:\n  guidance_scale: {words}\n")
    for args in (["--generator.guidance_scale", words], ["--config", str(file)]):
        scale = parse_config(Options, args, prog="test", description="test").generator.guidance_scale
        assert (type(scale), scale) == (type(expected), expected)


@pytest.mark.parametrize("scale", [2.0, [2.0, 4.0], GuidanceRange(2.0, 4.0)], ids=lambda s: type(s).__name__)
def test_the_config_comes_back_from_plain_json(scale: GuidanceScale) -> None:
    config = GeneratorConfig(guidance_scale=scale, channels_last=True, tiny_vae="owner/name", height=64)
    settings = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    assert generator_config_from({**settings, "model_identity": "sha256:0"}) == config
