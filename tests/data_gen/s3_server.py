"""An S3 server on this machine: moto, behind a layer that fails, loses or cuts answers if a test wants it.

    with s3_server(failure_fraction=0.1) as url:
        Store(url).publish("00000.tar", content)
        assert url.server.num_failures > 0

Child processes see the same server: its address is in the environment, with credentials that are not any.
"""

import contextlib
import functools
import itertools
import os
import random
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install stablerep[s3]")
pytest.importorskip(
    "moto.moto_server.werkzeug_app", reason="moto[server] is not installed", exc_type=ImportError
)

import s3fs  # type: ignore[import-untyped]  # it ships none
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

FAILURES = ("500", "503", "refused", "lost", "cut")
"""Two kinds of answer; the connection closed before the request is read, after it is carried out without an
answer, and in the middle of the answer."""

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key-of-a-test",
    "AWS_SECRET_ACCESS_KEY": "secret-of-a-test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
_ERROR_CODES = {"403": "AccessDenied", "500": "InternalError", "503": "ServiceUnavailable"}
_UNSET = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "AWS_ENDPOINT_URL_S3")
_bucket_numbers = itertools.count()

_StartResponse = Callable[..., Callable[[bytes], object]]


class ServedUrl(str):
    """`s3://bucket/dataset` of a running server."""

    server: "FailingServer"


class FailingServer:
    """The WSGI application of moto, some of whose answers do not arrive.

    It also makes conditional requests one step, as S3 does: moto looks and writes in two.

    Args:
        failure_fraction: Fraction of requests that fail, in each of the ways of `FAILURES`.
        seed: Which ones.
        methods_without_conditions: Methods whose `If-None-Match` is ignored, as older stores do: `PUT` for a
            single request, `POST` for the completion of parts.
    """

    def __init__(
        self, failure_fraction: float = 0.0, seed: int = 0, methods_without_conditions: Collection[str] = ()
    ) -> None:
        self.failure_fraction = failure_fraction
        self.methods_without_conditions = methods_without_conditions
        self.requests: list[str] = []
        self.failures: list[str] = []
        self.planned: list[tuple[str, str | None]] = []
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._condition_lock = threading.Lock()
        self._application = _build_application()

    @property
    def num_requests(self) -> int:
        """Requests that came, those that failed among them."""
        return len(self.requests)

    @property
    def num_failures(self) -> int:
        """Requests that failed on purpose."""
        return len(self.failures)

    def fail_next(self, method: str, *failures: str) -> None:
        """Fails the next requests of a method, in these ways and this order; `403` is one more."""
        self.planned += [(method, failure) for failure in failures]

    def skip_next(self, method: str) -> None:
        """Answers the next request of a method well, before those that `fail_next` names from here on."""
        self.planned.append((method, None))

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        failure = self._choose_failure(method, environ)
        if failure in _ERROR_CODES:
            code = _ERROR_CODES[failure]
            body = f"<Error><Code>{code}</Code></Error>".encode() if method != "HEAD" else b""
            return _answer(start_response, f"{failure} {code}", body)
        if failure == "refused":
            return _hang_up(environ, start_response)
        if method in self.methods_without_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        lock = self._condition_lock if "HTTP_IF_NONE_MATCH" in environ else contextlib.nullcontext()
        with lock:
            if failure is None:
                return self._application(environ, start_response)
            return self._answer_badly(failure, environ, start_response)

    def _choose_failure(self, method: str, environ: dict[str, Any]) -> str | None:
        with self._lock:
            self.requests.append(f"{method} {environ['PATH_INFO']}?{environ['QUERY_STRING']}")
            failure = None
            planned = next((plan for plan in self.planned if plan[0] == method), None)
            if planned is not None:
                self.planned.remove(planned)
                failure = planned[1]
            elif self._random.random() < self.failure_fraction:
                failure = self._random.choice(FAILURES)
            if failure is not None:
                self.failures.append(f"{failure}: {self.requests[-1]}")
            return failure

    def _answer_badly(
        self, failure: str, environ: dict[str, Any], start_response: _StartResponse
    ) -> Iterable[bytes]:
        heads: list[tuple[Any, ...]] = []

        def keep(*head: Any) -> Callable[[bytes], object]:
            heads.append(head)
            return bytes

        body = b"".join(self._application(environ, keep))
        if failure == "lost" or len(body) < 2:
            return _hang_up(environ, start_response)
        status, headers = heads[0][:2]
        headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return _cut(environ, body)


@contextlib.contextmanager
def s3_server(
    failure_fraction: float = 0.0, seed: int = 0, methods_without_conditions: Collection[str] = ()
) -> Iterator[ServedUrl]:
    """Runs a server on a free port of the loopback, with an empty bucket.

    Yields:
        URL of a folder in the bucket; its `server` counts and plans failures.
    """
    application = FailingServer(0.0, seed, methods_without_conditions)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_QuietHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    bucket = f"bucket-{os.getpid()}-{next(_bucket_numbers)}"
    with _environment({**_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}):
        s3fs.S3FileSystem.clear_instance_cache()  # connections to a server of before
        try:
            s3fs.S3FileSystem().mkdir(bucket)
            application.requests.clear()
            application.failure_fraction = failure_fraction
            url = ServedUrl(f"s3://{bucket}/dataset")
            url.server = application
            yield url
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.shutdown()
            server.server_close()
            thread.join()


@functools.cache
def _build_application() -> DomainDispatcherApplication:
    return DomainDispatcherApplication(create_backend_app)


class _QuietHandler(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        """Nothing for each request."""


def _answer(start_response: _StartResponse, status: str, body: bytes) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _hang_up(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return _answer(start_response, "200 OK", b"")


def _cut(environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*values, *_UNSET)}
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
