"""A page to look at a set with, or at several over the same images: the data that its script draws."""

import base64
import io
import math
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from shards import format as fmt
from shards.console import printable
from shards.errors import TicketSetError
from shards.inspect import draw
from shards.inspect.compare import check_grids, no_common_image
from shards.inspect.page import assemble
from shards.inspect.pictures import MAX_VIEWS, by_label, spread, view_tiles
from shards.inspect.stats import statistics
from shards.reader import TicketSet
from shards.sample import Sample

_FILES = Path(__file__).parent / "page"
PER_CLASS = 3  # images, at least: one alone says little of its class
MAX_FAILURES = 200  # listed; all are counted
BUDGET = 3_300_000  # bytes of all rankings and pictures; in base64 a third more
PIXEL_BYTES = 0.25  # of a photo's JPEG at the best quality, about
SIDES = (64, 224)  # pixels of a picture, least and greatest
PICTURE = 1200  # bytes that a picture may always have
QUALITIES = (85, 75, 60, 45, 30, 15, 5)  # tried in this order until a picture is small enough


def explore(sets: Sequence[TicketSet], split: str, images: int) -> tuple[bytes, int]:
    """The page, and how many images it shows: of classes spread over all, those that every set holds.

    It is a function of the sets and the arguments: no times, no paths.

    Args:
        sets: over the same images; the pictures are the first's where boxes are equal.
        split: of all of them.
        images: at most.
    Raises:
        TicketSetError: sets of other grids, without tickets, or without an image that all of them hold.
    """
    first = sets[0]
    for other in sets:
        check_grids(first, other)
    tables = [opened.table(split) for opened in sets]
    common = _ok(tables[0])
    if not len(common):
        raise TicketSetError(f"{first.url}: split {split} has no sample to show")
    for opened, table in zip(sets, tables, strict=True):
        common = common.filter(pc.is_in(common["key"], _ok(table)["key"]))
        if not len(common):
            raise no_common_image(first, opened, split)
    classes = by_label(common)
    per_class = min(images, max(PER_CLASS, images // len(classes)))
    keys = [key for label in spread([*classes], images // per_class) for _, key in classes[label][:per_class]]
    views = len(keys) * sum(_views(opened, split) for opened in sets)
    left = BUDGET - views * first.num_patches * fmt.ranking_dtype(first.num_patches).itemsize
    pictures = _Pictures(left // (len(keys) * sum(_own_views(opened, first, split) for opened in sets)))
    found = [_of_set(opened, split, table, keys, pictures) for opened, table in zip(sets, tables, strict=True)]
    data = {
        "split": printable(split),
        "grid": first.grid,
        "colors": {"shade": draw.SHADE, "heat": draw.HEAT.astype(int).tolist()},
        "images": [_of_image(first, row) for row in _rows(common, keys)],
        "sets": [{"name": name, **each} for name, each in zip(_names(sets), found, strict=True)],
        "pictures": pictures.encoded,
    }
    title = ", ".join(_names(sets))
    body = (_FILES / "explore.html").read_text(encoding="utf-8").replace("{title}", escape(title))
    files = [_FILES / "explore.css", _FILES / "explore.js"]
    return assemble(f"{title}: tickets", body, files, data), len(keys)


class _Pictures:
    """JPEGs of views, each box of an image once: the sets of a page mostly share them.

    Args:
        most: bytes of each.

    Attributes:
        encoded: in base64.
    """

    def __init__(self, most: int) -> None:
        self._most = max(most, PICTURE)
        self._side = min(max(math.isqrt(int(self._most / PIXEL_BYTES)), SIDES[0]), SIDES[1])
        self.encoded: list[str] = []
        self._places: dict[tuple[str, bytes], int] = {}

    def places(self, sample: Sample, numbers: Sequence[int]) -> list[int]:
        """Places in `encoded` of a sample's views."""
        names = [(sample.key, sample.views[number].tobytes()) for number in numbers]
        new = [number for number, name in zip(numbers, names, strict=True) if name not in self._places]
        for number, tile in zip(new, view_tiles(sample, new, self._side), strict=True):
            self._places[sample.key, sample.views[number].tobytes()] = len(self.encoded)
            self.encoded.append(base64.b64encode(self._jpeg(tile)).decode())
        return [self._places[name] for name in names]

    def _jpeg(self, tile: Image.Image) -> bytes:
        data = b""
        for quality in QUALITIES:
            out = io.BytesIO()
            tile.save(out, "JPEG", quality=quality, optimize=True)
            data = out.getvalue()
            if len(data) <= self._most:
                break
        return data


def _ok(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["status"], "ok"))


def _rows(table: pa.Table, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the index, in the order of the keys."""
    rows: list[dict[str, Any]] = table.take(pc.index_in(pa.array(keys, pa.string()), table["key"])).to_pylist()
    return rows


def _names(sets: Sequence[TicketSet]) -> list[str]:
    """Of each set its folder's name, not where it is: a page is passed on. Two of one name get the start of their ids."""
    names = [printable(os.path.basename(os.path.abspath(opened.url))) for opened in sets]  # of "." too
    return [
        f"{name} {opened.manifest.set_id[:8]}" if names.count(name) > 1 else name
        for name, opened in zip(names, sets, strict=True)
    ]


def _views(opened: TicketSet, split: str) -> int:
    return min(MAX_VIEWS, opened.manifest.splits[split].views)


def _own_views(opened: TicketSet, first: TicketSet, split: str) -> int:
    """Views of which a set may add pictures: those of one base share their boxes."""
    return 0 if opened is not first and opened.base_id == first.base_id else _views(opened, split)


def _of_set(opened: TicketSet, split: str, table: pa.Table, keys: Sequence[str], pictures: _Pictures) -> dict[str, Any]:
    """What the page knows of a set: what it is, rankings and pictures of the images shown, what failed."""
    numbers, n = range(_views(opened, split)), opened.num_patches
    # Numbers as the browser's typed arrays read them on every machine that still runs one.
    rankings = np.empty((len(keys), len(numbers), n), fmt.ranking_dtype(n).newbyteorder("<"))
    boxes = np.empty((len(keys), len(numbers), len(fmt.VIEW_COLUMNS)), np.int32)
    places, placed = {key: place for place, key in enumerate(keys)}, [[0]] * len(keys)
    for sample in _samples(opened, _rows(_ok(table), keys)):
        place = places[sample.key]
        rankings[place], boxes[place] = sample.rankings[numbers], sample.views[numbers]
        placed[place] = pictures.places(sample, numbers)
    found, selector = statistics(opened, split, table), opened.manifest.selector
    images = "linked from another set" if opened.base else "inside"
    failed = table.filter(pc.not_equal(table["status"], "ok"))
    return {
        "selector": printable(selector.method + (f" of {selector.model}" if selector.model else "")),
        "set_id": opened.manifest.set_id[:16],
        "k": opened.k,
        "stored": opened.stored_tokens,
        "images": "ranked views" if opened.manifest.ranked else images,
        "samples": found["samples"],
        "views": opened.manifest.splits[split].views,
        "rankings": base64.b64encode(rankings.tobytes()).decode(),
        "boxes": boxes.tolist(),
        "pictures": placed,
        "frequency": [round(share, 3) for row in found["frequency"] for share in row],
        "failed": found["failed"],
        "reasons": {printable(reason): count for reason, count in found["errors"].items()},
        "failures": [
            {name: printable(row[name] or "") for name in ("key", "source", "error")}
            for row in failed.slice(0, MAX_FAILURES).to_pylist()
        ],
    }


def _samples(opened: TicketSet, rows: Sequence[dict[str, Any]]) -> Iterator[Sample]:
    """Samples of some rows of the index; a shard is opened once."""
    by_shard: dict[str, set[str]] = {}
    for row in rows:
        by_shard.setdefault(row["shard"], set()).add(row["key"])
    for name, keys in by_shard.items():
        yield from opened.stream_shard(name, keys)


def _of_image(opened: TicketSet, row: dict[str, Any]) -> dict[str, Any]:
    """What the index says of an image."""
    return {
        "key": printable(row["key"]),
        "source": printable(row["source"]),
        "class": printable(opened.class_name(row["label"])),
        "size": [row["width"], row["height"]],
    }
