"""Token labels: the T likeliest classes at each place of a whole image, one member KEY.labels.npy a sample.

An array uint16 [2, T, G, G]. Plane 0 holds probabilities in units of 1/65535, plane 1 class numbers. Axis 1 is the
rank, likeliest first; axis 2 the row (y, from the top), axis 3 the column (x, from the left). T is 5, or the number of
classes where that is less.

Coordinates: the map is laid over the WHOLE stored image, in the frame that boxes refer to, squashed to a square. Row i
covers the heights i/G to (i+1)/G of the image and column j the widths j/G to (j+1)/G, so a box of (top, left, height,
width) in pixels of a W x H image is rows G*top/H to G*(top+height)/H and columns G*left/W to G*(left+width)/W of the
map. Nothing is flipped: a view that is flipped reads its columns from the right, after the cut.
"""

from collections.abc import Iterator

import numpy as np

from shards import format as fmt
from shards.errors import TicketSetError

TOP = 5
UNIT = 65535
MAX_CLASSES = 65536


def shape(num_classes: int, side: int) -> tuple[int, int, int, int]:
    """(2, T, G, G)"""
    return 2, min(TOP, num_classes), side, side


def encode(probabilities: np.ndarray, classes: np.ndarray) -> bytes:
    """The member of one image from float and int [T, G, G], likeliest first."""
    units = np.rint(probabilities.astype(np.float64) * UNIT)
    return fmt.encode_npy(np.stack([units, classes]).astype("<u2"))


def decode(data: bytes, expected: tuple[int, ...], num_classes: int, where: str) -> np.ndarray:
    """uint16 [2, T, G, G], read-only.

    Args:
        data: of the member.
        expected: its shape.
        num_classes: of the set.
        where: for the error.
    Raises:
        TicketSetError: it is no such array, or names a class that the set lacks.
    """
    array = fmt.decode_npy(data, where)
    if array.dtype != np.uint16 or array.shape != expected:
        raise TicketSetError(
            f"{where}: expected token labels uint16 {list(expected)}, got {array.dtype} {list(array.shape)}"
        )
    if array[1].max() >= num_classes:
        raise TicketSetError(f"{where}: token labels: expected classes below {num_classes}, got {array[1].max()}")
    return array


def probabilities(labels: np.ndarray) -> np.ndarray:
    """float32 [T, G, G] of a decoded member; what they lack to 1 belongs to the classes that are not listed."""
    shares: np.ndarray = labels[0].astype(np.float32) / UNIT
    return shares


def problems(labels: np.ndarray) -> Iterator[str]:
    """What is wrong with a decoded member besides what `decode` refuses, for `verify`."""
    units, classes = labels.astype(np.int64)
    if (np.diff(np.sort(classes, axis=0), axis=0) == 0).any():
        yield "token labels: a class stands twice at one place"
    if (np.diff(units, axis=0) > 0).any():
        yield "token labels: expected falling probabilities at every place"
    if (units.sum(axis=0) > UNIT + len(units)).any():  # each may have been rounded up
        yield f"token labels: probabilities of a place sum to {units.sum(axis=0).max() / UNIT:.3f}"
