"""`stablerep export-dataset`: a dataset in the layout that the tools of others read.

`flat` is img2dataset's layout, which open_clip trains on: a sample is an image.

    00000.tar          000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, …
    00000.parquet      img2dataset's columns, then ours; failed images have a row and no member
    00000_stats.json   img2dataset's counts; written last: it is the completion marker
    sizes.json         images of each tar, by which open_clip knows how many there are
    README.md          the dataset card
    export.json        which dataset this is an export of

A key is the number of the shard (5 digits) and that of the image in it (4 digits), wider where need be.
Images stay as they are, JPEG, PNG or WebP. `url` is null everywhere: no image was downloaded.

One shard becomes one shard: so each is a task of its own, a damaged one spoils no other, and a run that was
stopped goes on with those that are missing. Who wants larger tars plans more captions a shard.
"""

import hashlib
import io
import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_gen.card import (
    CARD_NAME,
    NO_LICENSE,
    REMARKS_LINE,
    build_features,
    build_header,
    describe_license,
    describe_note,
    describe_provenance,
    extra_dtypes,
    read_statements,
)
from data_gen.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_UNFINISHED
from data_gen.shard_writer import TarWriter
from data_gen.shards import (
    DatasetManifest,
    Sample,
    Shard,
    ShardError,
    check_sizes,
    read_manifest,
    read_shard,
    read_tar,
    to_json,
)
from data_gen.storage import Store

EXPORT_NAME = "export.json"
SIZES_NAME = "sizes.json"
FLAT_COLUMNS = {
    "url": "string",
    "caption": "string",
    "key": "string",
    "status": "string",
    "error_message": "string",
    "width": "int32",
    "height": "int32",
    "original_width": "int32",
    "original_height": "int32",
    "sha256": "string",
    "caption_id": "string",
    "occurrence": "int32",
    "image_index": "int32",
    "image_seed": "string",
    "guidance_scale": "double",
    "fingerprint": "string",
    "settings_hash": "string",
    "source_key": "string",
    "num_bytes": "int64",
    "tar_offset": "int64",
}
"""Columns of the side-car, img2dataset's first; extra columns follow. The JSON has all but `tar_offset`."""

_OWN_NAMES = re.compile(r"export\.json|sizes\.json|README\.md|\d{5,}(\.tar|\.parquet|_stats\.json)")
_COPY_NUM_BYTES = 1 << 20
_NUM_TASKS_AHEAD = 4


@dataclass(frozen=True)
class ExportDatasetConfig:
    """Writes a dataset in the layout of other tools.

    Args:
        dataset: Folder or URL of the dataset.
        output: Folder or URL to write to; an export that was stopped goes on there.
        layout: `flat`: one sample an image, as img2dataset writes them and open_clip reads them.
        num_processes: Shards exported at the same time, >= 1, each in a process of its own.
    """

    dataset: str
    output: str
    layout: Literal["flat"] = "flat"
    num_processes: int = 1


@dataclass(frozen=True)
class ExportedShard:
    """What became of one shard.

    Args:
        name: Its name, here and there.
        outcome: Written now, in the output before, not finished in the dataset, or damaged there.
        num_images: Images in the output's tar.
        message: Why it is not in the output.
    """

    name: str
    outcome: Literal["written", "there", "unfinished", "damaged"]
    num_images: int = 0
    message: str = ""


