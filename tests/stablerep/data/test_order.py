import itertools
from collections import Counter

import numpy as np
import pytest

from stablerep.data.order import Order, Position

SIZES = [5, 1, 11, 8]
TOTAL = sum(SIZES)


def captions(order: Order, epoch: int, positions: range | None = None) -> list[tuple[int, int, int]]:
    """(dataset, shard, sample) at each position."""
    places = order.locate(epoch, np.array(positions or range(order.num_captions)))
    return list(zip(places.dataset.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True))


@pytest.mark.parametrize("window", [1, 4, 7, 1000])
def test_epoch_holds_every_caption_once(window: int) -> None:
    order = Order([SIZES], None, 0, window)
    every = [(0, shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]
    for epoch in range(5):
        assert sorted(captions(order, epoch)) == every


def test_caption_at_a_position_does_not_depend_on_what_was_asked_before() -> None:
    whole = captions(Order([SIZES], None, 3, 4), 2)
    for position in (24, 0, 13):
        alone = captions(Order([SIZES], None, 3, 4), 2, range(position, position + 1))
        assert alone == [whole[position]]


def test_order_differs_by_seed_and_by_epoch() -> None:
    orders = [captions(Order([SIZES], None, seed, 4), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_window_of_one_keeps_the_captions_of_a_shard_side_by_side() -> None:
    order = captions(Order([SIZES], None, 0, 1), 0)
    steps = [(b[2] - a[2], a[1] == b[1]) for a, b in itertools.pairwise(order)]
    num_seams = sum(step != (1, True) for step in steps)
    assert num_seams <= len(SIZES)  # between shards, and where the ring was cut


def test_window_shuffles_within_itself_alone() -> None:
    plain, shuffled = (captions(Order([SIZES], None, 0, window), 0) for window in (1, 5))
    assert plain != shuffled
    for start in range(0, TOTAL, 5):
        assert sorted(plain[start : start + 5]) == sorted(shuffled[start : start + 5])


def test_captions_that_are_left_over_differ_from_epoch_to_epoch() -> None:
    order = Order([[11]], None, 0, 4)
    assert len({captions(order, epoch, range(10, 11))[0] for epoch in range(60)}) == 11


def test_first_captions_of_epochs_are_uniform() -> None:
    counts = Counter(captions(Order([SIZES], None, 0, 6), epoch, range(1))[0] for epoch in range(2000))
    expected = 2000 / TOTAL
    chi_square = sum(
        (counts[place] - expected) ** 2 / expected for place in captions(Order([SIZES], None, 0, 1), 0)
    )
    assert chi_square < 42.98  # the 1 % bound of 24 degrees of freedom


def test_mixture_has_the_weights_in_each_deal() -> None:
    order = Order([[3000], [1000, 500]], [1.0, 3.0], 0, 64)
    for epoch in (0, 3):
        dealt = np.array([place[0] for place in captions(order, epoch)])
        for start in range(0, 4096, 1024):
            assert (dealt[start : start + 1024] == 0).sum() == 256


def test_dataset_of_a_mixture_goes_on_from_epoch_to_epoch_before_any_caption_comes_again() -> None:
    order = Order([[40, 30], [50]], [2.0, 1.0], 0, 8)
    for index, size in ((0, 70), (1, 50)):
        seen = [place[1:] for epoch in range(4) for place in captions(order, epoch) if place[0] == index]
        assert len(seen) > size  # more than one pass
        for start in range(0, len(seen) - size + 1, size):
            assert len(set(seen[start : start + size])) == size


def test_weight_too_small_to_be_dealt_is_refused() -> None:
    with pytest.raises(ValueError, match="weights must be at least 1/1024 of the sum, got 1e-05 of it"):
        Order([[10], [10]], [1e-5, 1.0], 0, 4)


def test_weight_too_small_to_be_dealt_within_an_epoch_is_refused() -> None:
    message = "weight of dataset 0 must give it a caption in an epoch of 100, got 0.001 of the sum"
    with pytest.raises(ValueError, match=message):
        Order([[50], [50]], [0.001, 0.999], 0, 4)


def test_position_after_steps_equals_counting() -> None:
    order = Order([[25]], None, 0, 4)
    for size in (3, 4, 25):
        position = Position(0, 6) if size < 25 else Position(0, 0)
        for num_steps in range(40):
            assert order.advance(Position(0, 6) if size < 25 else Position(0, 0), num_steps, size) == position
            position = Position(position.epoch, position.num_captions + size)
            if 25 - position.num_captions < size:
                position = Position(position.epoch + 1, 0)


def test_position_with_less_than_a_step_left_is_the_next_epochs_start() -> None:
    assert Order([[25]], None, 0, 4).advance(Position(3, 22), 0, 4) == Position(4, 0)
