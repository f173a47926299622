"""Images: what of a file is stored, how it is decoded, and the pixels of a view.

`render_view(s)` is the ONE place where pixels of a view are made; the miner and the trainer both use
it, so a ticket belongs to exactly the pixels the student sees.
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from shards.errors import ImageError
from shards.schema import MAX_STORE_SIDE

# Checked against the header before any pixel is decoded; Pillow's own default warning limit.
MAX_PIXELS = 89_478_485
STORE_QUALITY = 95  # of images re-encoded by store_side
_STRIP_PIXELS = 1 << 22  # converted at once
_ORIENTATION = 0x0112  # EXIF tag
_BITS, _PHOTOMETRIC, _PLANES, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 258, 262, 284, 322, 323, 339  # TIFF tags


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An input image as a ticket set stores it; sizes are in the frame that boxes refer to."""

    data: bytes
    member: str  # jpg, png or webp
    width: int
    height: int
    source_width: int
    source_height: int
    orientation: int  # EXIF, 1 where absent
    transcoded: bool


def store_image(data: bytes, exif: str = "ignore", store_side: int | None = None) -> tuple[StoredImage, np.ndarray]:
    """Decide what to store of a file, and decode that.

    JPEG, PNG and WebP (by their magic bytes) keep their bytes; anything else Pillow reads becomes a
    lossless PNG. With `store_side`, an image whose short side is longer is resized and becomes a JPEG.

    Returns:
        The stored image, and its pixels, uint8 [height, width, 3].
    Raises:
        ImageError: not an image, truncated, too large, or of a kind whose pixels have no fixed range.
    """
    pixels = _fast_jpeg(data) if exif == "ignore" else None
    if pixels is not None:
        orientation = _orientation(_open(data))
    else:
        image, bits, inverted = _loaded(data)
        # Read after decoding, which finds a PNG's late block, and before it is turned, which takes its tag away.
        orientation = _orientation(image)
        pixels = _rgb(image, bits, inverted, exif)
    source_size = pixels.shape[1::-1]
    member, stored = _sniff(data), data
    if store_side and min(source_size) > store_side:
        member, stored = "jpg", _resized_jpeg(pixels, store_side)
        pixels = decode(stored)
    elif member is None:
        member, stored = "png", _png(pixels)
    height, width = pixels.shape[:2]
    kept = StoredImage(
        stored, member, width, height, source_size[0], source_size[1], orientation, transcoded=stored is not data
    )
    return kept, pixels


def decode(data: bytes, exif: str = "ignore") -> np.ndarray:
    """uint8 [H, W, 3] RGB; alpha is dropped as timm and torchvision do, gray of more than 8 bits keeps its high ones.

    Raises:
        ImageError: as `store_image`.
    """
    pixels = _fast_jpeg(data) if exif == "ignore" else None
    return _rgb(*_loaded(data), exif) if pixels is None else pixels


