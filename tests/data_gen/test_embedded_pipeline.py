"""The pipeline that ships with the code: its files, and that it draws what captions say."""

import json
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from data_gen.captions import caption_id
from data_gen.diffusion.generator import DiffusionGenerator, ImageRequest, load_pipeline
from data_gen.diffusion.models import (
    BOUNDED_NOISE_SCHEDULERS,
    EMBEDDED_FOLDER,
    SCHEDULERS,
    GeneratorConfig,
    find_model,
)
from data_gen.embedded import train

MAX_BYTES = 16_000_000
NUM_STEPS = 12
FITTING_SCHEDULERS = sorted(SCHEDULERS.keys() - set(BOUNDED_NOISE_SCHEDULERS))


def draw(
    *texts: str, num_images: int = 2, scheduler: str | None = None, guidance_scale: float = 2.0
) -> NDArray[np.float64]:
    """Pictures of some captions: [texts, num_images, 64, 64, 3], 0 to 255."""
    config = GeneratorConfig(
        num_inference_steps=NUM_STEPS, scheduler=scheduler, guidance_scale=guidance_scale, device="cpu"
    )
    generator = DiffusionGenerator(config, find_model(config), num_images_per_batch=4)
    requests = [ImageRequest(caption_id(text), text, tuple(range(num_images))) for text in texts]
    made = list(generator.generate(requests, seed=0))
    assert [result.failure for result in made] == [None] * len(texts)
    return np.array([result.images for result in made], dtype=np.float64)


@cache
def draw_by_default() -> NDArray[np.float64]:
    return draw("a large solid red circle on snow", "a large solid blue circle on snow", num_images=4)


def redness(images: NDArray[np.float64]) -> float:
    """Red less blue, mean over all pixels, in levels of 255."""
    return float((images[..., 0] - images[..., 2]).mean())


def test_files_are_small_and_hold_no_code_and_no_pickle() -> None:
    files = [path for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()]
    assert {"model_index.json", "model.safetensors", "diffusion_pytorch_model.safetensors"} <= {
        path.name for path in files
    }
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_record_beside_it_is_of_the_settings_in_the_script() -> None:
    record = json.loads((EMBEDDED_FOLDER.parent / "training.json").read_text())
    for name in ("autoencoder", "text_encoder", "denoiser", "denoiser_restart", "decoder"):
        assert record[name] == vars(getattr(train, name.upper())), name


def test_size_is_its_own() -> None:
    assert draw_by_default().shape == (2, 4, 64, 64, 3)


def test_sizes_in_the_readme_are_those_of_the_files() -> None:
    config = GeneratorConfig(device="cpu")
    pipeline = load_pipeline(config, find_model(config))
    readme = (EMBEDDED_FOLDER.parent / "README.md").read_text()
    assert f"{len(pipeline.tokenizer)} tokens, context {pipeline.tokenizer.model_max_length}" in readme
    for part in ("text_encoder", "unet", "vae"):
        num_parameters = sum(parameter.numel() for parameter in getattr(pipeline, part).parameters())
        assert f"| {num_parameters / 1e6:.1f} M" in readme, part


def test_red_is_drawn_red_and_blue_blue() -> None:
    red, blue = draw_by_default()
    assert redness(red) > redness(blue) + 20


def test_images_of_a_caption_differ() -> None:
    red = draw_by_default()[0]
    differences = [np.abs(red[i] - red[j]).mean() for i in range(4) for j in range(i)]
    assert min(differences) > 5


@pytest.mark.parametrize("scheduler", FITTING_SCHEDULERS)
def test_no_scheduler_clips_latents(scheduler: str) -> None:
    config = GeneratorConfig(scheduler=scheduler)
    pipeline = load_pipeline(config, find_model(config))
    assert not pipeline.scheduler.config.get("clip_sample", False)


@pytest.mark.parametrize("scheduler", FITTING_SCHEDULERS)
def test_every_scheduler_draws_the_colour(scheduler: str) -> None:
    red, blue = draw(
        "a large solid red circle on snow", "a large solid blue circle on snow", scheduler=scheduler
    )
    assert redness(red) > redness(blue) + 20


@pytest.mark.parametrize("scheduler", BOUNDED_NOISE_SCHEDULERS)
def test_scheduler_that_cannot_sample_a_cosine_schedule_is_refused(scheduler: str) -> None:
    config = GeneratorConfig(scheduler=scheduler)
    with pytest.raises(ValueError, match=r"at most 1000 times the signal, and the model's ends at 20291;"):
        load_pipeline(config, find_model(config))


def test_guidance_changes_the_image() -> None:
    (guided,), (plain,) = (draw("a green star", guidance_scale=scale) for scale in (2.0, 1.0))
    assert np.abs(guided - plain).mean() > 1


def test_real_captions_in_any_script_are_drawn() -> None:
    images = draw("猫と犬 🦄", "Ωμέγα naïve café", "a man riding a wave on top of a surfboard", num_images=1)
    deviations = images.std(axis=(2, 3)).mean(axis=-1)  # over places, within a colour channel
    assert deviations.min() > 5
