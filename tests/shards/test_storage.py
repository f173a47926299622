"""Where bytes are: whose fault an error is, plain files alone, stores that fail in every way they can, copies of tars."""

import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import _registry, known_implementations
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from shards import remote, remote_file, storage
from shards.copies import TarCopies, fetch, own_folder
from shards.errors import TicketSetError, first_line, is_machine_error
from shards.reader import TicketSet
from shards.rows import Rows
from shards.store import open_store
from shards.writer import read_shard_json


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT", "ENOTCONN", "ESTALE", "ETIMEDOUT"])
def test_what_would_meet_any_file_is_the_machines_error(name):
    assert is_machine_error(OSError(getattr(errno, name), "said by the system", "photo.jpg"))


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EISDIR", "ELOOP", "ENAMETOOLONG", "EIO", "EINVAL", "ENOTDIR"])
def test_what_one_file_says_is_not(name):
    assert not is_machine_error(OSError(getattr(errno, name), "said by the system", "photo.jpg"))


def test_memory_is_the_machines_and_a_decoders_error_is_not():
    assert is_machine_error(MemoryError())
    assert not is_machine_error(OSError("image file is truncated"))
    assert not is_machine_error(ValueError("no OSError at all"))


def test_an_error_that_says_nothing_goes_by_its_class():
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
    assert first_line(OSError("first\nsecond")) == "first"


# Local files.


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something would wait for ever."""

    def late(*_: object) -> None:
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def odd_files(folder: Path) -> dict[str, Path]:
    """Everything that is no plain file, by what it is called; also behind links."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("fifo")
    (folder / "device").symlink_to("/dev/null")
    return {"FIFO": folder / "fifo", "folder": folder / "folder", "device": folder / "device"}


READERS: dict[str, Callable[[str], object]] = {
    "read_bytes": storage.read_bytes,
    "size_of": storage.size_of,
    "open_ranges": lambda url: storage.open_ranges(url).read(0, 1),
    "open_file": lambda url: storage.open_file(url).read(1),
    "blocks": lambda url: list(storage.blocks(url, 1 << 20)),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_nothing_but_a_plain_file_is_read(tmp_path, reader, monkeypatch):
    for kind, path in odd_files(tmp_path).items():
        with within(5), pytest.raises(TicketSetError, match=f"^{path}: expected a plain file, got a {kind}$"):
            reader(str(path))
    with within(5), pytest.raises(TicketSetError, match="link: expected a plain file, got a FIFO"):
        reader(f"file://{tmp_path / 'link'}")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:  # its path must be short
        bound.bind("socket")
        with pytest.raises(TicketSetError, match="socket: expected a plain file, got a socket"):
            reader("socket")
    with pytest.raises(FileNotFoundError):
        reader(str(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_an_error_in_words(name):
    for reader in READERS.values():
        with pytest.raises(TicketSetError, match=r"^'a\\.*b': expected a path: "):
            reader(name)


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.tar", "index/train-000000.parquet"])
def test_a_fifo_in_a_set_is_one_line_and_no_wait(center_set, tmp_path, name):
    shutil.copytree(center_set, tmp_path / "set")
    (tmp_path / "set" / name).unlink()
    os.mkfifo(tmp_path / "set" / name)
    with within(20), pytest.raises(TicketSetError, match=f"{name}: expected a plain file, got a FIFO"):
        Rows(TicketSet.open(str(tmp_path / "set")), "train").read(0, 0)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "sparse.json"
    with open(path, "wb") as file:
        file.truncate(1 << 42)
    for limit in ((), (100,)):
        with (
            within(5),
            pytest.raises(TicketSetError, match=r"sparse.json: expected at most \d+ bytes, got 4398046511104"),
        ):
            storage.read_bytes(str(path), *limit)
    path.write_bytes(b"x" * 100)
    assert storage.read_bytes(str(path), 100) == b"x" * 100
    with pytest.raises(TicketSetError, match="expected at most 99 bytes, got 100"):
        storage.read_bytes(str(path), 99)


def test_a_read_that_brings_less_than_asked_goes_on(tmp_path, monkeypatch):
    """As at a signal, on network file systems, and beyond 2 GB."""
    content = bytes(range(256)) * 10
    (tmp_path / "file").write_bytes(content)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 700), offset))
    ranges = storage.open_ranges(str(tmp_path / "file"))
    assert ranges.read(0, 2560) == content and ranges.read(100, 2000) == content[100:2100]
    assert storage.read_bytes(str(tmp_path / "file")) == content


