"""Augmentation: timm's draws and colors, geometry left alone, random erasing in view coordinates."""

import pickle
import random
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment as timm_aa
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data.auto_augment import AutoAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train

from conftest import patches_of
from shards.errors import TicketSetError
from shards.ranked import Mosaic, statistics
from trainer.data.augment import ColorAugment, erase, erasing_box, seeded
from trainer.families.patches import gather_patches, patchify

pytestmark = pytest.mark.slow

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
DEIT = "rand-m9-mstd0.5-inc1"
GEOMETRIC = ("Rotate", "Shear", "Translate")
Log = list[tuple[str, tuple]]


def operations(transform: Any) -> list[Any]:
    return transform.ops if hasattr(transform, "ops") else [op for policy in transform.policy for op in policy]


def run(log: Log, name: str, function: Any, image: Image.Image, *arguments: Any, **keywords: Any) -> Image.Image:
    log.append((name, arguments))
    return function(image, *arguments, **keywords)


def naive(name: str, function: Any, image: Image.Image, *arguments: Any, **keywords: Any) -> Image.Image:
    """timm's operation, but geometry does nothing, and what Pillow 13 refuses is black."""
    if name.startswith(GEOMETRIC):
        return image
    if name.startswith("Posterize") and arguments[0] <= 0:
        return Image.new("RGB", image.size)
    return function(image, *arguments, **keywords)


def timms(text: str, log: Log) -> Any:
    """What timm itself would draw, with `naive` operations."""
    kind = timm_aa.rand_augment_transform if text.startswith("rand") else timm_aa.auto_augment_transform
    if text.startswith("augmix"):
        kind = timm_aa.augment_and_mix_transform
    transform = kind(text, {"img_mean": tuple(round(255 * m) for m in MEAN)})
    for op in operations(transform):
        op.aug_fn = partial(run, log, op.name, partial(naive, op.name, op.aug_fn))
    return transform


def ours(text: str, log: Log) -> ColorAugment:
    augment = ColorAugment(text, 0.0, MEAN)
    for op in operations(augment._transform):
        op.aug_fn = partial(run, log, op.name, op.aug_fn)
    return augment


def test_geometric_operations_are_drawn_as_often_as_timm_draws_them_and_change_nothing():
    log, timms_log = [], []
    augment, timm_transform = ours(DEIT, log), timms(DEIT, timms_log)
    counts: Counter = Counter()
    untouched = 0
    for seed in range(900):
        log.clear()
        timms_log.clear()
        with seeded(seed):
            pixels = augment(PIXELS)
        with seeded(seed):
            expected = np.asarray(timm_transform(Image.fromarray(PIXELS)))
        assert log == timms_log
        assert (pixels == expected).all()
        counts.update(name for name, _ in log)
        if log and all(name.startswith(GEOMETRIC) for name, _ in log):
            untouched += 1
            assert (pixels == PIXELS).all()
    assert untouched > 100
    assert len(counts) == 15 and all(35 < count < 90 for count in counts.values())  # 2 x .5 x 900 / 15 = 60 each
    assert augment.skipped == ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]


@pytest.mark.parametrize(
    "text",
    ["v0", "v0r", "original", "originalr", "original-mstd0.5", "rand-m9-n3", "rand-mstd1-tweights", "augmix-m5-w4-d2"],
)
def test_every_policy_of_timm_gives_timms_colours(text):
    log, timms_log = [], []
    augment, timm_transform = ours(text, log), timms(text, timms_log)
    changed = 0
    for seed in range(150):
        with seeded(seed):
            pixels = augment(PIXELS)
        with seeded(seed):
            expected = np.asarray(timm_transform(Image.fromarray(PIXELS)))
        assert (pixels == expected).all(), seed
        changed += (pixels != PIXELS).any()
    assert log == timms_log and {name for name, _ in log if name.startswith(GEOMETRIC)}
    assert changed > 5  # tweights draws geometry nearly always


