"""Ranked views: the first patches are the first bytes, whatever decodes them; a forged member is refused in a line."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps, ImageStat
from test_readme import ROOT, blocks

from conftest import patches_of
from shards import images
from shards.errors import TicketSetError
from shards.images import render_views
from shards.ranked import END, Mosaic, Ranked, cell_of, decoded, encode, problems, statistics
from shards.reader import TicketSet

QUALITY = 90
Change = Callable[[bytearray, Mosaic], object]


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two that decode."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    return str(request.param)


def pictures(count: int, side: int) -> np.ndarray:
    """uint8 [count, side, side, 3]: smooth colors with some noise, so that no two patches are alike."""
    rng = np.random.default_rng(side)
    small = [Image.fromarray(rng.integers(20, 220, (5, 5, 3), np.uint8)) for _ in range(count)]
    smooth = np.stack([np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in small])
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def layout(patch: int, side: int = 4, tokens: int | None = None) -> Mosaic:
    """Of side x side patches."""
    return Mosaic((side, side), patch, cell_of(patch, (side, side)), tokens or side * side)


def member(mosaic: Mosaic, count: int = 2) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The bytes, the views as they will be decoded, and rankings at random."""
    views = pictures(count, mosaic.grid[0] * mosaic.patch)
    n = mosaic.grid[0] * mosaic.grid[1]
    rankings = np.random.default_rng(1).permuted(np.tile(np.arange(n), (count, 1)), axis=1)
    shown = np.stack([decoded(view, mosaic, QUALITY) for view in views])
    return encode(views, rankings, mosaic, QUALITY), shown, rankings


class InMemory:
    """A file that holds a member behind some other bytes; `touched` gets the end of each part that is read, in the member."""

    BEFORE = 7

    def __init__(self, data: bytes, touched: list[int] | None = None) -> None:
        self._data, self._touched, self.size = bytes(self.BEFORE) + data, touched, self.BEFORE + len(data)

    def read(self, offset: int, size: int) -> bytes:
        if self._touched is not None:
            self._touched.append(offset + size - self.BEFORE)
        return self._data[offset : offset + size]


def reading(data: bytes, mosaic: Mosaic, count: int = 2, touched: list[int] | None = None) -> Ranked:
    """A member in memory."""
    file = InMemory(bytes(data), touched)
    return Ranked(mosaic, bytes(data[: count * mosaic.entry.itemsize]), count, file, file.BEFORE, len(data), "here")


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_the_selector_is_shown_what_a_student_will_be(patch, decoder):
    """Encoded in raster order and decoded, or permuted, encoded, decoded and put back: the same pixels."""
    mosaic = layout(patch)
    data, shown, rankings = member(mosaic)
    found = reading(data, mosaic)
    for number in range(2):
        assert np.array_equal(found.view(number, rankings[number]), shown[number])
    assert list(problems(found, rankings)) == []
    views = pictures(2, 4 * patch)
    assert 0 < np.abs(shown.astype(int) - views).mean() < 8, "lossy, and near"


def test_with_chroma_at_half_resolution_it_would_not_be_so():
    """The control: at 4:2:0 decoders smooth the chroma across patches of 8 px, so that it depends on the neighbors."""

    def through(pixels: np.ndarray, subsampling: int) -> np.ndarray:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=QUALITY, subsampling=subsampling)
        return np.asarray(Image.open(out))

    mosaic, view = layout(8), pictures(1, 32)[0]
    order = np.random.default_rng(2).permutation(16)
    for subsampling, same in ((0, True), (2, False)):
        first = patches_of(through(view, subsampling), 8)[order]
        then = mosaic.take(through(mosaic.lay(view, order), subsampling)).reshape(first.shape)
        assert np.array_equal(first, then) == same


