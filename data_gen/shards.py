"""THE CONTRACT: what a dataset of generated images is on disk, and how it is read.

    dataset.json       the plan (DatasetManifest)
    00000.tar          WebDataset; a sample is a caption: {key}.json, {key}.txt, {key}.0.jpg … {key}.{m-1}.jpg
    00000.parquet      one row an image
    00000_stats.json   counts, seconds, sha256 and sizes; written last: it is the completion marker

Nothing here imports torch or diffusers, so that a data loader's workers start quickly. The writer is in
`data_gen.shard_writer`.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_gen.captions import caption_id

SCHEMA_VERSION = 1
MANIFEST_NAME = "dataset.json"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
MAX_TEXT_MEMBER_BYTES = 1 << 20
MAX_IMAGE_MEMBER_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 64 << 20

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Path() leaves one slash of two
_MEMBER_NAME = re.compile(r"([0-9A-Za-z_-]+)\.(json|txt|(\d+)\.(jpg|png|webp))")


class ShardError(ValueError):
    """A shard that is not what its completion marker says; the message names the shard and the difference."""


@dataclass(frozen=True)
class Sample:
    """One caption and all of its images: the unit of a shard.

    Args:
        key: Name of the sample inside its tar; unique over the dataset, without a dot.
        caption_id: Identity of the caption by content (32 hex digits); equal captions have equal ids.
        caption: Normalised caption.
        images: Encoded image files, in order of the image index.
        image_extension: `jpg`, `png` or `webp`.
        image_seeds: The 128-bit noise key of each image, 32 hex digits.
        width: Width of every image, in pixels.
        height: Height of every image, in pixels.
    """

    key: str
    caption_id: str
    caption: str
    images: tuple[bytes, ...]
    image_extension: str
    image_seeds: tuple[str, ...]
    width: int
    height: int


@dataclass(frozen=True)
class DatasetManifest:
    """The plan of a dataset, frozen in `dataset.json` before the first image is made.

    Args:
        schema_version: Version of the on-disk format.
        settings: Every setting that changes an image or its place: generator, captions' digest, seed, sizes.
        settings_hash: `hash_settings(settings)`.
        captions_source: Where the captions came from: file name, digest, counts of what was read and dropped.
        num_captions: Captions planned, all shards together.
        num_images_per_caption: Images of each caption, the same for all.
        num_captions_per_shard: Captions planned for each shard but the last.
        num_shards: Shards planned.
        fingerprint: Machine settings within which images are equal bit for bit (torch, device, dtype, batch
            shape); not part of the settings hash.
    """

    schema_version: int
    settings: Mapping[str, Any]
    settings_hash: str
    captions_source: Mapping[str, Any]
    num_captions: int
    num_images_per_caption: int
    num_captions_per_shard: int
    num_shards: int
    fingerprint: Mapping[str, Any]

    def shard_name(self, shard_index: int) -> str:
        """Name of a shard, padded so that names sort by index: `00000`, `00001`, …"""
        return f"{shard_index:0{max(5, len(str(self.num_shards - 1)))}d}"

    def num_captions_in_shard(self, shard_index: int) -> int:
        """Captions planned for a shard: `num_captions_per_shard`, fewer in the last one."""
        return min(self.num_captions_per_shard, self.num_captions - shard_index * self.num_captions_per_shard)


@dataclass(frozen=True)
class Shard:
    """A finished shard, as its completion marker describes it.

    Args:
        path: The tar.
        num_samples: Captions written (each with `num_images_per_caption` images).
        num_images: Images written.
        num_images_per_caption: Images of every sample.
        num_failed: Captions planned for the shard and not written.
        num_bytes: Size of the tar.
        sha256: Digest of the tar.
        parquet_path: The side-car with one row an image.
        parquet_num_bytes: Size of the side-car.
        parquet_sha256: Digest of the side-car.
        settings_hash: Settings of the job that made it.
    """

    path: Path
    num_samples: int
    num_images: int
    num_images_per_caption: int
    num_failed: int
    num_bytes: int
    sha256: str
    parquet_path: Path
    parquet_num_bytes: int
    parquet_sha256: str
    settings_hash: str

    @property
    def name(self) -> str:
        """Name without extension, such as `00000`."""
        return self.path.stem


def hash_settings(settings: Mapping[str, Any]) -> str:
    """sha256 of the settings as canonical JSON, 64 hex digits."""
    return hashlib.sha256(to_json(settings).encode()).hexdigest()


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, one form for equal values, no NaN."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def find_folder(root: str | Path) -> Path:
    """The dataset's folder, which may not exist yet.

    Raises:
        ValueError: It is a URL; datasets are local folders so far.
    """
    if _URL.match(str(root)):
        raise ValueError(f"{root} is a URL; a dataset must be a local (or mounted) folder")
    return Path(root)


def read_manifest(root: str | Path) -> DatasetManifest:
    """Reads `dataset.json`.

    Args:
        root: Folder of the dataset.

    Raises:
        FileNotFoundError: There is no `dataset.json`.
        ValueError: The folder is a URL.
        ShardError: It is not a manifest of this schema version.
    """
    path = find_folder(root) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{root} is not a dataset: it has no {MANIFEST_NAME}")
    values = _read_json_object(path)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ShardError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {version}")
    names = {field.name for field in dataclasses.fields(DatasetManifest)}
    if missing := sorted(names - values.keys()):
        raise ShardError(f"{path}: missing field {', '.join(missing)}")
    for name in ("num_captions", "num_images_per_caption", "num_captions_per_shard", "num_shards"):
        if type(values[name]) is not int or values[name] < 0:
            raise ShardError(f"{path}: {name} must be an integer >= 0, got {values[name]!r}")
    return DatasetManifest(**{name: values[name] for name in names})


def read_shard(root: str | Path, manifest: DatasetManifest, shard_index: int) -> Shard | None:
    """The finished shard of this index, or None where it has no completion marker.

    Reads the marker alone; `verify_shard` compares it with the files.

    Raises:
        ShardError: The marker is unreadable, or belongs to a job with other settings.
    """
    name = manifest.shard_name(shard_index)
    marker = Path(root) / f"{name}_stats.json"
    if not marker.is_file():
        return None
    stats = _read_json_object(marker)
    try:
        shard = Shard(
            path=Path(root) / f"{name}.tar",
            num_samples=int(stats["num_written"]),
            num_images=int(stats["num_images"]),
            num_images_per_caption=manifest.num_images_per_caption,
            num_failed=int(stats["num_failed"]),
            num_bytes=int(stats["tar"]["num_bytes"]),
            sha256=str(stats["tar"]["sha256"]),
            parquet_path=Path(root) / f"{name}.parquet",
            parquet_num_bytes=int(stats["parquet"]["num_bytes"]),
            parquet_sha256=str(stats["parquet"]["sha256"]),
            settings_hash=str(stats["settings_hash"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{marker}: not a completion marker ({type(error).__name__}: {error})") from error
    if shard.settings_hash != manifest.settings_hash:
        raise ShardError(
            f"{marker}: settings hash {shard.settings_hash[:16]} differs from {manifest.settings_hash[:16]} "
            f"in {MANIFEST_NAME}"
        )
    return shard


def list_complete_shards(root: str | Path) -> list[Shard]:
    """Every shard of the dataset that has its completion marker, by index.

    Raises:
        FileNotFoundError: `root` has no manifest.
        ShardError: A marker is unreadable, or belongs to other settings.
    """
    manifest = read_manifest(root)
    shards = (read_shard(root, manifest, index) for index in range(manifest.num_shards))
    return [shard for shard in shards if shard is not None]


def check_sizes(shard: Shard) -> None:
    """Compares the sizes of the tar and its side-car with the completion marker: quick, finds every cut.

    Raises:
        ShardError: A file is missing, or of another size.
    """
    _check_size(shard.path, shard.num_bytes)
    _check_size(shard.parquet_path, shard.parquet_num_bytes)


def verify_shard(shard: Shard) -> None:
    """Compares sizes and sha256 of the tar and its side-car with the completion marker.

    Only this finds every flipped bit: most of them decode to other pixels without an error.

    Raises:
        ShardError: A file is missing, of another size, or of another digest.
    """
    check_sizes(shard)
    for path, sha256 in ((shard.path, shard.sha256), (shard.parquet_path, shard.parquet_sha256)):
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != sha256:
            raise ShardError(f"{path}: sha256 is {actual[:16]}…, expected {sha256[:16]}…")


def read_samples(shard: Shard) -> Iterator[Sample]:
    """Reads a shard front to back, checked: an error rather than a sample that is not the one written.

    The size of the tar is compared with the marker before the first sample, each image with its sha256 and
    each caption with its id as they are read, and the number of samples at the end. Only regular members with
    the names of the schema are read, none larger than the caps above.

    Raises:
        ShardError: The shard is missing, truncated, altered, or holds what the schema does not know.
    """
    _check_size(shard.path, shard.num_bytes)
    num_samples = 0
    with shard.path.open("rb") as file:
        for key, members in _read_groups(shard, file):
            yield _parse_sample(shard, key, members)
            num_samples += 1
    if num_samples != shard.num_samples:
        raise ShardError(f"{shard.path}: holds {num_samples} samples, expected {shard.num_samples}")


def _read_groups(shard: Shard, file: BinaryIO) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Consecutive members of one key, by suffix (`json`, `txt`, `0.jpg`, …).

    The grouping is webdataset's own, so that a sample here is what every reader of the format takes for one;
    which members reach it, and what a sample must hold, is checked here.
    """
    # It imports torch, which those who read markers alone can do without.
    from webdataset.tariterators import group_by_keys

    try:
        for sample in group_by_keys(_read_members(shard, file), lcase=False):
            yield sample["__key__"], {name: sample[name] for name in sample if not name.startswith("__")}
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"{shard.path}: {error.args[0]}") from error


