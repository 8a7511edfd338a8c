"""What became of an epoch's captions, over all ranks: expected = used + dropped, by reason."""

import logging
from collections.abc import Sequence
from typing import Any

from stablerep.data.order import Position
from stablerep.data.stream import DROP_REASONS

logger = logging.getLogger(__name__)


class Tally:
    """The counts of one epoch.

    Args:
        epoch: Index of the epoch.
        num_used: Captions that are counted as used from the start.
    """

    def __init__(self, epoch: int, num_used: int = 0) -> None:
        self.epoch, self.num_used = epoch, num_used
        self.num_dropped = [0] * len(DROP_REASONS)
        self._last = (0, [0] * len(DROP_REASONS))

    def add(self, num_captions: int, num_dropped: Sequence[int]) -> None:
        """Counts a step of all ranks."""
        self._last = (num_captions - sum(num_dropped), list(num_dropped))
        self.num_used += self._last[0]
        self.num_dropped = [n + new for n, new in zip(self.num_dropped, num_dropped, strict=True)]

    @property
    def num_dropped_in_all(self) -> int:
        """For whatever reason."""
        return sum(self.num_dropped)

    def finish(self, num_expected: int) -> None:
        """Logs the epoch's counts.

        Raises:
            RuntimeError: They do not add up to the captions that the epoch's steps have taken.
        """
        line = (
            f"epoch {self.epoch}: {num_expected} captions expected = {self.num_used} used + "
            f"{self.num_dropped_in_all} dropped{self.describe()}"
        )
        if self.num_used + self.num_dropped_in_all != num_expected:
            raise RuntimeError(f"{line}: the counts do not add up")
        logger.info("%s", line)

    def describe(self) -> str:
        """The reasons that occurred, in brackets."""
        parts = [f"{reason} {n}" for reason, n in zip(DROP_REASONS, self.num_dropped, strict=True) if n]
        return f" ({', '.join(parts)})" if parts else ""

    def state_dict(self, position: Position) -> dict[str, Any]:
        """The counts up to a position: without the last step, if its batch was there and not taken."""
        num_used, num_dropped = self.num_used, self.num_dropped
        if self.epoch == position.epoch and num_used + sum(num_dropped) > position.num_captions:
            num_used -= self._last[0]
            num_dropped = [n - last for n, last in zip(num_dropped, self._last[1], strict=True)]
        return {"num_used": num_used, "num_dropped": list(num_dropped)}

    @classmethod
    def resume(cls, position: Position, state: dict[str, Any]) -> "Tally":
        """Goes on at a position; counts that are not of what precedes it are left."""
        tally = cls(position.epoch, position.num_captions)
        if state["num_used"] + sum(state["num_dropped"]) == position.num_captions:
            for index, num_dropped in enumerate(state["num_dropped"]):  # an older one knew fewer reasons
                tally.num_dropped[index] = num_dropped
            tally.num_used = state["num_used"]
        return tally
