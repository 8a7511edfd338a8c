"""A diffusers pipeline from its folder, in the form that the config asks for.

Nothing but the library's code runs and no pickle is read, unless the config says so;
`data_gen.diffusion.model_folder` has looked before.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from data_gen.diffusion.model_folder import forbid_remote_code
from data_gen.diffusion.models import (
    BOUNDED_NOISE_SCHEDULERS,
    MAX_NOISE_RATIO,
    SCHEDULERS,
    GeneratorConfig,
    ModelFiles,
)
from data_gen.diffusion.noise import draw_noise

MAX_COMPILED_SHAPES = 64
"""Of one block. Beyond it, torch would run uncompiled without an error, and round otherwise."""


def load_pipeline(config: GeneratorConfig, model: ModelFiles) -> Any:
    """Loads a pipeline into main memory.

    Args:
        config: The model's settings.
        model: Where its weights are, from `data_gen.diffusion.models.find_model`.

    Raises:
        OSError: The folder cannot be loaded.
        ValueError: The scheduler that was asked for cannot sample with the model's noise schedule, or an
            option does not fit the model.
    """
    if not config.trust_remote_code:
        forbid_remote_code()
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import, to its own authors
    import diffusers
    from transformers.utils import logging as transformers_logging

    for library in (diffusers.utils.logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "use_safetensors": None if config.allow_pickle else True,
        "local_files_only": True,
        "low_cpu_mem_usage": True,
    }
    if model.tiny_vae_folder is not None:
        options["vae"] = _load(diffusers.AutoencoderTiny, "tiny_vae folder", model.tiny_vae_folder, options)
    options["trust_remote_code"] = config.trust_remote_code
    pipeline = _load(diffusers.DiffusionPipeline, "model folder", model.folder, options)
    if config.scheduler is not None:
        _check_diffuses(pipeline.scheduler, config.scheduler, model.name)
        class_name, settings = SCHEDULERS[config.scheduler]
        pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **settings)
        _check_noise_range(pipeline.scheduler, config.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    _apply_options(pipeline, config)
    return pipeline


def has_known_latents(pipeline: Any) -> bool:
    """Whether its UNet denoises latents of a known scale (not so in DeepFloyd IF and Kandinsky)."""
    return hasattr(pipeline, "unet") and hasattr(pipeline, "vae_scale_factor")


@contextmanager
def keyed_noise(pipeline: Any, seeds: Sequence[str]) -> Iterator[None]:
    """Lets a pipeline that prepares its own latents draw them from `data_gen.diffusion.noise`.

    Its `prepare_latents` asks the library's `randn_tensor`, which would seed torch's generators: those of the
    CPU take 32 bits of a seed, and each device has other noise. Draws within one run differ by their number.

    Args:
        pipeline: Any diffusers pipeline; only its own draws change, not those of its scheduler.
        seeds: The noise key of each image of the batch.
    """
    modules = {sys.modules[cls.__module__] for cls in type(pipeline).__mro__}
    patched = [module for module in modules if hasattr(module, "randn_tensor")]
    originals = [module.randn_tensor for module in patched]
    num_draws = 0

    def draw(
        shape: Sequence[int],
        generator: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        layout: Any = None,
    ) -> torch.Tensor:
        nonlocal num_draws
        if shape[0] != len(seeds):
            raise ValueError(
                f"{type(pipeline).__name__} draws noise of shape {list(shape)} for {len(seeds)} images; each "
                "image must have a row of its own"
            )
        keys = [f"{int(seed, 16) ^ num_draws:032x}" for seed in seeds]
        num_draws += 1
        noise = np.stack([draw_noise(key, tuple(shape[1:])) for key in keys])
        return torch.from_numpy(noise).to(device=device, dtype=dtype)

    for module in patched:
        module.randn_tensor = draw  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, original in zip(patched, originals, strict=True):
            module.randn_tensor = original  # type: ignore[attr-defined]


def _load(pipeline_class: Any, what: str, folder: Any, options: dict[str, Any]) -> Any:
    try:
        return pipeline_class.from_pretrained(folder, **options)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(f"{what} {folder} cannot be loaded: {reason}") from error


def _check_diffuses(own: Any, name: str, model: str) -> None:
    """A model of another process, such as flow matching, would be sampled without an error, and wrongly."""
    if not hasattr(own, "alphas_cumprod"):
        raise ValueError(
            f"scheduler must be None for model {model}, got {name}: the model's own, {type(own).__name__}, "
            "has no schedule of diffusion that another could take over"
        )


def _check_noise_range(scheduler: Any, name: str) -> None:
    signal = float(scheduler.alphas_cumprod[-1])
    ratio = ((1 - signal) / signal) ** 0.5 if signal > 0 else float("inf")
    if name in BOUNDED_NOISE_SCHEDULERS and ratio > MAX_NOISE_RATIO:
        raise ValueError(
            f"scheduler {name} needs a noise schedule that ends at a noise of at most {MAX_NOISE_RATIO:g} "
            f"times the signal, and the model's ends at {ratio:.0f}; dpmsolver++ and ddim take any"
        )


def _apply_options(pipeline: Any, config: GeneratorConfig) -> None:
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    for name in ("channels_last", "int8", "compile"):
        if getattr(config, name) and denoiser is None:
            raise ValueError(
                f"generator.{name} must be false for a {type(pipeline).__name__}: it has no unet and no "
                "transformer"
            )
    if config.int8:
        _quantise(denoiser)
    if config.channels_last:
        for module in (denoiser, getattr(pipeline, "vae", None)):
            if module is not None:
                module.to(memory_format=torch.channels_last)
    if config.compile:
        _compile(denoiser)


def _quantise(denoiser: Any) -> None:
    """Linear layers' weights to int8, one scale an output channel; activations stay as they are.

    Scales of activations, taken over a whole batch, would make an image depend on the others of its batch.
    """
    from torchao.quantization import (  # type: ignore[import-untyped]
        Int8WeightOnlyConfig,
        quantize_,
    )

    quantize_(denoiser, Int8WeightOnlyConfig(set_inductor_config=False))  # True would allow TF32 everywhere


def _compile(denoiser: Any) -> None:
    """Compiles at the first batch: the repeated blocks where the model knows them, else all of it.

    Shapes are fixed: kernels for any shape would round otherwise after the batch was halved than in a process
    that began with the smaller batch.
    """
    limit = max(MAX_COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.recompile_limit = limit
    repeated = getattr(denoiser, "_repeated_blocks", None) or ()
    if any(type(module).__name__ in repeated for module in denoiser.modules()):
        denoiser.compile_repeated_blocks(dynamic=False)
    else:
        # Not Module.compile(): it would keep the hooks of the first call and ignore those that come later.
        denoiser.forward = torch.compile(denoiser.forward, dynamic=False)
