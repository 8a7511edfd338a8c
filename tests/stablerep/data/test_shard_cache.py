import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def fetch(cache: ShardCache, store: Store, name: str) -> tuple[bytes, bool]:
    content = CONTENTS[name]
    path, is_new = cache.fetch(store, name, len(content), hashlib.sha256(content).hexdigest())
    return path.read_bytes(), is_new


def kept(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in (folder / "shards").glob("*.tar")}


def test_shard_is_fetched_once(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 10_000)
    for name, content in CONTENTS.items():
        assert fetch(cache, store, name) == (content, True)
        assert fetch(ShardCache(tmp_path, 10_000), store, name) == (content, False)


def test_least_recently_used_shards_make_room(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 3000)
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.tar", "00003.tar"):
        fetch(cache, store, name)
    assert kept(tmp_path) == {"00000.tar", "00002.tar", "00003.tar"}


def test_use_does_not_look_like_change(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 3000)
    fetch(cache, store, "00000.tar")
    path = cache.path_of(store, "00000.tar")
    before = path.stat()
    fetch(cache, store, "00000.tar")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_atime_ns > before.st_atime_ns


def test_what_differs_from_its_digest_is_not_kept(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 3000)
    with pytest.raises(ShardError, match=r"shards/00000\.tar: sha256 is .*, expected aaaa"):
        cache.fetch(store, "00000.tar", 1000, "a" * 64)
    with pytest.raises(ShardError, match=r"00000\.tar: has 1000 bytes, expected 900"):
        cache.fetch(store, "00000.tar", 900, "a" * 64)
    assert list((tmp_path / "shards").glob("*.t*")) == []


def test_shard_larger_than_the_cache_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ShardError, match="cache.max_bytes must be >= 1000, the size of .*, got 999"):
        fetch(ShardCache(tmp_path, 999), store, "00000.tar")


def test_what_a_killed_process_left_is_removed(tmp_path: Path, store: Store) -> None:
    cache = ShardCache(tmp_path, 2000)
    fetch(cache, store, "00000.tar")
    abandoned = cache.path_of(store, "00001.tar").with_suffix(".tmp")
    abandoned.write_bytes(bytes(1000))
    fetch(cache, store, "00002.tar")
    assert not abandoned.exists()
    assert kept(tmp_path) == {"00000.tar", "00002.tar"}


def test_one_of_many_that_want_a_shard_fetches_it(tmp_path: Path, store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: fetch(ShardCache(tmp_path, 2000), store, "00000.tar"), range(8)))
    assert {content for content, _ in found} == {CONTENTS["00000.tar"]}
    assert sum(is_new for _, is_new in found) == 1
    assert not list((tmp_path / "shards").glob("*.tmp"))


@pytest.fixture(autouse=True)
def empty_memory() -> None:
    fsspec.filesystem("memory").store.clear()
    assert os.environ["XDG_CACHE_HOME"]
