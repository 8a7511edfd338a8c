"""Runs a function on several gloo ranks; a rank that fails or hangs fails the test."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 300


def _run_rank(
    function: Callable[..., Any], rank: int, num_ranks: int, port: int, args: tuple[Any, ...], results: Queue
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        results.put((rank, function(rank, *args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each rank; arrays and numbers, no tensors."""
    # Hosted here: a port that is looked for and then left to a rank may be another's until it has started.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results: Queue = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(function, rank, num_ranks, store.port, args, results))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        received = dict[int, Any]()
        for _ in processes:
            rank, value, error = results.get(timeout=TIMEOUT_SECONDS)
            assert error is None, f"rank {rank} failed:\n{error}"
            received[rank] = value
        for process in processes:
            process.join(timeout=TIMEOUT_SECONDS)
            assert process.exitcode == 0, f"a rank left with {process.exitcode}"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        results.close()
    return [received[rank] for rank in range(num_ranks)]
