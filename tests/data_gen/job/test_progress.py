"""Laws of the progress that a running job shows: the same figures in lines and live."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_gen.job import progress
from data_gen.job.plan import Plan
from data_gen.job.progress import JobStatus, describe, format_seconds, showing
from data_gen.job.work_folder import Worker, WorkFolder
from tests.data_gen.test_card import make_dataset
from tests.processes import wait_until


def build_report(name: str, **values: Any) -> dict[str, Any]:
    """What a worker says."""
    idle = {"shard": None, "num_images_in_shard": 0, "num_images_made": 0, "images_per_second": 0.0}
    return {"name": name, "device": "cpu", "failures_by_reason": {}, **idle, **values}


def build_status(*workers: dict[str, Any], **values: Any) -> JobStatus:
    """A quarter of 4,000 images is ready; keywords change it."""
    fields: dict[str, Any] = {"num_shards": 8, "num_shards_finished": 2, "num_images": 4000}
    fields |= {"num_images_ready": 1000, "set_aside": {}, "workers": list(workers)}
    return JobStatus(**(fields | values))


def render(status: JobStatus) -> list[str]:
    """The live view as lines of text, 100 characters wide."""
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(progress._build_view(status))
    return capture.get().splitlines()


def test_the_line_tells_share_rate_time_left_failures_and_shards_set_aside() -> None:
    first = build_report("a", images_per_second=1.5, failures_by_reason={"non_finite": 1})
    second = build_report(
        "b", images_per_second=0.5, failures_by_reason={"non_finite": 1, "safety_checker": 3}
    )
    assert describe(build_status(first, second, set_aside={"00003": "", "00001": ""})) == (
        "1,000 of 4,000 images (25 %); 2.00 images/s by 2 workers; 25 min left; "
        "failed captions: safety_checker 3, non_finite 2; shards set aside: 00001, 00003"
    )
    assert describe(build_status()) == "1,000 of 4,000 images (25 %)"
    assert describe(build_status(num_images=0, num_images_ready=0)) == "0 of 0 images (0 %)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (42, "42 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (5900, "98 min"),
        (12_000, "3 h 20 min"),
        (356_400, "4 d 3 h"),
    ],
)
def test_a_time_is_told_in_two_units_at_most(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_live_view_has_a_bar_and_a_row_for_each_worker() -> None:
    busy = build_report(
        "b",
        device="cuda:1",
        shard="00007",
        num_images_in_shard=12,
        num_images_made=340,
        images_per_second=2.5,
    )
    lines = render(build_status(busy | {"failures_by_reason": {"non_finite": 4}}, build_report("a")))
    assert lines[0].startswith("1,000 of 4,000 images (25 %); 2.50 images/s by 2 workers; 20 min left; ")
    assert lines[1].rstrip() == 25 * "━"
    assert [line.split() for line in lines[2:]] == [
        ["worker", "device", "shard", "in", "shard", "made", "images/s", "failed"],
        ["a", "cpu", "–", "0", "0", "0.00", "0"],
        ["b", "cuda:1", "00007", "12", "340", "2.50", "4"],
    ]


def test_the_live_view_of_a_job_without_workers_or_images_can_be_drawn() -> None:
    lines = render(build_status(num_images=0, num_images_ready=0))
    assert lines[0].rstrip() == "0 of 0 images (0 %)"


class Stream(io.StringIO):
    """Standard error that may be a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@contextmanager
def shown_job(root: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A job that is shown, and is finished in the end; gives what waits until a text was shown."""
    dataset = make_dataset(root)
    marker = dataset.store.read("00001_stats.json")
    dataset.store.delete("00001_stats.json")
    work_folder = WorkFolder(dataset.store, Worker.of_this_process(), 60.0)
    report = {"shard": "00001", "num_images_in_shard": 3, "num_images_made": 15, "images_per_second": 0.5}
    work_folder.report({"device": "cpu", "failures_by_reason": {}, **report})
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", {True: 0.02})
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def wait_for(text: str) -> None:
        wait_until(lambda: text in stream.getvalue(), stream.getvalue)

    with showing(Plan.read(dataset.store), work_folder):
        wait_for("15 of 16 images (94 %); 0.50 images/s by 1 worker; 2 s left")
        work_folder.withdraw_report()
        dataset.store.publish("00001_stats.json", marker)
        yield wait_for


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_job_is_shown_while_it_runs_and_no_longer(
    tmp_path: Path, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(is_terminal)
    with shown_job(tmp_path / "dataset", stream, monkeypatch) as wait_for:
        wait_for("16 of 16 images (100 %)")
    shown = stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == shown
    if not is_terminal:
        lines = shown.splitlines()
        assert all(line.startswith("stablerep generate: ") for line in lines)
        assert lines[-1] == "stablerep generate: 16 of 16 images (100 %)"


def test_a_store_that_does_not_answer_stops_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("no answer")

    with shown_job(tmp_path / "dataset", Stream(is_terminal=False), monkeypatch) as wait_for:
        with monkeypatch.context() as context:
            context.setattr(progress, "read_status", fail)
            time.sleep(0.1)
        wait_for("16 of 16 images (100 %)")
