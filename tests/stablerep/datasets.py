"""Small datasets of random images, written by the writer of `stablerep generate`."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_gen.captions import caption_id
from data_gen.shard_writer import ShardWriter, write_manifest
from data_gen.shards import SCHEMA_VERSION, DatasetManifest, Sample, hash_settings


def encode_noise(rng: np.random.Generator, size: int, image_format: str = "JPEG") -> bytes:
    """An image file of one random colour with a little noise."""
    pixels = rng.integers(0, 200, size=3) + rng.integers(0, 50, size=(size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, image_format)
    return buffer.getvalue()


def build_sample(caption: str, num_images: int, size: int, corrupt: bool = False) -> Sample:
    """A caption with random images; a corrupt one has its first image cut off."""
    identity = caption_id(caption)
    rng = np.random.default_rng(int(identity, 16))
    images = [encode_noise(rng, size) for _ in range(num_images)]
    if corrupt:
        images[0] = images[0][:40]
    seeds = tuple(f"{index:032x}" for index in range(num_images))
    return Sample(
        key=identity,
        caption_id=identity,
        caption=caption,
        images=tuple(images),
        image_extension="jpg",
        image_seeds=seeds,
        width=size,
        height=size,
        guidance_scales=(2.0,) * num_images,
        fingerprints=("0123456789ab",) * num_images,
    )


def write_dataset(
    root: Path,
    num_captions_of_shards: list[int],
    num_images: int = 4,
    size: int = 16,
    corrupt: frozenset[int] | set[int] = frozenset(),
    prefix: str = "",
    empty: frozenset[int] | set[int] = frozenset(),
) -> list[str]:
    """Writes shards of the given numbers of captions; returns the captions in order.

    The captions whose indices are in `corrupt` have an image that cannot be decoded, those in `empty` have no
    text; all others begin with `prefix`.
    """
    captions = [f"{prefix} caption number {index}".strip() for index in range(sum(num_captions_of_shards))]
    root.mkdir(parents=True, exist_ok=True)
    settings = {"generator": {"model": "none"}, "num_images": num_images, "size": size}
    manifest = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        settings_hash=hash_settings(settings),
        captions_source={"files": [{"name": "captions.txt"}]},
        caption_files=(),
        extra_columns={},
        num_captions=len(captions),
        num_images_per_caption=num_images,
        num_captions_per_shard=max(num_captions_of_shards, default=1),
        num_shards=max(1, len(num_captions_of_shards)),
        fingerprint={},
    )
    write_manifest(root, manifest)
    first = 0
    for shard_index, num_captions in enumerate(num_captions_of_shards):
        with ShardWriter(root, manifest, shard_index) as writer:
            for index in range(first, first + num_captions):
                sample = build_sample(captions[index], num_images, size, corrupt=index in corrupt)
                writer.write(replace(sample, caption="") if index in empty else sample)
            writer.publish(num_planned=num_captions, seconds=1.0)
        first += num_captions
    return captions


def write_image_folder(root: Path, num_images: int = 6, size: int = 16) -> None:
    """`train/` and `test/` with two classes of random images."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("circle", "square"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(num_images):
                (folder / f"{index}.png").write_bytes(encode_noise(rng, size, "PNG"))


def write_labelled_tar(path: Path, num_samples: int, size: int = 16) -> list[int]:
    """`{key}.jpg` and `{key}.cls`; returns the labels."""
    rng = np.random.default_rng(0)
    labels = [int(label) for label in rng.integers(0, 3, size=num_samples)]
    members = [
        member
        for index, label in enumerate(labels)
        for member in ((f"{index:04}.cls", str(label).encode()), (f"{index:04}.jpg", encode_noise(rng, size)))
    ]
    write_tar(path, members)
    return labels


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar of regular members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
