"""Mixing neighbors of a batch, views 2i and 2i + 1: mixup and CutMix by pixels or by patches, MixToken by places.

By pixels a mixed view's ranking is by the weighted ranks of its two. MixToken is LV-ViT's CutMix on the patch grid: places
are drawn here, trainer.families.lvvit mixes the tokens on the device.
"""

from dataclasses import dataclass

import numpy as np
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from trainer.data.arms import mixed_ranking
from trainer.options import Augment

Mixed = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]
Box = tuple[int, int, int, int]  # top, bottom, left, right, in pixels


def draw(augment: Augment, size: int) -> tuple[float, Box | None]:
    """The share of the own view and, for CutMix, the box of the other's: timm's draw of a batch, from numpy's generator.

    Args:
        size: pixels a side of the views.
    """
    share, use_cutmix = Mixup(augment.mixup, augment.cutmix)._params_per_batch()
    if not use_cutmix or share == 1:
        return float(share), None
    box, share = cutmix_bbox_and_lam((1, 3, size, size), share)
    top, bottom, left, right = (int(v) for v in box)
    return float(share), (top, bottom, left, right)


def covered(box: Box, size: int, patch_size: int) -> np.ndarray:
    """The share of each patch that a box covers: float32 [N]."""
    top, bottom, left, right = box
    pixels = np.zeros((size, size), np.float32)
    pixels[top:bottom, left:right] = 1
    side = size // patch_size
    return pixels.reshape(side, patch_size, side, patch_size).mean(axis=(1, 3)).flatten()


def mix_pixels(augment: Augment, pixels: np.ndarray, rankings: np.ndarray, patch_size: int, whole: bool) -> Mixed:
    """timm's mixup and CutMix, one draw a batch.

    Args:
        pixels: uint8 [B, S, S, 3].
        rankings: [B, N].
        patch_size: in pixels.
        whole: all patches are fed, so that rankings are no matter.
    Returns:
        Pixels and rankings of the mixed views, and `lam`: float32 [B], the share of the own label.
    """
    size = pixels.shape[1]
    share, box = draw(augment, size)
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
        top, bottom, left, right = box
        out[:] = pixels
        out[:, top:bottom, left:right] = pixels[swap, top:bottom, left:right]
        weight = covered(box, size, patch_size)
    if whole:
        return out, rankings, mixed
    return out, np.stack([mixed_ranking(rankings[i], rankings[j], weight) for i, j in enumerate(swap)]), mixed


@dataclass(frozen=True)
class PatchMixing:
    """One batch's mixing by patches: of K, as many of each view's best as its share says.

    No pixel is changed, so a view's first patches are all that is read of it. In CutMix the own patches are those outside a
    box of whole patches, the other view's those inside; where the best K of the two hold too few of these, the next best
    of either view fill up.

    Attributes:
        share: of the own view.
        inside: bool [N], the patches in the box; None in mixup, where two patches may have one place.
        tokens: K.
    """

    share: float
    inside: np.ndarray | None
    tokens: int

    @classmethod
    def draw(cls, augment: Augment, size: int, patch_size: int, tokens: int) -> "PatchMixing":
        """timm's draw of a batch, from numpy's generator; the box is rounded to patches."""
        share, box = draw(augment, size)
        if box is None:
            return cls(share, None, tokens)
        p = patch_size
        top, bottom, left, right = (round(edge / p) * p for edge in box)
        inside = covered((top, bottom, left, right), size, p) > 0
        return cls(1 - float(inside.mean()), inside, tokens)

    @property
    def own(self) -> int:
        """Patches of the own view, where there are enough."""
        return round(self.share * self.tokens)

    @property
    def needed(self) -> int:
        """How many of its best patches must be there of each view."""
        return max(self.own, self.tokens - self.own) if self.inside is None else self.tokens

    def pick(self, rankings: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which patches make the mixed tickets.

        Args:
            rankings: [B, needed], the best patches of each view.
        Returns:
            int64 [B, K] views that they are of, int64 [B, K] their ranks there, and `lam`: float32 [B], the share of the own.
        """
        b = len(rankings)
        views = np.arange(b)
        both = np.stack([rankings, rankings[views ^ 1]], 1)  # [B, 2, needed]
        belongs = (
            np.ones(both.shape, bool) if self.inside is None else self.inside[both] == np.array([[[False], [True]]])
        )
        wanted = np.array([[[self.own], [self.tokens - self.own]]])
        within = belongs.cumsum(2) <= wanted
        # First what belongs and is wanted, then what belongs, then anything; better ranks first, the own view's before.
        order = np.where(belongs, np.where(within, 0, 1), 2).transpose(0, 2, 1).reshape(b, -1)
        chosen = order.argsort(axis=1, kind="stable")[:, : self.tokens]
        ranks, other = chosen // 2, chosen % 2
        return np.where(other == 1, views[:, None] ^ 1, views[:, None]), ranks, (1 - other.mean(1)).astype(np.float32)


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
    inside = cells.flatten()
    partners = np.arange(len(rankings)) ^ 1
    keep = np.stack([mixed_ranking(rankings[i], rankings[j], inside)[:tokens] for i, j in enumerate(partners)])
    return keep, (1 - inside[keep].mean(1)).astype(np.float32)
