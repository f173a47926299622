"""Which samples a picture shows, and what is written beside them; `draw` puts it on paper."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from shards.errors import TicketSetError
from shards.inspect import draw
from shards.reader import TicketSet
from shards.sample import Sample

MAX_VIEWS = 8
MAX_CLASS_MAPS = 17

Tiles = list[Image.Image]


def sample_page(opened: TicketSet, sample: Sample) -> Image.Image:
    """The first views of one image, each with its ticket and its ranking beside it."""
    tiles = _tiles(opened, sample, range(min(MAX_VIEWS, len(sample.views))))
    title = f"{sample.key}   {opened.class_name(sample.label)}   K = {opened.k} of {opened.num_patches}"
    return draw.page(tiles, ["view", "ticket", "rank"], title + _what_is_gray(opened))


def contact_sheet(opened: TicketSet, split: str, classes: int, per_class: int) -> tuple[Image.Image, int, int]:
    """Images of several classes, view 0 with its ticket beside it; and how many images of how many classes they are.

    Raises:
        TicketSetError: the split has no sample.
    """
    picked = list(pick(opened.table(split), classes, per_class))
    if not picked:
        raise TicketSetError(f"{opened.url}: split {split} has no sample to draw")
    keys: dict[str, set[str]] = {}
    for _, places in picked:
        for name, key in places:
            keys.setdefault(name, set()).add(key)
    tiles: dict[str, Tiles] = {}
    for name, some in keys.items():  # a shard is opened once
        for sample in opened.stream_shard(name, some):
            ((_, (tile, lit, _)),) = _tiles(opened, sample, [0])
            tiles[sample.key] = [tile, lit]
    rows = [(opened.class_name(label), [tile for _, key in places for tile in tiles[key]]) for label, places in picked]
    selector = opened.manifest.selector
    title = f"{split}: {selector.method} {selector.model or ''}  K = {opened.k} of {opened.num_patches} patches"
    sheet = draw.page(rows, ["view 0", "ticket"] * per_class, title + _what_is_gray(opened))
    return sheet, sum(len(tiles) // 2 for _, tiles in rows), len(rows)


def frequency_maps(found: dict[str, Any]) -> Image.Image:
    """Where tickets lie, overall and in the first classes, of `statistics`."""
    named = [(f"all {found['samples']}", np.array(found["frequency"]))]
    for name, of_class in list(found["per_class"].items())[:MAX_CLASS_MAPS]:
        named.append((f"{name} {of_class['samples']}", np.array(of_class["frequency"])))
    return draw.maps(named, f"{found['split']}: where tickets lie, K = {found['k']} of {found['n']}")


def _tiles(opened: TicketSet, sample: Sample, numbers: Sequence[int]) -> list[tuple[str, Tiles]]:
    """Of each view its name, and [the view, its ticket, its ranking]."""
    rows = []
    for number, tile in zip(numbers, view_tiles(sample, numbers), strict=True):
        lit = draw.ticket_tile(tile, sample.tickets[number], opened.grid)
        heat = draw.rank_tile(tile, sample.rankings[number], opened.grid)
        flip = ", flipped" if sample.views[number][4] else ""
        rows.append((f"view {number}{flip}", [tile, lit, heat]))
    return rows


def view_tiles(sample: Sample, numbers: Sequence[int], side: int = draw.TILE) -> Iterator[Image.Image]:
    """The pixels of some views, whatever the set stores of them; gray where patches of ranked views are not stored.

    Raises:
        ImageError, TicketSetError: as `Sample.pixels` and `Ranked.view`.
    """
    pixels = sample.pixels() if sample.ranked is None and numbers else None
    for number in numbers:
        if sample.ranked is not None:
            stored = sample.ranked.view(number, sample.rankings[number])
            yield draw.view_tile(stored, (0, 0, *stored.shape[:2], 0), side)
        elif pixels is not None:
            yield draw.view_tile(pixels, sample.views[number], side)


def _what_is_gray(opened: TicketSet) -> str:
    ranked = opened.manifest.ranked
    if ranked is None or ranked.tokens == opened.num_patches:
        return ""
    return f"   (the best {ranked.tokens} are stored; flat gray: not stored)"


def pick(table: pa.Table, classes: int, per_class: int) -> Iterator[tuple[int | None, list[tuple[str, str]]]]:
    """(label, [(shard, key)]) of the first images of classes spread over all of them.

    Args:
        table: of `TicketSet.table`.
    """
    by_label: dict[int | None, list[tuple[str, str]]] = {}
    for row in table.select(["key", "label", "status", "shard"]).to_pylist():
        found = by_label.setdefault(row["label"], []) if row["status"] == "ok" else None
        if found is not None and len(found) < per_class:
            found.append((row["shard"], row["key"]))
    labels = sorted(by_label, key=lambda label: (label is not None, label))
    count = min(classes, len(labels))
    for i in range(count):
        label = labels[i * len(labels) // count]
        yield label, by_label[label]
