"""Images of a dataset made once more and compared: are they what the plan gives?

Under the fingerprint that an image was made under, it must come out bit for bit. On another machine it may
differ by rounding; then the decoded pixels are compared.
"""

import hashlib
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from data_gen.images import decode_image, encode_image
from data_gen.job.plan import Plan
from data_gen.job.planned_model import load_generator
from data_gen.job.worker import WorkConfig
from data_gen.shards import Sample, Shard, read_samples

MAX_MEAN_DIFFERENCE = 8.0
"""Mean absolute difference of decoded pixels, of 255 levels, that another fingerprint may bring."""


@dataclass
class Comparison:
    """What came of making images again.

    Args:
        num_equal: Images whose files are equal bit for bit.
        num_close: Images of another fingerprint within `MAX_MEAN_DIFFERENCE`.
        problems: One line for each image that is neither.
        other_fingerprints: Ids of the fingerprints of images that were made again under another one.
    """

    num_equal: int = 0
    num_close: int = 0
    problems: list[str] = field(default_factory=list)
    other_fingerprints: set[str] = field(default_factory=set)


def regenerate(plan: Plan, shards: list[Shard], fraction: float, config: WorkConfig) -> Comparison:
    """Makes a share of the images again, the same ones each time, at least one.

    Args:
        plan: The dataset's plan.
        shards: Its finished shards.
        fraction: Share of the images, in (0, 1].
        config: The model and the device here.

    Raises:
        OSError: The model cannot be loaded.
        ValueError: It is not the plan's model.
    """
    from data_gen.diffusion.generator import ImageRequest

    generator = load_generator(plan, config)
    comparison = Comparison()
    chosen = {shard.name: _choose(shard, fraction) for shard in shards}
    if shards and not any(chosen.values()):
        chosen[shards[0].name] = {sample.key: (0,) for sample in islice(read_samples(shards[0]), 1)}
    for shard in shards:
        indices = chosen[shard.name]
        stored = {sample.key: sample for sample in read_samples(shard) if sample.key in indices}
        requests = [ImageRequest(key, sample.caption, indices[key]) for key, sample in stored.items()]
        for made in generator.generate(requests, plan.manifest.settings["seed"]):
            files = [_encode(plan, pixels) for pixels in made.images]
            sample = stored[made.request.key]
            for index, file, here in zip(made.request.image_indices, files, made.fingerprints, strict=True):
                where = f"{shard}: image {sample.key}.{index}"
                if made.failure is not None:
                    comparison.problems.append(f"{where}: failed now ({made.failure})")
                else:
                    _compare(comparison, where, file, sample, index, here)
    return comparison


def _choose(shard: Shard, fraction: float) -> dict[str, tuple[int, ...]]:
    """Images by caption, each chosen by its own noise key."""
    with shard.store.open(shard.parquet_name) as file:
        rows = pq.read_table(file, columns=["key", "index", "image_seed"]).to_pylist()
    chosen: dict[str, tuple[int, ...]] = {}
    for row in rows:
        digest = hashlib.sha256(f"{row['image_seed']}/verify".encode()).digest()
        if int.from_bytes(digest[:8]) < fraction * 2**64:
            chosen[row["key"]] = (*chosen.get(row["key"], ()), row["index"])
    return chosen


def _encode(plan: Plan, pixels: npt.NDArray[np.uint8]) -> bytes:
    settings = plan.manifest.settings
    content, _, _ = encode_image(
        pixels,
        image_format=settings["image_format"],
        image_quality=settings["image_quality"],
        stored_image_size=settings["stored_image_size"],
    )
    return content


def _compare(comparison: Comparison, where: str, made: bytes, sample: Sample, index: int, here: str) -> None:
    """Counts an image as equal or close, or names it; it was made again under the fingerprint `here`."""
    is_same = sample.fingerprints[index] == here
    if not is_same:
        comparison.other_fingerprints.add(sample.fingerprints[index])
    if made == sample.images[index]:
        comparison.num_equal += 1
        return
    pixels, stored = (
        decode_image(content, sample.image_extension).astype(np.float64)
        for content in (made, sample.images[index])
    )
    difference = float(np.abs(pixels - stored).mean()) if pixels.shape == stored.shape else float("inf")
    if is_same:
        comparison.problems.append(
            f"{where}: other pixels under the same fingerprint (mean difference {difference:.2f} of 255)"
        )
    elif difference > MAX_MEAN_DIFFERENCE:
        comparison.problems.append(
            f"{where}: its mean difference to what this machine makes must be <= {MAX_MEAN_DIFFERENCE:g} of "
            f"255, got {difference:.2f}"
        )
    else:
        comparison.num_close += 1
