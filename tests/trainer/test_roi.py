"""The cut of token labels to a view: an asymmetric map tells rows from columns, left from right, tall from wide."""

import pytest
import torch
from torch import Tensor

from trainer.data import token_labels
from trainer.data.token_labels import cut, smoothed

C = 12


def asymmetric(side: int = 6) -> tuple[Tensor, Tensor]:
    """One image: class 0 has probability 0.8 * row / side, class 1 0.1 * column / side; y and x differ by 8."""
    row, column = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    values = torch.stack([0.8 * row, 0.1 * column])[None]
    ids = torch.stack([torch.zeros(side, side), torch.ones(side, side)])[None].long()
    return values, ids


def fields(dense: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(class 0, class 1) over the view's grid, without the evenly spread rest."""
    rest = dense[0, :, 2:].mean(1, keepdim=True)
    listed = (dense[0] - rest)[:, :2].view(*grid, 2)
    return listed[..., 0], listed[..., 1]


def expected(box: tuple[float, ...], grid: tuple[int, int], flip: bool, side: int = 6) -> tuple[Tensor, Tensor]:
    """By hand: the map is linear in y and x, so a patch's mean is the map at its center (cells have theirs at +.5)."""
    top, left, height, width = box
    y = top + height * (torch.arange(grid[0]) + 0.5) / grid[0]
    x = left + width * (torch.arange(grid[1]) + 0.5) / grid[1]
    x = x.flip(0) if flip else x
    rows, columns = y - 0.5 / side, x - 0.5 / side
    return (0.8 * rows)[:, None].expand(grid), (0.1 * columns)[None].expand(grid)


# Inside the cells' centers (1/12 to 11/12), where bilinear interpolation of a linear map is exact.
BOXES = [(0.1, 0.1, 0.8, 0.8), (0.5, 0.1, 0.3, 0.75), (0.1, 0.6, 0.75, 0.25)]


def mistakes(box: tuple[float, ...], grid: tuple[int, int], flip: bool) -> float:
    """The greatest difference between `cut` and the hand-made answer."""
    values, ids = asymmetric()
    dense, _ = cut(values, ids, torch.tensor([box]), torch.tensor([flip]), grid, C)
    pairs = zip(fields(dense, grid), expected(box, grid, flip), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("grid", [(7, 7), (3, 5)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_patch_has_the_labels_of_its_place(box, grid, flip):
    assert mistakes(box, grid, flip) < 1e-5


def test_swapped_axes_would_be_noticed(monkeypatch):
    """Control: TokenLabeling's and ReLabel's loader hand (y1, x1, y2, x2) to roi_align, which takes x first."""
    real = token_labels.roi_align
    swapped = [0, 2, 1, 4, 3]
    monkeypatch.setattr(
        token_labels, "roi_align", lambda maps, corners, *rest, **named: real(maps, corners[:, swapped], *rest, **named)
    )
    assert mistakes(BOXES[0], (7, 7), False) < 1e-5  # a square box in the middle hides it
    assert mistakes(BOXES[1], (7, 7), False) > 0.1 and mistakes(BOXES[2], (7, 7), True) > 0.1


def test_a_flip_before_the_cut_would_be_noticed(monkeypatch):
    """Control: the map flipped instead of the patches reads another part of the image."""
    real = token_labels.roi_align
    monkeypatch.setattr(
        token_labels, "roi_align", lambda maps, *rest, **named: real(maps.flip(3), *rest, **named).flip(3)
    )
    assert mistakes(BOXES[2], (7, 7), False) > 0.01


def test_missing_half_pixel_would_be_noticed(monkeypatch):
    real = token_labels.roi_align
    monkeypatch.setattr(token_labels, "roi_align", lambda *args, aligned: real(*args, aligned=False))
    assert mistakes(BOXES[0], (7, 7), False) > 0.01


def painted(size: tuple[int, int], side: int = 18) -> tuple[Tensor, Tensor]:
    """Of an image of height x width whose pixel (y, x) is of class 1 where x >= 75 and of 2 where y >= 25: its map."""
    height, width = size
    y = (torch.arange(side) + 0.5) / side * height
    x = (torch.arange(side) + 0.5) / side * width
    labels = (y[:, None] >= 25) * 2 + (x[None] >= 75) * 1
    return torch.full((1, 1, side, side), 0.9), labels[None, None].long()


def test_non_square_images():
    """A box in pixels of a flat image: its right half lies beyond x = 75, its lower third below y = 25."""
    values, ids = painted((50, 300))
    box = torch.tensor([[10.0 / 50, 25.0 / 300, 22.5 / 50, 100.0 / 300]])  # y 10 to 32.5, x 25 to 125
    dense, whole = cut(values, ids, box, torch.tensor([0]), (9, 4), C)
    best = dense[0].argmax(-1).view(9, 4)
    assert best[:5].tolist() == [[0, 0, 1, 1]] * 5 and best[7:].tolist() == [[2, 2, 3, 3]] * 2
    assert whole[0, 0] > whole[0, 2] + 0.1 and abs(float(whole[0, :4].sum() - 4 / C * 0.1 - 0.9)) < 1e-5
    # Control: shares of the longer side, as if the map were padded rather than squashed.
    wrong, _ = cut(values, ids, box * torch.tensor([50 / 300, 1, 50 / 300, 1]), torch.tensor([0]), (9, 4), C)
    assert wrong[0].argmax(-1).view(9, 4)[8].tolist() == [0, 0, 1, 1]


def test_targets_are_distributions_and_samples_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, C, 6, 6, generator=generator)
    values, ids = logits.softmax(1).sort(dim=1, descending=True)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.3, 0.0, 0.1, 0.9], [0.5, 0.5, 0.5, 0.5]])
    flips = torch.tensor([0, 1, 0])
    dense, whole = cut(values[:, :5], ids[:, :5], boxes, flips, (4, 4), C)
    assert dense.shape == (3, 16, C) and whole.shape == (3, C)
    assert torch.allclose(dense.sum(-1), torch.ones(3, 16)) and torch.allclose(whole.sum(-1), torch.ones(3))
    assert dense.min() >= 0
    for i in range(3):
        one = slice(i, i + 1)
        alone, _ = cut(values[one, :5], ids[one, :5], boxes[one], flips[one], (4, 4), C)
        assert torch.allclose(alone[0], dense[i], atol=1e-6)
    full, mean = cut(values, ids, boxes, flips, (4, 4), C)  # all classes listed: nothing to spread
    assert torch.allclose(mean[0], logits.softmax(1)[0].mean((1, 2)), atol=1e-3)  # of the whole image: the places' mean
    assert torch.allclose(full.sum(-1), torch.ones(3, 16))


def test_the_whole_image_at_the_maps_own_grid_is_the_map():
    values, ids = asymmetric()
    dense, _ = cut(values, ids, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0]), (6, 6), C)
    ours = fields(dense, (6, 6))
    assert torch.allclose(ours[0], values[0, 0], atol=1e-6) and torch.allclose(ours[1], values[0, 1], atol=1e-6)


def test_smoothing_keeps_a_distribution():
    targets = torch.tensor([[[0.7, 0.2, 0.1, 0.0]]])
    assert torch.allclose(smoothed(targets, 0.2), torch.tensor([[[0.61, 0.21, 0.13, 0.05]]]))
