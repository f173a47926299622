"""Random access to the samples of a split by (shard, row): what a trainer reads in its own order.

Offsets come from the index, so nothing is scanned; a remote tar is fetched whole, once, into a cache folder.
"""

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from shards import storage
from shards.errors import TicketSetError
from shards.reader import Sample, TicketSet
from shards.tar import split_members

OPEN_FILES = 64
CACHED_TARS = 40  # more than two windows of an epoch's order


class Rows:
    """The samples of one split that succeeded; rows count within their shard, in stored order.

    Attributes:
        sizes: samples of each shard.
        keys: of all samples in stored order.
        labels: int64, -1 where there is none.
        skipped: samples of the base that a linked set lacks.
    """

    def __init__(self, opened: TicketSet, split: str, cache: str | None = None) -> None:
        self._set = opened
        self._names = opened.shard_names(split)
        self._cache = cache or os.path.join(tempfile.gettempdir(), f"datalth-{os.getuid()}")
        tables = [_joined(opened, name) for name in self._names]
        self.sizes = tuple(len(table) for table in tables)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        table = pa.concat_tables(tables).combine_chunks()
        self.keys = table["key"].combine_chunks()
        self._extents = np.stack([table[c].to_numpy() for c in ("offset", "bytes", "base_offset", "base_bytes")], 1)
        labels = table["label"]
        self.labelled = labels.null_count == 0
        self.labels = pc.fill_null(labels, -1).to_numpy()
        in_base = opened.manifest if opened.base is None else opened.base.manifest
        self.skipped = in_base["splits"][split]["samples"] - len(table)
        self._open = functools.lru_cache(OPEN_FILES)(self._open_tar)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict:
        """Open files stay behind when a worker process is spawned."""
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open = functools.lru_cache(OPEN_FILES)(self._open_tar)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, row) of a position in stored order."""
        shard = int(np.searchsorted(self._starts, position, "right")) - 1
        return shard, position - int(self._starts[shard])

    def label(self, shard: int, row: int) -> int:
        """-1 where there is none."""
        return int(self.labels[self._starts[shard] + row])

    def read(self, shard: int, row: int) -> Sample:
        """One sample.

        Raises:
            TicketSetError: the tar is not what the index says.
        """
        position = int(self._starts[shard]) + row
        offset, size, base_offset, base_size = (int(v) for v in self._extents[position])
        key, name = self.keys[position].as_py(), self._names[shard]
        tar, url = self._tar(self._set, name)
        members = split_members(tar.read(offset, size), key, url)
        pictured = members
        if self._set.base is not None:
            tar, url = self._tar(self._set.base, name)
            pictured = split_members(tar.read(base_offset, base_size), key, url)
        return self._set.sample(key, members, pictured, url)

    def _tar(self, opened: TicketSet, name: str) -> tuple[storage.Ranges, str]:
        url = storage.join(opened.url, f"{name}.tar")
        return self._open(url, opened.manifest["set_id"]), url

    def _open_tar(self, url: str, set_id: str) -> storage.Ranges:
        try:
            # A folder for each set: a link's tars have the names of its base's.
            path = fetch(url, Path(self._cache, f"datalth-{set_id[:16]}")) if storage.is_remote(url) else url
            return storage.open_ranges(path)
        except FileNotFoundError:
            raise TicketSetError(f"{url}: missing; the index lists its samples") from None


def _joined(opened: TicketSet, name: str) -> pa.Table:
    """key, label, offset, bytes, base_offset, base_bytes of one shard's samples."""
    own = _extents(opened, name)
    if opened.base is None:
        return own.append_column("base_offset", own["offset"]).append_column("base_bytes", own["bytes"])
    base = _extents(opened.base, name)
    places = pc.index_in(own["key"], base["key"])
    if places.null_count:
        missing = own.filter(pc.is_null(places))["key"][0].as_py()
        raise TicketSetError(f"{opened.base.url}: expected an image of {missing}, which {opened.url} links to")
    found = base.take(places)
    return own.append_column("base_offset", found["offset"]).append_column("base_bytes", found["bytes"])


def _extents(opened: TicketSet, name: str) -> pa.Table:
    table = opened.shard_table(name)
    return table.filter(pc.equal(table["status"], "ok")).select(["key", "label", "offset", "bytes"])


def fetch(url: str, cache: Path) -> str:
    """A local copy of a remote tar; processes share it, and those not opened for longest are removed."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / url.rpartition("/")[2]
    with FileLock(f"{path}.lock"):  # one process fetches it, the others wait
        if path.exists():
            os.utime(path)
            return str(path)
        size, ranges = storage.size_of(url), storage.open_ranges(url)
        with storage.atomic_file(path) as file:
            for offset in range(0, size, storage.REMOTE_BLOCK):
                file.write(ranges.read(offset, min(storage.REMOTE_BLOCK, size - offset)))
    for old in sorted(cache.glob("*.tar"), key=_opened)[:-CACHED_TARS]:
        old.unlink(missing_ok=True)  # a process that reads it keeps its open file
    return str(path)


def _opened(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0