def run(config: ExportDatasetConfig) -> int:
    """Exports what is not yet in the output, naming each shard that cannot be.

    Returns:
        0 if every planned shard is in the output, 1 if one is damaged, 75 if all that are finished are there.

    Raises:
        ValueError: The output holds other files, or an export of another dataset.
        OSError: There is no dataset, or the output cannot be written.
    """
    from tqdm import tqdm

    if config.num_processes < 1:
        raise ValueError(f"num_processes must be >= 1, got {config.num_processes}")
    source, output = Store(config.dataset), Store(config.output)
    manifest = read_manifest(source)
    _begin(output, manifest, config.layout)
    sizes: dict[str, int] = {}
    counts: Counter[str] = Counter()
    progress = tqdm(
        _export_all(source, output, manifest, config.num_processes),
        total=manifest.num_shards,
        desc="export-dataset",
        unit="shard",
    )
    for exported in progress:
        counts[exported.outcome] += 1
        if exported.message:
            progress.write(f"stablerep export-dataset: {exported.message}", file=sys.stderr)
        else:
            sizes[f"{exported.name}.tar"] = exported.num_images
    output.replace(SIZES_NAME, (to_json(sizes) + "\n").encode())
    output.replace(CARD_NAME, build_flat_card(source, output, manifest, sum(sizes.values())).encode())
    print(
        f"{output.url}: {len(sizes)} of {manifest.num_shards} shards exported, {counts['written']} of them "
        f"now; {sum(sizes.values())} images; {counts['damaged']} shards damaged, {counts['unfinished']} not "
        "finished"
    )
    return EXIT_FAILED if counts["damaged"] else EXIT_UNFINISHED if counts["unfinished"] else EXIT_DONE


def export_shard(source: Store, output: Store, manifest: DatasetManifest, shard_index: int) -> ExportedShard:
    """Exports one shard, unless that is done: a pure function of the shard.

    Raises:
        OSError: The output cannot be written.
    """
    name = manifest.shard_name(shard_index)
    try:
        shard = read_shard(source, manifest, shard_index)
        if shard is None:
            message = f"{source.name_of(name)}.tar: not finished, it has no completion marker"
            return ExportedShard(name, "unfinished", message=message)
        num_images = _count_exported(output, shard)
        if num_images is not None:
            return ExportedShard(name, "there", num_images)
        return ExportedShard(name, "written", _FlatShard(output, manifest, shard).write())
    except ShardError as error:
        return ExportedShard(name, "damaged", message=str(error))


def build_flat_card(source: Store, output: Store, manifest: DatasetManifest, num_images: int) -> str:
    """The card of an export. What a person has put into the cards of both that are there is taken over."""
    (header, _), (own_header, remarks) = read_statements(source), read_statements(output)
    header |= {key: value for key, value in own_header.items() if (key, value) != ("license", NO_LICENSE)}
    columns = {column: _dtype(kind) for column, kind in FLAT_COLUMNS.items() if column != "tar_offset"}
    dtypes = extra_dtypes(manifest)
    columns |= {column: dtypes[extra] for extra, column in flat_extra_columns(manifest).items()}
    extension = manifest.settings["image_format"]
    shards = f"DIR/{{00000..{manifest.shard_name(manifest.num_shards - 1)}}}.tar"
    features = build_features(
        {"__key__": "string", "__url__": "string", extension: "image", "txt": "string", "json": columns}
    )
    return f"""{build_header(output.name, num_images, features, header)}
# {output.name}

{describe_note(manifest)}{num_images} images generated from captions, in the layout of img2dataset:
one sample an image. Every image here is synthetic: none is a photograph, and `url` is null. The images of one
caption follow each other and have the same `caption_id`; `source_key` and `image_index` say where they were
before the export.

```python
import datasets, webdataset

datasets.load_dataset("DIR", split="train", streaming=True)  # {extension}, txt, json
webdataset.WebDataset("{shards}", shardshuffle=False)
```

open_clip trains on it with `--dataset-type webdataset --train-data '{shards}'`,
and takes the number of images from `{SIZES_NAME}`. Its loader needs webdataset 0.2.86 or older.

{describe_provenance(manifest)}
{describe_license(str(header.get("license", NO_LICENSE)))}
{REMARKS_LINE}
{remarks}"""


def flat_extra_columns(manifest: DatasetManifest) -> dict[str, str]:
    """Names of the extra columns in the export: their own, or `extra_NAME` where the layout has that name."""
    taken = {*FLAT_COLUMNS, *manifest.extra_columns}
    names: dict[str, str] = {}
    for name in manifest.extra_columns:
        new_name = name
        while new_name in FLAT_COLUMNS or (new_name != name and new_name in taken):
            new_name = f"extra_{new_name}"
        taken.add(new_name)
        names[name] = new_name
    return names


