"""Images a second of one core, from JPEG files in memory to normalised 224-pixel strong views.

    python benchmarks/data.py

Against the usual pipeline, torchvision v1 image by image on PIL images: RandomResizedCrop, ColorJitter,
grayscale, PIL's blur, flip, ToTensor, Normalize. Ours is counted twice: all on the core, and the worker's
part alone, where an accelerator runs the batched stage. Six views of a caption at a time, each of another
image.

A process pinned to one core makes the views of a few captions by each side in turns; a ratio is that of two
neighbours, time is the processor's own. Sources are smooth random fields with detail at each scale, JPEG of
quality 95. Verification is the sha256 of a whole shard of ten images a caption, against the time in which a
worker makes its views once.

Writes benchmarks/results/{name}.{json,md}.
"""

import hashlib
import io
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision import transforms

from stablerep import augment
from stablerep.augment import STRONG_VIEW, augment_batch, draw_views
from stablerep.backbones import IMAGENET_MEAN, IMAGENET_STD
from stablerep.data import decoding
from stablerep.data.decoding import decode_views
from stablerep.data.verification import VerifiedFiles
from stablerep.machine import describe_processor

RESULTS = Path(__file__).parent / "results"
NUM_VIEWS = 6
NUM_IMAGES = 10
VIEW_SIZE = 224
_NUM_VERIFICATIONS = 5
Side = Callable[[list[bytes], int], object]


