"""The last leg of a mining run: images that are done -> shards on disk, in a thread of their own."""

import contextlib
import queue
import threading
from pathlib import Path
from typing import Any

from miner.lane import Image
from miner.plan import check_unchanged
from shards import format as fmt
from shards.schema import Plan
from shards.writer import ShardWriter


class WriterThread:
    """A thread that writes shards in the order they are given; at most 64 images wait for it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(64)
        self._error: BaseException | None = None
        # Not the thread's own word: a join() that Ctrl-C interrupts takes a running thread for dead (Python 3.11).
        self._ended = threading.Event()
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
        self._ended.wait()
        self._thread.join()
        self._raise()

    def abort(self) -> None:
        """Write the shards that are whole, drop the one under way; nothing happens after `finish`."""
        if not self._ended.is_set():
            with contextlib.suppress(BaseException):  # the thread's own error ends it as well
                self._put("stop", None)
            self._ended.wait()
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
                plan_id = self._plan.splits[split].plan_id
                n, version = self._plan.common.num_patches, self._plan.format
                with ShardWriter(self._folder, split, number, n, plan_id, version) as shard:
                    while (item := self._queue.get())[0] == "add":
                        self._add(shard, item[1])
                    if item[0] != "commit" or self._error:
                        raise self._error or RuntimeError("aborted")
                    check_unchanged(self._folder, split, plan_id)
                    shard.commit(item[1])
        except BaseException as error:  # the main thread raises it
            self._error = self._error or error
        finally:
            self._ended.set()

    def _add(self, shard: ShardWriter, image: Image) -> None:
        row = {
            "key": image.row["key"],
            "source": image.row["source"],
            "label": image.row["label"],
            "source_bytes": image.row["size"],
            "k": self._plan.common.k,
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
        members: dict[str, bytes] = {}
        if self._plan.common.k:
            row["ticket"] = fmt.pack_ticket(image.rankings[0, : self._plan.common.k], self._plan.common.num_patches)
            members |= {fmt.RANKING: fmt.encode_npy(image.rankings), fmt.VIEWS: fmt.encode_npy(image.views)}
        if image.token_labels is not None:
            members[fmt.TOKEN_LABELS] = image.token_labels
        if row["label"] is not None:
            members[fmt.LABEL] = str(row["label"]).encode("ascii")
        if self._plan.common.images == "copy":
            members[stored.member] = stored.data
        shard.add(row, members)
