"""JPEG files of ImageNet's sizes, made of smooth random textures and noise: 4:2:0, about 110 KB at 500x375."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(500, 375)] * 6 + [(375, 500)] * 2 + [(500, 333), (500, 500)]
BYTES_A_PIXEL = 110_000 / (500 * 375)
CLASSES = 10


def make_pictures(folder: Path, count: int, first: int = 0) -> Path:
    """FOLDER/class_N/I.jpg, `count` in all, from number `first` on: processes can share the work."""
    rng = np.random.default_rng(first)
    for number in range(first, first + count):
        path = folder / f"class_{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = SIZES[rng.integers(len(SIZES))]
        target = BYTES_A_PIXEL * width * height * rng.lognormal(-0.05, 0.3)
        path.write_bytes(_fit(_texture(rng, width, height), rng, target))
    return folder


def make_small_pictures(folder: Path, count: int, side: int = 32, kinds: int = 100) -> Path:
    """Many files of few kinds: where a count matters, and pixels do not."""
    rng = np.random.default_rng(0)
    data = [_jpeg(_texture(rng, side, side), 75) for _ in range(kinds)]
    for label in range(CLASSES):
        (folder / f"class_{label}").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"class_{number % CLASSES}" / f"{number:06d}.jpg").write_bytes(data[number % kinds])
    return folder


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """float32 [H, W, 3]: octaves of noise, each twice as fine and half as strong, as photos have."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(6):
        cells = rng.random((3 << octave, 3 << octave, 3), np.float32) - 0.5
        for channel in range(3):
            plane = Image.fromarray(cells[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(plane) * 0.6**octave
    return 128 + 140 * total


def _fit(texture: np.ndarray, rng: np.random.Generator, target: float) -> bytes:
    """The JPEG nearest to `target` bytes at quality 90, by the strength of sensor-like noise."""
    noise = rng.standard_normal(texture.shape[:2], np.float32)[..., None]
    low, high = 0.0, 40.0
    for _ in range(6):
        strength = (low + high) / 2
        data = _jpeg(texture + strength * noise, 90)
        low, high = (strength, high) if len(data) < target else (low, strength)
    return data


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()
