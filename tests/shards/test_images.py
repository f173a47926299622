"""Images: what is stored of a file, how odd ones are decoded, and the pixels of a view."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from shards import images
from shards.errors import ImageError
from shards.images import decode, render_pixels, render_view, render_views, store_image
from shards.views import image_views

BOXES = [
    (0, 0, 60, 80, 0),
    (3, 5, 20, 30, 1),
    (0, 40, 60, 11, 0),
    (50, 0, 10, 80, 1),
    (10, 10, 3, 3, 0),
    (59, 79, 1, 1, 0),
]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def photo(width=80, height=60):
    """Smooth colors with one sharp edge."""
    small = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 5, 3), np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 240, 20), (width // 3, height // 3, width // 2, height // 2))
    return image


def encode(image, kind, **options):
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def oriented(image, orientation, kind="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif)


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, color, rows):
    """A PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def without_warnings(test):
    return pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")(test)


# The pixels of a view.


@pytest.mark.parametrize("size", [8, 32, 224])
@pytest.mark.parametrize("box", BOXES)
def test_a_view_is_torchvisions_resized_crop(box, size):
    pixels = np.asarray(photo())
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    cropped = tv.resized_crop(planes, *box[:4], [size, size], InterpolationMode.BICUBIC, antialias=True)
    expected = (tv.horizontal_flip(cropped) if box[4] else cropped).permute(1, 2, 0).numpy()
    assert np.array_equal(render_view(encode(photo(), "PNG"), box, size, "ignore"), expected)


@pytest.mark.parametrize(
    "size", [8, 32, 48]
)  # both round to whole levels between their two passes: sevenfold enlarged, 2
@pytest.mark.parametrize("box", BOXES)
def test_a_view_is_within_one_level_of_pillows_bicubic(box, size):
    assert off_pillow(box, size, Image.Resampling.BICUBIC) <= 1


@pytest.mark.parametrize("wrong", [Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.NEAREST])
def test_another_filter_is_more_than_one_level_off(wrong):
    """The control of the test above; NEAREST stands for no antialias."""
    assert all(off_pillow(box, 32, wrong) > 1 for box in BOXES[:4])


def off_pillow(box, size, resampling):
    top, left, height, width, flip = box
    picture = photo().crop((left, top, left + width, top + height)).resize((size, size), resampling)
    expected = np.asarray(picture)[:, :: -1 if flip else 1].astype(int)
    return np.abs(expected - render_view(encode(photo(), "PNG"), box, size, "ignore")).max()


def test_a_flip_mirrors_the_resized_box():
    data = encode(photo(), "PNG")
    plain, flipped = (render_view(data, (3, 5, 40, 30, flip), 32, "ignore") for flip in (0, 1))
    assert np.array_equal(flipped, plain[:, ::-1])
    assert not np.array_equal(flipped, plain)


def test_several_views_of_one_decode_are_those_rendered_singly(monkeypatch):
    data = encode(photo(), "JPEG")
    views = image_views(0, "k", 8, 80, 60)
    singly = np.stack([render_view(data, view, 32, "ignore") for view in views])
    decoded = []
    monkeypatch.setattr(images, "decode", lambda *a: decoded.append(a) or decode(*a))
    assert np.array_equal(render_views(data, views, 32, "ignore"), singly)
    assert len(decoded) == 1
    assert len(np.unique(singly, axis=0)) == 8
    assert singly.dtype == np.uint8 and singly.shape == (8, 32, 32, 3)


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5, 0), (0, 0, 61, 80, 0), (0, 76, 5, 5, 0), (0, 0, 0, 5, 0), (60, 0, 1, 1, 0)]
)
def test_a_box_outside_the_image_is_refused(box):
    with pytest.raises(
        ValueError, match=r"expected a box inside 80x60 pixels, got top -?\d+, left \d+, height \d+, width"
    ):
        render_view(encode(photo(), "PNG"), box, 8, "ignore")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_tiny_images_have_views(size):
    data = encode(photo(*size), "PNG")
    out = render_views(data, image_views(0, "k", 4, *size), 16, "ignore")
    assert out.shape == (4, 16, 16, 3)
    if size == (1, 1):
        assert (out == np.asarray(photo(1, 1))).all()


