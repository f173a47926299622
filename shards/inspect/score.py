"""Object-patch recall: of the patches that lie on the object, how many does the ticket keep?

A patch is an object patch where at least half of its pixels are inside the true mask.
"""

from typing import Any

import numpy as np

from shards.errors import TicketSetError
from shards.masks import mask_path, object_shares
from shards.reader import TicketSet
from shards.views import center_ranking

HALF = 0.5


def recall(opened: TicketSet, split: str, masks: str, tokens: list[int]) -> dict[str, Any]:
    """Mean recall of view 0's tickets over images, beside nearest-to-center and random patches.

    Args:
        opened: the set.
        split: its split.
        masks: their folder, see `shards.masks`.
        tokens: the K to score.
    Returns:
        images, without_mask, without_object, mean_object_patches, rows: k, ticket, stderr, center, random.
    Raises:
        TicketSetError: no image has a mask, or the set holds token labels alone.
        ImageError: a mask that is none.
    """
    opened.require_tickets()
    n = opened.num_patches
    center = center_ranking(opened.grid)
    hits: list[np.ndarray] = []  # per image [len(tokens), 2]: ticket, center
    counts = []
    without_mask = without_object = 0
    for name in opened.shard_names(split):
        rows = {row["key"]: row for row in opened.shard_table(name).to_pylist()}
        for sample in opened.stream_shard(name):
            row = rows[sample.key]
            path = mask_path(masks, row["source"])
            if path is None:
                without_mask += 1
                continue
            patches = object_shares(path, (row["width"], row["height"]), sample.views[:1], opened.grid)[0] >= HALF
            if not patches.any():
                without_object += 1
                continue
            counts.append(patches.sum())
            hits.append(np.array([[patches[r[:k]].sum() for r in (sample.rankings[0], center)] for k in tokens]))
    if not hits:
        raise TicketSetError(f"score: no image of split {split} has a mask with an object under {masks}")
    shares = np.array(hits) / np.array(counts)[:, None, None]  # [images, tokens, 2]
    # Over images, since each has its own object; of one image there is no spread to take.
    stderr = shares[:, :, 0].std(axis=0, ddof=min(1, len(shares) - 1)) / np.sqrt(len(shares))
    return {
        "split": split,
        "images": len(hits),
        "without_mask": without_mask,
        "without_object": without_object,
        "mean_object_patches": float(np.mean(counts)),
        "n": n,
        "rows": [
            {"k": k, "ticket": float(m[0]), "stderr": float(e), "center": float(m[1]), "random": k / n}
            for k, m, e in zip(tokens, shares.mean(axis=0), stderr, strict=True)
        ],
    }
