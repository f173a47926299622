"""Reading from an object store: what goes wrong on the way is mended, or is one line with the URL."""

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from conftest import inspect, mine
from servers import FaultServer, upload
from shards import remote, remote_file, storage
from shards.copies import fetch
from shards.errors import TicketSetError
from shards.reader import TicketSet

CONTENT = np.random.default_rng(0).bytes(50_000)
BLOCK = 4096


@pytest.fixture
def url(s3: str, faults: FaultServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """An object of 13 blocks; what s3fs would try again by itself is left to us, and nobody waits."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(S3FileSystem, "read_timeout", 0.4)
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    monkeypatch.setattr(remote_file, "BLOCK", BLOCK)
    monkeypatch.setattr(remote_file, "SMALL", 1000)
    put(f"{s3}/set/file.tar", CONTENT)
    faults.clear()
    return f"{s3}/set/file.tar"


def put(url: str, data: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)  # as another process would
    fs.pipe_file(path, data)


READERS = {
    "read_bytes": storage.read_bytes,
    "blocks": lambda url: b"".join(storage.blocks(url, 1 << 20)),
    "open_ranges": lambda url: storage.open_ranges(url).read(0, 50_000),
    "open_file": lambda url: storage.open_file(url).read(),
    "read_ranges": lambda url: b"".join(remote_file.read_ranges([(url, 0, 20_000), (url, 20_000, 50_000)])),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_what_passes_is_mended(url, faults, reader):
    for kind, times in ((503, 2), (500, 1), ("cut", 1), ("reset", 2), ("lost", 1)):
        faults.clear()
        faults.plan(kind, "GET", "file.tar", skip=1, times=times)
        assert reader(url) == CONTENT
        assert not any(fault.times for fault in faults.faults), kind


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", [503, "cut", "reset", 403])
def test_what_does_not_pass_is_one_line_with_the_url(url, faults, reader, kind):
    faults.plan(kind, "GET", "file.tar")
    with pytest.raises(TicketSetError) as raised:
        reader(url)
    assert str(raised.value).startswith(f"{url}: ") and "\n" not in str(raised.value)


def test_a_flipped_bit_in_a_whole_file_is_seen_by_the_client(s3, url, faults):
    put(f"{s3}/set/small.json", b"content")
    faults.plan("flip", "GET", "small.json", times=1)
    assert storage.read_bytes(f"{s3}/set/small.json") == b"content"
    faults.plan("flip", "GET", "small.json")
    with pytest.raises(TicketSetError, match=f"^{s3}/set/small.json: .*checksum"):
        storage.read_bytes(f"{s3}/set/small.json")


def test_a_server_that_says_nothing_is_asked_again(url, faults):
    faults.plan("stall", "GET", "file.tar", times=1)
    assert storage.read_bytes(url) == CONTENT
    faults.clear()
    faults.plan("stall", "HEAD", "file.tar")
    with pytest.raises(TicketSetError, match=f"^{url}: .*[Tt]imeout"):
        storage.open_ranges(url)
    assert faults.count("HEAD") == 3  # three tries, then the line


@pytest.mark.parametrize(("status", "error"), [(404, FileNotFoundError), (403, TicketSetError)])
def test_what_cannot_pass_is_asked_once(url, faults, status, error):
    for read in (storage.read_bytes, storage.open_ranges, storage.size_of):
        faults.clear()
        for method in ("HEAD", "GET"):
            faults.plan(status, method, "file.tar")
        with pytest.raises(error):
            read(url)
        assert faults.count("HEAD") + faults.count("GET") == 1


def test_a_small_file_is_one_request_and_an_empty_one_is_empty(s3, url, faults):
    for size, requests in ((999, 1), (1000, 3), (1001, 3), (0, 2)):
        put(f"{s3}/set/small.json", CONTENT[:size])
        faults.clear()
        assert storage.read_bytes(f"{s3}/set/small.json", 1001) == CONTENT[:size]
        assert len(faults.requests) == requests
    for limit in (1, 998):
        put(f"{s3}/set/small.json", CONTENT[:999])
        with pytest.raises(TicketSetError, match=f"expected at most {limit} bytes, got 999"):
            storage.read_bytes(f"{s3}/set/small.json", limit)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3}/set/gone.json")


def test_scattered_parts_are_fetched_alone(url, faults):
    ranges = storage.open_ranges(url, scattered=True)
    assert ranges.read(10_000, 300) == CONTENT[10_000:10_300] and ranges.read(49_990, 100) == CONTENT[49_990:]
    assert faults.bytes() == 310


def test_blocks_of_all_files_together_are_bounded_and_none_outlives_its_file(s3, url, faults, monkeypatch):
    monkeypatch.setattr(remote_file, "BLOCKS_KEPT", 5)
    before = len(remote_file.RemoteRanges._kept)
    files = [storage.open_ranges(url) for _ in range(3)]
    for file in files:
        assert file.read(0, 50_000) == CONTENT
        assert len(remote_file.RemoteRanges._kept) <= 5
    put(url, CONTENT[::-1])
    again = storage.open_ranges(url)
    assert again.read(0, 100) == CONTENT[::-1][:100]  # not the block of the file that was there
    del files, file, again
    assert len(remote_file.RemoteRanges._kept) <= before


def test_a_part_that_was_refused_is_asked_for_alone(url, faults):
    places = [(url, start, start + 100) for start in range(0, 2000, 100)]
    faults.plan(503, "GET", "file.tar", skip=7, times=3)
    assert remote_file.read_ranges(places) == [CONTENT[start:end] for _, start, end in places]
    assert faults.count("GET") == 20 + 3


def test_what_another_process_puts_is_seen_though_it_was_listed_before(s3, url):
    folder, name, later = f"{s3}/set", "later.json", f"{s3}/set/later.json"
    fs, path = remote.filesystem(folder)
    assert [entry.rpartition("/")[2] for entry in fs.ls(path, detail=False)] == ["file.tar"]
    put(later, b"one")
    assert fs.exists(f"{path}/{name}") and fs.size(f"{path}/{name}") == 3 and fs.cat_file(f"{path}/{name}") == b"one"
    assert storage.list_names(folder) == ["file.tar", name] and len(fs.ls(path)) == 2
    put(later, b"and more")
    assert fs.size(f"{path}/{name}") == storage.size_of(later) == 8
    fs.rm_file(f"{path}/{name}")
    assert not storage.exists(later) and storage.list_names(f"{s3}/nothing") == []


def test_only_object_stores_are_told_to_keep_no_listings(monkeypatch):
    """sftp hands what it does not know on to ssh, which refuses it."""
    told = {}

    def noted(url, **options):
        told[url.partition("://")[0]] = options
        return fsspec.filesystem("memory"), url

    monkeypatch.setattr(fsspec.core, "url_to_fs", noted)
    for scheme in ("s3", "gs", "abfs", "sftp", "https", "simplecache::s3"):
        remote.filesystem(f"{scheme}://host/path")
    no = {"use_listings_cache": False}
    assert told == {"s3": no, "gs": no, "abfs": no, "sftp": {}, "https": {}, "simplecache::s3": {}}


def test_reading_in_order_asks_for_blocks_side_by_side_and_elsewhere_for_one(url, faults):
    ranges = storage.open_ranges(url)
    assert ranges.read(5 * BLOCK, 10) == CONTENT[5 * BLOCK : 5 * BLOCK + 10] and faults.count("GET") == 1
    assert ranges.read(6 * BLOCK, 10) == CONTENT[6 * BLOCK : 6 * BLOCK + 10] and faults.count("GET") == 5
    assert ranges.read(9 * BLOCK, 10) == CONTENT[9 * BLOCK : 9 * BLOCK + 10] and faults.count("GET") == 5
    assert ranges.read(0, 50_000) == CONTENT and faults.count("GET") == 13 and faults.bytes() == len(CONTENT)


def test_a_copy_is_fetched_once_checked_and_never_from_flipped_bits(url, faults, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    faults.plan("flip", "GET", "file.tar", skip=3, times=1)
    with pytest.raises(TicketSetError, match=f"^{url}: expected 50000 bytes of sha256 {digest[:12]}"):
        fetch(url, tmp_path / "cache", len(CONTENT), digest)
    assert not list((tmp_path / "cache").glob("*.tar*tmp")) and not list((tmp_path / "cache").glob("*.tar"))
    faults.clear()
    for _ in range(2):
        assert fetch(url, tmp_path / "cache", len(CONTENT), digest).path.read_bytes() == CONTENT
    assert (faults.count("HEAD"), faults.count("GET"), faults.bytes()) == (1, 13, len(CONTENT))


def _read_in_a_fork(url: str, ranges: storage.Ranges, answers: "multiprocessing.SimpleQueue[bytes]") -> None:
    answers.put(ranges.read(30_000, 10_000))
    answers.put(storage.read_bytes(url))
    os._exit(0)


def test_what_was_opened_before_a_fork_is_read_behind_it(url):
    """Clients refuse: their event loop runs in a thread of the parent."""
    ranges = storage.open_ranges(url)
    assert ranges.read(0, 10) == CONTENT[:10]
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_read_in_a_fork, args=(url, ranges, answers))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert answers.get() == CONTENT[30_000:40_000] and answers.get() == CONTENT
    assert ranges.read(10_000, 10) == CONTENT[10_000:10_010]


def test_another_process_finds_the_store_by_its_environment(center_set, s3):
    upload(center_set, f"{s3}/set")
    command = [sys.executable, "-m", "shards.inspect.cli", "info", f"{s3}/set"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "center" in said


@pytest.fixture
def sets(s3: str, center_set: Path, tmp_path: Path) -> tuple[str, Path]:
    """A set and a link to it, in a bucket and in a folder."""
    shutil.copytree(center_set, tmp_path / "sets/base")
    mine("--data", tmp_path / "sets/base", "--out", tmp_path / "sets/link", "--method", "random", "--images", "link")
    return upload(tmp_path / "sets", f"{s3}/sets"), tmp_path / "sets"


def test_a_link_in_a_store_finds_its_base_there_or_where_it_is_told(sets, center_set):
    far, near = sets
    expected = [(s.key, s.image) for s in TicketSet.open(str(near / "link")).stream("train")]
    for opened in (
        TicketSet.open(f"{far}/link"),
        TicketSet.open(f"{far}/link", str(center_set)),
        TicketSet.open(str(near / "link"), f"{far}/base"),
    ):
        assert [(s.key, s.image) for s in opened.stream("train")] == expected


def test_verify_finds_a_flipped_bit_in_a_store(sets):
    far, near = sets
    tar = bytearray((near / "base/train-000001.tar").read_bytes())
    tar[len(tar) // 2] ^= 1
    put(f"{far}/base/train-000001.tar", bytes(tar))
    assert "train-000001.tar" in inspect("verify", f"{far}/base", "--deep", code=1).output
