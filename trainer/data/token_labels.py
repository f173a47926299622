"""Token labels at training: the map of a whole image, cut to a view.

As LV-ViT (github.com/zihangJiang/TokenLabeling, tlt/data/mixup.py) with ROI-align, but columns before rows in its
boxes, cells with their half pixel, and a flip that turns the patches, not the map. Its maps hold logits, which it
averages before a softmax; ours hold probabilities, which are averaged as they are.
"""

import torch
from torch import Tensor
from torchvision.ops import roi_align


def cut(
    values: Tensor, ids: Tensor, boxes: Tensor, flips: Tensor, grid: tuple[int, int], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Dense targets of a view's patches, and one for the view as a whole.

    The map covers the whole image, squashed to a square, so a box relative to the image is a box of the map, whatever
    the image's shape. What the listed classes lack to 1 is spread evenly over all classes, so that every target sums
    to 1 (the cut is linear: before or after it is the same).

    Args:
        values: float [B, T, G, G], probabilities; axes rank, row (y), column (x).
        ids: int [B, T, G, G], their classes, different ones at each place.
        boxes: [B, 4], top, left, height, width of each view as shares of the image's height, width, height, width.
        flips: bool or int [B]; a flipped view reads its columns from the right.
        grid: (gh, gw), patches of the view.
        num_classes: C.
    Returns:
        float32 [B, gh * gw, C], patches in row-major order, and float32 [B, C].
    """
    batch, _, side, other = values.shape
    assert side == other, f"expected a square map, got {side} x {other}"
    maps = torch.zeros(batch, num_classes, side, side, device=values.device)
    maps.scatter_(1, ids.long(), values.float())
    top, left, height, width = boxes.float().unbind(1)
    numbers = torch.arange(batch, device=values.device, dtype=torch.float32)
    corners = torch.stack([numbers, left, top, left + width, top + height], 1)  # x1, y1, x2, y2: columns first
    dense, whole = (roi_align(maps, corners, size, float(side), aligned=True) for size in (grid, (1, 1)))
    dense = torch.where(flips.bool()[:, None, None, None], dense.flip(3), dense)
    targets = [t.flatten(2).transpose(1, 2) for t in (dense, whole)]  # [B, places, C]
    dense, whole = (t + (1 - t.sum(-1, keepdim=True)) / num_classes for t in targets)
    return dense, whole[:, 0]


def smoothed(targets: Tensor, smoothing: float) -> Tensor:
    """[..., C] distributions, drawn towards the even one; LV-ViT does so to token labels too."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]
