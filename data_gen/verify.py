"""`stablerep verify`: is every shard of a dataset there, and is it what was written?"""

import sys
from dataclasses import dataclass

import pyarrow.parquet as pq

from data_gen.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_UNFINISHED
from data_gen.images import decode_image
from data_gen.job.plan import Plan
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.job.worker import WorkConfig
from data_gen.regenerate import regenerate
from data_gen.shards import Shard, ShardError, read_samples, read_shard, verify_shard
from data_gen.storage import Store


@dataclass(frozen=True)
class VerifyConfig:
    """Compares every shard of a dataset with its completion marker.

    Args:
        dataset: Folder or URL of the dataset.
        deep: Decode every image too and compare the tar with the parquet row by row; slower.
        regenerate: Fraction of the images to generate again and compare, 0 to 1; above 0, at least one is.
        model: For `regenerate`, where the model is on this machine; None takes the plan's name.
        tiny_vae: For `regenerate`, where the tiny VAE is on this machine; None takes the plan's name.
        device: For `regenerate`, as for `stablerep generate`.
        num_threads: For `regenerate`, threads of the CPU; None takes torch's own number.
        trust_remote_code: For `regenerate`, allow a model that brings its own code.
        allow_pickle: For `regenerate`, allow weights without a safetensors file.
    """

    dataset: str
    deep: bool = False
    regenerate: float = 0.0
    model: str | None = None
    tiny_vae: str | None = None
    device: str = "auto"
    num_threads: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def check(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A setting is out of its range.
        """
        if not 0 <= self.regenerate <= 1:
            raise ValueError(f"regenerate must be from 0 to 1, got {self.regenerate}")


def run(config: VerifyConfig) -> int:
    """Verifies a dataset, naming each bad shard and each image that comes out otherwise.

    Returns:
        0 if every planned shard is there and sound, 1 if one is bad or was set aside, 75 if all that are
        there are sound but some are missing.

    Raises:
        FileNotFoundError: The folder holds no dataset.
        ShardError: Its manifest is damaged.
    """
    from tqdm import tqdm

    config.check()
    plan = Plan.read(Store(config.dataset))
    manifest, url = plan.manifest, plan.store.url
    sound: list[Shard] = []
    num_bad = num_missing = num_set_aside = 0
    set_aside = WorkFolder(plan.store, Worker.of_this_process(), 0.0).list_set_aside()
    progress = tqdm(range(manifest.num_shards), desc="verify", unit="shard")

    def say(message: str) -> None:  # on a line of its own, above the bar
        progress.write(f"stablerep verify: {message}", file=sys.stderr)

    for index in progress:
        try:
            shard = read_shard(plan.store, manifest, index)
            if shard is None:
                name = manifest.shard_name(index)
                reason = set_aside.get(name)
                num_missing += reason is None
                num_set_aside += reason is not None
                state = "it has no completion marker" if reason is None else f"set aside: {reason}"
                say(f"{plan.store.name_of(name)}.tar: not finished, {state}")
                continue
            _verify(plan, index, shard, config.deep)
            sound.append(shard)
        except ShardError as error:
            num_bad += 1
            say(str(error))
    num_images, num_failed = sum(s.num_images for s in sound), sum(s.num_failed for s in sound)
    print(
        f"{url}: {manifest.num_shards} shards planned, {len(sound)} sound, {num_bad} bad, {num_missing} "
        f"missing, {num_set_aside} set aside; {num_images} images, {num_failed} captions failed"
    )
    if config.regenerate > 0:
        num_bad += _regenerate(plan, sound, config)
    return EXIT_FAILED if num_bad or num_set_aside else EXIT_UNFINISHED if num_missing else EXIT_DONE


def _verify(plan: Plan, index: int, shard: Shard, deep: bool) -> None:
    verify_shard(shard)
    num_planned = plan.manifest.num_captions_in_shard(index)
    if shard.num_samples + shard.num_failed != num_planned:
        raise ShardError(
            f"{shard}: {num_planned} captions planned, but {shard.num_samples} written and "
            f"{shard.num_failed} failed"
        )
    if deep:
        verify_images(shard)
        verify_captions(plan, index, shard)


def _regenerate(plan: Plan, shards: list[Shard], config: VerifyConfig) -> int:
    """Makes a share of the images again; the number of those that come out otherwise."""
    work = WorkConfig(
        dataset=config.dataset,
        model=config.model,
        tiny_vae=config.tiny_vae,
        device=config.device,
        num_threads=config.num_threads,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    comparison = regenerate(plan, shards, config.regenerate, work)
    for problem in comparison.problems:
        print(f"stablerep verify: {problem}", file=sys.stderr)
    print(
        f"{plan.store.url}: of the images made again, {comparison.num_equal} are equal to the byte, "
        f"{comparison.num_close} close (made under another fingerprint), {len(comparison.problems)} otherwise"
    )
    if comparison.other_fingerprints:
        names = ", ".join(f"fingerprints/{name}.json" for name in sorted(comparison.other_fingerprints))
        print(f"{plan.store.url}: made under fingerprints that the images made again do not have: {names}")
    return len(comparison.problems)


def verify_captions(plan: Plan, shard_index: int, shard: Shard) -> None:
    """Compares a shard's samples with the plan: its captions, in their order, with their noise keys.

    Raises:
        ShardError: A sample is not of the plan, or stands elsewhere.
    """
    planned = iter(plan.captions(shard_index))
    for sample in read_samples(shard):
        caption = next((caption for caption in planned if caption.key == sample.key), None)
        if caption is None:
            raise ShardError(f"{shard}: sample {sample.key} is not in its place of the plan")
        if (caption.text, dict(caption.extra)) != (sample.caption, dict(sample.extra)):
            raise ShardError(
                f"{shard}: sample {sample.key} has another caption, or other columns, than planned"
            )
        seeds = tuple(plan.image_seed(sample.key, index) for index in range(len(sample.images)))
        if seeds != sample.image_seeds:
            raise ShardError(f"{shard}: sample {sample.key} has other noise keys than the plan gives")


def verify_images(shard: Shard) -> None:
    """Decodes every image of a shard, and finds it in the tar at the place that the parquet names.

    Raises:
        ShardError: An image does not decode, has another size, or the parquet differs from the tar.
    """
    with shard.store.open(shard.parquet_name) as file:
        rows = {(row["key"], row["index"]): row for row in pq.read_table(file).to_pylist()}
    if len(rows) != shard.num_images:
        name = shard.store.name_of(shard.parquet_name)
        raise ShardError(f"{name}: {len(rows)} rows, expected {shard.num_images}")
    with shard.store.open(shard.tar_name) as tar:
        for sample in read_samples(shard):
            for index, image in enumerate(sample.images):
                where = f"{shard}: image {sample.key}.{index}.{sample.image_extension}"
                try:
                    shape = decode_image(image, sample.image_extension).shape
                except ValueError as error:
                    raise ShardError(f"{where}: {error}") from error
                if shape != (sample.height, sample.width, 3):
                    raise ShardError(
                        f"{where} is {shape[1]}×{shape[0]}, expected {sample.width}×{sample.height}"
                    )
                row = rows.get((sample.key, index))
                if row is None:
                    raise ShardError(f"{where} has no row in {shard.parquet_name}")
                tar.seek(row["tar_offset"])
                if tar.read(row["num_bytes"]) != image or row["caption"] != sample.caption:
                    raise ShardError(f"{where} differs from its row in {shard.parquet_name}")
