import logging

import pytest

from stablerep.data.order import Position
from stablerep.data.tally import Tally


def test_counts_are_logged_by_reason(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally(2)
    tally.add(10, [1, 0, 0, 0])
    tally.add(10, [0, 0, 2, 0])
    with caplog.at_level(logging.INFO):
        tally.finish(20)
    assert (
        "epoch 2: 20 captions expected = 17 used + 3 dropped (shard broken 1, image undecodable 2)"
        in caplog.text
    )


def test_counts_that_do_not_add_up_are_an_error() -> None:
    tally = Tally(0)
    tally.add(10, [0, 0, 0, 0])
    with pytest.raises(RuntimeError, match="20 captions expected = 10 used .* do not add up"):
        tally.finish(20)


def test_counts_go_on_after_a_resume() -> None:
    tally = Tally(1)
    tally.add(10, [0, 1, 0, 0])
    tally.add(10, [2, 0, 0, 0])
    again = Tally.resume(Position(1, 20), tally.state_dict(Position(1, 20)))
    assert (again.num_used, again.num_dropped) == (17, [2, 1, 0, 0])


def test_batch_whose_step_was_not_taken_does_not_count() -> None:
    tally = Tally(1)
    tally.add(10, [0, 1, 0, 0])
    tally.add(10, [2, 0, 0, 0])
    again = Tally.resume(Position(1, 10), tally.state_dict(Position(1, 10)))
    assert (again.num_used, again.num_dropped) == (9, [0, 1, 0, 0])


def test_counts_of_another_place_are_left() -> None:
    tally = Tally(1)
    tally.add(10, [0, 1, 0, 0])
    again = Tally.resume(Position(1, 15), tally.state_dict(Position(1, 15)))
    assert (again.num_used, again.num_dropped) == (15, [0, 0, 0, 0])
