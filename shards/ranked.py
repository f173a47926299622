"""Ranked views: the pixels of a sample's views, patch by patch in the order of their ranking; the member ranked.bin.

    [table: an entry a view]  [JPEG of view 0]  [JPEG of view 1] ...

A view's patches stand in a mosaic, best first, as many a row as the patch grid is wide, and the mosaic is one baseline
JPEG, 4:4:4, with a restart marker behind each row of patches. So the first K patches are a prefix of its bytes: cut
behind row ceil(K / W), with that height in the frame header and an end marker behind, any JPEG decoder gives exactly
the first rows of the whole. Blocks of 8 x 8 never cross a patch, and 4:4:4 has no chroma that decoders would smooth
across strangers: a patch's pixels do not depend on its neighbors, and so not on the order.
"""

import functools
import io
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from shards.errors import ImageError, TicketSetError
from shards.images import decode_jpeg
from shards.schema import MAX_SIDE, Setting
from shards.storage import Ranges

BLOCK = 8  # pixels of a JPEG's own blocks
MAX_RESTART = (1 << 16) - 1  # blocks between two restart markers, as a JPEG can say it
END = b"\xff\xd9"
_JPEG_SIDE = 65_500
_MARKER = re.compile(rb"\xff[^\0\xff]")  # in a scan: 0 stands behind a byte that only looks like one


class Statistics(NamedTuple):
    """Of a whole view, as color operations ask for them: mean gray and each channel's least and greatest value."""

    gray: int
    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True)
