"""The options that change how a pipeline computes: the picture stays what it was, up to rounding."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data_gen.captions import caption_id
from data_gen.diffusion.generator import DiffusionGenerator, ImageRequest
from data_gen.diffusion.models import GeneratorConfig, find_model
from data_gen.diffusion.pipelines import load_pipeline
from tests.data_gen.datasets import save_tiny_vae

TEXTS = ("a red cube", "two green spheres", "ein blauer Ring", "a dog")


@pytest.fixture
def build(tiny_pipeline: Path) -> Callable[..., DiffusionGenerator]:
    def make(**settings: Any) -> DiffusionGenerator:
        config = GeneratorConfig(str(tiny_pipeline), num_inference_steps=2, device="cpu", **settings)
        return DiffusionGenerator(config, find_model(config), 4)

    return make


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces but leaves the kernels as they are: the C++ compiler takes half a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *inputs, **options: compile_(*inputs, **options, backend="eager")
    )
    torch._dynamo.reset()


def images_of(generator: DiffusionGenerator, texts: tuple[str, ...] = TEXTS) -> npt.NDArray[np.uint8]:
    """[texts, 3, height, width, 3]."""
    requests = [ImageRequest(caption_id(text), text, (0, 1, 2)) for text in texts]
    return np.stack([np.stack(made.images) for made in generator.generate(requests, seed=0)])


def test_channels_last_changes_the_layout_and_no_pixel_by_more_than_rounding(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build(channels_last=True)
    for part in (generator.pipeline.unet, generator.pipeline.vae):
        weights = [module.weight for module in part.modules() if isinstance(module, torch.nn.Conv2d)]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    difference = images_of(generator).astype(int) - images_of(build())
    assert np.abs(difference).max() <= 1


def test_compilation_covers_the_repeated_blocks_and_changes_no_image(
    build: Callable[..., DiffusionGenerator], eager_compiler: None
) -> None:
    plain = images_of(build())
    generator = build(compile=True)
    compiled = {
        type(module).__name__
        for module in generator.pipeline.unet.modules()
        if module._compiled_call_impl is not None
    }
    assert compiled == {"BasicTransformerBlock"}
    np.testing.assert_array_equal(images_of(generator), plain)


def test_a_model_without_repeated_blocks_is_compiled_whole_and_still_mixes_scales(
    build: Callable[..., DiffusionGenerator], eager_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    plain = images_of(build(guidance_scale=[1.0, 4.0]))
    monkeypatch.setattr(UNet2DConditionModel, "_repeated_blocks", ["NoSuchBlock"])
    generator = build(guidance_scale=[1.0, 4.0], compile=True)
    assert "forward" in vars(generator.pipeline.unet)
    np.testing.assert_array_equal(images_of(generator), plain)


def test_a_halved_batch_compiles_the_same_kernels_as_one_that_began_small(
    build: Callable[..., DiffusionGenerator], eager_compiler: None
) -> None:
    from torch._dynamo.utils import counters

    generator = build(compile=True)
    images_of(generator)
    counters.clear()
    generator.num_images_per_batch = 2
    images_of(generator)
    assert counters["stats"]["unique_graphs"] > 0  # new ones for the new shape, not one for any shape
    assert not counters["frames"].get("recompile_limit", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_keeps_one_scale_a_channel_and_the_picture(
    build: Callable[..., DiffusionGenerator], dtype: str
) -> None:
    generator, plain = build(int8=True, dtype=dtype), build(dtype=dtype)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    quantised, own = (g.pipeline.unet.get_submodule(name).weight for g in (generator, plain))
    step = own.float().abs().amax(dim=1, keepdim=True) / 127  # of each output channel
    error = (quantised.dequantize().float() - own.float()).abs()
    assert (error <= 0.51 * step + 0.01 * own.float().abs()).all()
    assert error.max() > 0
    difference = np.abs(images_of(generator).astype(int) - images_of(plain))
    assert 0 < difference.mean() < 3


def test_an_int8_image_is_the_same_whatever_the_batch_mates(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build(int8=True)
    together = images_of(generator)
    np.testing.assert_array_equal(images_of(generator, TEXTS[2:3]), together[2:3])
    np.testing.assert_array_equal(images_of(generator, TEXTS[::-1]), together[::-1])


def test_options_add_up(build: Callable[..., DiffusionGenerator], eager_compiler: None) -> None:
    every = build(int8=True, channels_last=True, compile=True, dtype="bfloat16", guidance_scale=[2.0, 3.0])
    some = build(dtype="bfloat16", guidance_scale=[2.0, 3.0])
    assert 0 < np.abs(images_of(every).astype(int) - images_of(some)).mean() < 3
    compiled = [module for module in every.pipeline.unet.modules() if module._compiled_call_impl is not None]
    weights = [linear.weight for linear in compiled[0].modules() if isinstance(linear, torch.nn.Linear)]
    assert weights
    assert all(hasattr(weight, "dequantize") and weight.dtype == torch.bfloat16 for weight in weights)
    assert all(type(weight.data) is not torch.Tensor for weight in weights)


def test_a_tiny_vae_decodes_in_the_place_of_the_models_own(
    build: Callable[..., DiffusionGenerator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL, AutoencoderTiny

    save_tiny_vae(tmp_path)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", None)  # the own one is not even loaded
    generator = build(tiny_vae=str(tmp_path))
    monkeypatch.undo()
    made = images_of(generator)
    latents: list[torch.Tensor] = []
    decode = AutoencoderKL.decode

    def record(self: Any, scaled: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        latents.append(scaled * self.config.scaling_factor)
        return decode(self, scaled, *inputs, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", record)
    plain = images_of(build())
    vae: Any = AutoencoderTiny.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected = (vae.decode(torch.cat(latents)).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    assert np.abs(made.reshape(12, 16, 16, 3) - expected.numpy()).max() < 1.0
    assert np.abs(made.astype(int) - plain).mean() > 3


def test_a_scheduler_for_a_model_of_another_process_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.save_pretrained(tmp_path)
    config = GeneratorConfig(str(tmp_path), scheduler="euler", device="cpu")
    with pytest.raises(ValueError, match=r"scheduler must be None for model .*, got euler: .*FlowMatchEuler"):
        load_pipeline(config, find_model(config))


@pytest.mark.parametrize("option", ["int8", "channels_last", "compile"])
def test_an_option_without_a_denoiser_to_apply_it_to_is_refused(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    bare = SimpleNamespace(set_progress_bar_config=lambda disable: None)
    monkeypatch.setattr("data_gen.diffusion.pipelines._load", lambda *_: bare)
    config = GeneratorConfig(str(tiny_pipeline), device="cpu", **{option: True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"generator.{option} must be false for a SimpleNamespace"):
        load_pipeline(config, find_model(config))