# What is stored.


@pytest.mark.parametrize(
    ("kind", "member"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", None), ("BMP", None), ("TIFF", None), ("PPM", None)]
)  # fmt: skip
def test_jpeg_png_and_webp_keep_their_bytes_and_others_become_lossless_png(kind, member):
    data = encode(photo(), kind)
    stored, pixels = store_image(data)
    assert (stored.width, stored.height, stored.source_width, stored.source_height) == (80, 60, 80, 60)
    assert stored.transcoded == (member is None)
    assert stored.member == (member or "png")
    if member:
        assert stored.data == data
    else:
        assert stored.data.startswith(b"\x89PNG")
    assert np.array_equal(decode(stored.data), pixels)
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_the_kind_comes_from_the_bytes():
    """A PNG that is named .jpg is stored as .png: nothing here ever sees a name."""
    assert store_image(encode(PIXELS, "PNG"))[0].member == "png"


# Odd images.


def test_grey_is_three_equal_channels():
    pixels = decode(encode(photo().convert("L"), "JPEG"))
    assert pixels.shape == (60, 80, 3)
    assert (pixels == pixels[:, :, :1]).all() and pixels.std() > 10


@pytest.mark.parametrize("transparent", [False, True])
@without_warnings
def test_palette_images_have_their_colours(transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    data = encode(image, "PNG", **({"transparency": b"\x00\x80"} if transparent else {}))
    assert ("transparency" in Image.open(io.BytesIO(data)).info) == transparent
    assert decode(data).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_alpha_is_dropped_and_the_colour_below_it_kept():
    rgba = np.array([[[10, 20, 30, 0], [200, 100, 50, 128]]], np.uint8)
    assert decode(encode(rgba, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    grey = Image.fromarray(np.array([[[77, 0], [99, 255]]], np.uint8), "LA")
    assert decode(encode(grey, "PNG")).tolist() == [[[77] * 3, [99] * 3]]


def test_cmyk_jpeg_has_its_colours():
    pixels = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(kind):
    grey = np.array([[0x0000, 0x12FF, 0x8000, 0xFFFF]], np.uint16)
    data = encode(grey, kind)
    assert decode(data)[0].tolist() == [[0] * 3, [0x12] * 3, [0x80] * 3, [0xFF] * 3]
    naive = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (naive[0, 1:] == 255).all(), "the control: Pillow's own conversion is white"


def test_16_bit_colour_keeps_its_high_bytes():
    row = b"\0" + struct.pack(">6H", 0x12FF, 0x3400, 0x56FF, 0x0000, 0xFFFF, 0x8000)
    assert decode(png(2, 1, 16, 2, row)).tolist() == [[[0x12, 0x34, 0x56], [0, 0xFF, 0x80]]]


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def tiff(bits, data, width, height, samples=1, order="<", **tags):
    """A TIFF by hand of one strip; `tags` are named by their number: _262=0."""
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: samples, 278: height, 279: len(data)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    start = 8 + 2 + 12 * len(values) + 4
    shorts = {tag: [value] * (samples if tag in (258, 339) else 1) for tag, value in values.items()}
    arrays = {tag: list_ for tag, list_ in shorts.items() if len(list_) > 2}
    place = dict(zip(arrays, range(start, start + 100 * len(arrays), 100), strict=True))
    shorts[273] = [start + 100 * len(arrays)]
    entries = [
        struct.pack(f"{order}HHII", tag, 3, len(value), place[tag])
        if tag in place
        else struct.pack(f"{order}HHII", tag, 4, 1, value[0])
        if len(value) == 1 and tag != 258
        else struct.pack(f"{order}HHI{len(value)}H", tag, 3, len(value), *value).ljust(12, b"\0")
        for tag, value in sorted(shorts.items())
    ]
    tail = b"".join(struct.pack(f"{order}{len(value)}H", *value).ljust(100, b"\0") for value in arrays.values())
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + b"".join(entries) + bytes(4) + tail + data


TWELVE = bytes.fromhex("000 00f 010 7ff 800 fff".replace(" ", ""))  # six grey values of twelve bits
SIXTEEN = (0x0000, 0x00FF, 0x0100, 0x7FFF, 0x8000, 0xFFFF)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(12, TWELVE, 6, 1), [0, 0, 1, 127, 128, 255]),
        (tiff(12, zlib.compress(TWELVE), 6, 1, _259=8), [0, 0, 1, 127, 128, 255]),
        (tiff(16, struct.pack("<6H", *SIXTEEN), 6, 1), [0, 0, 1, 127, 128, 255]),
        (tiff(16, struct.pack(">6H", *SIXTEEN), 6, 1, order=">"), [0, 0, 1, 127, 128, 255]),
        (tiff(16, struct.pack("<6H", *SIXTEEN), 6, 1, _262=0), [255, 255, 254, 128, 127, 0]),  # white is zero
        (tiff(16, zlib.compress(struct.pack("<6H", *SIXTEEN)), 6, 1, _262=0, _259=8), [255, 255, 254, 128, 127, 0]),
        (tiff(8, bytes([0, 1, 127, 128, 254, 255]), 6, 1, _262=0), [255, 254, 128, 127, 1, 0]),
        (tiff(4, bytes([0x01, 0x78, 0xEF]), 6, 1, _262=0), [255, 238, 136, 119, 17, 0]),
        (tiff(2, bytes([0b00011011, 0b01000000]), 6, 1), [0, 85, 170, 255, 85, 0]),
        (tiff(1, bytes([0b01101000]), 6, 1, _262=0), [255, 0, 0, 255, 0, 255]),
        (b"P5 6 1 65535\n" + struct.pack(">6H", *SIXTEEN), [0, 0, 1, 127, 128, 255]),
        (b"P5 6 1 4095\n" + struct.pack(">6H", 0, 15, 16, 2047, 2048, 4095), [0, 0, 1, 127, 128, 255]),
        (b"P2 6 1 1000\n0 1 10 500 900 1000\n", [0, 0, 2, 128, 230, 255]),  # scaled to 65535, then the high byte
        (b"P5 6 1 5\n" + bytes(range(6)), [0, 51, 102, 153, 204, 255]),
        (png(6, 1, 16, 0, b"\0" + struct.pack(">6H", *SIXTEEN)), [0, 0, 1, 127, 128, 255]),
        (png(3, 1, 16, 4, b"\0" + struct.pack(">6H", *SIXTEEN)), [0, 1, 128]),  # grey, alpha
        (png(6, 1, 4, 0, b"\0" + bytes([0x01, 0x78, 0xEF])), [0, 17, 119, 136, 238, 255]),
        (png(6, 1, 2, 0, b"\0" + bytes([0b00011011, 0b01000000])), [0, 85, 170, 255, 85, 0]),
    ],
)
def test_grey_of_any_depth_has_its_own_range(data, expected):
    stored, pixels = store_image(data)
    assert pixels.tolist() == [[[value] * 3 for value in expected]]
    assert decode(stored.data).tolist() == pixels.tolist()


def test_a_jpeg_2000_of_16_bit_grey_keeps_its_high_byte():
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    data = encode(grey, "JPEG2000")
    assert np.array_equal(decode(data), np.repeat((grey // 256).astype(np.uint8)[:, :, None], 3, 2))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colours_of_a_tiff_keep_their_high_bytes(order):
    data = struct.pack(f"{order}6H", 0x12FF, 0x3400, 0x56FF, 0x0000, 0xFFFF, 0x8000)
    assert decode(tiff(16, data, 2, 1, 3, order, _262=2)).tolist() == [[[0x12, 0x34, 0x56], [0, 0xFF, 0x80]]]
    # In planes, Pillow would take every other byte for a pixel.
    with pytest.raises(ImageError, match="16-bit colours in uncompressed planes"):
        decode(tiff(16, data, 2, 1, 3, order, _262=2, _284=2))


def jpeg_2000(depth, mode="RGB"):
    """One that says that its components have `depth` bits; more than 128 where they are signed."""
    data = bytearray(encode(photo().convert(mode), "JPEG2000"))
    size = data.index(b"\xff\x4f\xff\x51")
    for component in range(data[size + 41]):
        data[size + 42 + 3 * component] = depth - 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(np.arange(6, dtype=np.int32).reshape(2, 3), "TIFF"), "signed integer pixels have no fixed range"),
        (tiff(16, bytes(12), 6, 1, _339=2), "signed integer pixels have no fixed range"),
        (tiff(8, bytes(6), 6, 1, _339=2), "signed integer pixels have no fixed range"),
        (tiff(32, bytes(24), 6, 1), "32-bit integer pixels have no fixed range"),
        (encode(np.ones((4, 4), np.float32), "TIFF"), "floating-point pixels have no fixed range"),
        (jpeg_2000(12), "JPEG 2000 of other than 8 bits a colour"),  # Pillow: white comes out black
        (jpeg_2000(4, "L"), "JPEG 2000 of other than 8 bits a colour"),  # Pillow: white comes out grey
        (jpeg_2000(128 + 8, "L"), "JPEG 2000 of other than 8 bits a colour"),
        (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5), "floating-point pixels have no fixed range"),
    ],
)
def test_pixels_without_a_fixed_range_or_that_would_come_out_wrong_are_refused(data, reason):
    with pytest.raises(ImageError, match=f"^{reason}"):
        store_image(data)
    assert decode(jpeg_2000(8)).shape == (60, 80, 3), "the control"