def _begin(output: Store, manifest: DatasetManifest, layout: str) -> None:
    """Claims the output for this export, or finds that it goes on."""
    plan = {"layout": layout, "settings_hash": manifest.settings_hash}
    names = output.list(recursive=True)
    if EXPORT_NAME not in names and names:
        raise ValueError(f"output {output.url} holds {names[0]} but no {EXPORT_NAME}: not an export")
    if foreign := [name for name in names if not _OWN_NAMES.fullmatch(name)]:
        raise ValueError(f"output {output.url} holds {foreign[0]}, which is no part of an export")
    output.probe()
    output.remove_stale_temporaries()
    if output.publish(EXPORT_NAME, (to_json(plan) + "\n").encode()):
        return
    there = json.loads(output.read(EXPORT_NAME))
    for name, value in plan.items():
        if there.get(name) != value:
            raise ValueError(
                f"{output.name_of(EXPORT_NAME)} is of another export: {name} is {there.get(name)!r} there "
                f"and {value!r} here"
            )


def _export_all(
    source: Store, output: Store, manifest: DatasetManifest, num_processes: int
) -> Iterator[ExportedShard]:
    """Every shard's outcome, in order."""
    if num_processes == 1:
        for index in range(manifest.num_shards):
            yield export_shard(source, output, manifest, index)
        return
    tasks: deque[Future[ExportedShard]] = deque()
    executor = ProcessPoolExecutor(
        num_processes,
        mp_context=get_context("spawn"),  # a fork would share the stores' connections
        initializer=signal.signal,  # Ctrl-C is for this process alone; the others end the shard they are at
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        for index in range(manifest.num_shards):
            tasks.append(executor.submit(export_shard, source, output, manifest, index))
            if len(tasks) >= _NUM_TASKS_AHEAD * num_processes:
                yield tasks.popleft().result()
        while tasks:
            yield tasks.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("one of the processes was killed; the same command goes on from here") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _count_exported(output: Store, shard: Shard) -> int | None:
    """Images of a shard that is in the output whole, made of the tar that the source has now; or None."""
    try:
        stats = json.loads(output.read(shard.marker_name))
        is_whole = (
            stats["source_sha256"] == shard.sha256
            and stats["tar"]["num_bytes"] == output.size(shard.tar_name)
            and stats["parquet"]["num_bytes"] == output.size(shard.parquet_name)
        )
        return int(stats["successes"]) if is_whole else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


class _FlatShard:
    """One shard on its way into the flat layout."""

    def __init__(self, output: Store, manifest: DatasetManifest, shard: Shard) -> None:
        self._output, self._manifest, self._shard = output, manifest, shard
        num_images = manifest.num_captions_per_shard * manifest.num_images_per_caption
        self._prefix, self._num_digits = shard.name, max(4, len(str(num_images - 1)))
        self._extra_names = flat_extra_columns(manifest)
        self._rows: list[dict[str, Any]] = []

    def write(self) -> int:
        """Reads the shard, writes the tar, its side-car and last the marker; returns the number of images."""
        start_time = time.time()
        shard, output = self._shard, self._output
        with output.temporary(shard.tar_name) as temporary:
            with temporary.open("wb") as file:
                tar = TarWriter(file)
                for sample in _read_verified(shard):
                    self._add_sample(tar, sample)
                num_bytes, sha256 = tar.finish()
            num_images = len(self._rows)
            self._add_failures()
            parquet = self._to_parquet()
            stats = self._count(start_time) | {
                "source_sha256": shard.sha256,
                "tar": {"num_bytes": num_bytes, "sha256": sha256},
                "parquet": {"num_bytes": len(parquet), "sha256": hashlib.sha256(parquet).hexdigest()},
            }
            output.delete(shard.marker_name)
            _put(output, shard.tar_name, temporary)
        _put(output, shard.parquet_name, parquet)
        _put(output, shard.marker_name, (to_json(stats) + "\n").encode())
        return num_images

    def _add_sample(self, tar: TarWriter, sample: Sample) -> None:
        for index, image in enumerate(sample.images):
            row = self._build_row(sample.caption, sample.caption_id, sample.key, index) | {
                "status": "success",
                "width": sample.width,
                "height": sample.height,
                "original_width": sample.width,
                "original_height": sample.height,
                "sha256": hashlib.sha256(image).hexdigest(),
                "occurrence": sample.occurrence,
                "image_seed": sample.image_seeds[index],
                "guidance_scale": sample.guidance_scales[index],
                "fingerprint": sample.fingerprints[index],
                "settings_hash": sample.settings_hash,
                "num_bytes": len(image),
                **{self._extra_names[name]: value for name, value in sample.extra.items()},
            }
            key = row["key"]
            row["tar_offset"] = tar.add(f"{key}.{sample.image_extension}", image)
            tar.add(f"{key}.txt", sample.caption.encode())
            record = {name: value for name, value in row.items() if name != "tar_offset"}
            tar.add(f"{key}.json", to_json(record).encode())
            self._rows.append(row)

    def _add_failures(self) -> None:
        """Rows of the images that were planned and not made, as img2dataset has them of failed downloads."""
        if not self._shard.num_failed:
            return
        for failed in _read_marker(self._shard)["failed_captions"]:
            for index in range(self._manifest.num_images_per_caption):
                row = self._build_row(failed["caption"], failed["caption_id"], failed["key"], index)
                self._rows.append(row | {"status": "failed_to_generate", "error_message": failed["reason"]})

    def _build_row(self, caption: str, caption_id: str, source_key: str, image_index: int) -> dict[str, Any]:
        """A row with the next key; what is not known of every image is null."""
        return {
            **dict.fromkeys(FLAT_COLUMNS),
            **dict.fromkeys(self._extra_names.values()),
            "key": f"{self._prefix}{len(self._rows):0{self._num_digits}d}",
            "caption": caption,
            "caption_id": caption_id,
            "source_key": source_key,
            "image_index": image_index,
        }

    def _to_parquet(self) -> bytes:
        kinds = self._manifest.extra_columns
        types = FLAT_COLUMNS | {self._extra_names[name]: kind for name, kind in kinds.items()}
        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=schema), buffer, compression="zstd")
        return buffer.getvalue()

    def _count(self, start_time: float) -> dict[str, Any]:
        """The shard's figures in img2dataset's form, where what fails before resizing failed to download."""
        statuses = Counter(row["error_message"] or row["status"] for row in self._rows)
        end_time = time.time()
        return {
            "count": len(self._rows),
            "successes": statuses["success"],
            "failed_to_download": len(self._rows) - statuses["success"],
            "failed_to_resize": 0,
            "duration": end_time - start_time,
            "start_time": start_time,
            "end_time": end_time,
            "status_dict": dict(sorted(statuses.items())),
        }