@pytest.mark.parametrize("bits", [0, 1, 2, 4, 7, 8])
def test_posterize_keeps_the_highest_bits_and_none_is_black(bits):
    augment = ColorAugment("rand-m9-inc1", 0.0, MEAN)
    (op,) = [o for o in operations(augment._transform) if o.name == "PosterizeIncreasing"]
    pixels = np.asarray(op.aug_fn(Image.fromarray(PIXELS), bits))
    assert (pixels == PIXELS >> (8 - bits) << (8 - bits) if bits else pixels == 0).all()
    if bits:
        assert (pixels == np.asarray(timm_aa.posterize(Image.fromarray(PIXELS), bits))).all()


def test_the_strongest_posterize_is_drawn_and_does_not_raise():
    """Magnitude 10: PosterizeIncreasing with no bits, which Pillow 13 refuses."""
    augment = ColorAugment("rand-m10-n8-inc1", 0.0, MEAN)
    black = 0
    for seed in range(60):
        with seeded(seed):
            black += not augment(PIXELS).any()
    assert black > 0


@pytest.mark.parametrize("text", ["nothing", "rand-m9-x3", "rand-m9x", "randm9", "v1", "augmix-z3", "v0-m9", "random"])
def test_unknown_policies_are_refused_in_words(text):
    with pytest.raises(TicketSetError, match=f"^`aa` {text}: expected one of timm's policies"):
        ColorAugment(text, 0.4, MEAN)


@pytest.mark.parametrize(("text", "jitter", "least"), [("", 0.3, 40), ("3a", 0.3, 40), ("3a", 0.0, 10), ("", 0.0, 1)])
def test_without_geometry_the_augmentation_is_timms_own(text, jitter, least):
    """Color jitter where there is no --aa, and beside 3-Augment."""
    _, timms_own, _ = transforms_imagenet_train(32, auto_augment=text or None, color_jitter=jitter, separate=True)
    augment = ColorAugment(text, jitter, MEAN)
    outputs = set()
    for seed in range(40):
        with seeded(seed):
            pixels = augment(PIXELS)
        with seeded(seed):
            assert (pixels == np.asarray(timms_own(Image.fromarray(PIXELS)))).all(), seed
        outputs.add(pixels.tobytes())
    assert len(outputs) >= least


def test_a_policy_takes_the_place_of_colour_jitter():
    for seed in range(40):
        with seeded(seed):
            pixels = ColorAugment(DEIT, 0.4, MEAN)(PIXELS)
        with seeded(seed):
            assert (pixels == ColorAugment(DEIT, 0.0, MEAN)(PIXELS)).all()


def test_augmentations_travel_to_spawned_workers():
    for text, jitter in ((DEIT, 0.0), ("", 0.4), ("augmix-m3", 0.0), ("3a", 0.3)):
        augment = ColorAugment(text, jitter, MEAN)
        copy = pickle.loads(pickle.dumps(augment))
        with seeded(3):
            pixels = augment(PIXELS)
        with seeded(3):
            assert (copy(PIXELS) == pixels).all()
        if augment.prefixable:
            with seeded(3):
                pixels = augment.on_mosaic(PIXELS, 16, 16, statistics(PIXELS))
            with seeded(3):
                assert (copy.on_mosaic(PIXELS, 16, 16, statistics(PIXELS)) == pixels).all()


def test_seeded_draws_depend_on_every_part_of_the_name():
    def draws(*name: object) -> tuple[float, float, float]:
        with seeded(*name):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draws("a", 1, 2) == draws("a", 1, 2)
    for generator in range(3):
        assert len({draws(*n)[generator] for n in (("a", 1, 2), ("b", 1, 2), ("a", 2, 1), ("a", 12))}) == 4


