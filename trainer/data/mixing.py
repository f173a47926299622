"""Mixing neighbors of a batch, views 2i and 2i + 1: mixup and CutMix by pixels, MixToken by places.

A mixed view's ranking is by the weighted ranks of its two. MixToken is LV-ViT's CutMix on the patch grid: places are drawn
here, trainer.families.lvvit mixes the tokens on the device.
"""

import numpy as np
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from trainer.data.arms import mixed_ranking
from trainer.options import Augment

Mixed = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]


class PixelMixing:
    """timm's mixup and CutMix, drawn once a batch from numpy's generator; see trainer.data.augment.seeded."""

    def __init__(self, augment: Augment, patch_size: int) -> None:
        self._draw = Mixup(augment.mixup, augment.cutmix)
        self._patch_size = patch_size

    def __call__(self, pixels: np.ndarray, rankings: np.ndarray, whole: bool) -> Mixed:
        """
        Args:
            pixels: uint8 [B, S, S, 3].
            rankings: [B, N].
            whole: all patches are fed, so that rankings are no matter.
        Returns:
            Pixels and rankings of the mixed views, and `lam`: float32 [B], the share of the own label.
        """
        share, use_cutmix = self._draw._params_per_batch()  # timm's distribution
        size = pixels.shape[1]
        box = None
        if use_cutmix and share < 1:
            box, share = cutmix_bbox_and_lam((1, 3, size, size), share)
        mixed = {"lam": np.full(len(pixels), share, np.float32)}
        if share == 1:
            return pixels, rankings, mixed
        swap = np.arange(len(pixels)) ^ 1
        weight: np.ndarray | float = 1 - share
        out = np.empty_like(pixels)
        if box is None:
            for i, j in enumerate(swap):  # one view at a time stays in the cache
                out[i] = np.rint(pixels[i].astype(np.float32) * share + pixels[j].astype(np.float32) * (1 - share))
        else:
            top, bottom, left, right = (int(v) for v in box)
            out[:] = pixels
            out[:, top:bottom, left:right] = pixels[swap, top:bottom, left:right]
            weight = self._covered(size, top, bottom, left, right)
        if whole:
            return out, rankings, mixed
        return out, np.stack([mixed_ranking(rankings[i], rankings[j], weight) for i, j in enumerate(swap)]), mixed

    def _covered(self, size: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The share of each patch that a box of pixels covers: [N]."""
        covered = np.zeros((size, size), np.float32)
        covered[top:bottom, left:right] = 1
        p = self._patch_size
        return covered.reshape(size // p, p, size // p, p).mean(axis=(1, 3)).flatten()


def draw_box(grid: tuple[int, int]) -> np.ndarray:
    """int64 [4], a box of MixToken; draws from numpy's global generator, see trainer.data.augment.seeded.

    As the public code: a share uniform in [0, 1) (its Beta(1, 1)), sides rounded down to even numbers of cells, a
    uniform center, cut off at the grid's border. It may be empty.
    """
    ratio = np.sqrt(1 - np.random.beta(1, 1))
    halves = [int(side * ratio) // 2 for side in grid]
    centers = [np.random.randint(side) for side in grid]
    spans = [(max(c - h, 0), min(c + h, side)) for c, h, side in zip(centers, halves, grid, strict=True)]
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
