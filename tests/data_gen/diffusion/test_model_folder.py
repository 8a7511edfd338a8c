"""What is refused before a model is loaded: code of its own, pickles, a folder that lacks a part."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_gen.captions import caption_id
from data_gen.diffusion.generator import DiffusionGenerator, ImageRequest
from data_gen.diffusion.model_folder import digest_model
from data_gen.diffusion.models import GeneratorConfig, find_model
from data_gen.diffusion.pipelines import load_pipeline
from tests.data_gen.datasets import save_tiny_vae

REQUESTS = [ImageRequest(caption_id("a dog"), "a dog", (0, 1))]


@pytest.fixture
def folder(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that may be changed."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))


def config_of(folder: Path, **settings: Any) -> GeneratorConfig:
    return GeneratorConfig(model=str(folder), num_inference_steps=2, device="cpu", **settings)


def change_index(folder: Path, **entries: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))


def pickle_weights(folder: Path, part: str = "unet") -> Path:
    """Replaces a part's safetensors with a .bin of the same tensors."""
    from safetensors.torch import load_file

    (weights,) = (folder / part).glob("*.safetensors")
    pickled = weights.with_suffix(".bin")
    torch.save(load_file(weights), pickled)
    weights.unlink()
    return pickled


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        find_model(config_of(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_text(content)
    with pytest.raises(OSError, match=r"model_index\.json (is not readable as JSON|names no pipeline)"):
        find_model(config_of(folder))


@pytest.mark.parametrize(
    ("entries", "files", "named"),
    [
        ({"_class_name": ["my_pipeline", "MyPipeline"]}, {}, "_class_name is"),
        ({"custom_pipeline": "someone/else"}, {}, "custom_pipeline is someone/else"),
        ({"unet": ["my_unet", "MyUNet"]}, {"unet/my_unet.py": "raise SystemExit"}, "unet/my_unet.py"),
        (
            {},
            {"text_encoder/config.json": json.dumps({"auto_map": {"AutoModel": "other--code.Model"}})},
            "text_encoder/config.json: auto_map",
        ),
    ],
)
def test_code_that_comes_with_a_model_is_refused(
    folder: Path, entries: dict[str, Any], files: dict[str, str], named: str
) -> None:
    change_index(folder, **entries)
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"runs code of its own \(.*{named}.*trust_remote_code must be true"
    ):
        find_model(config_of(folder))


def test_code_that_comes_with_a_model_runs_once_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFUSERS_DISABLE_REMOTE_CODE", raising=False)
    for module in ("diffusers.utils.dynamic_modules_utils", "diffusers.utils.constants"):
        monkeypatch.setattr(f"{module}.DIFFUSERS_DISABLE_REMOTE_CODE", False)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    change_index(folder, unet=["my_unet", "MyUNet"])
    code = "from diffusers import UNet2DConditionModel\n\n\nclass MyUNet(UNet2DConditionModel):\n    pass\n"
    (folder / "unet" / "my_unet.py").write_text(code)
    trusting = config_of(folder, trust_remote_code=True)
    assert type(load_pipeline(trusting, find_model(trusting)).unet).__name__ == "MyUNet"
    before = digest_model(folder)
    (folder / "unet" / "my_unet.py").write_text(code + "\n")
    assert digest_model(folder) != before


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_are_refused_and_named(folder: Path, part: str) -> None:
    pickled = pickle_weights(folder, part)
    with pytest.raises(ValueError, match=f"^{pickled} is a pickle, .*allow_pickle must be true"):
        find_model(config_of(folder))


def test_pickled_weights_make_the_same_images_once_they_are_allowed(
    folder: Path, tiny_pipeline: Path
) -> None:
    pickled = pickle_weights(folder)
    config = config_of(folder, allow_pickle=True)
    models = find_model(config), find_model(config_of(tiny_pipeline))
    made, expected = (
        next(DiffusionGenerator(config, model, 2).generate(REQUESTS, seed=0)).images for model in models
    )
    assert [image.tobytes() for image in made] == [image.tobytes() for image in expected]
    before = digest_model(folder)
    torch.save({}, pickled)
    assert digest_model(folder) != before


class RunsCode:
    """A pickle of it creates a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_runs_code_even_where_pickles_are_allowed(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    with pickle_weights(folder).open("wb") as file:
        pickle.dump(RunsCode(trap), file)
    config = config_of(folder, allow_pickle=True)
    with pytest.raises(OSError, match="cannot be loaded"):
        load_pipeline(config, find_model(config))
    assert not trap.exists()


def test_a_pickle_beside_safetensors_is_left_alone(folder: Path) -> None:
    before = digest_model(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    for allow_pickle in (False, True):
        config = config_of(folder, allow_pickle=allow_pickle)
        assert len(next(DiffusionGenerator(config, find_model(config), 2).generate(REQUESTS, 0)).images) == 2
    assert digest_model(folder) == before


def test_a_pickled_tiny_vae_is_refused_too(folder: Path, tmp_path: Path) -> None:
    save_tiny_vae(tmp_path / "tiny-vae")
    pickled = pickle_weights(tmp_path, "tiny-vae")
    with pytest.raises(ValueError, match=f"^{pickled} is a pickle"):
        find_model(config_of(folder, tiny_vae=str(tmp_path / "tiny-vae")))


@pytest.mark.parametrize("state", ["is missing", "is empty"])
def test_a_folder_without_its_tokenizer_is_named(folder: Path, state: str) -> None:
    shutil.rmtree(folder / "tokenizer")
    if state == "is empty":
        (folder / "tokenizer").mkdir()
    message = f"has no tokenizer: model_index.json names tokenizer, and the folder tokenizer {state}"
    with pytest.raises(FileNotFoundError, match=message):
        find_model(config_of(folder))


def test_model_identity_is_that_of_its_content(folder: Path, tiny_pipeline: Path) -> None:
    (folder / "README.md").write_text("hello")
    assert digest_model(folder) == digest_model(tiny_pipeline)
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "beta_end": 0.5}))
    assert digest_model(folder) != digest_model(tiny_pipeline)
