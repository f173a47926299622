"""A folder that several may write: of several who put what is not there yet one wins, here and in an object store."""

import errno
import multiprocessing
import os
import threading
import time
from pathlib import Path

import fsspec
import pytest

from servers import FaultServer
from shards import remote
from shards.errors import TicketSetError
from shards.store import ANY, Conflict, Entry, LocalStore, Store, open_store
from stores import MemoryStore

WORKERS, KEYS, SWAPS = 8, 20, 1
Barrier = threading.Barrier


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty one."""
    place = tmp_path / "set" if request.param == "local" else f"{request.getfixturevalue('s3')}/set"
    return open_store(place)


def spooled(store: Store, name: str, data: bytes, expected: str | None = ANY) -> None:
    with store.spool(name) as file:
        file.write(data)
        file.flush()
        store.put(name, Path(file.name), expected)


def race(store: Store, number: int, ready: Barrier, wins: "multiprocessing.Queue[tuple[int, list[int]]]") -> None:
    """Put twenty objects that are not there yet, and replace one as often as one may."""
    won = []
    for key in range(KEYS):
        ready.wait(60)
        try:
            store.put(f"claims/{key}", b"worker %d" % number, expected=None)
            won.append(key)
        except Conflict:
            pass
    for swaps in range(SWAPS):
        while True:
            tag = store.tag("count")
            try:
                store.put("count", b"%d %d %d" % (int(store.read("count").split()[0]) + 1, number, swaps), expected=tag)
                break
            except Conflict:
                pass
    wins.put((number, won))


@pytest.mark.slow
def test_of_eight_processes_one_puts_each_of_twenty_objects_and_no_swap_is_lost(store: Store) -> None:
    store.put("count", b"0")
    context = multiprocessing.get_context("fork")
    ready, wins = context.Barrier(WORKERS), context.Queue()
    workers = [context.Process(target=race, args=(store, number, ready, wins)) for number in range(WORKERS)]
    for process in workers:
        process.start()
    found = dict(wins.get(timeout=120) for _ in workers)
    for process in workers:
        process.join(60)
    assert sorted(key for won in found.values() for key in won) == list(range(KEYS))
    for number, won in found.items():
        assert all(store.read(f"claims/{key}") == b"worker %d" % number for key in won)
    assert store.read("count").split()[0] == b"%d" % (SWAPS * WORKERS)


@pytest.mark.parametrize("how", [Store.put, spooled], ids=["bytes", "file"])
def test_conditions(store: Store, how) -> None:
    assert store.tag("a") is None and store.entries() == {}
    with pytest.raises(FileNotFoundError):
        store.read("a")
    with pytest.raises(Conflict, match="a: another process has written it meanwhile"):
        how(store, "a", b"one", "a tag of what was there once" if store.url.startswith("/") else '"0123"')
    how(store, "a", b"one", None)
    first = store.tag("a")
    with pytest.raises(Conflict):
        how(store, "a", b"two", None)
    assert store.read("a") == b"one" and store.tag("a") == first
    how(store, "a", b"two", first)
    second = store.tag("a")
    assert store.read("a") == b"two" and second != first
    with pytest.raises(Conflict):
        how(store, "a", b"six", first)
    how(store, "a", b"any")
    assert store.read("a") == b"any"
    assert store.entries() == {"a": Entry(3, store.entries()["a"].modified)}


@pytest.mark.parametrize("how", [Store.put, spooled], ids=["bytes", "file"])
def test_the_same_bytes_again_are_no_conflict_others_are(store: Store, how) -> None:
    """An answer that was lost: who puts again finds what he has put himself."""
    how(store, "index/a", b"one", None)
    how(store, "index/a", b"one", None)
    with pytest.raises(Conflict):
        how(store, "index/a", b"onf", None)
    first = store.tag("index/a")
    how(store, "index/a", b"two", first)
    how(store, "index/a", b"two", first)
    with pytest.raises(Conflict):
        how(store, "index/a", b"twp", first)


@pytest.mark.parametrize("expected", [None, "tag"])
def test_an_answer_that_is_lost_on_its_way_is_no_conflict(
    s3: str, faults: FaultServer, monkeypatch: pytest.MonkeyPatch, expected: str | None
) -> None:
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    store = open_store(f"{s3}/set")
    if expected:
        store.put("claims/a", b"before")
        expected = store.tag("claims/a")
    faults.clear()
    faults.plan("lost", "PUT", "claims/a", times=1)
    store.put("claims/a", b"one", expected)
    assert faults.count("PUT") == 2
    with pytest.raises(Conflict):
        store.put("claims/a", b"two", expected)
    assert store.read("claims/a") == b"one"


def test_folders_are_there_when_asked_for_and_gone_when_empty(store: Store) -> None:
    for name in ("a", "claims/b", "claims/c", "index/d"):
        store.put(name, name.encode())
    assert set(store.entries()) == {"a"} and set(store.entries("claims")) == {"b", "c"}
    store.remove(["claims/b", "claims/c", "claims/none"])
    assert set(store.entries("claims")) <= {"lock"}
    assert store.read_all(["a", "claims/b", "index/d"]) == [b"a", None, b"index/d"]
    assert not Path(store.url, "claims").exists()


def test_a_clock_is_the_stores_whatever_the_machine_says(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    for wrong in (-5e4, 5e4):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda wrong=wrong: before + wrong)
            assert abs(store.clock()() - before) < 60
    assert set(store.entries("claims")) <= {"lock"}


def test_a_clock_follows_a_store_whose_time_is_another(tmp_path: Path) -> None:
    class Ahead(LocalStore):
        def entries(self, folder: str = "") -> dict[str, Entry]:
            found = super().entries(folder).items()
            return {name: Entry(entry.size, entry.modified + 7200) for name, entry in found}

    now = Ahead(str(tmp_path)).clock()
    assert abs(now() - time.time() - 7200) < 60
    before = now()
    time.sleep(0.01)
    assert now() > before


class Careless(MemoryStore):
    """Ignores conditions, as some servers do: both of them, or the swap alone."""

    swap_alone = False

    def _put(self, name: str, data: bytes | Path, expected: str | None) -> bool:
        return super()._put(name, data, None if self.swap_alone and expected is None else ANY)


@pytest.mark.parametrize("swap_alone", [False, True])
def test_a_store_that_ignores_conditions_is_found_out(tmp_path: Path, swap_alone: bool) -> None:
    store = Careless(tmp_path)
    store.swap_alone = swap_alone
    with pytest.raises(TicketSetError, match="memory://set: its store ignores conditional writes"):
        Store.clock(store)
    assert not store.objects
    for hashed in (False, True):
        assert Store.clock(MemoryStore(tmp_path, hashed))() >= 1e9  # one that keeps them is not


def test_a_folder_without_hard_links_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    with pytest.raises(TicketSetError, match=r"/claims: its file system has no hard links \(Operation not permitted\)"):
        open_store(tmp_path / "set").clock()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_server_that_tells_no_more_than_a_size(tmp_path: Path) -> None:
    """As many of http do, from which tars are read."""
    fsspec.filesystem("memory").pipe_file("/bare/a.tar", b"one")
    assert open_store("memory://bare").tag("a.tar").endswith("-3")
    assert open_store("memory://bare").tag("b.tar") is None


def test_what_is_spooled_for_a_store_is_its_owners_alone() -> None:
    with open_store("memory://bare").spool("index/train-000000.parquet") as file:
        assert os.stat(file.name).st_mode & 0o777 == 0o600
    assert not os.path.exists(file.name)


def test_a_clock_is_set_though_somebody_removes_all_claims_meanwhile(tmp_path: Path) -> None:
    """He who has finalized the set."""
    store, turns = MemoryStore(tmp_path), iter([False, True, False, True])
    store.step = lambda what, name: store.objects.clear() or store.tags.clear() if next(turns, False) else None
    assert Store.clock(store)() >= 1e9
    assert not store.objects


def test_a_folder_that_is_removed_while_one_puts_into_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, mkdir, times = open_store(tmp_path), Path.mkdir, iter(range(99))

    def made_and_removed(self: Path, *args: object, **keywords: object) -> None:
        mkdir(self, *args, **keywords)
        if next(times) < 3:
            os.rmdir(self)

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    store.put("claims/a", b"one", expected=None)
    store.put("claims/a", b"two", expected=store.tag("claims/a"))
    assert store.read("claims/a") == b"two"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_is_removed_while_mkdir_looks_what_it_is_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir finds it, looks whether it is a folder, and finds nothing: it then says that a file is in the way."""
    store, is_dir, times = open_store(tmp_path), Path.is_dir, iter(range(99))
    (tmp_path / "claims").mkdir()

    def removed(self: Path) -> bool:
        if self.name == "claims" and next(times) == 0:
            os.rmdir(self)
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", removed)
    store.put("claims/a", b"one", expected=None)
    assert store.read("claims/a") == b"one" and next(times) > 0  # it was asked
    (tmp_path / "index").write_bytes(b"a file")
    with pytest.raises(OSError, match="index"):  # and a file that is in the way is no folder that comes back
        store.put("index/a", b"one", expected=None)