def test_a_read_gives_what_the_file_has_whatever_is_asked(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    ranges = storage.open_ranges(str(tmp_path / "file"))
    assert ranges.size == 10
    assert [ranges.read(*asked) for asked in ((7, 10**15), (0, 10), (10, 1), (10**18, 5), (-3, 2), (2, -1), (2, 0))] == [
        b"789", b"0123456789", b"", b"", b"", b"", b"",
    ]  # fmt: skip


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "file").write_bytes(b"0123456789")
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError) as raised:
        storage.read_bytes(str(tmp_path / "file"))
    assert raised.value.filename == str(tmp_path / "file")


# Remote stores.


class Store(AbstractFileSystem):
    """A folder as a store that fails on demand, and caches its listings as stores do."""

    protocol = "faulty"
    root: Path
    error: BaseException | None = None
    fails_in: str = "info"  # or "read", once it is open
    ranged = True  # else a read at an offset is refused, as fsspec's HTTP refuses it
    sized = True
    answer: Callable[[bytes], bytes] = staticmethod(lambda data: data)  # what the server makes of a range
    reads: list[tuple[int, int]]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self.fail("info")
        path = self._strip_protocol(path)
        if path not in self.dircache:
            if not (self.root / path).is_dir():
                raise FileNotFoundError(path)
            self.dircache[path] = [self._entry(f"{path}/{name}".lstrip("/")) for name in os.listdir(self.root / path)]
        found = self.dircache[path]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self.fail("info")
        path = self._strip_protocol(path)
        found = next((entry for entry in self.ls(self._parent(path)) if entry["name"] == path), None)
        if found is None:
            raise FileNotFoundError(path)
        return found if self.sized or found["type"] == "directory" else {**found, "size": None}

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    def _entry(self, path: str) -> dict[str, Any]:
        kind = "directory" if (self.root / path).is_dir() else "file"
        return {"name": path, "type": kind, "size": (self.root / path).stat().st_size}

    def fail(self, place: str) -> None:
        if self.error is not None and self.fails_in == place:
            raise self.error

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        size = self.info(path)["size"]
        if size is None or block_size == 0:
            return Stream(self, (self.root / path).read_bytes())
        return Ranged(self, path, mode, size=size, cache_type=kwargs.get("cache_type", "none"), block_size=block_size)


class Ranged(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.fail("read")
        self.fs.reads.append((start, end))
        if start and not self.fs.ranged:
            raise ValueError("no range requests; open with block_size=0")
        return self.fs.answer((self.fs.root / self.path).read_bytes()[start:end])


class Stream(io.RawIOBase):
    """What comes, in the order in which it comes, in pieces of any size."""

    def __init__(self, fs: Store, data: bytes) -> None:
        self._fs, self._data = fs, fs.answer(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._fs.fail("read")
        size = len(self._data) if size < 0 else min(size, 1000)
        part, self._data = self._data[:size], self._data[size:]
        return part


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Store]:
    """A class of its own, so that what a test sets on it, and the instances that fsspec keeps, go with the test."""

    class Mine(Store):
        root = tmp_path / "store"

    Mine.root.mkdir()
    Mine.reads = []
    monkeypatch.setitem(_registry, "faulty", Mine)
    monkeypatch.setattr(remote_file, "BLOCK", 4096)
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    return Mine


CONTENT = bytes(range(256)) * 40  # three blocks


@pytest.fixture
def url(store: type[Store]) -> str:
    (store.root / "bucket").mkdir()
    (store.root / "bucket/file").write_bytes(CONTENT)
    return "faulty://bucket/file"


class ClientError(Exception):
    """As botocore's and aiohttp's: of no class that anything else has."""


ERRORS = [
    (ClientError("Unable to locate credentials"), "Unable to locate credentials"),
    (ClientError("Response payload is not completed\nand more\nlines"), "Response payload is not completed"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
    (PermissionError("Access Denied"), "Access Denied"),
    (OSError(errno.EIO, "Expected checksum a did not match b"), "checksum"),
    (TimeoutError(), "TimeoutError"),
    (ValueError("Bucket name must be ..."), "Bucket name"),
    (RuntimeError("Loop is not running"), "Loop is not running"),
    (KeyError("ContentLength"), "ContentLength"),
]
REMOTE = {
    **READERS,
    "exists": storage.exists,
    "list_names": storage.list_names,
    "glob_remote": lambda url: remote.glob(f"{url}*"),
    "TicketSet.open": TicketSet.open,
}


@pytest.mark.parametrize(
    ("name", "fails_in"),
    [*((name, "info") for name in REMOTE), *((name, "read") for name in READERS if name != "size_of")],
)
def test_whatever_a_store_raises_is_one_line_with_its_url(store, url, name, fails_in):
    store.fails_in = fails_in
    for error, said in ERRORS:
        store.error = error
        with pytest.raises(TicketSetError, match=said) as raised:
            REMOTE[name](url)
        assert str(raised.value).startswith(url) and "\n" not in str(raised.value)
        assert "JSON" not in str(raised.value)


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), MemoryError(), KeyboardInterrupt()])
def test_what_is_no_fault_of_a_store_passes(store, url, error):
    store.error = error
    for reader in READERS.values():
        with pytest.raises(type(error)):
            reader(url)


