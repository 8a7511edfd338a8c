"""Train the embedded generator from nothing: `python -m data_gen.embedded.train`.

Scenes are rendered; the autoencoder, the text encoder, the denoiser and, once more, the decoder are trained,
each as a stage that resumes; the whole is written as a `StableDiffusionPipeline` folder. It reads no data.
"""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from jsonargparse import auto_cli
from transformers import CLIPTextModel, CLIPTokenizer

from data_gen.embedded.autoencoder import encode_bank, refine_decoder, standardise_latents, train_autoencoder
from data_gen.embedded.denoiser import LatentBank, build_scheduler, train_denoiser
from data_gen.embedded.examples import build_bank
from data_gen.embedded.text import build_tokenizer, measure_reading, train_text_encoder
from data_gen.embedded.training import StageConfig, digest_weights, replace_file

AUTOENCODER = StageConfig(6000, 16, 5e-4, num_warmup_steps=100, decay_fraction=0.7)
TEXT_ENCODER = StageConfig(1500, 64, 1e-3, num_warmup_steps=100, decay_fraction=0.5)
DECODER = StageConfig(6000, 8, 5e-4, num_warmup_steps=100, decay_fraction=0.7)
DENOISER = StageConfig(12_000, 64, 1e-3, num_warmup_steps=300, decay_fraction=0.3, ema_decay=0.9995)
DENOISER_RESTART = StageConfig(6000, 64, 1e-3, num_warmup_steps=200, decay_fraction=0.5, ema_decay=0.9995)


def train(
    output: Path = Path("runs/embedded_training"),
    num_scenes: int = 80_000,
    autoencoder: StageConfig = AUTOENCODER,
    text_encoder: StageConfig = TEXT_ENCODER,
    denoiser: StageConfig = DENOISER,
    denoiser_restart: StageConfig = DENOISER_RESTART,
    decoder: StageConfig = DECODER,
    seed: int = 0,
    device: str = "auto",
    num_threads: int | None = None,
    compiled: bool = True,
) -> None:
    """Train the embedded generator; started again after a kill, it goes on where it was.

    Args:
        output: Folder for scenes, latents, checkpoints, logs and, at the end, `pipeline/`.
        num_scenes: Rendered scenes, a multiple of 1,000; 16 kB of disk each.
        autoencoder: Training of the autoencoder.
        text_encoder: Training of the text encoder.
        denoiser: Training of the UNet.
        denoiser_restart: Further training of the UNet, with as many examples in one update.
        decoder: Further training of the autoencoder's decoder alone.
        seed: Of everything drawn.
        device: Torch device; "auto" is the accelerator where there is one.
        num_threads: CPU threads of torch and processes that render; null is one a core.
        compiled: Compile the UNet; needs a C++ compiler and a minute or two.
    """
    started = time.time()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    scenes = build_bank(output, num_scenes, seed, num_threads or os.cpu_count() or 1)
    stages = {
        "autoencoder": autoencoder,
        "text_encoder": text_encoder,
        "denoiser": denoiser,
        "denoiser_restart": denoiser_restart,
        "decoder": decoder,
    }
    record: dict[str, Any] = {name: asdict(config) for name, config in stages.items()}
    record |= {"num_scenes": num_scenes, "seed": seed, "device": chosen.type, "torch": torch.__version__}
    vae = train_autoencoder(scenes, autoencoder, output, seed, chosen)
    vae_digest = digest_weights(vae)
    standardise_latents(vae, scenes)
    means = encode_bank(vae, scenes, output, vae_digest)
    tokenizer = build_tokenizer(seed)
    reader = train_text_encoder(tokenizer, text_encoder, output, seed, chosen)
    share = measure_reading(reader, tokenizer, 2000, seed)
    print(f"the text encoder answers every question about {share:.1%} of freshly drawn captions")
    bank = LatentBank(means, scenes)
    encoder = reader.text_encoder.requires_grad_(False)
    upstream = vae_digest + digest_weights(encoder)
    unet = train_denoiser(
        bank, encoder, tokenizer, denoiser, denoiser_restart, output, seed, compiled, upstream
    )
    refine_decoder(vae, scenes, decoder, output, seed, vae_digest)
    replace_file(output / "training.json", json.dumps(record, indent=2) + "\n")
    write_pipeline(output / "pipeline", vae, encoder, tokenizer, unet)
    print(f"{output / 'pipeline'} is complete, {(time.time() - started) / 60:.0f} minutes after this start")


def write_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Write a diffusers folder with weights in half precision, as safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to("cpu", torch.float16).save_pretrained(temporary, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


if __name__ == "__main__":
    auto_cli(train, as_positional=False)
