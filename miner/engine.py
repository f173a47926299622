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
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miner.lane import WHOLE, Flight, Image, Lane
from miner.plan import shard_rows
from miner.selectors import Selector
from miner.sources import Source
from miner.token_labels import VIEWS_AN_IMAGE, Labeller
from miner.writer_thread import WriterThread
from shards import format as fmt
from shards import token_labels
from shards.errors import ImageError, TicketSetError, is_machine_error
from shards.images import render_pixels, store_image
from shards.schema import Plan
from shards.views import image_views, view_seed


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
        log_batch: called with the (key, view) pairs of every batch, for tests; view -1 is the whole image.
        labeller: makes the token labels that the plan has.
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
        labeller: Labeller | None = None,
    ) -> None:
        self.plan, self.source, self.selector, self.folder = plan, source, selector, folder
        self.workers, self.on_batch, self.log_batch, self.labeller = workers, on_batch, log_batch, labeller
        self.progress = Progress()
        said = plan.common.selector
        self._size = said.input_size  # None: the method looks at no pixels
        self._seed = plan.common.seed
        self._scale = _scale(said.mean, said.std, selector.device)
        self._label_scale = _scale(labeller.mean, labeller.std, labeller.device) if labeller else self._scale

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
        writer = WriterThread(self.plan, self.folder)
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

        Views, and whole images for their token labels, are gathered into batches of the plan's sizes. The
        last batch of a shard is a short one, so that the plan alone says what a batch holds.
        """
        waiting: collections.deque[Image] = collections.deque()  # images not yet given out
        ranks = Lane(self.plan.common.batch_size, self._launch, self._land)
        labeler = self.plan.common.token_labels
        labels = Lane(labeler.batch_size if labeler else 1, self._launch_labels, self._land_labels)
        while True:
            with self.progress.waiting("read"):
                image = next(ahead)
            if image is not None:
                waiting.append(image)
                if image.error is None and self.plan.common.k:
                    ranks.push(image, range(len(image.views)))
                if image.error is None and self.labeller is not None:
                    labels.push(image, range(WHOLE, WHOLE + 1))
            for lane in (ranks, labels):
                with self.progress.waiting("select"):
                    for _ in lane.turn(last=image is None):
                        self.on_batch(self.progress)
            while waiting and waiting[0] is not ranks.oldest and waiting[0] is not labels.oldest:
                done = waiting.popleft()
                done.pixels = done.whole = None
                yield done
            if image is None:
                return

    def _launch(self, batch: list[tuple[Image, int]]) -> Flight:
        """Put a batch of views on the device and start to rank it."""
        self.log_batch([(image.row["key"], view) for image, view in batch])
        seeds = [view_seed(self._seed, image.row["key"], view) for image, view in batch]
        pixels = None
        if self._size is not None:
            views = [image.pixels[view] for image, view in batch if image.pixels is not None]
            pixels = _normalised(views, *self._scale)
        rankings, scores = self.selector.rank_and_score(pixels, seeds)
        return Flight(batch, rankings.to(torch.int32), scores.float())

    def _land(self, flight: Flight) -> None:
        """Wait for a batch and put its rankings into their images."""
        rankings, scores = flight.results()
        self._check(rankings, scores, len(flight.batch))
        for (image, view), ranking, score in zip(flight.batch, rankings, scores, strict=True):
            image.rankings[view] = ranking
            if view == 0:
                image.mean_score = float(score[ranking[: self.selector.k]].mean())
                image.entropy = _entropy_bits(score)
        self.progress.views += len(flight.batch)

    def _launch_labels(self, batch: list[tuple[Image, int]]) -> Flight:
        """Put a batch of whole images on the device and start to label their places."""
        assert self.labeller is not None
        self.log_batch([(image.row["key"], view) for image, view in batch])
        images = [image.whole for image, _ in batch if image.whole is not None]
        return Flight(batch, *self.labeller.label(_normalised(images, *self._label_scale)))

    def _land_labels(self, flight: Flight) -> None:
        """Wait for a batch and put its token labels into their images."""
        for (image, _), shares, classes in zip(flight.batch, *flight.results(), strict=True):
            if not np.isfinite(shares).all():
                raise TicketSetError(
                    f"--token-labels: expected finite probabilities, got {int((~np.isfinite(shares)).sum())} that are"
                    f" not for {image.row['source']}; are the model's weights sound?"
                )
            image.token_labels = token_labels.encode(shares, classes)

    def _check(self, rankings: np.ndarray, scores: np.ndarray, count: int) -> None:
        """What a selector gives is not taken on trust: weights may hold NaN, a method may be a user's own."""
        n, method = self.plan.common.num_patches, self.selector.method
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
        views = max((self.plan.splits[split].views for split, _ in todo if self.plan.common.k), default=VIEWS_AN_IMAGE)
        window = self.workers + -(-2 * self.plan.common.batch_size // views)
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
        common = self.plan.common
        image = Image(row)
        try:
            data, views = self.source.read(row)
            if row["size"] < 0 or self.source.base:
                row["size"] = len(data)
            image.stored, pixels = store_image(data, common.exif, common.store_side)
            if views is None:
                said, width, height = self.plan.splits[split], image.stored.width, image.stored.height
                views = image_views(
                    self._seed, row["key"], said.views, width, height, said.scale, said.ratio, said.hflip
                )
            image.views = views
            if self._size is not None:
                image.pixels = render_pixels(pixels, image.views, self._size)
            if self.labeller is not None:
                everything = np.array([[0, 0, image.stored.height, image.stored.width, 0]])
                image.whole = render_pixels(pixels, everything, self.labeller.input_size)[0]
        except (ImageError, OSError) as error:
            if is_machine_error(error):  # it would meet any file: nothing that a row should say
                raise
            image.error = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
            return image
        n = self.plan.common.num_patches
        image.rankings = np.empty((len(image.views), n), fmt.ranking_dtype(n))
        return image


def _scale(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A model's mean and std in units of uint8, on its device, [3, 1, 1] each; zeros where there is no model."""
    low, spread = (
        torch.tensor([255.0 * v for v in values or (0, 0, 0)], device=device).view(3, 1, 1) for values in (mean, std)
    )
    return low, spread


def _normalised(pixels: list[np.ndarray], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 [S, S, 3] each -> float [B, 3, S, S] on the device; uint8 crosses, floats are made there."""
    host = torch.from_numpy(np.stack(pixels))
    if mean.device.type == "cuda":
        host = host.pin_memory()
    images = host.to(mean.device, non_blocking=True).permute(0, 3, 1, 2)
    # Planes: on a CPU a row of 224 numbers minus one mean is five times as fast as 3 numbers minus 3 means.
    return images.to(mean.dtype, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def _entropy_bits(scores: np.ndarray) -> float | None:
    """Entropy of the scores as a distribution over patches; None where they are none (`center`)."""
    if scores.min() < 0 or scores.sum() == 0:
        return None
    share = scores[scores > 0] / scores.sum()
    return float(-(share * np.log2(share)).sum())