class StatusError(ClientError):
    """As aiohttp's ClientResponseError."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='Said by the server'")
        self.status = status


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (StatusError(503), "503, message"),
        (StatusError(403), "403, message"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed"), "Connect call failed"),
        (ClientError("Server disconnected"), "Server disconnected"),
        (StatusError(404), None),
        (FileNotFoundError("gone"), None),
        (None, None),
    ],
)
def test_over_http_not_found_is_what_is_not_there_and_nothing_else(store, monkeypatch, cause, said):
    """fsspec's HTTP says FileNotFoundError of every failure; the failure is its cause."""
    monkeypatch.setitem(_registry, "http", store)
    store.error = FileNotFoundError("http://host/set/manifest.json")
    store.error.__cause__ = cause
    with pytest.raises(TicketSetError, match=said or "expected a ticket set, found no manifest.json"):
        TicketSet.open("http://host/set")


def test_a_package_that_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(
        known_implementations, "rare", {"class": "rarefs.RareFileSystem", "err": "Install rarefs to access Rare"}
    )
    with pytest.raises(TicketSetError, match=r"^rare://b/x/manifest.json: needs rarefs: pip install rarefs$"):
        TicketSet.open("rare://b/x")
    # The module's name is not the package's: then what fsspec says.
    monkeypatch.setitem(
        known_implementations, "other", {"class": "otherclient.FS", "err": 'Other requires "otherprotocol" installed'}
    )
    with pytest.raises(TicketSetError, match=r'^other://b/x: Other requires "otherprotocol" installed$'):
        storage.exists("other://b/x")
    with pytest.raises(TicketSetError, match="^nonsense://b: Protocol not known: nonsense$"):
        storage.size_of("nonsense://b")


def test_what_was_written_meanwhile_is_seen(store, url):
    """Stores keep their listings, and fsspec keeps the stores."""
    later = "faulty://bucket/later"
    assert not storage.exists(later) and storage.list_names("faulty://bucket") == ["file"]
    (store.root / "bucket/later").write_bytes(b"more")
    assert storage.exists(later) and storage.list_names("faulty://bucket") == ["file", "later"]
    assert storage.size_of(later) == 4 and storage.read_bytes(later) == b"more"
    (store.root / "bucket/later").write_bytes(b"and more")
    assert storage.size_of(later) == 8 and storage.read_bytes(later) == b"and more"