def test_seeding_leaves_accelerators_alone(monkeypatch):
    """Where there are no workers, the loop's own draws on its device are not the feed's to seed."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with seeded("a"):
        torch.rand(())
    assert not seeds
    torch.manual_seed(0)  # negative control
    assert seeds == [0]


# The first patches of a ranked view.

POLICIES = [DEIT, "rand-m9", "rand-m9-inc1-t3a", "v0", "v0r", "original", "originalr", "3a"]
FILTERS = {"Sharpness": 1, "SharpnessIncreasing": 1, "GaussianBlur": 6, "GaussianBlurRand": 6}  # and how far they reach
MOSAICS = [Mosaic((4, 4), 16, 16, 16), Mosaic((4, 4), 14, 16, 16)]
K = 8


class Prefix:
    """A smooth view whose darkest and brightest patches are ranked last, and the mosaic of its first K."""

    def __init__(self, mosaic: Mosaic, seed: int) -> None:
        rng, p, side = np.random.default_rng(seed), mosaic.patch, 4 * mosaic.patch
        coarse = Image.fromarray(rng.integers(40, 110, (5, 5, 3), np.uint8)).resize((side, side))
        self.view = np.clip(np.asarray(coarse) + rng.normal(0, 4, (side, side, 3)), 0, 255).astype(np.uint8)
        self.view[-p:, : 3 * p] = self.view[-p:, : 3 * p] // 2 + 90
        self.view[-p:, -p:] //= 4
        self.mosaic, self.ranking, self.seed = mosaic, np.append(rng.permutation(12), [12, 13, 14, 15]), seed
        self.pixels = mosaic.lay(self.view, self.ranking[:K])

    def by_ranking(self, augment: ColorAugment) -> np.ndarray:
        """[K, p, p, 3]: the whole view augmented, then its patches."""
        with seeded(self.seed):
            return patches_of(augment(self.view), self.mosaic.patch)[self.ranking[:K]].astype(int)

    def by_prefix(self, augment: ColorAugment) -> np.ndarray:
        with seeded(self.seed):
            return self._patches(
                augment.on_mosaic(self.pixels, self.mosaic.cell, self.mosaic.patch, statistics(self.view))
            )

    def as_if_a_view(self, augment: ColorAugment) -> np.ndarray:
        """What is wrong with mosaics: strangers beside each other, and statistics of the prefix alone."""
        with seeded(self.seed):
            return self._patches(augment(self.pixels))

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        return self.mosaic.take(pixels).reshape(K, self.mosaic.patch, self.mosaic.patch, 3).astype(int)


def only(text: str, *names: str) -> ColorAugment:
    """An augmentation that does these operations of a policy, one after the other, always."""
    augment = ColorAugment(text, 0.0, MEAN)
    for transform in (augment._transform, *augment._on_prefix):
        every = {op.name: op for op in operations(transform)}
        for name in names:
            every[name].prob = 1.0
        transform.__class__ = AutoAugment  # draws from one
        transform.policy = [[every[name] for name in names]]
    return augment


def names_of(text: str, filters: bool) -> list[str]:
    found = {op.name for op in operations(ColorAugment(text, 0.0, MEAN)._transform)}
    return sorted(n for n in found if (n in FILTERS) == filters and n != "Equalize")


def apart(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean absolute difference."""
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


@pytest.mark.parametrize("mosaic", MOSAICS, ids=["16", "14 in 16"])
@pytest.mark.parametrize(("text", "name"), [(text, name) for text in POLICIES for name in names_of(text, False)])
def test_operations_on_a_prefix_are_those_on_the_whole_view(text, name, mosaic):
    augment, alone = only(text, name), 0
    for prefix in (Prefix(mosaic, seed) for seed in range(6)):
        assert (prefix.by_prefix(augment) == prefix.by_ranking(augment)).all()
        alone += (prefix.as_if_a_view(augment) != prefix.by_ranking(augment)).any()
    assert alone == (6 if name.startswith(("Contrast", "AutoContrast")) else 0)


