"""`stablerep generate`: captions in, a dataset of generated images out.

The plan is frozen in `dataset.json`; a shard is a pure function of the plan and its captions. Shards without
a valid completion marker are made, the others are left alone, so a job that was killed goes on where it was.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_gen.captions import Caption, CaptionList, read_captions
from data_gen.card import write_card
from data_gen.images import build_sample
from data_gen.models import GeneratorConfig, ModelFiles, find_model
from data_gen.shard_writer import ShardWriter, remove_stale_temporaries, temporary_path, write_manifest
from data_gen.shards import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    DatasetManifest,
    Sample,
    Shard,
    ShardError,
    check_sizes,
    find_folder,
    hash_settings,
    read_manifest,
    read_shard,
)

if TYPE_CHECKING:
    from tqdm import tqdm

    from data_gen.generator import DiffusionGenerator, GeneratedCaption

_OWN_FILES = ("*.tar", "*.parquet", "*_stats.json", "README.md", "croissant.json")
"""What a job writes beside `dataset.json`."""


@dataclass(frozen=True)
class GenerateConfig:
    """Generates a dataset of images from captions.

    Args:
        captions: UTF-8 text file, one caption a line.
        output: Folder of the dataset; a job that was stopped goes on there.
        limit: Distinct captions to take from the file; None takes all.
        generator: The text-to-image model and its sampling.
        num_images_per_caption: Images generated of each caption, >= 1.
        seed: Seed of the dataset; each image's noise follows from it, its caption and its index.
        num_captions_per_shard: Captions in each tar, >= 1.
        num_images_per_batch: Images denoised together, >= 1; part of what makes images equal bit for bit.
        stored_image_size: Shorter side of the stored image in pixels; None stores it as generated.
        image_format: File format of the stored image.
        image_quality: 1 to 100, for jpg and webp.
    """

    captions: str
    output: str
    limit: int | None = None
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    num_images_per_caption: int = 4
    seed: int = 0
    num_captions_per_shard: int = 256
    num_images_per_batch: int = 16
    stored_image_size: int | None = None
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    image_quality: int = 95

    def check(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A setting is out of its range.
        """
        for name in ("num_images_per_caption", "num_captions_per_shard", "num_images_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.stored_image_size is not None and self.stored_image_size < 1:
            raise ValueError(f"stored_image_size must be >= 1 pixel, got {self.stored_image_size}")
        if not 1 <= self.image_quality <= 100:
            raise ValueError(f"image_quality must be from 1 to 100, got {self.image_quality}")
        self.generator.check()


def run(config: GenerateConfig) -> int:
    """Generates what is missing of the dataset.

    Returns:
        0 if every planned caption is written, 1 if any failed.

    Raises:
        ValueError: Bad captions or settings, or settings other than those of the dataset that is there.
        OSError: The model is missing, or the output cannot be written.
    """
    config.check()
    root = find_folder(config.output)
    captions = read_captions(config.captions, config.limit)
    _check_writable(root)
    model = find_model(config.generator)
    manifest = _build_manifest(config, captions, model)
    _check_same_plan(root, manifest)
    remove_stale_temporaries(root)
    shards = {
        index: shard for index in range(manifest.num_shards) if (shard := _find_shard(root, manifest, index))
    }
    num_images_made, seconds = 0, 0.0
    if len(shards) < manifest.num_shards:
        from data_gen.generator import DiffusionGenerator

        generator = DiffusionGenerator(config.generator, model, config.num_images_per_batch)
        manifest = _publish_plan(root, manifest, generator.fingerprint())
        start = time.perf_counter()
        for shard_index, shard in _run_pending(config, manifest, captions, generator, shards):
            shards[shard_index] = shard
            num_images_made += shard.num_images
        seconds = time.perf_counter() - start
    return _finish(root, manifest, [shards[index] for index in sorted(shards)], num_images_made, seconds)


def _run_pending(
    config: GenerateConfig,
    manifest: DatasetManifest,
    captions: CaptionList,
    generator: "DiffusionGenerator",
    complete: dict[int, Shard],
) -> Iterator[tuple[int, Shard]]:
    """Makes each shard that is not complete."""
    from tqdm import tqdm

    pending = [index for index in range(manifest.num_shards) if index not in complete]
    num_images = manifest.num_captions * manifest.num_images_per_caption
    num_pending = sum(manifest.num_captions_in_shard(index) for index in pending)
    num_done = num_images - num_pending * manifest.num_images_per_caption
    with tqdm(total=num_images, initial=num_done, unit="image", desc="generate", smoothing=0.05) as progress:
        for index in pending:
            planned = _shard_captions(manifest, captions, index)
            yield index, run_shard(config, manifest, index, planned, generator, progress)


def run_shard(
    config: GenerateConfig,
    manifest: DatasetManifest,
    shard_index: int,
    captions: Sequence[Caption],
    generator: "DiffusionGenerator",
    progress: "tqdm[Any] | None" = None,
) -> Shard:
    """Makes one shard: a pure function of the plan and the shard's captions.

    Images are encoded in a thread while the next ones are denoised.

    Args:
        config: The job.
        manifest: The plan.
        shard_index: Which shard.
        captions: Its captions.
        generator: The loaded model.
        progress: Is moved on by one for each image.

    Returns:
        The published shard.
    """
    start = time.perf_counter()
    num_truncated = generator.count_truncated(captions)
    if num_truncated:
        _say(
            f"shard {shard_index}: {num_truncated} of {len(captions)} captions are longer than what the "
            "model reads; it sees their beginnings"
        )
    encoding: deque[Future[Sample]] = deque()
    with (
        ShardWriter(config.output, manifest, shard_index) as writer,
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as executor,
    ):
        for generated in generator.generate(captions, config.num_images_per_caption, config.seed):
            if progress is not None:
                progress.update(config.num_images_per_caption)
            if generated.failure is not None:
                writer.fail(generated.caption.caption_id, generated.failure)
                continue
            encoding.append(executor.submit(_build_sample, config, generated))
            while encoding and (encoding[0].done() or len(encoding) > 2 * config.num_images_per_batch):
                writer.write(encoding.popleft().result())
        while encoding:
            writer.write(encoding.popleft().result())
        return writer.publish(
            num_planned=len(captions),
            seconds=time.perf_counter() - start,
            fingerprint=generator.fingerprint(),
            statistics={"num_captions_truncated": num_truncated},
        )


def _build_sample(config: GenerateConfig, generated: "GeneratedCaption") -> Sample:
    return build_sample(
        generated.caption,
        generated.images,
        generated.image_seeds,
        image_format=config.image_format,
        image_quality=config.image_quality,
        stored_image_size=config.stored_image_size,
    )


def _build_manifest(config: GenerateConfig, captions: CaptionList, model: ModelFiles) -> DatasetManifest:
    """The plan; the machine's fingerprint comes when the model is loaded."""
    sampling = asdict(config.generator)
    for name in ("device", "revision"):  # the one is the machine's, the other is in the model's identity
        del sampling[name]
    settings = {
        "generator": {**sampling, "model": model.name, "model_identity": model.identity},
        "captions_sha256": captions.sha256,
        "num_captions": len(captions.captions),
        **{
            name: getattr(config, name)
            for name in (
                "num_images_per_caption",
                "seed",
                "num_captions_per_shard",
                "num_images_per_batch",
                "stored_image_size",
                "image_format",
                "image_quality",
            )
        },
    }
    return DatasetManifest(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        settings_hash=hash_settings(settings),
        captions_source={
            "name": Path(config.captions).name,
            "sha256": captions.sha256,
            "num_lines_read": captions.num_lines,
            "num_empty_dropped": captions.num_empty,
            "num_duplicates_dropped": captions.num_duplicates,
        },
        num_captions=len(captions.captions),
        num_images_per_caption=config.num_images_per_caption,
        num_captions_per_shard=config.num_captions_per_shard,
        num_shards=-(-len(captions.captions) // config.num_captions_per_shard),
        fingerprint={},
    )


def _check_same_plan(root: Path, manifest: DatasetManifest) -> None:
    """Refuses to mix two plans in one folder."""
    if not (root / MANIFEST_NAME).exists():
        if taken := sorted(path.name for pattern in _OWN_FILES for path in root.glob(pattern)):
            raise ValueError(
                f"output {root} holds {taken[0]} but no {MANIFEST_NAME}: not a dataset to go on with"
            )
        return
    old = read_manifest(root)
    if old.settings_hash != manifest.settings_hash:
        before, now = _flatten(old.settings), _flatten(manifest.settings)
        differences = [
            f"{name} is {before.get(name)!r} there and {now.get(name)!r} here"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        raise ValueError(f"{root / MANIFEST_NAME} is of another plan: {'; '.join(differences)}")


def _publish_plan(root: Path, manifest: DatasetManifest, fingerprint: dict[str, Any]) -> DatasetManifest:
    """Writes `dataset.json`, or says where this machine differs from the one that began the dataset.

    Raises:
        ValueError: Another job has begun another plan here while the model was loading.
    """
    _check_same_plan(root, manifest)
    if (root / MANIFEST_NAME).exists():
        manifest = read_manifest(root)
        for name in sorted(manifest.fingerprint.keys() | fingerprint.keys()):
            before, now = manifest.fingerprint.get(name), fingerprint.get(name)
            if before != now:
                _say(f"{name} was {before!r} and is {now!r}: new images are not bit-equal to the old")
        return manifest
    manifest = DatasetManifest(**{**vars(manifest), "fingerprint": fingerprint})
    write_manifest(root, manifest)
    return manifest


def _find_shard(root: Path, manifest: DatasetManifest, shard_index: int) -> Shard | None:
    """The shard if its marker and the sizes of its files say so; a bad one is named and made again."""
    try:
        shard = read_shard(root, manifest, shard_index)
        if shard is not None:
            check_sizes(shard)
    except ShardError as error:
        _say(f"{error}; making it again")
        return None
    return shard


def _shard_captions(
    manifest: DatasetManifest, captions: CaptionList, shard_index: int
) -> tuple[Caption, ...]:
    size = manifest.num_captions_per_shard
    return captions.captions[shard_index * size : (shard_index + 1) * size]


def _finish(
    root: Path, manifest: DatasetManifest, shards: list[Shard], num_images_made: int, seconds: float
) -> int:
    """Writes the card, prints the counts, and says by the exit code whether anything failed."""
    write_card(root, manifest, shards)
    num_written = sum(shard.num_samples for shard in shards)
    num_failed = sum(shard.num_failed for shard in shards)
    source = manifest.captions_source
    dropped = (
        f"{source['num_empty_dropped']} empty and {source['num_duplicates_dropped']} repeated lines dropped"
    )
    rate = f", {num_images_made / seconds:.2f} images/s" if num_images_made else ""
    print(
        f"{root}: {manifest.num_captions} captions planned ({dropped}), {num_written} written, "
        f"{num_failed} failed; {sum(shard.num_images for shard in shards)} images in {len(shards)} shards, "
        f"{num_images_made} of them made now{rate}"
    )
    return int(num_written != manifest.num_captions)


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(root / "probe")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"output {root} cannot be written: {error.strerror or error}") from error


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(
            _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def _say(message: str) -> None:
    print(f"stablerep generate: {message}", file=sys.stderr)