def _read_members(shard: Shard, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The members of a shard, each checked, in the form that webdataset passes between its stages."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                _check_member(shard, member)
                file.seek(member.offset_data)
                yield {"fname": member.name, "data": file.read(member.size), "__url__": str(shard.path)}
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{shard.path}: not a readable tar ({error})") from error


def _check_member(shard: Shard, member: tarfile.TarInfo) -> None:
    """Refuses what the schema does not know, before it is read."""
    match = _MEMBER_NAME.fullmatch(member.name)
    if match is None:
        raise ShardError(f"{shard.path}: unexpected member {member.name!r}")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ShardError(f"{shard.path}: member {member.name} is not a regular file")
    max_bytes = MAX_TEXT_MEMBER_BYTES if match[3] is None else MAX_IMAGE_MEMBER_BYTES
    if member.size > max_bytes:
        raise ShardError(
            f"{shard.path}: member {member.name} has {member.size} bytes, at most {max_bytes} expected"
        )


def _parse_sample(shard: Shard, key: str, members: dict[str, bytes]) -> Sample:
    where = f"{shard.path}: sample {key}"
    try:
        record = json.loads(members["json"])
        caption, extension = members["txt"].decode(), record["image_extension"]
        num_images = shard.num_images_per_caption
        sample = Sample(
            key=key,
            caption_id=record["caption_id"],
            caption=caption,
            images=tuple(members[f"{index}.{extension}"] for index in range(num_images)),
            image_extension=extension,
            image_seeds=tuple(record["image_seeds"]),
            width=record["width"],
            height=record["height"],
        )
        image_sha256 = record["image_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{where} is incomplete ({type(error).__name__}: {error})") from error
    if len(members) != num_images + 2:
        raise ShardError(f"{where} has {len(members) - 2} images, expected {num_images}")
    if caption_id(caption) != sample.caption_id:
        raise ShardError(f"{where}: its caption is not that of id {sample.caption_id}")
    if [hashlib.sha256(image).hexdigest() for image in sample.images] != image_sha256:
        raise ShardError(f"{where}: an image differs from its sha256")
    return sample


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise ShardError(f"{path}: missing, though its completion marker is there")
    if (actual := path.stat().st_size) != num_bytes:
        raise ShardError(f"{path}: has {actual} bytes, expected {num_bytes}")


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ShardError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ShardError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
