"""Pictures of tickets, by Pillow alone: views with their tickets lit, heat maps, contact sheets."""

import functools
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, SMALL_TILE = 160, 96  # pixels of a view's side; of many views together
GAP = 8
LARGE, SMALL = 15, 12  # of letters
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
SHADE = (38, 44, 78)  # dropped patches sink into this: told from black and from white alike
HEAT = np.array([(14, 8, 48), (88, 20, 110), (186, 50, 90), (245, 130, 50), (252, 240, 160)], float)  # of 0 to 1


def view_tile(pixels: np.ndarray, view: Sequence[int], side: int = TILE) -> Image.Image:
    """A view of decoded pixels [H, W, 3] at a size to look at."""
    top, left, height, width, flip = (int(v) for v in view)
    box = (left, top, left + width, top + height)
    tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box)
    return tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else tile


def ticket_tile(tile: Image.Image, ticket: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """The kept patches of a view as they are, dropped ones dimmed."""
    mask = np.zeros(grid[0] * grid[1], np.uint8)
    mask[ticket] = 255
    lit = Image.fromarray(mask.reshape(grid)).resize(tile.size, Image.Resampling.NEAREST)
    dimmed = Image.blend(tile.convert("L").convert("RGB"), Image.new("RGB", tile.size, SHADE), 0.8)
    return Image.composite(tile, dimmed, lit)


def rank_tile(tile: Image.Image, ranking: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """The ranking as a heat map over the gray view: bright = most informative."""
    value = np.empty(len(ranking))
    value[ranking] = np.linspace(1, 0, len(ranking))
    return Image.blend(tile.convert("L").convert("RGB"), heat_map(value.reshape(grid), tile.size[0]), 0.65)


def heat_map(values: np.ndarray, side: int) -> Image.Image:
    """Values in [0, 1] as colored cells; the longer side has `side` pixels."""
    position = np.clip(values, 0, 1) * (len(HEAT) - 1)
    low = np.minimum(position.astype(int), len(HEAT) - 2)
    rest = (position - low)[..., None]
    colors = (HEAT[low] * (1 - rest) + HEAT[low + 1] * rest).astype(np.uint8)
    height, width = values.shape
    scale = side / max(height, width)
    return Image.fromarray(colors).resize((round(width * scale), round(height * scale)), Image.Resampling.NEAREST)


def page(rows: Sequence[tuple[str, Sequence[Image.Image]]], head: Sequence[str], title: str) -> Image.Image:
    """Rows of tiles with a label at the left and a word over each column."""
    label_width = max([_width(line, SMALL) for label, _ in rows for line in label.split("\n")] + [0]) + 2 * GAP
    columns = max(len(tiles) for _, tiles in rows)
    side = rows[0][1][0].size
    width = max(label_width + columns * (side[0] + GAP), _width(title, LARGE) + 2 * GAP)
    top = 30 + (20 if head else 0)
    sheet = Image.new("RGB", (width, top + len(rows) * (side[1] + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (GAP, 7), title, INK, LARGE)
    for column, word in enumerate(head):
        _write(draw, (label_width + column * (side[0] + GAP), 31), word, FAINT, SMALL)
    for number, (label, tiles) in enumerate(rows):
        y = top + number * (side[1] + GAP)
        for i, line in enumerate(label.split("\n")):
            _write(draw, (GAP, y + 4 + 16 * i), line, INK if i == 0 else FAINT, SMALL)
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (label_width + column * (side[0] + GAP), y))
    return sheet


def sheet(blocks: Sequence[tuple[str, Sequence[Image.Image]]], title: str) -> Image.Image:
    """Rows of tiles with a caption over each, in as many columns of rows as make the picture most nearly 3:2."""
    side = blocks[0][1][0].width
    width = max(len(tiles) for _, tiles in blocks) * (side + GAP) - GAP
    across, down = width + 3 * GAP, side + 26
    count, top = len(blocks), 38

    def size(columns: int) -> tuple[int, int]:
        return max(columns * across, _width(title, LARGE) + 2 * GAP), top + -(-count // columns) * down

    def off(columns: int) -> float:
        wide, high = size(columns)
        return abs(math.log(wide / high / 1.5))

    columns = min(range(1, count + 1), key=off)
    picture = Image.new("RGB", size(columns), PAPER)
    draw = ImageDraw.Draw(picture)
    _write(draw, (GAP, 8), title, INK, LARGE)
    for number, (caption, tiles) in enumerate(blocks):
        x, y = GAP + number % columns * across, top + number // columns * down
        _write(draw, (x, y), _cut(caption, SMALL, width), INK, SMALL)
        for place, tile in enumerate(tiles):
            picture.paste(tile, (x + place * (side + GAP), y + 18))
    return picture


def _cut(text: str, size: int, width: int) -> str:
    """Text, or as much of its beginning as there is room for."""
    if _width(text, size) <= width:
        return text
    fits = max((end for end in range(len(text)) if _width(f"{text[:end]}...", size) <= width), default=0)
    return f"{text[:fits]}..."


def maps(named: Sequence[tuple[str, np.ndarray]], title: str, columns: int = 6, side: int = TILE) -> Image.Image:
    """Heat maps with a caption each and one color scale, 0 to the highest value, drawn at the end."""
    highest = max(float(values.max()) for _, values in named) or 1.0
    columns = min(columns, len(named))
    cell = side + 26
    width = max(GAP + columns * (side + GAP), _width(title, LARGE) + 2 * GAP, 360)
    height = 34 + -(-len(named) // columns) * cell + 40
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (GAP, 8), title, INK, LARGE)
    for number, (caption, values) in enumerate(named):
        x, y = GAP + number % columns * (side + GAP), 34 + number // columns * cell
        sheet.paste(heat_map(values / highest, side), (x, y + 18))
        _write(draw, (x, y), caption, INK, SMALL)
    bar = heat_map(np.linspace(0, 1, 200)[None], 200).resize((200, 12))
    sheet.paste(bar, (GAP, height - 26))
    _write(draw, (GAP + 208, height - 28), f"0 to {highest:.2f} of the tickets hold the patch", FAINT, SMALL)
    return sheet


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: tuple[int, ...], size: int) -> None:
    font, text = _font(text, size)
    draw.text(place, text, color, font)


def _width(text: str, size: int) -> int:
    font, text = _font(text, size)
    return round(font.getlength(text))


def _font(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font for a line of text, and the text that it can draw: what no font here has is spelled U+732B, not a box."""
    plain, wide = _fonts(size)
    if not any(_lacks(plain, char) for char in text):
        return plain, text
    return wide, "".join(f"U+{ord(char):04X}" if _lacks(wide, char) else char for char in text)


@functools.cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ImageFont.FreeTypeFont]:
    """Pillow's own, of Latin letters, and matplotlib's, of most alphabets; importing matplotlib would take a second."""
    plain, wide = ImageFont.load_default(size), ImageFont.load_default(size)
    found = importlib.util.find_spec("matplotlib")
    if found and found.origin:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        wide = ImageFont.truetype(str(path), size) if path.exists() else plain
    assert isinstance(plain, ImageFont.FreeTypeFont) and isinstance(wide, ImageFont.FreeTypeFont)
    return plain, wide


@functools.cache
def _lacks(font: ImageFont.FreeTypeFont, char: str) -> bool:
    """Whether a font draws a character as it draws what is none, or not at all."""
    if not char.isprintable():
        return True
    drawn, box = font.getmask(char), font.getmask("\U0010ffff")
    return drawn.size == box.size and bytes(drawn) == bytes(box)
