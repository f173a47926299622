"""The mining run: read and decode, select, write, all at once, shard by shard.

    threads: source.read -> store_image -> render_pixels      a bounded number of images ahead
    main:    batches of views -> device -> selector -> host   batches never cross a shard
    thread:  encode -> tar -> parquet -> JSON                 one shard behind another

Threads serve well here: Pillow and torch release the GIL while they decode and resize, and nothing has
to be pickled between processes. What waits is bounded, whatever the size of the data set.
"""

import collections
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miner.plan import Plan, shard_rows
from miner.selectors import Selector
from miner.sources import Source
from shards import format as fmt
from shards.errors import ImageError, TicketSetError
from shards.images import StoredImage, render_pixels, store_image
from shards.views import image_views, view_seed
from shards.writer import ShardWriter


@dataclass(slots=True)
class Image:
    """One input on its way: read, then ranked, then written. With an `error` it goes no further."""

    row: dict[str, Any]
    error: str | None = None
    stored: StoredImage = field(init=False)
    views: np.ndarray = field(init=False)  # int32 [V, 5]
    pixels: np.ndarray | None = None  # uint8 [V, S, S, 3]; None for model-free methods and once ranked
    rankings: np.ndarray = field(init=False)  # [V, N]
    mean_score: float | None = None
    entropy: float | None = None


