"""The pages of a large dataset: how long they take to write, and to open.

    python benchmarks/browse.py [--num_captions 25000] [--num_images 4] [--image_size 64] [--num_threads null]

The dataset is of rendered scenes, of which a few hundred are drawn and used again, with a score that is
random. Each view is opened from disk in headless Chromium, whose own start (an empty page) is subtracted from
the time until the page and everything that it asked for is there.

Writes benchmarks/results/browse.md.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from tqdm import tqdm

from data_gen.browse import BrowseConfig, run
from data_gen.captions import caption_id
from data_gen.images import encode_image
from data_gen.scene_rendering import render
from data_gen.scenes import describe, sample_scene, scene_rng
from data_gen.shard_writer import ShardWriter, write_manifest
from data_gen.shards import SCHEMA_VERSION, DatasetManifest, Sample, hash_settings

RESULTS = Path(__file__).parent / "results"
NUM_SCENES = 200
NUM_CAPTIONS_PER_SHARD = 1000
NUM_OPENINGS = 5
VIEWS = {
    "first page": "",
    "words in the caption": "q=heart+grass",
    "score from 0.9": "min.score=0.9",
    "sorted by score": "sort=high.score",
    "seed begins with": "id=abc",
    "one caption": "at=00000.7",
}


def measure(
    num_captions: int = 25_000, num_images: int = 4, image_size: int = 64, num_threads: int | None = None
) -> None:
    """Measure and print; see the module.

    Args:
        num_captions: Captions of the dataset.
        num_images: Images of each caption.
        image_size: Side of the images in pixels.
        num_threads: Shards read at the same time; null is one a core.
    """
    chromium = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder:
        dataset, pages = Path(folder) / "dataset", Path(folder) / "pages"
        write_dataset(dataset, num_captions, num_images, image_size)
        start = time.perf_counter()
        run(BrowseConfig(str(dataset), str(pages), num_threads=num_threads))
        seconds = time.perf_counter() - start
        num_bytes = sum(path.stat().st_size for path in pages.rglob("*") if path.is_file())
        lines = [
            f"{num_captions:,} captions with {num_images} images of {image_size} × {image_size} pixels each: "
            f"{seconds:.0f} s to write, {num_captions * num_images / seconds:,.0f} images a second on "
            f"{num_threads or os.cpu_count()} threads; {num_bytes / 1e6:,.0f} MB.",
            "",
            f"| view | seconds, median of {NUM_OPENINGS} | elements | captions found |",
            "|---|---|---|---|",
        ]
        if chromium is not None:
            profile = Path(folder) / "profile"
            open_page(chromium, profile, "about:blank")  # the profile is made
            empty, _ = open_repeatedly(chromium, profile, "about:blank")
            for name, hash_ in VIEWS.items():
                seconds, document = open_repeatedly(
                    chromium, profile, f"{(pages / 'index.html').as_uri()}#{hash_}"
                )
                status = re.search(r'id="status"[^>]*>([^<]*)', document)
                found = status[1] if status else "?"
                num_elements = len(re.findall(r"<[a-z]", document))
                lines.append(f"| {name} | {seconds - empty:.2f} | {num_elements:,} | {found} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "browse.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def write_dataset(root: Path, num_captions: int, num_images: int, image_size: int) -> None:
    """A dataset of scenes, each used again under other captions."""
    scenes = [draw_scene(index, num_images, image_size) for index in tqdm(range(NUM_SCENES), "render")]
    settings = {"generator": {"model": "scenes"}, "seed": 0}
    manifest = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        settings_hash=hash_settings(settings),
        captions_source={},
        caption_files=(),
        extra_columns={"score": "double"},
        num_captions=num_captions,
        num_images_per_caption=num_images,
        num_captions_per_shard=NUM_CAPTIONS_PER_SHARD,
        num_shards=-(-num_captions // NUM_CAPTIONS_PER_SHARD),
        fingerprint={},
    )
    root.mkdir()
    write_manifest(root, manifest)
    numbers = iter(range(num_captions))
    for shard_index in tqdm(range(manifest.num_shards), "write"):
        with ShardWriter(root, manifest, shard_index) as writer:
            planned = list(islice(numbers, NUM_CAPTIONS_PER_SHARD))
            for number in planned:
                writer.write(build_sample(number, *scenes[number % NUM_SCENES], image_size))
            writer.publish(num_planned=len(planned), seconds=1.0)


def draw_scene(index: int, num_images: int, image_size: int) -> tuple[str, tuple[bytes, ...]]:
    """A caption, and its images as they are stored."""
    rng = scene_rng(0, "browse", index)
    scene = sample_scene(rng)
    pictures = (render(scene, rng, image_size) for _ in range(num_images))
    return describe(scene, rng).text, tuple(encode_image(picture, "jpg", 90, None)[0] for picture in pictures)


def build_sample(number: int, text: str, images: tuple[bytes, ...], image_size: int) -> Sample:
    """A scene as the sample of this number."""
    caption = f"{text}, number {number}"
    rng = np.random.default_rng(number)
    return Sample(
        key=caption_id(caption),
        caption_id=caption_id(caption),
        caption=caption,
        images=images,
        image_extension="jpg",
        image_seeds=tuple(rng.bytes(16).hex() for _ in images),
        width=image_size,
        height=image_size,
        guidance_scales=tuple(rng.uniform(2, 8, len(images)).tolist()),
        fingerprints=("0" * 12,) * len(images),
        extra={"score": float(rng.uniform())},
    )


def open_repeatedly(chromium: str, profile: Path, url: str) -> tuple[float, str]:
    """The median of the seconds until the page is whole, and its document then."""
    opened = [open_page(chromium, profile, url) for _ in range(NUM_OPENINGS)]
    return float(np.median([seconds for seconds, _ in opened])), opened[0][1]


def open_page(chromium: str, profile: Path, url: str) -> tuple[float, str]:
    """Seconds until the page is whole, and its document then."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [chromium, *flags, f"--user-data-dir={profile}", "--dump-dom", url]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=True, timeout=300)
    return time.perf_counter() - start, done.stdout.decode("utf-8")


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
