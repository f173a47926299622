"""Cluttered digits: a small labeled image set in which most patches are useless, and the true masks.

One of scikit-learn's handwritten digits, enlarged, at one of 25 places on a noisy canvas among dimmer fragments
of other digits: too small to be read, so that only the whole digit tells the class.

The canonical view (the centerd 0.875 of the canvas) is 96 pixels, 6 x 6 patches of 16, and the digit stands on
exactly 2 x 2 of them: off the grid, a ViT from scratch learns far more slowly.

    python examples/make_digits.py --out digits --train 3000 --val 500
    python examples/make_digits.py --out sizes --sizes      # on 2 x 2, 3 x 3 or 4 x 4 patches, a third of the pictures each

    digits/train/CLASS/NAME.png  digits/val/CLASS/NAME.png    ImageFolder, 110 x 110 pixels
    digits/masks/...             255 inside the digit's box, for `datalth-shards score`
"""

from pathlib import Path

import click
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CANVAS, MARGIN, PATCH = 110, 7, 16  # 110 - 2 * 7 = 6 * 16
DIGIT, FRAGMENT = 32, 14
TRAIN_DIGITS = 1400  # of 1797; the rest is for val, so that no handwriting stands in both


def enlarge(digit: np.ndarray, side: int) -> np.ndarray:
    """[8, 8] grey of 0-16 -> [side, side] of 0-255."""
    image = Image.fromarray((digit * 15.9).astype(np.uint8))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).astype(float)


def compose(digits: np.ndarray, chosen: int, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A canvas [110, 110] with digit `chosen`, side x side pixels, and its mask."""
    canvas = rng.normal(70, 20, (CANVAS, CANVAS))
    for _ in range(14):  # fragments, at the same stroke width as the digit itself
        piece = enlarge(digits[rng.integers(len(digits))], DIGIT)
        y, x = rng.integers(0, DIGIT - FRAGMENT, 2)
        top, left = rng.integers(0, CANVAS - FRAGMENT, 2)
        spot = canvas[top : top + FRAGMENT, left : left + FRAGMENT]
        np.maximum(spot, piece[y : y + FRAGMENT, x : x + FRAGMENT] * 0.8, out=spot)
    top, left = MARGIN + PATCH * rng.integers(0, (CANVAS - 2 * MARGIN - side) // PATCH + 1, 2)
    spot = canvas[top : top + side, left : left + side]
    np.maximum(spot, enlarge(digits[chosen], side), out=spot)
    mask = np.zeros((CANVAS, CANVAS))
    mask[top : top + side, left : left + side] = 255
    return canvas.clip(0, 255), mask


def write(out: Path, name: Path, picture: np.ndarray, mask: np.ndarray) -> None:
    """A picture, and its mask under the same name in masks/."""
    for root, pixels in ((out, picture), (out / "masks", mask)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / name)


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--train", default=3000, show_default=True, help="Pictures for training.")
@click.option("--val", default=500, show_default=True, help="Pictures for validation.")
@click.option("--sizes", is_flag=True, help="Digits of three sizes, of 4, 9 and 16 patches.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, train: int, val: int, sizes: bool, seed: int) -> None:
    """Write cluttered digits and their masks."""
    digits, labels = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8)
    for split, count, pool in (("train", train, range(TRAIN_DIGITS)), ("val", val, range(TRAIN_DIGITS, len(digits)))):
        part = digits[pool.start : pool.stop]
        for i in range(count):
            rng = np.random.default_rng([seed, pool.start, i])
            chosen = i % len(part)
            side = int(rng.choice([DIGIT, DIGIT + PATCH, DIGIT + 2 * PATCH])) if sizes else DIGIT
            picture, mask = compose(part, chosen, side, rng)
            write(out, Path(split, str(labels[pool.start + chosen]), f"{i:05d}.png"), picture, mask)
    click.echo(f"{out}: {train} train and {val} val pictures of 10 classes, {CANVAS} x {CANVAS} pixels")


if __name__ == "__main__":
    main()
