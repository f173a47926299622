"""A finished ticket set as a source: another selector over the same images, views and shards."""

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miner.sources.source import SCHEMA, Kept, Source
from shards import storage
from shards.reader import Row, TicketSet
from shards.tar import split_members


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
            table = images.shard_table(name)
            keep = pc.equal(table["status"], "ok")
            if images is not opened:  # only what the link holds
                own = opened.shard_table(name)
                keep = pc.and_(keep, pc.is_in(table["key"], own.filter(pc.equal(own["status"], "ok"))["key"]))
            table = table.filter(keep)
            columns = [table["key"], table["source"], table["label"], table["bytes"]]
            container = pa.array([shards.index(name)] * len(table), pa.int32())
            tables.append(pa.table([*columns, container, table["offset"]], schema=SCHEMA))
        splits[split] = pa.concat_tables(tables)
    return Source(url, images.classes, splits, _TicketSetReader(images, shards), base=images)


class _TicketSetReader:
    """Image and views of a sample of the set that holds the images."""

    def __init__(self, images: TicketSet, shards: list[str]) -> None:
        self._images, self._shards = images, shards
        self._open = Kept(storage.open_ranges, 2 if storage.is_remote(images.url) else 64)
        self._rows = Kept(functools.partial(_rows_of, images), 4)

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, np.ndarray]:
        name, key = self._shards[row["container"]], row["key"]
        url = storage.join(self._images.url, name + ".tar")
        members = split_members(self._open(url).read(row["offset"], row["size"]), key, url)
        sample = self._images.sample(name, self._rows(name)[key], members, members, url)
        return sample.image, sample.views


def _rows_of(images: TicketSet, name: str) -> dict[str, Row]:
    """What the index says of a shard's samples, by key."""
    rows = images.joined(name).select(Row._fields).to_pylist()
    return {row["key"]: Row(**row) for row in rows}
