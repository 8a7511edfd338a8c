"""The judge of the embedded generator: a classifier that reads the attributes of a one-object scene.

It learns from the renderer alone (all combinations, its own random streams) and never sees a generated image.
`python benchmarks/scene_judge.py` trains it where it is missing and prints its accuracy on fresh renderings.
"""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from data_gen import scene_rendering, scenes
from data_gen.scene_rendering import render
from data_gen.scenes import CATEGORIES, Scene, attributes_of, sample_scene, scene_rng

FOLDER = Path("runs/scene_judge")
NUM_TRAIN, NUM_TEST = 40_000, 4_000
_NUM_EPOCHS, _NUM_PER_STEP, _LEARNING_RATE = 8, 64, 2e-3
_CHUNK = 500


class SceneJudge(nn.Module):
    """A residual network with one answer an attribute, in the order of `CATEGORIES`.

    Shapes:
        forward: float [B, 3, 64, 64] in [-1, 1] -> tuple of logits [B, values].
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, stride=2)
        self.stages = nn.Sequential(
            _Residual(32), _convolution(32, 64, stride=2), _Residual(64), _convolution(64, 128, stride=2),
            _Residual(128), _Residual(128),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.1)
        self.answers = nn.Linear(2 * 128, sum(map(len, CATEGORIES.values())))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of each attribute."""
        maps = self.stages(self.stem(images))
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return self.answers(self.dropout(pooled)).split([len(v) for v in CATEGORIES.values()], dim=1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _convolution(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()
    )


@torch.inference_mode()
def judge_images(judge: SceneJudge, images: NDArray[np.uint8]) -> dict[str, NDArray[np.int64]]:
    """Name the class index of every attribute of every image.

    Shapes:
        images: uint8 [N, 64, 64, 3]; each returned array is [N].
    """
    answers = [
        torch.stack([some.argmax(dim=1) for some in judge(_to_signed(images[start : start + 256]))])
        for start in range(0, len(images), 256)
    ]
    return dict(zip(CATEGORIES, torch.cat(answers, dim=1).numpy(), strict=True))


def labels_of(scene: Scene) -> list[int]:
    """Class index of each attribute of a one-object scene."""
    return [CATEGORIES[name].index(value) for name, value in attributes_of(scene).items()]


def render_labelled(stream: str, num_scenes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render one-object scenes of a random stream: images [N, 64, 64, 3], labels [N, attributes]."""
    starts = range(0, num_scenes, _CHUNK)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        chunks = list(tqdm(pool.map(_render_chunk, [stream] * len(starts), starts), stream, len(starts)))
    images, labels = zip(*chunks, strict=True)
    return np.concatenate(images)[:num_scenes], np.concatenate(labels)[:num_scenes]


def _render_chunk(stream: str, start: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = [], []
    for index in range(start, start + _CHUNK):
        rng = scene_rng(0, stream, index)
        scene = sample_scene(rng, num_objects=1)
        images.append(render(scene, rng))
        labels.append(labels_of(scene))
    return np.stack(images), np.array(labels, dtype=np.int64)


def load_judge() -> tuple[SceneJudge, dict[str, float]]:
    """Return the judge, trained where missing, and its accuracy by attribute on `NUM_TEST` renderings."""
    path = FOLDER / f"judge-{_digest_recipe()}.pt"
    torch.manual_seed(0)
    judge = SceneJudge()
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(_train(judge), temporary)
        os.replace(temporary, path)
    judge.load_state_dict(torch.load(path, weights_only=True))
    judge.eval()
    images, labels = render_labelled("judge-test", NUM_TEST)
    given = judge_images(judge, images)
    accuracies = {name: float((given[name] == labels[:, i]).mean()) for i, name in enumerate(CATEGORIES)}
    return judge, accuracies


def _digest_recipe() -> str:
    """Of the code that makes the judge what it is: renderer, grammar, this file."""
    sources = (scene_rendering.__file__, scenes.__file__, __file__)
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:12]


def _train(judge: SceneJudge) -> dict[str, Tensor]:
    images, labels = render_labelled("judge-train", NUM_TRAIN)
    targets = torch.from_numpy(labels)
    judge.to(memory_format=torch.channels_last)
    num_steps = _NUM_EPOCHS * (NUM_TRAIN // _NUM_PER_STEP)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_steps)
    for _ in tqdm(range(_NUM_EPOCHS), "judge"):
        order = torch.randperm(NUM_TRAIN)
        for rows in order[: num_steps // _NUM_EPOCHS * _NUM_PER_STEP].view(-1, _NUM_PER_STEP):
            with torch.autocast("cpu", torch.bfloat16):
                logits = judge(_soften(_to_signed(images[rows.numpy()])))
            losses = [F.cross_entropy(some.float(), targets[rows, i]) for i, some in enumerate(logits)]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return judge.state_dict()


def _soften(images: Tensor) -> Tensor:
    """Blur half of the batches a little: the judge is to name what is shown, however sharp it is."""
    if torch.rand(()) < 0.5:
        return images
    sigma = 0.3 + 0.7 * torch.rand(()).item()
    return gaussian_blur(images, [5, 5], [sigma, sigma])


def _to_signed(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


if __name__ == "__main__":
    for name, accuracy in load_judge()[1].items():
        print(f"{name:12} {accuracy:.2%}")
