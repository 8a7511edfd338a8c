"""THE CONTRACT: what a dataset of generated images is on disk, and how it is read.

    dataset.json       the plan (DatasetManifest)
    captions/          the planned captions, in parquet files (data_gen.captions.planning)
    00000.tar          WebDataset; a sample is a caption: {key}.json, {key}.txt, {key}.0.jpg … {key}.{m-1}.jpg
    00000.parquet      one row an image
    00000_stats.json   counts, seconds, sha256 and sizes; written last: it is the completion marker
    fingerprints/      the machine settings that images were made under, by their id
    .work/             of a job that is not finished (data_gen.job.work_folder); readers need nothing of it

A dataset is a local folder or an fsspec URL. Nothing here imports torch or diffusers, so that a data loader's
workers start quickly. The writer is in `data_gen.shard_writer`.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from data_gen.captions import caption_id
from data_gen.storage import Store

SCHEMA_VERSION = 2
MANIFEST_NAME = "dataset.json"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
MAX_TEXT_MEMBER_BYTES = 1 << 20
MAX_IMAGE_MEMBER_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 64 << 20

_NUM_READING_THREADS = 16
_NUM_SHARDS_AT_ONCE = 1000
_NAMES = ("model", "tiny_vae")
"""Of the generator's settings: what people call it. Its identity stands beside them."""
_Value = TypeVar("_Value")
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
        guidance_scales: Weight of classifier-free guidance of each image.
        fingerprints: The machine settings that each image was made under: 12 hex digits, spelt out in the
            completion marker.
        occurrence: 0 for the first time that the caption occurs in the plan, then 1, 2, …
        extra: Values of the caption's extra columns (labels, ids, …).
        settings_hash: Settings of the job that made it; the writer fills in its own.
    """

    key: str
    caption_id: str
    caption: str
    images: tuple[bytes, ...]
    image_extension: str
    image_seeds: tuple[str, ...]
    width: int
    height: int
    guidance_scales: tuple[float, ...]
    fingerprints: tuple[str, ...]
    occurrence: int = 0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings_hash: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True)
class DatasetManifest:
    """The plan of a dataset, frozen in `dataset.json` before the first image is made.

    Args:
        schema_version: Version of the on-disk format.
        settings: Every setting that changes an image or its place: generator, captions' digest, seed, sizes.
        settings_hash: `hash_settings(settings)`.
        captions_source: Where the captions came from: files, digests, counts of what was read and dropped.
        caption_files: The planned captions' files, each with name, num_bytes and sha256.
        extra_columns: Columns carried along with the captions, name → string, int64, double or bool.
        num_captions: Captions planned, all shards together.
        num_images_per_caption: Images of each caption, the same for all.
        num_captions_per_shard: Captions planned for each shard but the last.
        num_shards: Shards planned.
        fingerprint: Machine settings within which images are equal bit for bit (torch, device, dtype, batch
            shape) of the machine that planned; not part of the settings hash.
        extended_from: Settings hashes of the plans with fewer images a caption whose images are taken over.
        note: A remark for the dataset card.
    """

    schema_version: int
    settings: Mapping[str, Any]
    settings_hash: str
    captions_source: Mapping[str, Any]
    caption_files: tuple[Mapping[str, Any], ...]
    extra_columns: Mapping[str, str]
    num_captions: int
    num_images_per_caption: int
    num_captions_per_shard: int
    num_shards: int
    fingerprint: Mapping[str, Any]
    extended_from: tuple[str, ...] = ()
    note: str = ""

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
        store: The dataset's folder.
        name: Name without extension, such as `00000`.
        num_samples: Captions written (each with `num_images_per_caption` images).
        num_images: Images written.
        num_images_per_caption: Images of every sample.
        num_failed: Captions planned for the shard and not written.
        num_bytes: Size of the tar.
        sha256: Digest of the tar.
        parquet_num_bytes: Size of the side-car.
        parquet_sha256: Digest of the side-car.
        settings_hash: Settings of the job that made it.
    """

    store: Store
    name: str
    num_samples: int
    num_images: int
    num_images_per_caption: int
    num_failed: int
    num_bytes: int
    sha256: str
    parquet_num_bytes: int
    parquet_sha256: str
    settings_hash: str

    @property
    def tar_name(self) -> str:
        """The tar, in the store."""
        return f"{self.name}.tar"

    @property
    def parquet_name(self) -> str:
        """The side-car with one row an image, in the store."""
        return f"{self.name}.parquet"

    @property
    def marker_name(self) -> str:
        """The completion marker, in the store."""
        return f"{self.name}_stats.json"

    @property
    def path(self) -> Path:
        """The tar of a dataset on a local disk."""
        return self.store.local_path / self.tar_name

    @property
    def parquet_path(self) -> Path:
        """The side-car of a dataset on a local disk."""
        return self.store.local_path / self.parquet_name

    def __str__(self) -> str:
        """The tar as people call it, for messages."""
        return self.store.name_of(self.tar_name)


