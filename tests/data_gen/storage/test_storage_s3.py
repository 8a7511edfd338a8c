"""Laws of a store in S3 alone: answers that fail, are lost or cut, and large files, which go up in parts.

The laws that hold for every store, S3 among them, are in test_storage.py.
"""

import hashlib
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_gen.storage import Store
from data_gen.storage import remote as remote_module
from tests.data_gen.s3_server import FAILURES, ServedUrl, s3_server  # skips where moto or s3fs are missing
from tests.processes import MAX_SECONDS

boto3 = pytest.importorskip("boto3", reason="boto3, an outside reader, is not installed")
PART_NUM_BYTES = 5 << 20  # the least that S3 takes for a part that is not the last


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, small parts; one request a try, so that what is tried again is tried by the store."""
    monkeypatch.setattr(remote_module, "SECONDS_BEFORE_SECOND_TRY", 0.001)
    monkeypatch.setattr(remote_module, "PART_NUM_BYTES", PART_NUM_BYTES)
    monkeypatch.setattr(remote_module, "NUM_REQUESTS_PER_TRY", 1)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedUrl]:
    with s3_server() as url:
        yield url


@pytest.fixture
def url(served: ServedUrl, request: pytest.FixtureRequest) -> ServedUrl:
    """A folder of its own for each test, of one server."""
    own = ServedUrl(f"{served}/{request.node.name.replace('[', '-').rstrip(']')}")
    own.server = served.server
    for kept in (own.server.requests, own.server.failures, own.server.planned):
        kept.clear()
    return own


@pytest.fixture
def large() -> bytes:
    """More than two parts."""
    return random.Random(0).randbytes(2 * PART_NUM_BYTES + 1000)


def read_outside(url: str, name: str) -> bytes:
    """What boto3 finds under a name."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bytes(boto3.client("s3").get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read())


def write_outside(url: str, name: str, content: bytes) -> None:
    """What another program puts there."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)


@pytest.mark.parametrize("is_path", [False, True])
def test_large_file_goes_up_in_parts_and_the_first_wins(
    url: ServedUrl, large: bytes, tmp_path: Path, is_path: bool
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(large)
    second.write_bytes(large[::-1])
    store = Store(url)
    assert store.publish("00000.tar", first if is_path else large)
    assert sum("uploadId=" in request for request in url.server.requests) == 4  # three parts, one completion
    assert not store.publish("00000.tar", second if is_path else large[::-1])
    assert read_outside(url, "00000.tar") == large
    assert store.digest("00000.tar") == (len(large), hashlib.sha256(large).hexdigest())


def test_one_of_many_large_files_wins(url: ServedUrl, large: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    # All find the name free before they begin, so that the completions decide.
    monkeypatch.setattr(remote_module.RemoteFiles, "size", lambda self, name: None)
    contents = [bytes([index]) + large for index in range(3)]
    with ThreadPoolExecutor(len(contents)) as pool:
        won = list(pool.map(lambda content: store.publish("00000.tar", content), contents))
    assert won.count(True) == 1
    assert read_outside(url, "00000.tar") == contents[won.index(True)]


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_server_that_replaces_files_is_refused(method: str) -> None:
    with s3_server(methods_without_conditions=[method]) as url:
        with pytest.raises(OSError, match=f"output {url}: the store replaces a file where only a new one"):
            Store(url).probe()
        assert Store(url).list() == []


def test_bucket_that_does_not_exist_is_named(url: ServedUrl) -> None:
    store = Store("s3://no-such-bucket/dataset")
    with pytest.raises(OSError, match="output s3://no-such-bucket/dataset cannot be written: .*bucket"):
        store.probe()
    for recursive in (False, True):
        with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/dataset: listing failed"):
            store.list(recursive=recursive)


def test_store_may_be_a_whole_bucket(served: ServedUrl) -> None:
    with s3_server() as url:
        store = Store(url.rpartition("/")[0])
        assert store.list() == []
        assert store.publish("a", b"content")
        assert store.publish("b/c", b"content")
        assert (store.list(), store.list(recursive=True)) == (["a"], ["a", "b/c"])
        assert store.name == url.split("/")[2]


def test_listing_has_every_page_and_what_others_wrote(url: ServedUrl) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    names = [f"{index:05d}.tar" for index in range(1100)]  # a page has 1000
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for name in names:  # past the server, at a tenth of the time
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, f"{prefix}/{name}", b"")
    store = Store(url)
    assert store.list() == names
    write_outside(url, "work/by-another.tar", b"")
    assert store.list() == names
    assert store.list(recursive=True) == [*names, "work/by-another.tar"]


@pytest.mark.parametrize("num_requests_per_try", [1, 3])
@pytest.mark.parametrize("failure", FAILURES)
def test_file_is_published_through_each_failure(
    url: ServedUrl, monkeypatch: pytest.MonkeyPatch, failure: str, num_requests_per_try: int
) -> None:
    monkeypatch.setattr(remote_module, "NUM_REQUESTS_PER_TRY", num_requests_per_try)
    url.server.fail_next("PUT", failure)
    assert Store(url).publish("a", b"content")
    assert url.server.num_failures == 1
    assert read_outside(url, "a") == b"content"


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_large_file_is_published_through_each_failure(
    url: ServedUrl, large: bytes, method: str, failure: str
) -> None:
    store = Store(url)
    store.exists("a connection")
    if method == "POST":  # of the two: the second, which completes the parts
        url.server.skip_next("POST")
    url.server.fail_next(method, failure)
    assert store.publish("a", large)
    assert url.server.num_failures == 1
    assert read_outside(url, "a") == large


def test_lost_answer_does_not_make_a_rival_the_first(url: ServedUrl) -> None:
    """Even where the rival's file is equal, byte by byte."""
    write_outside(url, "a", b"content")
    url.server.fail_next("PUT", "lost")
    assert not Store(url).publish("a", b"content")


