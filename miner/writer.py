"""The last legs of a shard: images that are done are encoded by threads; one more writes them: tar, parquet, JSON."""

import contextlib
import queue
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
_END, _ABORT = object(), object()  # in the queue, behind a shard's images


class Writer:
    """A thread that writes shards in the order they are given; at most WAITING_IMAGES wait for it and its encoders.

    While it commits one shard, the images of the next may be given.

    Args:
        plan: of the folder.
        store: the folder of the ticket set.
        producers: each encodes its members.
        workers: threads that encode.
        shared: other processes may write the same shards.
        committed: told of each shard that is done.

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
    ) -> None:
        self._plan, self._store, self._producers, self._shared = plan, store, producers, shared
        self._committed = committed
        self.failed: Shard | None = None
        self._encoders = ThreadPoolExecutor(workers, "encode")
        self._queue: queue.Queue[Any] = queue.Queue(_most_waiting(plan, workers))
        self._thread = ThreadPoolExecutor(1, "write")
        self._shards: list[Future[ShardStats]] = []
        self._error: BaseException | None = None

    def begin(self, split: str, number: int) -> None:
        """Begin a shard."""
        self._raise()
        self._timing: dict[str, Any] = {}
        self._shards.append(self._thread.submit(self._write, split, number, self._timing))

    def add(self, image: Image) -> None:
        """Give the next image of the shard."""
        self._put(self._encoders.submit(self._encode, image))

    def commit(self, timing: dict[str, Any]) -> None:
        """Say that the shard is whole."""
        self._timing |= timing
        self._put(_END)

    def finish(self) -> list[ShardStats]:
        """Wait until everything is on disk; gives what each shard's JSON says."""
        return [shard.result() for shard in self._shards]

    def close(self) -> None:
        """Write the shards that are whole, drop one under way. Nothing is left behind, whatever was raised."""
        with contextlib.suppress(BaseException):  # the thread's own error: it has stopped then
            self._put(_ABORT)
        # Not shutdown alone: a join that a second Ctrl-C interrupts takes a running thread for dead (Python 3.11).
        wait(self._shards)
        self._thread.shutdown()
        self._encoders.shutdown(cancel_futures=True)

    def _put(self, item: Any) -> None:
        while True:
            self._raise()
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=1)
                return

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, split: str, number: int, timing: dict[str, Any]) -> ShardStats:
        """In the thread: one shard, of the images up to the next mark."""
        try:
            self._raise()  # the images in the queue may be those of a shard that failed
            plan_id = self._plan.splits[split].plan_id
            n, version = self._plan.common.num_patches, self._plan.format
            with ShardWriter(self._store, split, number, n, plan_id, version, self._shared) as shard:
                while (item := self._queue.get()) is not _END:
                    if item is _ABORT:
                        raise RuntimeError("aborted")
                    row, encoded = item.result()
                    if isinstance(encoded, str):
                        shard.add_failure(row, encoded)
                    else:
                        members, columns = encoded
                        shard.add(row | columns, members)
                check_unchanged(self._store, split, plan_id)
                stats = shard.commit(timing)
        except BaseException as error:
            if self._error is None:
                self._error, self.failed = error, (split, number)
            raise
        if self._committed is not None:
            self._committed((split, number))
        return stats

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