@pytest.mark.parametrize(("patch", "side"), [(8, 3), (14, 4), (16, 14)])  # 14 rows: markers are counted modulo eight
def test_every_prefix_is_the_first_rows_and_reads_no_byte_behind(patch, side, decoder):
    mosaic = layout(patch, side)
    data, _, rankings = member(mosaic)
    touched: list[int] = []
    found = reading(data, mosaic, touched=touched)
    table = np.frombuffer(data, mosaic.entry, 2)
    for number in range(2):
        whole = found.mosaic_pixels(number)
        assert whole.shape == (side * mosaic.cell, side * mosaic.cell, 3)
        for tokens in range(1, side * side + 1):
            rows = -(-tokens // side)
            assert np.array_equal(found.mosaic_pixels(number, tokens), whole[: rows * mosaic.cell])
            assert touched[-1] == table["ends"][number, rows - 1] + 2
            first = found.patches(number, tokens)
            assert first.shape == (tokens, patch, patch, 3)
            assert np.array_equal(
                first, patches_of(found.view(number, rankings[number]), patch)[rankings[number][:tokens]]
            )
    # The control: cut, but with the height of the whole, it is another picture.
    cut = data[table["start"][0] : table["ends"][0, 0]] + END
    assert Image.open(io.BytesIO(cut)).size[1] == side * mosaic.cell != mosaic.cell


def test_places_beyond_a_patch_repeat_its_edge():
    mosaic = layout(14)
    view = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    patches = patches_of(view, 14)
    cells = mosaic.lay(view, np.arange(16)).reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
    assert np.array_equal(cells[:, :14, :14], patches)
    assert np.array_equal(cells[:, 14:, :14], np.repeat(patches[:, 13:], 2, axis=1))
    assert np.array_equal(cells[:, :, 14:], np.repeat(cells[:, :, 13:14], 2, axis=2))
    assert np.array_equal(mosaic.take(mosaic.lay(view, np.arange(16))).reshape(patches.shape), patches)
    assert np.array_equal(mosaic.bare(mosaic.lay(view, np.arange(16))), view)


@pytest.mark.parametrize("patch", [8, 14])
def test_patches_are_put_back_and_what_is_not_stored_is_gray(patch):
    mosaic, view = layout(patch), pictures(1, 4 * patch)[0]
    order = np.random.default_rng(2).permutation(16)
    assert np.array_equal(mosaic.put(mosaic.lay(view, order), order), view)
    cut = layout(patch, tokens=8)
    part = patches_of(cut.put(cut.lay(view, order[:8]), order), patch)
    assert np.array_equal(part[order[:8]], patches_of(view, patch)[order[:8]]) and (part[order[8:]] == 128).all()


@pytest.mark.parametrize(("patch", "cell"), [(8, 8), (14, 16), (16, 16), (32, 32)])
def test_patches_of_whole_blocks_and_of_14_are_stored(patch, cell):
    assert cell_of(patch, (4, 4)) == cell


@pytest.mark.parametrize("patch", [1, 4, 7, 12, 15, 20, 28])
def test_other_patches_are_refused(patch):
    with pytest.raises(TicketSetError, match=rf"`patch_size` {patch}: expected multiples of 8 px, or 14"):
        cell_of(patch, (4, 4))


@pytest.mark.parametrize(
    ("patch", "side"), [(2048, 1), (32, 256)]
)  # blocks of a row beyond 16 bits; a view of 67 megapixels
def test_views_too_large_are_refused(patch, side):
    assert cell_of(patch // 2, (side, side)) == patch // 2
    with pytest.raises(TicketSetError, match="too large"):
        cell_of(patch, (side, side))


def test_statistics_are_those_that_pillow_takes():
    for number, view in enumerate(pictures(3, 48)):
        view = (view * (1 - number / 4) + 5).astype(np.uint8)
        image, found = Image.fromarray(view), statistics(view)
        assert found.gray == int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)
        assert tuple(zip(found.low, found.high, strict=True)) == image.getextrema()
        gray = Image.new("RGB", image.size, (found.gray,) * 3)
        assert Image.blend(gray, image, 1.7) == ImageEnhance.Contrast(image).enhance(1.7)
        darker = Image.new("RGB", image.size, (found.gray - 1,) * 3)
        assert Image.blend(darker, image, 1.7) != ImageEnhance.Contrast(image).enhance(1.7), "the control"
        scale = 255 / (np.array(found.high) - found.low)
        stretched = np.clip((view * scale - np.array(found.low) * scale), 0, 255).astype(int)
        assert np.abs(stretched - np.asarray(ImageOps.autocontrast(image))).max() <= 1  # tables are rounded otherwise


def test_equal_views_are_equal_bytes_in_any_thread_and_without_files_in_memory(monkeypatch):
    mosaic = layout(16)
    data, _, rankings = member(mosaic)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: member(mosaic)[0], range(8))) == {data}
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert member(mosaic)[0] == data
    assert encode(pictures(2, 64), rankings[:, ::-1], mosaic, QUALITY) != data


@pytest.mark.parametrize("tokens", [8, 16])
def test_statistics_that_are_known_are_those_that_would_be_taken(tokens):
    mosaic = layout(16, tokens=tokens)
    data, shown, rankings = member(mosaic)
    known = [statistics(view) for view in shown]
    assert encode(pictures(2, 64), rankings, mosaic, QUALITY, known) == data
    assert [reading(data, mosaic).statistics(number) for number in range(2)] == known
    assert encode(pictures(2, 64), rankings, mosaic, QUALITY, known[::-1]) != data, "the control"


