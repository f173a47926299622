"""Random access to the samples of a split by (shard, row): what a trainer reads in its own order.

Offsets come from the index, so nothing is scanned; a remote tar is fetched whole, once, into a cache folder.
"""

import functools
import os
import tempfile
from dataclasses import replace
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
EXTENTS = ("offset", "bytes", "base_offset", "base_bytes", "labels_offset", "labels_bytes")


class Rows:
    """The samples of one split that succeeded; rows count within their shard, in stored order.

    Attributes:
        sizes: samples of each shard.
        keys: of all samples in stored order.
        labels: int64, -1 where there is none.
        image_sizes: int32 [samples, 2], height and width in the frame that boxes refer to.
        skipped: samples of the base that a linked set lacks.

    Args:
        opened: the set.
        split: its split.
        cache: folder for copies of remote tars.
        token_labels: another set over the same images that holds the token labels; it may be opened without images.
    Raises:
        TicketSetError: `opened` holds no tickets, or the other set no token labels of its images.
    """

    def __init__(
        self, opened: TicketSet, split: str, cache: str | None = None, token_labels: TicketSet | None = None
    ) -> None:
        opened.require_tickets()
        if token_labels is not None:
            check_token_labels(opened, token_labels)
        self._set, self._token_labels = opened, token_labels
        self._names = opened.shard_names(split)
        self._cache = cache or os.path.join(tempfile.gettempdir(), f"datalth-{os.getuid()}")
        tables = [_joined(opened, name, token_labels) for name in self._names]
        self.sizes = tuple(len(table) for table in tables)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        table = pa.concat_tables(tables).combine_chunks()
        self.keys = table["key"].combine_chunks()
        self._extents = np.stack([table[c].to_numpy() for c in EXTENTS if c in table.column_names], 1)
        self.image_sizes = np.stack([table[c].to_numpy() for c in ("height", "width")], 1)
        labels = table["label"]
        self.labelled = labels.null_count == 0
        self.labels = pc.fill_null(labels, -1).to_numpy()
        in_base = opened.manifest if opened.base is None else opened.base.manifest
        self.skipped = in_base["splits"][split]["samples"] - len(table)
        for each in (opened, opened.base, token_labels):
            if each is not None:
                each.check_unchanged()  # the tables are of one set
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

    @property
    def has_token_labels(self) -> bool:
        """Whether samples come with token labels."""
        return any(
            opened is not None and opened.has_token_labels for opened in (self._set, self._set.base, self._token_labels)
        )

    def image_size(self, shard: int, row: int) -> tuple[int, int]:
        """Height and width in the frame that boxes refer to."""
        height, width = self.image_sizes[self._starts[shard] + row].tolist()
        return height, width

    def label(self, shard: int, row: int) -> int:
        """-1 where there is none."""
        return int(self.labels[self._starts[shard] + row])

    def read(self, shard: int, row: int) -> Sample:
        """One sample.

        Raises:
            TicketSetError: the tar is not what the index says.
        """
        position = int(self._starts[shard]) + row
        offset, size, base_offset, base_size, *labelled = (int(v) for v in self._extents[position])
        key, name = self.keys[position].as_py(), self._names[shard]
        tar, url = self._tar(self._set, name)
        members = split_members(tar.read(offset, size), key, url)
        pictured = members
        if self._set.base is not None:
            tar, url = self._tar(self._set.base, name)
            pictured = split_members(tar.read(base_offset, base_size), key, url)
        sample = self._set.sample(key, members, pictured, url)
        if self._token_labels is None:
            return sample
        tar, url = self._tar(self._token_labels, name)
        members = split_members(tar.read(*labelled), key, url)
        return replace(sample, token_labels=self._token_labels.token_labels(key, members, url))

    def _tar(self, opened: TicketSet, name: str) -> tuple[storage.Ranges, str]:
        url = storage.join(opened.url, f"{name}.tar")
        return self._open(url, opened), url

    def _open_tar(self, url: str, opened: TicketSet) -> storage.Ranges:
        try:
            # A folder for each set: a link's tars have the names of its base's.
            cache = Path(self._cache, f"datalth-{opened.manifest['set_id'][:16]}")
            ranges = storage.open_ranges(fetch(url, cache) if storage.is_remote(url) else url)
            opened.check_unchanged()
            return ranges
        except FileNotFoundError:
            opened.check_unchanged()
            raise TicketSetError(f"{url}: missing; the index lists its samples") from None


def check_token_labels(opened: TicketSet, labels: TicketSet) -> None:
    """
    Raises:
        TicketSetError: `labels` holds no token labels, or those of other images than `opened` has.
    """
    if not labels.has_token_labels:
        raise TicketSetError(f"{labels.url}: expected a set with token labels, got one without")
    if labels.base_id != opened.base_id:
        raise TicketSetError(
            f"{labels.url}: its token labels are of the images of set {labels.base_id[:12]}, expected those of"
            f" {opened.base_id[:12]}, as in {opened.url}"
        )


def _joined(opened: TicketSet, name: str, labels: TicketSet | None) -> pa.Table:
    """key, label and EXTENTS of one shard's samples; those that `labels` lacks are left out."""
    own = _with_base(opened, name)
    if labels is None:
        return own
    theirs = _extents(labels, name)
    own = own.filter(pc.is_in(own["key"], theirs["key"]))
    found = theirs.take(pc.index_in(own["key"], theirs["key"]))
    return own.append_column("labels_offset", found["offset"]).append_column("labels_bytes", found["bytes"])


def _with_base(opened: TicketSet, name: str) -> pa.Table:
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
    return table.filter(pc.equal(table["status"], "ok")).select(["key", "label", "offset", "bytes", "height", "width"])


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
