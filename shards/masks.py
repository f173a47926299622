"""True masks of objects: a folder of PNGs, white on the object and black elsewhere, named as the images that they are of."""

import os

import numpy as np
from PIL import Image

from shards.errors import ImageError, is_machine_error
from shards.images import decode

MAX_BYTES = 1 << 28  # of a file; as many as the largest image has pixels, in color
WHITE = 128  # from this level of gray on


def mask_path(folder: str, source: str) -> str | None:
    """The mask of an image; None where there is none.

    Args:
        folder: of the masks.
        source: of the image, such as train/bird/x.jpg: its mask is train/bird/x.png or bird/x.png.
    """
    stem = os.path.splitext(source)[0]
    for candidate in (stem, stem.partition("/")[2]):
        path = os.path.join(folder, candidate + ".png")
        inside = not (os.path.isabs(candidate) or ".." in candidate.split("/") or "\0" in candidate)
        if candidate and inside and os.path.isfile(path):
            return path
    return None


def object_shares(path: str, size: tuple[int, int], views: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which share of each patch's pixels lies on the object, of views of one image: float32 [V, N].

    Args:
        path: of the mask; it may be larger or smaller than the image, of which it has the shape.
        size: (width, height) of the stored image.
        views: [V, 5], boxes in its frame.
        grid: (gh, gw).
    Raises:
        ImageError: the mask cannot be read, is of another shape, or is gray at most.
    """
    mask = _read(path)
    (width, height), (across, down) = size, (mask.width / size[0], mask.height / size[1])
    # A side that was scaled is off by half a pixel.
    if abs(mask.width * height - mask.height * width) > max(mask.width, mask.height, width, height):
        raise ImageError(
            f"mask {path}: expected the shape of the image, {width}x{height}, got {mask.width}x{mask.height}"
        )
    shares = np.empty((len(views), *grid), np.float32)
    for slot, (top, left, rows, columns, flip) in zip(shares, np.asarray(views).tolist(), strict=True):
        right, bottom = min((left + columns) * across, mask.width), min((top + rows) * down, mask.height)
        box = (left * across, top * down, right, bottom)
        cells = np.asarray(mask.resize(grid[::-1], Image.Resampling.BOX, box))
        slot[:] = cells[:, :: -1 if flip else 1] / 255
    return shares.reshape(len(views), -1)


def _read(path: str) -> Image.Image:
    """Numbers 0 and 255."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        if is_machine_error(error):
            raise
        raise ImageError(f"mask {path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ImageError(f"mask {path}: expected at most {MAX_BYTES} bytes, got more")
    try:
        gray = Image.fromarray(decode(data)).convert("L")  # its size is checked before it is decoded
    except ImageError as error:
        raise ImageError(f"mask {path}: {error}") from None
    lightest = int(np.asarray(gray).max())
    if 0 < lightest < WHITE:  # numbers of classes, or 1 for the object
        raise ImageError(f"mask {path}: expected 255 on the object and 0 elsewhere, got {lightest} at most")
    return gray.point(lambda level: 255 if level >= WHITE else 0).convert("F")
