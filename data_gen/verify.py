"""`stablerep verify`: is every shard of a dataset there, and is it what was written?"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from data_gen.images import decode_image
from data_gen.shards import Shard, ShardError, read_manifest, read_samples, read_shard, verify_shard


@dataclass(frozen=True)
class VerifyConfig:
    """Compares every shard of a dataset with its completion marker.

    Args:
        dataset: Folder of the dataset.
        deep: Decode every image too and compare the tar with the parquet row by row; slower.
    """

    dataset: str
    deep: bool = False


def run(config: VerifyConfig) -> int:
    """Verifies a dataset, naming each bad shard.

    Returns:
        0 if every planned shard is there and sound, 1 if not.

    Raises:
        FileNotFoundError: The folder holds no dataset.
        ShardError: Its manifest is damaged.
    """
    from tqdm import tqdm

    root = Path(config.dataset)
    manifest = read_manifest(root)
    num_bad = num_missing = num_images = num_failed = 0
    progress = tqdm(range(manifest.num_shards), desc="verify", unit="shard")

    def say(message: str) -> None:  # on a line of its own, above the bar
        progress.write(f"stablerep verify: {message}", file=sys.stderr)

    for index in progress:
        try:
            shard = read_shard(root, manifest, index)
            if shard is None:
                num_missing += 1
                say(f"{root / manifest.shard_name(index)}.tar: not finished, it has no completion marker")
                continue
            verify_shard(shard)
            if config.deep:
                verify_images(shard)
            num_planned = manifest.num_captions_in_shard(index)
            if shard.num_samples + shard.num_failed != num_planned:
                raise ShardError(
                    f"{shard.path}: {num_planned} captions planned, but {shard.num_samples} written "
                    f"and {shard.num_failed} failed"
                )
            num_images += shard.num_images
            num_failed += shard.num_failed
        except ShardError as error:
            num_bad += 1
            say(str(error))
    print(
        f"{root}: {manifest.num_shards} shards planned, {manifest.num_shards - num_bad - num_missing} sound, "
        f"{num_bad} bad, {num_missing} missing; {num_images} images, {num_failed} captions failed"
    )
    return int(num_bad + num_missing > 0)


def verify_images(shard: Shard) -> None:
    """Decodes every image of a shard, and finds it in the tar at the place that the parquet names.

    Raises:
        ShardError: An image does not decode, has another size, or the parquet differs from the tar.
    """
    rows = {(row["key"], row["index"]): row for row in pq.read_table(shard.parquet_path).to_pylist()}
    if len(rows) != shard.num_images:
        raise ShardError(f"{shard.parquet_path}: {len(rows)} rows, expected {shard.num_images}")
    with shard.path.open("rb") as tar:
        for sample in read_samples(shard):
            for index, image in enumerate(sample.images):
                where = f"{shard.path}: image {sample.key}.{index}.{sample.image_extension}"
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
                    raise ShardError(f"{where} has no row in {shard.parquet_path.name}")
                tar.seek(row["tar_offset"])
                if tar.read(row["num_bytes"]) != image or row["caption"] != sample.caption:
                    raise ShardError(f"{where} differs from its row in {shard.parquet_path.name}")