@pytest.mark.parametrize("failure", FAILURES)
def test_file_is_read_whole_through_each_failure(url: ServedUrl, failure: str) -> None:
    content = random.Random(1).randbytes(200_000)
    store = Store(url)
    store.publish("a", content)
    url.server.fail_next("GET", failure)
    assert store.read("a") == content
    url.server.fail_next("GET", failure)
    assert store.read_range("a", 1000, 150_000) == content[1000:151_000]
    url.server.fail_next("GET", failure)
    with store.open("a") as file:
        assert file.read() == content
    url.server.fail_next("GET", failure)
    assert store.list() == ["a"]
    url.server.fail_next("HEAD", failure)
    assert store.size("a") == len(content)
    assert url.server.num_failures == 5


def test_failing_operation_ends_after_a_bounded_number_of_requests(
    url: ServedUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "NUM_TRIES", 2)
    monkeypatch.setattr(remote_module, "NUM_REQUESTS_PER_TRY", 2)
    # aiohttp itself sends a request once more if the connection was closed before an answer came.
    for failure, num_requests in (("500", 4), ("refused", 8)):
        url.server.requests.clear()
        url.server.fail_next("PUT", *[failure] * num_requests)
        with pytest.raises(OSError, match=f"{url}/a: publishing failed 2 times, at last with"):
            Store(url).publish("a", b"content")
        assert url.server.num_requests == num_requests
    assert Store(url).publish("a", b"content")


def test_denied_operation_is_tried_once_and_named(url: ServedUrl) -> None:
    store = Store(url)
    store.publish("a", b"content")
    calls: list[tuple[str, Any]] = [
        ("GET", lambda: store.read("a")),
        ("GET", store.list),
        ("GET", lambda: store.list(recursive=True)),
        ("HEAD", lambda: store.exists("a")),
        ("PUT", lambda: store.publish("b", b"")),
        ("DELETE", lambda: store.delete("a")),
    ]
    for method, call in calls:
        url.server.requests.clear()
        url.server.fail_next(method, "403")
        with pytest.raises(PermissionError, match=f"{url}.* failed"):
            call()
        assert url.server.num_requests == 1


def test_server_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "NUM_TRIES", 2)
    with s3_server() as url, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(OSError, match=f"{url}/a: reading failed 2 times, at last with .*Connect"):
            Store(url).read("a")


def test_missing_credentials_are_named() -> None:
    with s3_server() as url, pytest.MonkeyPatch.context() as environment:
        environment.delenv("AWS_ACCESS_KEY_ID")
        environment.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(OSError, match=f"{url}/a: reading failed: .*credentials"):
            Store(url).read("a")
        assert url.server.num_requests == 0


def test_age_is_counted_by_the_clock_of_the_server(url: ServedUrl, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    store.publish("a", b"")
    monkeypatch.setattr(remote_module, "datetime", None)  # this machine's clock is not looked at
    age = store.modified_seconds_ago("a")
    assert age is not None
    assert 0 <= age < MAX_SECONDS


def test_everything_comes_through_where_a_tenth_of_the_requests_fail(
    url: ServedUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(index: int) -> None:
        content = random.Random(index).randbytes(1000 + index)
        name = f"folder/{index:03d}"
        assert store.publish(name, content)
        assert not store.publish(name, b"late")
        assert store.read(name) == content
        assert store.read_range(name, 100, 50) == content[100:150]
        assert store.digest(name) == (len(content), hashlib.sha256(content).hexdigest())
        store.replace(f"{name}.json", content)
        store.move(f"{name}.json", f"moved/{index:03d}")
        assert store.read(f"moved/{index:03d}") == content

    # An operation of three requests fails in one of four tries: never twelve times in a row, all but surely.
    monkeypatch.setattr(remote_module, "NUM_TRIES", 12)
    with s3_server(failure_fraction=0.1, seed=1) as url:
        store = Store(url)
        store.probe()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(30)))
        names = [f"{index:03d}" for index in range(30)]
        assert store.list("folder") == [f"folder/{name}" for name in names]
        assert store.list(recursive=True) == [
            f"{folder}/{name}" for folder in ("folder", "moved") for name in names
        ]
        assert url.server.num_requests > 300
        assert url.server.num_failures > 0.05 * url.server.num_requests
        assert {failure.partition(":")[0] for failure in url.server.failures} == set(FAILURES)


def test_server_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    before = dict(os.environ)
    with s3_server():
        assert "AWS_PROFILE" not in os.environ
        assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
    assert dict(os.environ) == before
