"""Arms: which ranking of a view's patches a run trains on; its first K make the ticket."""

import functools
import math

import numpy as np

from shards.permutation import permutation, random_words
from shards.views import center_distance, center_ranking

GLIP_VARIANCE = 0.2  # what GLIP's code calls std; the first and last patch of a row are at -1 and 1


def arm_ranking(
    arm: str, mined: np.ndarray, grid: tuple[int, int], *, fixed_name: str = "", fresh_name: str = ""
) -> np.ndarray:
    """The ranking of one view for an arm.

    Args:
        arm: of `trainer.options.ARMS`.
        mined: [N], most informative first.
        grid: (gh, gw).
        fixed_name: names the image and view; all that random-fixed depends on.
        fresh_name: names the sample of the epoch; all that random and gaussian depend on.
    Returns:
        [N] patch indices. `full` keeps raster order, so that its K = N patches are the plain view.
    """
    if arm == "winning":
        return mined
    if arm == "inverse":
        return mined[::-1]
    if arm == "center":
        return center_ranking(grid)
    if arm == "full":
        return np.arange(grid[0] * grid[1])  # also where the student looks at a coarser grid
    if arm == "gaussian":
        uniform = (random_words(len(mined), arm, fresh_name) >> 11) * 2.0**-53
        return np.argsort(-(uniform + center_density(grid)), kind="stable")
    return permutation(len(mined), arm, {"random": fresh_name, "random-fixed": fixed_name}[arm])


@functools.lru_cache(maxsize=8)
def center_density(grid: tuple[int, int]) -> np.ndarray:
    """What arm gaussian adds to a patch's uniform number in [0, 1): the density of a Gaussian about the view's center.

    The K patches with the greatest sums are kept, as by `PatchDropout` of github.com/MingliangLiang3/GLIP; draws weighted
    by the density would keep fewer at the border.

    Source: Liang and Larson, Centered Masking for Language-Image Pre-Training (ECML 2024).

    Args:
        grid: (g, g).
    Returns:
        float64 [N].
    """
    distance = center_distance(grid) / max(1, grid[0] - 1) ** 2  # squared, in half the grid
    return np.exp(-distance / (2 * GLIP_VARIANCE)) / (2 * math.pi * GLIP_VARIANCE)


def mixed_ranking(own: np.ndarray, other: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """The ranking of a view that is mixed with another: patches by their weighted rank, ties to the lower index.

    Args:
        own: [N] ranking.
        other: [N] ranking of the partner.
        share: of the partner in each patch, [N], or one number for all: 1 - lambda in mixup, the covered share
            in CutMix.
    """
    ranks = np.empty((2, len(own)))
    ranks[0, own] = ranks[1, other] = np.arange(len(own))
    return np.argsort((1 - share) * ranks[0] + share * ranks[1], kind="stable")
