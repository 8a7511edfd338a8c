"""Which shard a worker takes next."""

import random
import time

from data_gen.job.plan import Plan
from data_gen.job.work_folder import WorkFolder

_SECONDS_BETWEEN_LISTINGS = 60.0
_LISTING_SHARE = 0.05
"""Share of the time that listing the dataset may take."""


class ShardQueue:
    """The shards that are still to be made.

    A single worker takes them in order. Among many, each takes one of the next few that nobody had claimed
    when it last looked, so that they seldom meet.
    """

    def __init__(self, plan: Plan, work_folder: WorkFolder) -> None:
        self._plan, self._work_folder = plan, work_folder
        self._random = random.Random(work_folder.worker.name)
        self._pending: list[int] = []
        self._claimed: set[str] = set()
        self._list()

    @property
    def has_pending(self) -> bool:
        """Whether shards are left, free ones or those that others have claimed."""
        return bool(self._pending)

    def next(self) -> int | None:
        """Claims a shard; None where none is free."""
        if time.monotonic() > self._list_again_at:
            self._list()
        for index in self._order():
            name = self._plan.manifest.shard_name(index)
            if self._plan.store.exists(f"{name}_stats.json") or self._work_folder.is_set_aside(name):
                self._pending.remove(index)
            elif self._work_folder.claim(name):
                if not self._plan.store.exists(f"{name}_stats.json"):  # or published and released just now
                    return index
                self._work_folder.release(name)
            else:
                self._claimed.add(name)
        return None

    def _order(self) -> list[int]:
        names = {index: self._plan.manifest.shard_name(index) for index in self._pending}
        free = [index for index in self._pending if names[index] not in self._claimed]
        head, tail = free[: 2 * len(self._claimed)], free[2 * len(self._claimed) :]
        self._random.shuffle(head)
        return [*head, *tail, *(index for index in self._pending if names[index] in self._claimed)]

    def _list(self) -> None:
        start = time.monotonic()
        markers = {name for name in self._plan.store.list() if name.endswith("_stats.json")}
        set_aside = self._work_folder.list_set_aside()
        self._pending = [
            index
            for index, name in enumerate(self._plan.shard_names)
            if f"{name}_stats.json" not in markers and name not in set_aside
        ]
        self._claimed = self._work_folder.list_claims()
        seconds = time.monotonic() - start
        self._list_again_at = time.monotonic() + max(_SECONDS_BETWEEN_LISTINGS, seconds / _LISTING_SHARE)
