"""Which samples a picture shows, and what is written beside them; `draw` puts it on paper."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
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
    by_label = _by_label(opened, split)
    if [*by_label] == [None]:
        classes, per_class = classes * per_class, 1
        captioned = [(key, [(name, key)]) for name, key in _spread(by_label[None], classes)]
    else:
        labels = _spread(sorted(by_label, key=lambda label: (label is not None, label)), classes)
        captioned = [(opened.class_name(label), by_label[label][:per_class]) for label in labels]
    places = [place for _, some in captioned for place in some]
    if len(places) > MAX_SHEET:
        raise TicketSetError(f"`classes` and `per_class`: expected at most {MAX_SHEET} images, got {len(places)}")
    keys: dict[str, set[str]] = {}
    for name, key in places:
        keys.setdefault(name, set()).add(key)
    side = draw.TILE if len(places) <= MANY else draw.SMALL_TILE
    tiles: dict[str, Tiles] = {}
    for name, found in keys.items():  # a shard is opened once
        for sample in opened.stream_shard(name, found):
            ((_, (tile, lit, _)),) = _tiles(opened, sample, [0], side)
            tiles[sample.key] = [tile, lit]
    blocks = [(caption, [tile for _, key in some for tile in tiles[key]]) for caption, some in captioned]
    selector = opened.manifest.selector
    total = sum(map(len, by_label.values()))
    shown = f"{len(places)} of {total} images"
    if [*by_label] != [None]:
        shown = f"{len(places)} images of {len(blocks)} of {len(by_label)} classes"
    title = f"{split}, {shown}: view 0 and its ticket, K = {opened.k} of {opened.num_patches}, {selector.method} {selector.model or ''}"
    return draw.sheet(blocks, title + _what_is_gray(opened)), shown


def frequency_maps(found: dict[str, Any]) -> Image.Image:
    """Where tickets lie, overall and in the first classes, of `statistics`."""
    named = [(f"all {found['samples']}", np.array(found["frequency"]))]
    for name, of_class in list(found["per_class"].items())[:MAX_CLASS_MAPS]:
        named.append((f"{name} {of_class['samples']}", np.array(of_class["frequency"])))
    return draw.maps(named, f"{found['split']}: where tickets lie, K = {found['k']} of {found['n']}")


def _tiles(opened: TicketSet, sample: Sample, numbers: Iterable[int], side: int = draw.TILE) -> list[tuple[str, Tiles]]:
    """Of each view its name, and [the view, its ticket, its ranking]."""
    pixels = sample.pixels() if sample.ranked is None else None
    rows = []
    for number in numbers:
        if sample.ranked is not None:
            stored = sample.ranked.view(number, sample.rankings[number])
            tile = draw.view_tile(stored, (0, 0, *stored.shape[:2], 0), side)
        elif pixels is not None:
            tile = draw.view_tile(pixels, sample.views[number], side)
        lit = draw.ticket_tile(tile, sample.tickets[number], opened.grid)
        heat = draw.rank_tile(tile, sample.rankings[number], opened.grid)
        flip = ", flipped" if sample.views[number][4] else ""
        rows.append((f"view {number}{flip}", [tile, lit, heat]))
    return rows


def _what_is_gray(opened: TicketSet) -> str:
    ranked = opened.manifest.ranked
    if ranked is None or ranked.tokens == opened.num_patches:
        return ""
    return f"   (the best {ranked.tokens} are stored; flat gray: not stored)"


def _by_label(opened: TicketSet, split: str) -> dict[int | None, list[tuple[str, str]]]:
    """(shard, key) of all samples of each class.

    Raises:
        TicketSetError: there is none.
    """
    by_label: dict[int | None, list[tuple[str, str]]] = {}
    for row in opened.table(split).select(["key", "label", "status", "shard"]).to_pylist():
        if row["status"] == "ok":
            by_label.setdefault(row["label"], []).append((row["shard"], row["key"]))
    if not by_label:
        raise TicketSetError(f"{opened.url}: split {split} has no sample to draw")
    return by_label


def _spread(items: Sequence[T], most: int) -> list[T]:
    """Some of a list, spread over all of it."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
