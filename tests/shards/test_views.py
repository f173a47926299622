"""Views: golden boxes, pure functions of (seed, key, number), and torchvision's distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from shards.views import canonical_view, image_views, view_seed

DRAWS = 3000

# A change here changes every ticket set ever mined: raise miner.plan.ALGORITHM with it.
GOLDEN = [
    (
        (0, "train/ant/ant_0", 4, 500, 375),
        [[23, 86, 328, 328, 0], [144, 187, 168, 173, 1], [144, 14, 219, 224, 1], [85, 301, 200, 167, 1]],
    ),
    ((7, "x", 3, 80, 60), [[4, 14, 52, 52, 0], [7, 26, 48, 48, 1], [4, 24, 42, 36, 1]]),
    ((0, "a", 4, 3, 1000), [[498, 0, 3, 3, 0], [498, 0, 4, 3, 0], [498, 0, 4, 3, 0], [498, 0, 4, 3, 0]]),
    ((0, "k16", 2, 60, 300), [[124, 4, 52, 52, 0], [252, 7, 42, 49, 0]]),  # the tenth try fits
    ((0, "k2", 2, 60, 300), [[124, 4, 52, 52, 0], [110, 0, 80, 60, 1]]),  # an eleventh would: the center
]


@pytest.mark.parametrize(("arguments", "boxes"), GOLDEN)
def test_golden_boxes(arguments, boxes):
    views = image_views(*arguments)
    assert views.dtype == np.int32
    assert views.tolist() == boxes


def test_golden_view_seeds():
    assert view_seed(0, "a", 0) == 5166918333073941559
    assert view_seed(0, "a", 1) == 2055272677432450349
    assert view_seed(1, "a", 0) == 2991966062601023737


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((500, 375), (23, 86, 328, 328, 0)),
        ((375, 500), (86, 23, 328, 328, 0)),
        ((256, 256), (16, 16, 224, 224, 0)),
        ((101, 101), (6, 6, 88, 88, 0)),  # 88.375 rounds down, 6.5 is floored
        ((4, 4), (0, 0, 4, 4, 0)),  # 3.5 rounds to even
        ((12, 100), (45, 1, 10, 10, 0)),  # 10.5 too
        ((1, 1), (0, 0, 1, 1, 0)),
        ((1, 500), (249, 0, 1, 1, 0)),
        ((500, 1), (0, 249, 1, 1, 0)),
    ],
)
def test_canonical_view(size, box):
    assert canonical_view(*size) == box
    assert image_views(3, "any", 2, *size)[0].tolist() == list(box)


def test_fewer_views_are_a_prefix_of_more():
    assert np.array_equal(image_views(1, "k", 4, 640, 480), image_views(1, "k", 16, 640, 480)[:4])


def test_seed_and_key_and_number_each_give_other_boxes():
    views = image_views(1, "k", 16, 640, 480)
    assert len(np.unique(views, axis=0)) == 16
    for other in (image_views(2, "k", 16, 640, 480), image_views(1, "l", 16, 640, 480)):
        assert not (views[1:, None] == other[None, 1:]).all(2).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 1000), (1000, 3), (2, 2), (640, 480)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (1.0, 1.0), (0.0001, 0.001)])
def test_boxes_lie_inside_the_image(size, scale):
    for key in "abcdefgh":
        views = image_views(0, key, 16, *size, scale=scale)
        top, left, height, width, flip = views.T
        assert height.min() >= 1 and width.min() >= 1 and top.min() >= 0 and left.min() >= 0
        assert (top + height).max() <= size[1] and (left + width).max() <= size[0]
        assert set(flip) <= {0, 1}


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_flip_rate(rate):
    flips = image_views(0, "k", DRAWS, 64, 48, hflip=rate)[1:, 4]
    assert abs(flips.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / DRAWS) + 1e-9
    assert rate in (0, 1) or abs(flips.mean() - 0.35) > 0.1  # the control: another rate is told apart


def test_the_flip_says_nothing_of_the_box():
    views = image_views(0, "k", DRAWS, 640, 480)[1:]
    area = views[:, 2] * views[:, 3]
    assert distance(area[views[:, 4] == 0], area[views[:, 4] == 1]) < 1.63 * np.sqrt(4 / DRAWS)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(500, 375), (60, 400), (9, 7)])
def test_boxes_are_distributed_as_torchvisions(size):
    ours = image_views(0, "k", DRAWS, *size)[1:, :4]
    assert unlike(ours, torchvision_boxes(size)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [({"scale": (0.12, 1.0)}, "area"), ({"scale": (0.08, 0.75)}, "area"), ({"ratio": (0.8, 1.25)}, "aspect")],
)
def test_another_distribution_is_told_apart(options, expected):
    """The control of the test above, on ours and on theirs."""
    size = (500, 375)
    assert expected in unlike(image_views(0, "k", DRAWS, *size, **options)[1:, :4], torchvision_boxes(size))
    assert expected in unlike(image_views(0, "k", DRAWS, *size)[1:, :4], torchvision_boxes(size, **options))
    assert unlike(image_views(0, "k", DRAWS, *size, **options)[1:, :4], torchvision_boxes(size, **options)) == []


def test_a_wrong_place_is_told_apart():
    """The control for places: boxes that never touch the lower edge, one pixel of 9 less."""
    size = (9, 7)
    ours = image_views(0, "k", DRAWS, *size)[1:, :4]
    ours[:, 0] -= (ours[:, 0] + ours[:, 2] == size[1]) & (ours[:, 0] > 0)
    assert unlike(ours, torchvision_boxes(size)) == ["top"]


def torchvision_boxes(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0])
    return np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(DRAWS)])


def unlike(ours, theirs):
    """Which of area, aspect and place differ, by a two-sample Kolmogorov-Smirnov test at 0.1 %."""
    limit = 1.95 * np.sqrt(2 / DRAWS)
    features = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
    }
    return [name for name, feature in features.items() if distance(feature(ours), feature(theirs)) > limit]


def distance(a, b):
    """Greatest distance between two samples' distribution functions."""
    values = np.union1d(a, b)
    return np.abs(
        np.searchsorted(np.sort(a), values, "right") / len(a) - np.searchsorted(np.sort(b), values, "right") / len(b)
    ).max()


SIDES = st.integers(1, 40_000)
SPANS = st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)).map(lambda span: tuple(sorted(span)))


@given(st.integers(0, 2**63 - 1), st.text(max_size=88), SIDES, SIDES, SPANS, st.floats(0, 1))
@settings(deadline=None, derandomize=True)
def test_views_are_inside_the_image_and_the_same_again(seed, key, width, height, ratio, hflip):
    key = key.encode("utf-8", "replace").decode()
    views = image_views(seed, key, 5, width, height, ratio=ratio, hflip=hflip)
    assert views.shape == (5, 5) and tuple(views[0]) == canonical_view(width, height)
    top, left, tall, wide, flip = views.T.astype(int)
    assert (top >= 0).all() and (left >= 0).all() and (tall > 0).all() and (wide > 0).all()
    assert (top + tall <= height).all() and (left + wide <= width).all() and set(flip) <= {0, 1}
    assert np.array_equal(views, image_views(seed, key, 5, width, height, ratio=ratio, hflip=hflip))
    assert np.array_equal(
        views[:3], image_views(seed, key, 3, width, height, ratio=ratio, hflip=hflip)
    )  # V adds at the end