def test_premultiplied_alpha_is_taken_out():
    data = bytes([50, 25, 5, 128, 200, 100, 0, 255])
    assert decode(tiff(8, data, 2, 1, 4, _262=2, _338=1)).tolist() == [[[99, 49, 9], [200, 100, 0]]]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    + [("PNG", mode) for mode in ("RGB", "P", "1", "RGBA", "LA", "I;16")]
    + [("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "CMYK"), ("TIFF", "LAB"), ("TIFF", "I;16")],
)
def test_a_large_image_is_converted_strip_by_strip_to_the_same_pixels(kind, mode, monkeypatch):
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (60, 80), np.uint16))
    else:
        image = Image.merge("LAB", photo().split()) if mode == "LAB" else photo().convert(mode)
    data = encode(image, kind)
    whole = decode(data)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 7 * 80)  # the last strip is shorter
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    assert np.array_equal(decode(data), whole)


PEAK = """
import resource, sys
from shards.images import store_image
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    store_image(data, "apply", 32)
except Exception as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(("depth", "color", "bytes_a_pixel"), [(16, 0, 2), (8, 6, 4), (8, 0, 1)])
def test_decoding_costs_the_image_and_its_colours_and_no_second_copy(depth, color, bytes_a_pixel, tmp_path):
    side = 5000
    row = bytes(1 + side * depth // 8 * {0: 1, 6: 4}[color])
    packer = zlib.compressobj(1)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0))
        + png_chunk(b"IDAT", b"".join(packer.compress(row) for _ in range(side)) + packer.flush())
        + png_chunk(b"IEND", b"")
    )
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "bomb.png"], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < (bytes_a_pixel + 3 + 1) * side**2 + 60e6


def test_a_tile_far_larger_than_its_image_is_refused_before_it_is_decoded():
    with pytest.raises(ImageError, match="^too large: a tile of 900000000 pixels is more than 89478485$"):
        store_image(tiff(8, bytes(9), 3, 3, _322=30_000, _323=30_000))


def test_an_image_that_stays_too_long_for_a_jpeg_is_refused(capfd):
    data = encode(Image.new("L", (70_000, 10)), "PNG")
    with pytest.raises(ImageError, match="^too long: 66500x95, to which it is resized, is more than a JPEG's 65500$"):
        store_image(encode(Image.new("L", (70_000, 100)), "PNG"), store_side=95)
    assert capfd.readouterr().err == ""
    assert store_image(data, store_side=9)[0].width == 63_000, "the control"


# Bad files.


@pytest.mark.parametrize(
    "data", [b"", b"hello, this is text\n", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", bytes(4096)]
)
def test_a_file_that_is_no_image_is_refused_in_one_line(data):
    with pytest.raises(ImageError) as error:
        store_image(data)
    assert str(error.value).startswith("not an image: ")
    assert "\n" not in str(error.value) and "0x" not in str(error.value), "an address would differ from run to run"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_a_truncated_file_is_refused(kind, exif):
    data = encode(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8), kind)
    with pytest.raises(ImageError) as first:
        store_image(data[: len(data) // 2], exif)
    with pytest.raises(ImageError) as again:
        store_image(data[: len(data) // 2], exif)
    assert str(first.value) == str(again.value)
    assert store_image(data, exif)[1].shape == (60, 80, 3)


@pytest.mark.parametrize(
    "side", [10_000, 65_000]
)  # over the limit, and over twice the limit, where Pillow itself refuses
@without_warnings
def test_an_image_over_the_pixel_limit_is_refused_before_it_is_decoded(side, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"^too large: .*more than 89478485 pixels"):
        store_image(png(side, side, 8, 2, b""))


def test_the_pixel_limit_itself_is_allowed(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 54)
    assert store_image(encode(PIXELS, "PNG"))[1].shape == (6, 9, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 53)
    with pytest.raises(ImageError, match="^too large: 9x6 is more than 53 pixels$"):
        store_image(encode(PIXELS, "PNG"))


# EXIF orientation.

# What makes the stored frame upright, in numpy's words.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: np.rot90(p, 2),
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_is_ignored_or_applied(orientation, kind):
    data = oriented(photo(), orientation, kind)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    ignored, pixels = store_image(data)
    assert (ignored.width, ignored.height, ignored.source_width, ignored.source_height) == (80, 60, 80, 60)
    assert np.array_equal(pixels, plain)
    applied, upright = store_image(data, "apply")
    size = (60, 80) if orientation >= 5 else (80, 60)
    assert (applied.width, applied.height, applied.source_width, applied.source_height) == (*size, *size)
    assert np.array_equal(upright, UPRIGHT[orientation](plain))
    assert applied.orientation == ignored.orientation == orientation
    assert applied.data == ignored.data == data


def test_a_box_lies_in_the_frame_that_exif_gives():
    data = oriented(photo(), 6)
    plain = decode(data)
    box = np.array([(50, 30, 30, 30, 0)])  # inside 60x80, outside 80x60
    expected = render_pixels(np.rot90(plain, -1), box, 16)[0]
    assert np.array_equal(render_view(data, box[0], 16, "apply"), expected)
    with pytest.raises(ValueError, match="inside 80x60"):
        render_view(data, box[0], 16, "ignore")


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_a_tiff_that_pillow_turns_upright_is_turned_once(exif):
    data = oriented(photo(), 6, "TIFF")
    stored, pixels = store_image(data, exif)
    assert np.array_equal(pixels, np.rot90(np.asarray(photo()), -1))
    assert (stored.width, stored.height, stored.source_width, stored.source_height) == (60, 80, 60, 80)
    assert stored.orientation == 1  # nothing is left to apply
    assert np.array_equal(decode(stored.data, exif), pixels)


def ifd(*entries):
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


BROKEN_EXIF = {
    "garbage": b"Exif\0\0garbage!!!!!!!!",
    "cut": ifd(struct.pack("<HHII", 0x0112, 3, 1, 6))[:18],
    "out of range": ifd(struct.pack("<HHII", 0x0112, 3, 1, 99)),
    "a text": ifd(struct.pack("<HHI4s", 0x0112, 2, 4, b"six")),
    "a pointer to nowhere": ifd(struct.pack("<HHII", 0x8769, 4, 1, 0xFFFF)),
}


@pytest.mark.parametrize("broken", BROKEN_EXIF)
@pytest.mark.parametrize("exif", ["ignore", "apply"])
@without_warnings
def test_broken_exif_counts_as_upright(broken, exif):
    data = encode(photo(), "JPEG", exif=BROKEN_EXIF[broken])
    stored, pixels = store_image(data, exif)
    assert stored.orientation == 1
    assert np.array_equal(pixels, decode(encode(photo(), "JPEG")))


@without_warnings
def test_a_good_orientation_beside_a_broken_tag_is_applied():
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHII", 0x010E, 7, 4, 0x41414141)
    stored, pixels = store_image(encode(photo(), "JPEG", exif=ifd(*entries)), "apply")
    assert stored.orientation == 6
    assert pixels.shape == (80, 60, 3)


# --store-side.


def test_store_side_makes_the_short_side_and_a_jpeg():
    stored, pixels = store_image(encode(photo(), "PNG"), store_side=30)
    assert (stored.width, stored.height, stored.source_width, stored.source_height) == (40, 30, 80, 60)
    assert stored.member == "jpg" and stored.transcoded
    assert decode(stored.data).shape == (30, 40, 3)
    assert np.array_equal(pixels, decode(stored.data)), "boxes and tickets refer to what is stored"
    small = np.asarray(photo().resize((40, 30), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels - small).mean() < 4


@pytest.mark.parametrize(("size", "expected"), [((60, 80), (30, 40)), ((31, 310), (30, 300)), ((100, 33), (91, 30))])
def test_store_side_keeps_the_shape(size, expected):
    stored, _ = store_image(encode(photo(*size), "JPEG"), store_side=30)
    assert (stored.width, stored.height) == expected


@pytest.mark.parametrize("side", [60, 61, 1000])
def test_store_side_leaves_smaller_images_as_they_are(side):
    data = encode(photo(), "JPEG")
    stored, _ = store_image(data, store_side=side)
    assert stored.data == data and not stored.transcoded
    assert store_image(data, store_side=59)[0].transcoded  # the control


def test_store_side_bakes_an_applied_orientation_in():
    data = oriented(photo(), 6)
    stored, pixels = store_image(data, "apply", 30)
    assert (stored.width, stored.height, stored.source_width, stored.source_height) == (30, 40, 60, 80)
    assert np.array_equal(decode(stored.data, "apply"), pixels)
    assert np.array_equal(decode(stored.data, "ignore"), pixels), "the tag must not turn it once more"
    upright = Image.fromarray(np.rot90(decode(data), -1)).resize((30, 40), Image.Resampling.BICUBIC)
    assert np.abs(pixels - np.asarray(upright).astype(int)).mean() < 4


def test_transcoding_is_deterministic():
    data = encode(photo(), "BMP")
    assert store_image(data)[0] == store_image(data)[0]
    assert store_image(data, store_side=30)[0] == store_image(data, store_side=30)[0]


def jpegs() -> dict[str, bytes]:
    """Ordinary JPEGs of every layout, and odd ones."""
    noise = np.random.default_rng(0).integers(0, 255, (45, 67, 3), np.uint8)
    out = {}
    for mode in ("RGB", "L", "CMYK"):
        for name, options in {
            "444": {"subsampling": 0},
            "422": {"subsampling": 1},
            "420 rough": {"subsampling": 2, "quality": 20},
            "progressive": {"progressive": True},
            "restarts": {"restart_marker_blocks": 2},
        }.items():
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((133, 90)).convert(mode).save(buffer, "JPEG", **options)
            out[f"{mode} {name}"] = buffer.getvalue()
    return out


@pytest.mark.parametrize("name", jpegs())
def test_the_fast_decoder_gives_pillows_pixels(name, monkeypatch):
    pytest.importorskip("simplejpeg")
    data = jpegs()[name]
    fast = images.decode(data)
    taken = images._fast_jpeg(data)
    assert (taken is not None) == name.startswith("RGB")  # other color spaces are left to Pillow
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    assert np.array_equal(images.decode(data), fast)


@pytest.mark.parametrize("cut", [2, 100, 900, -40])
def test_the_fast_decoder_leaves_damage_to_pillow(cut, monkeypatch):
    pytest.importorskip("simplejpeg")
    data = jpegs()["RGB 420 rough"][:cut]
    outcomes = []
    for decoder in (images._simplejpeg(), None):
        monkeypatch.setattr(images, "_simplejpeg", lambda decoder=decoder: decoder)
        with pytest.raises(ImageError) as error:
            images.decode(data)
        outcomes.append(str(error.value))
    assert outcomes[0] == outcomes[1]
