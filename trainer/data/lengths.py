"""Tickets of varying length: K of a view by how its scores are spread, and parts of batches of one K each.

A view gets as many patches as hold a share of its score, rounded up to one of a few sizes. The share is one for all views
of a run, such that they get the asked number on average.
"""

import logging
from dataclasses import dataclass

import numpy as np

from shards import spread
from shards.errors import TicketSetError
from shards.permutation import permutation
from shards.reader import TicketSet

log = logging.getLogger("datalth")
MAX_SIZES = 8  # torch.compile makes a graph of each, and gives up after 8
WINDOW = 32  # batches among which samples are sorted
# K that a step has. Steps of a single one learn worse, also on random patches; not so where K has nothing to do with the view
# (docs/RESULTS.md).
PARTS = 4
STEPS = 1_000_000  # the share is a whole number of millionths, so that it is found exactly and read back from any file


@dataclass(frozen=True)
class Lengths:
    """K of a view, by how its scores are spread.

    Attributes:
        sizes: the K that there are, rising: whole rows of a mosaic.
        share: of a view's score that its ticket holds, before K is rounded up to a size.
        num_patches: N of a view.
    """

    sizes: tuple[int, ...]
    share: float
    num_patches: int

    @classmethod
    def fit(cls, counts: np.ndarray, budget: int, sizes: tuple[int, ...], num_patches: int) -> "Lengths":
        """The greatest share by which views have at most `budget` patches on average, after rounding.

        Args:
            counts: [..., 7] of the views, of `shards.spread`.
        Raises:
            TicketSetError: even the smallest size is above the budget.
        """
        if budget < sizes[0]:
            raise TicketSetError(
                f"`tokens` auto:{budget}: expected at least {sizes[0]}, the smallest of the sizes {', '.join(map(str, sizes))}"
            )
        low, high = 0, STEPS + 1  # the mean is within the budget at `low`, and not known to be at `high`
        while high - low > 1:
            middle = (low + high) // 2
            within = cls(sizes, middle / STEPS, num_patches).of(counts).mean() <= budget
            low, high = (middle, high) if within else (low, middle)
        return cls(sizes, low / STEPS, num_patches)

    def of(self, counts: np.ndarray) -> np.ndarray:
        """K of views: int64 [...].

        Between two shares that the set knows the patches are interpolated; 0 of them hold nothing, N all.

        Args:
            counts: [..., 7] of the views, of `shards.spread`.
        """
        shares = (0.0, *spread.SHARES, 1.0)
        after = max(1, int(np.searchsorted(shares, self.share)))  # the share is in (shares[after - 1], shares[after]]
        part = (self.share - shares[after - 1]) / (shares[after] - shares[after - 1])
        low, high = (self._held(counts, place) for place in (after - 1, after))
        needed = low + part * (high - low)
        places = np.searchsorted(self.sizes, needed - 1e-6)  # 24 patches are 24, however 20 + 0.5 * 8 was rounded
        return np.asarray(self.sizes, np.int64)[np.minimum(places, len(self.sizes) - 1)]

    def _held(self, counts: np.ndarray, place: int) -> np.ndarray:
        """Patches that hold (0, *SHARES, 1)[place] of the score: float64 [...]."""
        if 0 < place <= len(spread.SHARES):
            return counts[..., place - 1].astype(np.float64)
        return np.full(counts.shape[:-1], float(self.num_patches if place else 0))


def sizes_of(opened: TicketSet) -> tuple[int, ...]:
    """The K that tickets of a set may have: 8 at most, whole rows of a mosaic, all that are stored among them."""
    width = opened.grid[1]
    rows = opened.stored_tokens // width
    step = -(-rows // MAX_SIZES)
    return tuple(width * min(row, rows) for row in range(step, rows + step, step))


def known(counts: np.ndarray, opened: TicketSet) -> np.ndarray:
    """Counts of all images [images, V, 7]; where one has none, those of views whose patches all score alike.

    Raises:
        TicketSetError: no image has any.
    """
    none = np.asarray(~counts.any((1, 2)))
    if none.all():
        raise TicketSetError(
            f"{opened.url}: does not say how its views' scores are spread, which tickets of varying length go by"
            f" (`tokens` K takes K patches of each): "
            + (
                f"the scores of method {opened.manifest.selector.method} are no shares of a whole"
                if opened.says_spread
                else f"its format is {'.'.join(map(str, opened.manifest.format))}, expected 1.3 or above; mine it again"
            )
        )
    if none.any():
        log.info(
            f"{none.sum()} of {len(none)} images do not say how their scores are spread: taken as alike everywhere"
        )
        counts = counts.copy()
        counts[none] = np.ceil(np.array(spread.SHARES) * opened.num_patches)
    return counts


def shares_of(tokens: np.ndarray) -> dict[int, float]:
    """{K: the share of views that have it}."""
    sizes, counts = np.unique(tokens, return_counts=True)
    return {int(size): float(count / tokens.size) for size, count in zip(sizes, counts, strict=True)}


def batches_by_length(
    tokens: np.ndarray,
    sizes: tuple[int, ...],
    shape: tuple[int, int, int],
    paired: bool,
    seed: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """An epoch in parts of one K each: int64 [steps, global_batch], positions in the epoch's order, and int64 [steps, parts], K.

    Within each window of batches samples are sorted by their K and cut into parts; these are shown in a permuted order, so
    that a batch has parts of several K. Where a part holds several, it has the size nearest to their mean.

    Args:
        tokens: K of each sample in the epoch's order.
        sizes: the K that there are, rising.
        shape: steps, parts of each, samples of a part; past the end the epoch begins anew.
        paired: neighbors (2i, 2i + 1) stay neighbors, and are sorted by what they have together.
        seed, epoch: name the permutations.
    """
    unit, (steps, parts, size) = 2 if paired else 1, shape
    order = (np.arange(steps * parts * size) % len(tokens)).reshape(steps, -1)
    shown = np.empty(shape, np.int64)
    for first in range(0, steps, WINDOW):
        units = order[first : first + WINDOW].reshape(-1, unit)
        cut = units[tokens[units].sum(1).argsort(kind="stable")].reshape(-1, size)
        shown[first : first + WINDOW] = cut[permutation(len(cut), "lengths", seed, epoch, first)].reshape(
            -1, parts, size
        )
    means = tokens[shown].mean(2, keepdims=True)
    return shown.reshape(steps, -1), np.asarray(sizes, np.int64)[np.abs(means - np.array(sizes)).argmin(2)]
