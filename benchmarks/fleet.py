"""A fleet of miners on one store, simulated: what claims, stragglers and kills cost, against shards split by rank.

Time is virtual and the store is made of dictionaries that count requests; who takes which shard, how claims are renewed and
stolen and how long a worker waits is the product's own code. Nothing is mined: a shard takes as long as one H200 took
(benchmarks/results/gpu.json). Shards differ, one worker in ten is twice as slow, a tenth of all workers is killed in an hour,
and in the place of each comes another, five minutes later.
"""

import collections
import contextlib
import gc
import heapq
import itertools
import json
import math
import random
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.rounds import RESULTS, Part, Row
from benchmarks.setting import Setting
from miner import claims, elastic
from miner.settings import Fleet
from shards import format as fmt
from shards.store import Entry, Store

IMAGES, VIEWS = 1000, 16  # of a shard
SPREAD = 0.2  # sigma of the lognormal numbers that shards' times are multiplied by
SLOW, SLOWNESS = 0.1, 2.0  # share of the workers, and how many times as long theirs take
KILLED = 0.1  # of the workers, an hour
REPLACED = 300.0  # seconds until another is there
REQUEST = 0.05  # seconds; assumed
KEYS = 1000  # that one LIST gives; S3's limit
JSON = 700  # bytes of a shard's
READ_AHEAD = 0.03  # share of a shard's images that are left when the next is asked for; see miner.reading
FLEETS = ((1, 1280), (64, 3200), (400, 4000), (1000, 4000))  # workers, shards
LARGE = 400  # workers: minutes a run
CASES = {  # name -> seconds that a claim holds, share of the workers that is killed in an hour, whether they are told before
    "none killed": (120.0, 0.0, False),
    "spot notice": (120.0, KILLED, True),
    "kill -9": (120.0, KILLED, False),
    "kill -9, --claim-seconds 600": (600.0, KILLED, False),
}


def measure(setting: Setting) -> Part:
    seconds = IMAGES * VIEWS / views_a_second()
    part = Part(notes=[f"{REQUEST} s a request, assumed; {seconds:.1f} s a shard, of gpu.json; virtual time"])
    # Large ones are run once, and first, so that the others run beside them.
    runs = [
        (workers, shards, case, seed)
        for workers, shards in reversed(FLEETS)
        for case in CASES
        if workers < LARGE or case == "none killed"
        for seed in range(setting.rounds if workers < LARGE else 1)
    ]
    with ProcessPoolExecutor() as pool:
        found = dict(zip(runs, pool.map(simulate, *zip(*runs, strict=True)), strict=True))
    for workers, shards in FLEETS:
        for case in CASES:
            seeds = [figures for run, figures in found.items() if run[:3] == (workers, shards, case)]
            if seeds:
                median = {what: statistics.median(figures[what] for figures in seeds) for what in seeds[0]}
                split, time = median.pop("split by rank"), [figures["time"] for figures in seeds]
                del median["time"]
                note = "; ".join(
                    [f"split by rank {split:.2f}x", *(f"{value:.1f} {what}" for what, value in median.items())]
                )
                part.rows.append(Row(f"{workers} workers, {shards} shards, {case}", "nothing lost", time, note=note))
    return part


def simulate(workers: int, shards: int, case: str, seed: int) -> dict[str, float]:
    """Times against nothing lost, requests a shard, and shares of all workers' time in percent."""
    run = Simulation(workers, shards, *CASES[case], seed)
    run.elastic()
    requests = {f"{kind} a shard": run.store.requests[kind] / shards for kind in ("PUT", "conflict", "GET", "LIST")}
    shares = {f"% {what}": 100 * abs(share) for what, share in run.shares().items()}
    return {"time": run.finished / run.ideal, "split by rank": run.split() / run.ideal, **requests, **shares}


class Killed(BaseException):
    """kill -9: nothing is put away."""


