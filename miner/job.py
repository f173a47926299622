"""One shard is a function: `mine_shard(job, split, number)`. Nothing but the folder knows of other shards or processes.

threads: source.read -> store_image -> render_pixels          miner.reading, a bounded number of images ahead
main:    batches of views -> device -> producers -> host      batches never cross a shard
threads: encode                                               miner.writer, beside the device's work
threads: tar -> parquet -> JSON                               one commits beside the next
"""

import collections
import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from miner.batcher import Batcher
from miner.producers import Producer, build_models, build_producers, device_of
from miner.producers.producer import Image, answering
from miner.reading import Shard, read_ahead
from miner.settings import Geometry, Labeling, Machine, Output, Selection
from miner.sources import Source
from miner.writer import Writer
from shards.errors import TicketSetError
from shards.schema import Plan, ShardStats
from shards.signals import Signals
from shards.store import Store


@dataclass(frozen=True)
class Job:
    """What is to be mined, and all that it takes; it can be pickled and sent to another process.

    Attributes:
        plan: of the whole folder.
        source: listed, with the plan's splits.
        store: the folder of the ticket set.
        selection, labeling, geometry, output: the settings that the producers are built by; no selection: the source's
            rankings are kept.
        machine: its batch size is the plan's; a device and workers that are not named are chosen where the job arrives.
        shared: other processes may write the same shards.
    """

    plan: Plan
    source: Source
    store: Store
    selection: Selection | None
    labeling: Labeling
    geometry: Geometry
    machine: Machine
    output: Output
    shared: bool = False

    @property
    def workers(self) -> int:
        """Threads that read and decode, and as many that encode."""
        return self.machine.workers or min(os.cpu_count() or 1, 16)

    @property
    def made_on(self) -> dict[str, str]:
        """What may change the last bits of scores, and with them the bytes: not part of the plan, but worth knowing."""
        device = device_of(self.selection, self.labeling, self.machine)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"device": name, "torch": torch.__version__}

    def producers(self) -> tuple[Producer, ...]:
        """The job's producers; the last job's are kept in this process.

        Raises:
            TicketSetError: they are not those of the plan.
        """
        classes = tuple(self.source.classes)
        settings = self.selection, self.labeling, self.geometry, self.machine
        models = _built(*settings, classes, self.plan.plan_id)
        producers = build_producers(models, self.selection, self.output, self.geometry, self.source)
        for producer in producers:
            if producer.identity != getattr(self.plan.common, producer.name):
                raise TicketSetError(
                    f"`{producer.name}`: expected the model, weights and versions of the plan in {self.store}, got others"
                )
        return producers


@functools.lru_cache(maxsize=1)
def _built(
    selection: Selection | None,
    labeling: Labeling,
    geometry: Geometry,
    machine: Machine,
    classes: tuple[str, ...],
    planned: str,  # files under the same names may hold other weights since, and the plan then says so
) -> tuple[Producer, ...]:
    return build_models(selection, labeling, geometry, machine, classes)


class TooManyFailures(TicketSetError):
    """More images failed than may: the command stops, and no shard is to blame."""