class Mosaic:
    """How the patches of a view lie in its JPEG.

    Attributes:
        grid: (gh, gw); a row of the mosaic has gw patches.
        patch: pixels a side of a patch.
        cell: pixels a side of its place: whole blocks; beyond the patch its edges are repeated.
        tokens: patches stored, whole rows.
    """

    grid: tuple[int, int]
    patch: int
    cell: int
    tokens: int

    @classmethod
    def of(cls, setting: Setting) -> "Mosaic":
        """That of a set of ranked views."""
        assert setting.ranked is not None
        return cls(setting.grid, setting.patch_size, setting.ranked.cell, setting.ranked.tokens)

    @property
    def rows(self) -> int:
        """Rows of patches that are stored."""
        return self.tokens // self.grid[1]

    @property
    def width(self) -> int:
        """Pixels of a row."""
        return self.grid[1] * self.cell

    @functools.cached_property
    def entry(self) -> np.dtype:
        """An entry of the table, little-endian; places are bytes from the member's beginning.

        start: of the view's JPEG. ends: behind each row of patches, where its restart marker stands, or the end marker.
        gray, low, high: `Statistics`. zero: fills up four bytes.
        """
        fields = [
            ("start", "<u4"),
            ("ends", "<u4", (self.rows,)),
            ("gray", "u1"),
            ("low", "u1", (3,)),
            ("high", "u1", (3,)),
        ]
        return np.dtype([*fields, ("zero", "u1")])

    def rows_of(self, tokens: int) -> int:
        """Rows that hold the first `tokens` patches."""
        return -(-tokens // self.grid[1])

    def lay(self, patches: np.ndarray) -> np.ndarray:
        """Patches [n, p, p, 3] in order -> pixels [rows * cell, gw * cell, 3]; n makes whole rows."""
        if self.cell > self.patch:
            beyond = (0, self.cell - self.patch)
            patches = np.pad(patches, ((0, 0), beyond, beyond, (0, 0)), "edge")
        cells = patches.reshape(-1, self.grid[1], self.cell, self.cell, 3)
        return cells.transpose(0, 2, 1, 3, 4).reshape(-1, self.width, 3)

    def take(self, pixels: np.ndarray) -> np.ndarray:
        """The inverse of `lay`, as a view of the pixels: [rows, gw, p, p, 3]."""
        cells = pixels.reshape(-1, self.cell, self.grid[1], self.cell, 3).transpose(0, 2, 1, 3, 4)
        return cells[:, :, : self.patch, : self.patch]

    def cut(self, view: np.ndarray) -> np.ndarray:
        """A view [S, S, 3] -> its patches in raster order [N, p, p, 3]."""
        (gh, gw), p = self.grid, self.patch
        return view.reshape(gh, p, gw, p, 3).transpose(0, 2, 1, 3, 4).reshape(-1, p, p, 3)

    def put(self, pixels: np.ndarray, ranking: np.ndarray) -> np.ndarray:
        """All rows that are stored -> the view [S, S, 3], black where the others would be; `ranking` [N] put them in order."""
        (gh, gw), p = self.grid, self.patch
        view = (np.empty if self.tokens == gh * gw else np.zeros)((gh, p, gw, p, 3), np.uint8)
        places = view.transpose(0, 2, 1, 3, 4)  # [gh, gw, p, p, 3]
        best = ranking[: self.tokens].astype(np.intp)
        places[best // gw, best % gw] = self.take(pixels).reshape(-1, p, p, 3)
        return view.reshape(gh * p, gw * p, 3)


def cell_of(patch_size: int, grid: tuple[int, int]) -> int:
    """Pixels a side of a patch's place in a mosaic: the patch in whole blocks; one of 14 px is filled up to 16.

    Raises:
        TicketSetError: patches that leave more of a block empty, or rows too large for a JPEG.
    """
    cell = 16 if patch_size == 14 else patch_size
    if cell % BLOCK:
        raise TicketSetError(
            f"`patch_size` {patch_size}: expected multiples of {BLOCK} px, or 14, to store ranked views"
        )
    if cell * cell * grid[1] // BLOCK**2 > MAX_RESTART or cell * max(grid) > min(_JPEG_SIDE, 2 * MAX_SIDE):
        raise TicketSetError(f"`patch_size` {patch_size}: a row of {grid[1]} patches is too large for a JPEG")
    return cell


def decoded(views: np.ndarray, mosaic: Mosaic, quality: int) -> np.ndarray:
    """The views [V, S, S, 3] as their JPEGs will give them: what the selector is shown.

    Encoding goes block by block, so that it does not matter that the patches have no order yet.
    """
    out = np.empty_like(views)
    tall = mosaic.grid[0] * mosaic.cell
    step = max(1, _JPEG_SIDE // tall)  # views a JPEG, of one width, one below the other
    for first in range(0, len(views), step):
        some = views[first : first + step]
        patches = np.concatenate([mosaic.cut(view) for view in some])
        pixels = decode_jpeg(_encode(mosaic.lay(patches), quality, mosaic.cell // BLOCK))
        for slot, raster in zip(
            out[first : first + step], pixels.reshape(len(some), tall, mosaic.width, 3), strict=True
        ):
            slot[:] = mosaic.take(raster).transpose(0, 2, 1, 3, 4).reshape(slot.shape)
    return out


def statistics(view: np.ndarray) -> Statistics:
    """Of a view uint8 [S, S, 3]; the mean is rounded as Pillow's ImageEnhance.Contrast rounds it."""
    gray = int(np.asarray(Image.fromarray(view).convert("L")).mean() + 0.5)
    low, high = view.min(axis=(0, 1)), view.max(axis=(0, 1))
    return Statistics(gray, tuple(low.tolist()), tuple(high.tolist()))


def encode(views: np.ndarray, rankings: np.ndarray, seen: list[Statistics], mosaic: Mosaic, quality: int) -> bytes:
    """The member.

    Args:
        views: uint8 [V, S, S, 3] as they were rendered.
        rankings: [V, N].
        seen: of each view, as `decoded` gives it.
        mosaic: how patches are laid out; those beyond its `tokens` are left out.
        quality: of the JPEGs, 1 to 100.
    Raises:
        ImageError: more bytes than a table can say.
    """
    table = np.zeros(len(views), mosaic.entry)
    parts, position = [b""], table.nbytes
    for entry, view, ranking, (gray, low, high) in zip(table, views, rankings, seen, strict=True):
        data = _encode(mosaic.lay(mosaic.cut(view)[ranking[: mosaic.tokens]]), quality, mosaic.cell // BLOCK)
        header = read_header(data, mosaic, "ranked view")
        ends = [match.start() for match in _MARKER.finditer(data, header.size)]
        assert len(ends) == mosaic.rows, "a restart marker behind each row, and the end"
        if position + len(data) >= 1 << 32:
            raise ImageError(f"too large: expected less than 4 GiB of ranked views, got {position + len(data)} bytes")
        entry["start"], entry["ends"] = position, [position + end for end in ends]
        entry["gray"], entry["low"], entry["high"] = gray, low, high
        parts.append(data)
        position += len(data)
    parts[0] = table.tobytes()
    return b"".join(parts)


def _encode(pixels: np.ndarray, quality: int, restart_rows: int) -> bytes:
    """A baseline JPEG with the standard Huffman tables: of one quality and size, all headers are the same bytes."""
    image, options = (
        Image.fromarray(pixels),
        {"quality": quality, "subsampling": 0, "restart_marker_rows": restart_rows},
    )
    if not hasattr(os, "memfd_create"):
        out = io.BytesIO()
        image.save(out, "JPEG", **options)
        return out.getvalue()
    # Into a file: only there does Pillow let go of the GIL, so that several threads encode at once.
    with open(os.memfd_create("view"), "w+b") as file:
        image.save(file, "JPEG", **options)
        return os.pread(file.fileno(), file.tell(), 0)


class Header(NamedTuple):
    """Of a view's JPEG, up to its scan: bytes, where in them the frame's height stands, and that height in pixels."""

    size: int
    height_at: int
    height: int


_FRAME = struct.Struct(">BHHB9s")
_FULL_CHROMA = b"\1\x11\0\2\x11\1\3\x11\1"  # three components, each at full resolution
_TABLES = {0xDB, 0xC4, 0xE0}  # quantization, Huffman, JFIF


def read_header(data: bytes, mosaic: Mosaic, where: str) -> Header:
    """Read a JPEG's header and refuse any but what `encode` writes, before a decoder is given it.

    Raises:
        TicketSetError: it is another kind of JPEG, or of another width or restart interval.
    """
    position, frame, restart = 2, None, None
    while data[position : position + 1] == b"\xff" and len(data) >= position + 4:
        code, size = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + size]
        if code == 0xC0 and frame is None and len(body) == _FRAME.size:
            frame = (position + 5, *_FRAME.unpack(body))
        elif code == 0xDD and restart is None:
            restart = int.from_bytes(body, "big")
        elif code == 0xDA or code not in _TABLES:
            break
        position += 2 + size
    if data[:2] != b"\xff\xd8" or frame is None or data[position : position + 2] != b"\xff\xda":
        raise TicketSetError(f"{where}: expected the header of a baseline JPEG, got another")
    height_at, bits, height, width, count, components = frame
    found = (bits, width, count, components, restart)
    if found != (8, mosaic.width, 3, _FULL_CHROMA, mosaic.cell**2 * mosaic.grid[1] // BLOCK**2):
        raise TicketSetError(
            f"{where}: expected a JPEG {mosaic.width} px wide, 4:4:4, with a restart marker behind each row of patches, got"
            f" {width} px, {restart} blocks between markers"
        )
    return Header(position + 2 + size, height_at, height)


@functools.lru_cache(maxsize=4)
def _known(mosaic: Mosaic) -> list[tuple[bytes, Header]]:
    """The header that was read last: those of a set are all alike, so that one comparison takes the place of reading."""
    return []


@functools.lru_cache(maxsize=256)
def _of_height(header: bytes, height_at: int, height: int) -> bytes:
    return header[:height_at] + height.to_bytes(2, "big") + header[height_at + 2 :]


class Ranked:
    """The ranked views of one sample; their bytes are read when they are asked for, and no more of them than that.

    Args:
        mosaic: how patches are laid out.
        table: the first bytes of the member.
        count: V, of which the table has an entry each.
        file: that holds the member.
        offset: where it begins.
        size: its bytes.
        where: for errors.
    Raises:
        TicketSetError: the table is of another size.
    """

    __slots__ = ("_file", "_offset", "_table", "_where", "mosaic", "size")

    def __init__(
        self, mosaic: Mosaic, table: bytes, count: int, file: Ranges, offset: int, size: int, where: str
    ) -> None:
        if len(table) != count * mosaic.entry.itemsize or len(table) > size:
            raise TicketSetError(f"{where}: expected a table of {count} ranked views, got {len(table)} of {size} bytes")
        self.mosaic, self.size, self._table, self._where = mosaic, size, table, where
        self._file, self._offset = file, offset

    def __len__(self) -> int:
        """V"""
        return len(self._table) // self.mosaic.entry.itemsize

    def statistics(self, number: int) -> Statistics:
        """Of a whole view, stored or not."""
        last = (number + 1) * self.mosaic.entry.itemsize - 1  # the zero behind them
        gray, *both = self._table[last - 7 : last]
        return Statistics(gray, tuple(both[:3]), tuple(both[3:]))

    def data(self) -> bytes:
        """The whole member."""
        return self._file.read(self._offset, self.size)

    def place(self, number: int, tokens: int | None = None) -> tuple[Ranges, int, int]:
        """What is read for the first patches of a view, or for all: file, first byte, bytes.

        Raises:
            TicketSetError: so many are not stored, or the table says what cannot be.
        """
        mosaic = self.mosaic
        rows = mosaic.rows if tokens is None else mosaic.rows_of(tokens)
        if rows > mosaic.rows:
            raise TicketSetError(
                f"{self._where}: expected at most {mosaic.tokens} patches, all that is stored of a view, got {tokens}"
            )
        at = number * mosaic.entry.itemsize
        (start,) = struct.unpack_from("<I", self._table, at)
        (end,) = struct.unpack_from("<I", self._table, at + 4 * rows)
        if not len(self._table) <= start < end <= self.size - 2:
            raise TicketSetError(
                f"{self._where}: view {number}: expected a JPEG inside {self.size} bytes, got {start} to {end}"
            )
        return self._file, self._offset + start, end + 2 - start

    def jpeg(self, number: int, tokens: int | None = None) -> bytes:
        """The JPEG of a view, or of the rows that hold its first patches; the rest is not read.

        Raises:
            TicketSetError: as `place`, or table and JPEG do not agree.
        """
        file, offset, size = self.place(number, tokens)
        data = file.read(offset, size)
        mosaic = self.mosaic
        rows = mosaic.rows if tokens is None else mosaic.rows_of(tokens)
        mark = END if rows == mosaic.rows else bytes((0xFF, 0xD0 + (rows - 1) % 8))
        if data[-2:] != mark or len(data) != size:
            raise TicketSetError(
                f"{self._where}: view {number}: expected row {rows - 1} to end {size - 2} bytes behind its beginning; the"
                f" table is of other bytes"
            )
        known = _known(mosaic)
        if not known or not data.startswith(known[0][0]):
            header = read_header(data, mosaic, f"{self._where}: view {number}")
            if header.height != mosaic.rows * mosaic.cell:
                raise TicketSetError(
                    f"{self._where}: view {number}: expected a JPEG of {mosaic.rows * mosaic.cell} px height, got {header.height}"
                )
            known[:] = [(data[: header.size], header)]
        head, header = known[0]
        if rows == mosaic.rows:
            return data
        return b"".join((_of_height(head, header.height_at, rows * mosaic.cell), memoryview(data)[len(head) : -2], END))

    def mosaic_pixels(self, number: int, tokens: int | None = None) -> np.ndarray:
        """uint8 [rows * cell, gw * cell, 3]: the rows that hold the first patches, or all.

        Raises:
            TicketSetError: as `jpeg`, or it cannot be decoded.
        """
        data = self.jpeg(number, tokens)
        rows = self.mosaic.rows if tokens is None else self.mosaic.rows_of(tokens)
        try:
            pixels = decode_jpeg(data)
        except ImageError as error:
            raise TicketSetError(f"{self._where}: view {number}: {error}") from None
        assert pixels.shape == (rows * self.mosaic.cell, self.mosaic.width, 3), "the header was checked"
        return pixels

    def patches(self, number: int, tokens: int) -> np.ndarray:
        """The first patches of a view in ranked order: uint8 [tokens, p, p, 3].

        Raises:
            TicketSetError: as `jpeg`, or it cannot be decoded.
        """
        p = self.mosaic.patch
        return self.mosaic.take(self.mosaic_pixels(number, tokens)).reshape(-1, p, p, 3)[:tokens]

    def view(self, number: int, ranking: np.ndarray) -> np.ndarray:
        """A view: uint8 [S, S, 3], black where patches are not stored.

        Args:
            number: of the view.
            ranking: [N], by which it was stored.
        Raises:
            TicketSetError: table and JPEG do not agree, or it cannot be decoded.
        """
        return self.mosaic.put(self.mosaic_pixels(number), ranking)


def problems(ranked: Ranked, rankings: np.ndarray) -> Iterator[str]:
    """What is wrong with a member that reading a part of it need not see; for `verify`.

    Raises:
        TicketSetError: a view that cannot be read at all.
    """
    mosaic, data = ranked.mosaic, ranked.data()
    table = np.frombuffer(data, mosaic.entry, len(ranked))
    position = table.nbytes
    for number, entry in enumerate(table):
        where = f"ranked view {number}"
        start, ends = int(entry["start"]), entry["ends"].tolist()
        if start != position:
            yield f"{where}: expected to begin at byte {position}, got {start}"
            return
        pixels = ranked.mosaic_pixels(number)
        header = read_header(data[start : start + 4096], mosaic, where)
        found = [(m.start(), m.group()) for m in _MARKER.finditer(data, start + header.size, ends[-1] + 2)]
        marks = [bytes((0xFF, 0xD0 + row % 8)) for row in range(mosaic.rows - 1)] + [END]
        if found != list(zip(ends, marks, strict=True)):
            yield f"{where}: its rows end elsewhere than the table says"
        if entry["zero"]:
            yield f"{where}: expected a zero at the end of its entry, got {entry['zero']}"
        if mosaic.tokens == rankings.shape[1]:
            whole = mosaic.put(pixels, rankings[number])
            if statistics(whole) != ranked.statistics(number):
                yield f"{where}: expected statistics {statistics(whole)}, got {ranked.statistics(number)}"
        position = ends[-1] + 2
    if position != len(data):
        yield f"ranked views: expected {position} bytes, got {len(data)}"
