import errno
import fcntl
import hashlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest

from data_gen.shards import ShardError
from stablerep.data.verification import VerifiedFiles, default_cache_folder
from tests.processes import MAX_SECONDS

CONTENT = b"0123456789" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "00000.tar"
    path.write_bytes(CONTENT)
    return path


def verify(folder: Path, shard: Path, sha256: str = SHA256, num_bytes: int = len(CONTENT)) -> None:
    VerifiedFiles(folder, "dataset").check(shard, 0, num_bytes, sha256)


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each file that is hashed."""
    calls: list[str] = []
    digest = hashlib.file_digest

    def record(file, name):  # type: ignore[no-untyped-def]
        calls.append(name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", record)
    return calls


def test_sound_file_is_hashed_once_for_all_processes_and_runs(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_hashes(monkeypatch)
    for _ in range(3):
        verify(tmp_path / "cache", shard)
    assert len(calls) == 1


def test_changed_file_is_hashed_again(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(tmp_path / "cache", shard)
    calls = count_hashes(monkeypatch)
    os.utime(shard, ns=(0, 1))
    verify(tmp_path / "cache", shard)
    assert len(calls) == 1
    shard.write_bytes(CONTENT[::-1])
    with pytest.raises(ShardError, match=r"00000\.tar: sha256 is"):
        verify(tmp_path / "cache", shard)


def test_copy_of_equal_times_is_hashed_for_itself(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(tmp_path / "cache", shard)
    status = shard.stat()
    copy = tmp_path / "copy"
    copy.write_bytes(CONTENT[::-1])  # as on another machine's disk
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(copy, shard)
    assert shard.stat().st_mtime_ns == status.st_mtime_ns
    with pytest.raises(ShardError, match=r"00000\.tar: sha256 is"):
        verify(tmp_path / "cache", shard)


def test_file_that_was_written_with_its_times_kept_is_hashed_again(tmp_path: Path, shard: Path) -> None:
    verify(tmp_path / "cache", shard)
    status = shard.stat()
    shard.write_bytes(CONTENT[::-1])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ShardError, match=r"00000\.tar: sha256 is"):
        verify(tmp_path / "cache", shard)


def test_disk_without_locks_costs_the_waiting_for_each_other_alone(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    files = VerifiedFiles(tmp_path / "cache", "dataset")
    for _ in range(2):
        files.check(shard, 0, len(CONTENT), SHA256)
        os.utime(shard)
    assert caplog.text.count("cannot be locked (No locks available)") == 1
    with pytest.raises(ShardError, match="expected aaaa"):
        files.check(shard, 0, len(CONTENT), "a" * 64)


def test_later_note_of_a_file_takes_the_earlier_ones_place(tmp_path: Path, shard: Path) -> None:
    files = [VerifiedFiles(tmp_path / "cache", "dataset") for _ in range(2)]
    for second in range(5):
        os.utime(shard, ns=(0, second))
        for one in files:
            one.check(shard, 0, len(CONTENT), SHA256)
    assert [len(one._notes) for one in files] == [1, 1]


def test_notes_that_were_cut_off_are_read_anew(tmp_path: Path, shard: Path) -> None:
    files = VerifiedFiles(tmp_path / "cache", "dataset")
    files.check(shard, 0, len(CONTENT), SHA256)
    (notes,) = (tmp_path / "cache" / "verified").iterdir()
    files._read_notes()
    os.truncate(notes, 3)
    os.utime(shard, ns=(0, 1))
    files.check(shard, 0, len(CONTENT), SHA256)


def test_user_without_a_home_has_a_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", refuse)
    assert default_cache_folder() == Path(tempfile.gettempdir(), f"stablerep-{os.getuid()}")


def test_note_of_one_digest_is_not_taken_for_another(tmp_path: Path, shard: Path) -> None:
    verify(tmp_path / "cache", shard)
    with pytest.raises(ShardError, match="expected aaaa"):
        verify(tmp_path / "cache", shard, sha256="a" * 64)


def test_missing_file_and_wrong_size_are_named(tmp_path: Path, shard: Path) -> None:
    with pytest.raises(ShardError, match=r"00000\.tar: has 10000 bytes, expected 5"):
        verify(tmp_path / "cache", shard, num_bytes=5)
    shard.unlink()
    with pytest.raises(ShardError, match=r"00000\.tar: missing, though its completion marker is there"):
        verify(tmp_path / "cache", shard)


def test_torn_note_is_no_note(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(tmp_path / "cache", shard)
    (notes,) = (tmp_path / "cache" / "verified").iterdir()
    notes.write_bytes(notes.read_bytes()[:-20])
    calls = count_hashes(monkeypatch)
    verify(tmp_path / "cache", shard)
    verify(tmp_path / "cache", shard)
    assert len(calls) == 1


def test_folder_that_cannot_be_written_costs_the_memory_alone(
    tmp_path: Path, shard: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    verify(tmp_path / "cache", shard)
    assert "cannot be remembered" in caplog.text
    with pytest.raises(ShardError):
        verify(tmp_path / "cache", shard, sha256="a" * 64)


def _verify_and_count(folder: Path, shard: Path, results) -> None:  # type: ignore[no-untyped-def]
    digest, calls = hashlib.file_digest, 0

    def slow(file, name):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        time.sleep(0.3)
        return digest(file, name)

    hashlib.file_digest = slow  # type: ignore[assignment]  # in a process of its own
    verify(folder, shard)
    results.put(calls)


def test_processes_that_need_one_file_at_once_hash_it_once(tmp_path: Path, shard: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_verify_and_count, args=(tmp_path / "cache", shard, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    counts = [results.get(timeout=MAX_SECONDS) for _ in processes]
    for process in processes:
        process.join(timeout=MAX_SECONDS)
        assert process.exitcode == 0
    assert sorted(counts) == [0, 0, 1]