SERVERS = {
    "plain": {},
    "whole files alone": {"ranged": False},
    "no size": {"sized": False},
}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_every_server_gives_the_same_bytes(store, url, server):
    for name, value in server.items():
        setattr(store, name, value)
    assert storage.read_bytes(url) == b"".join(storage.blocks(url, 10**6)) == CONTENT
    assert storage.size_of(url) == len(CONTENT)
    ranges = storage.open_ranges(url)
    for offset, size in ((0, 10240), (5000, 100), (4095, 2), (10000, 10**15), (3, 4096), (10240, 9), (-1, 5)):
        assert ranges.read(offset, size) == (CONTENT[offset : offset + size] if offset >= 0 else b"")
    with storage.open_file(url) as file:
        assert (file.seek(-3, 2), file.read(), file.seek(4090), file.read(12)) == (
            10237, CONTENT[-3:], 4090, CONTENT[4090:4102]
        )  # fmt: skip
    for limit, found in ((len(CONTENT) - 1, False), (len(CONTENT), True)):
        with contextlib.nullcontext() if found else pytest.raises(TicketSetError, match=f"{url}: expected at most"):
            storage.read_bytes(url, limit)


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_a_tar_is_listed_from_every_server(store, url, server):
    with tarfile.open(store.root / "bucket/file", "w") as tar:
        for number in range(5):
            info = tarfile.TarInfo(f"{number}.bin")
            info.size = 3000
            tar.addfile(info, io.BytesIO(bytes([number]) * 3000))
    for name, value in server.items():
        setattr(store, name, value)
    with storage.open_file(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        assert [(info.name, tar.extractfile(info).read()) for info in tar] == [
            (f"{number}.bin", bytes([number]) * 3000) for number in range(5)
        ]


def test_blocks_are_read_once_and_a_small_file_in_one_request(store, url):
    ranges = storage.open_ranges(url)
    for offset in range(0, 10000, 500):
        ranges.read(offset, 500)
    assert store.reads == [(10239, 10240), (0, 4096), (4096, 8192), (8192, 10240)]
    store.reads.clear()
    (store.root / "bucket/small").write_bytes(b"x" * 4096)
    assert storage.read_bytes("faulty://bucket/small") == b"x" * 4096
    assert store.reads == [(0, 4096)]


@pytest.mark.parametrize(
    "answer",
    [lambda data: data[:1] if len(data) == 1 else b"", lambda data: data if len(data) == 1 else data + b"!"],
    ids=["cut", "longer"],
)
@pytest.mark.parametrize("server", [SERVERS["plain"], SERVERS["whole files alone"]], ids=["plain", "whole"])
def test_a_server_that_sends_other_lengths_is_told_apart(store, url, server, answer):
    for name, value in server.items():
        setattr(store, name, value)
    store.answer = staticmethod(answer)
    for reader in (storage.read_bytes, lambda url: storage.open_ranges(url).read(5000, 100)):
        with pytest.raises(TicketSetError, match=r"^faulty://bucket/file: expected .*\d+ bytes"):
            reader(url)


def test_a_range_that_comes_in_pieces_is_put_together(store, url):
    store.answer = staticmethod(lambda data: data[:700])
    assert storage.read_bytes(url) == CONTENT
    assert storage.open_ranges(url).read(5000, 4000) == CONTENT[5000:9000]


# Copies of remote tars.


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_a_copy_is_named_by_the_hash_that_it_has(store, url, tmp_path, server):
    for name, value in server.items():
        setattr(store, name, value)
    path = fetch(url, tmp_path / "cache/set", len(CONTENT), sha256(CONTENT)).path
    assert path == (tmp_path / f"cache/set/{sha256(CONTENT)}.tar")
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "cache/set").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_a_tar_of_another_hash_or_length_leaves_nothing(store, url, tmp_path, server):
    for name, value in server.items():
        setattr(store, name, value)
    for size, digest in ((10240, sha256(b"another")), (10241, sha256(CONTENT)), (10239, sha256(CONTENT))):
        with pytest.raises(TicketSetError, match=f"^{url}: expected .*{size} bytes"):
            fetch(url, tmp_path / "cache", size, digest)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []


