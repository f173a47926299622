"""How a view's scores are spread: how many patches hold half of the score, and how many nearly all of it.

The index of a set holds it for every view of an image (`spread`, since 1.3), so that a ticket may be as long as its view
asks for (`trainer.data.lengths`).
"""

import numpy as np

from shards import format as fmt

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of a view's score
_TIES = 1 - 1e-9  # a sum that reaches a share but for rounding has reached it


def spread_of(scores: np.ndarray) -> np.ndarray:
    """The fewest patches that hold each of SHARES of the scores.

    Args:
        scores: [V, N].
    Returns:
        int64 [V, 7], not falling; 0 where a view's scores are no distribution: one is negative, or all are 0.
    """
    held = np.sort(scores.astype(np.float64), axis=1)[:, ::-1].cumsum(1)  # by the best patch, the best two, ...
    wanted = held[:, -1:] * np.array(SHARES) * _TIES
    counts = 1 + (held[:, None] < wanted[..., None]).sum(2)
    counts[(scores.min(1) < 0) | (held[:, -1] == 0)] = 0
    return counts


def encode(counts: np.ndarray, num_patches: int) -> bytes | None:
    """The index's value of an image; None where one of its views has none.

    Args:
        counts: [V, 7] of `spread_of`. At most 0.98 N, rounded up: where a patch's number fits a byte, so does each.
        num_patches: N.
    """
    return counts.astype(fmt.ranking_dtype(num_patches)).tobytes() if counts.all() else None


def size(views: int, num_patches: int) -> int:
    """Bytes of an image's value."""
    return views * len(SHARES) * fmt.ranking_dtype(num_patches).itemsize


def decode(values: list[bytes | None], views: int, num_patches: int) -> np.ndarray:
    """uint8 (uint16 where N > 256) [images, V, 7], all 0 where an image has none."""
    none = bytes(size(views, num_patches))
    data = b"".join(none if value is None else value for value in values)
    return np.frombuffer(data, fmt.ranking_dtype(num_patches)).reshape(len(values), views, len(SHARES))


def is_sound(counts: np.ndarray, num_patches: int) -> np.ndarray:
    """bool [images]: whether each view's counts rise within 1 to N, or the image has none.

    Args:
        counts: [images, V, 7] of `decode`.
    """
    bounds = (counts[..., 0] >= 1) & (counts[..., -1] <= num_patches)
    rises = (counts[..., 1:] >= counts[..., :-1]).all(2)
    return np.asarray((bounds & rises).all(1) | ~counts.any((1, 2)))
