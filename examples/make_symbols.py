"""Cluttered symbols: a small labeled image set that is not digits; pictures of the same size and masks as make_digits.py's.

One of ten symbols (chess pieces, an anchor, scissors, ...), of a light color, any size, slant and place, on a darker canvas
among pieces of other symbols: too small to be told by, so that only the whole symbol tells the class. Smaller ones of any
color take a small ViT more than 3000 pictures.

    python examples/make_symbols.py --out symbols --train 3000 --val 500

    symbols/train/CLASS/NAME.png  symbols/val/CLASS/NAME.png    ImageFolder, 110 x 110 pixels
    symbols/masks/...             255 inside the symbol's box, for `datalth-shards score`

Source of the symbols: the font DejaVu Sans, which matplotlib brings along.
"""

from functools import cache
from pathlib import Path

import click
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from make_digits import CANVAS, MARGIN, write

SIZES, SLANT = (40, 56), 30  # pixels of the longer side; degrees
PIECES, PIECE = 14, 14
CLASSES = {
    "anchor": "\u2693",
    "bishop": "\u265d",
    "heart": "\u2665",
    "king": "\u265a",
    "knight": "\u265e",
    "plane": "\u2708",
    "recycling": "\u267b",
    "scissors": "\u2702",
    "sun": "\u2600",
    "umbrella": "\u2602",
}
OTHERS = (
    "\u265b\u265c\u265f\u2601\u2605\u260e\u2618\u2622\u262f\u2640\u2642\u2660\u2663\u266b\u2694\u2696\u2699\u2709\u2744"
)


@cache
def symbol(text: str) -> Image.Image:
    """A symbol, somewhat larger than it will stand in a picture: L."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), 72)
    box = font.getbbox(text)
    image = Image.new("L", (int(box[2] - box[0]), int(box[3] - box[1])))
    ImageDraw.Draw(image).text((-box[0], -box[1]), text, 255, font)
    return image


def turned(text: str, rng: np.random.Generator) -> np.ndarray:
    """A symbol at random size and slant, [height, width] of 0-1."""
    image = symbol(text).rotate(rng.uniform(-SLANT, SLANT), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getbbox())
    scale = rng.uniform(*SIZES) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS)) / 255


def paint(canvas: np.ndarray, shape: np.ndarray, color: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """Lay a shape of one color somewhere inside the view; returns where."""
    top, left = (int(rng.integers(MARGIN, CANVAS - MARGIN - side + 1)) for side in shape.shape)
    place = slice(top, top + shape.shape[0]), slice(left, left + shape.shape[1])
    canvas[place] += shape[:, :, None] * (color - canvas[place])
    return place


def compose(text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A canvas [110, 110, 3] with a symbol, and its mask [110, 110]."""
    ground = rng.uniform(20, 110, 3)
    canvas = ground + rng.normal(0, 20, (CANVAS, CANVAS, 1))
    for _ in range(PIECES):
        whole = turned(str(rng.choice([*OTHERS, *CLASSES.values()])), rng)
        y, x = (int(rng.integers(0, max(1, side - PIECE))) for side in whole.shape)
        paint(canvas, whole[y : y + PIECE, x : x + PIECE], rng.uniform(0, 200, 3), rng)
    place = paint(canvas, turned(text, rng), rng.uniform(150, 255, 3), rng)
    mask = np.zeros((CANVAS, CANVAS))
    mask[place] = 255
    return canvas.clip(0, 255), mask


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--train", default=3000, show_default=True, help="Pictures for training.")
@click.option("--val", default=500, show_default=True, help="Pictures for validation.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, train: int, val: int, seed: int) -> None:
    """Write cluttered symbols and their masks."""
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        for i in range(count):
            rng = np.random.default_rng([seed, number, i])
            label = [*CLASSES][i % len(CLASSES)]
            picture, mask = compose(CLASSES[label], rng)
            write(out, Path(split, label, f"{i:05d}.png"), picture, mask)
    click.echo(f"{out}: {train} train and {val} val pictures of {len(CLASSES)} classes, {CANVAS} x {CANVAS} pixels")


if __name__ == "__main__":
    main()
