"""Laws of generation, on a tiny pipeline with random weights that is loaded like any other."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_gen.captions import Caption, caption_id
from data_gen.generator import NUM_CAPTIONS_PER_ENCODING, DiffusionGenerator, GeneratedCaption
from data_gen.models import SCHEDULERS, GeneratorConfig, digest_model, find_model
from data_gen.noise import draw_noise, image_seed

TEXTS = ("a red cube", "two green spheres", "ein blauer Ring", "猫と犬", "a dog")
CAPTIONS = tuple(Caption(caption_id(text), text) for text in TEXTS)


@pytest.fixture
def build(tiny_pipeline: Path) -> Callable[..., DiffusionGenerator]:
    def make(num_images_per_batch: int = 4, **settings: Any) -> DiffusionGenerator:
        sampling = {"model": str(tiny_pipeline), "num_inference_steps": 2, "device": "cpu", **settings}
        config = GeneratorConfig(**sampling)
        return DiffusionGenerator(config, find_model(config), num_images_per_batch)

    return make


def by_seed(generated: list[GeneratedCaption]) -> dict[str, bytes]:
    return {
        seed: image.tobytes()
        for result in generated
        for seed, image in zip(result.image_seeds, result.images, strict=True)
    }


def test_equal_seed_low_bits_do_not_collide() -> None:
    first, second = image_seed(5, "a" * 32, 0), image_seed(5 + 2**32, "a" * 32, 0)
    assert first != second
    low_bits_equal = [int(first, 16), int(first, 16) + 2**32, int(first, 16) ^ 1 << 100]
    noises = {draw_noise(f"{key:032x}", (4, 8, 8)).tobytes() for key in low_bits_equal}
    assert len(noises) == 3


def test_noise_is_that_of_philox_with_the_whole_key() -> None:
    key = image_seed(0, CAPTIONS[0].caption_id, 1)
    words = np.array([int(key, 16) % 2**64, int(key, 16) >> 64], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=words)).standard_normal((4, 8), dtype=np.float32)
    np.testing.assert_array_equal(draw_noise(key, (4, 8)), expected)


def test_noise_is_standard_normal_and_independent_between_images() -> None:
    noise = np.stack([draw_noise(image_seed(0, "x", index), (4, 32, 32)).ravel() for index in range(20)])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert np.abs(np.corrcoef(noise) - np.eye(20)).max() < 0.1


def test_same_image_whatever_the_batch_mates(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    together = by_seed(list(generator.generate(CAPTIONS, 3, seed=0)))
    alone = by_seed(
        [*generator.generate(CAPTIONS[3:4], 3, seed=0), *generator.generate(CAPTIONS[:1], 3, seed=0)]
    )
    backwards = by_seed(list(generator.generate(CAPTIONS[::-1], 2, seed=0)))
    assert len(together) == 15
    assert alone == {seed: together[seed] for seed in alone}
    assert backwards == {seed: together[seed] for seed in backwards}


def test_another_seed_caption_or_index_is_another_image(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    first, second = (by_seed(list(generator.generate(CAPTIONS, 2, seed=seed))) for seed in (0, 1))
    assert len({*first.values(), *second.values()}) == 20


def test_images_are_those_of_a_plain_call_of_the_pipeline(
    build: Callable[..., DiffusionGenerator], tiny_pipeline: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [image_seed(7, CAPTIONS[0].caption_id, index) for index in range(4)]
    latents = torch.from_numpy(np.stack([draw_noise(seed, (4, 8, 8)) for seed in seeds]))
    expected = pipeline(
        [TEXTS[0]] * 4,
        latents=latents,
        num_inference_steps=2,
        guidance_scale=3.0,
        negative_prompt=["blurry"] * 4,
        output_type="np",
    ).images
    generator = build(guidance_scale=3.0, negative_prompt="blurry")
    (result,) = generator.generate(CAPTIONS[:1], 4, seed=7)
    difference = np.abs(np.stack(result.images).astype(float) - 255 * expected)
    assert difference.max() < 1.0
    assert expected.std() > 0.01


def test_no_second_pass_at_guidance_one(
    build: Callable[..., DiffusionGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = {}
    for guidance_scale in (1.0, 2.0):
        generator = build(guidance_scale=guidance_scale)
        sizes: list[int] = []
        forward = generator.pipeline.unet.forward
        monkeypatch.setattr(
            generator.pipeline.unet,
            "forward",
            lambda x, *a, f=forward, s=sizes, **k: s.append(len(x)) or f(x, *a, **k),
        )
        list(generator.generate(CAPTIONS, 3, seed=0))
        batches[guidance_scale] = sizes
    assert batches == {1.0: [4] * 8, 2.0: [8] * 8}


def test_each_caption_is_encoded_once(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    rows: list[int] = []

    def count_rows(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows.append(len(inputs[0] if inputs else named["input_ids"]))

    generator.pipeline.text_encoder.register_forward_pre_hook(count_rows, with_kwargs=True)
    list(generator.generate(CAPTIONS, 6, seed=0))
    prompts_and_negative_prompts = [NUM_CAPTIONS_PER_ENCODING] * 2
    assert rows == prompts_and_negative_prompts


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_named_scheduler_gives_the_same_image_again(
    build: Callable[..., DiffusionGenerator], scheduler: str
) -> None:
    generator = build(scheduler=scheduler, num_inference_steps=3)
    assert type(generator.pipeline.scheduler).__name__ == SCHEDULERS[scheduler][0]
    first = by_seed(list(generator.generate(CAPTIONS[:3], 2, seed=0)))
    again = by_seed(list(generator.generate(CAPTIONS[2:3], 2, seed=0)))
    assert again == {seed: first[seed] for seed in again}
    assert len(set(first.values())) == 6


def test_size_and_dtype_are_as_asked_for(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build(height=16, width=24, dtype="bfloat16")
    (result,) = generator.generate(CAPTIONS[:1], 2, seed=0)
    assert {image.shape for image in result.images} == {(16, 24, 3)}
    assert generator.pipeline.unet.dtype == torch.bfloat16


def test_an_image_that_is_not_finite_fails_its_caption_alone(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build()
    latents = generator._latents
    bad = image_seed(0, CAPTIONS[1].caption_id, 2)

    def poison(jobs: Any) -> torch.Tensor:
        noise = latents(jobs)
        for row, job in enumerate(jobs):
            if job.seed == bad:
                noise[row] = float("nan")
        return noise

    generator._latents = poison  # type: ignore[method-assign]
    failures = [result.failure for result in generator.generate(CAPTIONS, 3, seed=0)]
    assert failures == [None, "non_finite", None, None, None]


def test_an_image_that_the_safety_checker_flags_fails_its_caption(
    build: Callable[..., DiffusionGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build()
    monkeypatch.setattr(
        generator.pipeline,
        "run_safety_checker",
        lambda image, device, dtype: (image, [False, True, False, False]),
    )
    failures = [result.failure for result in generator.generate(CAPTIONS[:4], 2, seed=0)]
    assert failures == ["safety_checker", None, "safety_checker", None]


def test_truncated_captions_are_counted(build: Callable[..., DiffusionGenerator]) -> None:
    long = "a cube " * 50
    captions = [*CAPTIONS, Caption(caption_id(long), long)]
    assert build().count_truncated(captions) == 1


def test_an_sdxl_pipeline_goes_the_same_way(tiny_pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small: Any = DiffusionPipeline.from_pretrained(tiny_pipeline)
    text_config = CLIPTextConfig(**{**small.text_encoder.config.to_dict(), "projection_dim": 32})
    unet_config = {**small.unet.config, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet_config |= {"projection_class_embeddings_input_dim": 6 * 8 + 32, "cross_attention_dim": 64}
    pipeline: Any = StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=UNet2DConditionModel.from_config(unet_config),
        scheduler=small.scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(tmp_path)
    config = GeneratorConfig(model=str(tmp_path), num_inference_steps=2, device="cpu")
    generator = DiffusionGenerator(config, find_model(config), 4)
    together = by_seed(list(generator.generate(CAPTIONS, 3, seed=0)))
    alone = by_seed(list(generator.generate(CAPTIONS[4:], 3, seed=0)))
    assert alone == {seed: together[seed] for seed in alone}
    assert len(set(together.values())) == 15

    latents = torch.from_numpy(np.stack([draw_noise(seed, (4, 8, 8)) for seed in alone]))
    pipeline.set_progress_bar_config(disable=True)
    texts = [CAPTIONS[4].text] * 3
    plain = pipeline(
        texts,
        latents=latents,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=16,
        width=16,
        output_type="np",
    )
    ours = np.stack([np.frombuffer(pixels, np.uint8) for pixels in alone.values()]).astype(float)
    assert np.abs(ours - 255 * plain.images.reshape(3, -1)).max() < 1.0


def test_a_pipeline_of_an_unknown_family_is_prompted_with_text(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build()
    known = by_seed(list(generator.generate(CAPTIONS[:2], 2, seed=0)))
    generator._encodes_once = False
    first = by_seed(list(generator.generate(CAPTIONS[:2], 2, seed=0)))
    assert by_seed(list(generator.generate(CAPTIONS[:2], 2, seed=0))) == first
    assert first.keys() == known.keys()
    assert len(set(first.values())) == 4


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model folder .*/no/model/here does not exist"):
        find_model(GeneratorConfig(model=str(tmp_path / "no/model/here")))


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        find_model(GeneratorConfig(model=str(tmp_path)))


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_damaged_model_folder_is_named(tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    (folder / part).unlink()
    config = GeneratorConfig(model=str(folder), device="cpu")
    with pytest.raises(OSError, match=r"model folder .*model cannot be loaded: "):
        DiffusionGenerator(config, find_model(config), 4)


def test_model_identity_is_that_of_its_content(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "elsewhere"))
    (folder / "README.md").write_text("hello")
    assert digest_model(folder) == digest_model(tiny_pipeline)
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "beta_end": 0.5}))
    assert digest_model(folder) != digest_model(tiny_pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": "dpmsolver"}, r"got 'dpmsolver'; nearest: dpmsolver\+\+$"),
        ({"scheduler": "eular"}, "nearest: euler$"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1, got 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be >= 0 and finite, got -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be >= 0 and finite, got nan"),
        ({"height": 60}, "height must be a multiple of 8 pixels, got 60"),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_its_bound(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GeneratorConfig(), **change).check()


@pytest.mark.parametrize("device", ["cuda:77", "no-device"])
def test_a_device_that_is_not_there_is_named(build: Callable[..., DiffusionGenerator], device: str) -> None:
    with pytest.raises(ValueError, match=f"generator.device must be auto, cpu or .*, got {device} "):
        build(device=device)


def test_a_hub_model_out_of_reach_is_named() -> None:
    with pytest.raises(OSError, match=r"^hub model no-owner/no-name cannot be had .*: .+$") as caught:
        find_model(GeneratorConfig(model="no-owner/no-name"))
    assert len(str(caught.value).splitlines()) == 1
