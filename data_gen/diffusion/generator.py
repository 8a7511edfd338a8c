"""Images from captions with any diffusers text-to-image pipeline, each a pure function of seed and caption.

One fixed batch shape (the last batch is padded), noise keyed by content (`data_gen.diffusion.noise`): an
image does not depend on the others of its batch. A caption is encoded once, and its embedding serves all of
its images.
"""

import gc
import hashlib
import inspect
import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from data_gen.diffusion.allocator import keep_freed_memory
from data_gen.diffusion.guidance import (
    PIPELINE_SCALE,
    draw_guidance_scale,
    guide_each_image,
    is_fixed,
    largest_scale,
)
from data_gen.diffusion.models import GeneratorConfig, ModelFiles
from data_gen.diffusion.noise import draw_noise, image_seed
from data_gen.diffusion.pipelines import has_known_latents, keyed_noise, load_pipeline
from data_gen.shards import to_json

NUM_CAPTIONS_PER_ENCODING = 16

_Embeddings = dict[str, torch.Tensor]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ImageRequest:
    """The images that are wanted of one caption.

    Args:
        key: What the noise is keyed by: the caption's id, or "caption_id-OCCURRENCE".
        text: The caption.
        image_indices: Which of its images, at least one.
    """

    key: str
    text: str
    image_indices: tuple[int, ...]


@dataclass(frozen=True)
class GeneratedCaption:
    """The images of one request, or the reason why it has none.

    Args:
        request: What was asked for.
        images: uint8 arrays, one an image index.
        image_seeds: The noise key of each image.
        guidance_scales: The guidance scale of each image.
        fingerprints: The id of the machine settings under which each image was made, a key of
            `DiffusionGenerator.fingerprints`.
        failure: None, or "safety_checker" or "non_finite"; then none of the images is to be used.

    Shapes:
        images: each [height, width, 3].
    """

    request: ImageRequest
    images: tuple[npt.NDArray[np.uint8], ...]
    image_seeds: tuple[str, ...]
    guidance_scales: tuple[float, ...]
    fingerprints: tuple[str, ...]
    failure: str | None


@dataclass(frozen=True)
class _Plan:
    """One image to make."""

    request: ImageRequest
    embeddings: _Embeddings
    seed: str
    guidance_scale: float


@dataclass(frozen=True)
class _Image:
    """One image made."""

    plan: _Plan
    pixels: npt.NDArray[np.uint8]
    fingerprint: str
    failure: str | None


