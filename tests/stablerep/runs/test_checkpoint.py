import hashlib
import multiprocessing
import os
import random
import resource
import signal
import zipfile
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch

from stablerep.runs.checkpoint import (
    AtomicCheckpointIO,
    NonFiniteWeightsError,
    drop_superseded,
    find_checkpoint,
    find_non_finite,
    list_checkpoints,
    verify_checkpoint,
)
from tests.processes import MAX_SECONDS

NUM_KILLS = 40


def build_checkpoint(step: int, size: int = 16) -> dict[str, Any]:
    """What the reader asks for, and little more."""
    return {
        "state_dict": {"weight": torch.full((size,), float(step))},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(size)}}, "param_groups": []}],
        "lr_schedulers": [],
        "loops": {},
        "pytorch-lightning_version": "2.6",
        "stablerep_backbone": {},
        "global_step": step,
    }


def save(path: Path, step: int, age_seconds: int = 0) -> Path:
    AtomicCheckpointIO().save_checkpoint(build_checkpoint(step), path)
    os.utime(path, (1e9 - age_seconds, 1e9 - age_seconds))
    return path


def read_step(path: str | Path | None) -> int:
    assert path is not None
    return int(torch.load(path, weights_only=True)["global_step"])


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_recorded_sha256_is_that_of_what_torch_wrote(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", step=1)
    with zipfile.ZipFile(path) as file:
        tag, _, digest = file.comment.decode().partition(":")
        comment = file.comment
    without_comment = path.read_bytes()[: -len(comment) - 2] + b"\0\0"
    assert (tag, digest) == ("sha256", hashlib.sha256(without_comment).hexdigest())
    assert AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].tolist() == [1.0] * 16


def test_any_flipped_byte_and_any_cut_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", step=1)
    whole = path.read_bytes()
    rng = random.Random(0)
    for place in [0, len(whole) - 1, len(whole) - 75, *rng.choices(range(len(whole)), k=100)]:
        flip_byte(path, place)
        with pytest.raises(ValueError, match=r"last.ckpt is (damaged|torn)"):
            verify_checkpoint(path)
        path.write_bytes(whole)
    for length in [0, 1, 71, len(whole) - 1, *rng.choices(range(len(whole)), k=100)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"last.ckpt is (damaged|torn)"):
            verify_checkpoint(path)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for step in range(4):
        save(path, step)
    kept = sorted(other.name for other in path.parent.iterdir())
    assert kept == ["last.ckpt", "previous.ckpt"]
    assert [read_step(path.with_name(name)) for name in kept] == [3, 2]


def test_last_is_that_of_the_latest_run_whatever_the_times_of_the_files(tmp_path: Path) -> None:
    ages = {"run": 0, "run-2": 1, "run-10": 2, "run-simclr": 0, "run-2-long": 0, "other": 0}
    for name, age in ages.items():
        for step in range(2):
            save(tmp_path / name / "checkpoints" / "last.ckpt", step)
        os.utime(tmp_path / name / "checkpoints" / "last.ckpt", (1e9 - age, 1e9 - age))  # as copies have it
    expected = [
        tmp_path / name / "checkpoints" / file
        for name in ("run-10", "run-2", "run")
        for file in ("last.ckpt", "previous.ckpt")
    ]
    assert list_checkpoints(tmp_path / "run") == expected
    assert find_checkpoint("last", tmp_path / "run") == str(expected[0])
    assert find_checkpoint("auto", tmp_path / "run") == str(expected[0])
    assert find_checkpoint(None, tmp_path / "run") is None


@pytest.mark.parametrize(
    ("former", "own", "num_own", "expected"),
    [
        ("run", "run-2", 2, ["last.ckpt"]),
        ("run-2", "run-3", 2, ["last.ckpt"]),
        ("run", "run-2", 1, ["last.ckpt", "previous.ckpt"]),
        ("other", "run-2", 2, ["last.ckpt", "previous.ckpt"]),
        ("elsewhere/run", "run-2", 2, ["last.ckpt", "previous.ckpt"]),
    ],
)
def test_a_run_that_went_on_in_another_keeps_one_checkpoint(
    former: str, own: str, num_own: int, expected: list[str], tmp_path: Path
) -> None:
    paths = [tmp_path / name / "checkpoints" / "last.ckpt" for name in (former, own)]
    for path, number in zip(paths, [2, num_own], strict=True):
        for step in range(number):
            save(path, step)
    drop_superseded(*paths)
    assert sorted(path.name for path in paths[0].parent.iterdir()) == expected
    assert len(list(paths[1].parent.iterdir())) == num_own


