"""Odd files: images and source tars with damage anywhere; each is a stored image, a reason, or one line."""

import io
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from watch import Case, Watch

from shards.images import render_view, store_image
from shards.views import canonical_view

FORMATS = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "1"),
           ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("TIFF", "CMYK"), ("PPM", "RGB"),
           ("TGA", "RGB"), ("JPEG2000", "RGB")]  # fmt: skip


def picture(rng: random.Random) -> tuple[str, bytes]:
    """A small valid image of some format."""
    kind, mode = rng.choice(FORMATS)
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (24, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    image.save(out, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return f"{kind} {mode}", out.getvalue()


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, mostly in the header; cut; or parts of it exchanged."""
    out = bytearray(data)
    reach = rng.choice([40, 200, len(out)])
    for _ in range(rng.choice([0, 1, 1, 2, 8])):
        out[rng.randrange(min(reach, len(out)))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    if rng.random() < 0.2:
        del out[rng.randrange(len(out)) :]
    if rng.random() < 0.1:
        at = rng.randrange(len(out) + 1)
        out[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
    return bytes(out)


def image_case(watch: Watch, rng: random.Random, place: Path) -> Case:
    """One damaged image through storing and rendering."""
    kind, data = picture(rng)
    data = damage(rng, data)
    exif, side = rng.choice(["ignore", "apply"]), rng.choice([None, None, 16])

    def store() -> None:
        kept, pixels = store_image(data, exif, side)
        assert pixels.shape == (kept.height, kept.width, 3) and pixels.dtype == np.uint8, "another frame"
        view = np.array(canonical_view(kept.width, kept.height))
        assert render_view(kept.data, view, 16, exif).shape == (16, 16, 3), "another view"

    return watch.call(f"{kind}, {exif}, {side}", "image", store, place)


def tar_case(watch: Watch, rng: random.Random, place: Path) -> Case:
    """One damaged tar, mined; what goes through must account for every image that tarfile sees."""
    place.mkdir()
    tar = place / "train-000.tar"
    with tarfile.open(
        tar, "w", format=rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ) as file:
        for number in range(6):
            for name, data in ((f"s{number}.cls", b"%d" % (number % 2)), (f"s{number}.jpg", picture(rng)[1])):
                info = tarfile.TarInfo(("d" * rng.choice([1, 90]) + "/") * rng.choice([0, 1, 2]) + name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    data = bytearray(tar.read_bytes())
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice([0, 1, 1, 3])):
        at = rng.choice(headers)
        if rng.random() < 0.5:  # a header whose checksum agrees
            where, value = rng.choice([(124, b"-0000001000"), (124, b"77777777777"), (124, b"\x80" + bytes(11)), (156, rng.choice([b"1", b"2", b"3", b"5", b"6", b"S", b"x", b"g", b"L", b"Z"])), (157, b"s0.jpg"), (0, b"._s.jpg")])  # fmt: skip
            data[at + where : at + where + len(value)] = value
            header = data[at : at + 512]
            data[at + 148 : at + 156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        else:
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    elif rng.random() < 0.2:
        data = data + data
    tar.write_bytes(data)
    arguments = [
        "--data",
        str(tar),
        "--out",
        str(place / "out"),
        "--method",
        "center",
        "--img-size",
        "32",
        "--val-share",
        "0",
    ]
    arguments += ["--max-failures", "1", "-j", "1", "--views", "1"]
    case = watch.command("a tar", "tar", "miner.cli", arguments, place)
    shutil.rmtree(place)
    return case
