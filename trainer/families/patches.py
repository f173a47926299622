"""Images as patches and back, on tensors.

Shapes: B images, N = gh * gw patches in row-major order, K of them kept, F = C*p*p values of a patch in the order of a
stem's weights: channel, row, column.
"""

import functools

import torch
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C*p*p], row-major, each patch in the order of the stem's weights."""
    b, c, h, w = images.shape
    p = patch_size
    return images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)


def gather_patches(patches: Tensor, keep_indices: Tensor) -> Tensor:
    """[B, N, F] and [B, K] -> [B, K, F]"""
    return patches.gather(1, keep_indices[:, :, None].expand(-1, -1, patches.shape[-1]))


def scatter_patches(patches: Tensor, keep_indices: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of patchify and gather: [B, K, C*p*p] -> [B, C, H, W], zero where a patch was dropped."""
    b, _, size = patches.shape
    blank = patches.new_zeros(b, grid[0] * grid[1], size)
    return unpatchify(blank.scatter(1, keep_indices[:, :, None].expand(-1, -1, size), patches), grid, patch_size)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of patchify: [B, N, C*p*p] -> [B, C, H, W]"""
    b, p = len(patches), patch_size
    cells = patches.reshape(b, *grid, -1, p, p)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, grid[0] * p, grid[1] * p)


def normalize(patches: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, K, 3*p*p] -> float32, by a model's mean and std in [0, 1]."""
    b, k, _ = patches.shape
    low, spread = _levels(mean, patches.device), _levels(std, patches.device)
    return patches.view(b, k, 3, -1).float().sub_(low).div_(spread).view(b, k, -1)


@functools.lru_cache(maxsize=8)
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1] in uint8 levels, made once: a copy from the host in every step would make it wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).mul(255)[:, None]