@pytest.mark.parametrize("mosaic", MOSAICS, ids=["16", "14 in 16"])
@pytest.mark.parametrize(("text", "name"), [(text, name) for text in POLICIES for name in names_of(text, True)])
def test_filters_see_each_patch_as_if_its_edges_went_on(text, name, mosaic):
    augment, reach = only(text, name), FILTERS[name]
    found, strangers = [], []
    for prefix in (Prefix(mosaic, seed) for seed in range(6)):
        patches, whole = prefix.by_prefix(augment), prefix.by_ranking(augment)
        inner = (slice(None), slice(reach, -reach), slice(reach, -reach))
        assert (patches[inner] == whole[inner]).all()  # what a filter sees there is all in the patch
        found.append((patches, whole))
        strangers.append((prefix.as_if_a_view(augment), whole))
        edge = 1 if name.startswith("Sharpness") else 0  # which Pillow does not sharpen; its blur lets edges go on
        for patch, original in zip(patches, patches_of(prefix.view, mosaic.patch)[prefix.ranking[:K]], strict=True):
            with seeded(prefix.seed):
                alone = augment(np.pad(original, ((edge, edge), (edge, edge), (0, 0)), "edge"))
            assert (patch == alone[edge : len(alone) - edge, edge : len(alone) - edge]).all()
    assert 0 < apart(found) < 0.7 * apart(strangers)


@pytest.mark.parametrize("text", ["v0", "original", DEIT])
def test_equalize_goes_by_the_patches_that_are_there(text):
    """Nearly: two pixels of the view's extremes are among them."""
    pairs = [
        (prefix.by_prefix(augment), prefix.as_if_a_view(augment))
        for augment in [only(text, "Equalize")]
        for prefix in (Prefix(Mosaic((4, 4), 64, 64, 16), seed) for seed in range(6))
    ]
    assert apart(pairs) < 0.5


@pytest.mark.parametrize(
    ("first", "bound"),
    [("Invert", 0.0), ("AutoContrast", 0.6), ("BrightnessIncreasing", 0.6), ("ColorIncreasing", 0.6), ("SharpnessIncreasing", 1.2)],
)  # fmt: skip
def test_contrast_after_another_operation_goes_by_what_came_of_the_whole_view(first, bound):
    augment = only(DEIT, first, "ContrastIncreasing")
    prefixes = [Prefix(MOSAICS[0], seed) for seed in range(12)]
    whole = [prefix.by_ranking(augment) for prefix in prefixes]
    found = apart(zip((prefix.by_prefix(augment) for prefix in prefixes), whole, strict=True))
    alone = apart(zip((prefix.as_if_a_view(augment) for prefix in prefixes), whole, strict=True))
    assert found <= bound < alone


@pytest.mark.parametrize("first", ["Invert", "BrightnessIncreasing", "ContrastIncreasing", "PosterizeIncreasing"])
def test_autocontrast_finds_the_extremes_of_the_view_after_a_curve(first):
    augment = only(DEIT, first, "AutoContrast")
    for prefix in (Prefix(MOSAICS[0], seed) for seed in range(6)):
        assert (prefix.by_prefix(augment) == prefix.by_ranking(augment)).all()


@pytest.mark.parametrize(
    ("text", "jitter", "equal"),
    [(DEIT, 0.0, 0.8), ("v0", 0.0, 0.69), ("original", 0.0, 0.45), ("3a", 0.3, 0.25), ("", 0.4, 0.6)],
)
def test_a_prefix_draws_what_the_whole_view_draws(text, jitter, equal):
    augment = ColorAugment(text, jitter, MEAN)
    assert augment.prefixable
    found, alone = [], []
    for seed in range(100):
        prefix = Prefix(MOSAICS[0], seed)
        with seeded(seed):
            augment(prefix.view)
            after = random.random(), np.random.random(), float(torch.rand(()))
        with seeded(seed):
            augment.on_mosaic(prefix.pixels, 16, 16, statistics(prefix.view))
            assert (random.random(), np.random.random(), float(torch.rand(()))) == after
        found.append((prefix.by_prefix(augment), prefix.by_ranking(augment)))
        alone.append((prefix.as_if_a_view(augment), found[-1][1]))
    same, wrong = (np.mean([(a == b).all() for a, b in pairs]) for pairs in (found, alone))
    assert wrong <= equal < same


