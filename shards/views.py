"""Views: which part of an image is looked at, and the patch grid laid over it.

A view is (top, left, height, width, flip): a box in pixels of the STORED image, then a horizontal
flip. Boxes and flips are a pure function of (seed, key, view number): the random numbers are blake2b
digests, so no batch, worker, restart or numpy version can change them.

The distribution is that of torchvision's RandomResizedCrop and RandomHorizontalFlip.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np

CROP_PCT = 0.875


def canonical_view(width: int, height: int) -> tuple[int, int, int, int, int]:
    """View 0: the centered square of round(.875 * short side), offsets floored, no flip."""
    side = max(1, round(CROP_PCT * min(width, height)))
    return (height - side) // 2, (width - side) // 2, side, side, 0


def image_views(
    seed: int,
    key: str,
    count: int,
    width: int,
    height: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> np.ndarray:
    """All views of one image.

    Args:
        seed: of the set.
        key: of the image.
        count: V, the canonical view included.
        width: of the stored image, in pixels.
        height: of the stored image, in pixels.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height.
        hflip: probability of a flip.
    Returns:
        int32 [V, 5]: top, left, height, width, flip.
    """
    views = [canonical_view(width, height)]
    for number in range(1, count):
        draw = _uniforms(seed, key, number)
        flip = next(draw) < hflip
        views.append((*_random_box(draw, width, height, scale, ratio), int(flip)))
    return np.array(views, np.int32).reshape(count, 5)


def center_distance(grid: tuple[int, int]) -> np.ndarray:
    """Squared distance of every patch's center to the view's, in half patches, so that ties are exact: int [N]."""
    rows, columns = np.indices(grid)
    return ((2 * rows - grid[0] + 1) ** 2 + (2 * columns - grid[1] + 1) ** 2).flatten()


def center_ranking(grid: tuple[int, int]) -> np.ndarray:
    """[N] patches, nearest to the center first, ties to the lower index: the order of method center."""
    return np.argsort(center_distance(grid), kind="stable")


def view_seed(seed: int, key: str, number: int) -> int:
    """A 63-bit seed of one view, for selectors that draw at random."""
    return int.from_bytes(_block(seed, key, number, 0)[56:], "little") >> 1


def _random_box(
    draw: Iterator[float], width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as torchvision's RandomResizedCrop.get_params: ten tries, then the center."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * next(draw))
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * next(draw))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        u, v = next(draw), next(draw)
        if 0 < w <= width and 0 < h <= height:
            return int(u * (height - h + 1)), int(v * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _uniforms(seed: int, key: str, number: int) -> Iterator[float]:
    """Endless floats in [0, 1), 53 bits each."""
    counter = 0
    while True:
        block = _block(seed, key, number, counter)
        for i in range(0, 56, 8):  # the eighth word is view_seed's
            yield (int.from_bytes(block[i : i + 8], "little") >> 11) * 2.0**-53
        counter += 1


def _block(seed: int, key: str, number: int, counter: int) -> bytes:
    return hashlib.blake2b(f"view/{seed}/{key}/{number}/{counter}".encode()).digest()
