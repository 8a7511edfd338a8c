"""`stablerep repair`: brings a dataset's folder into order without generating anything.

Shards that are not what their marker says are given up for `stablerep generate` to make again, which uses
what is sound of them; shards that lack only their side-car or marker get it; what no plan needs is removed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from data_gen.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_UNFINISHED
from data_gen.job.plan import Plan
from data_gen.job.progress import list_finished
from data_gen.job.shard_job import adopt_shard
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.messages import say
from data_gen.shards import (
    Shard,
    ShardError,
    check_sizes,
    map_shards,
    read_shard,
    read_stats,
    verify_shard,
)
from data_gen.storage import Store


@dataclass(frozen=True)
class RepairConfig:
    """Collects what killed jobs left, adopts whole shards without a marker, gives up damaged ones.

    Args:
        dataset: Folder or URL of the dataset.
        deep: Compare every file's sha256, not its size alone; reads the whole dataset.
        lease_seconds: As for `stablerep generate`; claims of living workers are left alone.
    """

    dataset: str
    deep: bool = True
    lease_seconds: float = 300.0


def run(config: RepairConfig) -> int:
    """Repairs a dataset.

    Returns:
        0 if every shard is there and sound now, 1 if all that are not were set aside, 75 if
        `stablerep generate` has some to make.

    Raises:
        FileNotFoundError: There is no such dataset.
        ShardError: Its manifest is damaged.
    """
    plan = Plan.read(Store(config.dataset))
    work_folder = WorkFolder(plan.store, Worker.of_this_process(), config.lease_seconds)
    num_temporaries = plan.store.remove_stale_temporaries()
    sound = requeue_shards(plan, work_folder, deep=config.deep)
    num_adopted = sum(1 for _ in _adopt_shards(plan, work_folder))
    num_orphans = _remove_orphans(plan, work_folder)
    set_aside = work_folder.list_set_aside()
    for name, reason in set_aside.items():
        say(f"shard {name} was set aside ({reason}); generate --retry_failed takes it up again")
    num_left = plan.manifest.num_shards - len(sound) - num_adopted - len(set_aside)
    print(
        f"{plan.store.url}: {plan.manifest.num_shards} shards planned, {len(sound)} sound, {num_adopted} "
        f"adopted, {num_left} to be made, {len(set_aside)} set aside; {num_temporaries + num_orphans} "
        "left-over files removed"
    )
    return EXIT_UNFINISHED if num_left else EXIT_FAILED if set_aside else EXIT_DONE


def requeue_shards(
    plan: Plan, work_folder: WorkFolder, *, deep: bool = False, retry_failed: bool = False
) -> list[Shard]:
    """Takes the marker from each shard that must be made again, and says why.

    Those are shards that are not what their marker says, shards of the plan that this one extends, and with
    `retry_failed` shards with failed captions and those that were set aside. Their tars stay where they are,
    for what is sound of them is used again.

    Args:
        plan: The dataset's plan.
        work_folder: Its work folder.
        deep: Compare sha256, not sizes alone.
        retry_failed: Try again what failed.

    Returns:
        The shards that are finished and sound, by index.
    """

    def look(index: int) -> Shard | None:
        name = plan.manifest.shard_name(index)
        try:
            shard = read_shard(plan.store, plan.manifest, index)
            if shard is None:
                return None
            (verify_shard if deep else check_sizes)(shard)
        except ShardError as error:
            if not _is_extended(plan, index):
                say(f"{error}; making it again")
        else:
            if not (retry_failed and shard.num_failed):
                return shard
        plan.store.delete(f"{name}_stats.json")
        return None

    if retry_failed:
        for name in work_folder.list_set_aside():
            work_folder.forgive(name)
    return [shard for shard in map_shards(look, plan.store, plan.manifest) if shard is not None]


def _adopt_shards(plan: Plan, work_folder: WorkFolder) -> Iterator[Shard]:
    """Publishes each shard that is all there but for its side-car or marker."""
    finished = list_finished(plan)
    for index, name in enumerate(plan.shard_names):
        if name in finished or not work_folder.claim(name):
            continue
        try:
            if (shard := adopt_shard(plan, index, work_folder)) is not None:
                say(f"{shard} is whole; its marker is written")
                yield shard
        finally:
            work_folder.release(name)


def _remove_orphans(plan: Plan, work_folder: WorkFolder) -> int:
    """Removes planned captions of plans that never began, and what is kept about finished shards."""
    planned = {entry["name"] for entry in plan.manifest.caption_files}
    orphans = [name for name in plan.store.list("captions") if name not in planned]
    for name in orphans:
        plan.store.delete(name)
    num_kept = len(plan.store.list(".work", recursive=True))
    for name in work_folder.list_shards() & list_finished(plan):
        work_folder.clear(name)
    work_folder.finish()
    return len(orphans) + num_kept - len(plan.store.list(".work", recursive=True))


def _is_extended(plan: Plan, shard_index: int) -> bool:
    """Whether the shard is one of a plan with fewer images a caption, which this plan extends."""
    try:
        stats = read_stats(plan.store, plan.manifest.shard_name(shard_index))
    except ShardError:
        return False
    return stats is not None and stats.get("settings_hash") in plan.manifest.extended_from