def hash_settings(settings: Mapping[str, Any]) -> str:
    """sha256 of the settings as canonical JSON, 64 hex digits; what the model is called does not count."""
    return hashlib.sha256(to_json(without_names(settings)).encode()).hexdigest()


def without_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make the images what they are."""
    generator = {name: value for name, value in settings["generator"].items() if name not in _NAMES}
    return {**settings, "generator": generator}


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, one form for equal values, no NaN."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def open_store(root: "str | Path | Store") -> Store:
    """The dataset's folder, which may not exist yet, from a path or URL."""
    return root if isinstance(root, Store) else Store(root)


def read_manifest(root: str | Path | Store) -> DatasetManifest:
    """Reads `dataset.json`.

    Args:
        root: The dataset's folder or URL.

    Raises:
        FileNotFoundError: There is no `dataset.json`.
        ShardError: It is not a manifest of this schema version.
    """
    store = open_store(root)
    where = store.name_of(MANIFEST_NAME)
    try:
        content = store.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{store.url} is not a dataset: it has no {MANIFEST_NAME}") from error
    values = _parse_json_object(content, where)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ShardError(f"{where}: schema_version must be {SCHEMA_VERSION}, got {version}")
    fields = dataclasses.fields(DatasetManifest)
    optional = {field.name for field in fields if field.default is not dataclasses.MISSING}
    if missing := sorted({field.name for field in fields} - optional - values.keys()):
        raise ShardError(f"{where}: missing field {', '.join(missing)}")
    for name in ("num_captions", "num_images_per_caption", "num_captions_per_shard", "num_shards"):
        if type(values[name]) is not int or values[name] < 0:
            raise ShardError(f"{where}: {name} must be an integer >= 0, got {values[name]!r}")
    for name in ("caption_files", "extended_from"):
        values[name] = tuple(values.get(name, ()))
    return DatasetManifest(**{field.name: values[field.name] for field in fields if field.name in values})


