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
from shards.schema import MAX_MOSAIC_PIXELS, Setting
from shards.storage import Ranges

BLOCK = 8  # pixels of a JPEG's own blocks
MAX_RESTART = (1 << 16) - 1  # blocks between two restart markers, as a JPEG can say it
END = b"\xff\xd9"
_JPEG_SIDE = 65_500
_MARKER = re.compile(rb"\xff[^\0\xff]")  # in a scan: 0 stands behind a byte that only looks like one
# How every scan begins: the three components together, all of their coefficients. Behind it, no byte is a header's.
_SCAN = bytes.fromhex("ffda 000c 03 0100 0211 0311 003f00")
_FRAME = struct.Struct(">BHHB9s")  # bits, height, width, components, and of each its number, sampling, table
_FULL_CHROMA = bytes.fromhex("011100 021101 031101")
_MAX_HEADER = 4096  # bytes; ours have some 600
_TABLES = {0xDB, 0xC4, 0xE0}  # quantization, Huffman, JFIF


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

    @property
    def row_blocks(self) -> int:
        """Blocks of a row: what is between two restart markers."""
        return self.cell // BLOCK * self.width // BLOCK

    @property
    def entry(self) -> np.dtype:
        """An entry of the table, little-endian; places are bytes from the member's beginning.

        start: of the view's JPEG. ends: behind each row of patches, where its restart marker stands, or the end marker.
        gray, low, high: `Statistics`. zero: fills up four bytes.
        """
        return _entry(self.rows)

    def rows_of(self, tokens: int) -> int:
        """Rows that hold the first `tokens` patches."""
        return -(-tokens // self.grid[1])

    def lay(self, view: np.ndarray, ranking: np.ndarray) -> np.ndarray:
        """Patches of a view [S, S, 3] in the order of a ranking [n], whole rows -> pixels [rows * cell, gw * cell, 3]."""
        gw, p = self.grid[1], self.patch
        strips = view.reshape(-1, 3 * p)  # a patch's own pixel rows: p of them, gw strips apart
        first = ranking.astype(np.intp).reshape(-1, 1, gw)
        first = first // gw * (p * gw) + first % gw
        laid = strips.take(first + gw * np.arange(p)[:, None], axis=0).reshape(-1, p, gw, p, 3)
        if beyond := self.cell - p:
            laid = np.pad(laid, ((0, 0), (0, beyond), (0, 0), (0, beyond), (0, 0)), "edge")
        return laid.reshape(-1, self.width, 3)

    def take(self, pixels: np.ndarray) -> np.ndarray:
        """The patches that lie in pixels, [rows, gw, p, p, 3]: no copy."""
        cells = pixels.reshape(-1, self.cell, self.grid[1], self.cell, 3).transpose(0, 2, 1, 3, 4)
        return cells[:, :, : self.patch, : self.patch]

    def bare(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels without what fills up the cells, [rows * p, gw * p, 3]; of patches in raster order: the view."""
        if self.cell == self.patch:
            return pixels
        return self.take(pixels).transpose(0, 2, 1, 3, 4).reshape(-1, self.grid[1] * self.patch, 3)

    def put(self, pixels: np.ndarray, ranking: np.ndarray) -> np.ndarray:
        """The inverse of `lay`: all rows that are stored -> the view [S, S, 3], gray where it lacks a patch.

        Args:
            pixels: uint8 [rows * cell, gw * cell, 3].
            ranking: [N], by which they were laid.
        """
        (gh, gw), p = self.grid, self.patch
        strips = self.bare(pixels).reshape(-1, 3 * p)
        slots: np.ndarray = np.full(gh * gw, -1)
        slots[ranking[: self.tokens]] = np.arange(self.tokens)
        slots = slots.reshape(gh, 1, gw)
        places = slots // gw * (p * gw) + gw * np.arange(p)[:, None] + slots % gw  # [gh, p, gw]
        if self.tokens < gh * gw:
            strips = np.concatenate([strips, np.full((1, 3 * p), 128, np.uint8)])
            places = np.where(slots < 0, len(strips) - 1, places)
        # A strip is moved as one number: half the time of `take`.
        return strips.view(f"V{3 * p}")[:, 0][places].view(np.uint8).reshape(gh * p, gw * p, 3)


@functools.cache  # asked for by every sample, and made in 20 microseconds
def _entry(rows: int) -> np.dtype:
    places = [("start", "<u4"), ("ends", "<u4", (rows,))]
    return np.dtype([*places, ("gray", "u1"), ("low", "u1", (3,)), ("high", "u1", (3,)), ("zero", "u1")])


def cell_of(patch_size: int, grid: tuple[int, int]) -> int:
    """Pixels a side of a patch's place in a mosaic: the patch in whole blocks; one of 14 px is filled up to 16.

    Raises:
        TicketSetError: patches that leave more of a block empty, or views too large for a JPEG that readers take.
    """
    cell = 16 if patch_size == 14 else patch_size
    if cell % BLOCK:
        raise TicketSetError(
            f"`patch_size` {patch_size}: expected multiples of {BLOCK} px, or 14, to store ranked views"
        )
    whole = Mosaic(grid, patch_size, cell, grid[0] * grid[1])
    if whole.row_blocks > MAX_RESTART or whole.tokens * cell**2 > MAX_MOSAIC_PIXELS:
        raise TicketSetError(
            f"`patch_size` {patch_size}: {grid[0]} rows of {grid[1]} patches are too large to be stored as ranked views"
        )
    return cell


def decoded(view: np.ndarray, mosaic: Mosaic, quality: int) -> np.ndarray:
    """A view [S, S, 3] as its JPEG will give it: what the selector is shown.

    Encoding goes block by block, so that it does not matter that the patches have no order yet.
    """
    raster = np.arange(mosaic.grid[0] * mosaic.grid[1])
    return mosaic.bare(decode_jpeg(_encode(mosaic.lay(view, raster), mosaic, quality)))


def statistics(pixels: np.ndarray) -> Statistics:
    """Of pixels uint8 [H, W, 3], in whatever order; the mean is rounded as Pillow's ImageEnhance.Contrast rounds it."""
    gray = int(np.asarray(Image.fromarray(pixels).convert("L")).mean() + 0.5)
    # One axis after the other: over both at once numpy goes number by number, fifty times as slowly.
    low, high = pixels.min(axis=0).min(axis=0), pixels.max(axis=0).max(axis=0)
    return Statistics(gray, tuple(low.tolist()), tuple(high.tolist()))


def encode(
    views: np.ndarray, rankings: np.ndarray, mosaic: Mosaic, quality: int, known: list[Statistics] | None = None
) -> bytes:
    """The member.

    Args:
        views: uint8 [V, S, S, 3] as they were rendered.
        rankings: [V, N].
        mosaic: how patches are laid out; those beyond its `tokens` are left out.
        quality: of the JPEGs, 1 to 100.
        known: statistics of each view as `decoded` gives it, from one who has looked at it.
    Raises:
        TicketSetError: more bytes than a table can say.
    """
    table = np.zeros(len(views), mosaic.entry)
    parts, position = [], table.nbytes
    for number, (entry, view, ranking) in enumerate(zip(table, views, rankings, strict=True)):
        data = _encode(mosaic.lay(view, ranking[: mosaic.tokens]), mosaic, quality)
        ends = _row_ends(data)
        assert len(ends) == mosaic.rows, "a restart marker behind each row, and the end"
        if position + len(data) >= 1 << 32:
            raise TicketSetError("expected less than 4 GiB of ranked views a sample; store fewer, or at less `quality`")
        if known:
            said = known[number]
        elif mosaic.tokens == ranking.size:  # what was just encoded is all of the view
            said = statistics(mosaic.bare(decode_jpeg(data)))
        else:
            said = statistics(decoded(view, mosaic, quality))
        entry["start"], entry["ends"] = position, [position + end for end, _ in ends]
        entry["gray"], entry["low"], entry["high"] = said
        parts.append(data)
        position += len(data)
    return b"".join([table.tobytes(), *parts])


def _encode(pixels: np.ndarray, mosaic: Mosaic, quality: int) -> bytes:
    """A baseline JPEG with the standard Huffman tables: of one quality and size, all headers are the same bytes."""
    image = Image.fromarray(pixels)
    options = {"quality": quality, "subsampling": 0, "restart_marker_rows": mosaic.cell // BLOCK}
    if not hasattr(os, "memfd_create"):
        out = io.BytesIO()
        image.save(out, "JPEG", **options)
        return out.getvalue()
    # Into a file: only there does Pillow let go of the GIL, so that several threads encode at once.
    with open(os.memfd_create("view"), "w+b") as file:
        image.save(file, "JPEG", **options)
        return os.pread(file.fileno(), file.tell(), 0)


def _row_ends(data: bytes) -> list[tuple[int, bytes]]:
    """(place, marker) of each marker in a JPEG's scan."""
    return [(match.start(), match.group()) for match in _MARKER.finditer(data, _scan_of(data))]


def _scan_of(data: bytes) -> int:
    """Where a JPEG's scan begins; somewhere in what is no such JPEG."""
    return data.find(_SCAN, 0, _MAX_HEADER) + len(_SCAN)


@functools.lru_cache(maxsize=1024)  # a set's headers are all the same bytes
def _header(head: bytes, mosaic: Mosaic, rows: int) -> bytes:
    """The header of a view's JPEG, up to its scan, with the height of its first rows.

    Raises:
        TicketSetError: it is not what `encode` writes; so no decoder is given any other.
    """
    frame, restart, position, end = None, None, 2, len(head) - len(_SCAN)
    while position < end and head[position] == 0xFF:
        code, size = head[position + 1], int.from_bytes(head[position + 2 : position + 4], "big")
        body = head[position + 4 : position + 2 + size]
        if code == 0xC0 and frame is None and len(body) == _FRAME.size:
            frame, height_at = _FRAME.unpack(body), position + 5
        elif code == 0xDD and restart is None:
            restart = int.from_bytes(body, "big")
        elif code not in _TABLES:
            break
        position += 2 + size
    if head[:2] != b"\xff\xd8" or frame is None or position != end or head[end:] != _SCAN:
        raise TicketSetError("expected the header of a baseline JPEG of three colors, got another")
    bits, height, width, count, components = frame
    said, tall = (bits, count, components, width, height, restart), mosaic.rows * mosaic.cell
    if said != (8, 3, _FULL_CHROMA, mosaic.width, tall, mosaic.row_blocks):
        raise TicketSetError(
            f"expected a JPEG of {mosaic.width}x{tall} px, 4:4:4, {mosaic.row_blocks} blocks between restart markers,"
            f" got {width}x{height} px, {restart} blocks"
        )
    return head[:height_at] + (rows * mosaic.cell).to_bytes(2, "big") + head[height_at + 2 :]


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
        mosaic, rows = self.mosaic, self._rows(tokens)
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
        scan = _scan_of(data)
        try:
            head = _header(data[:scan], mosaic, rows)
        except TicketSetError as error:
            raise TicketSetError(f"{self._where}: view {number}: {error}") from None
        return b"".join((head, memoryview(data)[scan:-2], END))

    def mosaic_pixels(self, number: int, tokens: int | None = None) -> np.ndarray:
        """uint8 [rows * cell, gw * cell, 3]: the rows that hold the first patches, or all.

        Raises:
            TicketSetError: as `jpeg`, or it cannot be decoded.
        """
        data, rows = self.jpeg(number, tokens), self._rows(tokens)
        try:
            pixels = decode_jpeg(data)
        except ImageError as error:
            raise TicketSetError(f"{self._where}: view {number}: {error}") from None
        assert pixels.shape == (rows * self.mosaic.cell, self.mosaic.width, 3), "the header was checked"
        return pixels

    def _rows(self, tokens: int | None) -> int:
        return self.mosaic.rows if tokens is None else self.mosaic.rows_of(tokens)

    def patches(self, number: int, tokens: int) -> np.ndarray:
        """The first patches of a view in ranked order: uint8 [tokens, p, p, 3].

        Raises:
            TicketSetError: as `jpeg`, or it cannot be decoded.
        """
        p = self.mosaic.patch
        return self.mosaic.take(self.mosaic_pixels(number, tokens)).reshape(-1, p, p, 3)[:tokens]

    def view(self, number: int, ranking: np.ndarray) -> np.ndarray:
        """A view: uint8 [S, S, 3], gray where patches are not stored.

        Args:
            number: of the view.
            ranking: [N], by which it was stored.
        Raises:
            TicketSetError: table and JPEG do not agree, or it cannot be decoded.
        """
        return self.mosaic.put(self.mosaic_pixels(number), ranking)


def problems(ranked: Ranked, rankings: np.ndarray) -> Iterator[str]:
    """What is wrong with a member that reading a part of it need not see; for `verify`.

    Of views that are not stored whole, of the statistics only what the stored patches refute is found.

    Raises:
        TicketSetError: a view that cannot be read at all.
    """
    mosaic, data = ranked.mosaic, ranked.data()
    table = np.frombuffer(data, mosaic.entry, len(ranked))
    marks = [bytes((0xFF, 0xD0 + row % 8)) for row in range(mosaic.rows - 1)] + [END]
    position = table.nbytes
    for number, entry in enumerate(table):
        where = f"ranked view {number}"
        start, ends = int(entry["start"]), entry["ends"].tolist()
        if start != position:
            yield f"{where}: expected to begin at byte {position}, got {start}"
            return
        pixels = mosaic.bare(ranked.mosaic_pixels(number))
        position = ends[-1] + len(END)
        if _row_ends(data[start:position]) != [(end - start, mark) for end, mark in zip(ends, marks, strict=True)]:
            yield f"{where}: its rows end elsewhere than the table says"
        if entry["zero"]:
            yield f"{where}: expected a zero at the end of its entry, got {entry['zero']}"
        said, found = ranked.statistics(number), statistics(pixels)
        if mosaic.tokens < rankings.shape[1]:
            lows, highs = np.minimum(found.low, said.low), np.maximum(found.high, said.high)
            found = Statistics(said.gray, tuple(lows.tolist()), tuple(highs.tolist()))
        if found != said:
            yield f"{where}: expected statistics {found}, got {said}"
    if position != len(data):
        yield f"ranked views: expected {position} bytes, got {len(data)}"
