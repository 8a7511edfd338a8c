"""The plan's model on this machine."""

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

from data_gen.diffusion.models import GeneratorConfig, ModelFiles, find_model, generator_config_from
from data_gen.job.plan import Plan
from data_gen.messages import say

if TYPE_CHECKING:
    from data_gen.diffusion.generator import DiffusionGenerator
    from data_gen.job.worker import WorkConfig


def load_generator(plan: Plan, config: "WorkConfig") -> "DiffusionGenerator":
    """Loads the plan's model on this machine.

    Raises:
        OSError: It cannot be loaded.
        ValueError: It is not the model of the plan.
    """
    set_num_threads(config.num_threads)
    from data_gen.diffusion.generator import DiffusionGenerator

    generator_config, model = find_planned_model(plan, config)
    return DiffusionGenerator(generator_config, model, plan.manifest.settings["num_images_per_batch"])


def find_planned_model(plan: Plan, config: "WorkConfig") -> tuple[GeneratorConfig, ModelFiles]:
    """The plan's sampling and model on this machine.

    Raises:
        OSError: There is no such model here.
        ValueError: It is not the model of the plan.
    """
    generator_config = build_generator_config(plan, config)
    model = find_model(generator_config)
    planned = plan.manifest.settings["generator"]["model_identity"]
    if model.identity != planned:
        raise ValueError(f"model {model.name} is {model.identity}, and the plan's is {planned}")
    return generator_config, model


def set_num_threads(num_threads: int | None) -> None:
    """Sets the threads of the CPU's operations, before or after torch is imported."""
    if num_threads is not None:
        os.environ |= {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(num_threads)


def build_generator_config(plan: Plan, config: "WorkConfig") -> GeneratorConfig:
    """The plan's sampling, with what this machine and this worker add."""
    settings = plan.manifest.settings["generator"]
    tiny_vae_identity, identity = _split_identity(settings["model_identity"])
    return dataclasses.replace(
        generator_config_from(settings),
        model=config.model or settings["model"],
        tiny_vae=config.tiny_vae or settings["tiny_vae"],
        revision=_commit_of(identity),
        tiny_vae_revision=_commit_of(tiny_vae_identity),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )


def _split_identity(model_identity: str) -> tuple[str, str]:
    """Of the tiny VAE ("" without one) and of the model itself, as `ModelFiles.identity` joins them."""
    tiny_vae, _, model = f" {model_identity}".rpartition(" ")
    return tiny_vae.strip().removeprefix("tiny_vae="), model


def _commit_of(identity: str) -> str | None:
    return identity.removeprefix("commit:") if identity.startswith("commit:") else None


def compare_fingerprints(plan: Plan, here: dict[str, Any]) -> None:
    """Says where this machine differs from the one that the dataset was planned on."""
    planned = plan.manifest.fingerprint
    for name in sorted(planned.keys() | here.keys()) if planned else ():
        before, now = planned.get(name), here.get(name)
        if before != now:
            say(f"{name} was {before!r} and is {now!r}: new images are not bit-equal to the old")
