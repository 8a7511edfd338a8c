"""Laws of `stablerep status`: what it counts, what it names, and what its exit code says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_gen.job.shard_job import Progress
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.shard_writer import write_manifest
from data_gen.shards import hash_settings
from stablerep.cli import main
from tests.data_gen.test_card import make_dataset


def ask(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """The exit code, and the status as JSON and as text."""
    capsys.readouterr()
    code = main(["status", "--dataset", str(root), "--json"])
    status = json.loads(capsys.readouterr().out)
    assert main(["status", "--dataset", str(root)]) == code
    return code, status, capsys.readouterr().out


def test_a_dataset_of_which_every_caption_is_written_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "dataset")
    code, status, text = ask(tmp_path / "dataset", capsys)
    assert (code, status["is_finished"], status["damaged"]) == (0, True, {})
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "dataset").glob("*.tar"))
    assert text == (
        f"{tmp_path / 'dataset'}: 16 of 16 images (100 %)\n"
        f"  shards    2 of 2 finished, {num_bytes / 1e6:.1f} MB\n"
        "  captions  8 written, 0 failed, of 8\n"
    )


def test_failed_captions_and_shards_set_aside_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "dataset", num_captions=14, num_failed=3)
    dataset.store.delete("00000_stats.json")
    work_folder = WorkFolder(dataset.store, Worker.of_this_process(), 60.0)
    work_folder.set_aside("00000", "killed by SIGKILL (×3)")
    code, status, text = ask(dataset.path, capsys)
    assert (code, status["is_finished"]) == (1, True)
    assert (status["num_captions_written"], status["num_captions_failed"]) == (5, 3)
    assert status["failures_by_reason"] == {"safety_checker": 2, "non_finite": 1}
    assert status["shards_set_aside"] == {"00000": "killed by SIGKILL (×3)"}
    for line in (
        "16 of 28 images (57 %); shards set aside: 00000\n",
        "  shards    2 of 3 finished, ",
        "  captions  5 written, 3 failed, of 14\n",
        "  failed    safety_checker: 2\n",
        "  failed    non_finite: 1\n",
        "  set aside 00000: killed by SIGKILL (×3)\n",
    ):
        assert line in text
    make_dataset(tmp_path / "failed", num_failed=1)
    assert ask(tmp_path / "failed", capsys)[0] == 1


def test_a_worker_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    dataset.store.delete("00001_stats.json")
    worker = Worker.of_this_process()
    report = Progress(num_images_made=12, num_images_in_shard=3, seconds=6.0).to_dict() | {"shard": "00001"}
    WorkFolder(dataset.store, worker, 60.0).report({"device": "cuda:1", **report})
    code, status, text = ask(dataset.path, capsys)
    assert (code, status["num_images_ready"], status["images_per_second"]) == (75, 15, 2.0)
    assert status["seconds_left"] == 0.5
    assert f"  worker    {worker.name} on cuda:1: shard 00001, 12 images made, 2.00 images/s\n" in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"num_written": 6, "num_im', "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", "not a completion marker (KeyError: 'num_written')"),
    ],
)
def test_a_damaged_marker_is_named_and_its_shard_is_not_finished(
    tmp_path: Path, content: bytes, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    (dataset.path / "00000_stats.json").write_bytes(content)
    code, status, text = ask(dataset.path, capsys)
    assert (code, status["is_finished"]) == (75, False)
    assert (status["num_shards_finished"], status["num_captions_written"]) == (1, 2)
    assert status["num_images_ready"] == 4
    assert list(status["damaged"]) == ["00000"]
    assert problem in status["damaged"]["00000"]
    assert f"  damaged   {dataset.path}/00000_stats.json: " in text
    assert problem in text


def test_a_marker_that_does_not_tell_its_failures_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "dataset", num_failed=1)
    marker = dataset.path / "00001_stats.json"
    marker.write_text(marker.read_text().replace("failures_by_reason", "other"))
    code, status, _ = ask(dataset.path, capsys)
    assert (code, list(status["damaged"]), status["num_captions_failed"]) == (75, ["00001"], 0)


def test_shards_of_the_plan_that_is_extended_are_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    settings = {**dataset.manifest.settings, "num_images_per_caption": 3}
    extended = dataclasses.replace(
        dataset.manifest,
        settings=settings,
        settings_hash=hash_settings(settings),
        num_images_per_caption=3,
        extended_from=(dataset.manifest.settings_hash,),
    )
    write_manifest(dataset.store, extended, replace=True)  # as `--extend` does, before it looks at the shards
    code, status, text = ask(dataset.path, capsys)
    assert (code, status["is_finished"], status["num_shards_finished"]) == (75, False, 0)
    assert list(status["damaged"]) == ["00000", "00001"]
    assert text.count("settings hash") == 2


def test_a_missing_dataset_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--dataset", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
