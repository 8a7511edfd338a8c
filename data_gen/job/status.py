"""`stablerep status`: how far the job of a dataset has come, for people or as JSON."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_gen.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_UNFINISHED
from data_gen.job.plan import Plan
from data_gen.job.progress import describe, list_finished, read_status
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.shards import Shard, ShardError, map_shards, read_failures, read_shard
from data_gen.storage import Store


@dataclass(frozen=True)
class _Found:
    """What the completion marker of a shard says.

    Args:
        name: The shard.
        shard: As the marker describes it; None where there is none, or one that does not count.
        failures_by_reason: Its captions without images.
        problem: Why the marker does not count.
    """

    name: str
    shard: Shard | None = None
    failures_by_reason: Mapping[str, int] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class StatusConfig:
    """Says how far a dataset's job has come.

    Args:
        dataset: Folder or URL of the dataset.
        json: Print JSON, for programs.
        lease_seconds: As for `stablerep generate`: how long a worker of another machine counts as living.
    """

    dataset: str
    json: bool = False
    lease_seconds: float = 300.0


def run(config: StatusConfig) -> int:
    """Prints the status.

    Returns:
        0 if every caption is written, 1 if all is done but captions failed or shards are set aside, 75 if it
        is not finished, or a completion marker is damaged or of another plan.

    Raises:
        FileNotFoundError: There is no such dataset.
        ShardError: Its manifest is damaged.
    """
    plan = Plan.read(Store(config.dataset))
    status = build_status(plan, config.lease_seconds)
    print(json.dumps(status, indent=2, ensure_ascii=False) if config.json else _to_text(status))
    if not status["is_finished"]:
        return EXIT_UNFINISHED
    return EXIT_FAILED if status["num_captions_failed"] or status["shards_set_aside"] else EXIT_DONE


def build_status(plan: Plan, lease_seconds: float) -> dict[str, Any]:
    """The status as plain JSON: counts from every marker, and the living workers' reports.

    A shard whose marker is damaged, or of another plan, is not finished; `damaged` says why.
    """
    work_folder = WorkFolder(plan.store, Worker.of_this_process(), lease_seconds)
    listed = list_finished(plan)
    found = list(map_shards(lambda index: _read_marker(plan, index, listed), plan.store, plan.manifest))
    shards = [shard for marker in found if (shard := marker.shard) is not None]
    finished = {shard.name for shard in shards}
    status = read_status(plan, work_folder, finished)
    failures: Counter[str] = Counter()
    for marker in found:
        failures.update(marker.failures_by_reason)
    return {
        "dataset": plan.store.url,
        "settings_hash": plan.manifest.settings_hash,
        "is_finished": finished | status.set_aside.keys() >= set(plan.shard_names),
        "num_shards": status.num_shards,
        "num_shards_finished": status.num_shards_finished,
        "shards_set_aside": status.set_aside,
        "damaged": {marker.name: marker.problem for marker in found if marker.problem is not None},
        "num_captions": plan.manifest.num_captions,
        "num_captions_written": sum(shard.num_samples for shard in shards),
        "num_captions_failed": sum(shard.num_failed for shard in shards),
        "failures_by_reason": dict(failures),
        "num_images": status.num_images,
        "num_images_ready": status.num_images_ready,
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "images_per_second": status.images_per_second,
        "seconds_left": status.seconds_left,
        "workers": status.workers,
        "summary": describe(status),
    }


def _read_marker(plan: Plan, index: int, listed: set[str]) -> _Found:
    name = plan.manifest.shard_name(index)
    try:
        shard = read_shard(plan.store, plan.manifest, index) if name in listed else None
        return _Found(name) if shard is None else _Found(name, shard, read_failures(shard))
    except ShardError as error:
        return _Found(name, problem=str(error))


def _to_text(status: dict[str, Any]) -> str:
    lines = [
        f"{status['dataset']}: {status['summary']}",
        f"  shards    {status['num_shards_finished']} of {status['num_shards']} finished, "
        f"{status['num_bytes'] / 1e6:,.1f} MB",
        f"  captions  {status['num_captions_written']} written, {status['num_captions_failed']} failed, "
        f"of {status['num_captions']}",
    ]
    lines += [f"  failed    {reason}: {count}" for reason, count in status["failures_by_reason"].items()]
    lines += [f"  set aside {name}: {reason}" for name, reason in status["shards_set_aside"].items()]
    lines += [f"  damaged   {problem}" for problem in status["damaged"].values()]
    for worker in status["workers"]:
        doing = f"shard {worker['shard']}" if worker["shard"] else "between shards"
        lines.append(
            f"  worker    {worker['name']} on {worker['device']}: {doing}, {worker['num_images_made']} "
            f"images made, {worker['images_per_second']:.2f} images/s"
        )
    return "\n".join(lines)
