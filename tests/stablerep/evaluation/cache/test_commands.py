"""`stablerep evaluate cache ls | verify | prune` on files that the cache wrote."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stablerep.evaluation.cache import ls, prune, verify
from stablerep.evaluation.cache.files import (
    default_cache_folder,
    format_bytes,
    format_table,
    list_files,
    temporary_name,
)
from stablerep.evaluation.cache.store import FeatureCache, FeatureKey
from stablerep.evaluation.features import Features

DAY_SECONDS = 86400


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """Three files of about 4, 8 and 12 kB, last used 1, 2 and 3 days ago."""
    cache = FeatureCache(tmp_path / "cache")
    for number in (1, 2, 3):
        names = tuple(f"train/{index}" for index in range(10))
        features = Features(
            values={"cls": torch.zeros(10, 100 * number)},
            labels=torch.zeros(10, dtype=torch.int64),
            names=names,
            caption_ids=("",) * 10,
            captions=((),) * 10,
            digest="d",
            unreadable=(),
        )
        key = FeatureKey(f"weights {number}", "forward", "data", "transform", "cls", "float32", "float32")
        cache.save(key, features, {"model": f"model{number}.ckpt", "data": "photos", "split": "train"})
        used = time.time() - number * DAY_SECONDS
        os.utime(cache.path(key), (used, used))
    return cache


def models_left(cache: FeatureCache, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert ls.run(ls.ListConfig(str(cache.folder))) == 0
    lines = capsys.readouterr().out.splitlines()[2:-1]
    return [line.split()[1].removesuffix(".ckpt") for line in lines]


def test_ls_says_what_each_file_is_of(cache: FeatureCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert ls.run(ls.ListConfig(str(cache.folder))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "model", "data", "split", "feature", "values", "size", "last", "used"]
    assert lines[2].split()[1:7] == ["model1.ckpt", "photos", "train", "cls", "10×100", "F32"]
    assert lines[4].endswith("3 days ago")
    total = sum(file.num_bytes for file in list_files(cache.folder))
    assert lines[-1] == f"{cache.folder}: 3 files, {format_bytes(total)}"


def test_ls_of_nothing_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ls.run(ls.ListConfig(str(tmp_path / "none"))) == 0
    assert capsys.readouterr().out == f"{tmp_path}/none: 0 files, 0 B\n"


def test_verify_names_what_is_damaged(cache: FeatureCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run(verify.VerifyConfig(str(cache.folder))) == 0
    assert "3 files sound, 0 damaged" in capsys.readouterr().out
    damaged = list_files(cache.folder)[1].path
    content = bytearray(damaged.read_bytes())
    content[-2000] ^= 1
    damaged.write_bytes(content)
    assert verify.run(verify.VerifyConfig(str(cache.folder))) == 1
    said = capsys.readouterr()
    assert f"{damaged} is damaged: sha256 is" in said.err
    assert "2 files sound, 1 damaged" in said.out
    assert damaged.exists()
    assert verify.run(verify.VerifyConfig(str(cache.folder), remove=True)) == 1
    assert "1 damaged and removed" in capsys.readouterr().out
    assert verify.run(verify.VerifyConfig(str(cache.folder))) == 0


def test_ls_marks_a_file_without_header(cache: FeatureCache, capsys: pytest.CaptureFixture[str]) -> None:
    list_files(cache.folder)[0].path.write_bytes(b"x")
    assert ls.run(ls.ListConfig(str(cache.folder))) == 0
    assert capsys.readouterr().out.count("(damaged)") == 1


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"max_age_days": 2.5}, ["model1", "model2"]),
        ({"max_age_days": 0.5}, []),
        ({"max_bytes": 14_500}, ["model1", "model2"]),
        ({"max_bytes": 0}, []),
        ({"max_bytes": 10**9}, ["model1", "model2", "model3"]),
        ({"max_bytes": 14_500, "max_age_days": 1.5}, ["model1"]),
        ({"everything": True}, []),
    ],
)
def test_prune_removes_what_was_used_least_recently(
    cache: FeatureCache, capsys: pytest.CaptureFixture[str], options: dict[str, float], left: list[str]
) -> None:
    assert prune.run(prune.PruneConfig(str(cache.folder), dry_run=True, **options)) == 0  # type: ignore[arg-type]
    assert f"{3 - len(left)} files would be removed" in capsys.readouterr().out
    assert models_left(cache, capsys) == ["model1", "model2", "model3"]
    assert prune.run(prune.PruneConfig(str(cache.folder), **options)) == 0  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert f"{3 - len(left)} files removed" in said
    assert all((f"model{number}.ckpt" in said) == (f"model{number}" not in left) for number in (1, 2, 3))
    assert models_left(cache, capsys) == left


def test_prune_removes_what_a_killed_process_left(cache: FeatureCache) -> None:
    old, new = (cache.folder / temporary_name(f"{letter * 64}.safetensors") for letter in "ab")
    notes = cache.folder / "digests" / f"{'c' * 32}.parquet"
    notes.parent.mkdir()
    for path in (old, new, notes):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * DAY_SECONDS,) * 2)
    assert prune.run(prune.PruneConfig(str(cache.folder), max_age_days=10)) == 0
    assert [path.exists() for path in (old, new, notes)] == [False, True, True]
    assert prune.run(prune.PruneConfig(str(cache.folder), everything=True)) == 0
    assert [path.exists() for path in (new, notes)] == [True, False]


def test_files_of_others_are_left_alone(cache: FeatureCache) -> None:
    """Should somebody name a folder of models as the cache."""
    model, table = cache.folder / "model.safetensors", cache.folder / "digests" / "captions.parquet"
    table.parent.mkdir()
    for path in (model, table):
        path.write_bytes(b"x")
    assert verify.run(verify.VerifyConfig(str(cache.folder), remove=True)) == 0
    assert prune.run(prune.PruneConfig(str(cache.folder), everything=True)) == 0
    assert [path.name for path in cache.folder.glob("**/*.*")] == ["model.safetensors", "captions.parquet"]


def test_prune_needs_to_be_told_what() -> None:
    with pytest.raises(ValueError, match="prune needs one of max_age_days, max_bytes and everything"):
        prune.PruneConfig("x")
    with pytest.raises(ValueError, match="max_bytes must be >= 0, got -1"):
        prune.PruneConfig("x", max_bytes=-1)


def test_reading_a_file_makes_it_the_last_used(
    cache: FeatureCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.load(FeatureKey("weights 3", "forward", "data", "transform", "cls", "float32", "float32"))
    assert models_left(cache, capsys) == ["model3", "model1", "model2"]


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STABLEREP_CACHE", str(tmp_path))
    assert default_cache_folder() == ls.ListConfig().cache == str(tmp_path)
    monkeypatch.delenv("STABLEREP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_folder() == "/x/stablerep/features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == str(Path.home() / ".cache" / "stablerep" / "features")


def test_the_commands_do_without_torch() -> None:
    names = "ls, prune, verify"
    code = f"import sys; from stablerep.evaluation.cache import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_columns_of_a_table_stand_below_each_other() -> None:
    assert format_table(["a", "b"], [["long", "x"]]) == "a     b\n----  -\nlong  x"
    assert [format_bytes(n) for n in (0, 999, 1500, 2_000_000_000, 3 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 GB",
        "3.0 TB",
    ]