def test_a_full_disk_names_the_copy_and_leaves_nothing(store, url, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as raised:
        fetch(url, tmp_path / "cache", len(CONTENT), sha256(CONTENT))
    assert raised.value.filename == str(tmp_path / f"cache/{sha256(CONTENT)}.tar")
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []


def test_a_fifo_as_a_shards_json_does_not_stop_its_writer(tmp_path):
    os.mkfifo(tmp_path / "train-000000.json")
    with within(5), pytest.raises(TicketSetError, match=r"train-000000.json: expected a plain file, got a FIFO"):
        read_shard_json(open_store(tmp_path), "train", 0)


def test_a_copy_that_was_cut_and_what_a_killed_process_left_are_mended(store, url, tmp_path):
    path = fetch(url, tmp_path / "cache", len(CONTENT), sha256(CONTENT)).path
    path.write_bytes(CONTENT[:100])
    left = path.with_name(f"{path.name}.1-abc.tmp")
    left.write_bytes(b"half")
    assert fetch(url, tmp_path / "cache", len(CONTENT), sha256(CONTENT)).path.read_bytes() == CONTENT
    assert not left.exists()


def test_a_folder_that_others_can_write_is_no_place_for_copies(store, url, tmp_path, monkeypatch):
    os.mkdir(tmp_path / "shared")
    os.chmod(tmp_path / "shared", 0o770)
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("target")
    for name in ("shared", "link"):
        with pytest.raises(TicketSetError, match=f"{name}: expected a folder of yours .*`cache`"):
            fetch(url, tmp_path / name, len(CONTENT), sha256(CONTENT))
    own_folder(tmp_path / "target")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(TicketSetError, match="target: expected a folder of yours .*`cache`"):
        own_folder(tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == list((tmp_path / "shared").iterdir()) == []


@pytest.fixture
def remote_set(store: type[Store], center_set: Path) -> str:
    shutil.copytree(center_set, store.root / "set")
    return "faulty://set"


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_rows_are_the_same_from_every_server(store, remote_set, center_set, tmp_path, server):
    for name, value in server.items():
        setattr(store, name, value)
    rows = Rows(TicketSet.open(remote_set), "train", TarCopies(str(tmp_path / "cache")))
    local = list(TicketSet.open(str(center_set)).stream("train"))
    read = [rows.read(*rows.locate(position)) for position in range(21)]
    assert [(s.key, s.image, s.rankings.tolist()) for s in read] == [
        (s.key, s.image, s.rankings.tolist()) for s in local
    ]
    streamed = TicketSet.open(remote_set).stream("train")
    assert [(s.key, s.image) for s in streamed] == [(s.key, s.image) for s in local]


def test_a_tar_that_is_not_what_its_json_says_is_never_read(store, remote_set, tmp_path):
    """Also where only pixels differ, so that nothing but the hash can tell."""
    path = store.root / "set/train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    rows = Rows(TicketSet.open(remote_set), "train", TarCopies(str(tmp_path / "cache")))
    with pytest.raises(TicketSetError, match="train-000000.tar: expected .* bytes of sha256 .*as its JSON says"):
        rows.read(0, 0)
    assert rows.read(1, 0).key  # negative control
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1


@pytest.mark.parametrize(
    "tar",
    [
        {"bytes": 10240, "sha256": "../../../victim/x"},
        {"bytes": 10240, "sha256": "A" * 64},
        {"bytes": 10240, "sha256": "a" * 64 + "\n"},
        {"bytes": -1, "sha256": "a" * 64},
        {"bytes": "10240", "sha256": "a" * 64},
        {"bytes": 10240.0, "sha256": "a" * 64},
        {"bytes": True, "sha256": "a" * 64},
        {"sha256": "a" * 64},
        [],
        None,
    ],
)
def test_a_forged_json_of_a_shard_is_one_line(store, remote_set, tmp_path, tar):
    path = store.root / "set/train-000000.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "tar": tar}), encoding="utf-8")
    rows = Rows(TicketSet.open(remote_set), "train", TarCopies(str(tmp_path / "cache")))
    with pytest.raises(TicketSetError, match="train-000000.json: tar: "):
        rows.read(0, 0)
    for content in (b"[" * 100_000, b"\xff", b"[]", b"{"):
        path.write_bytes(content)
        with pytest.raises(TicketSetError, match="train-000000.json: (not readable as JSON|expected names and values)"):
            rows.read(0, 0)
    path.unlink()
    with pytest.raises(TicketSetError, match="train-000000.json: missing"):
        rows.read(0, 0)


@pytest.mark.parametrize("set_id", ["../../victim", "x/../../../victim", "/absolute/victim", "..", "", "\0"])
def test_no_set_id_leads_out_of_the_cache(store, remote_set, tmp_path, set_id):
    """What a manifest calls itself is no path."""
    path = store.root / "set/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"set_id": set_id}), encoding="utf-8")
    with pytest.raises(TicketSetError, match="manifest.json: set_id: expected 64 hex digits"):
        Rows(TicketSet.open(remote_set), "train", TarCopies(str(tmp_path / "deep" / "cache")))
    assert not (tmp_path / "deep").exists()


def _fetch_all(urls: list[tuple[str, int, str]], cache: Path, log: Path) -> None:
    blocks = storage.blocks

    def noted(url: str, limit: int) -> Iterator[bytes]:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{url}\n")
        return blocks(url, limit)

    storage.blocks = noted  # in this process alone: it is a fork
    for url, size, digest in urls:
        assert sha256(fetch(url, cache, size, digest).path.read_bytes()) == digest


def test_processes_share_one_copy_of_each(store, remote_set, tmp_path):
    tars = sorted((store.root / "set").glob("*.tar"))
    urls = [(f"{remote_set}/{p.name}", p.stat().st_size, sha256(p.read_bytes())) for p in tars]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_fetch_all, args=(urls, tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert sorted((tmp_path / "log").read_text(encoding="utf-8").split()) == sorted(url for url, _, _ in urls)