class DiffusionGenerator:
    """A loaded pipeline with its sampling settings.

    Args:
        config: The model's settings.
        model: Where its weights are, from `find_model`.
        num_images_per_batch: Batch of the denoising network, > 0; every batch has this size, until one does
            not fit into memory: from there on, half of it.

    Attributes:
        fingerprints: Every fingerprint that an image was made under so far, by its id.

    Raises:
        OSError: The folder cannot be loaded (damaged, or without safetensors), or does not fit into memory.
        ValueError: A setting is out of its range or would have no effect, there is no such device, or the
            pipeline takes no prompt.
    """

    def __init__(self, config: GeneratorConfig, model: ModelFiles, num_images_per_batch: int) -> None:
        config.check()
        if num_images_per_batch < 1:
            raise ValueError(f"num_images_per_batch must be >= 1, got {num_images_per_batch}")
        self.config = config
        self.num_images_per_batch = num_images_per_batch
        self.fingerprints: dict[str, dict[str, Any]] = {}
        self.device = _find_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        with self._shortage_named(f"model {model.name}"):
            self.pipeline = load_pipeline(config, model).to(self.device)
        self._parameters = set(inspect.signature(self.pipeline.__call__).parameters)
        if "prompt" not in self._parameters:
            name = type(self.pipeline).__name__
            raise ValueError(
                f"model {model.name} is a {name}, which takes no prompt: no text-to-image pipeline"
            )
        self._encodes_once = _has_known_embeddings(self.pipeline, self._parameters)
        self._guided = largest_scale(config.guidance_scale) > 1
        self._scales_differ = self._guided and not is_fixed(config.guidance_scale)
        self._check_settings_take_effect(model.name)
        if self._scales_differ:
            self._check_guides_by_two_halves(model.name)
        self.height, self.width = _image_size(self.pipeline, config)

    def _check_settings_take_effect(self, model: str) -> None:
        """What the dataset records of its images must be how they were made."""
        config, where = self.config, f"for model {model} ({type(self.pipeline).__name__})"
        if config.negative_prompt and not self._guided:
            raise ValueError(
                f"negative_prompt must be empty where guidance_scale is 1 or below, got "
                f"{config.negative_prompt!r} at {config.guidance_scale}: nothing leads away from it there"
            )
        takes = self._parameters
        for name, value, is_taken in (
            ("negative_prompt", config.negative_prompt, bool(takes & {"negative_prompt"})),
            ("guidance_scale", self._guided and config.guidance_scale, "guidance_scale" in takes),
            ("num_inference_steps", config.num_inference_steps, "num_inference_steps" in takes),
            ("height", config.height, "height" in takes),
            ("width", config.width, "width" in takes),
        ):
            if value and not is_taken:
                raise ValueError(f"{name} must not be set {where}, which does not take it, got {value!r}")

    def _check_guides_by_two_halves(self, model: str) -> None:
        """What can be seen before the first batch; `guide_each_image` sees the rest."""
        takes_scale = self._encodes_once and self.pipeline.unet.config.get("time_cond_proj_dim") is not None
        if takes_scale or not self._encodes_once:
            reason = "its UNet takes the scale as an input" if takes_scale else "it has no such UNet"
            raise ValueError(
                f"guidance_scale must be one number for model {model} ({type(self.pipeline).__name__}), got "
                f"{self.config.guidance_scale}: a scale for each image is set between the two halves of a "
                f"Stable Diffusion UNet's batch, and {reason}"
            )

    def fingerprint(self) -> dict[str, Any]:
        """Machine settings within which equal seeds give equal images, bit for bit."""
        return _describe(self.config, self.device, torch.get_num_threads(), self.num_images_per_batch)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Texts of which the (first) tokenizer leaves out an end."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if tokenizer is None or not texts:
            return 0
        tokens = tokenizer(list(texts), verbose=False).input_ids
        return sum(len(row) > tokenizer.model_max_length for row in tokens)

    def generate(self, requests: Iterable[ImageRequest], seed: int) -> Iterator[GeneratedCaption]:
        """Makes the images that are asked for, in order.

        Args:
            requests: What to draw; read as far as the next batches need it.
            seed: Seed of the dataset.

        Yields:
            One result a request, as soon as its last image is there.

        Raises:
            OSError: Not even a batch of one image fits into memory.
        """
        made: deque[_Image] = deque()
        for batch in self._make(self._plan(requests, seed)):
            made.extend(batch)
            while made and len(made) >= (num := len(made[0].plan.request.image_indices)):
                done = [made.popleft() for _ in range(num)]
                yield GeneratedCaption(
                    request=done[0].plan.request,
                    images=tuple(image.pixels for image in done),
                    image_seeds=tuple(image.plan.seed for image in done),
                    guidance_scales=tuple(image.plan.guidance_scale for image in done),
                    fingerprints=tuple(image.fingerprint for image in done),
                    failure=next((image.failure for image in done if image.failure), None),
                )

    def _plan(self, requests: Iterable[ImageRequest], seed: int) -> Iterator[_Plan]:
        for chunk in _batched(requests, NUM_CAPTIONS_PER_ENCODING):
            for request, embeddings in zip(chunk, self._encode(chunk), strict=True):
                for index in request.image_indices:
                    key = image_seed(seed, request.key, index)
                    yield _Plan(
                        request, embeddings, key, draw_guidance_scale(self.config.guidance_scale, key)
                    )

    def _make(self, plans: Iterator[_Plan]) -> Iterator[list[_Image]]:
        """Runs batch after batch; one that does not fit into memory is run again in halves."""
        waiting: list[_Plan] = []
        while True:
            waiting += islice(plans, max(0, self.num_images_per_batch - len(waiting)))
            if not waiting:
                return
            batch = waiting[: self.num_images_per_batch]
            shortage = None
            try:
                images, failures = self._run(batch)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                shortage = " ".join(str(error).split())[:160]
            if shortage is not None:  # outside of `except`, whose error holds on to the batch's tensors
                self._halve_batch(shortage)
                continue
            waiting = waiting[len(batch) :]
            fingerprint = self._record_fingerprint()
            yield [
                _Image(plan, pixels, fingerprint, failure)
                for plan, pixels, failure in zip(batch, images, failures, strict=True)
            ]

    def _halve_batch(self, shortage: str) -> None:
        size = self.num_images_per_batch
        if size == 1:
            raise OSError(
                f"{_name_device(self.device)} has too little memory for a batch of one image of "
                f"{self.width}×{self.height} pixels ({shortage})"
            )
        self.num_images_per_batch = size // 2
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
        print(
            f"stablerep generate: a batch of {size} images does not fit into memory; going on with "
            f"{self.num_images_per_batch}, under another fingerprint ({shortage})",
            file=sys.stderr,
        )

    def _record_fingerprint(self) -> str:
        """The id of the present fingerprint, which is kept under it."""
        fingerprint = self.fingerprint()
        identity = fingerprint_id(fingerprint)
        self.fingerprints.setdefault(identity, fingerprint)
        return identity

    @torch.inference_mode()
    def _encode(self, requests: Sequence[ImageRequest]) -> list[_Embeddings]:
        """Text embeddings by the name of the pipeline's argument, in one batch of fixed shape."""
        if not self._encodes_once:
            return [{} for _ in requests]
        padded = [requests[min(row, len(requests) - 1)].text for row in range(NUM_CAPTIONS_PER_ENCODING)]
        with self._shortage_named(f"the embeddings of {NUM_CAPTIONS_PER_ENCODING} captions"):
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
        return [{name: tensor[row] for name, tensor in tensors.items()} for row in range(len(requests))]

    @torch.inference_mode()
    def _run(self, plans: Sequence[_Plan]) -> tuple[npt.NDArray[np.uint8], list[str | None]]:
        """One batch of the pipeline, padded with its last image; uint8 [len(plans), H, W, 3] and failures."""
        padded = [plans[min(row, len(plans) - 1)] for row in range(self.num_images_per_batch)]
        scales = [plan.guidance_scale for plan in padded]
        arguments: dict[str, Any] = {
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": PIPELINE_SCALE if self._scales_differ else scales[0],
            "height": self.height,
            "width": self.width,
            "output_type": "pt",
            "generator": [self._torch_generator(plan.seed) for plan in padded],
            **self._conditions(padded),
        }
        if self._encodes_once:
            arguments["latents"] = self._latents(padded)
        with ExitStack() as stack:
            if self._scales_differ:
                stack.enter_context(guide_each_image(self.pipeline.unet, scales))
            if not self._encodes_once:
                stack.enter_context(keyed_noise(self.pipeline, [plan.seed for plan in padded]))
            decoded = stack.enter_context(_watch_decoder(self.pipeline))
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
            output = self.pipeline(
                **{name: arguments[name] for name in arguments if name in self._parameters}
            )
        pixels = output.images[: len(plans)].float()
        finite = _are_finite(pixels, decoded).tolist()
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(padded)
        failures = [
            "safety_checker" if bad else None if good else "non_finite"
            for good, bad in zip(finite, flagged, strict=False)
        ]
        images = pixels.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).cpu().numpy(), failures

    def _conditions(self, plans: Sequence[_Plan]) -> dict[str, Any]:
        if not self._encodes_once:
            texts = [plan.request.text for plan in plans]
            return {"prompt": texts, "negative_prompt": self._negative_prompts(len(plans))}
        return {name: torch.stack([plan.embeddings[name] for plan in plans]) for name in plans[0].embeddings}

    def _latents(self, plans: Sequence[_Plan]) -> torch.Tensor:
        """Unit noise; the pipeline itself scales it to its scheduler's first noise level."""
        pipeline = self.pipeline
        scale = pipeline.vae_scale_factor
        shape = (pipeline.unet.config.in_channels, self.height // scale, self.width // scale)
        noise = np.stack([draw_noise(plan.seed, shape) for plan in plans])
        return torch.from_numpy(noise).to(device=self.device, dtype=getattr(torch, self.config.dtype))

    def _torch_generator(self, seed: str) -> torch.Generator:
        """For what a scheduler draws on its way, and for the first noise of an unknown family."""
        return torch.Generator(self.device).manual_seed(int(seed[:15], 16))

    def _negative_prompts(self, num: int) -> list[str] | None:
        """None where none is given: SDXL then has zeros in its place, not the embedding of an empty text."""
        return [self.config.negative_prompt] * num if self.config.negative_prompt else None

    @contextmanager
    def _shortage_named(self, what: str) -> Iterator[None]:
        """Turns a lack of memory into an OSError: this place is too small, the captions are not to blame."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:160]
            raise OSError(
                f"{_name_device(self.device)} has too little memory for {what} ({reason})"
            ) from None


def describe_machine(
    config: GeneratorConfig, device: str, num_threads: int | None, num_images_per_batch: int
) -> dict[str, Any]:
    """The fingerprint that a generator on this machine will have, without loading it.

    With `config.compile` on the CPU, the C++ compiler has its part too; it is not recorded.

    Args:
        config: The model's settings.
        device: Where it will run.
        num_threads: Threads of its process; None for as many as this one has.
        num_images_per_batch: Batch of the denoising network.

    Raises:
        ValueError: There is no such device.
    """
    return _describe(
        config, _find_device(device), num_threads or torch.get_num_threads(), num_images_per_batch
    )


def _describe(
    config: GeneratorConfig, device: torch.device, num_threads: int, num_images_per_batch: int
) -> dict[str, Any]:
    is_cpu = device.type == "cpu"
    return {
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "torchao": version("torchao") if config.int8 else None,
        "numpy": np.__version__,
        "device": _name_processor() if is_cpu else _name_device(device),
        "num_threads": num_threads if is_cpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if is_cpu else None,
        "dtype": config.dtype,
        "channels_last": config.channels_last,
        "compile": config.compile,
        "int8": config.int8,
        "num_images_per_batch": num_images_per_batch,
        "num_captions_per_encoding": NUM_CAPTIONS_PER_ENCODING,
    }


def fingerprint_id(fingerprint: Mapping[str, Any]) -> str:
    """First 12 hex digits of sha256 over the fingerprint as canonical JSON."""
    return hashlib.sha256(to_json(fingerprint).encode()).hexdigest()[:12]


@contextmanager
def _watch_decoder(pipeline: Any) -> Iterator[list[torch.Tensor]]:
    """What the VAE's decoder gives within: pipelines clamp it, which makes a colour of an infinity."""
    decoded: list[torch.Tensor] = []
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield decoded
        return
    handle = decoder.register_forward_hook(lambda _, __, output: decoded.append(output))
    try:
        yield decoded
    finally:
        handle.remove()


def _are_finite(pixels: torch.Tensor, decoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether each image is: in its pixels, and as the decoder gave it where it gave one output an image.

    Shapes:
        pixels [N, 3, H, W], decoded [rows, 3, H, W] -> [N]
    """
    finite = pixels.isfinite().flatten(1).all(dim=1)
    rows = [output.isfinite().flatten(1).all(dim=1) for output in decoded]
    if sum(map(len, rows)) >= len(pixels):
        finite &= torch.cat(rows)[: len(pixels)]
    return finite


def _has_known_embeddings(pipeline: Any, parameters: set[str]) -> bool:
    """Whether it is of Stable Diffusion's or SDXL's family: a UNet that takes embeddings and latents."""
    return has_known_latents(pipeline) and {"prompt_embeds", "latents"} <= parameters


def _image_size(pipeline: Any, config: GeneratorConfig) -> tuple[int | None, int | None]:
    """(height, width) in pixels: as asked for, else the model's own (None: the pipeline knows)."""
    if not has_known_latents(pipeline):
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


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is the allocator's own error, or the plain one of a CPU's or a library's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return any(words in message for words in ("out of memory", "can't allocate memory", "alloc_failed"))


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


def _name_processor() -> str:
    """Libraries choose kernels by the processor, also among those with the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu {names[0] if names else platform.processor() or platform.machine()}"


def _name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
