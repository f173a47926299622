"""Partial copies of remote tars: only what is asked for is fetched, and nothing else is ever read from them."""

import contextlib
import errno
import gc
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from fsspec.registry import _registry
from test_storage import ClientError, Store

from conftest import mine
from shards import copies, storage
from shards.copies import BLOCK, PartialCopy, TarCopies, checksums, fetch_missing, make_room
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.rows import Rows
from trainer.data.dataset import TicketDataset, ValidationDataset
from trainer.options import Augment, Tickets

TOKENS = 28  # two rows of 14 x 14


@pytest.fixture(scope="module")
def ranked_set(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranked views of `photos`, 14 x 14 patches, shards of 10; read-only."""
    out = tmp_path_factory.mktemp("copies") / "set"
    mine("--data", photos, "--out", out, "--method", "center", "--views", 5, "--shard-size", 10, "--img-size", 224,
         "--images", "ranked")  # fmt: skip
    return out


class PartStore(Store):
    """Notes what is asked for of tars and the like, a list a request of several parts."""

    asked: list[list[tuple[str, int, int]]]

    def cat_ranges(self, paths: list[str], starts: Any, ends: Any, **kwargs: Any) -> list[Any]:
        if not paths[0].endswith((".json", ".parquet")):
            self.asked.append(list(zip(paths, starts, ends, strict=True)))
        return super().cat_ranges(paths, starts, ends, **kwargs)


@pytest.fixture
def store(ranked_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[PartStore]:
    """A store of its own for every test, with the set in it."""

    class Mine(PartStore):
        root = tmp_path / "store"

    Mine.reads, Mine.asked = [], []
    shutil.copytree(ranked_set, Mine.root / "set")
    monkeypatch.setitem(_registry, "faulty", Mine)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "cache").mkdir()
    return Mine


URL = "faulty://set"


def sizes(store: type[PartStore]) -> list[int]:
    return [end - start for request in store.asked for _, start, end in request]


def parts(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.part"))


def views(rows: Rows, tokens: int | None = TOKENS) -> list[bytes]:
    """The first patches of view 1 of all samples, by one call."""
    places = [rows.locate(position) for position in range(len(rows))]
    samples = rows.read_all(places, [[1]] * len(rows), tokens)
    return [sample.ranked.jpeg(1, tokens) for sample in samples if sample.ranked]


def dataset(url: object) -> TicketDataset:
    augment = Augment(mixup=0, cutmix=0, aa="")
    found = TicketDataset(TicketSet.open(str(url)), tickets=Tickets(tokens=TOKENS), augment=augment, batch_size=6)
    assert found.reads_prefixes(0)
    return found


def needed(local: TicketDataset) -> set[tuple[str, int, int]]:
    """What an epoch reads, (url, first byte, bytes): heads, and prefixes of views."""
    found = set()

    class Noted:
        def __init__(self, url: str) -> None:
            self.url, self.file = url, storage.open_ranges(url)

        def read(self, offset: int, size: int) -> bytes:
            found.add((self.url, offset, size))
            return self.file.read(offset, size)

    local.rows._reader._open_tar = lambda url, _: Noted(url)
    for place in local.places(0):
        local[place]
    return found


def test_an_epoch_fetches_little_more_than_heads_and_prefixes(store, ranked_set, tmp_path):
    local, remote = dataset(ranked_set), dataset(URL)
    for place in local.places(0):
        expected, found = local[place], remote[place]
        assert expected.keys() == found.keys()
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert len(store.asked) <= 2 * local.steps  # all heads of a batch at once, then all prefixes
    parts_needed = needed(dataset(ranked_set))
    least, whole = sum(size for *_, size in parts_needed), sum(p.stat().st_size for p in ranked_set.glob("train-*.tar"))
    assert least <= sum(sizes(store)) < least + 2 * BLOCK * len(parts_needed)
    assert least < whole / 6
    store.asked.clear()
    remote[0, 0, 0], dataset(URL)[0, 1, 0]  # by another process, too
    assert store.asked == []
    held = [path.stat() for path in parts(tmp_path / "cache")]
    assert held and all(found.st_blocks * 512 < found.st_size for found in held)  # the rest are holes


def test_of_photos_everything_is_fetched(store, center_set, tmp_path):
    """The control: a photo is of use only as a whole, and its tar's hash tells whether it is the right one."""
    shutil.copytree(center_set, store.root / "photos")
    rows = Rows(TicketSet.open("faulty://photos"), "train")
    expected = Rows(TicketSet.open(str(center_set)), "train")
    found = [sample.image for sample in rows.read_all([(0, 3), (1, 2)], [[0], [0]])]
    assert found == [expected.read(0, 3).image, expected.read(1, 2).image]
    assert sorted(sizes(store)) == sorted((center_set / f"train-00000{i}.tar").stat().st_size for i in range(2))
    held = sorted(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar"))
    assert held == sorted((center_set / f"train-00000{i}.tar").stat().st_size for i in range(2))


def test_whole_views_are_the_local_ones(store, ranked_set):
    expected, found = (ValidationDataset(TicketSet.open(str(url)), batch_size=6) for url in (ranked_set, URL))
    assert np.array_equal(expected[0]["patches"], found[0]["patches"]) and len(store.asked) == 2
    rows = Rows(TicketSet.open(URL), "train")
    local = Rows(TicketSet.open(str(ranked_set)), "train")
    assert rows.read(2, 0).ranked.data() == local.read(2, 0).ranked.data()  # also what nobody announced


@pytest.mark.parametrize("tokens", [TOKENS, None])
def test_one_after_another_or_all_at_once_is_the_same(store, ranked_set, tokens):
    expected = views(Rows(TicketSet.open(str(ranked_set)), "train"), tokens)
    rows = Rows(TicketSet.open(URL), "train")
    single = [rows.read(*rows.locate(i)).ranked.jpeg(1, tokens) for i in range(len(rows))]
    requests = len(store.asked)
    assert single == views(rows, tokens) == expected
    assert len(store.asked) == requests == 2 * len(rows)


def test_a_store_of_whole_files_alone_is_copied_as_before(store, ranked_set, tmp_path):
    store.ranged = False
    rows = Rows(TicketSet.open(URL), "train")
    assert views(rows) == views(Rows(TicketSet.open(str(ranked_set)), "train"))
    assert len(store.asked) == 3 and parts(tmp_path / "cache") == []
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3


def _read_all(cache: Path) -> None:
    assert len(views(Rows(TicketSet.open(URL), "train"))) == 21


def in_processes(target: Any, *arguments: Any, count: int = 1) -> list[int | None]:
    processes = [multiprocessing.get_context("fork").Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_processes_share_a_copy(store, ranked_set, tmp_path):
    expected = views(Rows(TicketSet.open(str(ranked_set)), "train"))
    assert in_processes(_read_all, tmp_path, count=3) == [0, 0, 0]  # at once
    assert views(Rows(TicketSet.open(URL), "train")) == expected and store.asked == []
    assert len(parts(tmp_path / "cache")) == 3


@pytest.mark.parametrize("dies_in", ["checksums", "_write"])
def test_a_kill_loses_work_alone(store, ranked_set, tmp_path, monkeypatch, dies_in):
    """Before anything of a part is written, and between its bytes and their checksums."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(copies if dies_in == "checksums" else PartialCopy, dies_in, die)
        assert in_processes(_read_all, tmp_path) == [-signal.SIGKILL]
    assert parts(tmp_path / "cache")
    rows = Rows(TicketSet.open(URL), "train")
    assert views(rows) == views(Rows(TicketSet.open(str(ranked_set)), "train")) and store.asked


CONTENT = np.random.default_rng(0).bytes(10 * BLOCK + 100)


@pytest.fixture
def partial(store: type[PartStore], tmp_path: Path) -> PartialCopy:
    """A copy of a file that is no tar, of which all is there."""
    (store.root / "set/file").write_bytes(CONTENT)
    copy = PartialCopy(f"{URL}/file", tmp_path / "file.part", len(CONTENT), lambda: None)
    assert copy.read(0, len(CONTENT)) == CONTENT
    assert store.asked.pop() == [("set/file", 0, len(CONTENT))]
    return copy


def test_reading_is_as_of_any_file(store, partial):
    for offset, size in ((0, 1), (1023, 2), (2048, 1024), (10 * BLOCK, 10**15), (len(CONTENT), 5), (7, 0)):
        assert partial.read(offset, size) == CONTENT[offset : offset + size]
    assert partial.read(-1, 5) == b"" and store.asked == []


def test_neighboring_parts_are_fetched_as_one_and_none_twice(store, partial, tmp_path):
    copies = [PartialCopy(partial.url, tmp_path / f"{i}.part", partial.size, lambda: None) for i in range(2)]
    one, two = copies
    fetch_missing([(one, 0, 1024), (one, 1100, 10), (one, 1000, 30), (two, 5000, 10), (one, 9000, 2000), (one, 3, 2)])
    end = len(CONTENT)
    assert store.asked == [[("set/file", 0, 2048), ("set/file", 8192, end), ("set/file", 4096, 5120)]]
    assert one.read(900, 1000) == CONTENT[900:1900] and two.read(5000, 10) == CONTENT[5000:5010]
    assert len(store.asked) == 1
    assert one.read(1500, 7000) == CONTENT[1500:8500]  # the gap alone
    assert store.asked[1:] == [[("set/file", 2048, 8192)]]


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        (4096 + 5 * BLOCK + 7, b"\0"),  # a bit of block 5
        (4096 + 5 * BLOCK, bytes(BLOCK)),  # a page that never reached the disk
        (4 * 5, bytes(4)),  # its checksum is not there
        (4 * 5, b"\1\2\3\4"),  # its checksum is another
    ],
)
def test_what_does_not_agree_is_fetched_again(store, partial, tmp_path, at, wrong):
    data = bytearray((tmp_path / "file.part").read_bytes())
    assert data[at : at + len(wrong)] != wrong
    data[at : at + len(wrong)] = wrong
    (tmp_path / "file.part").write_bytes(data)
    assert partial.read(0, 3000) == CONTENT[:3000] and store.asked == []
    for _ in range(2):
        assert partial.read(4000, 5000) == CONTENT[4000:9000]
        assert store.asked == [[("set/file", 5 * BLOCK, 6 * BLOCK)]]


@pytest.mark.parametrize("length", [0, 10, 4096 + 3000])
def test_a_file_that_was_cut_is_filled_again(store, partial, tmp_path, length):
    os.truncate(tmp_path / "file.part", length)
    again = PartialCopy(partial.url, tmp_path / "file.part", partial.size, lambda: None)
    for one, other in ((again, partial), (partial, again)):
        assert one.read(0, len(CONTENT)) == CONTENT and store.asked
        store.asked.clear()
        assert other.read(0, len(CONTENT)) == CONTENT and store.asked == []
        os.truncate(tmp_path / "file.part", length)  # while it is open


def test_a_disk_that_keeps_nothing_is_an_error_in_words(store, partial, tmp_path, monkeypatch):
    again = PartialCopy(partial.url, tmp_path / "other.part", partial.size, lambda: None)
    monkeypatch.setattr(os, "pwrite", lambda _, data, offset: len(data))
    with pytest.raises(TicketSetError, match=r"other.part: expected what was written to it a moment ago"):
        again.read(0, 10)


def test_a_full_disk_names_the_copy(store, partial, tmp_path, monkeypatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    again = PartialCopy(partial.url, tmp_path / "other.part", partial.size, lambda: None)
    with monkeypatch.context() as patched, pytest.raises(OSError) as raised:
        patched.setattr(os, "pwrite", full)
        again.read(0, 10)
    assert raised.value.filename == str(tmp_path / "other.part")
    assert again.read(0, 10) == CONTENT[:10]


def test_no_checksum_is_the_sign_of_a_block_that_is_not_there(monkeypatch):
    monkeypatch.setattr("zlib.crc32", lambda data: 1000 * (len(data) < BLOCK))
    assert checksums(bytes(BLOCK + 1)).tolist() == [1, 1000]


@contextlib.contextmanager
def failing(store: type[PartStore], **how: Any) -> Iterator[None]:
    for name, value in how.items():
        setattr(store, name, value)
    yield
    for name in how:
        delattr(store, name)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"error": ClientError("503 Slow down"), "fails_in": "read"}, r"train-00000\d.tar: 503 Slow down"),
        ({"answer": staticmethod(lambda data: data[:-1])}, r"train-00000\d.tar: expected \d+ bytes at \d+, got \d+"),
    ],
    ids=["error", "cut"],
)
def test_a_store_that_fails_is_one_line_and_leaves_nothing(store, ranked_set, how, said):
    rows = Rows(TicketSet.open(URL), "train")
    for shard in range(3):
        rows.read(shard, 0)
    with failing(store, **how), pytest.raises(TicketSetError, match=said):
        views(rows)
    assert views(rows) == views(Rows(TicketSet.open(str(ranked_set)), "train"))


def test_a_tar_that_is_gone_or_of_another_size_is_one_line(store):
    rows = Rows(TicketSet.open(URL), "train")
    rows.read(1, 0)
    (store.root / "set/train-000001.tar").unlink()
    with pytest.raises(TicketSetError, match=r"train-000001.tar: missing; it was there when it was opened"):
        rows.read(1, 5)
    with open(store.root / "set/train-000000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(TicketSetError, match=r"train-000000.tar: expected \d+ bytes, as its JSON says, got \d+"):
        rows.read(0, 0)


def test_a_set_that_is_mined_anew_never_mixes_with_what_was_there(store, ranked_set, photos, tmp_path):
    """Also if its tars have the same size: what is fetched after the change is not kept."""
    rows = Rows(TicketSet.open(URL), "train")
    first = [rows.read(shard, 0).ranked.jpeg(1, TOKENS) for shard in range(3)]
    new = tmp_path / "new"
    mine("--data", photos, "--out", new, "--method", "random", "--views", 5, "--shard-size", 10, "--img-size", 224,
         "--images", "ranked")  # fmt: skip
    shutil.rmtree(store.root / "set")
    shutil.copytree(new, store.root / "set")
    before = [path.read_bytes() for path in parts(tmp_path / "cache")]
    with pytest.raises(TicketSetError, match=r"mined anew while it was read"):
        views(rows)
    assert [path.read_bytes() for path in parts(tmp_path / "cache")] == before
    assert [rows.read(shard, 0).ranked.jpeg(1, TOKENS) for shard in range(3)] == first  # what is there may be used
    assert views(Rows(TicketSet.open(URL), "train")) == views(Rows(TicketSet.open(str(new)), "train"))


def held(folder: Path) -> list[str]:
    return sorted(path.stem[-1] for path in folder.rglob("*") if path.suffix in (".tar", ".part"))


OF_A_SET = f"datalth-{'0' * 16}"


def copy_of(folder: Path, name: str) -> Path:
    return folder / OF_A_SET / f"{'0' * 63}{name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copies that nobody has open, of 100 kB each but for the last, which is a hole; a was opened first."""
    (tmp_path / "copies" / OF_A_SET).mkdir(parents=True)
    for number, name in enumerate(("a.tar", "b.part", "c.tar", "d.part")):
        path = copy_of(tmp_path / "copies", name)
        path.write_bytes(bytes(range(256)) * 400 if name != "d.part" else b"")
        if name == "d.part":
            os.truncate(path, 1 << 40)
        os.utime(path, (number, number))
    return tmp_path / "copies"


def test_copies_go_by_when_they_were_opened_and_count_by_what_they_take(folder):
    make_room(folder, 320_000)
    assert held(folder) == ["a", "b", "c", "d"]  # a hole of a terabyte takes nothing
    make_room(folder, 320_000, 1)
    assert held(folder) == ["a", "b", "c", "d"]
    make_room(folder, 320_000, 50_000)
    assert held(folder) == ["b", "c", "d"]
    os.utime(copy_of(folder, "b.part"))
    make_room(folder, 150_000)
    assert held(folder) == ["b", "d"]


def test_nothing_of_a_users_own_is_removed(folder):
    """A set of his may lie beside the copies, under a name much like theirs."""
    own = [folder / "datalth-set/train-000000.tar", folder / "datalth-set" / f"{'0' * 63}a.tar",
           folder / OF_A_SET / "train-000000.tar"]  # fmt: skip
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    make_room(folder, 0)
    assert all(path.exists() for path in own) and not list(folder.glob(f"{OF_A_SET}/0*.part"))


def test_without_a_limit_half_of_the_disk_is_left(folder, monkeypatch):
    taken = sum(path.stat().st_blocks * 512 for path in folder.rglob("*.*"))
    for free, left in ((taken, ["a", "b", "c", "d"]), (taken // 2, ["b", "c", "d"]), (0, ["c", "d"])):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        make_room(folder, None)
        assert held(folder) == left
        monkeypatch.undo()


def _hold_open(path: Path, ready: Any, done: Any) -> None:
    copy = copies.WholeCopy(path)
    ready.set()
    done.wait(30)
    os._exit(copy.size == 0)


def test_what_is_open_or_on_its_way_stays(folder):
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    process = fork.Process(target=_hold_open, args=(copy_of(folder, "a.tar"), ready, done))
    process.start()
    assert ready.wait(30)
    with FileLock(copy_of(folder, "c.tar.lock")):  # fetched, and not open yet
        make_room(folder, 0)
        assert held(folder) == ["a", "c"]
    done.set()
    process.join(30)
    assert process.exitcode == 0
    make_room(folder, 0)
    assert held(folder) == []


def test_a_partial_copy_that_is_open_stays(store, ranked_set, tmp_path):
    cache = tmp_path / "elsewhere"
    rows = Rows(TicketSet.open(URL), "train", TarCopies(str(cache), 0))
    assert views(rows) == views(Rows(TicketSet.open(str(ranked_set)), "train")) and len(held(cache)) == 3
    store.asked.clear()
    assert views(Rows(TicketSet.open(URL), "train", TarCopies(str(cache), 0))) and store.asked == []
    del rows
    gc.collect()
    make_room(cache, 0)
    assert held(cache) == []
