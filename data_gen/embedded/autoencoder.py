"""The autoencoder of the embedded generator: 64 x 64 pixels to 16 x 16 latents of eight channels, and back.

Eight channels: four leave one linear axis for colour beside a patch's brightness and its slopes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from data_gen.embedded.examples import IMAGE_SIZE, SceneBank
from data_gen.embedded.training import Draws, StageConfig, indices_of, train_stage

LATENT_SHAPE = (8, IMAGE_SIZE // 4, IMAGE_SIZE // 4)
_KL_WEIGHT = 1e-6
_LATENT_NOISE = 0.05
_NUM_IMAGES_PER_PASS = 100
_NUM_STANDARDISING = 2000
# (share of the steps up to which it holds, pixels): many cheap steps first, while colours are learnt.
_CROP_SIZES = ((0.8, 16), (0.92, 32), (1.0, IMAGE_SIZE))


def build_autoencoder() -> AutoencoderKL:
    """Build the untrained network, 1.4 million parameters."""
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=1,
        mid_block_add_attention=False,
    )


def train_autoencoder(
    bank: SceneBank, config: StageConfig, folder: Path, seed: int, device: torch.device
) -> AutoencoderKL:
    """Train on absolute and squared error, of 4 x 4 means too, with a slight pull to Gaussian latents."""
    torch.manual_seed(seed)
    autoencoder = build_autoencoder().to(device, memory_format=torch.channels_last)

    def loss_of(draws: Draws) -> Tensor:
        indices = indices_of(draws.step, len(bank), config.num_examples_per_step, seed)
        images = to_signed(_crop(bank.images[indices], draws, config.num_steps), device)
        size = images.shape[-1] // 4
        noise = torch.randn(len(images), LATENT_SHAPE[0], size, size, generator=draws.torch).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            moments = autoencoder.quant_conv(autoencoder.encoder(images))
            mean, log_variance = moments.float().clamp(-30, 20).chunk(2, dim=1)
            decoded = autoencoder.decode(mean + noise * (0.5 * log_variance).exp()).sample.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
        return _error(decoded, images) + _KL_WEIGHT * divergence

    train_stage("autoencoder", autoencoder, loss_of, config, folder, seed)
    return autoencoder


def refine_decoder(
    autoencoder: AutoencoderKL, bank: SceneBank, config: StageConfig, folder: Path, seed: int, upstream: str
) -> None:
    """Train the decoder on, on whole pictures and slightly noisy latents; the latents do not change."""
    device = next(autoencoder.parameters()).device
    decoder = nn.Sequential(autoencoder.post_quant_conv, autoencoder.decoder)

    def loss_of(draws: Draws) -> Tensor:
        indices = indices_of(draws.step, len(bank), config.num_examples_per_step, seed)
        images = to_signed(bank.images[indices], device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = autoencoder.encode(images).latent_dist.mode()
                noise = torch.randn(latents.shape, generator=draws.torch).to(device)
            decoded = decoder(latents + _LATENT_NOISE * noise).float()
        return _error(decoded, images)

    train_stage("decoder", decoder, loss_of, config, folder, seed, upstream)


def _error(decoded: Tensor, images: Tensor) -> Tensor:
    difference = _opponent_colours(decoded - images)
    error = (_weights(images) * (difference.abs() + difference.square())).mean()
    return error + 2 * F.avg_pool2d(difference, 4).abs().mean()


def _crop(images: NDArray[np.uint8], draws: Draws, num_steps: int) -> NDArray[np.uint8]:
    """Cut the images to the crop size of this step, at a place drawn anew for each step."""
    crop = next(size for end, size in _CROP_SIZES if draws.step < end * num_steps)
    top, left = draws.numpy.integers(0, IMAGE_SIZE - crop + 1, size=2)
    return images[:, top : top + crop, left : left + crop]


def _opponent_colours(difference: Tensor) -> Tensor:
    """Turn RGB into brightness, red against green, and blue against yellow; colour counts double.

    In RGB, red against green, which only small objects show, is learnt last: pink becomes cream, purple grey.
    """
    red, green, blue = difference.unbind(dim=1)
    return torch.stack([(red + green + blue) / 3, 2 * (red - green), 2 * blue - red - green], dim=1)


def _weights(images: Tensor) -> Tensor:
    """Weight of each pixel, [B, 1, H, W]: more where it is far from the picture's mean, as objects are."""
    return 1 + 4 * (images - images.mean(dim=(2, 3), keepdim=True)).abs().mean(dim=1, keepdim=True)


def to_signed(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Turn uint8 [B, H, W, 3] into float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def standardise_latents(autoencoder: AutoencoderKL, bank: SceneBank) -> None:
    """Give each latent channel mean 0 and variance 1, by the two 1 x 1 convolutions beside the latents.

    The reconstruction stays the same. Stable Diffusion's pipelines know a scaling factor (now 1), no shift.
    """
    device = next(autoencoder.parameters()).device
    means = [
        autoencoder.encode(to_signed(np.array(bank.images[start : start + _NUM_IMAGES_PER_PASS]), device))
        for start in range(0, min(_NUM_STANDARDISING, len(bank)), _NUM_IMAGES_PER_PASS)
    ]
    latents = torch.cat([output.latent_dist.mean for output in means])
    shift, scale = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    inward, outward = autoencoder.quant_conv, autoencoder.post_quant_conv
    outward.bias += (outward.weight.flatten(1) * shift).sum(dim=1)
    outward.weight *= scale.view(1, -1, 1, 1)
    num_channels = len(scale)
    inward.weight[:num_channels] /= scale.view(-1, 1, 1, 1)
    inward.bias[:num_channels] = (inward.bias[:num_channels] - shift) / scale
    inward.bias[num_channels:] -= 2 * scale.log()
    autoencoder.register_to_config(scaling_factor=1.0)


@torch.inference_mode()
def encode_bank(
    autoencoder: AutoencoderKL, bank: SceneBank, folder: Path, upstream: str
) -> NDArray[np.float16]:
    """Write every scene's latent mean to a file named after `upstream`, or read it when it is complete.

    Shapes:
        returns: float16 [N, 8, 16, 16], memory-mapped.
    """
    path = folder / f"latents-{upstream[:8]}.npy"
    if not path.exists():
        device = next(autoencoder.parameters()).device
        means = np.empty((len(bank), *LATENT_SHAPE), np.float16)
        for start in tqdm(range(0, len(bank), _NUM_IMAGES_PER_PASS), "encode", mininterval=10):
            batch = to_signed(np.array(bank.images[start : start + _NUM_IMAGES_PER_PASS]), device)
            with torch.autocast(device.type, torch.bfloat16):
                mean = autoencoder.encode(batch).latent_dist.mean
            means[start : start + len(batch)] = mean.float().cpu().numpy()
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, means)
        temporary.rename(path)
    return np.load(path, mmap_mode="r")
