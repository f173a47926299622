"""Augmentation that leaves geometry alone: boxes and flips are mined, color is free.

timm's own ops and distributions; each draw is seeded by its sample's name, never by a worker or a batch.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shards.errors import TicketSetError

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
        auto_augment: timm's --aa string; empty for none.
        color_jitter: timm's --color-jitter; used where there is no --aa, or 3a, as timm does.
        mean: of the data, the fill color of timm's ops.
    Raises:
        TicketSetError: timm knows no such policy.
    """

    def __init__(self, auto_augment: str, color_jitter: float, mean: tuple[float, ...]) -> None:
        self._transform: Any = None
        self._jitter: Any = None
        self.skipped: list[str] = []
        if auto_augment:
            self._transform = _timm_policy(auto_augment, mean)
            for operation in _operations(self._transform):
                if operation.name in GEOMETRIC:
                    operation.aug_fn = _identity
                    self.skipped.append(operation.name)
                elif operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        if color_jitter and (not auto_augment or "3a" in auto_augment):  # 3-Augment has jitter beside it
            from torchvision.transforms import ColorJitter

            self._jitter = ColorJitter(color_jitter, color_jitter, color_jitter)

    @property
    def draws(self) -> bool:
        """Whether there is anything to do."""
        return self._transform is not None or self._jitter is not None

    @property
    def prefixable(self) -> bool:
        return True

    def on_mosaic(self, pixels, cell, patch, seen):
        return pixels

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [S, S, 3] -> uint8 [S, S, 3]; draws from the global generators, see `seeded`."""
        image = Image.fromarray(pixels)
        for transform in (self._transform, self._jitter):
            image = transform(image) if transform else image
        return np.asarray(image)


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
