"""A finished ticket set as a source: another selector over the same images, views and shards, or views of another kind."""

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from miner.sources.source import SCHEMA, Cached, Kept, Source, Tickets
from shards import format as fmt
from shards import schema, storage
from shards.errors import TicketSetError
from shards.reader import SampleReader, TicketSet, rows_of
from shards.sample import Row, Sample


def ticket_set_source(url: str, base: str | None) -> Source:
    """List a ticket set's samples in stored order. A linked set leads to the set that holds its images.

    Raises:
        TicketSetError: not a finished ticket set, or one of ranked views.
    """
    opened = TicketSet.open(url, base)
    images = opened.base or opened
    _require_images(opened)
    shards = [name for split in images.splits for name in images.shard_names(split)]
    splits = {}
    for split in opened.splits:
        tables = []
        for name in opened.shard_names(split):
            table = opened.joined(name)
            columns = [table[column] for column in ("key", "source", "label", "base_bytes")]
            container = pa.array([shards.index(name)] * len(table), pa.int32())
            tables.append(pa.table([*columns, container, table["base_offset"]], schema=SCHEMA))
        splits[split] = pa.concat_tables(tables)
    labeler = opened.manifest.token_labels or images.manifest.token_labels
    tickets = Tickets(opened.manifest.selector, labeler, _TicketReader(opened, shards)) if opened.has_tickets else None
    return Source(url, images.classes, splits, _ImageReader(images, shards), base=images, tickets=tickets)


def _require_images(opened: TicketSet) -> None:
    if opened.manifest.ranked is None:
        return
    where = storage.join(opened.url, fmt.PLAN)
    made_of = schema.parse_plan(storage.read_bytes(where, schema.MAX_JSON_BYTES), where).common.base
    photos = f"the ticket set {made_of[:12]} that it was made of" if made_of else "the photos that it was made of"
    raise TicketSetError(
        f"`data` {opened.url}: holds ranked views of {opened.manifest.img_size} px and no photos, which mining needs;"
        f" expected {photos}"
    )


class _Samples:
    """The samples of a set, by the rows of its source.

    Args:
        opened: the set.
        shards: names that the rows' containers stand for.
    """

    def __init__(self, opened: TicketSet, shards: list[str]) -> None:
        self._shards = shards
        of_a_shard = 1 if opened.base is None else 2
        self._reader = SampleReader(opened, keep=2 * of_a_shard if storage.is_remote(opened.url) else 64)
        self._rows = Cached(functools.partial(_rows_by_key, opened), 4)

    def find(self, row: dict[str, Any]) -> tuple[str, Sample]:
        """The name of its shard, and the sample."""
        name = self._shards[row["container"]]
        return name, self._reader.read(name, self._rows(name)[row["key"]])


class _ImageReader(_Samples):
    """Image and views of a sample of the set that holds the images."""

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, np.ndarray]:
        _, sample = self.find(row)
        return sample.image, sample.views


class _TicketReader(_Samples):
    """Image, views and tickets of a sample of a set, linked or not."""

    def __init__(self, opened: TicketSet, shards: list[str]) -> None:
        super().__init__(opened, shards)
        self._scores = Cached(functools.partial(_scores_by_key, opened), 4)

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, np.ndarray, Kept]:
        name, sample = self.find(row)
        kept = Kept(sample.rankings, sample.token_labels, *self._scores(name)[row["key"]])
        return sample.image, sample.views, kept


def _rows_by_key(opened: TicketSet, name: str) -> dict[str, Row]:
    """What the index says of a shard's samples."""
    return {row.key: row for row in rows_of(opened.joined(name))}


def _scores_by_key(opened: TicketSet, name: str) -> dict[str, tuple[float | None, float | None, bytes | None]]:
    """Mean score, entropy and spread of a shard's samples, as the index has them; one of before 1.3 has no spread."""
    table = opened.shard_table(name)
    columns = [table[column].to_pylist() for column in ("mean_score", "entropy")]
    columns.append(table["spread"].to_pylist() if opened.says_spread else [None] * len(table))
    return dict(zip(table["key"].to_pylist(), zip(*columns, strict=True), strict=True))