def test_a_prefix_that_nothing_is_done_to_is_as_it_was():
    prefix = Prefix(MOSAICS[0], 0)
    for augment in (ColorAugment("", 0.0, MEAN), only(DEIT, "Rotate")):
        assert augment.on_mosaic(prefix.pixels, 16, 16, statistics(prefix.view)) is prefix.pixels


def test_chains_of_augmix_need_whole_views():
    assert not ColorAugment("augmix-m3", 0.0, MEAN).prefixable


# Random erasing.


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("size", [32, 224])
def test_boxes_are_timms(probability, size):
    erasing = RandomErasing(probability, mode="pixel", device="cpu")
    erased = 0
    for seed in range(150):
        with seeded(seed):
            image = torch.zeros(1, size, size)
            erasing(image)
        with seeded(seed):
            top, left, height, width = erasing_box(probability, size)
        expected = torch.zeros(size, size, dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(image[0] != 0, expected), seed
        erased += height > 0
    assert {0.0: erased == 0, 0.25: 20 < erased < 60, 1.0: erased == 150}[probability]


def normalized() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [6, 3, 64, 64], 7 of their 16 patches, and boxes, of which the last two are empty and all."""
    generator = torch.Generator().manual_seed(0)
    images = 10 + torch.rand(6, 3, 64, 64, generator=generator)
    keep = torch.stack([torch.randperm(16, generator=generator)[:7] for _ in range(6)])
    boxes = torch.tensor(
        [[3, 5, 20, 31], [16, 16, 16, 16], [0, 0, 1, 1], [40, 1, 24, 63], [9, 9, 0, 9], [0, 0, 64, 64]]
    )
    return images, keep, boxes


def test_erasing_kept_patches_is_erasing_the_image_and_then_keeping():
    images, keep, boxes = normalized()
    whole = torch.zeros(6, 3, 64, 64)
    for mask, (top, left, height, width) in zip(whole, boxes.tolist(), strict=True):
        mask[:, top : top + height, left : left + width] = 1
    patches = gather_patches(patchify(images, 16), keep)
    expected = gather_patches(patchify(whole, 16), keep).bool()
    erased = erase(patches, keep, boxes, 4, 16, torch.Generator().manual_seed(1))
    assert torch.equal(erased != patches, expected)
    assert torch.equal(erased[~expected], patches[~expected])
    counts = expected.flatten(1).sum(1)
    assert counts[4] == 0 and counts[5] == 7 * 768 and 0 < counts[3] < 7 * 768


def test_the_noise_is_a_fresh_standard_normal_for_every_pixel_and_channel():
    images, _, _ = normalized()
    keep = torch.arange(16).expand(6, -1)
    boxes = torch.tensor([[0, 0, 64, 64]]).expand(6, -1)
    patches = patchify(images, 16)
    noise = erase(patches, keep, boxes, 4, 16, torch.Generator().manual_seed(1))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02  # of 73728 numbers
    assert len(noise.unique()) > 0.95 * noise.numel()
    assert torch.equal(noise, erase(patches, keep, boxes, 4, 16, torch.Generator().manual_seed(1)))
    assert not torch.equal(noise, erase(patches, keep, boxes, 4, 16, torch.Generator().manual_seed(2)))


def test_a_box_without_height_erases_nothing():
    images, keep, _ = normalized()
    patches = gather_patches(patchify(images, 16), keep)
    nothing = torch.zeros(6, 4, dtype=torch.int64)
    assert torch.equal(erase(patches, keep, nothing, 4, 16, torch.Generator()), patches)