class _Flight:
    """A batch being ranked; on CUDA its results come back in pinned memory while the next batch runs."""

    def __init__(self, batch: list[tuple[Image, int]], *results: torch.Tensor) -> None:
        self.batch, self._results, self._event = batch, results, None
        if results[0].device.type == "cuda":
            pinned = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
            self._results = tuple(p.copy_(r, non_blocking=True) for p, r in zip(pinned, results, strict=True))
            self._event = torch.cuda.Event()
            self._event.record()

    def results(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return [r.cpu().numpy() for r in self._results]


@dataclass
class Progress:
    """What a run counts; the screen reads it."""

    images: int = 0
    views: int = 0
    failures: int = 0
    reasons: list[str] = field(default_factory=list)  # the first few, `source: reason`
    waited: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "select": 0.0, "write": 0.0})

    @contextlib.contextmanager
    def waiting(self, leg: str) -> Iterator[None]:
        """Seconds the main thread spends in one leg."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited[leg] += time.perf_counter() - start


class Miner:
    """Mines shards of a plan into a folder.

    Args:
        plan: what to mine.
        source: listed, with the plan's splits.
        selector: ranks the views.
        folder: of the ticket set.
        workers: threads that read and decode.
        on_batch: called now and then, for the screen.
        log_batch: called with the (key, view) pairs of every batch, for tests.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        selector: Selector,
        folder: Path,
        workers: int,
        on_batch: Callable[[Progress], None] = lambda progress: None,
        log_batch: Callable[[list[tuple[str, int]]], None] = lambda batch: None,
    ) -> None:
        self.plan, self.source, self.selector, self.folder = plan, source, selector, folder
        self.workers, self.on_batch, self.log_batch = workers, on_batch, log_batch
        self.progress = Progress()
        common = plan.common["selector"]
        self._size = common["input_size"]
        self._seed = plan.common["seed"]
        # On the device, as [3, 1, 1]; uint8 crosses, floats are made there.
        self._mean, self._std = (
            torch.tensor([255.0 * v for v in common[name] or (0, 0, 0)], device=selector.device).view(3, 1, 1)
            for name in ("mean", "std")
        )

    def run(self, todo: list[tuple[str, int]], max_failures: float) -> None:
        """Mine shards in order.

        Args:
            todo: (split, number) of each.
            max_failures: images that may fail in this run before it stops.
        Raises:
            TicketSetError: too many images failed; the shards before are safe.
            OSError: the disk is full, or the folder cannot be written.
        """
        ahead = self._read_ahead(todo)
        writer = _Writer(self.plan, self.folder)
        try:
            for split, number in todo:
                started = time.perf_counter()
                before = dict(self.progress.waited)
                with self.progress.waiting("write"):
                    writer.begin(split, number)
                for image in self._ranked(ahead):
                    if image.error is not None:
                        self._failed(image, max_failures)
                    self.progress.images += 1
                    with self.progress.waiting("write"):
                        writer.add(image)
                waited = {f"{leg}_seconds": round(s - before[leg], 3) for leg, s in self.progress.waited.items()}
                seconds = round(time.perf_counter() - started, 3)
                with self.progress.waiting("write"):
                    writer.commit({"seconds": seconds, **waited})
                self.on_batch(self.progress)
            with self.progress.waiting("write"):
                writer.finish()
        finally:
            ahead.close()
            writer.abort()

    def _failed(self, image: Image, max_failures: float) -> None:
        self.progress.failures += 1
        if len(self.progress.reasons) < 5:
            self.progress.reasons.append(f"{image.row['source']}: {image.error}")
        if self.progress.failures > max_failures:
            raise TicketSetError(
                f"{self.progress.failures} images failed, --max-failures allows {max(0, math.floor(max_failures))} of this"
                f" run ({'; '.join(self.progress.reasons)}); mend them, or raise --max-failures and run the same command again"
            )

    def _ranked(self, ahead: Iterator[Image | None]) -> Iterator[Image]:
        """The images of one shard in order, ranked; `ahead` gives None at a shard's end.

        Views are gathered into batches of the plan's size. The last batch of a shard is a short one, so
        that the plan alone says which views a batch holds. One batch is fetched while the next computes.
        """
        waiting: collections.deque[Image] = collections.deque()  # images not yet given out
        pending: collections.deque[tuple[Image, int]] = collections.deque()  # views not yet in a batch
        flying: collections.deque[_Flight] = collections.deque()  # batches whose results are not yet here
        batch_size = self.plan.common["batch_size"]
        while True:
            with self.progress.waiting("read"):
                image = next(ahead)
            if image is not None:
                waiting.append(image)
                if image.error is None:
                    pending.extend((image, v) for v in range(len(image.views)))
            while len(pending) >= batch_size or (image is None and pending):
                batch = [pending.popleft() for _ in range(min(batch_size, len(pending)))]
                with self.progress.waiting("select"):
                    flying.append(self._launch(batch))
                    if len(flying) > 1:
                        self._land(flying.popleft())
                self.on_batch(self.progress)
            while image is None and flying:
                with self.progress.waiting("select"):
                    self._land(flying.popleft())
            busy = flying[0].batch[0][0] if flying else pending[0][0] if pending else None
            while waiting and waiting[0] is not busy:
                done = waiting.popleft()
                done.pixels = None
                yield done
            if image is None:
                return

    def _launch(self, batch: list[tuple[Image, int]]) -> "_Flight":
        """Put a batch of views on the device and start to rank it."""
        self.log_batch([(image.row["key"], view) for image, view in batch])
        seeds = [view_seed(self._seed, image.row["key"], view) for image, view in batch]
        pixels = None
        if self.selector.model is not None:
            host = torch.from_numpy(np.stack([image.pixels[view] for image, view in batch if image.pixels is not None]))
            if self.selector.device.type == "cuda":
                host = host.pin_memory()
            pixels = host.to(self.selector.device, non_blocking=True).permute(0, 3, 1, 2)
            pixels = (pixels.to(self._mean.dtype) - self._mean) / self._std
        rankings, scores = self.selector.rank_and_score(pixels, seeds)
        return _Flight(batch, rankings.to(torch.int32), scores.float())

    def _land(self, flight: "_Flight") -> None:
        """Wait for a batch and put its rankings into their images."""
        rankings, scores = flight.results()
        self._check(rankings, scores, len(flight.batch))
        for (image, view), ranking, score in zip(flight.batch, rankings, scores, strict=True):
            image.rankings[view] = ranking
            if view == 0:
                image.mean_score = float(score[ranking[: self.selector.k]].mean())
                image.entropy = _entropy_bits(score)
        self.progress.views += len(flight.batch)

    def _check(self, rankings: np.ndarray, scores: np.ndarray, count: int) -> None:
        """What a selector gives is not taken on trust: weights may hold NaN, a method may be a user's own."""
        n, method = self.plan.num_patches, self.selector.method
        if rankings.shape != (count, n) or not (np.sort(rankings, axis=1) == np.arange(n)).all():
            raise TicketSetError(
                f"--method {method}: expected a permutation of {n} patches for each of {count} views,"
                f" got rankings of shape {list(rankings.shape)} that are none"
            )
        if scores.shape != (count, n) or not np.isfinite(scores).all():
            raise TicketSetError(
                f"--method {method}: expected finite scores of shape [{count}, {n}], got {list(scores.shape)} with"
                f" {int((~np.isfinite(scores)).sum())} not finite; are the selector's weights sound?"
            )

    def _read_ahead(self, todo: list[tuple[str, int]]) -> Generator[Image | None, None, None]:
        """Images of all shards in order, read in threads a bounded number ahead; None after each shard."""
        views = max((self.plan.splits[split]["views"] for split, _ in todo), default=1)
        window = self.workers + -(-2 * self.plan.common["batch_size"] // views)
        pool = ThreadPoolExecutor(self.workers, "read", initializer=torch.set_num_threads, initargs=(1,))
        futures: collections.deque[Future[Image] | None] = collections.deque()
        running = 0
        try:
            for split, number in todo:
                table = self.source.splits[split].take(shard_rows(self.plan, self.source, split, number))
                for row in table.to_pylist():
                    futures.append(pool.submit(self._read, split, row))
                    running += 1
                    while running > window:
                        future = futures.popleft()
                        running -= future is not None
                        yield None if future is None else future.result()
                futures.append(None)
            while futures:
                future = futures.popleft()
                yield None if future is None else future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, split: str, row: dict[str, Any]) -> Image:
        """Everything that one image needs before a device sees it: one read, one decode."""
        common, split_plan = self.plan.common, self.plan.splits[split]
        image = Image(row)
        try:
            data, views = self.source.read(row)
            if row["size"] < 0 or self.source.base:
                row["size"] = len(data)
            image.stored, pixels = store_image(data, common["exif"], common["store_side"])
            if views is None:
                boxes = {name: split_plan[name] for name in ("scale", "ratio", "hflip")}
                size = (image.stored.width, image.stored.height)
                views = image_views(self._seed, row["key"], split_plan["views"], *size, **boxes)
            image.views = views
            if self.selector.model is not None:
                image.pixels = render_pixels(pixels, image.views, self._size)
        except (ImageError, OSError) as error:
            image.error = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
            return image
        n = self.plan.num_patches
        image.rankings = np.empty((len(image.views), n), fmt.ranking_dtype(n))
        return image


