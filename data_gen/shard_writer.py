"""Writing of the shard format: byte-identical from run to run, and never half there.

A file is written under a temporary name in its own folder, flushed to disk and renamed; a shard's completion
marker comes last. A job killed at any moment leaves no file under a final name that is not whole.
"""

import hashlib
import io
import json
import os
import socket
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from data_gen.shards import MANIFEST_NAME, DatasetManifest, Sample, Shard, ShardError, read_shard, to_json

_PARQUET_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("index", pa.int32()),
        ("caption", pa.string()),
        ("caption_id", pa.string()),
        ("image_seed", pa.string()),
        ("settings_hash", pa.string()),
        ("sha256", pa.string()),
        ("tar_offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


def write_file(path: Path, content: bytes) -> None:
    """Writes a whole file or none: temporary name in the same folder, fsync, rename."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            _flush(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_manifest(root: str | Path, manifest: DatasetManifest) -> None:
    """Writes `dataset.json`, readable by people as well."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_file(Path(root) / MANIFEST_NAME, (text + "\n").encode())


def temporary_path(path: Path) -> Path:
    """`.{name}.{host}.{pid}.tmp` beside `path`: unseen by readers, written by no other process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_stale_temporaries(root: str | Path) -> int:
    """Deletes what killed processes of this host left under temporary names.

    Returns:
        Number of files deleted.
    """
    stale = [path for path in Path(root).glob(f".*.{socket.gethostname()}.*.tmp") if not _is_alive(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


class ShardWriter:
    """Writes one shard; nothing is published unless `publish` is reached.

        with ShardWriter(root, manifest, shard_index) as writer:
            writer.write(sample)
            writer.fail(caption_id, "safety_checker")
            shard = writer.publish(num_planned=2, seconds=1.0, fingerprint={})

    Args:
        root: Folder of the dataset.
        manifest: The plan.
        shard_index: Which shard.
    """

    def __init__(self, root: str | Path, manifest: DatasetManifest, shard_index: int) -> None:
        self._root, self._manifest, self._index = Path(root), manifest, shard_index
        self._tar_path = self._root / f"{manifest.shard_name(shard_index)}.tar"
        self._keys: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._failed: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        self._temporary = temporary_path(self._tar_path)
        self._file = self._temporary.open("wb")
        self._tar = _HashedTar(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, sample: Sample) -> None:
        """Adds a sample.

        Raises:
            ShardError: Its key has a dot or occurred before, or it has another number of images than planned.
        """
        if "." in sample.key or "/" in sample.key or sample.key in self._keys:
            raise ShardError(f"{self._tar_path}: key {sample.key!r} must be new and without dot or slash")
        if len(sample.images) != self._manifest.num_images_per_caption:
            raise ShardError(
                f"{self._tar_path}: sample {sample.key} must have "
                f"{self._manifest.num_images_per_caption} images, got {len(sample.images)}"
            )
        self._keys.add(sample.key)
        image_sha256 = [hashlib.sha256(image).hexdigest() for image in sample.images]
        record = {
            "key": sample.key,
            "caption_id": sample.caption_id,
            "caption": sample.caption,
            "image_extension": sample.image_extension,
            "image_seeds": sample.image_seeds,
            "image_sha256": image_sha256,
            "settings_hash": self._manifest.settings_hash,
            "width": sample.width,
            "height": sample.height,
        }
        self._tar.add(f"{sample.key}.json", to_json(record).encode())
        self._tar.add(f"{sample.key}.txt", sample.caption.encode())
        for index, (image, sha256) in enumerate(zip(sample.images, image_sha256, strict=True)):
            offset = self._tar.add(f"{sample.key}.{index}.{sample.image_extension}", image)
            self._rows.append(
                {name: record[name] for name in _PARQUET_SCHEMA.names if name in record}
                | {"index": index, "image_seed": sample.image_seeds[index], "sha256": sha256}
                | {"tar_offset": offset, "num_bytes": len(image)}
            )

    def fail(self, caption_id: str, reason: str) -> None:
        """Records that a planned caption has no images, and why."""
        self._failed.append((caption_id, reason))

    def publish(
        self,
        num_planned: int,
        seconds: float,
        fingerprint: Mapping[str, Any],
        statistics: Mapping[str, Any] | None = None,
    ) -> Shard:
        """Closes the tar, publishes tar and parquet, then writes the completion marker.

        An older marker goes first, so that none ever stands beside a tar that it does not describe.

        Args:
            num_planned: Captions of this shard in the plan.
            seconds: Wall time spent on the shard.
            fingerprint: Machine settings under which its images were made.
            statistics: Further counts for the marker.

        Raises:
            ShardError: Captions written and failed do not add up to `num_planned`.
        """
        if len(self._keys) + len(self._failed) != num_planned:
            raise ShardError(
                f"{self._tar_path}: {num_planned} captions were planned, but {len(self._keys)} written "
                f"and {len(self._failed)} failed"
            )
        tar_num_bytes, tar_sha256 = self._tar.finish()
        _flush(self._file)
        parquet = _to_parquet(self._rows)
        stats = {
            "shard": self._tar_path.stem,
            "settings_hash": self._manifest.settings_hash,
            "num_planned": num_planned,
            "num_written": len(self._keys),
            "num_failed": len(self._failed),
            "num_images": len(self._rows),
            "failures_by_reason": dict(sorted(Counter(reason for _, reason in self._failed).items())),
            "failed_captions": [
                {"caption_id": identity, "reason": reason} for identity, reason in self._failed
            ],
            "seconds": round(seconds, 3),
            "fingerprint": dict(fingerprint),
            **(statistics or {}),
            "tar": {"num_bytes": tar_num_bytes, "sha256": tar_sha256},
            "parquet": {"num_bytes": len(parquet), "sha256": hashlib.sha256(parquet).hexdigest()},
        }
        marker = self._tar_path.with_name(f"{self._tar_path.stem}_stats.json")
        marker.unlink(missing_ok=True)
        os.replace(self._temporary, self._tar_path)
        write_file(self._tar_path.with_suffix(".parquet"), parquet)
        write_file(marker, (to_json(stats) + "\n").encode())
        shard = read_shard(self._root, self._manifest, self._index)
        if shard is None:
            raise ShardError(f"{self._tar_path}: its completion marker vanished")
        return shard


class _HashedTar:
    """A USTAR archive whose bytes depend on names and contents alone, hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def add(self, name: str, content: bytes) -> int:
        """Appends a member and returns the offset of its content."""
        member = tarfile.TarInfo(name)
        member.size, member.mode, member.mtime = len(content), 0o644, 0
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self._num_bytes
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> tuple[int, str]:
        """Writes the end of the archive; returns its size and sha256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._num_bytes % tarfile.RECORDSIZE))
        return self._num_bytes, self._digest.hexdigest()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._num_bytes += len(content)


def _to_parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_PARQUET_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(temporary: Path) -> bool:
    """Whether the process that writes this temporary file still runs."""
    process = temporary.name.split(".")[-2]
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