def _read_verified(shard: Shard) -> Iterator[Sample]:
    """The samples of a shard whose tar has the digest of its marker: one flipped bit anywhere is found.

    Raises:
        ShardError: The shard is damaged, or cannot be read.
    """
    try:
        check_sizes(shard)
        with _open_verified(shard) as file:
            yield from read_tar(file, where=str(shard), num_images=shard.num_images_per_caption)
    except OSError as error:
        raise ShardError(f"{shard}: cannot be read ({error})") from error


@contextmanager
def _open_verified(shard: Shard) -> Iterator[IO[bytes]]:
    """The tar, hashed before it is read: a local one in place, a remote one as it is fetched, once."""
    with shard.store.open(shard.tar_name) as file, tempfile.TemporaryFile() as copy:
        digest = hashlib.sha256()
        while block := file.read(_COPY_NUM_BYTES):
            digest.update(block)
            if not shard.store.is_local:
                copy.write(block)
        if digest.hexdigest() != shard.sha256:
            raise ShardError(f"{shard}: sha256 is {digest.hexdigest()[:16]}…, expected {shard.sha256[:16]}…")
        verified: IO[bytes] = file if shard.store.is_local else copy
        verified.seek(0)
        yield verified


def _read_marker(shard: Shard) -> dict[str, Any]:
    marker: dict[str, Any] = json.loads(shard.store.read(shard.marker_name))
    return marker


def _put(store: Store, name: str, content: bytes | Path) -> None:
    """Publishes a file over what an export that was stopped may have left under its name."""
    if not store.publish(name, content):
        store.delete(name)
        store.publish(name, content)


def _dtype(kind: str) -> str:
    """A type of the side-car as `datasets` calls it; in JSON there are no 32-bit numbers."""
    return {"int32": "int64", "double": "float64"}.get(kind, kind)