def _entropy_bits(scores: np.ndarray) -> float | None:
    """Entropy of the scores as a distribution over patches; None where they are none (`center`)."""
    if scores.min() < 0 or scores.sum() == 0:
        return None
    share = scores[scores > 0] / scores.sum()
    return float(-(share * np.log2(share)).sum())


class _Writer:
    """A thread that writes shards in the order they are given; at most 64 images wait for it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(64)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self._thread.start()

    def begin(self, split: str, number: int) -> None:
        self._put("begin", (split, number))

    def add(self, image: Image) -> None:
        self._put("add", image)

    def commit(self, timing: dict[str, float]) -> None:
        self._put("commit", timing)

    def finish(self) -> None:
        """Wait until everything is on disk."""
        self._put("stop", None)
        self._thread.join()
        self._raise()

    def abort(self) -> None:
        """Write the shards that are whole, drop the one under way; nothing happens after `finish`."""
        if self._thread.is_alive():
            with contextlib.suppress(BaseException):  # the thread's own error ends it as well
                self._put("stop", None)
            self._thread.join()

    def _put(self, what: str, value: Any) -> None:
        self._raise()
        while True:
            try:
                self._queue.put((what, value), timeout=1)
                return
            except queue.Full:
                self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (item := self._queue.get())[0] == "begin":
                split, number = item[1]
                plan_id = self._plan.splits[split]["plan_id"]
                with ShardWriter(self._folder, split, number, self._plan.num_patches, plan_id) as shard:
                    while (item := self._queue.get())[0] == "add":
                        self._add(shard, item[1])
                    if item[0] != "commit" or self._error:
                        raise self._error or RuntimeError("aborted")
                    shard.commit(item[1])
        except BaseException as error:  # the main thread raises it
            self._error = self._error or error

    def _add(self, shard: ShardWriter, image: Image) -> None:
        row = {
            "key": image.row["key"],
            "source": image.row["source"],
            "label": image.row["label"],
            "source_bytes": image.row["size"],
            "k": self._plan.k,
        }
        if image.error is not None:
            shard.add_failure(row, image.error)
            return
        stored = image.stored
        row |= {
            field: getattr(stored, field)
            for field in ("width", "height", "source_width", "source_height", "orientation", "transcoded")
        }
        row |= {"mean_score": image.mean_score, "entropy": image.entropy}
        row["ticket"] = fmt.pack_ticket(image.rankings[0, : self._plan.k], self._plan.num_patches)
        members = {fmt.RANKING: fmt.encode_npy(image.rankings), fmt.VIEWS: fmt.encode_npy(image.views)}
        if row["label"] is not None:
            members[fmt.LABEL] = str(row["label"]).encode("ascii")
        if self._plan.common["images"] == "copy":
            members[stored.member] = stored.data
        shard.add(row, members)
