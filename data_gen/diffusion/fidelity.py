"""How far the faster options move the images: PSNR and SSIM against full precision, on a job's own captions.

    PSNR = 10 log10(255² / MSE) dB over all values of an image
    SSIM as in the reference, Gaussian window of 11 pixels with σ = 1.5, mean over the image

Full precision is float32 with the model's own VAE, nothing quantised; noise and guidance are the same.

Reference: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (IEEE
Transactions on Image Processing 13, 2004).
"""

import dataclasses
import gc
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_gen.diffusion.models import GeneratorConfig, ModelFiles
from data_gen.job.plan import Plan
from data_gen.job.shard_job import GivenBackError
from data_gen.shards import DatasetManifest
from data_gen.storage import Store

if TYPE_CHECKING:
    from data_gen.diffusion.generator import GeneratedCaption, ImageRequest

FIDELITY_NAME = "fidelity.json"
"""A dataset's report: `settings_hash` of its plan, and a `FidelityReport`, or `unmeasured`, the reason."""
MEASURED_OPTIONS = ("tiny_vae", "int8")
"""Of the generator: a plan that has one of these gets a report. The other options change rounding alone."""
_NUM_CAPTIONS_COMPARED = 16
_MAX_REASON_CHARACTERS = 300


class UnmeasuredError(Exception):
    """The images of full precision cannot be made on this machine; the message says why."""


def read_fidelity(store: Store, manifest: DatasetManifest) -> dict[str, Any] | None:
    """The report of this plan; None where there is none, or one of another plan."""
    try:
        values = json.loads(store.read(FIDELITY_NAME))
    except (FileNotFoundError, ValueError):
        return None
    is_of_plan = isinstance(values, dict) and values.get("settings_hash") == manifest.settings_hash
    return values if is_of_plan else None


def write_fidelity(plan: Plan, values: Mapping[str, Any]) -> None:
    """Writes the report of a plan, over that of an older one."""
    content = json.dumps({"settings_hash": plan.manifest.settings_hash, **values}, indent=2) + "\n"
    plan.store.replace(FIDELITY_NAME, content.encode())


def is_fidelity_due(plan: Plan) -> bool:
    """Whether the plan has an option of `MEASURED_OPTIONS`, and no report."""
    settings = plan.manifest.settings["generator"]
    return any(map(settings.get, MEASURED_OPTIONS)) and read_fidelity(plan.store, plan.manifest) is None


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


def measure_plan(
    plan: Plan, config: GeneratorConfig, model: ModelFiles, stop: threading.Event
) -> FidelityReport:
    """Compares the first image of each of the first captions of the first shard.

    Args:
        plan: The dataset's plan.
        config: Its sampling on this machine.
        model: Its model on this machine.
        stop: Once it is set, the work is left.

    Raises:
        GivenBackError: `stop` was set.
        UnmeasuredError: As for `compare_with_full_precision`, which says the others as well.
    """
    from data_gen.diffusion.generator import ImageRequest

    settings = plan.manifest.settings
    captions = plan.captions(0)[:_NUM_CAPTIONS_COMPARED]
    requests = [ImageRequest(caption.key, caption.text, (0,)) for caption in captions]
    report = compare_with_full_precision(
        config, model, requests, settings["seed"], settings["num_images_per_batch"], stop
    )
    return dataclasses.replace(
        report, options={name: settings["generator"][name] for name in report.options}
    )  # a tiny VAE by its name, not by where it lies here


def compare_with_full_precision(
    config: GeneratorConfig,
    model: ModelFiles,
    requests: "Sequence[ImageRequest]",
    seed: int,
    num_images_per_batch: int,
    stop: threading.Event | None = None,
) -> FidelityReport:
    """Makes the requests' images twice, one model in memory at a time, none at the end.

    Args:
        config: The options, which may as well be none.
        model: Their model, from `find_model`.
        requests: The images, a few dozen at best.
        seed: Seed of the dataset.
        num_images_per_batch: Batch of the denoising network.
        stop: Once it is set, the work is left after the batch.

    Raises:
        GivenBackError: `stop` was set.
        OSError: The model cannot be loaded.
        UnmeasuredError: In full precision, it cannot be loaded or run, most often for want of memory.
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
    stop = stop or threading.Event()
    own_model = dataclasses.replace(model, tiny_vae_folder=None)
    expected = _make_in_full(full, own_model, requests, seed, num_images_per_batch, stop)
    actual = _make(config, model, requests, seed, num_images_per_batch, stop)
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
    import torch
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


def _make_in_full(
    config: GeneratorConfig,
    model: ModelFiles,
    requests: "Sequence[ImageRequest]",
    seed: int,
    num_images_per_batch: int,
    stop: threading.Event,
) -> "list[GeneratedCaption]":
    """The reference; what keeps it from being made is no fault of the job's."""
    try:
        return _make(config, model, requests, seed, num_images_per_batch, stop)
    except (RuntimeError, MemoryError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_REASON_CHARACTERS]
    _free_memory()  # outside of `except`, whose error holds on to the model
    raise UnmeasuredError(reason)


def _make(
    config: GeneratorConfig,
    model: ModelFiles,
    requests: "Sequence[ImageRequest]",
    seed: int,
    num_images_per_batch: int,
    stop: threading.Event,
) -> "list[GeneratedCaption]":
    from data_gen.diffusion.generator import DiffusionGenerator

    generator = DiffusionGenerator(config, model, num_images_per_batch)
    made = []
    for caption in generator.generate(requests, seed):
        if stop.is_set():
            raise GivenBackError
        made.append(caption)
    del generator
    _free_memory()
    return made


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
