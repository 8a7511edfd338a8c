from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist

from stablerep import distributed
from stablerep.runs.state import RunCheckpoints
from tests.stablerep.ranks import run_on_ranks


def gather_sizes_over_the_cpu(num_rows: int) -> list[int]:
    """As where the ranks' own group is NCCL's: rows may be on a device that the group cannot reach."""
    distributed._cpu_group = dist.new_group(backend="gloo")
    try:
        return distributed.gather_sizes(num_rows, torch.device("meta"))
    finally:
        distributed.close_cpu_group()


def meet(rank: int) -> dict[str, object]:
    """What two ranks say to each other, in one process group for all tests."""
    said: dict[str, object] = {
        "largest": distributed.largest_on_any_rank([3, 7][rank]),
        "any": distributed.is_true_on_any_rank(rank == 1),
        "none": distributed.is_true_on_any_rank(False),
        "objects": distributed.all_gather_objects({"rank": rank}),
        "sizes": distributed.gather_sizes(rank + 3, torch.device("cpu")),
        "sizes over the CPU": gather_sizes_over_the_cpu(rank + 3),
    }
    try:
        distributed.raise_together(FileNotFoundError("no shards") if rank == 1 else None)
    except (OSError, ValueError) as error:
        said["raised"] = f"{type(error).__name__}: {error}"
    callback = RunCheckpoints(Path(f"run-{rank + 1}"), 1, resumed_from=None, timeout=timedelta(seconds=9))
    try:
        callback.setup(pl.Trainer(logger=False, barebones=True), pl.LightningModule(), "fit")
    except ValueError as error:
        said["folders"] = str(error)
    callback.close()
    dist.barrier()
    if rank == 1:
        said["told"] = distributed.tell_failure(RuntimeError("out of\nmemory"))
    dist.barrier()
    if rank == 0:
        said["told"] = distributed.tell_failure(RuntimeError("connection closed"))
    return said


@pytest.fixture(scope="module")
def said() -> list[dict[str, object]]:
    return run_on_ranks(meet, 2)


@pytest.mark.distributed
def test_sizes_are_gathered_where_the_host_need_not_wait(said: list[dict[str, object]]) -> None:
    for words in said:
        assert words["sizes"] == words["sizes over the CPU"] == [3, 4]


@pytest.mark.distributed
def test_flags_and_objects_reach_every_rank(said: list[dict[str, object]]) -> None:
    for words in said:
        assert words["largest"] == 7
        assert words["any"] is True
        assert words["none"] is False
        assert words["objects"] == [{"rank": 0}, {"rank": 1}]


@pytest.mark.distributed
def test_error_of_one_rank_is_raised_there_and_ends_the_others(said: list[dict[str, object]]) -> None:
    assert said[1]["raised"] == "FileNotFoundError: no shards"
    assert said[0]["raised"] == "FailedElsewhereError: no shards"


@pytest.mark.distributed
def test_ranks_that_chose_different_folders_stop(said: list[dict[str, object]]) -> None:
    for words in said:
        assert str(words["folders"]).startswith(
            "rank 1 would write to run-2 and go on from None, rank 0 to run-1"
        )


@pytest.mark.distributed
def test_first_failure_is_the_one_that_is_told(said: list[dict[str, object]]) -> None:
    assert said[0]["told"] == said[1]["told"] == "rank 1: out of memory"


def test_one_process_is_rank_0_of_1() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather_objects("x") == ["x"]
    assert distributed.largest_on_any_rank(5) == 5
    rows = np.arange(6).reshape(3, 2)
    assert distributed.all_gather_rows(rows, [3]) is rows  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        distributed.raise_together(KeyError("own"))
    assert distributed.tell_failure(ValueError("alone")) == "rank 0: alone"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistNetworkError("timed out"), True),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection reset by peer"), True),
        (RuntimeError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_error_of_a_lost_rank_is_told_from_one_of_its_own(error: Exception, expected: bool) -> None:
    assert distributed.is_lost_rank(error) is expected
