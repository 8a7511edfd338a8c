"""`stablerep generate --dry_run`: the plan, and what it will take, measured on a few of its own captions."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_gen.captions.planning import PlannedCaption, read_planned_captions
from data_gen.diffusion.models import ModelFiles
from data_gen.images import encode_image
from data_gen.job.planned_model import set_num_threads
from data_gen.job.progress import format_seconds
from data_gen.job.worker import WorkConfig
from data_gen.shards import MANIFEST_NAME, list_complete_shards
from data_gen.storage import Store

if TYPE_CHECKING:
    from data_gen.job.freeze import Draft
    from data_gen.job.generate import GenerateConfig

_NUM_BATCHES = 2
_NUM_TAR_BYTES_PER_IMAGE = 1024
"""Of headers and padding, beside the image itself."""


def print_estimate(
    config: "GenerateConfig", draft: "Draft", model: ModelFiles, works: Sequence[WorkConfig]
) -> int:
    """Prints the plan, and the time, bytes and cost of what is left of it.

    The model makes one batch to warm up and two that are timed, on the device and with the threads of the
    first worker. Several workers of one machine may take longer than this says, as here one has the machine
    to itself.

    Args:
        config: The job.
        draft: Its plan.
        model: Its model.
        works: What each worker of this machine is told, or one of a cluster's.

    Returns:
        0.
    """
    manifest, store = draft.manifest, Store(config.output)
    num_done = 0
    if store.exists(MANIFEST_NAME):
        num_done = sum(shard.num_images for shard in list_complete_shards(store))
    num_images = manifest.num_captions * manifest.num_images_per_caption
    print(
        f"{store.url}: {manifest.num_captions:,} captions × {manifest.num_images_per_caption} = "
        f"{num_images:,} images in {manifest.num_shards:,} shards; {num_done:,} of them there already"
    )
    num_workers = min(_count_workers(config, works), manifest.num_shards)
    set_num_threads(works[0].num_threads or _count_threads(config))
    generator = replace(config.generator, device=works[0].device)
    captions = _first_captions(config, draft, store)
    seconds, num_bytes = _calibrate(replace(config, generator=generator), model, captions)
    left = max(0, num_images - num_done)
    total_seconds = left * seconds / num_workers
    workers = f"{num_workers} worker{'s' if num_workers > 1 else ''}"
    print(f"size: {num_images * num_bytes / 1e9:,.3f} GB, {num_bytes / 1e3:,.1f} kB an image")
    print(f"time: {format_seconds(total_seconds)} with {workers} at {1 / seconds:,.2f} images/s each")
    if config.price_per_hour is not None:
        cost = left * seconds / 3600 * config.price_per_hour
        print(f"cost: {cost:,.2f} at {config.price_per_hour:g} an hour and worker")
    return 0


def _count_workers(config: "GenerateConfig", works: Sequence[WorkConfig]) -> int:
    """Workers that run at the same time; one where a Ray cluster is to decide."""
    if config.engine == "slurm":
        num_tasks = min(config.slurm.num_tasks, config.slurm.max_running or config.slurm.num_tasks)
        return num_tasks * max(1, config.slurm.gpus_per_task)
    if config.engine == "ray":
        return config.ray.num_workers or 1
    return len(works)


def _count_threads(config: "GenerateConfig") -> int | None:
    """Threads that a cluster gives a worker which has no number of its own; None is torch's number."""
    if config.engine == "slurm":
        return config.slurm.cpus_per_task
    return max(1, int(config.ray.num_cpus_per_worker)) if config.engine == "ray" else None


def _first_captions(config: "GenerateConfig", draft: "Draft", store: Store) -> list[PlannedCaption]:
    """As many captions as the calibration needs, from the draft or from the dataset that is there."""
    num_captions = max(
        3, -(-(_NUM_BATCHES + 1) * config.num_images_per_batch // config.num_images_per_caption)
    )
    name = Path(draft.manifest.caption_files[0]["name"])
    opened = draft.caption_files[0].open("rb") if draft.caption_files else store.open(str(name))
    with opened as file:
        return list(islice(read_planned_captions(file, 0), num_captions))


def _calibrate(
    config: "GenerateConfig", model: ModelFiles, captions: list[PlannedCaption]
) -> tuple[float, float]:
    """Seconds and bytes of one image."""
    from data_gen.diffusion.generator import DiffusionGenerator, ImageRequest

    generator = DiffusionGenerator(config.generator, model, config.num_images_per_batch)
    indices = tuple(range(config.num_images_per_caption))
    requests = [ImageRequest(caption.key, caption.text, indices) for caption in captions]
    while (
        len(requests) < 3 or len(requests) * len(indices) < (_NUM_BATCHES + 1) * config.num_images_per_batch
    ):
        requests += requests
    times, sizes = [], []
    for made in generator.generate(requests, config.seed):
        sizes += [
            len(encode_image(pixels, config.image_format, config.image_quality, config.stored_image_size)[0])
            for pixels in made.images
        ]
        times.append((time.perf_counter(), len(sizes)))
    first = next(index for index, (_, count) in enumerate(times) if count >= config.num_images_per_batch)
    (start, before), (end, after) = times[first], times[-1]
    return (end - start) / max(1, after - before), sum(sizes) / len(sizes) + _NUM_TAR_BYTES_PER_IMAGE
