"""Laws of a store, on a local disk, in memory and in S3; then those of the disk alone."""

import contextlib
import errno
import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # it ships none
import pytest

from data_gen.storage import Store, open_filesystem
from data_gen.storage import local as local_module
from data_gen.storage import remote as remote_module
from tests.processes import MAX_SECONDS, wait_until

_numbers = itertools.count()


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    from tests.data_gen.s3_server import s3_server  # skips where moto or s3fs are missing

    with s3_server() as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a store that holds nothing yet."""
    if request.param == "local":
        return str(tmp_path / "dataset")
    if request.param == "memory":
        return f"memory://bucket-{next(_numbers)}/dataset"
    return f"{request.getfixturevalue('s3_url')}-{next(_numbers)}"


@pytest.fixture
def store(url: str) -> Store:
    return Store(url)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(tmp_path / "dataset")


def test_first_writer_of_a_name_wins(store: Store) -> None:
    assert store.publish("00000.tar", b"first")
    assert not store.publish("00000.tar", b"second, and longer")
    assert store.read("00000.tar") == b"first"


def test_second_writer_of_equal_content_is_no_first_one(store: Store) -> None:
    assert store.publish("00000.tar", b"same")
    assert not store.publish("00000.tar", b"same")


def test_file_published_from_elsewhere_stays_and_shares_nothing(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_bytes(b"content")
    assert store.publish("a/b.tar", file)
    file.write_bytes(b"changed")
    assert store.read("a/b.tar") == b"content"
    assert not store.publish("a/b.tar", file)
    assert file.read_bytes() == b"changed"


def test_temporary_file_is_published_whole_and_gone_after(store: Store) -> None:
    with store.temporary("a/00000.tar") as path:
        path.write_bytes(b"x" * 100_000)
        assert store.list(recursive=True) == []
        assert store.publish("a/00000.tar", path)
    assert not path.exists()
    assert store.read("a/00000.tar") == b"x" * 100_000
    assert store.list(recursive=True) == ["a/00000.tar"]


def test_temporary_file_that_came_second_is_gone_after(store: Store) -> None:
    store.publish("00000.tar", b"first")
    with store.temporary("00000.tar") as path:
        path.write_bytes(b"second")
        assert not store.publish("00000.tar", path)
    assert not path.exists()
    assert store.read("00000.tar") == b"first"


def test_temporary_file_is_gone_after_an_error(store: Store) -> None:
    with contextlib.suppress(RuntimeError), store.temporary("00000.tar") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert not path.exists()
    assert not store.exists("00000.tar")


def test_listing_names_files_sorted_and_relative_to_the_store(store: Store) -> None:
    names = ["00001.tar", "00000.tar", "captions/00000.parquet", ".work/00012/part-0.tar"]
    for name in names:
        store.publish(name, b"")
    assert store.list() == ["00000.tar", "00001.tar"]
    assert store.list(recursive=True) == sorted(names)
    assert store.list("captions") == ["captions/00000.parquet"]
    assert store.list(".work") == []
    assert store.list(".work", recursive=True) == [".work/00012/part-0.tar"]
    for no_folder in ("missing", "00000.tar"):
        assert store.list(no_folder) == store.list(no_folder, recursive=True) == []


def test_listing_leaves_out_a_folder_whose_name_begins_alike(url: str) -> None:
    Store(f"{url}-other").publish("a", b"")
    Store(url).publish("work-old/b", b"")
    Store(url).publish("work/c", b"")
    assert Store(url).list(recursive=True) == ["work-old/b", "work/c"]
    assert Store(url).list("work") == ["work/c"]


def test_listing_is_never_an_old_one(url: str) -> None:
    reader, writer = Store(url), Store(url)
    assert reader.list() == []
    writer.publish("00000.tar", b"")
    assert reader.list() == ["00000.tar"]
    writer.delete("00000.tar")
    assert reader.list() == []
    assert not reader.exists("00000.tar")


def test_missing_file_is_told_from_a_failure(store: Store) -> None:
    store.publish("folder/file", b"")
    for name in ("missing", "folder", "folder/file/below"):
        assert not store.exists(name)
        assert store.size(name) is None
    assert store.modified_seconds_ago("missing") is None
    store.delete("missing")
    calls: list[Callable[[], object]] = [
        lambda: store.read("missing"),
        lambda: store.read_range("missing", 0, 1),
        lambda: store.open("missing"),
        lambda: store.digest("missing"),
        lambda: store.move("missing", "other"),
        lambda: store.delete("missing", missing_ok=False),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError, match="dataset.*/missing"):
            call()


def test_size_and_digest_are_those_of_the_content(store: Store) -> None:
    content = random.Random(0).randbytes(3_000_000)
    for name, part in (("a", content), ("empty", b"")):
        store.publish(name, part)
        assert store.exists(name)
        assert store.size(name) == len(part)
        assert store.digest(name) == (len(part), hashlib.sha256(part).hexdigest())
        assert store.read(name) == part


def test_range_is_exactly_what_was_asked(store: Store) -> None:
    store.publish("a", bytes(range(100)))
    for offset, num_bytes in [(0, 100), (0, 1), (99, 1), (10, 20), (50, 0), (100, 0)]:
        assert store.read_range("a", offset, num_bytes) == bytes(range(100))[offset : offset + num_bytes]


@pytest.mark.parametrize("offset", [90, 100, 200])
def test_range_past_the_end_is_refused(store: Store, offset: int) -> None:
    store.publish("a", bytes(100))
    with pytest.raises(
        OSError, match=f"dataset.*/a.*: .*11 bytes from {offset} on were asked for, it has 100"
    ):
        store.read_range("a", offset, 11)


def test_open_file_reads_as_one_in_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "MIN_READ_NUM_BYTES", 16)
    monkeypatch.setattr(remote_module, "MAX_READ_NUM_BYTES", 64)
    draw = random.Random(0)
    content = draw.randbytes(2000)
    store.publish("a", content)
    expected = io.BytesIO(content)
    with store.open("a") as file:
        assert file.readable()
        assert file.seekable()
        for _ in range(60):
            if draw.random() < 0.4:
                place = draw.choice([(draw.randrange(2100), 0), (draw.randrange(-2000, 0), 2), (3, 1)])
                assert file.seek(*place) == expected.seek(*place)
            size = draw.choice([0, 1, 10, 50, 300, -1])
            assert file.read(size) == expected.read(size)
            assert file.tell() == expected.tell()
        file.seek(0)
        expected.seek(0)
        assert file.readlines() == expected.readlines()
        with pytest.raises((ValueError, OSError), match=">= 0|Invalid"):
            file.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        file.read()


def test_open_file_is_one_for_tarfile(store: Store) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for index in range(5):
            member = tarfile.TarInfo(f"{index}.txt")
            member.size = 100_000
            tar.addfile(member, io.BytesIO(bytes([index]) * member.size))
    store.publish("00000.tar", archive.getvalue())
    with store.open("00000.tar") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for index in (3, 0, 4, 1, 2):
            member_file = tar.extractfile(f"{index}.txt")
            assert member_file is not None
            assert member_file.read() == bytes([index]) * 100_000


def test_replace_leaves_the_new_content(store: Store) -> None:
    store.replace("a/status.json", b"a long first one")
    store.replace("a/status.json", b"second")
    assert store.read("a/status.json") == b"second"
    assert store.list(recursive=True) == ["a/status.json"]


def test_move_takes_the_file_along(store: Store) -> None:
    store.publish("a", b"content")
    store.publish("b/c", b"older")
    store.move("a", "b/c")
    store.move("b/c", "b/c")
    assert store.read("b/c") == b"content"
    assert store.list(recursive=True) == ["b/c"]


def test_deleted_name_is_free_again(store: Store) -> None:
    store.publish("a", b"first")
    store.delete("a")
    assert store.publish("a", b"second")
    store.delete("a", missing_ok=False)
    assert store.list() == []


def test_new_file_is_young(store: Store) -> None:
    store.publish("a", b"")
    age = store.modified_seconds_ago("a")
    assert age is not None
    assert 0 <= age < 30


def test_pickled_store_is_the_same_one(url: str) -> None:
    store = Store(url)
    store.publish("a", b"content")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store == Store(url + "/")
    assert hash(copy) == hash(store)
    assert copy != Store(url + "2")
    assert copy.read("a") == b"content"


def test_store_has_the_name_of_its_folder(url: str) -> None:
    assert Store(url).name == url.rpartition("/")[2]
    assert Store(url).name_of("a/b.tar") == f"{url}/a/b.tar"


def test_probe_of_a_good_store_leaves_nothing(store: Store) -> None:
    store.probe()
    store.probe()
    assert store.list(recursive=True) == []
    if store.is_local:
        assert os.listdir(store.local_path) == []


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a/", "../a", "a/../../b", ".", "a/./b"])
def test_name_that_leaves_the_store_is_refused(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="relative"):
        store.publish(name, b"")
    with pytest.raises(ValueError, match="relative"):
        store.read(name)


def test_one_of_many_threads_wins(store: Store) -> None:
    contents = [bytes([index]) * 50_000 for index in range(8)]
    barrier = threading.Barrier(len(contents))

    def publish(content: bytes) -> bool:
        barrier.wait()
        return store.publish("a/00000.tar", content)

    for _ in range(3):
        with ThreadPoolExecutor(len(contents)) as pool:
            won = list(pool.map(publish, contents))
        assert won.count(True) == 1
        assert store.read("a/00000.tar") == contents[won.index(True)]
        store.delete("a/00000.tar")


def publish_at_once(store: Store, content: bytes, barrier: Any, answers: Any) -> None:
    """What each process of the next test does."""
    store.exists("warm up")
    barrier.wait(MAX_SECONDS)
    answers.put((content, store.publish("a/00000.tar", content)))


def test_one_of_many_processes_wins(store: Store) -> None:
    if store.url.startswith("memory:"):
        pytest.skip("each process has a memory of its own")
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(4), spawn.Queue()
    processes = [
        spawn.Process(target=publish_at_once, args=(store, bytes([index]) * 50_000, barrier, answers))
        for index in range(4)
    ]
    for process in processes:
        process.start()
    won = [content for content, is_first in (answers.get(timeout=MAX_SECONDS) for _ in processes) if is_first]
    for process in processes:
        process.join(MAX_SECONDS)
        assert process.exitcode == 0
    assert len(won) == 1
    assert store.read("a/00000.tar") == won[0]
    assert store.list(recursive=True) == ["a/00000.tar"]


def read_in_child(store: Store) -> None:
    """What the forked process of the next test does."""
    os._exit(0 if store.read("a") == b"content" and store.publish("b", b"child") else 1)


# The client of S3 has a thread of its own, idle here; newer Pythons warn of any.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_process_opens_the_store_anew(store: Store) -> None:
    if store.url.startswith("memory:"):
        pytest.skip("each process has a memory of its own")
    store.publish("a", b"content")
    process = multiprocessing.get_context("fork").Process(target=read_in_child, args=(store,))
    process.start()
    process.join(MAX_SECONDS)
    assert process.exitcode == 0
    assert store.read("b") == b"child"


def test_path_and_file_url_name_the_same_folder(tmp_path: Path) -> None:
    for url in (tmp_path, str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}", Path(f"file://{tmp_path}")):
        assert Store(url).is_local
        assert Store(url).local_path == tmp_path
        assert Store(url).name == tmp_path.name
    with pytest.raises(ValueError, match="memory://a is not a local folder"):
        _ = Store("memory://a").local_path


def test_url_that_lost_a_slash_in_a_path_is_understood() -> None:
    assert Store(Path("s3://bucket/dataset")) == Store("s3://bucket/dataset")
    assert Store(Path("s3://bucket/dataset")).url == "s3://bucket/dataset"
    assert Store(Path("memory://a//b")).name_of("c") == "memory://a/b/c"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("simplecache::s3://bucket/a", "chained"),
        ("s3://bucket/a::zip", "chained"),
        ("ftp://host/a", "the scheme must be one of .*s3.*, got ftp"),
        ("reference:/a", "got reference"),
        ("s3://", "must name a bucket or folder"),
        ("file://host/a", "absolute path"),
        ("", "must not be empty"),
    ],
)
def test_url_that_is_not_opened_is_named(url: str, message: str) -> None:
    for open_url in (Store, open_filesystem):
        with pytest.raises(ValueError, match=message):
            open_url(url)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # what a failed import looks like
    with pytest.raises(OSError, match="gs://bucket/a cannot be opened: .*gcsfs"):
        Store("gs://bucket/a").read("b")


def test_store_without_an_exclusive_put_can_only_be_read() -> None:
    store = Store("https://host.invalid/dataset")
    for write in (lambda: store.publish("a", b""), lambda: store.replace("a", b""), store.probe):
        with pytest.raises(OSError, match="https://host.invalid/dataset can only be read: https has no put"):
            write()


def test_opened_file_system_keeps_no_listings(tmp_path: Path) -> None:
    filesystem, path = open_filesystem("memory://bucket/a")
    assert (path, filesystem.dircache.use_listings_cache) == ("/bucket/a", False)
    (tmp_path / "a").write_bytes(b"content")
    filesystem, path = open_filesystem(str(tmp_path))
    assert filesystem.cat_file(f"{path}/a") == b"content"


def test_importing_it_takes_no_package_of_a_store() -> None:
    command = "import sys, data_gen.storage; print({'fsspec', 's3fs', 'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", command], text=True) == "set()\n"


class FlakyStore:
    """fsspec's memory under a scheme of an object store, with failures before or after a call's work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.filesystem = fsspec.filesystem("memory", global_store=False, skip_instance_cache=True)
        self.num_calls = 0
        self._monkeypatch = monkeypatch
        self.pauses: list[float] = []
        monkeypatch.setattr(remote_module, "open_filesystem", lambda url: (self.filesystem, "/bucket"))
        monkeypatch.setattr(remote_module.time, "sleep", self.pauses.append)
        self.store = Store("gs://bucket/dataset")

    def fail(self, method: str, errors: list[Exception], after: bool = False) -> None:
        """Raises these errors from the next calls, before or after each has done its work."""
        call, left = getattr(self.filesystem, method), iter(errors)

        def failing(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            error = next(left, None)
            if error is None:
                return call(*args, **kwargs)
            if after:
                call(*args, **kwargs)
            raise error

        self._monkeypatch.setattr(self.filesystem, method, failing)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> FlakyStore:
    return FlakyStore(monkeypatch)


def test_failure_that_passes_is_tried_again_after_longer_pauses(flaky: FlakyStore) -> None:
    flaky.store.publish("a", b"content")
    flaky.fail("cat_file", [ConnectionResetError(), TimeoutError(), OSError(errno.EBUSY, "slow down")])
    assert flaky.store.read("a") == b"content"
    assert len(flaky.pauses) == 3
    for attempt, pause in enumerate(flaky.pauses):
        mean = remote_module.SECONDS_BEFORE_SECOND_TRY * 2**attempt
        assert 0.5 * mean <= pause <= 1.5 * mean


def test_failure_that_stays_names_file_operation_and_tries(flaky: FlakyStore) -> None:
    flaky.fail("info", [ConnectionResetError(104, "reset by peer")] * 99)
    with pytest.raises(
        OSError, match="gs://bucket/dataset/a: reading failed 5 times, at last with Conn.*reset by peer"
    ):
        flaky.store.read("a")
    assert flaky.num_calls == remote_module.NUM_TRIES == 5


@pytest.mark.parametrize("error", [PermissionError("denied"), NotADirectoryError("no folder")])
def test_failure_that_cannot_pass_is_not_tried_again(flaky: FlakyStore, error: OSError) -> None:
    flaky.fail("info", [error] * 99)
    with pytest.raises(type(error), match=f"gs://bucket/dataset/a: reading failed: {error}"):
        flaky.store.read("a")
    assert flaky.num_calls == 1


def test_bug_is_not_taken_for_a_failure_of_the_store(flaky: FlakyStore) -> None:
    flaky.fail("info", [TypeError("a bug")])
    with pytest.raises(TypeError, match="a bug"):
        flaky.store.read("a")


@pytest.mark.parametrize("is_path", [False, True])
def test_put_whose_answer_was_lost_counts_as_done(flaky: FlakyStore, tmp_path: Path, is_path: bool) -> None:
    (tmp_path / "a").write_bytes(b"content")
    flaky.fail("put_file" if is_path else "pipe_file", [ConnectionResetError()], after=True)
    assert flaky.store.publish("a", tmp_path / "a" if is_path else b"content")
    assert flaky.num_calls == 2


def test_put_that_failed_before_a_rival_came_is_second(flaky: FlakyStore) -> None:
    flaky.store.publish("a", b"rival's")
    flaky.fail("pipe_file", [ConnectionResetError()])
    assert not flaky.store.publish("a", b"content")


def test_answer_that_ends_early_is_never_half_a_file(
    flaky: FlakyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(200))
    flaky.store.publish("a", content)
    whole, num_cut = flaky.filesystem.cat_file, itertools.count()

    def cut(*args: Any, **kwargs: Any) -> bytes:
        answer = whole(*args, **kwargs)
        return bytes(answer[:-1] if next(num_cut) % 2 == 0 else answer)

    monkeypatch.setattr(flaky.filesystem, "cat_file", cut)
    assert flaky.store.read("a") == content
    assert flaky.store.read_range("a", 10, 20) == content[10:30]
    with flaky.store.open("a") as file:
        assert file.read() == content
    monkeypatch.setattr(flaky.filesystem, "cat_file", lambda *args, **kwargs: b"short")
    with pytest.raises(OSError, match="failed 5 times, at last with .*: 5 bytes came, 200 expected"):
        flaky.store.read("a")


def test_store_that_keeps_no_times_is_named(flaky: FlakyStore) -> None:
    flaky.fail("modified", [NotImplementedError()])
    with pytest.raises(OSError, match="gs://bucket/dataset/a: .*the store does not tell when"):
        flaky.store.modified_seconds_ago("a")


def test_folder_that_could_not_be_listed_is_not_an_empty_one(flaky: FlakyStore) -> None:
    flaky.fail("ls", [PermissionError("denied")] * 2)
    for recursive in (False, True):
        with pytest.raises(PermissionError, match="gs://bucket/dataset: listing failed: denied"):
            flaky.store.list(recursive=recursive)


def test_store_that_replaces_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.get_filesystem_class("memory")
    put = memory.pipe_file
    monkeypatch.setattr(memory, "pipe_file", lambda self, path, value, mode="": put(self, path, value))
    with pytest.raises(
        OSError, match="output memory://old/a: the store replaces a file where only a new one"
    ):
        Store("memory://old/a").probe()
    assert Store("memory://old/a").list() == []


def test_age_is_counted_by_the_clock_of_the_disk(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    local.publish("a", b"")
    an_hour_ago = time.time() - 3600
    os.utime(local.local_path / "a", (an_hour_ago, an_hour_ago))
    monkeypatch.setattr(local_module.time, "time", lambda: 0.0)  # this machine's clock is wrong
    age = local.modified_seconds_ago("a")
    assert age is not None
    assert 3599 < age < 3600 + MAX_SECONDS
    assert os.listdir(local.local_path) == ["a"]


def test_link_whose_answer_was_lost_counts_as_done(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_and_lose(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", link_and_lose)
    assert local.publish("a", b"content")
    assert local.read("a") == b"content"


def test_folder_that_is_removed_while_it_is_made_is_made_again(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, num_calls = os.mkdir, itertools.count()

    def find_what_is_gone(path: Path, *args: Any, **kwargs: Any) -> None:
        if next(num_calls) < 2:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", find_what_is_gone)
    assert local.publish("folder/a", b"content")
    assert local.read("folder/a") == b"content"


def test_disk_without_hard_links_is_named(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(source))

    monkeypatch.setattr(os, "link", link)
    for call in (local.probe, lambda: local.publish("a", b"")):
        with pytest.raises(OSError, match="dataset is on a file system without hard links"):
            call()
    assert os.listdir(local.local_path) == []


def test_content_is_on_the_disk_before_its_name(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, link = os.fsync, os.link

    def record_fsync(descriptor: int) -> None:
        events.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    def record_link(source: Path, target: Path) -> None:
        events.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    local.probe()
    events.clear()
    local.publish("a", b"content")
    assert events == ["file", "link", "folder"]
    events.clear()
    with local.temporary("b") as path:
        path.write_bytes(b"content")
        local.publish("b", path)
    assert events == ["file", "link", "folder"]


def publish_from_pipe(store: Store, pipe: Path) -> None:
    """What the process of the next test does: a publication that lasts as long as the pipe is fed."""
    store.publish("00000.tar", pipe)


def test_killed_writer_leaves_nothing_under_the_name(local: Store, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = multiprocessing.get_context("spawn").Process(target=publish_from_pipe, args=(local, pipe))
    process.start()
    with pipe.open("wb", buffering=0) as feed:
        feed.write(bytes(3 << 20))
        wait_until(lambda: has_written(local.local_path, 1 << 20))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(MAX_SECONDS)
    (leftover,) = local.local_path.iterdir()
    assert not local.exists("00000.tar")
    assert local.list() == []
    assert local.remove_stale_temporaries() == 1
    assert not leftover.exists()
    assert local.publish("00000.tar", b"content")


def test_only_leftovers_of_dead_processes_of_this_host_are_removed(local: Store) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    left = [f".a.tar.{host}.{dead.pid}.tmp", f"captions/.b.0a1b2c3d.{host}.{dead.pid}.tmp"]
    kept = [
        f".c.tar.{host}.{os.getpid()}.tmp",  # this process
        f".d.tar.{host}.1.tmp",  # another user's, perhaps
        f".e.tar.other-{host}.{dead.pid}.tmp",
        f".f.tar.{host}.{dead.pid}.part",
        f"g.{host}.{dead.pid}.tmp",
    ]
    for name in left + kept:
        (local.local_path / name).parent.mkdir(parents=True, exist_ok=True)
        (local.local_path / name).touch()
    assert local.remove_stale_temporaries() == 2
    assert sorted(path.name for path in local.local_path.iterdir() if path.is_file()) == sorted(kept)


def hold_temporary(url: str, pipe: Any) -> None:
    """What the process of the next test does: holds a temporary file of a remote store until it is killed."""
    with Store(url).temporary("00000.tar") as path:
        path.write_bytes(b"half")
        pipe.send(path)
        time.sleep(600)


def test_leftover_of_a_dead_writer_to_a_remote_store_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    store = Store("memory://bucket/dataset")
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=hold_temporary, args=(store.url, there))
    process.start()
    leftover = here.recv()
    with store.temporary("00000.tar") as path:
        path.write_bytes(b"mine")
        assert store.remove_stale_temporaries() == 0
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(MAX_SECONDS)
        assert leftover.exists()
        assert store.remove_stale_temporaries() == 1
        assert path.read_bytes() == b"mine"
    assert [name for name in os.listdir(tmp_path) if name.startswith("data_gen.")] == []
    here.close()
    there.close()


def publish_too_much(url: str) -> None:
    """What the process of the next test does: writes more than its limit for a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    store = Store(url)
    for content in (bytes(2 << 20), Path(url).with_name("large")):
        with pytest.raises(OSError, match=r"File too large.*dataset/00000.tar"):
            store.publish("00000.tar", content)
        with pytest.raises(OSError, match=r"File too large.*dataset/00000.tar"):
            store.replace("00000.tar", bytes(2 << 20))


def test_file_that_does_not_fit_leaves_nothing(local: Store, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    process = multiprocessing.get_context("spawn").Process(target=publish_too_much, args=(local.url,))
    process.start()
    process.join(MAX_SECONDS)
    assert process.exitcode == 0
    assert os.listdir(local.local_path) == []


def run_under_mount(mount: str, folder: Path, script: str) -> str:
    """Runs a script in a mount namespace of its own, which goes with it."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    command = f"{mount} || exit 77; exec {sys.executable} -c '{script}' {folder}"
    answer = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True)
    if answer.returncode == 77 or "unshare" in answer.stderr:
        pytest.skip(f"mounting is not allowed: {answer.stderr.strip()}")
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_full_disk_is_named_and_keeps_no_part_of_a_file(tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from data_gen.storage import Store
        store = Store(sys.argv[1])
        try:
            store.publish("00000.tar", bytes(2 << 20))
        except OSError as error:
            print(error)
        print(os.listdir(store.local_path), store.publish("small", b""))
    """.replace("'", '"')
    lines = run_under_mount(f"mount -t tmpfs -o size=1m none {tmp_path}", tmp_path, script).splitlines()
    assert lines == [f"[Errno 28] No space left on device: '{tmp_path}/00000.tar'", "[] True"]


def test_read_only_folder_is_named(tmp_path: Path) -> None:
    script = """if True:
        import sys
        from data_gen.storage import Store
        store = Store(sys.argv[1])
        print(store.read("a"), store.modified_seconds_ago("a") < 60)
        try:
            store.probe()
        except OSError as error:
            print(error)
    """
    Store(tmp_path).publish("a", b"content")
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    lines = run_under_mount(mount, tmp_path, script).splitlines()
    assert lines == ["b'content' True", f"output {tmp_path} cannot be written: Read-only file system"]


def has_written(folder: Path, num_bytes: int) -> bool:
    """Whether a file there is as large."""
    with contextlib.suppress(FileNotFoundError):  # one that is gone by now
        return any(path.stat().st_size >= num_bytes for path in folder.iterdir())
    return False
