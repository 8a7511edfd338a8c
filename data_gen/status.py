"""`stablerep status`: how far the job of a dataset has come, for people or as JSON."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from data_gen.plan import Plan
from data_gen.progress import describe, list_finished, read_status
from data_gen.shards import map_shards, read_stats
from data_gen.storage import Store
from data_gen.work_folder import Worker, WorkFolder
from data_gen.worker import EXIT_DONE, EXIT_UNFINISHED

EXIT_FAILED = 1


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
        is not finished.

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
    """The status as plain JSON: counts from every marker, and the living workers' reports."""
    work_folder = WorkFolder(plan.store, Worker.of_this_process(), lease_seconds)
    finished = list_finished(plan)
    status = read_status(plan, work_folder, finished)
    found = map_shards(lambda index: _read_finished(plan, index, finished), plan.store, plan.manifest)
    markers = [stats for stats in found if stats is not None]
    failures: Counter[str] = Counter()
    for marker in markers:
        failures.update(marker["failures_by_reason"])
    return {
        "dataset": plan.store.url,
        "settings_hash": plan.manifest.settings_hash,
        "is_finished": len(finished | status.set_aside.keys()) == plan.manifest.num_shards,
        "num_shards": status.num_shards,
        "num_shards_finished": status.num_shards_finished,
        "shards_set_aside": status.set_aside,
        "num_captions": plan.manifest.num_captions,
        "num_captions_written": sum(marker["num_written"] for marker in markers),
        "num_captions_failed": sum(marker["num_failed"] for marker in markers),
        "failures_by_reason": dict(failures),
        "num_images": status.num_images,
        "num_images_ready": status.num_images_ready,
        "num_bytes": sum(marker["tar"]["num_bytes"] for marker in markers),
        "images_per_second": status.images_per_second,
        "seconds_left": status.seconds_left,
        "workers": status.workers,
        "summary": describe(status),
    }


def _read_finished(plan: Plan, index: int, finished: set[str]) -> dict[str, Any] | None:
    name = plan.manifest.shard_name(index)
    return read_stats(plan.store, name) if name in finished else None


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
    for worker in status["workers"]:
        doing = f"shard {worker['shard']}" if worker["shard"] else "between shards"
        lines.append(
            f"  worker    {worker['name']} on {worker['device']}: {doing}, {worker['num_images_made']} "
            f"images made, {worker['images_per_second']:.2f} images/s"
        )
    return "\n".join(lines)
