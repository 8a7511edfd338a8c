"""`stablerep generate`: captions in, a dataset of generated images out.

The plan is frozen in `dataset.json`; workers make the shards that have no completion marker, so a job that
was killed goes on where it was, and the same command started elsewhere joins in.
"""

import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_gen.captions.sources import expand_sources
from data_gen.card import write_card
from data_gen.croissant import CHECKSUMS_NAME
from data_gen.diffusion.fidelity import FIDELITY_NAME, is_fidelity_due, read_fidelity
from data_gen.diffusion.models import GeneratorConfig, find_model
from data_gen.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_UNFINISHED
from data_gen.job.engines.ray_cluster import RayConfig
from data_gen.job.engines.slurm import SlurmConfig
from data_gen.job.freeze import check_draft, draft_plan, freeze_plan
from data_gen.job.plan import Plan
from data_gen.job.progress import showing
from data_gen.job.supervision import stopping_on
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.job.worker import WorkConfig, work
from data_gen.messages import say
from data_gen.repair import requeue_shards
from data_gen.shards import Shard, list_complete_shards, map_shards, read_stats
from data_gen.storage import Store


@dataclass(frozen=True)
class GenerateConfig:
    """Generates a dataset of images from captions.

    Args:
        captions: Files of captions: paths, globs or URLs of .txt, .csv, .tsv, .jsonl (each also .gz),
            .parquet or WebDataset .tar files.
        output: Folder or URL of the dataset; a job that was stopped goes on there.
        caption_column: Column of the caption (a number where a table has no header); text files have none.
        extra_columns: Columns that are carried along with each caption, such as labels and ids.
        duplicates: "drop" leaves out captions that have occurred before, "number" generates each anew.
        limit: Captions to take; None takes all.
        generator: The text-to-image model and its sampling.
        num_images_per_caption: Images generated of each caption, >= 1.
        seed: Seed of the dataset; each image's noise follows from it, its caption and its index.
        num_captions_per_shard: Captions in each tar, >= 1.
        num_images_per_batch: Images denoised together, >= 1; part of what makes images equal bit for bit.
        stored_image_size: Shorter side of the stored image in pixels; None stores it as generated.
        image_format: File format of the stored image.
        image_quality: 1 to 100, for jpg and webp.
        note: A remark for the dataset card.
        extend: Raise num_images_per_caption of the dataset that is there; only the missing images are made.
        retry_failed: Try captions that failed, and shards that were set aside, again.
        dry_run: Print the plan and, after a short calibration, the time that it takes; write nothing.
        price_per_hour: Price of one worker's machine, for the dry run.
        engine: What runs the workers: processes of this machine, a Ray cluster, or a Slurm array.
        num_workers: Workers of the local engine; None is one for each accelerator, or this process where
            there is none.
        num_threads_per_worker: CPU threads of each local worker; None shares the cores out.
        spill_seconds: Time between two spills of finished samples: the most that a killed worker loses.
        lease_seconds: Time after which the claim of a worker on another machine is void unless renewed.
        stall_seconds: Time in a shard without a new image after which a worker is replaced, as its device may
            hang; longer than a batch takes. 0 is no limit; None is 1800 on an accelerator, and no limit on
            the CPU.
        ray: The Ray cluster.
        slurm: The Slurm array.
    """

    captions: str | list[str]
    output: str
    caption_column: str = "caption"
    extra_columns: list[str] = field(default_factory=list)
    duplicates: Literal["drop", "number"] = "drop"
    limit: int | None = None
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    num_images_per_caption: int = 4
    seed: int = 0
    num_captions_per_shard: int = 256
    num_images_per_batch: int = 16
    stored_image_size: int | None = None
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    image_quality: int = 95
    note: str = ""
    extend: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    price_per_hour: float | None = None
    engine: Literal["local", "ray", "slurm"] = "local"
    num_workers: int | None = None
    num_threads_per_worker: int | None = None
    spill_seconds: float = 60.0
    lease_seconds: float = 300.0
    stall_seconds: float | None = None
    ray: RayConfig = field(default_factory=RayConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def caption_patterns(self) -> list[str]:
        """`captions` as a list."""
        return [self.captions] if isinstance(self.captions, str) else list(self.captions)

    def check(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A setting is out of its range.
        """
        for name in ("num_images_per_caption", "num_captions_per_shard", "num_images_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("num_workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.stored_image_size is not None and self.stored_image_size < 1:
            raise ValueError(f"stored_image_size must be >= 1 pixel, got {self.stored_image_size}")
        if not 1 <= self.image_quality <= 100:
            raise ValueError(f"image_quality must be from 1 to 100, got {self.image_quality}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise ValueError(f"price_per_hour must be >= 0 and finite, got {self.price_per_hour}")
        self.generator.check()
        self.worker_config().check()
        if self.engine == "ray":
            self.ray.check()
        if self.engine == "slurm":
            self.slurm.check()

    def worker_config(self, **changes: Any) -> WorkConfig:
        """What each worker is told."""
        return WorkConfig(
            **{
                "dataset": self.output,
                "model": None if self.generator.model == "embedded" else self.generator.model,
                "tiny_vae": self.generator.tiny_vae,
                "device": self.generator.device,
                "num_threads": self.num_threads_per_worker,
                "spill_seconds": self.spill_seconds,
                "lease_seconds": self.lease_seconds,
                "stall_seconds": self.stall_seconds,
                "trust_remote_code": self.generator.trust_remote_code,
                "allow_pickle": self.generator.allow_pickle,
                **changes,
            }
        )


@dataclass(frozen=True)
class _Workers:
    """The workers of the local engine.

    Args:
        configs: What each is told.
        in_process: Whether the only one is this process.
    """

    configs: tuple[WorkConfig, ...]
    in_process: bool


def run(config: GenerateConfig) -> int:
    """Generates what is missing of the dataset.

    Returns:
        0 if every planned caption is written, 1 if any failed or is set aside, 75 if it is not finished.

    Raises:
        ValueError: Bad captions or settings, or settings other than those of the dataset that is there.
        OSError: The model is missing, the output cannot be written, or every worker has failed.
    """
    config.check()
    store = Store(config.output)
    expand_sources(config.caption_patterns)  # what is missing is said at once
    if not config.dry_run:
        store.probe()
    model = find_model(config.generator)
    workers = _plan_workers(config)
    with tempfile.TemporaryDirectory(prefix="stablerep-captions-") as folder:
        draft = draft_plan(config, model, _describe_machine(config, workers), store, Path(folder))
        check_draft(store, draft, config.extend)
        if config.dry_run:
            from data_gen.job.estimate import print_estimate

            return print_estimate(config, draft, model, workers.configs)
        plan = freeze_plan(store, draft, config.extend)
    return _run_plan(config, plan, workers)


def _run_plan(config: GenerateConfig, plan: Plan, workers: _Workers) -> int:
    """Makes the missing shards, and says how the dataset stands."""
    plan.store.remove_stale_temporaries()
    work_folder = WorkFolder(plan.store, Worker.of_this_process(), config.lease_seconds)
    sound = requeue_shards(plan, work_folder, retry_failed=config.retry_failed)
    start, settled = time.monotonic(), {shard.name for shard in sound} | work_folder.list_set_aside().keys()
    if len(settled) < plan.manifest.num_shards or is_fidelity_due(plan):
        plan.store.delete(CHECKSUMS_NAME)  # the card describes other shards than there will be
        if read_fidelity(plan.store, plan.manifest) is None:
            plan.store.delete(FIDELITY_NAME)  # of a plan that this one has replaced
        if config.engine == "slurm":
            return _submit_to_slurm(config, plan, work_folder)
        with showing(plan, work_folder):
            is_stopped = _run_workers(config, plan, workers)
        if is_stopped:  # whoever asked for it may not wait
            say("stopped; the same command goes on")
            return EXIT_UNFINISHED
        plan.store.remove_stale_temporaries()
        work_folder.finish()
    return _finish(plan, work_folder, sound, time.monotonic() - start)


def _run_workers(config: GenerateConfig, plan: Plan, workers: _Workers) -> bool:
    """Runs the engine until nothing is left to do, or a signal asks it to stop; whether one did."""
    stop = threading.Event()
    with stopping_on(stop, (signal.SIGTERM, signal.SIGUSR1)):
        if config.engine == "ray":
            from data_gen.job.engines import ray_cluster

            ray_cluster.run(config.ray, workers.configs[0], say, stop)
        elif workers.in_process:
            work(plan, workers.configs[0], stop)
        else:
            from data_gen.job.engines.local import run_local

            run_local(workers.configs, stop, say)
    return stop.is_set()


def _submit_to_slurm(config: GenerateConfig, plan: Plan, work_folder: WorkFolder) -> int:
    """Submits an array, unless Slurm still has the one that was submitted before."""
    from data_gen.job.engines import slurm

    queued = [job_id for job_id in work_folder.list_jobs() if slurm.is_queued(job_id)]
    if queued:
        what = f"Slurm job {queued[0]} is still there, no other is submitted (scancel {queued[0]} ends it)"
    elif job_id := slurm.submit(config.slurm, config.worker_config()):
        work_folder.forget_jobs()
        work_folder.record_job(job_id)
        what = f"Slurm job {job_id}"
    else:
        what = "the script for sbatch is written"
    print(f"{plan.store.url}: {what}; `stablerep status --dataset {plan.store.url}` follows the job")
    return EXIT_UNFINISHED


def _plan_workers(config: GenerateConfig) -> _Workers:
    """One worker for each accelerator or as many as asked for; their devices and threads."""
    if config.engine != "local":
        return _Workers((config.worker_config(),), in_process=False)
    devices = _list_accelerators() if config.generator.device == "auto" else []
    if config.num_workers is None and not devices:
        return _Workers((config.worker_config(),), in_process=True)
    num_workers = config.num_workers or len(devices)
    num_threads = config.num_threads_per_worker or max(1, len(os.sched_getaffinity(0)) // num_workers)
    places = [
        devices[index % len(devices)] if devices else config.generator.device for index in range(num_workers)
    ]
    return _Workers(
        tuple(config.worker_config(device=place, num_threads=num_threads) for place in places),
        in_process=False,
    )


def _list_accelerators() -> list[str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    return [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]


def _describe_machine(config: GenerateConfig, workers: _Workers) -> dict[str, Any]:
    """The fingerprint of the local workers; those of a cluster are known when they run."""
    if config.engine != "local":
        return {}
    from data_gen.diffusion.generator import describe_machine

    first = workers.configs[0]
    return describe_machine(config.generator, first.device, first.num_threads, config.num_images_per_batch)


def _finish(plan: Plan, work_folder: WorkFolder, sound_before: list[Shard], seconds: float) -> int:
    """Writes the card, prints the counts, and says by the exit code how the dataset stands."""
    shards, set_aside = list_complete_shards(plan.store), work_folder.list_set_aside()
    is_finished = len(shards) + len(set_aside) >= plan.manifest.num_shards
    if is_finished:
        write_card(plan.store, plan.manifest, shards)
    source, manifest = plan.manifest.captions_source, plan.manifest
    num_written, num_failed = sum(s.num_samples for s in shards), sum(s.num_failed for s in shards)
    num_images = sum(shard.num_images for shard in shards)
    repeated = "dropped" if source["options"]["duplicates"] == "drop" else "numbered"
    num_made = _count_new_images(plan, sound_before)
    rate = f", {num_made / seconds:.2f} images/s" if num_made else ""
    print(
        f"{plan.store.url}: {manifest.num_captions} captions planned ({source['num_empty_dropped']} empty "
        f"rows dropped, {source['num_duplicates']} repeated ones {repeated}), {num_written} written, "
        f"{num_failed} failed; {num_images} images in {len(shards)} shards, {num_made} of them new{rate}"
    )
    for name, reason in sorted(set_aside.items()):
        say(f"shard {name} is set aside: {reason}; --retry_failed takes it up again")
    if not is_finished:
        return EXIT_UNFINISHED
    return EXIT_DONE if num_written == manifest.num_captions else EXIT_FAILED


def _count_new_images(plan: Plan, sound_before: list[Shard]) -> int:
    """Images that were generated for the shards which were not sound before, those of failed captions not."""
    names_before = {shard.name for shard in sound_before}

    def count(index: int) -> int:
        name = plan.manifest.shard_name(index)
        stats = None if name in names_before else read_stats(plan.store, name)
        return 0 if stats is None else min(stats["num_images"], stats["num_images_made"])

    return sum(map_shards(count, plan.store, plan.manifest))
