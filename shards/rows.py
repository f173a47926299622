"""Random access to the samples of a split by (shard, row): what a trainer reads in its own order.

Offsets come from the index, so nothing is scanned; a remote tar is fetched whole, once, into a cache folder,
and checked on its way.
"""

import functools
import hashlib
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from shards import schema, storage
from shards.errors import TicketSetError
from shards.reader import Row, Sample, TicketSet
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
        self.skipped = in_base.splits[split].samples - len(table)
        for each in (opened, opened.base, token_labels):
            if each is not None:
                each.check_unchanged()  # the tables are of one set
        self._tars: dict[tuple[str, str], tuple[int, str]] = {}
        self._open = functools.lru_cache(OPEN_FILES)(self._open_tar)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, object]:
        """Open files stay behind when a worker process is spawned."""
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, object]) -> None:
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
        label = int(self.labels[position])
        said = Row(key, None if label < 0 else label, *self.image_sizes[position].tolist())
        sample = self._set.sample(name, said, members, pictured, url)
        if self._token_labels is None:
            return sample
        tar, url = self._tar(self._token_labels, name)
        members = split_members(tar.read(*labelled), key, url)
        return replace(sample, token_labels=self._token_labels.token_labels(key, members, f"{url}: {key}"))

    def _tar(self, opened: TicketSet, name: str) -> tuple[storage.Ranges, str]:
        url = storage.join(opened.url, f"{name}.tar")
        return self._open(url, opened), url

    def _open_tar(self, url: str, opened: TicketSet) -> storage.Ranges:
        try:
            path = self._fetched(url, opened.manifest.set_id) if storage.is_remote(url) else url
            ranges = storage.open_ranges(path)
            opened.check_unchanged()
            return ranges
        except FileNotFoundError:
            opened.check_unchanged()
            raise TicketSetError(f"{url}: missing; the index lists its samples") from None

    def _fetched(self, url: str, set_id: str) -> str:
        if (url, set_id) not in self._tars:
            self._tars[url, set_id] = tar_of(url)
        # A folder for each set, so that sets do not drive out each other's tars.
        folder = f"datalth-{hashlib.sha256(set_id.encode()).hexdigest()[:16]}"
        return fetch(url, own_folder(Path(self._cache)) / folder, *self._tars[url, set_id])


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
    """`TicketSet.joined` of one shard, with the place of its token labels; samples that `labels` lacks are left out."""
    own = opened.joined(name)
    if labels is None:
        return own
    theirs = labels.joined(name)
    own = own.filter(pc.is_in(own["key"], theirs["key"]))
    found = theirs.take(pc.index_in(own["key"], theirs["key"]))
    return own.append_column("labels_offset", found["offset"]).append_column("labels_bytes", found["bytes"])


def tar_of(url: str) -> tuple[int, str]:
    """Bytes and sha256 of a shard's tar, as the JSON beside it says.

    Raises:
        TicketSetError: the JSON is missing, or damaged.
    """
    where = f"{url.removesuffix('.tar')}.json"
    try:
        tar = schema.parse_shard(storage.read_bytes(where, schema.MAX_JSON_BYTES), where).tar
    except FileNotFoundError:
        raise TicketSetError(f"{where}: missing; expected the JSON of a shard") from None
    return tar.bytes, tar.sha256


def own_folder(folder: Path) -> Path:
    """A folder in which nobody else can put a file; made where it is missing.

    Raises:
        TicketSetError: it is a link, or others can write in it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise TicketSetError(
            f"{folder}: expected a folder of yours that nobody else can write, for copies of tars; remove it, or name"
            " another place in TMPDIR"
        )
    return folder


def fetch(url: str, cache: Path, size: int, sha256: str) -> str:
    """A local copy of a remote tar, which is that of its hash; processes share it, and those not opened for longest go.

    A copy is named by its hash and appears only after it was checked: what is there needs no trust in where it came from.

    Args:
        url: of the tar.
        cache: the folder for copies; see `own_folder`.
        size: bytes that the tar has.
        sha256: that it has, 64 hex digits.
    Raises:
        FileNotFoundError: there is no such tar.
        TicketSetError: it is another one, its store fails, or others can write in the folder.
    """
    path = own_folder(cache) / f"{sha256}.tar"
    with FileLock(f"{path}.lock"):  # one process fetches it, the others wait
        if path.is_file() and path.stat().st_size == size:
            os.utime(path)
            return str(path)
        for left in cache.glob(f"{path.name}.*.tmp"):  # by a process that was killed: it had the lock
            left.unlink()
        _copy(url, path, size, sha256)
    for old in sorted(cache.glob(f"{'[0-9a-f]' * 64}.tar"), key=_opened)[:-CACHED_TARS]:
        old.unlink(missing_ok=True)  # a process that reads it keeps its open file
    return str(path)


def _copy(url: str, path: Path, size: int, sha256: str) -> None:
    found, count = hashlib.sha256(), 0
    try:
        with storage.atomic_file(path) as file:
            for part in storage.blocks(url, size):
                file.write(part)
                found.update(part)
                count += len(part)
            if (count, found.hexdigest()) != (size, sha256):
                raise TicketSetError(
                    f"{url}: expected {size} bytes of sha256 {sha256[:12]}, as its JSON says, got {count} of"
                    f" {found.hexdigest()[:12]}"
                )
    except FileNotFoundError:
        raise
    except OSError as error:  # a full disk says no name
        error.filename = error.filename or str(path)
        raise


def _opened(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0
