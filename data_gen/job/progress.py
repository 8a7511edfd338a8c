"""How far a job has come: a status read from the dataset's files, shown live, or as JSON.

The status comes from files alone, so that it is the same for a job of this process, of another one, or of a
cluster.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_gen.job.plan import Plan
from data_gen.job.work_folder import WorkFolder

_SECONDS_BETWEEN_LOOKS = {True: 1.0, False: 10.0}
"""On a local disk, in an object store."""
_SECONDS_BETWEEN_LINES = 30.0
_LISTING_SHARE = 0.05
"""Share of the time that listing the dataset may take."""


@dataclass(frozen=True)
class JobStatus:
    """How far a job has come.

    Args:
        num_shards: Shards planned.
        num_shards_finished: Shards with a completion marker.
        num_images: Images planned.
        num_images_ready: Images of finished shards and, as reported, of those in the making; images of failed
            captions count as ready.
        set_aside: Reasons of the shards that were taken out of the job.
        workers: Reports of the living workers.
    """

    num_shards: int
    num_shards_finished: int
    num_images: int
    num_images_ready: int
    set_aside: dict[str, str]
    workers: list[dict[str, Any]]

    @property
    def images_per_second(self) -> float:
        """Of all living workers."""
        return float(sum(worker["images_per_second"] for worker in self.workers))

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None while nothing is known of it."""
        rate = self.images_per_second
        return (self.num_images - self.num_images_ready) / rate if rate > 0 else None

    @property
    def failures_by_reason(self) -> Counter[str]:
        """Captions that the living workers could not make."""
        total: Counter[str] = Counter()
        for worker in self.workers:
            total.update(worker["failures_by_reason"])
        return total


def read_status(plan: Plan, work_folder: WorkFolder, finished: set[str] | None = None) -> JobStatus:
    """Reads how far a job has come.

    Args:
        plan: The dataset's plan.
        work_folder: Its work folder.
        finished: Names of the finished shards; None lists them.
    """
    manifest = plan.manifest
    if finished is None:
        finished = list_finished(plan)
    last = manifest.num_shards - 1
    num_captions = len(finished) * manifest.num_captions_per_shard
    if manifest.shard_name(last) in finished:
        num_captions += manifest.num_captions_in_shard(last) - manifest.num_captions_per_shard
    workers = work_folder.list_reports()
    in_the_making = sum(
        worker["num_images_in_shard"] for worker in workers if worker["shard"] not in {None, *finished}
    )
    return JobStatus(
        num_shards=manifest.num_shards,
        num_shards_finished=len(finished),
        num_images=manifest.num_captions * manifest.num_images_per_caption,
        num_images_ready=num_captions * manifest.num_images_per_caption + in_the_making,
        set_aside=work_folder.list_set_aside(),
        workers=workers,
    )


def list_finished(plan: Plan) -> set[str]:
    """Names of the planned shards that have a completion marker, whatever is in it: one listing alone."""
    markers = {name for name in plan.store.list() if name.endswith("_stats.json")}
    return {name for name in plan.shard_names if f"{name}_stats.json" in markers}


@contextmanager
def showing(plan: Plan, work_folder: WorkFolder) -> Iterator[None]:
    """Shows a job's progress on standard error while the block runs: live on a terminal, else in lines."""
    done = threading.Event()
    show = _show_live if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(_Watch(plan, work_folder), done), name="show", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Watch:
    """Looks at a job again and again; lists the dataset only as often as that is cheap."""

    def __init__(self, plan: Plan, work_folder: WorkFolder) -> None:
        self._plan, self._work_folder = plan, work_folder
        self.seconds_between_looks = _SECONDS_BETWEEN_LOOKS[plan.store.is_local]
        self._finished: set[str] = set()
        self._list_again_at = float("-inf")

    def look(self) -> JobStatus | None:
        """The present status; None if the store does not answer, which who works there will say."""
        try:
            if time.monotonic() >= self._list_again_at:
                start = time.monotonic()
                self._finished = list_finished(self._plan)
                seconds = time.monotonic() - start
                self._list_again_at = time.monotonic() + seconds / _LISTING_SHARE
            return read_status(self._plan, self._work_folder, self._finished)
        except OSError:
            return None


def describe(status: JobStatus) -> str:
    """One line for people."""
    percent = 100 * status.num_images_ready / max(1, status.num_images)
    parts = [f"{status.num_images_ready:,} of {status.num_images:,} images ({percent:.0f} %)"]
    if status.workers:
        num_workers = len(status.workers)
        parts.append(
            f"{status.images_per_second:.2f} images/s by {num_workers} worker{'s' if num_workers > 1 else ''}"
        )
    if status.seconds_left is not None and status.num_images_ready < status.num_images:
        parts.append(f"{format_seconds(status.seconds_left)} left")
    if status.failures_by_reason:
        counts = ", ".join(f"{reason} {count}" for reason, count in status.failures_by_reason.most_common())
        parts.append(f"failed captions: {counts}")
    if status.set_aside:
        parts.append(f"shards set aside: {', '.join(sorted(status.set_aside))}")
    return "; ".join(parts)


def format_seconds(seconds: float) -> str:
    """Such as `42 s`, `12 min`, `3 h 20 min` or `4 d 3 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _show_lines(watch: _Watch, done: threading.Event) -> None:
    while not done.wait(_SECONDS_BETWEEN_LINES):
        if (status := watch.look()) is not None:
            print(f"stablerep generate: {describe(status)}", file=sys.stderr, flush=True)


def _show_live(watch: _Watch, done: threading.Event) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
        while not done.wait(watch.seconds_between_looks):
            if (status := watch.look()) is not None:
                live.update(_build_view(status))


def _build_view(status: JobStatus) -> Any:
    """A bar for the job and a row for each worker."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("worker", "left"), ("device", "left"), ("shard", "left"), ("in shard", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # literals, through a tuple
    for name in ("made", "images/s", "failed"):
        table.add_column(name, justify="right")
    for worker in sorted(status.workers, key=lambda worker: str(worker["name"])):
        table.add_row(
            str(worker["name"]),
            str(worker["device"]),
            str(worker["shard"] or "–"),
            str(worker["num_images_in_shard"]),
            str(worker["num_images_made"]),
            f"{worker['images_per_second']:.2f}",
            str(sum(worker["failures_by_reason"].values())),
        )
    bar = ProgressBar(total=max(1, status.num_images), completed=status.num_images_ready)
    return Group(Text(describe(status)), Padding(bar), table)  # a bar does not end its line