class Clock:
    """Virtual seconds. Each worker is a thread, and one runs at a time, so that real code may wait in the middle of anything."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, threading.Semaphore]] = []
        self._numbers = itertools.count()
        self._over = threading.Semaphore(0)
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None], at: float) -> None:
        turn = threading.Semaphore(0)

        def run() -> None:
            turn.acquire()
            try:
                work()
                self._next()
            except BaseException as error:
                self._error = error
                self._over.release()

        threading.Thread(target=run, daemon=True).start()
        self._push(at, turn)

    def run(self) -> None:
        """Until nobody has anything to do."""
        self._next()
        self._over.acquire()
        if self._error is not None:
            raise self._error

    def until(self, moment: float) -> None:
        """Wait; called in a worker."""
        turn = threading.Semaphore(0)
        self._push(moment, turn)
        self._next()
        turn.acquire()

    def _push(self, moment: float, turn: threading.Semaphore) -> None:
        heapq.heappush(self._due, (max(moment, self.now), next(self._numbers), turn))

    def _next(self) -> None:
        if self._due:
            self.now, _, turn = heapq.heappop(self._due)
            turn.release()
        else:
            self._over.release()


@dataclass
class Fate:
    """A worker's: how slow it is, when it ends and how; and the seconds it spends.

    Attributes:
        notice: it is told (SIGTERM), as on a spot machine; else it is killed.
    """

    slowness: float
    ends: float
    notice: bool
    dead: bool = False
    spent: Counter[str] = field(default_factory=Counter)


class CountingStore(Store):
    """The set's folder: names and when they were put. Every request takes its time, and may be a worker's last."""

    def __init__(self, fleet: "Simulation") -> None:
        super().__init__("memory://set")
        self._fleet = fleet
        self.folders: dict[str, dict[str, Entry]] = {"": {}, fmt.CLAIMS: {}}
        self.requests: Counter[str] = Counter()

    def request(self, kind: str, count: int = 1) -> None:
        self.requests[kind] += count
        self._fleet.pass_time(count * REQUEST, "claims")

    def commit(self, name: str) -> bool:
        """Put tar, parquet and JSON, which a thread does beside the work; whether they were not there yet."""
        self.requests["PUT"] += 3
        entry = Entry(JSON, self._fleet.clock.now)
        return self.folders[""].setdefault(f"{name}.json", entry) is entry

    def clock(self) -> Callable[[], float]:
        for kind in ("PUT", "PUT", "LIST", "DELETE"):
            self.request(kind)
        return lambda: self._fleet.clock.now

    def read(self, name: str, limit: int = 0) -> bytes:
        self.request("GET")
        folder, _, name = name.rpartition("/")
        if name not in self.folders[folder]:
            raise FileNotFoundError(name)
        return bytes(self.folders[folder][name].size)

    def tag(self, name: str) -> str | None:
        self.request("GET")
        folder, _, name = name.rpartition("/")
        return str(self.folders[folder][name].modified) if name in self.folders[folder] else None

    def entries(self, folder: str = "") -> dict[str, Entry]:
        keys = len(self.folders[folder]) * (1 if folder else 2)  # beside a shard's JSON lies its tar
        self.request("LIST", max(1, math.ceil(keys / KEYS)))
        return dict(self.folders[folder])

    def _put(self, name: str, data: Any, expected: str | None) -> bool:
        self.request("PUT")
        folder, _, name = name.rpartition("/")
        if expected is None and name in self.folders[folder]:
            self.requests["conflict"] += 1
            return False
        self.folders[folder][name] = Entry(len(data), self._fleet.clock.now)
        return True

    def _holds(self, name: str, data: Any) -> bool:
        self.request("GET")
        return False

    def remove(self, names: Iterable[str]) -> None:
        raise NotImplementedError("the simulated fleet removes nothing")

    def spool(self, name: str) -> Any:
        raise NotImplementedError("the simulated fleet writes no files")


class Simulation:
    """One fleet, one set, once.

    Args:
        workers, shards: how many.
        seconds: that a claim holds.
        kills: of the workers, an hour.
        notice: they are told before.
    """

    def __init__(self, workers: int, shards: int, seconds: float, kills: float, notice: bool, seed: int) -> None:
        self.workers, self.shards, self._kills, self._notice = workers, shards, kills / 3600, notice
        self._random = random.Random(seed)
        self.clock, self.store = Clock(), CountingStore(self)
        self._settings = Fleet(elastic=True, claim_seconds=seconds)
        mean = IMAGES * VIEWS / views_a_second()
        self.work = [mean * self._random.lognormvariate(-(SPREAD**2) / 2, SPREAD) for _ in range(shards)]
        self.slowness = [SLOWNESS if i % round(1 / SLOW) == 5 else 1.0 for i in range(workers)]
        self._local = threading.local()
        self.fates: list[Fate] = []
        self.finished = math.inf  # when the first worker sees that all is done

    @property
    def ideal(self) -> float:
        """Seconds, if nothing were lost."""
        return sum(self.work) / sum(1 / slowness for slowness in self.slowness)

    def pass_time(self, seconds: float, what: str) -> None:
        """A worker waits or works; it may end before."""
        fate, clock = self._local.fate, self.clock
        if fate.dead:
            raise Killed
        end = clock.now + seconds
        noticed = fate.notice and what == "claims"  # a request is not broken off by a notice
        stop = min(end, fate.ends) if not noticed else end
        fate.spent[what] += max(0.0, stop - clock.now)
        clock.until(stop)
        if stop < end:
            fate.dead = not fate.notice
            fate.ends = math.inf
            raise KeyboardInterrupt if fate.notice else Killed

    def elastic(self) -> None:
        """Run it with workers that pull shards."""
        names = (f"{self._random.getrandbits(64):x}" for _ in itertools.count())
        virtual = SimpleNamespace(sleep=lambda seconds: self.pass_time(seconds, "waiting"))
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(elastic, "time", virtual))
            patches.enter_context(mock.patch.object(claims.random, "uniform", self._random.uniform))
            patches.enter_context(mock.patch.object(elastic.secrets, "token_hex", lambda _: next(names)))
            patches.enter_context(
                mock.patch.object(elastic, "shard_sizes", lambda *_: collections.defaultdict(lambda: IMAGES))
            )
            patches.enter_context(mock.patch.object(elastic, "mine_shards", self._mine))
            patches.callback(gc.set_threshold, *gc.get_threshold())
            # A listing makes many small objects, and there are thousands of listings.
            gc.set_threshold(200_000, 50, 100)
            for slowness in self.slowness:
                self._start(slowness, 0.0)
            self.clock.run()
        assert len(self.store.folders[""]) == self.shards

    def shares(self) -> dict[str, float]:
        """Of all workers' time: what went to claims, and to kills (shards begun in vain, and nobody there); the rest but
        for useful work is waiting."""
        total, deaths = self.workers * self.finished, len(self.fates) - self.workers
        spent = sum((fate.spent for fate in self.fates), Counter[str]())
        killed = spent["mining"] - spent["useful"] + deaths * REPLACED
        rest = total - spent["useful"] - killed - spent["claims"]
        return {"claims": spent["claims"] / total, "killed": killed / total, "waiting": rest / total}

    def _start(self, slowness: float, at: float) -> None:
        ends = at + self._random.expovariate(self._kills) if self._kills else math.inf
        fate = Fate(slowness, ends, self._notice)
        self.fates.append(fate)

        def live() -> None:
            self._local.fate = fate
            plan = SimpleNamespace(shards=lambda: [("train", number) for number in range(self.shards)])
            job = SimpleNamespace(store=self.store, plan=plan, source=None, output=SimpleNamespace(max_failures=1.0))
            try:
                worker = elastic.Worker(job, plan, self._settings)
                worker.work((), shown=False)
                self.finished = min(self.finished, self.clock.now)
            except (Killed, KeyboardInterrupt):
                if len(self.store.folders[""]) < self.shards:
                    self._start(slowness, self.clock.now + REPLACED)

        self.clock.start(live, at)

    def _mine(
        self, job: Any, shards: Iterable[Any], producers: Any, progress: Any, committed: Callable[[Any], None]
    ) -> None:
        """In the place of miner.job.mine_shards: the same calls, at the same moments."""
        fate: Fate = self._local.fate
        todo: Iterator[Any] = iter(shards)
        following = next(todo, None)
        while following is not None:
            shard, seconds = following, self.work[following[1]] * fate.slowness
            self._work(seconds * (1 - READ_AHEAD), progress)
            following = next(todo, None)
            self._work(seconds * READ_AHEAD, progress)
            fate.spent["useful"] += seconds if self.store.commit(fmt.shard_name(*shard)) else 0.0
            committed(shard)

    def _work(self, seconds: float, progress: Any) -> None:
        while seconds > 0:
            self.pass_time(min(seconds, 5.0), "mining")
            seconds -= 5.0
            progress.changed()

    def split(self) -> float:
        """Seconds if each rank has every shard whose number is its own modulo the ranks; a rank that is killed begins
        its shard anew, once another is there."""
        ends = []
        for rank in range(self.workers):
            now, dies = 0.0, self._random.expovariate(self._kills) if self._kills else math.inf
            for seconds in self.work[rank :: self.workers]:
                while now + seconds * self.slowness[rank] > dies:
                    now = dies + REPLACED
                    dies = now + self._random.expovariate(self._kills)
                now += seconds * self.slowness[rank]
            ends.append(now)
        return max(ends)


def views_a_second() -> float:
    rows = json.loads(Path(RESULTS, "gpu.json").read_text(encoding="utf-8"))["rows"]
    return next(1000 * row["median"] for row in rows if row["what"] == "mining: whole, copies, float32")
