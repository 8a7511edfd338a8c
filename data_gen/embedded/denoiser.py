"""The denoiser of the embedded generator: a small UNet2DConditionModel on 16 x 16 latents, v-prediction.

Reference: v-prediction, Salimans and Ho 2022 (arXiv 2202.00512); the weight min(SNR, 5) / (SNR + 1), Hang et
al. 2023 (arXiv 2303.09556); classifier-free guidance, Ho and Salimans 2022 (arXiv 2207.12598).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from data_gen.embedded.autoencoder import LATENT_SHAPE
from data_gen.embedded.examples import SceneBank
from data_gen.embedded.text import WIDTH, tokenize
from data_gen.embedded.training import Draws, StageConfig, digest_weights, indices_of, train_stage

_DROPPED_CAPTIONS_FRACTION = 0.1
_LARGEST_SNR = 5.0


@dataclass(frozen=True)
class LatentBank:
    """Scenes as the denoiser sees them.

    Args:
        means: Standardised latents, float16 [N, 8, 16, 16].
        scenes: Gives the captions.
    """

    means: NDArray[np.float16]
    scenes: SceneBank


def build_denoiser() -> UNet2DConditionModel:
    """Build the untrained network; it attends to the words at 8 x 8."""
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Build the sampler, whose noise schedule the training shares.

    A cosine schedule: 16 x 16 latents are lost to noise sooner than large ones. The solver starts at
    log(alpha / sigma) = -5.1, before which nothing is left to see.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        lambda_min_clipped=-5.1,
        steps_offset=1,  # as the pipeline asks
    )


def train_denoiser(
    bank: LatentBank,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    config: StageConfig,
    restart: StageConfig,
    folder: Path,
    seed: int,
    compiled: bool,
    upstream: str,
) -> UNet2DConditionModel:
    """Train on latents and captions in ever new words; one caption in ten is empty, for guidance.

    When the rate has fallen to zero it rises and falls once more, from the moving average of the weights.
    """
    device = text_encoder.device
    torch.manual_seed(seed)
    denoiser = build_denoiser().to(device, memory_format=torch.channels_last)
    denoiser.set_attn_processor(AttnProcessor())  # plain products, which the compiler fuses by itself
    predict = torch.compile(denoiser, disable=not compiled)
    scheduler = build_scheduler()
    num_timesteps = scheduler.config.num_train_timesteps
    snr = compute_snr(scheduler, torch.arange(num_timesteps)).float()
    weights = (snr.clamp(max=_LARGEST_SNR) / (snr + 1)).to(device)
    alphas, sigmas = (
        scheduler.alphas_cumprod.sqrt().to(device),
        (1 - scheduler.alphas_cumprod).sqrt().to(device),
    )
    num_examples = config.num_examples_per_step
    num_steps_per_epoch = len(bank.scenes) // num_examples

    def loss_of(draws: Draws, num_steps_before: int) -> Tensor:
        step = num_steps_before + draws.step
        indices = indices_of(step, len(bank.scenes), num_examples, seed)
        latents = torch.from_numpy(bank.means[indices]).to(device).float()
        latents = latents.contiguous(memory_format=torch.channels_last)
        states = _encode_captions(indices, step // num_steps_per_epoch, draws)
        noise = torch.randn(latents.shape, generator=draws.torch).to(device)
        timesteps = _spread_timesteps(len(indices), num_timesteps, draws.torch).to(device)
        alpha, sigma = alphas[timesteps].view(-1, 1, 1, 1), sigmas[timesteps].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predict(alpha * latents + sigma * noise, timesteps, states, return_dict=False)[0]
        error = (predicted.float() - velocity(latents, noise, alpha, sigma)).square().mean(dim=(1, 2, 3))
        return (weights[timesteps] * error).mean()

    @torch.no_grad()
    def _encode_captions(indices: NDArray[np.int64], epoch: int, draws: Draws) -> Tensor:
        dropped = draws.numpy.random(len(indices)) < _DROPPED_CAPTIONS_FRACTION
        captions = [
            "" if drop else bank.scenes.describe(int(index), epoch).text
            for index, drop in zip(indices, dropped, strict=True)
        ]
        with torch.autocast(device.type, torch.bfloat16):
            return text_encoder(tokenize(tokenizer, captions, device)).last_hidden_state

    train_stage("denoiser", denoiser, partial(loss_of, num_steps_before=0), config, folder, seed, upstream)
    train_stage(
        *("denoiser_restart", denoiser, partial(loss_of, num_steps_before=config.num_steps), restart),
        *(folder, seed, upstream + digest_weights(denoiser)),
    )
    return denoiser


def velocity(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network predicts: v = alpha · noise − sigma · latents."""
    return alpha * noise - sigma * latents


def _spread_timesteps(num: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw one timestep from each of `num` equal stretches of the schedule, in random order."""
    places = (torch.arange(num) + torch.rand(num, generator=generator)) / num
    places = places[torch.randperm(num, generator=generator)]
    return (places * num_timesteps).long().clamp(max=num_timesteps - 1)
