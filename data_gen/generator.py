"""Images from captions with any diffusers text-to-image pipeline, each a pure function of seed and caption.

One fixed batch shape (the last batch is padded), noise keyed by content (`data_gen.noise`): an image does not
depend on the others of its batch. A caption is encoded once and its embedding serves all of its images.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from data_gen.captions import Caption
from data_gen.models import (
    BOUNDED_NOISE_SCHEDULERS,
    MAX_NOISE_RATIO,
    SCHEDULERS,
    GeneratorConfig,
    ModelFiles,
    forbid_remote_code,
)
from data_gen.noise import draw_noise, image_seed

NUM_CAPTIONS_PER_ENCODING = 16

_Embeddings = dict[str, torch.Tensor]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class GeneratedCaption:
    """All images of one caption, or the reason why it has none.

    Args:
        caption: The caption.
        images: uint8 arrays, one an image.
        image_seeds: The noise key of each image.
        failure: None, or "safety_checker" or "non_finite"; then none of the images is to be used.

    Shapes:
        images: each [height, width, 3].
    """

    caption: Caption
    images: tuple[npt.NDArray[np.uint8], ...]
    image_seeds: tuple[str, ...]
    failure: str | None


@dataclass(frozen=True)
class _Job:
    """One image to make."""

    caption: Caption
    embeddings: _Embeddings
    seed: str


class DiffusionGenerator:
    """A loaded pipeline with its sampling settings.

    Args:
        config: The model's settings.
        model: Where its weights are, from `find_model`.
        num_images_per_batch: Batch of the denoising network, > 0; every batch has this size.

    Raises:
        OSError: The folder cannot be loaded (damaged, or without safetensors).
        ValueError: A setting is out of its range, there is no such device, or the pipeline takes no prompt.
    """

    def __init__(self, config: GeneratorConfig, model: ModelFiles, num_images_per_batch: int) -> None:
        config.check()
        if num_images_per_batch < 1:
            raise ValueError(f"num_images_per_batch must be >= 1, got {num_images_per_batch}")
        self.config = config
        self.num_images_per_batch = num_images_per_batch
        self.device = _find_device(config.device)
        self.pipeline = load_pipeline(config, model).to(self.device)
        self._parameters = set(inspect.signature(self.pipeline.__call__).parameters)
        if "prompt" not in self._parameters:
            name = type(self.pipeline).__name__
            raise ValueError(
                f"model {model.name} is a {name}, which takes no prompt: no text-to-image pipeline"
            )
        self._encodes_once = _has_known_embeddings(self.pipeline, self._parameters)
        self.height, self.width = _image_size(self.pipeline, config)

    def fingerprint(self) -> dict[str, Any]:
        """Machine settings within which equal seeds give equal images, bit for bit."""
        is_cpu = self.device.type == "cpu"
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": _name_device(self.device),
            "num_threads": torch.get_num_threads() if is_cpu else None,
            "cpu_capability": torch.backends.cpu.get_cpu_capability() if is_cpu else None,
            "dtype": self.config.dtype,
            "num_images_per_batch": self.num_images_per_batch,
            "num_captions_per_encoding": NUM_CAPTIONS_PER_ENCODING,
        }

    def count_truncated(self, captions: Sequence[Caption]) -> int:
        """Captions of which the (first) tokenizer leaves out an end."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if tokenizer is None or not captions:
            return 0
        tokens = tokenizer([caption.text for caption in captions], verbose=False).input_ids
        return sum(len(row) > tokenizer.model_max_length for row in tokens)

    def generate(
        self, captions: Sequence[Caption], num_images_per_caption: int, seed: int
    ) -> Iterator[GeneratedCaption]:
        """Makes `num_images_per_caption` images of each caption, in order.

        Args:
            captions: What to draw.
            num_images_per_caption: Images of each, > 0.
            seed: Seed of the dataset.

        Yields:
            One result a caption, as soon as its last image is there.
        """
        made: list[tuple[_Job, npt.NDArray[np.uint8], str | None]] = []
        for jobs in _batched(self._plan(captions, num_images_per_caption, seed), self.num_images_per_batch):
            images, failures = self._run(jobs)
            made += zip(jobs, images, failures, strict=True)
            while len(made) >= num_images_per_caption:
                done, made = made[:num_images_per_caption], made[num_images_per_caption:]
                yield GeneratedCaption(
                    caption=done[0][0].caption,
                    images=tuple(image for _, image, _ in done),
                    image_seeds=tuple(job.seed for job, _, _ in done),
                    failure=next((failure for _, _, failure in done if failure), None),
                )

    def _plan(self, captions: Sequence[Caption], num_images_per_caption: int, seed: int) -> Iterator[_Job]:
        for chunk in _batched(captions, NUM_CAPTIONS_PER_ENCODING):
            for caption, embeddings in zip(chunk, self._encode(chunk), strict=True):
                for index in range(num_images_per_caption):
                    yield _Job(caption, embeddings, image_seed(seed, caption.caption_id, index))

    @torch.inference_mode()
    def _encode(self, captions: Sequence[Caption]) -> list[_Embeddings]:
        """Text embeddings by the name of the pipeline's argument, in one batch of fixed shape."""
        if not self._encodes_once:
            return [{} for _ in captions]
        padded = [captions[min(row, len(captions) - 1)].text for row in range(NUM_CAPTIONS_PER_ENCODING)]
        encoded = self.pipeline.encode_prompt(
            prompt=padded,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self._guided,
            negative_prompt=self._negative_prompts(len(padded)),
        )
        names = (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
        tensors = {name: tensor for name, tensor in zip(names, encoded, strict=False) if tensor is not None}
        return [{name: tensor[row] for name, tensor in tensors.items()} for row in range(len(captions))]

    @torch.inference_mode()
    def _run(self, jobs: Sequence[_Job]) -> tuple[npt.NDArray[np.uint8], list[str | None]]:
        """One batch of the pipeline, padded with its last image; uint8 [len(jobs), H, W, 3] and failures."""
        padded = [jobs[min(row, len(jobs) - 1)] for row in range(self.num_images_per_batch)]
        arguments: dict[str, Any] = {
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            "height": self.height,
            "width": self.width,
            "output_type": "pt",
            "generator": [self._torch_generator(job.seed) for job in padded],
            **self._conditions(padded),
        }
        if self._encodes_once:
            arguments["latents"] = self._latents(padded)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            output = self.pipeline(
                **{name: arguments[name] for name in arguments if name in self._parameters}
            )
        pixels = output.images[: len(jobs)].float()
        finite = pixels.isfinite().flatten(1).all(dim=1).tolist()
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(padded)
        failures = [
            "safety_checker" if bad else None if good else "non_finite"
            for good, bad in zip(finite, flagged, strict=False)
        ]
        images = pixels.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).cpu().numpy(), failures

    def _conditions(self, jobs: Sequence[_Job]) -> dict[str, Any]:
        if not self._encodes_once:
            texts = [job.caption.text for job in jobs]
            return {"prompt": texts, "negative_prompt": self._negative_prompts(len(jobs))}
        return {name: torch.stack([job.embeddings[name] for job in jobs]) for name in jobs[0].embeddings}

    def _latents(self, jobs: Sequence[_Job]) -> torch.Tensor:
        """Unit noise; the pipeline itself scales it to its scheduler's first noise level."""
        pipeline = self.pipeline
        scale = pipeline.vae_scale_factor
        shape = (pipeline.unet.config.in_channels, self.height // scale, self.width // scale)
        noise = np.stack([draw_noise(job.seed, shape) for job in jobs])
        return torch.from_numpy(noise).to(device=self.device, dtype=getattr(torch, self.config.dtype))

    def _torch_generator(self, seed: str) -> torch.Generator:
        """For what a scheduler draws on its way, and for the first noise of an unknown family."""
        return torch.Generator(self.device).manual_seed(int(seed[:15], 16))

    def _negative_prompts(self, num: int) -> list[str] | None:
        """None where none is given: SDXL then has zeros in its place, not the embedding of an empty text."""
        return [self.config.negative_prompt] * num if self._guided and self.config.negative_prompt else None

    @property
    def _guided(self) -> bool:
        return self.config.guidance_scale > 1


def load_pipeline(config: GeneratorConfig, model: ModelFiles) -> Any:
    """Loads a diffusers pipeline from its folder: safetensors only, no code but the library's.

    Raises:
        OSError: The folder cannot be loaded.
        ValueError: The scheduler that was asked for cannot sample with the model's noise schedule.
    """
    forbid_remote_code()
    import diffusers
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers.utils.logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            model.folder,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=True,
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(f"model folder {model.folder} cannot be loaded: {reason}") from error
    if config.scheduler is not None:
        class_name, settings = SCHEDULERS[config.scheduler]
        pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **settings)
        _check_noise_range(pipeline.scheduler, config.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_noise_range(scheduler: Any, name: str) -> None:
    signal = float(scheduler.alphas_cumprod[-1])
    ratio = ((1 - signal) / signal) ** 0.5 if signal > 0 else float("inf")
    if name in BOUNDED_NOISE_SCHEDULERS and ratio > MAX_NOISE_RATIO:
        raise ValueError(
            f"scheduler {name} needs a noise schedule that ends at a noise of at most {MAX_NOISE_RATIO:g} "
            f"times the signal, and the model's ends at {ratio:.0f}; dpmsolver++ and ddim take any"
        )


def _has_known_embeddings(pipeline: Any, parameters: set[str]) -> bool:
    """Whether it is of Stable Diffusion's or SDXL's family: a UNet that takes embeddings and latents."""
    return _has_latents(pipeline) and {"prompt_embeds", "latents"} <= parameters


def _has_latents(pipeline: Any) -> bool:
    """Whether its UNet denoises latents of a known scale (not so in DeepFloyd IF and Kandinsky)."""
    return hasattr(pipeline, "unet") and hasattr(pipeline, "vae_scale_factor")


def _image_size(pipeline: Any, config: GeneratorConfig) -> tuple[int | None, int | None]:
    """(height, width) in pixels: as asked for, else the model's own (None: the pipeline knows)."""
    if not _has_latents(pipeline):
        return config.height, config.width
    size = pipeline.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    scale = pipeline.vae_scale_factor
    return config.height or rows * scale, config.width or columns * scale


def _batched(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"generator.device must be auto, cpu or an accelerator of this machine, got {name} ({reason})"
        ) from error
    return device


def _name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
