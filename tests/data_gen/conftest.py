"""Captions, jobs over the tiny pipeline of tests/conftest.py, and finished datasets."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_gen.diffusion.models import GeneratorConfig
from data_gen.job.generate import GenerateConfig, run

CAPTIONS = [
    "a red cube",
    "two green spheres on grass",
    "ein blauer Ring, größer als ein Haus",
    "猫と犬",
    "a dog",
]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread costs more than it gives to a network this small, above all on a busy machine."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def captions_file(tmp_path: Path) -> Path:
    """Five captions, one a line."""
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make_config(tiny_pipeline: Path, captions_file: Path, tmp_path: Path) -> Callable[..., GenerateConfig]:
    """Builds the config of a job of three shards (2 + 2 + 1 captions); keywords change it."""

    def make(**changes: Any) -> GenerateConfig:
        sampling = {
            "model": str(tiny_pipeline),
            "num_inference_steps": 2,
            "device": "cpu",
            **changes.pop("generator", {}),
        }
        settings: dict[str, Any] = {
            "captions": str(captions_file),
            "output": str(tmp_path / "dataset"),
            "num_images_per_caption": 3,
            "num_captions_per_shard": 2,
            "num_images_per_batch": 4,
        }
        return GenerateConfig(**{**settings, **changes}, generator=GeneratorConfig(**sampling))

    return make


@pytest.fixture(scope="package")
def finished_dataset(one_thread: None, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job of `make_config` writes without a disturbance; not to be altered."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    config = GenerateConfig(
        captions=str(folder / "captions.txt"),
        output=str(folder / "dataset"),
        generator=GeneratorConfig(model=str(tiny_pipeline), num_inference_steps=2, device="cpu"),
        num_images_per_caption=3,
        num_captions_per_shard=2,
        num_images_per_batch=4,
    )
    assert run(config) == 0
    return folder / "dataset"


@pytest.fixture
def dataset_copy(finished_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the finished dataset where `make_config` would write it; may be damaged."""
    return Path(shutil.copytree(finished_dataset, tmp_path / "dataset"))