@dataclass
class Progress:
    """What is counted while shards are mined.

    Attributes:
        max_failures: images that may fail.
        images, views, failures: that are done.
        reasons: of the first few failures, `source: reason`.
        waited: seconds that the main thread waited for each leg.
        shard: that is mined now; where an error came out of it, the one that failed.
        stops: signals that came while it was `stoppable`.
    """

    max_failures: float = math.inf
    images: int = 0
    views: int = 0
    failures: int = 0
    reasons: list[str] = field(default_factory=list)
    waited: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "select": 0.0, "write": 0.0})
    shard: Shard | None = None
    stops: Signals = field(default_factory=Signals)

    def changed(self) -> None:
        """Called now and then, by the main thread where it holds nothing; a progress bar overrides it.

        Raises:
            KeyboardInterrupt: see `stoppable`.
        """
        self.stops.check()

    def stoppable(self) -> contextlib.AbstractContextManager[None]:
        """SIGTERM and Ctrl-C inside are raised by `changed`, by `done` and at the end: never in the middle of what threads share."""
        return self.stops.untorn()

    @contextlib.contextmanager
    def waiting(self, leg: str) -> Iterator[None]:
        """Seconds the main thread spends in one leg."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited[leg] += time.perf_counter() - start

    def done(self, image: Image, viewed: bool) -> None:
        """Count an image; `viewed` says whether its views were looked at, not only the whole.

        Raises:
            TooManyFailures: see there.
            KeyboardInterrupt: see `stoppable`.
        """
        self.stops.check()
        self.images += 1
        if image.error is None:
            self.views += len(image.views) if viewed else 0
            return
        self.failures += 1
        if len(self.reasons) < 5:
            self.reasons.append(f"{image.row['source']}: {image.error}")
        self._check()

    def add(self, stats: ShardStats, views: int, reasons: Sequence[str] = ()) -> None:
        """Count a shard that another process has mined.

        Args:
            views: of one image, that were looked at.
            reasons: why images failed, of the first few.
        Raises:
            TooManyFailures: too many have failed.
        """
        self.images += stats.samples + stats.failed
        self.views += stats.samples * views
        self.failures += stats.failed
        self.reasons += reasons[: 5 - len(self.reasons)]
        for leg in self.waited:
            self.waited[leg] += (stats.timing or {}).get(f"{leg}_seconds", 0.0)
        self._check()

    def _check(self) -> None:
        if self.failures > self.max_failures:
            raise TooManyFailures(
                f"{self.failures} images failed, `max_failures` allows {max(0, math.floor(self.max_failures))} of this"
                f" run ({'; '.join(self.reasons)}); mend them, or raise `max_failures` and run the same command again"
            )


def mine_shard(job: Job, split: str, number: int) -> ShardStats:
    """Mine one shard: tar, parquet and JSON in the job's folder; gives what the JSON says.

    Raises:
        TicketSetError: see `mine_shards`.
    """
    (stats,) = mine_shards(job, [(split, number)])
    return stats


def mine_shards(
    job: Job,
    shards: Iterable[Shard],
    producers: Sequence[Producer] | None = None,
    progress: Progress | None = None,
    committed: Callable[[Shard], None] | None = None,
) -> list[ShardStats]:
    """`mine_shard` of several: the same bytes, without the gaps between calls.

    A call a shard would wait for the first images of each, and for its commit (three fsyncs). Here the threads read on
    into the next shard, which may be named as late as that, and write the one before.

    Args:
        shards: (split, number) of each, in order.
        producers: of the job, where they are built already.
        progress: counts, and says how many images may fail.
        committed: told of each shard when it is done, by another thread.
    Returns:
        What the shards' JSON says.
    Raises:
        TicketSetError: too many images failed, or a producer gave what is none; the shards before are safe.
        OSError: the disk is full, or the folder cannot be written.
    """
    producers = job.producers() if producers is None else producers
    progress = progress or Progress()
    to_read, to_mine = itertools.tee(shards)
    ahead = read_ahead(job.plan, job.source, producers, to_read, job.workers)
    writer = Writer(job.plan, job.store, producers, job.workers, job.shared, committed, progress.changed)
    try:
        for split, number in to_mine:
            progress.shard = split, number
            images = iter(functools.partial(next, ahead), None)  # up to the mark behind the shard's last
            _mine_one(job, (split, number), images, producers, writer, progress)
        with progress.waiting("write"):
            return writer.finish()
    except BaseException:
        progress.shard = writer.failed or progress.shard
        raise
    finally:
        ahead.close()
        writer.close()


def _mine_one(
    job: Job,
    shard: Shard,
    images: Iterator[Image],
    producers: Sequence[Producer],
    writer: Writer,
    progress: Progress,
) -> None:
    """Give one shard's images to the producers and then to the writer, which may still be at it when this returns."""
    viewed = any(not producer.whole for producer in producers)
    started, before = time.perf_counter(), dict(progress.waited)
    with progress.waiting("write"):
        writer.begin(*shard)
    for image in _answered(images, producers, progress):
        progress.done(image, viewed)
        with progress.waiting("write"):
            writer.add(image)
    waited = {f"{leg}_seconds": round(s - before[leg], 3) for leg, s in progress.waited.items()}
    seconds = round(time.perf_counter() - started, 3)
    with progress.waiting("write"):
        writer.commit({"seconds": seconds, **waited, **job.made_on})
    progress.changed()


def _answered(images: Iterator[Image], producers: Sequence[Producer], progress: Progress) -> Iterator[Image]:
    """The images of one shard in order, once every producer has answered.

    Batchers live as long as the shard: its last batches are short ones, so that the plan alone says what a batch holds,
    and with it the bytes, whatever was mined before in this process.
    """
    unfinished: collections.deque[Image] = collections.deque()  # not yet given out
    batchers = [Batcher(producer) for producer in answering(producers)]
    while True:
        with progress.waiting("read"):
            image = next(images, None)
        if image is not None:
            unfinished.append(image)
            if image.error is None:
                for batcher in batchers:
                    batcher.add(image)
        for batcher in batchers:
            with progress.waiting("select"):
                for _ in batcher.work(last=image is None):
                    progress.changed()
        # One that failed waits for those before it, too: the order of a shard is the plan's.
        while unfinished and all(unfinished[0] is not batcher.oldest for batcher in batchers):
            done = unfinished.popleft()
            done.inputs.clear()  # by far the most of what an image holds; the writer does without
            yield done
        if image is None:
            return