def decode_jpeg(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a baseline JPEG of three colors whose header was checked: the same by Pillow and simplejpeg.

    Raises:
        ImageError: it cannot be decoded.
    """
    decoder = _simplejpeg()
    with _decoding():
        if decoder is not None:
            pixels: np.ndarray = decoder.decode_jpeg(data)
            return pixels
        return np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"]))


def render_view(image: bytes, view: np.ndarray, size: int, exif: str) -> np.ndarray:
    """The pixels of one view of a stored image.

    Args:
        image: encoded, as stored.
        view: (top, left, height, width, flip).
        size: S; the box is resized to S x S (bicubic, antialiased), then flipped.
        exif: the frame that the box refers to: "apply" where the set was mined with `exif` apply, else "ignore"
            (`TicketSet.exif`). `Sample.render` knows it by itself.
    Returns:
        uint8 [S, S, 3]
    Raises:
        ImageError: the image cannot be decoded.
        ValueError: the box is not inside the image.
    """
    pixels: np.ndarray = render_views(image, np.asarray(view)[None], size, exif)[0]
    return pixels


def render_views(image: bytes, views: np.ndarray, size: int, exif: str) -> np.ndarray:
    """Several views of one decode: views [V, 5] -> uint8 [V, S, S, 3]. See `render_view`."""
    return render_pixels(decode(image, exif), views, size)


def render_pixels(pixels: np.ndarray, views: np.ndarray, size: int) -> np.ndarray:
    """`render_views` of an image that is decoded already, uint8 [H, W, 3]."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    out = np.empty((len(views), size, size, 3), np.uint8)
    for slot, (top, left, height, width, flip) in zip(out, np.asarray(views).tolist(), strict=True):
        box = pixels[top : top + height, left : left + width]
        if min(top, left) < 0 or min(height, width) < 1 or box.shape[:2] != (height, width):
            raise ImageError(
                f"view: expected a box inside {pixels.shape[1]}x{pixels.shape[0]} pixels, got top {top}, left {left},"
                f" height {height}, width {width}"
            )
        # Channels-last memory: torchvision's uint8 kernel is twice as fast on it as on planes.
        planes = torch.from_numpy(box.copy()).permute(2, 0, 1)
        resized = tv.resize(planes, [size, size], InterpolationMode.BICUBIC, antialias=True)
        # torch turns channels-last rows round ten times as fast as numpy copies a view with a negative stride.
        slot[:] = (resized.flip(2) if flip else resized).permute(1, 2, 0).numpy()
    return out


def resize_views(views: np.ndarray, size: int) -> np.ndarray:
    """Whole views uint8 [V, S, S, 3] at another size: uint8 [V, size, size, 3]; as they are where it is the same."""
    side = views.shape[1]
    whole = np.array([[0, 0, side, side, 0]])
    return views if size == side else np.concatenate([render_pixels(view, whole, size) for view in views])


@functools.cache
def _formats() -> list[str]:
    """Of Pillow's formats those that hold photos. EPS and its like would start other programs."""
    Image.init()
    wanted = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000", "TGA"]
    return [name for name in wanted if name in Image.OPEN]


def _sniff(data: bytes) -> str | None:
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def _open(data: bytes) -> Image.Image:
    """Header only; the size is checked before anything is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        raise ImageError(f"too large: more than {MAX_PIXELS} pixels") from None
    except MemoryError:  # says nothing of the image
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parser met
        raise ImageError(f"not an image: {_reason(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"too large: {image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    return image


def _fast_jpeg(data: bytes) -> np.ndarray | None:
    """An ordinary JPEG through simplejpeg, where that is installed: the same pixels as Pillow's in less time.

    Whatever it finds odd (other color spaces, damage, a size that is refused) is left to Pillow, and so are its words.
    """
    decoder = _simplejpeg()
    if decoder is None or data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, color, _ = decoder.decode_jpeg_header(data)
        if color != "YCbCr" or height * width > MAX_PIXELS:
            return None
        pixels: np.ndarray = decoder.decode_jpeg(data)
        return pixels
    except ValueError:
        return None


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:  # an extra
        return None
    return simplejpeg


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; 1 where there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block: Pillow's own exif_transpose would find no orientation either
        return 1
    return value if value in range(1, 9) else 1


def _loaded(data: bytes) -> tuple[Image.Image, int, bool]:
    """A file decoded by Pillow, and `_depth` of it."""
    image = _open(data)
    with _decoding():
        depth = _depth(image, data)  # before it is decoded: some depths are refused for what decoding would take
        image.load()
        return image, *depth


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f"cannot be decoded: {_reason(error)}") from None


def _depth(image: Image.Image, data: bytes) -> tuple[int, bool]:
    """Bits of gray that Pillow hands on as it found them (modes I), and whether white is 0 in them.

    Raises:
        ImageError: pixels without a fixed range, or that Pillow is known to decode wrongly.
    """
    if image.mode == "F":
        raise ImageError("floating-point pixels have no fixed range")
    bits, inverted = 16, False  # of a PNG; JPEG 2000 and PPM are scaled to that by Pillow
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        tile = tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1)
        if tile > MAX_PIXELS:  # libtiff holds a whole one, however small the image
            raise ImageError(f"too large: a tile of {tile} pixels is more than {MAX_PIXELS}")
        bits, inverted = max(tags.get(_BITS, (1,))), tags.get(_PHOTOMETRIC, 0) == 0
        if max(tags.get(_SAMPLE_FORMAT, (1,))) == 2:
            raise ImageError("signed integer pixels have no fixed range")
        if image.mode == "I":  # few of these files use more than a small part of it
            raise ImageError(f"{bits}-bit integer pixels have no fixed range")
        if bits > 8 and tags.get(_PLANES, 1) == 2 and image.info.get("compression") == "raw":
            raise ImageError(
                f"{bits}-bit colours in uncompressed planes: Pillow mixes their bytes; store them by pixel"
            )
    if image.format == "JPEG2000":
        depths = _jpeg2000_depths(data)
        if depths != {7} and not (image.mode == "I;16" and depths <= set(range(8, 16))):
            raise ImageError(
                "JPEG 2000 of other than 8 bits a colour, or 9 to 16 of grey: Pillow gives wrong pixels; convert it"
            )
    return bits, inverted


def _jpeg2000_depths(data: bytes) -> set[int]:
    """Bits less one of each component, plus 128 where signed, as the SIZ segment has them."""
    start = data.find(b"\xff\x4f\xff\x51")
    count = int.from_bytes(data[start + 40 : start + 42], "big")
    return set(data[start + 42 : start + 42 + 3 * count : 3])


def _rgb(image: Image.Image, bits: int, inverted: bool, exif: str) -> np.ndarray:
    """uint8 [H, W, 3] of a loaded image; a large one strip by strip, so that no second copy of it is ever whole."""
    with _decoding():
        if exif == "apply":
            ImageOps.exif_transpose(image, in_place=True)  # a second whole image only while it turns
        width, height = image.size
        rows = max(1, _STRIP_PIXELS // width)
        if rows >= height:
            return _strip(image, bits, inverted)
        out = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height)))
            out[top : top + rows] = _strip(strip, bits, inverted)
        return out


def _strip(image: Image.Image, bits: int, inverted: bool) -> np.ndarray:
    if image.mode.startswith("I"):  # convert("RGB") would clip it to white
        gray = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return np.repeat((255 - gray if inverted else gray)[:, :, None], 3, axis=2)
    # convert() copies an image that is RGB already.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _reason(error: Exception) -> str:
    """One line, without the addresses that would differ from run to run."""
    text = str(error).split("\n")[0].split(" <_io")[0].strip()
    return text or type(error).__name__


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _resized_jpeg(pixels: np.ndarray, short_side: int) -> bytes:
    height, width = pixels.shape[:2]
    factor = short_side / min(width, height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    if max(size) > MAX_STORE_SIDE:
        raise ImageError(
            f"too long: {size[0]}x{size[1]}, to which it is resized, is more than a JPEG's {MAX_STORE_SIDE}"
        )
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=STORE_QUALITY)
    return out.getvalue()
