"""Tars that are not plain ones: no member vanishes, none gives another's bytes, no header loops or fills the memory."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile
import tracemalloc

import pytest
from click.testing import CliRunner

from conftest import mine, write_image
from inputs import keys, labels, open_source, read_all, refusal, samples, write_tar
from miner.sources.tars import split_of
from shards.errors import ImageError, TicketSetError
from shards.reader import TicketSet
from trainer.cli import main as train

pytestmark = pytest.mark.slow

GNU_TAR = (
    shutil.which("tar")
    and "GNU tar" in subprocess.run(["tar", "--version"], check=True, capture_output=True, text=True).stdout
)


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_members(path, *members, **options):
    """A tar of `member`s; the data goes in whatever the type."""
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info)
            tar.fileobj.write(data + bytes(-len(data) % 512))
            tar.offset += len(data) + -len(data) % 512
    return path


def forged(path, name, size, **fields):
    """A tar of one sound sample and then a member whose size field holds these 12 bytes."""
    write_tar(path, {"a.jpg": b"sound"})
    block = bytearray(member(name, **fields)[0].tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    path.write_bytes(path.read_bytes()[:1024] + block + bytes(1024 + 9 * 512))
    return path


def listed(path):
    return open_source(str(path), val_share=0)


def failures(source, split="train"):
    """source path -> why it cannot be read"""
    out = {}
    for row in source.splits[split].to_pylist():
        try:
            source.read(row)
        except (ImageError, OSError) as error:
            out[row["source"]] = str(error)
    return out


def readable(source):
    """source path -> bytes, without those that fail"""
    bad = failures(source)
    return {r["source"]: source.read(r)[0] for r in source.splits["train"].to_pylist() if r["source"] not in bad}


# Links.


def test_links_are_followed_inside_the_tar(tmp_path):
    tar = write_members(
        tmp_path / "a.tar",
        member("b/early.jpg", type=tarfile.SYMTYPE, linkname="../a/x.jpg"),
        member("a/x.jpg", b"the picture"),
        member("a/x.cls", b"3"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="a/x.jpg"),
        member("hard.cls", type=tarfile.LNKTYPE, linkname="a/x.cls"),
        member("twice.jpg", type=tarfile.SYMTYPE, linkname="b/./early.jpg"),
        member("twice.json", type=tarfile.SYMTYPE, linkname=".data/labels"),
        member(".data/labels", b'{"label": 2}'),
    )
    source = listed(tar)
    assert read_all(source) == dict.fromkeys(["a/x.jpg", "b/early.jpg", "hard.jpg", "twice.jpg"], b"the picture")
    assert labels(source) == {"a/x.jpg": "3", "b/early.jpg": None, "hard.jpg": "3", "twice.jpg": "2"}


def test_a_hard_link_means_what_was_there_before_it_a_symbolic_one_what_is_there_at_last(tmp_path):
    tar = write_members(
        tmp_path / "a.tar",
        member("x.jpg", b"first"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="x.jpg"),
        member("soft.jpg", type=tarfile.SYMTYPE, linkname="x.jpg"),
        member("x.jpg", b"second"),
    )
    assert read_all(listed(tar)) == {"x.jpg": b"second", "hard.jpg": b"first", "soft.jpg": b"second"}


def test_links_that_lead_nowhere_are_failed_rows(tmp_path):
    tar = write_members(
        tmp_path / "a.tar",
        member("ok.jpg", b"ok"),
        member("out.jpg", type=tarfile.SYMTYPE, linkname="/home/me/x.jpg"),
        member("later.jpg", type=tarfile.LNKTYPE, linkname="z.jpg"),
        member("z.jpg", b"z"),
        member("one.jpg", type=tarfile.SYMTYPE, linkname="two.jpg"),
        member("two.jpg", type=tarfile.SYMTYPE, linkname="one.jpg"),
        member("dev.jpg", type=tarfile.SYMTYPE, linkname="tty"),
        member("tty", type=tarfile.CHRTYPE),
        member("d/soft", type=tarfile.SYMTYPE, linkname="ok.jpg"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="d/soft"),  # unpacked, it would lead to ok.jpg
    )
    source = listed(tar)
    assert readable(source) == {"ok.jpg": b"ok", "z.jpg": b"z"}
    assert failures(source) == {
        "out.jpg": "is a link to home/me/x.jpg, which is not in its tar",
        "later.jpg": "is a link to z.jpg, which is not in its tar",
        "one.jpg": "is a link to two.jpg, and that to another, more than 40 times",
        "two.jpg": "is a link to one.jpg, and that to another, more than 40 times",
        "dev.jpg": "expected a plain file, got a character device",
        "hard.jpg": "is a hard link to d/soft, a symbolic link",
    }


def test_very_many_links_are_bounded(tmp_path):
    count = 2000
    tar = write_members(
        tmp_path / "a.tar",
        *(member("x", b"%d" % i) for i in range(count)),
        *(member(f"l{i}.jpg", type=tarfile.LNKTYPE, linkname="x") for i in range(count)),
        *(member(f"c{i}.jpg", type=tarfile.SYMTYPE, linkname=f"c{i + 1}.jpg") for i in range(count)),
        member(f"c{count}.jpg", b"end"),
    )
    source = listed(tar)
    bad = failures(source)
    assert len(bad) == count - 40 and "more than 40 times" in bad["c0.jpg"]
    assert {d for n, d in readable(source).items() if n.startswith("l")} == {b"1999"}


# Members of other types.


def test_members_that_hold_no_file_are_failed_rows(tmp_path):
    tar = write_members(
        tmp_path / "a.tar",
        member("ok.jpg", b"ok"),
        member("char.jpg", type=tarfile.CHRTYPE),
        member("block.png", type=tarfile.BLKTYPE),
        member("pipe.gif", type=tarfile.FIFOTYPE),
        member("odd.webp", b"data of its own", type=b"Q"),
        member("folder.jpg", type=tarfile.DIRTYPE),
        member("cont.jpg", b"contiguous", type=tarfile.CONTTYPE),
    )
    source = listed(tar)
    assert readable(source) == {"ok.jpg": b"ok", "cont.jpg": b"contiguous"}
    assert failures(source) == {
        "char.jpg": "expected a plain file, got a character device",
        "block.png": "expected a plain file, got a block device",
        "pipe.gif": "expected a plain file, got a FIFO",
        "odd.webp": "expected a plain file, got a member of type b'Q'",
    }


def test_mined_they_stand_in_the_index(tmp_path):
    write_image(tmp_path / "x.jpg", 0)
    write_members(
        tmp_path / "a.tar", member("x.jpg", (tmp_path / "x.jpg").read_bytes()), member("p.jpg", type=tarfile.FIFOTYPE)
    )
    mine(
        "--data",
        tmp_path / "a.tar",
        "--out",
        tmp_path / "set",
        "--method",
        "center",
        "--max-failures",
        1,
        "--val-share",
        0,
    )
    found = TicketSet.open(str(tmp_path / "set")).table("train").to_pylist()
    assert {(r["key"], r["status"], r["error"]) for r in found} == {
        ("x", "ok", None),
        ("p", "failed", "expected a plain file, got a FIFO"),
    }


def test_a_label_that_is_no_file_is_an_error(tmp_path):
    tar = write_members(tmp_path / "a.tar", member("x.jpg", b"x"), member("x.cls", type=tarfile.FIFOTYPE))
    assert "x.cls: expected a plain file, got a FIFO" in refusal(tar)


# Sparse members.


def with_holes(path, extents, size):
    with open(path, "wb") as file:
        for offset in extents:
            file.seek(offset)
            file.write(f"data at {offset};".encode() * 300)
        file.truncate(size)
    return path.read_bytes()


@pytest.mark.skipif(not GNU_TAR, reason="needs GNU tar to write sparse members")
@pytest.mark.parametrize("form", ["--format=gnu", *(f"--sparse-version={v}" for v in ("0.0", "0.1", "1.0"))])
def test_sparse_members_are_read_right(form, tmp_path):
    (tmp_path / "d").mkdir()
    many = with_holes(tmp_path / "d" / "many.bmp", range(0, 3_000_000, 100_000), 3_500_000)  # more than one block maps
    late = with_holes(tmp_path / "d" / "late.bmp", [1_000_000], 1_003_000)
    hole = with_holes(tmp_path / "d" / "hole.bmp", [], 70_000)
    (tmp_path / "d" / "plain.bmp").write_bytes(b"plain" * 1000)
    kind = [form] if "format" in form else ["--format=pax", form]
    subprocess.run(["tar", "-S", "--sort=name", *kind, "-cf", "a.tar", "-C", "d", "."], cwd=tmp_path, check=True)
    tar = tmp_path / "a.tar"
    assert tar.stat().st_size < 500_000, "the control: the holes are not in the tar"
    source = listed(tar)
    assert read_all(source) == {
        "./many.bmp": many, "./late.bmp": late, "./hole.bmp": hole, "./plain.bmp": b"plain" * 1000,
    }  # fmt: skip
    assert {r["source"]: r["size"] for r in source.splits["train"].to_pylist()}["./many.bmp"] == 3_500_000


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ({"map": "0,4,2,2", "size": "8"}, "is a sparse file whose map does not fit it"),  # pieces overlap
        ({"map": "0,4,6,4", "size": "8"}, "is a sparse file whose map does not fit it"),  # behind its end
        ({"map": "0,4,4,1000", "size": "2000"}, "is a sparse file whose map does not fit it"),  # more than is stored
        ({"map": "-4,4,4,4", "size": "8"}, "is a sparse file whose map does not fit it"),
        ({"map": "0,4", "size": "1000000000000"}, "expected an image file of at most 1073741824 bytes"),
        ({"major": "2", "minor": "0", "realsize": "8"}, "is a sparse file of a kind that is not known here"),
    ],
)
def test_sparse_members_that_cannot_be_right_are_failed_rows(records, why, tmp_path):
    headers = {f"GNU.sparse.{name}": value for name, value in records.items()}
    tar = write_members(
        tmp_path / "a.tar", member("ok.jpg", b"ok"), member("s.jpg", b"12345678", pax_headers=headers),
        format=tarfile.PAX_FORMAT,
    )  # fmt: skip
    source = listed(tar)
    assert readable(source) == {"ok.jpg": b"ok"}
    assert failures(source)["s.jpg"].startswith(why)


# Several archives, and several versions.


def joined(path, *tars):
    path.write_bytes(b"".join(t if isinstance(t, bytes) else t.read_bytes() for t in tars))
    return path


def test_joined_archives_are_read_to_their_end(tmp_path):
    one, two = (write_tar(tmp_path / f"{i}.t", samples(4 * i, 4)) for i in (0, 1))
    three = write_members(tmp_path / "2.t", member("long" * 40 + ".jpg", b"8"), format=tarfile.PAX_FORMAT)
    tar = joined(tmp_path / "train.tar", one, two, three)
    source = listed(tar)
    pictures = {f"{i:04d}.jpg": f"picture {i}".encode() for i in range(8)}
    assert read_all(source) == {**pictures, "long" * 40 + ".jpg": b"8"}
    note = f"1 tars hold several archives joined in one file, and all are read (first: {tar}: 3 archives)"
    assert note in source.notes


def test_padding_is_no_matter_and_other_bytes_behind_the_end_are_said(tmp_path):
    one = write_tar(tmp_path / "one.t", samples(0, 2))
    padded = listed(joined(tmp_path / "a.tar", one, bytes(3_000_000)))
    assert padded.notes == []
    for rest in (b"garbage", bytes(1000) + b"\1" * 600):
        source = listed(joined(tmp_path / "b.tar", one, rest))
        assert keys(source) == ["0000", "0001"]
        (note,) = source.notes
        assert note.startswith("1 tars hold bytes behind their end mark that are no members and are not read")


def test_a_joined_archive_that_is_cut_is_an_error(tmp_path):
    one, two = (write_tar(tmp_path / f"{i}.t", {f"{i}.jpg": b"x" * 600}) for i in (0, 1))
    assert "unexpected end of data" in refusal(joined(tmp_path / "a.tar", one, two.read_bytes()[:700]))


def test_of_equal_names_the_last_counts_for_image_and_label(tmp_path):
    tar = tmp_path / "a.tar"
    write_tar(tar, {"x.jpg": b"old", "x.cls": b"0", "y.jpg": b"y", "y.json": b'{"label": 1}'})
    with tarfile.open(tar, "a") as more:
        for info, data in (member("./x.jpg", b"new"), member("x.cls", b"2"), member("y.json", b'{"label": 0}')):
            more.addfile(info, io.BytesIO(data))
    source = listed(tar)
    assert read_all(source) == {"./x.jpg": b"new", "y.jpg": b"y"}
    assert labels(source) == {"./x.jpg": "2", "y.jpg": "0"}
    note = "3 members were appended again under a name that was there; the last one counts"
    assert f"{note} (first: {tar}: ./x.jpg)" in source.notes


# Names.


def test_long_and_odd_names_are_kept(tmp_path):
    names = ["d/" + "n" * 180 + ".jpg", "line\nbreak/x.jpg", "été/" + "é" * 90 + ".png", "caf\udce9.jpg"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        tar = write_members(tmp_path / "a.tar", *(member(n, n.encode("utf-8", "surrogateescape")) for n in names),
                            format=form, encoding="utf-8", errors="surrogateescape")  # fmt: skip
        source = listed(tar)
        assert sorted(data for data in read_all(source).values()) == sorted(
            n.encode("utf-8", "surrogateescape") for n in names
        )
        assert "caf%E9" in keys(source) and "line%0Abreak/x" in keys(source)


def test_hidden_and_system_members_are_left_out_and_counted(tmp_path):
    hidden = ["._0000.jpg", "__MACOSX/0000.jpg", "d/@eaDir/0000.jpg", ".DS_Store", "a/.b/c.jpg"]
    tar = write_tar(tmp_path / "a.tar", {**samples(0, 2), **dict.fromkeys(hidden, b"junk")})
    source = listed(tar)
    assert keys(source) == ["0000", "0001"]
    assert source.notes == [f"5 hidden or system files and folders are skipped (first: {tar}: ._0000.jpg)"]


def test_hidden_tars_and_img2datasets_leftovers_do_not_stop_a_folder_of_tars(tmp_path):
    write_tar(tmp_path / "00000.tar", samples(0, 2))
    for name in ("._00000.tar", "00000.parquet", "00000_stats.json", ".DS_Store"):
        (tmp_path / name).write_bytes(b"no tar")
    for name in ("_tmp", "@eaDir"):
        (tmp_path / name).mkdir()
    source = listed(tmp_path)
    assert keys(source) == ["0000", "0001"]
    assert source.notes == [
        "3 hidden or system files and folders are skipped (first: .DS_Store)",
        "3 files and folders of img2dataset beside the tars are not read (first: 00000.parquet)",
    ]


@pytest.mark.parametrize("count", [2, 10])
def test_every_image_that_a_dotted_name_loses_is_counted(count, tmp_path):
    tar = write_tar(tmp_path / "a.tar", {f"img.{i}.jpg": b"%d" % i for i in range(1, count + 1)})
    source = listed(tar)
    assert read_all(source) == {"img.1.jpg": b"1"}
    (note,) = source.notes
    assert note.startswith(f"{count - 1} images are left out") and "rename them without that dot" in note


def test_parts_of_samples_are_counted_apart(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 3, jpg="picture {}", seg_png="mask", depth_png="mask"))
    source = listed(tar)
    assert list(labels(source)) == ["0000.jpg", "0001.jpg", "0002.jpg"]
    (note,) = source.notes
    assert note.startswith("6 images with further dots in their names are taken for parts of samples and left out")


# Which split.


@pytest.mark.parametrize(
    ("url", "split"),
    [
        ("medieval-000.tar", "train"),
        ("festival.tar", "train"),
        ("latest-000.tar", "train"),
        ("imagenet1k-validation-0001.tar", "val"),
        ("VAL2017.tar", "val"),
        ("x_valid_3.tar", "val"),
        ("d/test000.tar", "test"),
        ("val/training-3.tar", "train"),  # the name goes before the folder
        ("sub/val/000.tar", "val"),
        ("s3://b/coco_val2017/000.tar", "val"),
        ("sub/test/000.tar", "test"),
        ("my-test-run/000.tar", "train"),
        ("train-test-split/000.tar", "train"),
        ("val/sub/000.tar", "train"),
        ("000.tar", "train"),
    ],
)
def test_a_tars_split_is_a_whole_word(url, split):
    assert split_of(url)[0] == split


def test_splits_of_tars_are_said(tmp_path):
    for split, first in (("train", 0), ("val", 4), ("other", 8)):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "000.tar", samples(first, 2))
    source = open_source(f"{tmp_path}/*/*.tar")
    assert {split: len(table) for split, table in source.splits.items()} == {"train": 4, "val": 2}
    assert source.notes[:3] == [
        "split train: 1 tars without such a word",
        "split train: 1 tars by the word train in their folder's name",
        "split val: 1 tars by the word val in their folder's name",
    ]


# Labels.


@pytest.mark.parametrize("text", ["1_0", "+1", "１", "0x1", "1.0", "", "1 2", "9" * 5000])
def test_cls_holds_ascii_digits_and_nothing_else(text, tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 1, cls=text, jpg="x"))
    text = refusal(tar)
    assert "a.tar: 0000: expected digits in .cls" in text and len(text) < 300


def test_space_around_the_digits_is_no_matter(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar", {**samples(0, 1, cls=" 1\n", jpg="x"), **samples(1, 1, cls="0002\r\n", jpg="x")}
    )
    assert labels(listed(tar)) == {"0000.jpg": "1", "0001.jpg": "2"}


@pytest.mark.parametrize(
    "value", ["true", "1.5", "-3", "1000000", "1" + "0" * 400, "9" * 5000, '""', "[1]", "NaN", "[" * 100_000]
)
def test_json_labels_that_are_none_are_one_line(value, tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 1, jpg="x", json='{"label": ' + value.replace("{}", "") + "}"))
    text = refusal(tar)
    assert "a.tar: 0000: expected" in text and "\n" not in text and len(text) < 300


def test_missing_labels_are_noted_with_their_number_and_the_first(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar", {**samples(0, 4), **samples(7, 2, jpg="x"), "0009.jpg": b"x", "0009.json": b"{}"}
    )
    source = listed(tar)
    (note,) = [note for note in source.notes if "no label" in note]
    assert note.startswith("train: 3 of 7 images have no label (first: 0007.jpg); training needs labels")


def test_training_names_the_images_that_have_no_label(tmp_path):
    write_image(tmp_path / "x.jpg", 0)
    picture = (tmp_path / "x.jpg").read_bytes()
    for split in ("train", "val"):
        bare = {f"bare{i}.jpg": picture for i in range(2)} if split == "train" else {}
        labeled = {f"s{i}.{e}": d for i in range(4) for e, d in (("jpg", picture), ("cls", b"%d" % (i % 2)))}
        write_tar(tmp_path / f"{split}.tar", {**labeled, **bare})
    data = f"{tmp_path}/{{train,val}}.tar"
    said = mine("--data", data, "--out", tmp_path / "set", "--method", "center", "--views", 3).output
    assert "train: 2 of 6 images have no label (first: bare0.jpg); training needs labels" in said
    result = CliRunner().invoke(train, ["--shards", str(tmp_path / "set"), "--output", str(tmp_path / "runs")])
    assert result.exit_code == 1
    first = next(s.key for s in TicketSet.open(str(tmp_path / "set")).stream("train") if s.label is None)
    assert f"split train has 2 of 6 images without label (first: {first})" in result.output


# Headers that lie.

SIZES = {
    "negative octal": b"-0000001000\0",
    "small negative octal": b"-00000000001",
    "negative base-256": b"\xff" * 10 + b"\xfc\x00",
    "absurd octal": b"777777777777",
    "absurd base-256": b"\x80" + b"\x7f" * 11,
}


@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b"S", b"Q"]
)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_lie_neither_loop_nor_fill_the_memory(size, kind, tmp_path):
    if kind == b"S" and size == "small negative octal":
        return  # takes no block, and a sparse member's own size is another field
    tar = forged(tmp_path / "a.tar", "b.jpg", SIZES[size], type=kind)
    tracemalloc.start()
    text = refusal(tar)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{tar}: not a readable tar" in text and "\n" not in text
    assert peak < 20_000_000


@pytest.mark.parametrize("size", ["-512", "-1", "9" * 30, "9" * 5000])
def test_pax_sizes_that_lie_are_one_line(size, tmp_path):
    tar = write_members(tmp_path / "a.tar", member("a.jpg", b"a"), member("b.jpg", b"b", pax_headers={"size": size}),
                        format=tarfile.PAX_FORMAT)  # fmt: skip
    text = refusal(tar)
    assert f"{tar}: not a readable tar" in text and "\n" not in text


def test_endless_headers_are_one_line(tmp_path):
    """Long names of long names; the map of a sparse file that goes on and on; one long name of 2 MB."""
    chain = b"".join(b"".join([member("@", b"n", type=b"L")[0].tobuf(), b"n" + bytes(511)]) for _ in range(5000))
    sparse = bytearray(member("s.jpg", type=b"S")[0].tobuf(tarfile.GNU_FORMAT))
    sparse[482] = 1
    sparse[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(sparse))[0]
    maps = bytes(sparse) + (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 5000
    name = member("@", b"n" * 2_000_000, type=b"L")
    for data in (chain, maps, name[0].tobuf() + name[1] + bytes(2048)):
        (tmp_path / "a.tar").write_bytes(data)
        text = refusal(tmp_path / "a.tar")
        assert "a.tar: not a readable tar" in text and "\n" not in text


def test_headers_with_single_bytes_changed_are_a_line_or_a_listing(tmp_path):
    """Every byte of a PAX header, a sparse one and a plain one, set to each of a few values."""
    headers = {"GNU.sparse.map": "0,2,4,2", "GNU.sparse.size": "6"}
    tar = write_members(tmp_path / "a.tar", member("s.jpg", b"abcd", pax_headers=headers), member("b.jpg", b"b"),
                        format=tarfile.PAX_FORMAT)  # fmt: skip
    whole = tar.read_bytes()[:3072] + bytes(1024)
    ends = []
    for place in range(0, 3072, 7):
        data = bytearray(whole)
        data[place] = 0x2D if place % 2 else 0xFF
        for start in (0, 1024, 2048):  # headers stay sound by their checksum
            block = data[start : start + 512]
            if start != 512:
                data[start + 148 : start + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
        tar.write_bytes(data)
        try:
            failures(listed(tar))
            ends.append("listing")
        except TicketSetError as error:
            assert "\n" not in str(error)
            ends.append("line")
    assert {"listing", "line"} == set(ends)


# What is no tar to be read.


@pytest.mark.parametrize(
    ("packer", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress), ("zstd", None)]
)
def test_a_compressed_tar_says_so(packer, pack, tmp_path):
    data = write_tar(tmp_path / "plain", samples(0, 1)).read_bytes()
    (tmp_path / "a.tar").write_bytes(pack(data) if pack else b"\x28\xb5\x2f\xfd" + data)
    text = refusal(tmp_path / "a.tar")
    assert f"a.tar: is compressed ({packer}): unpack it first" in text


@pytest.mark.parametrize(
    "spec", ["x/train.tar.gz", "t.tgz", "s3://b/train-{000..009}.tar.zst", "train-*.tar.xz", "a.tar.bz2"]
)
def test_the_name_of_a_compressed_tar_is_enough(spec, tmp_path):
    assert refusal(spec).startswith(f"`data` {spec}: is compressed")
    (tmp_path / "b.tar.gz").write_bytes(b"")
    assert "b.tar.gz: is compressed (gzip)" in refusal(tmp_path)


def test_a_name_that_begins_like_a_packers_mark_is_a_name(tmp_path):
    assert keys(listed(write_tar(tmp_path / "a.tar", {"BZhang/1.jpg": b"x"}))) == ["BZhang/1"]


@pytest.mark.parametrize("spec", ["pipe", "pipe.tar", "{pipe,other}.tar"])
def test_a_fifo_is_refused_and_not_waited_for(spec, tmp_path):
    for name in ("pipe", "pipe.tar"):
        os.mkfifo(tmp_path / name)
    write_tar(tmp_path / "other.tar", samples(0, 1))
    text = refusal(tmp_path / spec)
    assert "neither a file nor a folder" in text or "expected a plain file, got a FIFO" in text
