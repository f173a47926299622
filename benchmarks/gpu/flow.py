"""Whether the host keeps up: mining from JPEGs against the bare selector, the loader, and a step with and without it."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import GRID, Bench, K, rates, row
from benchmarks.gpu.correct import selector
from benchmarks.rounds import Row
from shards.reader import TicketSet
from shards.store import open_store
from shards.writer import read_plan, read_shard_jsons
from trainer.data.dataset import TicketDataset, loader
from trainer.data.loader import AHEAD, Batch, pinned
from trainer.options import Augment, Tickets

SELECTOR_BATCH = 128  # datalth-mine's on a GPU
PLAIN = Augment(aa="", color_jitter=0.0, reprob=0.0, mixup=0.0, cutmix=0.0)
DEIT = Augment(mixing="patches")
COPIED = 2**28  # bytes


def mining(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """The selector on ready tensors; then the command from JPEGs to tars, once it has warmed up."""
    images = torch.randn(SELECTOR_BATCH, 3, GRID[0] * 16, GRID[1] * 16, device=bench.device)
    ready = {}
    for name, amp in (("float32", False), ("bfloat16", True)):
        ranker = selector(bench, bench.device, amp=amp)
        ready[name] = bench.timed(lambda ranker=ranker: ranker.rank_and_score(images))
        yield rates(f"selector alone, {name}", SELECTOR_BATCH, ready[name])
    timings, views = timing(bench.mined, bench.size.views)
    spent = {name: sum(entry[name] for entry in timings) for name in timings[0] if name.endswith("seconds")}
    notes.append("mining: the main thread waited " + ", ".join(f"{n} {s:.1f} s" for n, s in sorted(spent.items())))
    whole = views / spent["seconds"]
    yield row("whole, copies, float32", whole / 1000, unit="k views/s")
    share = whole * statistics.median(ready["float32"]) / SELECTOR_BATCH
    yield row("whole, share of the selector's rate", share)
    for threads in bench.size.workers[
        :: len(bench.size.workers) - 1
    ]:  # as fast with more of them, or not: what they share is Python's lock
        timings, views = timing(bench.host_alone(threads), bench.size.views)
        rate = views / sum(entry["seconds"] for entry in timings)
        yield row(f"whole, a selector that looks at nothing, {threads} threads", rate / 1000, unit="k views/s")
    timings, views = timing(bench.ranked, bench.size.views)
    rate = views / sum(entry["seconds"] for entry in timings)
    yield row("ranked views of these sets, rankings kept", rate / 1000, unit="k views/s")


def timing(folder: Path, views: int) -> tuple[list[dict[str, float]], int]:
    """Seconds of each shard but the first, which waits for the device to be set up; and the views in them."""
    store = open_store(folder)
    plan = read_plan(store)
    assert plan is not None
    done: list[Any] = read_shard_jsons(store, plan.shards())
    later = done[1:] or done
    return [stats.timing for stats in later], views * sum(stats.samples for stats in later)


def feed(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """Views a second out of the loader's processes; bytes a second to the device; a step that is fed against one that is not."""
    copies, ranked = (TicketSet.open(str(folder)) for folder in (bench.mined, bench.ranked))
    most = bench.size.workers[-1]
    name, _ = bench.size.models[0]
    model = bench.steps(name, bench.size.feed_batch)
    repeated = dataset(bench, ranked, PLAIN)[0, 0, 0]
    repeated = pinned(repeated) if bench.device.type == "cuda" else repeated
    alone = per_step(bench, model, itertools.repeat(repeated))
    for kind, opened in (("ranked views", ranked), ("copies", copies)):
        with closing(fed(bench, opened, PLAIN, most)) as batches:
            slower = per_step(bench, model, batches, most) / alone
        what = f"{name}, K = {K}, {most} workers: step fed from {kind} against one repeated batch"
        yield row(what, slower)
    yield row(f"{name}, K = {K}: one repeated batch", len(repeated["labels"]) / alone / 1000, unit="k views/s")
    if bench.device.type == "cuda":
        host = torch.empty(COPIED, dtype=torch.uint8).pin_memory()
        laps = bench.timed(lambda: host.to(bench.device, non_blocking=True))
        yield row("page-locked memory to the device", *(COPIED / 1e9 / lap for lap in laps), unit="GB/s")
    legs = {"ranked views": (ranked, PLAIN), "copies": (copies, PLAIN)}
    for workers in reversed(bench.size.workers):
        for kind, (opened, augment) in legs.items():
            yield row(f"{kind}, {workers} workers", fed_rate(bench, opened, augment, workers), unit="k views/s")
    for kind, opened in (("ranked views", ranked), ("copies", copies)):
        what = f"{kind}, DeiT's augmentation mixed by patches, {most} workers"
        yield row(what, fed_rate(bench, opened, DEIT, most), unit="k views/s")


def dataset(bench: Bench, opened: TicketSet, augment: Augment) -> TicketDataset:
    tickets = Tickets(tokens=K, repeats=2)
    return TicketDataset(opened, tickets=tickets, augment=augment, batch_size=bench.size.feed_batch, seed=0)


def fed(bench: Bench, opened: TicketSet, augment: Augment, workers: int) -> Any:
    """Endless batches of worker processes."""
    source = dataset(bench, opened, augment)
    places = (place for epoch in itertools.count() for place in source.places(epoch))
    return loader(source, places, workers, bench.device)


def per_step(bench: Bench, model: Any, batches: Iterable[Batch], workers: int = 0) -> float:
    """Seconds of a step, once what the workers had ready is used up."""
    source = iter(batches)

    def train(count: int) -> None:
        for batch in itertools.islice(source, count):
            model.train(batch)

    train(AHEAD * workers + bench.size.warm)
    return bench.seconds(lambda: train(bench.size.feed_steps)) / bench.size.feed_steps


def fed_rate(bench: Bench, opened: TicketSet, augment: Augment, workers: int) -> float:
    """Thousands of views a second."""
    with closing(fed(bench, opened, augment, workers)) as batches:
        for _ in range(AHEAD * workers):
            next(batches)
        start, views = time.perf_counter(), 0
        while time.perf_counter() - start < bench.size.feed_seconds:
            views += len(next(batches)["labels"])
        return views / 1000 / (time.perf_counter() - start)
