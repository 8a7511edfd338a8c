"""Writing of the shard format: byte-identical from run to run, never half there, and the first writer wins.

A shard's tar is written under a temporary name and published whole; then its side-car, then its completion
marker. A job killed at any moment leaves no file under a final name that is not whole.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from data_gen.captions import caption_id
from data_gen.shards import (
    MANIFEST_NAME,
    DatasetManifest,
    Sample,
    Shard,
    ShardError,
    digest_record,
    open_store,
    read_shard,
    to_json,
)
from data_gen.storage import Store

IMAGE_COLUMNS: dict[str, tuple[str, str]] = {
    "key": ("string", "name of the sample in its tar"),
    "index": ("int32", "index of the image among its caption's"),
    "caption": ("string", "normalised caption"),
    "caption_id": ("string", "identity of the caption by content"),
    "occurrence": ("int32", "0 for the first time that the caption occurs in the plan"),
    "image_seed": ("string", "128-bit key of the image's initial noise"),
    "guidance_scale": ("double", "weight of classifier-free guidance"),
    "settings_hash": ("string", "settings of the job that made it"),
    "fingerprint": ("string", "machine settings that it was made under, in fingerprints/"),
    "sha256": ("string", "digest of the encoded image"),
    "tar_offset": ("int64", "offset of the encoded image in the tar, in bytes"),
    "num_bytes": ("int64", "size of the encoded image, in bytes"),
    "width": ("int32", "width in pixels"),
    "height": ("int32", "height in pixels"),
}
"""Columns of a shard's side-car: name → (type, meaning). Extra columns of the captions follow them."""


class ShardTakenError(ShardError):
    """Another tar is there under the shard's name."""


def write_manifest(root: str | Path | Store, manifest: DatasetManifest, replace: bool = False) -> bool:
    """Writes `dataset.json`, readable by people as well.

    Returns:
        Whether it was written; False where one is there and `replace` is false.
    """
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    content = (text + "\n").encode()
    store = open_store(root)
    if replace:
        store.replace(MANIFEST_NAME, content)
        return True
    return store.publish(MANIFEST_NAME, content)


