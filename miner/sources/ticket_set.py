"""A finished ticket set as a source: another selector over the same images, views and shards."""

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from miner.sources.source import SCHEMA, Kept, Source
from shards import storage
from shards.reader import SampleReader, TicketSet, rows_of
from shards.sample import Row


def ticket_set_source(url: str, base: str | None) -> Source:
    """List a ticket set's samples in stored order. A linked set leads to the set that holds its images.

    Raises:
        TicketSetError: not a finished ticket set.
    """
    opened = TicketSet.open(url, base)
    images = opened.base or opened
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
    return Source(url, images.classes, splits, _TicketSetReader(images, shards), base=images)


class _TicketSetReader:
    """Image and views of a sample of the set that holds the images."""

    def __init__(self, images: TicketSet, shards: list[str]) -> None:
        self._shards = shards
        self._reader = SampleReader(images, keep=2 if storage.is_remote(images.url) else 64)
        self._rows = Kept(functools.partial(_rows_by_key, images), 4)

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, np.ndarray]:
        name = self._shards[row["container"]]
        sample = self._reader.read(name, self._rows(name)[row["key"]])
        return sample.image, sample.views


def _rows_by_key(images: TicketSet, name: str) -> dict[str, Row]:
    """What the index says of a shard's samples."""
    return {row.key: row for row in rows_of(images.joined(name))}
