"""Which model makes the images, and how: the settings, where the weights are, and what identifies them.

Light to import: torch and diffusers come in when a pipeline is built, in `data_gen.generator`.
"""

import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EMBEDDED_FOLDER = Path(__file__).parent / "embedded" / "pipeline"

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
_IDENTITY_SUFFIXES = {".json", ".model", ".safetensors", ".txt"}


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
        guidance_scale: Weight of classifier-free guidance, >= 0; at 1 or below, no second pass is run.
        negative_prompt: Text that guidance leads away from.
        height: Height of the generated image in pixels, a multiple of 8; None is the model's own.
        width: Width of the generated image in pixels, a multiple of 8; None is the model's own.
        dtype: Precision of weights and latents.
        device: Where it runs, such as "cpu" or "cuda:1"; "auto" is the accelerator where there is one.
    """

    model: str = "embedded"
    revision: str | None = None
    scheduler: str | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 2.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"

    def check(self) -> None:
        """Checks what can be checked without the model.

        Raises:
            ValueError: A setting is out of its range, or the scheduler is unknown.
        """
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be >= 1, got {self.num_inference_steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be >= 0 and finite, got {self.guidance_scale}")
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (size < 8 or size % 8):
                raise ValueError(f"{name} must be a multiple of 8 pixels, got {size}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            nearest = difflib.get_close_matches(self.scheduler, SCHEDULERS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}; "
                f"nearest: {nearest}"
            )


@dataclass(frozen=True)
class ModelFiles:
    """A diffusers folder on this machine.

    Args:
        name: What people call it: "embedded", the folder's name, or the hub id.
        folder: Holds model_index.json.
        identity: "sha256:…" over the folder's weights and settings, or "commit:…" of a hub model.
    """

    name: str
    folder: Path
    identity: str


def find_model(config: GeneratorConfig) -> ModelFiles:
    """Finds the model's folder; a hub model is downloaded (safetensors only), unless the cache has it.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no pipeline.
        OSError: The hub model cannot be had.
    """
    folder = EMBEDDED_FOLDER if config.model == "embedded" else Path(config.model)
    if config.model != "embedded" and not folder.exists() and _HUB_ID.fullmatch(config.model):
        folder = _download(config.model, config.revision)
        return ModelFiles(config.model, folder, f"commit:{folder.name}")
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist, and it is no hub id (owner/name)")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"model folder {folder} holds no diffusers pipeline: model_index.json is missing"
        )
    name = "embedded" if config.model == "embedded" else folder.resolve().name
    return ModelFiles(name, folder, f"sha256:{digest_model(folder)}")


def digest_model(folder: Path) -> str:
    """sha256 over the names and contents of a pipeline's weights, tokenizer and settings, 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _IDENTITY_SUFFIXES):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\n{content}\n".encode())
    return digest.hexdigest()


def forbid_remote_code() -> None:
    """Keeps diffusers from running code that comes with a model; to be called before it is imported."""
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"


def _download(hub_id: str, revision: str | None) -> Path:
    forbid_remote_code()
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(DiffusionPipeline.download(hub_id, revision=revision, use_safetensors=True))
    except (OSError, ValueError, HfHubHTTPError) as error:
        where = f"hub model {hub_id}" + (f" at revision {revision}" if revision else "")
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(f"{where} cannot be had (and there is no folder of that name): {reason}") from error