class ShardWriter:
    """Writes one shard; nothing is published unless `publish` is reached.

        with ShardWriter(root, manifest, shard_index) as writer:
            writer.write(sample)
            writer.fail(key, caption, "safety_checker")
            shard = writer.publish(num_planned=2, seconds=1.0)

    Args:
        root: The dataset's folder or URL.
        manifest: The plan.
        shard_index: Which shard.
    """

    def __init__(self, root: str | Path | Store, manifest: DatasetManifest, shard_index: int) -> None:
        self._store, self._manifest, self._index = open_store(root), manifest, shard_index
        self._name = manifest.shard_name(shard_index)
        self._where = self._store.name_of(f"{self._name}.tar")
        self._keys: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._failed: list[dict[str, str]] = []

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(self._store.temporary(f"{self._name}.tar"))
        self._file = self._stack.enter_context(self._temporary.open("wb"))
        self._tar = TarWriter(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, sample: Sample) -> None:
        """Adds a sample.

        Raises:
            ShardError: Its key has a dot or occurred before, or it has another number of images than planned.
        """
        if "." in sample.key or "/" in sample.key or sample.key in self._keys:
            raise ShardError(f"{self._where}: key {sample.key!r} must be new and without dot or slash")
        if len(sample.images) != self._manifest.num_images_per_caption:
            raise ShardError(
                f"{self._where}: sample {sample.key} must have "
                f"{self._manifest.num_images_per_caption} images, got {len(sample.images)}"
            )
        self._keys.add(sample.key)
        record = to_record(sample, self._manifest.settings_hash)
        offsets = self._tar.add_sample(sample, record)
        shared = {name: value for name, value in record.items() if name in IMAGE_COLUMNS} | record["extra"]
        for index, (image, offset) in enumerate(zip(sample.images, offsets, strict=True)):
            self._rows.append(
                shared
                | {"index": index, "tar_offset": offset, "num_bytes": len(image)}
                | {"image_seed": sample.image_seeds[index], "sha256": record["image_sha256"][index]}
                | {"guidance_scale": sample.guidance_scales[index], "fingerprint": sample.fingerprints[index]}
            )

    def fail(self, key: str, caption: str, reason: str) -> None:
        """Records that a planned caption has no images, and why."""
        self._failed.append(
            {"key": key, "caption_id": caption_id(caption), "caption": caption, "reason": reason}
        )

    def publish(
        self,
        num_planned: int,
        seconds: float,
        statistics: Mapping[str, Any] | None = None,
        replaces: str | None = None,
    ) -> Shard:
        """Closes the tar, publishes tar and parquet, then the completion marker.

        Args:
            num_planned: Captions of this shard in the plan.
            seconds: Wall time spent on the shard.
            statistics: Further counts for the marker.
            replaces: sha256 of a tar without marker that may be there and is replaced.

        Returns:
            The shard that is in place: this one, or an equal one that another writer published first.

        Raises:
            ShardError: Captions written and failed do not add up to `num_planned`.
            ShardTakenError: Another tar is there; nothing of this one was published.
        """
        if len(self._keys) + len(self._failed) != num_planned:
            raise ShardError(
                f"{self._where}: {num_planned} captions were planned, but {len(self._keys)} written "
                f"and {len(self._failed)} failed"
            )
        tar_num_bytes, tar_sha256 = self._tar.finish()
        self._file.flush()
        parquet = to_parquet(self._rows, self._manifest.extra_columns)
        stats = {
            "shard": self._name,
            "settings_hash": self._manifest.settings_hash,
            "num_planned": num_planned,
            "num_written": len(self._keys),
            "num_failed": len(self._failed),
            "num_images": len(self._rows),
            "failures_by_reason": dict(sorted(Counter(row["reason"] for row in self._failed).items())),
            "failed_captions": self._failed,
            "seconds": round(seconds, 3),
            "fingerprints": sorted({row["fingerprint"] for row in self._rows}),
            **(statistics or {}),
            "tar": {"num_bytes": tar_num_bytes, "sha256": tar_sha256},
            "parquet": {"num_bytes": len(parquet), "sha256": hashlib.sha256(parquet).hexdigest()},
        }
        self._publish_tar(tar_sha256, replaces)
        self._publish_parquet(parquet)
        is_first = self._store.publish(f"{self._name}_stats.json", (to_json(stats) + "\n").encode())
        shard = read_shard(self._store, self._manifest, self._index)
        if shard is None:
            raise ShardTakenError(f"{self._where}: its completion marker vanished")
        if not is_first and shard.sha256 != tar_sha256:
            self._settle(shard)
        return shard

    def _settle(self, shard: Shard) -> None:
        """Two writers have replaced one tar; a marker that is not that of the tar which stayed must go."""
        if self._store.digest(shard.tar_name)[1] != shard.sha256:
            self._store.delete(shard.marker_name)
            raise ShardTakenError(f"{self._where}: two writers have replaced it")

    def _publish_tar(self, sha256: str, replaces: str | None) -> None:
        name = f"{self._name}.tar"
        if self._store.publish(name, self._temporary):
            return
        there = self._store.digest(name)[1]
        if there == sha256:
            return
        if there != replaces:
            raise ShardTakenError(f"{self._where}: another writer has published another tar")
        self._store.replace(name, self._temporary)

    def _publish_parquet(self, content: bytes) -> None:
        """Beside an equal tar, another side-car is an old one, unless a marker already speaks for it."""
        name = f"{self._name}.parquet"
        if self._store.publish(name, content) or self._store.exists(f"{self._name}_stats.json"):
            return
        if self._store.read(name) != content:
            self._store.replace(name, content)


class TarWriter:
    """A USTAR archive whose bytes depend on names and contents alone, hashed as it is written.

    Args:
        file: Where to.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def add_sample(self, sample: Sample, record: Mapping[str, Any]) -> list[int]:
        """Appends a sample, `record` from `to_record`; returns the offset of each image's content."""
        self.add(f"{sample.key}.json", to_json(record).encode())
        self.add(f"{sample.key}.txt", sample.caption.encode())
        return [
            self.add(f"{sample.key}.{index}.{sample.image_extension}", image)
            for index, image in enumerate(sample.images)
        ]

    def add(self, name: str, content: bytes) -> int:
        """Appends a member and returns the offset of its content."""
        member = tarfile.TarInfo(name)
        member.size, member.mode, member.mtime = len(content), 0o644, 0
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> tuple[int, str]:
        """Writes the end of the archive; returns its size and sha256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        return self.num_bytes, self._digest.hexdigest()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)


def to_record(sample: Sample, settings_hash: str) -> dict[str, Any]:
    """The sample's JSON: everything but the pixels, and its own sha256."""
    record = {
        "key": sample.key,
        "caption_id": sample.caption_id,
        "caption": sample.caption,
        "occurrence": sample.occurrence,
        "extra": dict(sample.extra),
        "image_extension": sample.image_extension,
        "image_seeds": sample.image_seeds,
        "image_sha256": [hashlib.sha256(image).hexdigest() for image in sample.images],
        "guidance_scales": sample.guidance_scales,
        "fingerprints": sample.fingerprints,
        "settings_hash": settings_hash,
        "width": sample.width,
        "height": sample.height,
    }
    return {**record, "record_sha256": digest_record(record)}


def to_parquet(rows: list[dict[str, Any]], extra_columns: Mapping[str, str]) -> bytes:
    """A shard's side-car: one row an image, the extra columns last."""
    types = {name: kind for name, (kind, _) in IMAGE_COLUMNS.items()} | dict(extra_columns)
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()
