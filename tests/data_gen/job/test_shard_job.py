"""Laws of the thread that writes a shard: in order, within its bound, never in the way of the device."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from data_gen.job.generate import GenerateConfig, run
from data_gen.job.plan import Plan
from data_gen.job.shard_job import Progress, _WritingThread, run_shard
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.shard_writer import ShardWriter
from data_gen.shards import list_complete_shards, read_samples
from data_gen.storage import Store
from tests.data_gen.conftest import CAPTIONS
from tests.data_gen.datasets import NoiseGenerator, read_stats

MakeConfig = Callable[..., GenerateConfig]
SECONDS = 10.0
"""Until a test that hangs gives up."""


def test_the_device_does_not_wait_for_a_slow_writer(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_writing, is_drawn = threading.Event(), threading.Event()
    generate, write = NoiseGenerator.generate, ShardWriter.write

    def draw(self: NoiseGenerator, requests: Any, seed: int) -> Iterator[Any]:
        made = list(generate(self, requests, seed))
        yield made[0]
        assert is_writing.wait(SECONDS)  # while this one is drawn
        yield made[1]
        is_drawn.set()
        yield from made[2:]

    def write_slowly(self: ShardWriter, sample: Any) -> None:
        is_writing.set()
        assert is_drawn.wait(SECONDS)
        write(self, sample)

    monkeypatch.setattr(NoiseGenerator, "generate", draw)
    monkeypatch.setattr(ShardWriter, "write", write_slowly)
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    config = make_config(num_captions_per_shard=5)
    assert run(config) == 0
    (shard,) = list_complete_shards(config.output)
    assert [sample.caption for sample in read_samples(shard)] == CAPTIONS


def test_the_device_does_not_wait_for_a_slow_spill(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_spilling, is_drawn = threading.Event(), threading.Event()
    generate = NoiseGenerator.generate

    def draw(self: NoiseGenerator, requests: Any, seed: int) -> Iterator[Any]:
        made = list(generate(self, requests, seed))
        yield made[0]
        assert is_spilling.wait(SECONDS)
        yield made[1]
        is_drawn.set()
        yield from made[2:]

    def spill_slowly(*_: Any) -> None:
        is_spilling.set()
        assert is_drawn.wait(SECONDS)

    monkeypatch.setattr(NoiseGenerator, "generate", draw)
    monkeypatch.setattr("data_gen.job.work_folder.WorkFolder.write_part", spill_slowly)
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    assert run(make_config(num_captions_per_shard=5, spill_seconds=1e-6)) == 0


def test_failed_captions_are_recorded_in_the_order_of_the_plan(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = NoiseGenerator.generate

    def fail_all_but_one(self: NoiseGenerator, requests: Any, seed: int) -> Iterator[Any]:
        for made in generate(self, requests, seed):
            made.failure = None if made.request.text == CAPTIONS[2] else "non_finite"
            yield made

    monkeypatch.setattr(NoiseGenerator, "generate", fail_all_but_one)
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    config = make_config(num_captions_per_shard=5)
    assert run(config) == 1
    failed = read_stats(list_complete_shards(config.output)[0].store.local_path)["failed_captions"]
    assert [row["caption"] for row in failed] == [*CAPTIONS[:2], *CAPTIONS[3:]]


def hand_over_all(tasks: Iterator[Callable[[], None]], max_waiting: int) -> None:
    with _WritingThread(max_waiting) as thread:
        for task in tasks:
            thread.hand_over(task)


def test_no_more_tasks_wait_than_the_bound() -> None:
    num_handed_over, num_waiting = 0, []

    def count(index: int) -> None:
        if index == 0:
            time.sleep(0.2)  # for the caller to run ahead, if it may
        num_waiting.append(num_handed_over - index)

    with _WritingThread(max_waiting=3) as thread:
        for index in range(20):
            thread.hand_over(partial(count, index))
            num_handed_over += 1
    assert len(num_waiting) == 20
    assert max(num_waiting) <= 3


def test_an_error_stops_the_writing_and_reaches_whoever_hands_over() -> None:
    done: list[int] = []

    def fail_at_two(index: int) -> None:
        if index == 2:
            raise OSError("disk full")
        done.append(index)

    tasks = (partial(fail_at_two, index) for index in range(1000))
    with pytest.raises(OSError, match="disk full"):
        hand_over_all(tasks, max_waiting=2)
    assert done == [0, 1]
    assert len(list(tasks)) >= 990
    with pytest.raises(OSError, match="disk full"), _WritingThread(max_waiting=2) as thread:
        thread.hand_over(lambda: fail_at_two(2))


def test_what_was_handed_over_is_done_however_the_block_ends() -> None:
    done: list[int] = []

    def interrupted() -> Iterator[Callable[[], None]]:
        for index in range(5):
            yield partial(done.append, index)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hand_over_all(interrupted(), max_waiting=9)
    assert done == list(range(5))


def test_samples_that_are_spilled_as_the_work_is_cut_off_count_as_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = NoiseGenerator.generate

    def break_down(self: NoiseGenerator, requests: Any, seed: int) -> Iterator[Any]:
        made = list(generate(self, requests, seed))
        yield from made[:3]
        raise OSError("the device is gone")

    monkeypatch.setattr(NoiseGenerator, "generate", break_down)
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    config = make_config(num_captions_per_shard=5)
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.generate._run_workers", lambda *_: True)  # stopped at once
        assert run(config) == 75
    plan = Plan.read(Store(config.output))
    folder, progress = WorkFolder(plan.store, Worker.of_this_process(), 60.0), Progress()
    with pytest.raises(OSError, match="the device is gone"):
        run_shard(
            plan,
            0,
            NoiseGenerator,  # type: ignore[arg-type]
            folder,
            progress=progress,
            stop=threading.Event(),
            spill_seconds=60.0,
            before_writing=lambda: None,
            say=lambda _: None,
        )
    assert progress.num_samples_saved == 3
    assert progress.num_images_made == 9