def measure(
    sizes: tuple[int, ...] = (256, 512),
    num_rounds: int = 15,
    num_captions_per_turn: int = 4,
    core: int = 0,
    name: str = "data",
) -> None:
    """Measure and print; see the module.

    Args:
        sizes: Sides of the source images, pixels.
        num_rounds: Turns of each side.
        num_captions_per_turn: Captions of six views that a side makes in a turn.
        core: Index of the core among those that may be used.
        name: Name of the result files.
    """
    context = multiprocessing.get_context("spawn")
    sources: dict[str, Any] = {}
    for size in sizes:
        with context.Pool(1) as pool:
            sources[str(size)] = pool.apply(_measure_size, (size, num_rounds, num_captions_per_turn, core))
    result = {"processor": describe_processor(), "torch": torch.__version__, "sources": sources}
    table = build_table(result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


def _measure_size(size: int, num_rounds: int, num_captions: int, core: int) -> dict[str, Any]:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    torch.set_num_threads(1)
    images = [encode(draw_field(np.random.default_rng(seed), size)) for seed in range(2 * NUM_VIEWS)]
    sides: dict[str, Side] = {
        "torchvision v1": make_usual_views,
        "ours, all on the core": make_our_views,
        "ours, the worker's part": make_worker_views,
        "decoding alone": decode_alone,
        "decoding alone, Pillow": decode_with_pillow,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(num_rounds + 1):
        for side, make in sides.items():
            start = time.process_time()
            for index in range(num_captions):
                make(images[index % 2 * NUM_VIEWS :][:NUM_VIEWS], turn * num_captions + index)
            if turn:  # the first warms up
                seconds[side].append((time.process_time() - start) / num_captions / NUM_VIEWS)
    return {
        "num_bytes": statistics.mean(map(len, images)),
        "seconds_per_view": seconds,
        "parts_seconds": measure_parts(images, num_rounds),
        "verification_fraction": measure_verification(
            images, statistics.median(seconds["ours, the worker's part"])
        ),
    }


def draw_field(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """A smooth random image with detail at each scale, uint8 [size, size, 3]."""
    field = np.full((size, size, 3), 128.0)
    cells = 4
    while cells <= size // 4:
        noise = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(noise[..., channel]).resize((size, size), Image.Resampling.BICUBIC)
            field[..., channel] += 40 * np.asarray(plane) / np.log2(cells) ** 1.2
        cells *= 2
    return field.clip(0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class PillowBlur:
    """GaussianBlur as the public training scripts have it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


USUAL = transforms.Compose(
    [
        transforms.RandomResizedCrop(VIEW_SIZE, (0.08, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([PillowBlur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def make_usual_views(images: list[bytes], seed: int) -> None:
    """The usual pipeline."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.stack([USUAL(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])


def make_worker_views(images: list[bytes], seed: int) -> augment.Colours:
    """What a worker does, the batched stage left to an accelerator."""
    return _make_worker_views(images, seed)[1]


def _make_worker_views(images: list[bytes], seed: int) -> tuple[torch.Tensor, augment.Colours]:
    shape = (len(images), VIEW_SIZE, VIEW_SIZE, 3)
    out = torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    draws = draw_views(np.random.default_rng([0, seed]), len(images), STRONG_VIEW)
    decode_views(images, [""] * len(images), draws, STRONG_VIEW, out)
    return out, draws.colours


def make_our_views(images: list[bytes], seed: int) -> None:
    """Everything on the core."""
    views, colours = _make_worker_views(images, seed)
    augment_batch(views, colours, STRONG_VIEW, IMAGENET_MEAN, IMAGENET_STD)


def decode_alone(images: list[bytes], _: int) -> None:
    """Whole images, by the decoder that we use: the limit of any pipeline that decodes each view's image."""
    for data in images:
        simplejpeg.decode_jpeg(data)


def decode_with_pillow(images: list[bytes], _: int) -> None:
    """Whole images, by the usual decoder."""
    for data in images:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def measure_parts(images: list[bytes], num_rounds: int) -> dict[str, float]:
    """Seconds of each part, where it is done."""
    x = torch.rand(1, 3, VIEW_SIZE, VIEW_SIZE)
    views = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    decoded = torch.from_numpy(simplejpeg.decode_jpeg(images[0])).permute(2, 0, 1)
    rng = np.random.default_rng(0)
    one = torch.ones(1)
    size = decoded.shape[-1]
    parts: dict[str, Callable[[], object]] = {
        "draw (a view)": lambda: draw_views(rng, NUM_VIEWS, STRONG_VIEW),
        "decode": lambda: decoding.decode_image(images[0], ""),
        "decode at ½": lambda: simplejpeg.decode_jpeg(
            images[0], min_height=size // 2, min_width=size // 2, min_factor=2
        ),
        "crop and resize, half of the area": lambda: decoding.resized_crop(
            decoded, (9, 7, int(size * 0.7), int(size * 0.7)), VIEW_SIZE
        ),
        "to float": lambda: views / 255,
        "brightness": lambda: augment.adjust_brightness_(x, one),
        "contrast": lambda: augment.adjust_contrast_(x, one),
        "saturation": lambda: augment.adjust_saturation_(x, one),
        "hue": lambda: augment.adjust_hue_(x, one / 10),
        "grayscale": lambda: augment.to_grayscale(x),
        "blur, sigma 1": lambda: augment.gaussian_blur(x, one, 13),
        "normalise": lambda: augment.normalize(x, IMAGENET_MEAN, IMAGENET_STD),
    }
    return {
        name: _median_seconds(part, num_rounds) / (NUM_VIEWS if name.startswith("draw") else 1)
        for name, part in parts.items()
    }


def _median_seconds(part: Callable[[], object], num_rounds: int) -> float:
    taken = []
    for _ in range(num_rounds + 1):
        start = time.process_time()
        for _ in range(10):
            part()
        taken.append((time.process_time() - start) / 10)
    return statistics.median(taken[1:])


def measure_verification(images: list[bytes], seconds_per_view: float) -> float:
    """Seconds of hashing a shard, over those in which a worker makes its views once."""
    num_captions = 100
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "00000.tar")
        content = b"".join(images[index % len(images)] for index in range(num_captions * NUM_IMAGES))
        path.write_bytes(content)
        sha256 = digest(content)
        taken = []
        for index in range(_NUM_VERIFICATIONS):
            start = time.process_time()
            VerifiedFiles(Path(folder, str(index)), "benchmark").check(path, 0, len(content), sha256)
            taken.append(time.process_time() - start)
    return statistics.median(taken) / (num_captions * NUM_VIEWS * seconds_per_view)


def digest(content: bytes) -> str:
    """sha256, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def build_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"One core of {result['processor']}, torch {result['torch']}; views of {VIEW_SIZE} pixels, "
        f"{NUM_VIEWS} of {NUM_IMAGES} images a caption; median (least to greatest) of the turns.",
        "",
        "| source | side | images/s | against torchvision v1 |",
        "|---|---|---|---|",
    ]
    for size, source in result["sources"].items():
        usual = source["seconds_per_view"]["torchvision v1"]
        for side, seconds in source["seconds_per_view"].items():
            ratios = [a / b for a, b in zip(usual, seconds, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"| {size} px | {side} | {1 / statistics.median(seconds):,.0f} | {spread} |")
    heads = [f"{size} px, ms" for size in result["sources"]]
    lines += ["", "| part | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for part in next(iter(result["sources"].values()))["parts_seconds"]:
        cells = [f"{source['parts_seconds'][part] * 1e3:.3f}" for source in result["sources"].values()]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    shares = [
        f"{source['verification_fraction']:.1%} at {size} px ({source['num_bytes'] / 1e3:.0f} kB an image)"
        for size, source in result["sources"].items()
    ]
    lines += ["", f"Verification, of a worker's first epoch: {', '.join(shares)}; nothing afterwards."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(measure)