def read_shard(root: str | Path | Store, manifest: DatasetManifest, shard_index: int) -> Shard | None:
    """The finished shard of this index, or None where it has no completion marker.

    Reads the marker alone; `verify_shard` compares it with the files.

    Raises:
        ShardError: The marker is unreadable, or belongs to a job with other settings.
    """
    store, name = open_store(root), manifest.shard_name(shard_index)
    stats = read_stats(store, name)
    if stats is None:
        return None
    where = store.name_of(f"{name}_stats.json")
    try:
        shard = Shard(
            store=store,
            name=name,
            num_samples=int(stats["num_written"]),
            num_images=int(stats["num_images"]),
            num_images_per_caption=manifest.num_images_per_caption,
            num_failed=int(stats["num_failed"]),
            num_bytes=int(stats["tar"]["num_bytes"]),
            sha256=str(stats["tar"]["sha256"]),
            parquet_num_bytes=int(stats["parquet"]["num_bytes"]),
            parquet_sha256=str(stats["parquet"]["sha256"]),
            settings_hash=str(stats["settings_hash"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{where}: not a completion marker ({type(error).__name__}: {error})") from error
    if shard.settings_hash != manifest.settings_hash:
        raise ShardError(
            f"{where}: settings hash {shard.settings_hash[:16]} differs from {manifest.settings_hash[:16]} "
            f"in {MANIFEST_NAME}"
        )
    return shard


def read_stats(store: Store, name: str) -> dict[str, Any] | None:
    """A shard's completion marker as it is, None where there is none.

    Raises:
        ShardError: It is no JSON object.
    """
    try:
        content = store.read(f"{name}_stats.json")
    except FileNotFoundError:
        return None
    return _parse_json_object(content, store.name_of(f"{name}_stats.json"))


def read_failures(shard: Shard) -> dict[str, int]:
    """The captions of a shard that have no images, by reason, from its completion marker.

    Raises:
        ShardError: The marker does not tell, or is gone.
    """
    if not shard.num_failed:
        return {}
    try:
        failures = (read_stats(shard.store, shard.name) or {})["failures_by_reason"]
        return {str(reason): int(count) for reason, count in failures.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        where = shard.store.name_of(shard.marker_name)
        raise ShardError(f"{where}: not a completion marker ({type(error).__name__}: {error})") from error


def list_complete_shards(root: str | Path | Store) -> list[Shard]:
    """Every shard of the dataset that has its completion marker, by index.

    Raises:
        FileNotFoundError: `root` has no manifest.
        ShardError: A marker is unreadable, or belongs to other settings.
    """
    store = open_store(root)
    manifest = read_manifest(store)
    shards = map_shards(lambda index: read_shard(store, manifest, index), store, manifest)
    return [shard for shard in shards if shard is not None]


def map_shards(
    function: Callable[[int], _Value], store: Store, manifest: DatasetManifest
) -> Iterator[_Value]:
    """Calls a function with the index of each planned shard, in order; many at a time in an object store."""
    if store.is_local:
        yield from map(function, range(manifest.num_shards))
        return
    with ThreadPoolExecutor(_NUM_READING_THREADS) as executor:
        for start in range(0, manifest.num_shards, _NUM_SHARDS_AT_ONCE):
            yield from executor.map(
                function, range(start, min(start + _NUM_SHARDS_AT_ONCE, manifest.num_shards))
            )


def check_sizes(shard: Shard) -> None:
    """Compares the sizes of the tar and its side-car with the completion marker: quick, finds every cut.

    Raises:
        ShardError: A file is missing, or of another size.
    """
    _check_size(shard, shard.tar_name, shard.num_bytes)
    _check_size(shard, shard.parquet_name, shard.parquet_num_bytes)


def verify_shard(shard: Shard) -> None:
    """Compares sizes and sha256 of the tar and its side-car with the completion marker.

    Only this finds every flipped bit: most of them decode to other pixels without an error.

    Raises:
        ShardError: A file is missing, of another size, or of another digest.
    """
    check_sizes(shard)
    for name, sha256 in ((shard.tar_name, shard.sha256), (shard.parquet_name, shard.parquet_sha256)):
        _, actual = shard.store.digest(name)
        if actual != sha256:
            raise ShardError(
                f"{shard.store.name_of(name)}: sha256 is {actual[:16]}…, expected {sha256[:16]}…"
            )


def read_samples(shard: Shard) -> Iterator[Sample]:
    """Reads a shard front to back, checked: an error rather than a sample that is not the one written.

    The size of the tar is compared with the marker before the first sample, each image with its sha256 and
    each caption with its id as they are read, and the number of samples at the end. Only regular members with
    the names of the schema are read, none larger than the caps above.

    Raises:
        ShardError: The shard is missing, truncated, altered, or holds what the schema does not know.
    """
    _check_size(shard, shard.tar_name, shard.num_bytes)
    num_samples = 0
    with shard.store.open(shard.tar_name) as file:
        for sample in read_tar(file, where=str(shard), num_images=shard.num_images_per_caption):
            yield sample
            num_samples += 1
    if num_samples != shard.num_samples:
        raise ShardError(f"{shard}: holds {num_samples} samples, expected {shard.num_samples}")


def read_tar(file: IO[bytes], where: str, num_images: int | None = None) -> Iterator[Sample]:
    """Reads the samples of an open tar, each checked as `read_samples` says.

    Args:
        file: The tar, seekable.
        where: What messages call it.
        num_images: Images that each sample must have; None takes as many as its JSON names.

    Raises:
        ShardError: As for `read_samples`, at the first bad sample.
    """
    for key, members in _read_groups(file, where):
        yield _parse_sample(f"{where}: sample {key}", key, members, num_images)


def _read_groups(file: IO[bytes], where: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Consecutive members of one key, by suffix (`json`, `txt`, `0.jpg`, …).

    The grouping is webdataset's own, so that a sample here is what every reader of the format takes for one;
    which members reach it, and what a sample must hold, is checked here.
    """
    # It imports torch, which those who read markers alone can do without.
    from webdataset.tariterators import group_by_keys

    try:
        for sample in group_by_keys(_read_members(file, where), lcase=False):
            yield sample["__key__"], {name: sample[name] for name in sample if not name.startswith("__")}
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"{where}: {error.args[0]}") from error


def _read_members(file: IO[bytes], where: str) -> Iterator[dict[str, Any]]:
    """The members of a shard, each checked, in the form that webdataset passes between its stages."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                _check_member(member, where)
                file.seek(member.offset_data)
                yield {"fname": member.name, "data": file.read(member.size), "__url__": where}
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{where}: not a readable tar ({error})") from error


def _check_member(member: tarfile.TarInfo, where: str) -> None:
    """Refuses what the schema does not know, before it is read."""
    match = _MEMBER_NAME.fullmatch(member.name)
    if match is None:
        raise ShardError(f"{where}: unexpected member {member.name!r}")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ShardError(f"{where}: member {member.name} is not a regular file")
    max_bytes = MAX_TEXT_MEMBER_BYTES if match[3] is None else MAX_IMAGE_MEMBER_BYTES
    if member.size > max_bytes:
        raise ShardError(
            f"{where}: member {member.name} has {member.size} bytes, at most {max_bytes} expected"
        )


def _parse_sample(where: str, key: str, members: dict[str, bytes], num_images: int | None) -> Sample:
    try:
        record = json.loads(members["json"])
        if record.pop("record_sha256") != digest_record(record):
            raise ValueError("its JSON differs from its sha256")
        caption, extension = members["txt"].decode(), record["image_extension"]
        if num_images is None:
            num_images = len(record["image_seeds"])
        sample = Sample(
            key=key,
            caption_id=record["caption_id"],
            caption=caption,
            images=tuple(members[f"{index}.{extension}"] for index in range(num_images)),
            image_extension=extension,
            image_seeds=tuple(record["image_seeds"]),
            width=record["width"],
            height=record["height"],
            guidance_scales=tuple(record["guidance_scales"]),
            fingerprints=tuple(record["fingerprints"]),
            occurrence=record["occurrence"],
            extra=record["extra"],
            settings_hash=record["settings_hash"],
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


def digest_record(record: Mapping[str, Any]) -> str:
    """sha256 of a sample's JSON without its own digest, 64 hex digits."""
    return hashlib.sha256(to_json(record).encode()).hexdigest()


def _check_size(shard: Shard, name: str, num_bytes: int) -> None:
    actual = shard.store.size(name)
    if actual is None:
        raise ShardError(f"{shard.store.name_of(name)}: missing, though its completion marker is there")
    if actual != num_bytes:
        raise ShardError(f"{shard.store.name_of(name)}: has {actual} bytes, expected {num_bytes}")


def _parse_json_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ShardError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ShardError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