def jpeg_at(data: bytearray, mosaic: Mosaic, number: int = 0) -> int:
    return struct.unpack_from("<I", data, number * mosaic.entry.itemsize)[0]


def change(pattern: bytes, value: bytes, behind: int = 0) -> Change:
    """Bytes of view 0's JPEG become others: those `behind` the beginning of a pattern."""

    def apply(data: bytearray, mosaic: Mosaic) -> None:
        at = data.index(pattern, jpeg_at(data, mosaic)) + behind
        data[at : at + len(value)] = value

    return apply


def table(place: int, value: int) -> Change:
    """A number of view 0's entry."""
    return lambda data, mosaic: struct.pack_into("<I", data, 4 * place, value)


def splice(data: bytearray, mosaic: Mosaic, segment: bytes) -> None:
    """One more segment in view 0's header; the table agrees."""
    start, *ends = struct.unpack_from(f"<{1 + mosaic.rows}I", data)
    data[start + 2 : start + 2] = segment
    struct.pack_into(f"<{mosaic.rows}I", data, 4, *(end + len(segment) for end in ends))


FRAME, RESTART, SCAN = b"\xff\xc0\0\x11", b"\xff\xdd\0\4", b"\xff\xda\0\x0c"
FORGED: dict[str, tuple[Change, str]] = {
    "another height": (change(FRAME, b"\0\x20", 5), "expected a JPEG of 64x64 px"),
    "height of 65535": (change(FRAME, b"\xff\xff", 5), "got 64x65535 px"),
    "another width": (change(FRAME, b"\xff\xff", 7), "got 65535x64 px"),
    "no height": (change(FRAME, b"\0\0", 5), "got 64x0 px"),
    "12 bits": (change(FRAME, b"\x0c", 4), "expected a JPEG"),
    "4:2:0": (change(FRAME, b"\x22", 11), "expected a JPEG"),
    "progressive": (change(FRAME, b"\xff\xc2"), "baseline"),
    "arithmetic": (change(FRAME, b"\xff\xc9"), "baseline"),
    "a longer frame": (change(FRAME, b"\0\x13", 2), "baseline"),
    "two frames": (change(b"\xff\xc4", FRAME + b"\x08"), "baseline"),
    "a comment": (change(b"\xff\xc4", b"\xff\xfe"), "baseline"),
    "a segment of no length": (change(b"\xff\xdb", b"\0\0", 2), "baseline|cannot be decoded"),
    "another interval": (change(RESTART, b"\0\x20", 4), "got 64x64 px, 32 blocks"),
    "no interval": (change(RESTART, b"\xff\xe0"), "None blocks"),
    "a scan of one color": (change(SCAN, b"\1", 4), "baseline"),
    "no scan": (change(SCAN, b"\xff\xd9"), "baseline"),
    "a long header": (lambda data, mosaic: splice(data, mosaic, b"\xff\xe0\x20\0" + bytes(8190)), "baseline"),
    "no JPEG": (change(b"\xff\xd8", b"GIF8"), "baseline"),
    "Huffman codes that are none": (change(b"\xff\xc4", b"\xff" * 16, 5), "baseline|cannot be decoded"),
    "start in the table": (table(0, 4), "expected a JPEG inside"),
    "start behind its end": (table(0, 1 << 31), "expected a JPEG inside"),
    "end behind all": (table(4, (1 << 32) - 1), "expected a JPEG inside"),
    "end elsewhere": (table(4, 700), "expected row 3 to end 672 bytes"),
    "cut": (lambda data, mosaic: data.__delitem__(slice(len(data) - 900, None)), "expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_view_is_refused_in_a_line_before_it_is_decoded(name, decoder):
    mosaic = layout(16)
    data, _, rankings = member(mosaic, 1)
    forge, words = FORGED[name]
    forged = bytearray(data)
    forge(forged, mosaic)
    assert forged != data
    with pytest.raises(TicketSetError, match=f"^here: view 0: .*({words})") as error:
        reading(bytes(forged), mosaic, 1).view(0, rankings[0])
    assert "\n" not in str(error.value)


def test_a_table_of_other_views_is_refused():
    mosaic = layout(16)
    data, _, _ = member(mosaic)
    with pytest.raises(TicketSetError, match="here: expected a table of 3 ranked views"):
        Ranked(mosaic, data[: 2 * mosaic.entry.itemsize], 3, InMemory(data), 7, len(data), "here")
    with pytest.raises(TicketSetError, match="here: expected a table of 2 ranked views"):
        Ranked(mosaic, data[: 2 * mosaic.entry.itemsize], 2, InMemory(data), 7, 10, "here")


def test_more_patches_than_are_stored_are_refused():
    mosaic = layout(16, tokens=8)
    data, shown, rankings = member(mosaic)
    found = reading(data, mosaic)
    assert np.array_equal(found.patches(1, 8), patches_of(shown[1], mosaic.patch)[rankings[1][:8]])
    with pytest.raises(TicketSetError, match="here: expected at most 8 patches, all that is stored of a view, got 9"):
        found.patches(1, 9)
    assert (patches_of(found.view(1, rankings[1]), 16)[rankings[1][8:]] == 128).all(), "which `Sample.render` refuses"
    assert len(data) < len(member(layout(16))[0]) * 0.8


def test_views_of_another_grid_are_refused():
    data, _, _ = member(layout(16, 4))
    other = layout(32, 2)  # of the same size
    table = np.zeros(2, other.entry)
    table["start"], table["ends"] = table.nbytes, table.nbytes + len(data)
    forged = table.tobytes() + data[np.frombuffer(data, layout(16, 4).entry, 1)["start"][0] :]
    table["ends"] = len(forged) - 2
    with pytest.raises(
        TicketSetError, match="expected a JPEG of 64x64 px, 4:4:4, 32 blocks .*, got 64x64 px, 16 blocks"
    ):
        reading(table.tobytes() + forged[table.nbytes :], other).mosaic_pixels(0)


@pytest.mark.slow
def test_whatever_bytes_change_there_is_a_picture_or_a_line(decoder):
    mosaic = layout(16)
    data, _, rankings = member(mosaic)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        forged = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, len(data) if rng.random() < 0.5 else 1500))
            forged[at] = int(rng.choice([0, 1, 0x7F, 0xC0, 0xD0, 0xD9, 0xDA, 0xFF, rng.integers(256)]))
        if rng.random() < 0.2:
            del forged[int(rng.integers(2 * mosaic.entry.itemsize, len(forged))) :]
        found = reading(bytes(forged), mosaic)
        try:
            list(problems(found, rankings))
            for tokens in (1, 6, 16):
                assert found.patches(1, tokens).shape == (tokens, 16, 16, 3)
        except TicketSetError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 50 < refused < 400


