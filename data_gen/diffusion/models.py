"""Which model makes the images, and how: the settings, where the weights are, and what identifies them.

Light to import: torch and diffusers come in when a pipeline is built, in `data_gen.diffusion.pipelines`.
"""

import dataclasses
import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_gen.diffusion.guidance import GuidanceRange, check_guidance_scale
from data_gen.diffusion.model_folder import (
    check_pipeline_folder,
    check_weights,
    digest_model,
    forbid_remote_code,
)

EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded" / "pipeline"

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name → (diffusers class, settings that it takes beside the model's own).

Two clip by default what they predict to [-1, 1], as suits pixels; latents are not bounded.
"""
BOUNDED_NOISE_SCHEDULERS = ("dpmsolver++_karras", "heun")
"""They step in the ratio of noise to signal and need one that ends; a cosine schedule's hardly does."""
MAX_NOISE_RATIO = 1000.0
"""Of those. Stable Diffusion's schedule ends at 14.6, cosine schedules beyond 10,000."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class GeneratorConfig:
    """The text-to-image model and its sampling.

    Args:
        model: "embedded" (the small one shipped here), a diffusers folder, or a hub id such as "owner/name".
        revision: Branch, tag or commit of a hub model; None is its main branch. The commit is recorded.
        scheduler: One of ddim, ddpm, dpmsolver++, dpmsolver++_karras, sde-dpmsolver++, euler,
            euler_ancestral, heun, lcm, pndm, unipc; None is the model's own. heun and Karras's noise levels
            do not fit a cosine schedule, as the embedded model's, and are refused there.
        num_inference_steps: Denoising steps of an image, >= 1.
        guidance_scale: Weight of classifier-free guidance, >= 0; at 1 or below, no second pass is run. A list
            (one of it) or a range (low, high; uniform) is drawn from for each image, by the image's own seed.
        negative_prompt: Text that guidance leads away from.
        height: Height of the generated image in pixels, a multiple of 8; None is the model's own.
        width: Width of the generated image in pixels, a multiple of 8; None is the model's own.
        dtype: Precision of weights and latents.
        device: Where it runs, such as "cpu" or "cuda:1"; "auto" is the accelerator where there is one.
        channels_last: Keep the network's activations with the channels last in memory; other rounding.
        compile: Compile the denoiser's repeated blocks; a minute at the start, other rounding.
        tiny_vae: Folder or hub id of a tiny autoencoder (diffusers' AutoencoderTiny) that decodes in the
            place of the model's own.
        tiny_vae_revision: As `revision`, of a tiny autoencoder from the hub.
        int8: Keep the denoiser's weights as 8-bit integers, one scale a channel.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Load weights that are not safetensors; of tensors alone, but by Python's unpickler.
    """

    model: str = "embedded"
    revision: str | None = None
    scheduler: str | None = None
    num_inference_steps: int = 20
    guidance_scale: float | list[float] | GuidanceRange = 2.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    channels_last: bool = False
    compile: bool = False
    tiny_vae: str | None = None
    tiny_vae_revision: str | None = None
    int8: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def check(self) -> None:
        """Checks what can be checked without the model.

        Raises:
            ValueError: A setting is out of its range, the scheduler is unknown, or a library is missing.
        """
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be >= 1, got {self.num_inference_steps}")
        check_guidance_scale(self.guidance_scale)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (size < 8 or size % 8):
                raise ValueError(f"{name} must be a multiple of 8 pixels, got {size}")
        if self.int8 and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                "int8 must be false where torchao is not installed (pip install stablerep[int8])"
            )
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            nearest = difflib.get_close_matches(self.scheduler, SCHEDULERS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}; "
                f"nearest: {nearest}"
            )


def generator_config_from(settings: Mapping[str, Any]) -> GeneratorConfig:
    """The config of a plan's `generator` settings; what is not a field of it is left out.

    Args:
        settings: Plain JSON values, as `dataclasses.asdict` gives them.
    """
    names = {field.name for field in dataclasses.fields(GeneratorConfig)}
    values = {name: value for name, value in settings.items() if name in names}
    if isinstance(values.get("guidance_scale"), dict):
        values["guidance_scale"] = GuidanceRange(**values["guidance_scale"])
    return GeneratorConfig(**values)


@dataclass(frozen=True)
class ModelFiles:
    """A diffusers folder on this machine.

    Args:
        name: What people call it: "embedded", the folder's name, or the hub id.
        folder: Holds model_index.json.
        identity: "sha256:…" over the folder's weights and settings, or "commit:…" of a hub model; with a tiny
            VAE, "tiny_vae=" and that one's identity before it.
        tiny_vae_folder: An AutoencoderTiny that decodes in the place of the model's own VAE.
    """

    name: str
    folder: Path
    identity: str
    tiny_vae_folder: Path | None = None


def find_model(config: GeneratorConfig) -> ModelFiles:
    """Finds the model's folder; a hub model is downloaded, unless the cache has it.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no pipeline, or a part of it is missing.
        OSError: The hub model cannot be had.
        ValueError: It would run code or read pickles that were not asked for, or its tiny VAE does not fit.
    """
    model = _find_pipeline(config)
    check_pipeline_folder(model.folder, config.trust_remote_code, config.allow_pickle)
    if config.tiny_vae is None:
        return model
    folder, identity = _find_tiny_vae(config.tiny_vae, config.tiny_vae_revision, config.allow_pickle)
    _check_tiny_vae(model, config.tiny_vae, folder)
    identity = f"tiny_vae={identity} {model.identity}"
    return dataclasses.replace(model, identity=identity, tiny_vae_folder=folder)


def _find_pipeline(config: GeneratorConfig) -> ModelFiles:
    folder = EMBEDDED_FOLDER if config.model == "embedded" else Path(config.model)
    if config.model != "embedded" and not folder.exists() and _HUB_ID.fullmatch(config.model):
        folder = _download(config)
        return ModelFiles(config.model, folder, f"commit:{folder.name}")
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist, and it is no hub id (owner/name)")
    name = "embedded" if config.model == "embedded" else folder.resolve().name
    return ModelFiles(name, folder, f"sha256:{digest_model(folder)}")


def _find_tiny_vae(place: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str]:
    """Its folder and its identity."""
    folder = Path(place)
    is_hub_id = not folder.exists() and _HUB_ID.fullmatch(place) is not None
    if is_hub_id:
        folder = _download_tiny_vae(place, revision, allow_pickle)
    elif not folder.is_dir():
        raise FileNotFoundError(f"tiny_vae folder {folder} does not exist, and it is no hub id (owner/name)")
    class_name = _read_config(folder).get("_class_name")
    if class_name != "AutoencoderTiny":
        raise ValueError(f"tiny_vae {place} must be an AutoencoderTiny, got {class_name}")
    if not allow_pickle:
        check_weights(folder)
    return folder, f"commit:{folder.name}" if is_hub_id else f"sha256:{digest_model(folder)}"


def _check_tiny_vae(model: ModelFiles, place: str, folder: Path) -> None:
    """Its latents must have the channels and the size of those of the VAE that it stands in for."""
    own_folder = model.folder / "vae"
    own = _read_config(own_folder) if own_folder.is_dir() else {}
    if own.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"tiny_vae must be None for model {model.name}: its VAE is no AutoencoderKL")
    tiny = {"decoder_block_out_channels": [64] * 4, "upsampling_scaling_factor": 2, **_read_config(folder)}
    num_enlargements = len(tiny["decoder_block_out_channels"]) - 1
    for name, own_value, value in (
        ("latent channels", own.get("latent_channels", 4), tiny.get("latent_channels", 4)),
        (
            "pixels a latent",
            2 ** (len(own.get("block_out_channels", [64])) - 1),
            tiny["upsampling_scaling_factor"] ** num_enlargements,
        ),
    ):
        if own_value != value:
            raise ValueError(
                f"tiny_vae {place} must have {own_value} {name} as the VAE of model {model.name} has, got "
                f"{value}"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing") from None
    except ValueError as error:
        raise OSError(f"{path} is not readable as JSON ({error})") from error
    return config


def _download(config: GeneratorConfig) -> Path:
    if not config.trust_remote_code:
        forbid_remote_code()
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = DiffusionPipeline.download(
            config.model,
            revision=config.revision,
            use_safetensors=None if config.allow_pickle else True,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        where = _with_revision(f"hub model {config.model}", config.revision)
        raise OSError(_out_of_reach(where, error)) from error
    return Path(folder)


def _download_tiny_vae(hub_id: str, revision: str | None, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["config.json", "*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        where = _with_revision(f"tiny_vae {hub_id}", revision)
        raise OSError(_out_of_reach(where, error)) from error


def _with_revision(what: str, revision: str | None) -> str:
    return f"{what} at revision {revision}" if revision else what


def _out_of_reach(where: str, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"{where} cannot be had (and there is no folder of that name): {reason}"
