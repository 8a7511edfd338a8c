"""How far the faster options move the images: PSNR and SSIM against full precision, on a job's own captions.

    PSNR = 10 log10(255² / MSE) dB over all values of an image
    SSIM as in the reference, Gaussian window of 11 pixels with σ = 1.5, mean over the image

Full precision is float32 with the model's own VAE, nothing quantised; noise and guidance are the same.

Reference: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (IEEE
Transactions on Image Processing 13, 2004).
"""

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_gen.generator import DiffusionGenerator, GeneratedCaption, ImageRequest
from data_gen.models import GeneratorConfig, ModelFiles, find_model


@dataclass(frozen=True)
class FidelityReport:
    """Images of the options against the same images in full precision.

    An image that is equal bit for bit has an SSIM of 1 and no finite PSNR: it counts in `num_equal`, and not
    in the PSNRs.

    Args:
        options: What is compared with full precision, by the config's names.
        num_images: Images compared.
        num_equal: Of those, equal bit for bit.
        num_failed: Images left out, as one of the two sides failed (not finite, or the safety checker).
        psnr_mean: Mean PSNR in dB of the images that differ; None where none does.
        psnr_min: The lowest.
        ssim_mean: Mean SSIM of all images compared, at most 1; None where there are none.
        ssim_min: The lowest.
    """

    options: dict[str, Any]
    num_images: int
    num_equal: int
    num_failed: int
    psnr_mean: float | None
    psnr_min: float | None
    ssim_mean: float | None
    ssim_min: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report for people, a fact a line."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items()) or "no option"
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        lines = [f"{options} against full precision on {self.num_images} images{failed}:"]
        if self.num_equal:
            lines.append(f"{self.num_equal} images are equal bit for bit")
        if self.psnr_mean is not None:
            lines.append(f"PSNR {self.psnr_mean:.1f} dB in the mean, {self.psnr_min:.1f} dB at worst")
        if self.ssim_mean is not None:
            lines.append(f"SSIM {self.ssim_mean:.4f} in the mean, {self.ssim_min:.4f} at worst")
        return lines


def compare_with_full_precision(
    config: GeneratorConfig,
    model: ModelFiles,
    requests: Sequence[ImageRequest],
    seed: int,
    num_images_per_batch: int,
) -> FidelityReport:
    """Makes the requests' images twice, one model in memory at a time.

    Args:
        config: The options, which may as well be none.
        model: Their model, from `find_model`.
        requests: The images, a few dozen at best.
        seed: Seed of the dataset.
        num_images_per_batch: Batch of the denoising network.

    Raises:
        OSError: The model cannot be loaded.
        ValueError: An option does not fit the model.
    """
    full = dataclasses.replace(
        config, dtype="float32", tiny_vae=None, int8=False, compile=False, channels_last=False
    )
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(full, field.name)
    }
    own_model = find_model(full) if model.tiny_vae_folder is not None else model
    expected = _make(full, own_model, requests, seed, num_images_per_batch)
    actual = _make(config, model, requests, seed, num_images_per_batch)
    pairs = [
        (image, reference)
        for made, made_in_full in zip(actual, expected, strict=True)
        if made.failure is None and made_in_full.failure is None
        for image, reference in zip(made.images, made_in_full.images, strict=True)
    ]
    num_wanted = sum(len(request.image_indices) for request in requests)
    return summarise(changed, pairs, num_failed=num_wanted - len(pairs))


def summarise(
    options: dict[str, Any],
    pairs: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]],
    num_failed: int,
) -> FidelityReport:
    """The report over pairs of an image and its reference.

    Shapes:
        pairs: each [height, width, 3], two of one size.
    """
    scores = [measure_fidelity(image, reference) for image, reference in pairs]
    psnr = [psnr for psnr, _ in scores if psnr is not None]
    ssim = [ssim for _, ssim in scores]
    return FidelityReport(
        options=options,
        num_images=len(pairs),
        num_equal=len(pairs) - len(psnr),
        num_failed=num_failed,
        psnr_mean=float(np.mean(psnr)) if psnr else None,
        psnr_min=min(psnr, default=None),
        ssim_mean=float(np.mean(ssim)) if ssim else None,
        ssim_min=min(ssim, default=None),
    )


def measure_fidelity(
    image: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]
) -> tuple[float | None, float]:
    """PSNR in dB (None for equal images) and SSIM.

    Shapes:
        image, reference: [height, width, 3], both sides of 8 pixels at least.
    """
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    if np.array_equal(image, reference):
        return None, 1.0
    actual, expected = (
        torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].double()
        for picture in (image, reference)
    )
    psnr = peak_signal_noise_ratio(actual, expected, data_range=255.0)
    ssim: Any = structural_similarity_index_measure(actual, expected, data_range=255.0)
    return float(psnr), float(ssim)


def _make(
    config: GeneratorConfig,
    model: ModelFiles,
    requests: Sequence[ImageRequest],
    seed: int,
    num_images_per_batch: int,
) -> list[GeneratedCaption]:
    generator = DiffusionGenerator(config, model, num_images_per_batch)
    made = list(generator.generate(requests, seed))
    del generator
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return made