def test_a_mined_sample_renders_as_it_was_stored(ranked_set, center_set):
    """A copy set of the same plan has the photo: its view, encoded and decoded, is the ranked one."""
    opened = TicketSet.open(str(ranked_set))
    mosaic = Mosaic.of(opened.manifest)
    assert (mosaic.grid, mosaic.cell, mosaic.tokens, mosaic.entry.itemsize) == ((4, 4), 16, 16, 12 + 4 * 4)
    for split, count in (("train", 21), ("val", 6)):
        pairs = list(zip(opened.stream(split), TicketSet.open(str(center_set)).stream(split), strict=True))
        assert len(pairs) == count
        for ranked, photo in pairs:
            assert ranked.key == photo.key and np.array_equal(ranked.views, photo.views)
            views = render_views(photo.image, photo.views, 64, photo.exif)
            shown = np.stack([decoded(view, mosaic, QUALITY) for view in views])
            assert np.array_equal(ranked.render(range(len(shown)), 64), shown)
            assert ranked.ranked is not None and ranked.ranked.statistics(0) == statistics(shown[0])
    with pytest.raises(TicketSetError, match="expected an image, got a sample of ranked views"):
        ranked.pixels()


@pytest.mark.parametrize("which", ["ranked_set", "cut_set"])
def test_the_ten_lines_of_format_md_read_a_ticket(which, request, tmp_path):
    folder: Path = request.getfixturevalue(which)
    (tmp_path / "shards").symlink_to(folder)
    (lines,) = [block for block in blocks(ROOT / "docs" / "FORMAT.md") if block[0].startswith("import io")]
    code = [line for line in lines if line.strip() and not line.startswith(("import ", "from "))]
    assert len(code) == 10 and not any(word in line for line in lines for word in ("numpy", "import shards", "datalth"))
    program = "\n".join([*lines, "import sys", "for patch in patches: sys.stdout.buffer.write(patch.tobytes())"])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)
    found = np.frombuffer(done.stdout, np.uint8).reshape(-1, 16, 16, 3)
    sample = next(TicketSet.open(str(folder)).stream("train"))
    assert sample.ranked is not None
    expected = sample.ranked.patches(0, 8)
    assert np.array_equal(found, expected)
    assert not np.array_equal(expected, sample.ranked.patches(1, 8)), "the control: another view"
