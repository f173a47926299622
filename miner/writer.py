"""The last legs of a shard: images that are done are encoded by threads; two more write them: tar, parquet, JSON."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from miner.plan import check_unchanged
from miner.producers.producer import Image, Producer
from miner.reading import Shard
from shards.sample import Encoded, encode_image
from shards.schema import Plan, ShardStats
from shards.store import Store
from shards.writer import ShardWriter

WAITING_IMAGES = 64
WAITING_BYTES = 256 << 20  # of ranked views that are not yet encoded
SHARDS = 2  # written at once: one is committed, which takes seconds in an object store, beside the images of the next
_END = object()  # in a shard's queue, behind its images


class Writer:
    """Threads that write shards as they are given; at most WAITING_IMAGES, of all shards, wait for them and their encoders.

    Args:
        plan: of the folder.
        store: the folder of the ticket set.
        producers: each encodes its members.
        workers: threads that encode.
        shared: other processes may write the same shards.
        committed: told of each shard that is done.
        waiting: called once a second while the caller waits: a slow store is no reason to be taken for dead.

    Attributes:
        failed: the shard that could not be written.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        producers: Sequence[Producer],
        workers: int,
        shared: bool = False,
        committed: Callable[[Shard], None] | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._plan, self._store, self._producers, self._shared = plan, store, producers, shared
        self._committed, self._waiting = committed, waiting
        self.failed: Shard | None = None
        self._encoders = ThreadPoolExecutor(workers, "encode")
        # Shared by shards: each with room of its own would hold twice as much while one is slow. An earlier shard never
        # waits for room that a later one took, since its images have all come by then.
        self._room = threading.Semaphore(_most_waiting(plan, workers))
        self._threads = ThreadPoolExecutor(SHARDS, "write")
        self._stopped = False
        self._shards: list[Future[ShardStats]] = []
        self._error: BaseException | None = None

    def begin(self, split: str, number: int) -> None:
        """Begin a shard."""
        self._raise()
        self._timing: dict[str, Any] = {}
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._shards.append(self._threads.submit(self._write, (split, number), self._queue, self._timing))

    def add(self, image: Image) -> None:
        """Give the next image of the shard."""
        encoded = self._encoders.submit(self._encode, image)
        self._raise()
        while not self._room.acquire(timeout=1):
            self._raise()
            self._waiting()
        self._queue.put(encoded)

    def commit(self, timing: dict[str, Any]) -> None:
        """Say that the shard is whole."""
        self._raise()
        self._timing |= timing
        self._queue.put(_END)

    def finish(self) -> list[ShardStats]:
        """Wait until everything is on disk; gives what each shard's JSON says."""
        while wait(self._shards, 1).not_done:
            self._waiting()
        return [shard.result() for shard in self._shards]

    def close(self) -> None:
        """Write the shards that are whole, drop one under way. Nothing is left behind, whatever was raised."""
        self._stopped = True
        # Not shutdown alone: a join that a second Ctrl-C interrupts takes a running thread for dead (Python 3.11).
        wait(self._shards)
        self._threads.shutdown()
        self._encoders.shutdown(cancel_futures=True)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, name: Shard, images: queue.SimpleQueue[Any], timing: dict[str, Any]) -> ShardStats:
        """In a thread: one shard."""
        split, number = name
        try:
            self._raise()  # a shard before it failed: nothing new is begun
            common, planned = self._plan.common, self._plan.splits[split]
            made_as = (common.num_patches, planned.plan_id, self._plan.format, common.k > 0, self._shared)
            with ShardWriter(self._store, split, number, *made_as) as shard:
                while (image := self._next(images)) is not _END:
                    row, encoded = image.result()
                    if isinstance(encoded, str):
                        shard.add_failure(row, encoded)
                    else:
                        members, columns = encoded
                        shard.add(row | columns, members)
                check_unchanged(self._store, split, planned.plan_id)
                stats = shard.commit(timing)
        except BaseException as error:
            if self._error is None:
                self._error, self.failed = error, name
            raise
        if self._committed is not None:
            self._committed(name)
        return stats

    def _next(self, images: queue.SimpleQueue[Any]) -> Any:
        while True:
            try:
                image = images.get(timeout=0.2)
            except queue.Empty:
                if self._stopped:
                    raise RuntimeError("stopped before the shard was whole") from None
            else:
                if image is not _END:
                    self._room.release()
                return image

    def _encode(self, image: Image) -> tuple[dict[str, Any], Encoded | str]:
        """What the row says of any input; and members with further columns, or why it failed."""
        said = image.row
        row = {field: said[field] for field in ("key", "source", "label")}
        row |= {"source_bytes": said["size"], "k": self._plan.common.k}
        if image.error is not None:
            return row, image.error
        members, columns = encode_image(said["label"], image.stored, self._plan.common.images == "copy")
        for producer in self._producers:
            own, further = producer.encode(image, image.answers.get(producer.name, []))
            members |= own
            columns |= further
        return row, (members, columns)


def _most_waiting(plan: Plan, workers: int) -> int:
    """Images: ranked views take megabytes each until they are encoded, and may be the slowest leg."""
    if plan.common.ranked is None:
        return WAITING_IMAGES
    pixels = max(split.views for split in plan.splits.values()) * plan.common.img_size**2
    return min(WAITING_IMAGES, max(workers, WAITING_BYTES // (3 * pixels)))
