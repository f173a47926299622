"""Augmentation that leaves geometry alone: boxes and flips are mined, color is free.

timm's own ops and distributions; each draw is seeded by its sample's name, never by a worker or a batch.
"""

import copy
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from shards.errors import TicketSetError
from shards.ranked import Statistics

GEOMETRIC = frozenset(["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"])


@contextmanager
def kept_generators() -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators are afterwards as they were before."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_generators(*name: object) -> None:
    """Seed all three by a name."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=16).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    torch.default_generator.manual_seed(int.from_bytes(digest[4:12], "little"))  # torch.manual_seed would seed devices


@contextmanager
def seeded(*name: object) -> Iterator[None]:
    """The generators, seeded by a name inside and as they were after."""
    with kept_generators():
        seed_generators(*name)
        yield


class ColorAugment:
    """timm's RandAugment, AutoAugment or AugMix with drawn geometric operations as the identity; else color jitter.

    Args:
        auto_augment: timm's --aa string; empty or None for none.
        color_jitter: timm's --color-jitter; used where there is no --aa, or 3a, as timm does.
        mean: of the data, the fill color of timm's ops.
    Attributes:
        skipped: names of the geometric operations.
        prefixable: `on_mosaic` can stand in for the whole view; not of AugMix, which mixes images itself.
    Raises:
        TicketSetError: timm knows no such policy.
    """

    def __init__(self, auto_augment: str | None, color_jitter: float, mean: tuple[float, ...]) -> None:
        self._transform: Any = None
        self._jitter: Any = None
        self._on_prefix: list[Callable[[_Prefix], _Prefix]] = []
        self.skipped: list[str] = []
        if auto_augment:
            self._transform = _timm_policy(auto_augment, mean)
            for operation in _operations(self._transform):
                if operation.name in GEOMETRIC:
                    operation.aug_fn = _identity
                    self.skipped.append(operation.name)
                elif operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
            patchwise = copy.deepcopy(self._transform)
            for operation in _operations(patchwise):
                wrapped = PATCHWISE.get(operation.name.removesuffix("Increasing"), _pointwise)
                operation.aug_fn = partial(wrapped, operation.aug_fn)
            self._on_prefix.append(patchwise)
        if color_jitter and (not auto_augment or "3a" in auto_augment):  # 3-Augment has jitter beside it
            from torchvision.transforms import ColorJitter

            self._jitter = ColorJitter(color_jitter, color_jitter, color_jitter)
            self._on_prefix.append(partial(_jittered, self._jitter))
        self.prefixable = not (auto_augment or "").startswith("augmix")

    @property
    def draws(self) -> bool:
        """Whether there is anything to do."""
        return self._transform is not None or self._jitter is not None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [S, S, 3] -> uint8 [S, S, 3]; draws from the global generators, see `seeded`."""
        image = Image.fromarray(pixels)
        for transform in (self._transform, self._jitter):
            image = transform(image) if transform else image
        return np.asarray(image)

    def on_mosaic(self, pixels: np.ndarray, cell: int, patch: int, seen: Statistics) -> np.ndarray:
        """The same draws on the first patches of a ranked view; docs/TRAINING.md says what is exact of them.

        Args:
            pixels: uint8 [rows * cell, gw * cell, 3], see shards.ranked.Mosaic.
            cell: pixels a side of a patch's place.
            patch: pixels a side of a patch.
            seen: of the whole view.
        Returns:
            uint8 of the same shape.
        """
        assert self.prefixable
        below = pixels[-1:].copy()
        below[0, 0], below[0, 1] = seen.low, seen.high
        loaded = Image.fromarray(np.concatenate((pixels, below)))
        prefix = _Prefix(loaded, loaded, cell, patch, seen.gray)
        for transform in self._on_prefix:
            prefix = transform(prefix)
        return pixels if prefix.image is loaded else np.asarray(prefix.image)[:-1]


class _Prefix(NamedTuple):
    """A mosaic on its way through a policy, which hands it on like an image.

    Attributes:
        image: its pixels now, and a row below, where two hold the least and greatest values of the whole view: they go
            through the operations too, so that autocontrast finds them.
        loaded: as it was at first.
        cell, patch: see shards.ranked.Mosaic.
        gray: mean of the whole view at first.
    """

    image: Image.Image
    loaded: Image.Image
    cell: int
    patch: int
    gray: int


def _pointwise(function: Any, prefix: _Prefix, *arguments: Any, **keywords: Any) -> _Prefix:
    """timm's own. All but equalize ask for no more than a pixel, or the extremes of the view."""
    return prefix._replace(image=function(prefix.image, *arguments, **keywords))


def _contrast(_function: Any, prefix: _Prefix, factor: float, **_keywords: Any) -> _Prefix:
    """Pillow's, around the mean gray of the whole view: as stored, or an estimate of what came of it."""
    gray = prefix.gray
    if prefix.image is not prefix.loaded:  # what was done to the patches, taken for a line, is done to the mean
        before, now = (np.asarray(i.convert("L"))[:-1].astype(np.float32) for i in (prefix.loaded, prefix.image))
        around = before - before.mean()
        slope = (around * now).sum() / max(1.0, (around * around).sum())
        gray = int(np.clip(now.mean() + slope * (gray - before.mean()), 0, 255) + 0.5)
    flat = Image.new("RGB", prefix.image.size, (gray, gray, gray))
    return prefix._replace(image=Image.blend(flat, prefix.image, factor))


