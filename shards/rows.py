"""Random access to the samples of a split by (shard, row): what a trainer reads in its own order.

Offsets come from the index, so nothing is scanned; remote tars are read from copies (`shards.copies`).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards import spread, storage
from shards.copies import TarCopies, fetch_missing
from shards.errors import TicketSetError
from shards.reader import EXTENTS, SampleReader, TicketSet
from shards.sample import Row, Sample

OPEN_TARS = 64
OPEN_COPIES = 32  # two windows of an epoch's order; none of them is removed meanwhile


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
        copies: of remote tars; None: as `TarCopies` says where nothing else is said.
        token_labels: another set over the same images that holds the token labels; it may be opened without images.
    Raises:
        TicketSetError: `opened` holds no tickets, or the other set no token labels of its images.
    """

    def __init__(
        self, opened: TicketSet, split: str, copies: TarCopies | None = None, token_labels: TicketSet | None = None
    ) -> None:
        opened.require_tickets()
        if token_labels is not None:
            check_token_labels(opened, token_labels)
        self._names = opened.shard_names(split)
        self._set, self._views = opened, opened.manifest.splits[split].views
        self._in_parts = opened.manifest.ranked is not None and storage.is_remote(opened.url)
        keep = OPEN_COPIES if storage.is_remote(opened.url) else OPEN_TARS
        self._reader = SampleReader(opened, token_labels, keep, (copies or TarCopies()).open)
        tables = [opened.joined(name, token_labels) for name in self._names]
        self.sizes = tuple(len(table) for table in tables)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        table = pa.concat_tables(tables).drop_columns("source").combine_chunks()
        self.keys = table["key"].combine_chunks()
        self._extents = np.stack([table[c].to_numpy() for c in EXTENTS if c in table.column_names], 1)
        self.image_sizes = np.stack([table[c].to_numpy() for c in ("height", "width")], 1)
        labels = table["label"]
        self.labeled = labels.null_count == 0
        self.labels = pc.fill_null(labels, -1).to_numpy()
        self.skipped = (opened.base or opened).manifest.splits[split].samples - len(table)
        for each in (opened, opened.base, token_labels):
            if each is not None:
                each.check_unchanged()  # the tables are of one set

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, row) of a position in stored order."""
        shard = int(np.searchsorted(self._starts, position, "right")) - 1
        return shard, position - int(self._starts[shard])

    @property
    def has_token_labels(self) -> bool:
        """Whether samples come with token labels."""
        return self._reader.has_token_labels

    def image_size(self, shard: int, row: int) -> tuple[int, int]:
        """Height and width in the frame that boxes refer to."""
        height, width = self.image_sizes[self._starts[shard] + row].tolist()
        return height, width

    def labels_of(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """int64 [n], -1 where there is none."""
        return self.labels[self._starts[shards] + rows].astype(np.int64)

    def spread(self) -> np.ndarray:
        """How the scores of each view are spread: [samples, V, 7], see `shards.spread`; 0 where the set does not say."""
        views, n = self._views, self._set.num_patches
        if not self._set.says_spread:
            return spread.decode([None] * len(self), views, n)
        tables = pa.concat_tables(self._set.shard_table(name).select(["key", "spread"]) for name in self._names)
        self._set.check_unchanged()
        found = tables["spread"].take(pc.index_in(self.keys, tables["key"]))
        return spread.decode(found.to_pylist(), views, n)

    def read(self, shard: int, row: int, numbers: Sequence[int] | None = None) -> Sample:
        """One sample.

        Args:
            shard, row: its place.
            numbers: of the views that will be used; see `SampleReader.read`.
        Raises:
            TicketSetError: the tar is not what the index says.
        """
        return self._reader.read(self._names[shard], self._said([(shard, row)])[0], numbers)

    def read_all(
        self, places: Sequence[tuple[int, int]], numbers: Sequence[Sequence[int]], tokens: int | None = None
    ) -> Iterator[Sample]:
        """Several samples, one after the other; what is missing of ranked views in a remote set is fetched all at once.

        Args:
            places: (shard, row) of each.
            numbers: of each, as for `read`.
            tokens: patches that will be read of those views; None: all.
        Raises:
            TicketSetError: as `read`.
        """
        said = [(self._names[shard], row) for (shard, _), row in zip(places, self._said(places), strict=True)]
        if self._in_parts:
            fetch_missing(self._reader.head(*each) for each in said)
        samples = (self._reader.read(*each, some) for each, some in zip(said, numbers, strict=True))
        if not self._in_parts:
            return samples  # one at a time: photos are large
        held = list(samples)
        views = [(sample.ranked, some) for sample, some in zip(held, numbers, strict=True)]
        fetch_missing(ranked.place(number, tokens) for ranked, some in views if ranked for number in some)
        return iter(held)

    def _said(self, places: Sequence[tuple[int, int]]) -> list[Row]:
        """What the index says of several samples. Columns are turned into Python's values for all at once."""
        shards, rows = np.array(places, np.int64).reshape(-1, 2).T
        positions = self._starts[shards] + rows
        labels = [None if label < 0 else label for label in self.labels[positions].tolist()]
        keys = [self.keys[position].as_py() for position in positions.tolist()]
        return list(map(Row, keys, labels, *self.image_sizes[positions].T.tolist(), self._extents[positions].tolist()))


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
