"""Reading threads: an input's bytes -> what is stored of it, its views, and the pixels that producers look at.

Threads serve well here: Pillow and torch release the GIL while they decode and resize, and nothing has to be pickled
between processes. What waits is bounded, whatever the size of the data set.
"""

import collections
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from miner.plan import shard_rows
from miner.producers.masks import MaskRankings
from miner.producers.producer import Image, Producer, answering
from miner.sources import Source
from shards.errors import ImageError, is_machine_error
from shards.images import render_pixels, resize_views, store_image
from shards.ranked import Mosaic, decoded, statistics
from shards.schema import Plan, PlanCommon
from shards.views import image_views

Shard = tuple[str, int]  # (split, number)


def read_ahead(
    plan: Plan, source: Source, producers: Sequence[Producer], shards: Iterable[Shard], workers: int
) -> Generator[Image | None, None, None]:
    """Images of all shards in order, read in threads a bounded number ahead; None after each shard."""
    pool = ThreadPoolExecutor(workers, "read", initializer=torch.set_num_threads, initargs=(1,))
    futures: collections.deque[Future[Image] | None] = collections.deque()
    running = 0  # futures that are no mark of a shard's end
    try:
        for split, number in shards:
            window = workers + _two_batches(plan, split, producers)
            table = source.splits[split].take(shard_rows(plan, source, split, number))
            for row in table.to_pylist():
                futures.append(pool.submit(read_image, plan, source, producers, split, row))
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


def _two_batches(plan: Plan, split: str, producers: Sequence[Producer]) -> int:
    """Images that hold two batches of every producer: one on the device, one being gathered."""
    views = plan.splits[split].views
    return max((-(-2 * p.batch_size // (1 if p.whole else views)) for p in answering(producers)), default=0)


def read_image(plan: Plan, source: Source, producers: Sequence[Producer], split: str, row: dict[str, Any]) -> Image:
    """Everything that one image needs before a device sees it: one read, one decode."""
    common, said = plan.common, plan.splits[split]
    image = Image(row)
    try:
        if common.ranked is None or common.ranked.decoded:
            data, views = source.read(row)
        else:
            assert source.tickets is not None
            data, views, image.kept = source.tickets.read(row)
        if row["size"] < 0 or source.base:
            row["size"] = len(data)
        image.stored, pixels = store_image(data, common.exif, common.store_side)
        height, width = image.stored.height, image.stored.width
        if views is None:
            drawn = said.scale, said.ratio, said.hflip
            views = image_views(common.seed, row["key"], said.views, width, height, *drawn)
        image.views = views
        if common.ranked:
            image.rendered = render_pixels(pixels, views, common.img_size)
        everything = np.array([[0, 0, height, width, 0]])
        for producer in answering(producers):
            if isinstance(producer, MaskRankings):
                image.inputs[producer.name] = producer.look(image)
            if producer.size is None:
                continue
            if producer.whole:
                inputs = render_pixels(pixels, everything, producer.size)
            elif common.ranked:
                inputs = resize_views(_decoded(image, common), producer.size)
            else:
                inputs = render_pixels(pixels, views, producer.size)
            image.inputs[producer.name] = inputs
    except (ImageError, OSError) as error:
        if is_machine_error(error):  # it would meet any file: nothing that a row should say
            raise
        image.error = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
    return image


def _decoded(image: Image, common: PlanCommon) -> np.ndarray:
    """The ranked views of an image as a student will see them, uint8 [V, S, S, 3]; what is seen of them is noted."""
    assert common.ranked is not None and image.rendered is not None
    mosaic, quality = Mosaic.of(common), common.ranked.quality
    shown = np.stack([decoded(view, mosaic, quality) for view in image.rendered])
    image.statistics = [statistics(view) for view in shown]
    return shown
