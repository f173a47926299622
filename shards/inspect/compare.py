"""How much two sets' tickets agree, beside what two random selectors would show."""

from typing import Any

import numpy as np

from shards.errors import TicketSetError
from shards.reader import TicketSet


def check_grids(a: TicketSet, b: TicketSet) -> None:
    """
    Raises:
        TicketSetError: other grids, or a set of token labels alone.
    """
    for opened in (a, b):
        opened.require_tickets()
    if a.grid != b.grid:
        raise TicketSetError(f"{a.url} and {b.url}: expected equal patch grids, got {a.grid} and {b.grid}")


def no_common_image(a: TicketSet, b: TicketSet, split: str) -> TicketSetError:
    """The error of two sets that cannot be held side by side."""
    return TicketSetError(f"{a.url} and {b.url}: expected images of split {split} that both hold, got none")


def overlap(a: TicketSet, b: TicketSet, split: str) -> dict[str, Any]:
    """Compare the tickets of images and views that both sets hold.

    Two tickets of Ka and Kb patches overlap by |A and B| / min(Ka, Kb); random ones by max(Ka, Kb) / N.

    Returns:
        images, only_a, only_b, other_views (compared only where the boxes are equal), random {overlap, iou},
        views: one row a view number with count, overlap, iou.
    Raises:
        TicketSetError: other grids, no image in common, or a set of token labels alone.
    """
    check_grids(a, b)
    where = {key: name for name in b.shard_names(split) for key in b.ok_keys(name)}
    sums: dict[int, np.ndarray] = {}
    images = only_a = other_views = 0
    # Shard by shard of `a`, so that memory holds the tickets of one shard and not of both sets: sets of one source by other
    # seeds or shard sizes have the same keys in other shards.
    for name in a.shard_names(split):
        wanted = a.ok_keys(name)
        partners = _samples(b, {where[key] for key in wanted if key in where}, set(wanted))
        for sample in a.stream_shard(name):
            partner = partners.get(sample.key)
            if partner is None:
                only_a += 1
                continue
            images += 1
            for v in range(min(len(sample.views), len(partner[0]))):
                if not (sample.views[v] == partner[0][v]).all():  # patches of other boxes are other places
                    other_views += 1
                    continue
                common = len(np.intersect1d(sample.tickets[v], partner[1][v]))
                row = (1, common / min(a.k, b.k), common / (a.k + b.k - common))
                sums[v] = sums.get(v, np.zeros(3)) + row
    if not images:
        raise no_common_image(a, b, split)
    expected = a.k * b.k / a.num_patches  # patches in common of two random tickets
    return {
        "split": split,
        "k": [a.k, b.k],
        "n": a.num_patches,
        "images": images,
        "only_a": only_a,
        "only_b": len(where) - images,
        "other_views": other_views,
        "random": {"overlap": expected / min(a.k, b.k), "iou": expected / (a.k + b.k - expected)},
        "views": [
            {"view": v, "count": int(s[0]), "overlap": s[1] / s[0], "iou": s[2] / s[0]} for v, s in sorted(sums.items())
        ],
    }


def _samples(b: TicketSet, names: set[str], keys: set[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """key -> (views, tickets)"""
    found = {}
    for name in sorted(names):
        for sample in b.stream_shard(name, keys):
            found[sample.key] = (sample.views, sample.tickets)
    return found
