"""The order of captions: a pure function of (seed, epoch), computed at any place without what precedes it.

    pass      a dataset's shards, permuted, laid end to end in a ring that starts anywhere: N captions
    windows   of W captions each; within each the captions are shuffled
    mixture   the epoch's positions 0 … T − 1 are dealt to the datasets by weight, evenly; each dataset goes
              on where it stopped, pass after pass, so no caption comes again before all of its dataset have
    steps     step k of G = ranks · B captions takes the positions [k·G, (k + 1)·G) of what is left of the
              epoch, rank r the r-th B of them

The caption at a position costs O(number of shards + W), once a pass and a window.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_POSITIONS_IN_DEAL = 1024
"""Positions that are dealt to the datasets at a time; weights are kept to this fraction."""

_PASS, _WINDOW = range(2)  # keep the random numbers of the two apart
_NUM_KEPT = 8
Integers = NDArray[np.int64]


class Places(NamedTuple):
    """Where captions lie, one row a caption.

    Shapes:
        Each int64 [n]: which dataset, which of its passes (from 0), which shard of it, which sample in that.
    """

    dataset: Integers
    passes: Integers
    shard: Integers
    sample: Integers


@dataclass(frozen=True)
class Position:
    """How far the data are consumed.

    Attributes:
        epoch: Index of the epoch.
        num_captions: Captions of it that are consumed, over all ranks.
    """

    epoch: int
    num_captions: int


class Order:
    """The endless sequence of captions of one or several datasets.

    An epoch has as many positions as the datasets have captions together. With weights, a dataset may thus
    be passed more than once in an epoch, another not whole; each begins the next epoch where it stopped.

    Args:
        num_samples: Captions of each shard, for each dataset.
        weights: Share of the captions that each dataset gets, up to a factor; None is its size.
        seed: Seed of the order, >= 0.
        num_captions_in_window: W, >= 1.

    Raises:
        ValueError: A weight is too small to be dealt, or to be dealt within an epoch.
    """

    def __init__(
        self,
        num_samples: Sequence[Sequence[int]],
        weights: Sequence[float] | None,
        seed: int,
        num_captions_in_window: int,
    ) -> None:
        self._sizes = [np.asarray(sizes, dtype=np.int64) for sizes in num_samples]
        self._totals = [int(sizes.sum()) for sizes in self._sizes]
        self._seed, self._window = seed, num_captions_in_window
        self._cache: dict[Hashable, NDArray[np.int64]] = {}
        self.num_captions = sum(self._totals)
        shares = np.array(self._totals if weights is None else weights, dtype=np.float64)
        self._quotas = _round_shares(shares / shares.sum())
        self._dealt, self._before = _deal(self._quotas)
        num_deals, rest = divmod(self.num_captions, NUM_POSITIONS_IN_DEAL)
        part = np.bincount(self._dealt[:rest], minlength=len(shares))
        self._num_per_epoch = num_deals * self._quotas + part
        if not self._num_per_epoch.all():
            least = int(self._num_per_epoch.argmin())
            raise ValueError(
                f"weight of dataset {least} must give it a caption in an epoch of {self.num_captions}, "
                f"got {shares[least] / shares.sum():.2g} of the sum"
            )

    def locate(self, epoch: int, positions: Integers) -> Places:
        """The captions at positions of an epoch.

        Shapes:
            positions int64 [n], each in [0, num_captions) -> Places of n
        """
        dataset, turn = self._turns(positions)
        turn = turn + epoch * self._num_per_epoch[dataset]
        totals = np.array(self._totals)[dataset]
        passes, places = np.divmod(turn, totals)
        shard, sample = np.empty_like(turn), np.empty_like(turn)
        windows = places // self._window
        for key in {*zip(dataset.tolist(), passes.tolist(), windows.tolist(), strict=True)}:
            rows = np.flatnonzero((dataset == key[0]) & (passes == key[1]) & (windows == key[2]))
            shuffled = key[2] * self._window + self._shuffle(*key)[places[rows] - key[2] * self._window]
            shard[rows], sample[rows] = self._in_ring(key[0], key[1], shuffled)
        return Places(dataset, passes, shard, sample)

    def num_steps(self, num_captions_per_step: int, position: Position = Position(0, 0)) -> int:
        """Whole steps left in the epoch: ⌊(T − consumed) / G⌋."""
        return (self.num_captions - position.num_captions) // num_captions_per_step

    def advance(self, position: Position, num_steps: int, num_captions_per_step: int) -> Position:
        """The position after a number of steps; where less than a step is left, the next epoch's start."""
        left = self.num_steps(num_captions_per_step, position)
        if num_steps < left:
            taken = position.num_captions + num_steps * num_captions_per_step
            return Position(position.epoch, taken)
        epochs, steps = divmod(num_steps - left, self.num_steps(num_captions_per_step))
        return Position(position.epoch + 1 + epochs, steps * num_captions_per_step)

    def _turns(self, positions: Integers) -> tuple[Integers, Integers]:
        """To which dataset each position is dealt, and how many of its captions were before."""
        deals, places = np.divmod(positions, NUM_POSITIONS_IN_DEAL)
        dataset = self._dealt[places]
        return dataset, deals * self._quotas[dataset] + self._before[places]

    def _shuffle(self, dataset: int, index_of_pass: int, window: int) -> Integers:
        size = min(self._window, self._totals[dataset] - window * self._window)
        rng = np.random.default_rng([self._seed, _WINDOW, dataset, index_of_pass, window])
        return self._keep(("window", dataset, index_of_pass, window), lambda: rng.permutation(size))

    def _in_ring(self, dataset: int, index_of_pass: int, places: Integers) -> tuple[Integers, Integers]:
        """Shard and sample of places in a pass."""

        def build() -> Integers:  # rows: the shards in their order, and where each ends
            rng = np.random.default_rng([self._seed, _PASS, dataset, index_of_pass])
            order = rng.permutation(len(self._sizes[dataset]))
            ends = self._sizes[dataset][order].cumsum()
            return np.stack([order, ends, np.full_like(ends, rng.integers(self._totals[dataset]))])

        order, ends, start = self._keep(("pass", dataset, index_of_pass), build)
        places = (places + start[0]) % self._totals[dataset]
        rank = np.searchsorted(ends, places, side="right")
        return order[rank], places - (ends - self._sizes[dataset][order])[rank]

    def _keep(self, key: Hashable, build: Callable[[], Integers]) -> Integers:
        if key not in self._cache:
            while len(self._cache) >= _NUM_KEPT + 3 * len(self._sizes):
                del self._cache[next(iter(self._cache))]
            self._cache[key] = build()
        return self._cache[key]


def _deal(quotas: Integers) -> tuple[Integers, Integers]:
    """The datasets that a run of positions goes to, each at even distances, and how often before."""
    before = np.concatenate([np.arange(quota) for quota in quotas])
    dataset = np.repeat(np.arange(len(quotas)), quotas)
    order = np.argsort((before + 0.5) / quotas[dataset], kind="stable")
    return dataset[order], before[order]


def _round_shares(shares: NDArray[np.float64]) -> Integers:
    """Positions of a deal for each dataset, by largest remainders."""
    exact = shares * NUM_POSITIONS_IN_DEAL
    quotas = np.floor(exact).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: NUM_POSITIONS_IN_DEAL - int(quotas.sum())]] += 1
    if (quotas < 1).any():
        least = f"1/{NUM_POSITIONS_IN_DEAL} of the sum"
        raise ValueError(f"weights must be at least {least}, got {shares.min():.2g} of it")
    return quotas
