"""Patches out of decoded pixels, each as a stem's weights have them: channels, rows, columns.

trainer.families.patches on numpy and in one go: dropped patches are never copied. A patch's row of p bytes is moved as one
number; byte by byte it takes three times as long.
"""

import numpy as np

from shards.ranked import Mosaic


def gather(pixels: np.ndarray, keep: np.ndarray, patch_size: int) -> np.ndarray:
    """Kept patches of whole views: uint8 [B, S, S, 3] and [B, K] -> uint8 [B, K, 3*p*p]."""
    (b, side, _, _), p = pixels.shape, patch_size
    width = side // p
    out = np.empty((b, keep.shape[1], 3 * p * p), np.uint8)
    for view, places, slot in zip(pixels, keep, out, strict=True):
        _rows(slot, p)[:] = _cells(view, p)[places // width, places % width]
    return out


def first_patches(pixels: np.ndarray, mosaic: Mosaic, out: np.ndarray) -> None:
    """The first K patches of a mosaic's rows, uint8 [rows * cell, gw * cell, 3], into `out`, uint8 [K, 3*p*p]."""
    p, width = mosaic.patch, mosaic.grid[1]
    cells, patches = _cells(mosaic.bare(pixels), p), _rows(out, p)
    full, rest = divmod(len(out), width)
    patches[: full * width].reshape(full, width, 3, p)[:] = cells[:full]
    if rest:
        patches[full * width :] = cells[full, :rest]


def _cells(pixels: np.ndarray, p: int) -> np.ndarray:
    """uint8 [H, W, 3] -> a view of a copy, [H/p, W/p, 3, p], of rows of p bytes."""
    height, width, _ = pixels.shape
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return planes.view(f"V{p}").reshape(3, height // p, p, width // p).transpose(1, 3, 0, 2)


def _rows(patches: np.ndarray, p: int) -> np.ndarray:
    """uint8 [K, 3*p*p] -> the same memory as rows of p bytes, [K, 3, p]."""
    return patches.view(f"V{p}").reshape(len(patches), 3, p)
