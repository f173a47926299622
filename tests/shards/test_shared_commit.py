"""Several writers commit one shard in different bytes, stopped and resumed at every operation of the store.

Whatever the order, and whoever dies where: a shard that is done consists of the files that its JSON names.
"""

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import long
from shards import format as fmt
from shards.schema import ShardStats, parse_shard
from shards.store import Conflict
from shards.writer import ShardWriter
from stores import MemoryStore

TAR, PARQUET, JSON = "train-000000.tar", "index/train-000000.parquet", "train-000000.json"
# (ranking, score) of what a writer makes: other scores may leave the ranking, and with it the tar, as it is.
KINDS = [("one", 0.1), ("one", 0.2), ("two", 0.1), ("two", 0.3), ("six", 0.6)]
PLAN = "a" * 64
Kind = tuple[str, float]


class _Dies(BaseException):
    """The end of a writer that is never resumed."""


class Turns:
    """Threads of which one at a time makes one operation.

    Args:
        store: whose operations they are.
        rng: decides whose turn it is; mostly who had the last, so that the others sleep long.
    """

    def __init__(self, store: MemoryStore, rng: random.Random) -> None:
        self.store, self._rng = store, rng
        self._turns: dict[int, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._over = False
        self.results: dict[int, ShardStats | BaseException] = {}
        self._threads: list[threading.Thread] = []
        store.step = self._step

    def start(self, number: int, work: Callable[[], ShardStats]) -> None:
        """Have a thread wait for its first turn."""

        def run() -> None:
            self._turns[number].acquire()
            try:
                self.results[number] = work()
            except BaseException as error:
                self.results[number] = error
            self._back.release()

        self._turns[number] = threading.Semaphore(0)
        thread = threading.Thread(target=run, daemon=True)
        thread.number = number  # type: ignore[attr-defined]
        self._threads.append(thread)
        thread.start()

    def _step(self, what: str, name: str) -> None:
        number = getattr(threading.current_thread(), "number", None)
        if number is None or self._over:
            if self._over and number is not None:
                raise _Dies
            return
        self._back.release()
        self._turns[number].acquire()
        if self._over:
            raise _Dies

    def run(self, numbers: list[int], lives: dict[int, float], check: Callable[[], None]) -> None:
        """Give turns to some until all have ended or used up their lives."""
        lives, last = dict(lives), None
        while able := [n for n in numbers if n not in self.results and lives[n] > 0]:
            if last not in able or self._rng.random() < 0.2:
                last = self._rng.choice(able)
            lives[last] -= 1
            self._turns[last].release()
            self._back.acquire()
            check()

    def end(self) -> None:
        """Let all die that still wait."""
        self._over = True
        for turn in self._turns.values():
            turn.release()
        for thread in self._threads:
            thread.join()


def make(store: MemoryStore, kind: Kind, number: int, shared: bool = True) -> ShardStats:
    with ShardWriter(store, "train", 0, 16, PLAN, shared=shared) as writer:
        writer.add({"key": "a", "source": "a", "mean_score": kind[1]}, {"cls": b"1", "ranking.npy": kind[0].encode()})
        return writer.commit({"writer": number})


def done(store: MemoryStore) -> ShardStats | None:
    data = store.objects.get(JSON)
    return None if data is None or fmt.is_mark(len(data)) else parse_shard(data, JSON)


def torn(store: MemoryStore) -> bool:
    """Whether the shard is done but not of the files that are there."""
    stats = done(store)
    if stats is None:
        return False
    found = [hashlib.sha256(store.objects[name]).hexdigest() for name in (TAR, PARQUET)]
    return found != [stats.tar.sha256, stats.parquet.sha256]


def search(folder: Path, seed: int, hashed: bool) -> str:
    """One order of events; gives what came of it: "torn", or in other words."""
    rng = random.Random(seed)
    store = MemoryStore(folder, hashed)
    for number in range(rng.choice([0, 0, 1, 2])):  # what is left of writers that knew of no others
        make(store, rng.choice(KINDS), -1 - number, shared=False)
        store.remove([JSON, *rng.choice([[], [TAR], [PARQUET]])])
    if rng.random() < 0.2:
        store.put(JSON, fmt.taken_mark("0" * 32))
    turns, found = Turns(store, rng), Counter[str]()
    count = rng.randint(2, 4)
    kinds = rng.sample(KINDS, 2)
    of = {number: rng.choice(kinds) for number in range(count)}
    lives = {number: rng.choice([2, 4, 6, 9, 13, 99]) for number in of}

    def check() -> None:
        found["torn"] += torn(store)

    try:
        for number, kind in of.items():
            turns.start(number, lambda kind=kind, number=number: make(store, kind, number))
        turns.run(list(of), lives, check)
        # Those who have not ended sleep; one more comes and is alone; then they wake up, and see to it that he is undone.
        turns.start(count, lambda: make(store, rng.choice(kinds), count))
        turns.run([count], {count: 1e9}, check)
        assert done(store) is not None, "one who was alone did not finish"
        turns.run(list(of), dict.fromkeys(of, 1e9), check)
    finally:
        turns.end()
    stats = done(store)
    for result in turns.results.values():
        if isinstance(result, ShardStats):
            found["said"] += 1
            found["lies"] += result != stats
        elif not isinstance(result, Conflict):
            raise result
    left = [path.name for path in folder.iterdir()]
    assert not left, left
    return "torn" if found["torn"] else "lies" if found["lies"] else "said" if found["said"] else "nothing"


@pytest.mark.parametrize("hashed", [False, True], ids=["tags of their own", "tags are hashes"])
@pytest.mark.parametrize(("first", "last"), [(0, 80), long(80, 240)])
def test_in_any_order_a_shard_that_is_done_is_one_writers(tmp_path: Path, hashed: bool, first: int, last: int) -> None:
    assert Counter(search(tmp_path, seed, hashed) for seed in range(first, last)) == {"said": last - first}


def test_the_search_finds_what_is_torn_where_files_are_replaced_without_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(self: ShardWriter, data: dict[str, Any], stats: ShardStats) -> ShardStats:
        for name, content in data.items():
            self.store.put(name, content)
        self.store.put(JSON, fmt.canonical_json(stats.to_json()))
        return stats

    monkeypatch.setattr(ShardWriter, "_take_over", replace)
    assert Counter(search(tmp_path, seed, False) for seed in range(40))["torn"] > 3


def test_the_search_finds_what_is_torn_where_bytes_come_back_under_the_same_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two takers, of which the second leaves the very bytes that the first is about to replace."""
    monkeypatch.setattr(ShardWriter, "_unlike_any", lambda self, token, timing: self._files(timing))
    assert Counter(search(tmp_path, seed, True) for seed in range(120))["torn"] > 0
