import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import fsspec  # type: ignore[import-untyped]
import pytest

from data_gen.shards import ShardError, Store
from stablerep.data.shard_cache import ShardCache

CONTENTS = {f"{index:05}.tar": bytes([index]) * 1000 for index in range(4)}


@pytest.fixture
def store() -> Store:
    """An object store in memory with four tars."""
    store = Store("memory://cached/shards")
    for name, content in CONTENTS.items():
        store.replace(name, content)
    return store


def digest_of(name: str) -> str:
    return hashlib.sha256(CONTENTS[name]).hexdigest()


def fetch(cache: ShardCache, store: Store, name: str) -> bytes:
    with os.fdopen(cache.open(store, name, len(CONTENTS[name]), digest_of(name)), "rb") as file:
        return file.read()


def kept(folder: Path) -> set[str]:
    return {path.name.split("-")[2] for path in (folder / "shards").glob("*.tar")}


def record_downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each file that is opened in a store."""
    names: list[str] = []
    open_in_store = Store.open

    def record(store: Store, name: str) -> IO[bytes]:
        names.append(name)
        return open_in_store(store, name)

    monkeypatch.setattr(Store, "open", record)
    return names


def test_shard_is_fetched_once(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = record_downloads(monkeypatch)
    for name, content in CONTENTS.items():
        for _ in range(2):
            assert fetch(ShardCache(tmp_path, 10_000), store, name) == content
    assert downloads == list(CONTENTS)


def test_least_recently_used_shards_make_room(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 3000)
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.tar", "00003.tar"):
        fetch(cache, store, name)
    assert kept(tmp_path) == {"00000.tar", "00002.tar", "00003.tar"}


def test_use_does_not_look_like_change(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 3000)
    fetch(cache, store, "00000.tar")
    path = cache.path_of(store, "00000.tar", digest_of("00000.tar"))
    before = path.stat()
    fetch(cache, store, "00000.tar")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_atime_ns > before.st_atime_ns


def test_what_differs_from_its_digest_is_not_kept(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 3000)
    with pytest.raises(ShardError, match=r"shards/00000\.tar: sha256 is .*, expected aaaa"):
        cache.open(store, "00000.tar", 1000, "a" * 64)
    with pytest.raises(ShardError, match=r"00000\.tar: has 1000 bytes, expected 900"):
        cache.open(store, "00000.tar", 900, "a" * 64)
    assert list((tmp_path / "shards").glob("*.t*")) == []


def test_shard_larger_than_the_cache_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ShardError, match="cache.max_bytes must be >= 1000, the size of .*, got 999"):
        fetch(ShardCache(tmp_path, 999), store, "00000.tar")


def test_what_a_killed_process_left_is_removed(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 2000)
    fetch(cache, store, "00000.tar")
    abandoned = cache.path_of(store, "00001.tar", digest_of("00001.tar")).with_suffix(".tmp")
    abandoned.write_bytes(bytes(1000))
    fetch(cache, store, "00002.tar")
    assert not abandoned.exists()
    assert kept(tmp_path) == {"00000.tar", "00002.tar"}


def test_copy_that_was_changed_is_fetched_again(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 3000)
    fetch(cache, store, "00001.tar")
    path = cache.path_of(store, "00001.tar", digest_of("00001.tar"))
    path.write_bytes(bytes(1000))  # of the same size
    assert fetch(cache, store, "00001.tar") == CONTENTS["00001.tar"]
    assert path.read_bytes() == CONTENTS["00001.tar"]


def test_shard_that_was_made_anew_in_the_store_takes_the_place_of_its_copy(
    tmp_path: Path, store: Store
) -> None:
    cache = ShardCache(tmp_path, 3000)
    fetch(cache, store, "00000.tar")
    content = b"x" * 1000
    store.replace("00000.tar", content)
    file = cache.open(store, "00000.tar", 1000, hashlib.sha256(content).hexdigest())
    with os.fdopen(file, "rb") as copy:
        assert copy.read() == content


def test_copy_that_is_open_outlives_its_removal(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 1000)
    file = cache.open(store, "00000.tar", 1000, digest_of("00000.tar"))
    fetch(cache, store, "00001.tar")
    assert kept(tmp_path) == {"00001.tar"}
    with os.fdopen(file, "rb") as copy:
        assert copy.read() == CONTENTS["00000.tar"]


def test_one_of_many_that_want_a_shard_fetches_it(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = record_downloads(monkeypatch)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: fetch(ShardCache(tmp_path, 2000), store, "00000.tar"), range(8)))
    assert set(found) == {CONTENTS["00000.tar"]}
    assert downloads == ["00000.tar"]
    assert not list((tmp_path / "shards").glob("*.tmp"))


@pytest.fixture(autouse=True)
def empty_memory() -> None:
    fsspec.filesystem("memory").store.clear()
    assert os.environ["XDG_CACHE_HOME"]
