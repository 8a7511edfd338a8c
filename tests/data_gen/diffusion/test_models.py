"""Which model a config means: how it is found, what identifies it, and which settings are refused."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_gen.diffusion.models import GeneratorConfig, find_model
from data_gen.job.planned_model import build_generator_config
from data_gen.job.worker import WorkConfig
from tests.data_gen.datasets import save_tiny_vae


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model folder .*/no/model/here does not exist"):
        find_model(GeneratorConfig(model=str(tmp_path / "no/model/here")))


def test_a_hub_model_out_of_reach_is_named() -> None:
    with pytest.raises(OSError, match=r"^hub model no-owner/no-name cannot be had .*: .+$") as caught:
        find_model(GeneratorConfig(model="no-owner/no-name"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": "dpmsolver"}, r"got 'dpmsolver'; nearest: dpmsolver\+\+$"),
        ({"scheduler": "eular"}, "nearest: euler$"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1, got 0"),
        ({"height": 60}, "height must be a multiple of 8 pixels, got 60"),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_its_bound(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GeneratorConfig(), **change).check()


def test_int8_without_its_library_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="int8 must be false where torchao is not installed"):
        GeneratorConfig(int8=True).check()


def test_a_tiny_vae_is_part_of_the_models_identity(tiny_pipeline: Path, tmp_path: Path) -> None:
    save_tiny_vae(tmp_path / "tiny-vae")
    plain = GeneratorConfig(model=str(tiny_pipeline))
    with_tiny_vae = dataclasses.replace(plain, tiny_vae=str(tmp_path / "tiny-vae"))
    model, own = find_model(with_tiny_vae), find_model(plain)
    assert model.tiny_vae_folder == tmp_path / "tiny-vae"
    assert model.identity.startswith("tiny_vae=sha256:")
    assert model.identity.endswith(own.identity)
    weights = tmp_path / "tiny-vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert find_model(with_tiny_vae).identity != model.identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latent_channels": 16},
            r"must have 4 latent channels as the VAE of model tiny-pipeline has, got 16",
        ),
        ({"num_blocks": 3}, r"must have 2 pixels a latent as the VAE of model tiny-pipeline has, got 4"),
    ],
)
def test_a_tiny_vae_for_other_latents_is_refused(
    tiny_pipeline: Path, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    save_tiny_vae(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        find_model(GeneratorConfig(model=str(tiny_pipeline), tiny_vae=str(tmp_path)))


def test_a_tiny_vae_that_is_none_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = GeneratorConfig(model=str(tiny_pipeline), tiny_vae=str(tiny_pipeline / "vae"))
    with pytest.raises(ValueError, match="must be an AutoencoderTiny, got AutoencoderKL"):
        find_model(config)
    with pytest.raises(FileNotFoundError, match=r"tiny_vae folder .*/none/here does not exist"):
        find_model(dataclasses.replace(config, tiny_vae=str(tmp_path / "none/here")))
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        find_model(dataclasses.replace(config, tiny_vae=str(tmp_path)))
    with pytest.raises(OSError, match=r"^tiny_vae no-owner/no-name cannot be had"):
        find_model(dataclasses.replace(config, tiny_vae="no-owner/no-name"))


def test_a_model_without_a_vae_takes_no_tiny_one(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    shutil.rmtree(folder / "vae")
    save_tiny_vae(tmp_path / "tiny-vae")
    with pytest.raises(
        ValueError, match="tiny_vae must be None for model model: its VAE is no AutoencoderKL"
    ):
        find_model(GeneratorConfig(model=str(folder), tiny_vae=str(tmp_path / "tiny-vae")))


def test_a_worker_takes_the_commits_that_the_plan_names(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = dataclasses.asdict(GeneratorConfig("owner/model", tiny_vae="owner/tiny"))
    generator["model_identity"] = "tiny_vae=commit:abc commit:def"
    plan: Any = SimpleNamespace(manifest=SimpleNamespace(settings={"generator": generator}))
    config = build_generator_config(plan, WorkConfig("dataset"))
    assert (config.revision, config.tiny_vae_revision) == ("def", "abc")
    asked: list[Any] = []

    def download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision))
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(OSError, match=r"tiny_vae owner/tiny at revision abc cannot be had .*: offline"):
        find_model(dataclasses.replace(config, model="embedded"))
    assert asked == [("owner/tiny", "abc")]
    generator["model_identity"] = "sha256:0123"
    config = build_generator_config(plan, WorkConfig("dataset"))
    assert (config.revision, config.tiny_vae_revision) == (None, None)
