"""The pictures that the embedded generator learns from: rendered once, read many times.

Scene i of a bank is a function of (seed, i) alone, so a bank that was cut short goes on where it stopped.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_gen.embedded.training import replace_file
from data_gen.scene_rendering import render
from data_gen.scenes import HELD_OUT_COMBINATIONS, Description, Scene, describe, sample_scene, scene_rng

IMAGE_SIZE = 64
_CHUNK = 1000
_STREAM = "embedded-train"


@dataclass(frozen=True)
class SceneBank:
    """Rendered training scenes, none with a held-out combination.

    Args:
        images: Memory map, uint8 [N, 64, 64, 3].
        seed: Of the scenes and of their captions.
    """

    images: NDArray[np.uint8]
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int, epoch: int) -> Description:
        """Caption scene `index`, in other words each epoch."""
        return describe(
            scene_at(self.seed, index), scene_rng(self.seed, f"{_STREAM}-captions-{epoch}", index)
        )


def scene_at(seed: int, index: int) -> Scene:
    """Scene `index` of the training stream."""
    return sample_scene(scene_rng(seed, _STREAM, index), exclude=HELD_OUT_COMBINATIONS)


def build_bank(folder: Path, num_scenes: int, seed: int, num_workers: int) -> SceneBank:
    """Render what is missing of a bank, then open it.

    Args:
        folder: Where `scenes.npy` and its progress file are.
        num_scenes: Size of the bank, a multiple of 1,000.
        seed: Of the scenes.
        num_workers: Processes that render.

    Raises:
        ValueError: `num_scenes` is no multiple of 1,000, or the folder holds a bank of another size or seed.
    """
    if num_scenes < _CHUNK or num_scenes % _CHUNK:
        raise ValueError(f"num_scenes must be a positive multiple of {_CHUNK}, got {num_scenes}")
    folder.mkdir(parents=True, exist_ok=True)
    path, progress_path = folder / "scenes.npy", folder / "scenes.json"
    plan = {"num_scenes": num_scenes, "seed": seed}
    if progress_path.exists():
        progress = json.loads(progress_path.read_text())
        found = {name: progress[name] for name in plan}
        if found != plan:
            raise ValueError(f"{path} holds a bank of {found}, asked for is {plan}")
        images = np.lib.format.open_memmap(path, mode="r+")
    else:
        progress = plan | {"chunks": []}
        shape = (num_scenes, IMAGE_SIZE, IMAGE_SIZE, 3)
        images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    missing = [start for start in range(0, num_scenes, _CHUNK) if start not in progress["chunks"]]
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        jobs = pool.map(_render_chunk, [seed] * len(missing), missing)
        for start, chunk in zip(missing, tqdm(jobs, "render", len(missing), unit="k"), strict=True):
            images[start : start + _CHUNK] = chunk
            images.flush()
            progress["chunks"].append(start)
            replace_file(progress_path, json.dumps(progress))
    return SceneBank(np.lib.format.open_memmap(path, mode="r"), seed)


def _render_chunk(seed: int, start: int) -> NDArray[np.uint8]:
    pixels = (scene_rng(seed, f"{_STREAM}-pixels", index) for index in range(start, start + _CHUNK))
    scenes = (scene_at(seed, index) for index in range(start, start + _CHUNK))
    return np.stack([render(scene, rng, IMAGE_SIZE) for scene, rng in zip(scenes, pixels, strict=True)])