def _cells(prefix: _Prefix) -> tuple[np.ndarray, np.ndarray]:
    """Its pixels, and those of them that are patches: [rows, p, gw, p, 3], to be written to."""
    pixels, c, p = np.array(prefix.image), prefix.cell, prefix.patch
    return pixels, pixels[:-1].reshape(len(pixels) // c, c, -1, c, 3)[:, :p, :, :p]


def _sharpness(_function: Any, prefix: _Prefix, factor: float, **_keywords: Any) -> _Prefix:
    """Pillow's, of each patch as if its edges went on: strangers stand beside it."""
    pixels, cells = _cells(prefix)
    # ImageFilter.SMOOTH in whole numbers, which takes less time than Pillow's own: a 3 x 3 sum, the center 4 times more.
    wide = np.pad(cells, ((0, 0), (1, 1), (0, 0), (1, 1), (0, 0)), "edge").astype(np.uint16)
    threes = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = threes[:, :, :, :-2] + threes[:, :, :, 1:-1] + threes[:, :, :, 2:] + 4 * wide[:, 1:-1, :, 1:-1]
    cells[:] = (total + 6) // 13  # to the nearest
    return prefix._replace(image=Image.blend(Image.fromarray(pixels), prefix.image, factor))


def _blur(draw: Callable[[float], float], _function: Any, prefix: _Prefix, factor: float, **_keywords: Any) -> _Prefix:
    """Pillow's, of each patch as if it were an image.

    Args:
        draw: the radius of a strength.
    """
    pixels, cells = _cells(prefix)
    along, blurred = ImageFilter.GaussianBlur((draw(factor), 0)), cells
    for _ in range(2):  # along rows, then along columns: an image of lines as long as a patch has no strangers
        lines = Image.fromarray(blurred.reshape(-1, prefix.patch, 3)).filter(along)
        blurred = np.asarray(lines).reshape(cells.shape).swapaxes(1, 3)
    cells[:] = blurred
    return prefix._replace(image=Image.fromarray(pixels))


def _drawn_radius(factor: float) -> float:
    return random.uniform(0.1, 2.0 * factor)


# timm's operations that need more than a pixel and the patches; "Increasing" is left out of their names.
PATCHWISE: dict[str, Callable[..., _Prefix]] = {
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "GaussianBlur": partial(_blur, float),
    "GaussianBlurRand": partial(_blur, _drawn_radius),
}


def _jittered(jitter: Any, prefix: _Prefix) -> _Prefix:
    """torchvision's ColorJitter without hue; timm's operations of these names are the same as its own."""
    from timm.data.auto_augment import brightness, color

    steps = (partial(_pointwise, brightness), partial(_contrast, None), partial(_pointwise, color))
    order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for number in order.tolist():
        if factors[number] is not None:
            prefix = steps[number](prefix, factors[number])
    return prefix


def _timm_policy(text: str, mean: tuple[float, ...]) -> Any:
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    parameters = {"img_mean": tuple(min(255, round(255 * m)) for m in mean)}
    kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    try:
        return kinds.get(text.partition("-")[0], auto_augment_transform)(text, parameters)
    except (AssertionError, ValueError) as error:  # timm asserts
        raise TicketSetError(
            f"`aa` {text}: expected one of timm's policies, such as rand-m9-mstd0.5-inc1, v0, original, 3a or augmix-m3"
            f"{f' ({error})' if str(error) else ''}"
        ) from None


def _operations(transform: Any) -> list[Any]:
    """Every AugmentOp of a timm transform."""
    return transform.ops if hasattr(transform, "ops") else [op for policy in transform.policy for op in policy]


def _identity(image: Image.Image, *arguments: Any, **keywords: Any) -> Image.Image:
    return image


def _posterize(image: Image.Image, bits: int, **keywords: Any) -> Image.Image:
    """As timm's; 0 bits is black, as in Pillow before 13, which raises."""
    if bits >= 8:
        return image
    mask = 0xFF & ~(2 ** (8 - bits) - 1)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


def erasing_box(probability: float, size: int) -> tuple[int, int, int, int]:
    """A (top, left, height, width) to erase of a view of S x S pixels, height 0 for none; timm's RandomErasing."""
    if random.random() <= probability:
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * size * size
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width < size and height < size:
                return random.randint(0, size - height), random.randint(0, size - width), height, width
    return 0, 0, 0, 0


def erase(
    patches: Tensor, keep_indices: Tensor, boxes: Tensor, grid_width: int, patch_size: int, generator: Any
) -> Tensor:
    """Random erasing (mode pixel) of kept patches, in view coordinates.

    Args:
        patches: [B, K, C*p*p], normalized.
        keep_indices: [B, K].
        boxes: int [B, 4], (top, left, height, width) in pixels of the view.
        generator: of the patches' device.
    """
    p = patch_size
    steps = torch.arange(p, device=patches.device)
    rows = (keep_indices // grid_width * p)[:, :, None] + steps  # [B, K, p]
    columns = (keep_indices % grid_width * p)[:, :, None] + steps
    top, left, height, width = boxes[:, :, None, None].unbind(1)  # [B, 1, 1]
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    inside = in_rows[:, :, :, None] & in_columns[:, :, None, :]  # [B, K, p, p]
    channels = patches.shape[-1] // (p * p)
    inside = inside[:, :, None].expand(-1, -1, channels, -1, -1).reshape(patches.shape)
    noise = torch.empty_like(patches).normal_(generator=generator)
    return torch.where(inside, noise, patches)
