"""Reading a whole set of ranked views once: a pread a sample in the order of an epoch, or its tars from end to end.

A ticket's reads are those of training: what stands before the views, and of one view as much as holds K = 144 patches.
Cold means that the system has forgotten the files; their disk may still remember.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.rounds import Lap, Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting
from shards.reader import TicketSet
from shards.storage import open_ranges
from trainer.data.dataset import TicketDataset
from trainer.options import Tickets

BLOCK, TOKENS = 16 << 20, 144
Read = Callable[[], tuple[int, int]]  # samples, bytes


def measure(setting: Setting) -> Part:
    tars = sorted(setting.ranked.glob("*.tar"))
    reads = {"a ticket a sample": tickets(setting.ranked), "a pread a sample": samples(setting.ranked)}
    part, states = Part(), ["warm"]
    forget(tars)
    if not any(map(remembered, tars)):
        states.append("cold")
    else:
        part.skip("cold", "the system keeps the files in memory")
    end_to_end = whole(setting.ranked, tars)
    legs: dict[str, Leg] = {}
    volume: dict[str, int] = {}
    for state in states:
        for name, read in {"end to end": end_to_end, **reads}.items():
            legs[f"{name}, {state}"] = lambda read=read, name=name, state=state: timed(read, name, state)

    def timed(read: Read, name: str, state: str) -> Lap:
        if state == "cold":
            forget(tars)
        wall, cpu = time.perf_counter(), time.process_time()
        count, volume[name] = read()
        return Lap(count, time.perf_counter() - wall, time.process_time() - cpu)

    part.laps = turns(legs, setting.rounds)
    for state in states:
        for name in reads:
            figures = speedup(part.laps[f"{name}, {state}"], part.laps[f"end to end, {state}"])
            part.rows.append(Row(f"ranked set, {state}, {name}, samples/s", "tars from end to end", *figures))
        for name, size in volume.items():
            rates = [size / lap.wall / 1e9 for lap in part.laps[f"{name}, {state}"]]
            part.rows.append(Row(f"ranked set, {state}, {name}", "", rates, unit="GB/s"))
    return part


def forget(files: list[Path]) -> None:
    """Have the system drop the files from its memory."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet is kept
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remembered(path: Path) -> bool:
    """Whether the middle of a file can be read without waiting for a disk."""
    with open(path, "rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


def whole(folder: Path, tars: list[Path]) -> Read:
    """The tars in large blocks, one after the other."""
    count = len(TicketDataset(TicketSet.open(str(folder)), tickets=Tickets(repeats=1)).rows)

    def read() -> tuple[int, int]:
        total = 0
        for tar in tars:
            with open(tar, "rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    total += len(block)
        return count, total

    return read


def samples(folder: Path) -> Read:
    """Every sample whole, in an epoch's order."""
    opened = TicketSet.open(str(folder))
    order = TicketDataset(opened, tickets=Tickets(repeats=1)).samples(0)[:, :2].tolist()
    names = opened.shard_names("train")
    tables = [opened.joined(name) for name in names]
    extents = [list(zip(*(t[c].to_pylist() for c in ("offset", "bytes")), strict=True)) for t in tables]
    files = [open_ranges(f"{folder}/{name}.tar") for name in names]

    def read() -> tuple[int, int]:
        return len(order), sum(len(files[shard].read(*extents[shard][row])) for shard, row in order)

    return read


def tickets(folder: Path) -> Read:
    """Of every sample its rankings and the ticket of one view, in an epoch's order; nothing is decoded."""
    opened = TicketSet.open(str(folder))
    dataset, views = TicketDataset(opened, tickets=Tickets(repeats=1)), opened.manifest.splits["train"].views
    order = dataset.samples(0).tolist()

    def read() -> tuple[int, int]:
        total = 0
        for shard, row, visit in order:
            number = 1 + visit % (views - 1)
            sample = dataset.rows.read(shard, row, [number])
            assert sample.ranked is not None
            total += len(sample.ranked.jpeg(number, TOKENS))
        return len(order), total

    return read
