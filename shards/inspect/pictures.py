"""Which samples a picture shows, and what is written beside them; `draw` puts it on paper."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from shards.errors import TicketSetError
from shards.inspect import draw
from shards.reader import TicketSet
from shards.sample import Sample

MAX_VIEWS = 8
MAX_CLASS_MAPS = 17
MANY, MAX_SHEET = 60, 3000  # images of a sheet: from where on tiles are small; at most

T = TypeVar("T")
Tiles = list[Image.Image]


def sample_page(opened: TicketSet, sample: Sample) -> Image.Image:
    """The first views of one image, each with its ticket and its ranking beside it."""
    tiles = _tiles(opened, sample, range(min(MAX_VIEWS, len(sample.views))))
    title = f"{sample.key}   {opened.class_name(sample.label)}   K = {opened.k} of {opened.num_patches}"
    return draw.page(tiles, ["view", "ticket", "rank"], title + _what_is_gray(opened))


def contact_sheet(opened: TicketSet, split: str, classes: int, per_class: int) -> tuple[Image.Image, str]:
    """Images of several classes, view 0 with its ticket beside it; and how many images of how many classes they are.

    Where nothing is labeled, as many images.

    Raises:
        TicketSetError: the split has no sample, or more is asked for than a picture can hold.
    """
    found = by_label(opened.table(split))
    if not found:
        raise TicketSetError(f"{opened.url}: split {split} has no sample to draw")
    if [*found] == [None]:
        classes, per_class = classes * per_class, 1
        captioned = [(key, [(name, key)]) for name, key in spread(found[None], classes)]
    else:
        captioned = [(opened.class_name(label), found[label][:per_class]) for label in spread([*found], classes)]
    places = [place for _, some in captioned for place in some]
    if len(places) > MAX_SHEET:
        raise TicketSetError(f"`classes` and `per_class`: expected at most {MAX_SHEET} images, got {len(places)}")
    keys: dict[str, set[str]] = {}
    for name, key in places:
        keys.setdefault(name, set()).add(key)
    side = draw.TILE if len(places) <= MANY else draw.SMALL_TILE
    tiles: dict[str, Tiles] = {}
    for name, of_shard in keys.items():  # a shard is opened once
        for sample in opened.stream_shard(name, of_shard):
            ((_, (tile, lit, _)),) = _tiles(opened, sample, [0], side)
            tiles[sample.key] = [tile, lit]
    blocks = [(caption, [tile for _, key in some for tile in tiles[key]]) for caption, some in captioned]
    selector = opened.manifest.selector
    total = sum(map(len, found.values()))
    shown = f"{len(places)} of {total} images"
    if [*found] != [None]:
        shown = f"{len(places)} images of {len(blocks)} of {len(found)} classes"
    title = f"{split}, {shown}: view 0 and its ticket, K = {opened.k} of {opened.num_patches}, {selector.method} {selector.model or ''}"
    return draw.sheet(blocks, title + _what_is_gray(opened)), shown


def frequency_maps(found: dict[str, Any]) -> Image.Image:
    """Where tickets lie, overall and in the first classes, of `statistics`."""
    named = [(f"all {found['samples']}", np.array(found["frequency"]))]
    for name, of_class in list(found["per_class"].items())[:MAX_CLASS_MAPS]:
        named.append((f"{name} {of_class['samples']}", np.array(of_class["frequency"])))
    return draw.maps(named, f"{found['split']}: where tickets lie, K = {found['k']} of {found['n']}")


def _tiles(opened: TicketSet, sample: Sample, numbers: Sequence[int], side: int = draw.TILE) -> list[tuple[str, Tiles]]:
    """Of each view its name, and [the view, its ticket, its ranking]."""
    rows = []
    for number, tile in zip(numbers, view_tiles(sample, numbers, side), strict=True):
        lit = draw.ticket_tile(tile, sample.tickets[number], opened.grid)
        heat = draw.rank_tile(tile, sample.rankings[number], opened.grid)
        flip = ", flipped" if sample.views[number][4] else ""
        rows.append((f"view {number}{flip}", [tile, lit, heat]))
    return rows


def view_tiles(sample: Sample, numbers: Sequence[int], side: int) -> Iterator[Image.Image]:
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


def by_label(table: pa.Table) -> dict[int | None, list[tuple[str, str]]]:
    """(shard, key) of all samples of each class, in the order of the labels.

    Args:
        table: of `TicketSet.table`.
    """
    found: dict[int | None, list[tuple[str, str]]] = {}
    for row in table.select(["key", "label", "status", "shard"]).to_pylist():
        if row["status"] == "ok":
            found.setdefault(row["label"], []).append((row["shard"], row["key"]))
    return dict(sorted(found.items(), key=lambda item: (item[0] is not None, item[0])))


def spread(items: Sequence[T], most: int) -> list[T]:
    """Some of a list, spread over all of it."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
