"""Datasets for the pages of `stablerep browse`, written without a model or a job."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_gen.captions import caption_id
from data_gen.shard_writer import ShardWriter, write_manifest
from data_gen.shards import SCHEMA_VERSION, DatasetManifest, Sample, hash_settings, list_complete_shards

FINGERPRINT = "0123456789ab"
HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\"> & <b>bold</b> “quoted” 'single'",
    "<!-- <script> \\u003c ${1} `tick` \u2028 line",
    "😀 a cat 🐈‍⬛ on a sofa",
    "שלום עולם: כדור אדום על הדשא",
    "猫と犬",
]
"""Captions that end a script, an attribute or a comment if they are not escaped, and other alphabets."""
_SHAPES = ("circle", "star", "ring")
NUM_IMAGES = 3
_NUM_CAPTIONS_PER_SHARD = 50
FAILURES = {
    "a failed <i>caption</i>": "safety_checker",
    "another failed one": "non_finite",
    "a third": "non_finite",
}
"""Captions without images."""


def build_manifest(num_captions: int, num_captions_per_shard: int, **changes: Any) -> DatasetManifest:
    """A plan; keywords change its fields."""
    settings = {"generator": {"model": "embedded", "guidance_scale": [2.0, 8.0]}, "seed": 0}
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "settings_hash": hash_settings(settings),
        "captions_source": {"name": "captions.txt", "num_lines_read": num_captions},
        "caption_files": (),
        "extra_columns": {},
        "num_captions": num_captions,
        "num_images_per_caption": 3,
        "num_captions_per_shard": num_captions_per_shard,
        "num_shards": -(-num_captions // num_captions_per_shard),
        "fingerprint": {"torch": "2.10.0", "device": "cpu"},
    }
    return DatasetManifest(**(fields | changes))


def build_sample(
    caption: str, images: Sequence[bytes], size: tuple[int, int], extra: Mapping[str, Any], **changes: Any
) -> Sample:
    """A sample whose seeds and guidance scales are functions of the caption and the image's index."""
    identity = caption_id(caption)
    seeds = [hashlib.sha256(f"{identity}/{index}".encode()).hexdigest()[:32] for index in range(len(images))]
    fields: dict[str, Any] = {
        "key": identity,
        "caption_id": identity,
        "caption": caption,
        "images": tuple(images),
        "image_extension": "jpg",
        "image_seeds": tuple(seeds),
        "width": size[0],
        "height": size[1],
        "guidance_scales": tuple(2.0 + 2.0 * index for index in range(len(images))),
        "fingerprints": (FINGERPRINT,) * len(images),
        "extra": dict(extra),
    }
    return Sample(**(fields | changes))


def encode_jpeg(pixels: Any) -> bytes:
    """A JPEG of an array [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def draw_images(caption: str, num_images: int, size: tuple[int, int] = (16, 16)) -> list[bytes]:
    """Plain images, each of a colour of its own."""
    rng = np.random.default_rng(list(caption.encode()))
    return [
        encode_jpeg(np.full((*size[::-1], 3), rng.integers(256, size=3), np.uint8)) for _ in range(num_images)
    ]


def write_dataset(
    root: Path,
    captions: Sequence[str],
    num_captions_per_shard: int,
    failures: Mapping[str, str] | None = None,
    extras: Mapping[str, Mapping[str, Any]] | None = None,
    size: tuple[int, int] = (16, 16),
    images: Mapping[str, Sequence[bytes]] | None = None,
    **changes: Any,
) -> DatasetManifest:
    """Writes a finished dataset.

    Args:
        root: Its folder.
        captions: In order.
        num_captions_per_shard: Captions of each shard but the last.
        failures: Caption → reason, for those without images.
        extras: Caption → values of its extra columns.
        size: Width and height of the images.
        images: Caption → its images; None draws plain ones.
        changes: Of the manifest.
    """
    failures, extras = failures or {}, extras or {}
    manifest = build_manifest(len(captions), num_captions_per_shard, **changes)
    root.mkdir(parents=True)
    write_manifest(root, manifest)
    for shard_index in range(manifest.num_shards):
        first = shard_index * num_captions_per_shard
        planned = captions[first : first + num_captions_per_shard]
        with ShardWriter(root, manifest, shard_index) as writer:
            for caption in planned:
                if caption in failures:
                    writer.fail(caption_id(caption), caption, failures[caption])
                    continue
                drawn = (
                    images[caption] if images else draw_images(caption, manifest.num_images_per_caption, size)
                )
                writer.write(build_sample(caption, drawn, size, extras.get(caption, {})))
            writer.publish(num_planned=len(planned), seconds=1.0)
    return manifest


def add_column(root: Path, shard_name: str, name: str, values: pa.Array) -> None:
    """Adds a column with one value an image to a shard's side-car, as curation does."""
    path, marker = root / f"{shard_name}.parquet", root / f"{shard_name}_stats.json"
    pq.write_table(pq.read_table(path).append_column(name, values), path)
    stats = json.loads(marker.read_text())
    content = path.read_bytes()
    stats["parquet"] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    marker.write_text(json.dumps(stats))


def _caption_of(index: int) -> str:
    return HOSTILE[index] if index < len(HOSTILE) else f"a {_SHAPES[index % 3]} of colour {index}"


def write_mixed_dataset(root: Path) -> Path:
    """130 captions in three shards, three of them failed, with a score in the first and the last shard."""
    captions = [_caption_of(index) for index in range(127)]
    for place, caption in zip((7, 60, 61), FAILURES, strict=True):
        captions.insert(place, caption)
    extras = {
        caption: {
            "shape": _SHAPES[index % 3],
            "source": f"web-{index:03d}",
            "is_photo": index % 2 == 0,
            "big": 2**60 + index % 2,
        }
        for index, caption in enumerate(captions)
    }
    types = {"shape": "string", "source": "string", "is_photo": "bool", "big": "int64"}
    write_dataset(
        root,
        captions,
        _NUM_CAPTIONS_PER_SHARD,
        FAILURES,
        extras,
        extra_columns=types,
        num_images_per_caption=NUM_IMAGES,
        note="A note with <b>markup</b>.",
    )
    rng = np.random.default_rng(0)
    for shard_name in ("00000", "00002"):
        num_rows = pq.read_metadata(root / f"{shard_name}.parquet").num_rows
        scores = rng.normal(size=num_rows)
        scores[5] = np.nan
        add_column(root, shard_name, "score", pa.array(scores))
        add_column(root, shard_name, "embedding", pa.array([[0.0, 1.0]] * num_rows))
    return root


def read_images(dataset: Path) -> list[dict[str, Any]]:
    """The rows of the side-cars, in order: what filters are compared with."""
    names = [shard.parquet_name for shard in list_complete_shards(dataset)]
    return [row for name in names for row in pq.read_table(dataset / name).to_pylist()]
