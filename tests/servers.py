"""Object stores on this machine for tests: moto as S3, and a server before it that fails as planned and counts.

def test_something(s3):            # s3://a-bucket-of-its-own, empty; AWS_* say where, also to other processes
def test_a_fault(s3, faults):      # the same by way of `faults`
    faults.plan("cut", "GET", "train-000000.tar", times=1)
    ...
    assert faults.count("GET") == 2
"""

import contextlib
import http.client
import itertools
import logging
import math
import os
import re
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

STALL = 3.0  # seconds for which a stalled answer says nothing; a test sets the client's patience below it
SAID = {503: "SlowDown", 500: "InternalError", 409: "ConditionalRequestConflict", 412: "PreconditionFailed",
        403: "AccessDenied", 404: "NoSuchKey"}  # fmt: skip
_numbers = itertools.count()


@dataclass
class Fault:
    """What goes wrong with requests of one kind.

    Attributes:
        kind: a status of `SAID`, or "cut" (half of the body comes), "stall" (nothing comes, then the connection ends),
            "reset" (before anything is done), "lost" (it is done, but no answer comes), "flip" (one bit of the body).
        method: GET, HEAD, PUT, POST, DELETE, or LIST, which is a GET of a folder.
        path: a regular expression, found anywhere in the path.
        skip, times: how many such requests pass before it, and how many meet it.
    """

    kind: int | str
    method: str
    path: str
    skip: int = 0
    times: float = math.inf


@dataclass(frozen=True)
class Request:
    """One that came; bytes are of bodies. `status` is 0 where no answer was sent."""

    method: str
    path: str
    received: int
    sent: int
    status: int


class FaultServer(ThreadingHTTPServer):
    """Hands requests on to a server, but for those that a plan says otherwise of."""

    daemon_threads = True
    latency, rate = 0.0, math.inf  # as of a store far away: seconds before an answer, bytes a second of a connection

    def __init__(self, behind: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> "Iterator[FaultServer]":
        """Serve in a thread."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def plan(self, kind: int | str, method: str, path: str, *, skip: int = 0, times: float = math.inf) -> None:
        """See `Fault`."""
        self.faults.append(Fault(kind, method, path, skip, times))

    def clear(self) -> None:
        """Forget all plans and all that came."""
        self.faults, self.requests = [], []

    def count(self, method: str = "", path: str = "") -> int:
        """Requests of one method, or of all, whose path has a match."""
        return sum(method in ("", each.method) and bool(re.search(path, each.path)) for each in self.requests)

    def bytes(self, method: str = "GET", path: str = "") -> int:
        """Bytes of bodies sent in answers, or of a PUT received."""
        found = [each for each in self.requests if each.method == method and re.search(path, each.path)]
        return sum(each.received if method in ("PUT", "POST") else each.sent for each in found)

    def next_fault(self, method: str, path: str) -> int | str | None:
        """What one request meets."""
        with self._lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.times:
                        fault.times -= 1
                        return fault.kind
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path)
        method = "LIST" if self.command == "GET" and re.search(r"[?&](list-type|prefix)=", path) else self.command
        body = self._body()
        fault = self.server.next_fault(method, path)
        if fault == "reset":
            return self._end(method, path, body)
        if isinstance(fault, int):
            word = SAID[fault]
            data = b"<?xml version='1.0'?><Error><Code>%b</Code><Message>%b</Message></Error>" % ((word.encode(),) * 2)
            return self._send(method, path, body, fault, [("Content-Type", "application/xml")], data)
        behind = http.client.HTTPConnection(*self.server.behind, timeout=60)
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect", "connection")
        }
        headers["Content-Length"] = str(len(body))
        behind.request(self.command, self.path, body, headers)
        found = behind.getresponse()
        data = found.read()
        behind.close()
        time.sleep(self.server.latency + len(data) / self.server.rate)
        if fault in ("lost", "stall"):
            return self._end(method, path, body, STALL if fault == "stall" else 0)
        if fault == "flip":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        skipped = ("transfer-encoding", "connection", "content-length", "date", "server")
        kept = [(name, value) for name, value in found.getheaders() if name.lower() not in skipped]
        length = found.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self._send(method, path, body, found.status, [*kept, ("Content-Length", length or "0")], data, fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(
        self,
        method: str,
        path: str,
        body: bytes,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        cut: bool = False,
    ) -> None:
        if not any(name == "Content-Length" for name, _ in headers):
            headers = [*headers, ("Content-Length", str(len(data)))]
        if self.command == "HEAD":
            data = b""
        sent = data[: len(data) // 2] if cut else data
        self.server.requests.append(Request(method, path, len(body), len(sent), status))
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        if cut:
            self._hang_up()

    def _end(self, method: str, path: str, body: bytes, wait: float = 0) -> None:
        self.server.requests.append(Request(method, path, len(body), 0, 0))
        time.sleep(wait)
        self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        # So that closing sends a reset, not an end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _put_in_one_step() -> None:
    """A condition and the write that hangs on it are one step in S3; moto looks first and writes later, so that two may win."""
    from moto.s3.responses import S3Response

    lock, put = threading.Lock(), S3Response.put_object

    def alone(*arguments: Any) -> Any:
        with lock:
            return put(*arguments)

    S3Response.put_object = alone


@pytest.fixture(scope="session")
def moto() -> Iterator[tuple[str, int]]:
    """moto as S3 on this machine, in a thread of this process: host and port."""
    server = pytest.importorskip("moto.server", reason="needs moto: pip install 'datalth[dev]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    _put_in_one_step()
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()
    running.stop()


@pytest.fixture
def faults(moto: tuple[str, int]) -> Iterator[FaultServer]:
    """A server before moto that fails as planned and counts; the URLs of `s3` then lead to it."""
    with FaultServer(moto).running() as server:
        yield server


@pytest.fixture
def s3(request: pytest.FixtureRequest, moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket. The environment says where it is, so other processes find it too."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install 'datalth[s3]'")
    direct = f"http://{moto[0]}:{moto[1]}"
    through = "faults" in request.fixturenames
    endpoint = request.getfixturevalue("faults").url if through else direct
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # clients do not see that the environment has changed
    bucket = f"bucket-{os.getpid()}-{next(_numbers)}"
    urllib.request.urlopen(urllib.request.Request(f"{direct}/{bucket}", method="PUT")).close()
    yield f"s3://{bucket}"
    s3fs.S3FileSystem.clear_instance_cache()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a client of S3 must find in its environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # or botocore tries five times, seconds apart, before we are told
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def upload(folder: Path, url: str) -> str:
    """Put all files below a folder under a URL; the URL."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(folder)}", file.read_bytes())
    fs.invalidate_cache()
    return url
