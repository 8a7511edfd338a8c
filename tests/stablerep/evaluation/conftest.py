"""Small labelled sets and a model that needs no training, all made in tmp_path."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stablerep.evaluation.extraction import ExtractionSettings
from tests.stablerep.evaluation.fake_model import FakeModel

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 40, 30)}


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def settings() -> ExtractionSettings:
    return ExtractionSettings(
        num_images_per_batch=8, num_workers=0, precision="float32", device=torch.device("cpu")
    )


@pytest.fixture
def encode_image() -> Callable[[str, int], bytes]:
    """A 20×24 PNG of noise around a colour, by name and seed."""

    def encode(colour: str, seed: int) -> bytes:
        noise = np.random.default_rng(seed).integers(-25, 26, (24, 20, 3))
        buffer = io.BytesIO()
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_folders(tmp_path: Path, encode_image: Callable[[str, int], bytes]) -> Callable[..., Path]:
    """`write_folders(train=4, test=2)`: a set of class folders with so many images of each colour."""

    def write(**num_images_per_class: int) -> Path:
        root = tmp_path / "folders"
        for split_index, (split, count) in enumerate(num_images_per_class.items()):
            for class_index, colour in enumerate(COLOURS):
                folder = root / split / colour
                folder.mkdir(parents=True)
                for index in range(count):
                    seed = 10_000 * split_index + 1_000 * class_index + index
                    (folder / f"{index:03d}.png").write_bytes(encode_image(colour, seed))
        return root

    return write


@pytest.fixture
def write_tar() -> Callable[[Path, dict[str, bytes]], Path]:
    """An uncompressed tar of members in their order."""

    def write(path: Path, members: dict[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def shards(
    tmp_path: Path,
    encode_image: Callable[[str, int], bytes],
    write_tar: Callable[[Path, dict[str, bytes]], Path],
) -> Path:
    """Two train shards and one test shard of six images each, labels 0, 1, 2 in turn."""
    root = tmp_path / "shards"
    for split, num_shards in {"train": 2, "test": 1}.items():
        for shard in range(num_shards):
            members = {}
            for index in range(6):
                key = f"{shard:02d}{index:03d}"
                members[f"{key}.png"] = encode_image(list(COLOURS)[index % 3], 100 * shard + index)
                members[f"{key}.cls"] = str(index % 3).encode()
            write_tar(root / split / f"{shard:05d}.tar", members)
    return root
