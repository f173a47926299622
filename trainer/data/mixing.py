"""MixToken for sets of tokens: LV-ViT's CutMix on the patch grid, as far as the feed draws it; ticket_lvvit.py does the rest."""

import numpy as np

from trainer.data.arms import mixed_ranking


def draw_box(grid: tuple[int, int]) -> np.ndarray:
    """int64 [4], a box of MixToken; draws from numpy's global generator, see trainer.data.augment.seeded.

    As the public code: a share uniform in [0, 1) (its Beta(1, 1)), sides rounded down to even numbers of cells, a
    uniform centre, cut off at the grid's border. It may be empty.
    """
    ratio = np.sqrt(1 - np.random.beta(1, 1))
    halves = [int(side * ratio) // 2 for side in grid]
    centres = [np.random.randint(side) for side in grid]
    spans = [(max(c - h, 0), min(c + h, side)) for c, h, side in zip(centres, halves, grid, strict=True)]
    return np.array(spans, np.int64).flatten()


def mixed_tickets(
    rankings: np.ndarray, box: np.ndarray, grid: tuple[int, int], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tickets of mixed views: the K best places, inside the box by the partner's rank, outside by their own.

    Args:
        rankings: [B, N] of the views, not mixed.
        box: [4].
        grid: (gh, gw).
        tokens: K.
    Returns:
        int64 [B, K] places, best first, and float32 [B], lambda: the share of them outside the box.
    """
    top, bottom, left, right = box
    cells = np.zeros(grid)
    cells[top:bottom, left:right] = 1
    covered = cells.flatten()
    partners = np.arange(len(rankings)) ^ 1
    keep = np.stack([mixed_ranking(rankings[i], rankings[j], covered)[:tokens] for i, j in enumerate(partners)])
    return keep, (1 - covered[keep].mean(1)).astype(np.float32)