def test_last_falls_back_to_the_newest_whole_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    save(path, step=1, age_seconds=2)
    save(path, step=2, age_seconds=1)
    flip_byte(path, 300)
    os.utime(path, (1e9, 1e9))
    assert read_step(find_checkpoint("last", tmp_path / "run")) == 1
    assert f"checkpoint {path} is damaged" in caplog.text
    flip_byte(path.with_name("previous.ckpt"), 300)
    for word in ("last", "auto"):  # a run that begins anew is not what anybody meant here
        with pytest.raises(ValueError, match=r"is damaged: .* no whole one is left"):
            find_checkpoint(word, tmp_path / "run")


def test_nothing_to_go_on_from_is_an_error_unless_that_was_allowed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_path is last, but there is no .*last.ckpt"):
        find_checkpoint("last", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*none.ckpt does not exist"):
        find_checkpoint(str(tmp_path / "none.ckpt"), tmp_path / "run")
    assert find_checkpoint("auto", tmp_path / "run") is None


def test_damaged_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", step=1)
    content = path.read_bytes()
    flip_byte(
        path, content.index(torch.full((4,), 1.0).numpy().tobytes())
    )  # a weight, which zip may let pass
    with pytest.raises(ValueError, match=r"checkpoint .*last.ckpt is damaged: sha256"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match=r"checkpoint .*last.ckpt is damaged: sha256"):
        find_checkpoint(str(path), tmp_path / "run")


@pytest.mark.parametrize(
    "address", ["http://example.com/a.ckpt", "https://example.com/a.ckpt", "s3://a/b.ckpt"]
)
def test_checkpoint_from_the_web_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"must be a local file, got {address}"):
        find_checkpoint(address, tmp_path)
    with pytest.raises(ValueError, match=f"must be a local file, got {address}"):
        AtomicCheckpointIO().load_checkpoint(address)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weight", "exp_avg of the optimizer's parameter 0"])
def test_non_finite_weights_are_never_saved(value: float, place: str, tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", step=1)
    checkpoint = build_checkpoint(step=2)
    weights = checkpoint["state_dict"]["weight"]
    moments = checkpoint["optimizer_states"][0]["state"][0]["exp_avg"]
    (weights if place == "weight" else moments)[3] = value
    with pytest.raises(NonFiniteWeightsError, match=f"^{place} is not finite at step 2"):
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert [other.name for other in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_step(path) == 1


def test_whole_numbers_and_flags_are_finite() -> None:
    checkpoint = {"state_dict": {"count": torch.tensor(3), "seen": torch.tensor([True]), "extra": "text"}}
    assert find_non_finite(checkpoint) is None


def test_failed_write_leaves_the_older_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = save(save(tmp_path / "last.ckpt", step=1), step=2)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(build_checkpoint(step=3), path)
    assert {other.name: read_step(other) for other in tmp_path.iterdir()} == {
        "last.ckpt": 2,
        "previous.ckpt": 1,
    }


def test_full_disk_is_named_and_not_what_torch_makes_of_it(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            AtomicCheckpointIO().save_checkpoint(build_checkpoint(step=2, size=100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {other.name: read_step(other) for other in tmp_path.iterdir()} == {"last.ckpt": 1}


@pytest.mark.parametrize("has_links", [True, False])
def test_there_is_a_last_checkpoint_at_every_moment(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    def replace(source: Path, target: Path) -> None:
        seen.append(path.exists())
        rename(source, target)
        seen.append(path.exists())

    path, seen, rename = save(save(tmp_path / "last.ckpt", step=1), step=2), list[bool](), os.replace
    monkeypatch.setattr(os, "replace", replace)
    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    save(path, step=3)
    assert all(seen) is has_links
    assert {other.name: read_step(other) for other in tmp_path.iterdir()} == {
        "last.ckpt": 3,
        "previous.ckpt": 2,
    }


def save_for_ever(path: Path, is_saving: Event) -> None:
    for step in range(1_000_000):
        AtomicCheckpointIO().save_checkpoint(build_checkpoint(step, size=100_000), path)
        is_saving.set()


def test_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not once a kill
    context.set_forkserver_preload(["stablerep.runs.checkpoint"])
    path, rng = tmp_path / "run" / "checkpoints" / "last.ckpt", random.Random(0)
    num_torn = 0
    for number in range(1, 10 * NUM_KILLS):
        is_saving = context.Event()
        process = context.Process(target=save_for_ever, args=(path, is_saving))
        process.start()
        assert is_saving.wait(MAX_SECONDS)
        process.join(rng.uniform(0, 0.1))
        assert process.exitcode is None
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        num_torn += (path.with_name(".last.ckpt.tmp")).exists()
        read_step(find_checkpoint("last", tmp_path / "run"))
        if number >= NUM_KILLS and num_torn > 0:  # else the kills missed what they are about
            return
    raise AssertionError(f"none of {number} kills met a checkpoint that was being written")
