"""Tars as sources: WebDataset's, far away ones, and the ILSVRC2012 archives."""

import gzip
import io
import os
import tarfile

import fsspec
import numpy as np
import pytest
from scipy.io import savemat

from inputs import keys, labels, open_source, plan, read_all, refusal, rows, samples, write_csv, write_tar
from miner.plan import shard_rows
from miner.sources.imagenet import _devkit_labels
from shards.errors import ImageError

# WebDataset tars.


@pytest.fixture
def tars(tmp_path):
    """Two train tars of three samples and one val tar of two."""
    for name, first, count in (("train-0000", 0, 3), ("train-0001", 3, 3), ("val-0000", 1, 2)):
        write_tar(tmp_path / f"{name}.tar", samples(first, count))
    return tmp_path


@pytest.mark.parametrize("spec", ["train-{0000..0001}.tar", "train-*.tar", "train-000[01].tar", "train-000?.tar"])
def test_braces_and_globs(spec, tars):
    source = open_source(str(tars / spec), val_share=0)
    assert labels(source) == {f"{i:04d}.jpg": str(i) for i in range(6)}
    assert read_all(source) == {f"{i:04d}.jpg": f"picture {i}".encode() for i in range(6)}
    assert keys(source) == [f"{i:04d}" for i in range(6)]


@pytest.mark.parametrize("spec", ["", "/{train,val}-*.tar", "/*.tar"])
def test_a_tars_split_is_in_its_name(spec, tars):
    source = open_source(f"{tars}{spec}")
    assert {split: len(table) for split, table in source.splits.items()} == {"train": 6, "val": 2}
    assert read_all(source, "val") == {"0001.jpg": b"picture 1", "0002.jpg": b"picture 2"}


def test_a_single_tar(tars):
    assert len(open_source(str(tars / "train-0001.tar"), val_share=0).splits["train"]) == 3
    assert len(open_source(f"file://{tars}/train-0001.tar", val_share=0).splits["train"]) == 3


def test_a_hidden_folder_beside_tars_is_no_matter(tars):
    (tars / ".cache").mkdir()
    assert len(open_source(str(tars)).splits["train"]) == 6


def test_a_member_of_the_braces_that_is_missing_is_an_error(tars):
    text = refusal(tars / "train-{0000..0002}.tar")
    assert "train-0002.tar is missing" in text
    assert "no such path" in refusal(tars / "test-*.tar")


def test_labels_from_json(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 3, json='{"label": {}, "other": "n{}"}', png="p{}"))
    assert labels(open_source(str(tar), val_share=0)) == {"0000.png": "0", "0001.png": "1", "0002.png": "2"}
    bare = write_tar(tmp_path / "b.tar", samples(0, 3, json='{"other": {}}', png="p{}"))
    assert labels(open_source(str(bare), val_share=0)) == dict.fromkeys(["0000.png", "0001.png", "0002.png"])


def test_cls_goes_before_json(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 2, cls="1\n", json='{"label": 0}', png="p"))
    assert set(labels(open_source(str(tar), val_share=0)).values()) == {"1"}


def test_an_image_with_further_dots_has_the_label_of_its_own_name(tmp_path):
    tar = tmp_path / "train.tar"
    write_tar(
        tar,
        {
            "a.v0.jpg": b"x",
            "a.v0.cls": b"3",
            "a.v1.jpg": b"y",
            "a.v1.cls": b"1",
            "b.jpg": b"z",
            "b.seg.json": b"{",
            "b.cls": b"2",
        },
    )
    source = open_source(str(tar), val_share=0)
    assert source.splits["train"]["label"].to_pylist() == [3, 2]
    assert any("1 images are left out" in note and "a.v1.jpg" in note for note in source.notes)


def test_int_labels_reach_as_far_as_the_highest_of_any_split(tmp_path):
    write_tar(tmp_path / "train.tar", samples(0, 2))
    write_tar(tmp_path / "val.tar", samples(7, 1))
    source = open_source(str(tmp_path))
    assert source.classes == [str(i) for i in range(8)]
    assert "5 of 8 classes hold no images" in "".join(source.notes) or "6 of 8" in "".join(source.notes)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"cls": "cat", "jpg": "x"}, "0000: expected digits in .cls or an object in .json"),
        ({"json": "[1]", "jpg": "x"}, "0000: expected digits in .cls or an object in .json"),
        ({"json": "{", "jpg": "x"}, "0000: expected digits in .cls or an object in .json"),
        ({"cls": "-1", "jpg": "x"}, "expected labels that are all names or all numbers from 0"),
        ({"cls": "123456789012", "jpg": "x"}, "123456789012"),
        ({"json": '{"label": true}', "jpg": "x"}, "0000: expected a name or a number in its json's label, got True"),
    ],
)
def test_labels_that_are_none(members, expected, tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 2, **members))
    text = refusal(tmp_path / "a.tar")
    assert expected in text and "a.tar" in text and "\n" not in text


def test_names_and_numbers_together_are_an_error(tmp_path):
    write_tar(tmp_path / "train.tar", samples(0, 2, json='{"label": "cat"}', jpg="x"))
    write_tar(tmp_path / "val.tar", samples(0, 2))
    assert "val" in refusal(tmp_path)
    write_tar(tmp_path / "train.tar", {**samples(0, 1, json='{"label": "cat"}', jpg="x"), **samples(1, 1)})
    assert "all names or all numbers" in refusal(tmp_path / "train.tar")


def test_a_val_name_that_train_lacks_is_an_error(tmp_path):
    write_tar(tmp_path / "train.tar", samples(0, 2, json='{"label": "cat"}', jpg="x"))
    write_tar(tmp_path / "val.tar", samples(0, 2, json='{"label": "dog"}', jpg="x"))
    assert "class 'dog' (0000.jpg) is not among train's 1" in refusal(tmp_path)


def test_samples_without_an_image_are_noted(tmp_path):
    write_tar(tmp_path / "a.tar", {**samples(0, 2), **samples(5, 1, cls="1", txt="x")})
    source = open_source(str(tmp_path / "a.tar"), val_share=0)
    assert list(labels(source)) == ["0000.jpg", "0001.jpg"]
    (note,) = [n for n in source.notes if "image member" in n]
    assert note.startswith("1 samples have no image member") and f"first: {tmp_path / 'a.tar'}: 0005" in note


def test_tars_without_any_image_are_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 2, txt="x"))
    assert "no images in 1 tars" in refusal(tmp_path / "a.tar")


def test_the_plain_image_member_is_the_image_whatever_comes_first(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 2, depth_png="mask", jpg="picture {}", seg_png="mask"))
    assert read_all(open_source(str(tar), val_share=0)) == {"0000.jpg": b"picture 0", "0001.jpg": b"picture 1"}


def test_two_images_under_one_name_are_noted(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"img.1.jpg": b"one", "img.2.jpg": b"two"})
    source = open_source(str(tar), val_share=0)
    assert read_all(source) == {"img.1.jpg": b"one"}
    (note,) = source.notes
    assert note.startswith("1 images are left out: WebDataset's samples end at the first dot of a name, so that they")
    assert note.endswith(f"rename them without that dot (first: {tar}: img: img.2.jpg)")


def test_one_sample_name_in_two_tars_gives_two_keys(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"x.jpg": name.encode()})
    source = open_source(str(tmp_path / "{a,b}.tar"), val_share=0)
    assert keys(source) == ["x", "x-1"]
    assert [source.read(row)[0] for row in source.splits["train"].to_pylist()] == [b"a", b"b"]


def test_folders_inside_a_tar_are_part_of_the_key(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"./d.1/x.jpg": b"1", "d.2/x.jpg": b"2"})
    assert keys(open_source(str(tar), val_share=0)) == ["d%2E1/x", "d%2E2/x"]


def test_unlabeled_tars_take_labels_from_a_csv(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 2, jpg="x"))
    assert open_source(str(tar), val_share=0).classes == []
    table = write_csv(tmp_path / "l.csv", [("0000.jpg", "cat"), ("0001.jpg", "ant")])
    assert labels(open_source(str(tar), labels=table, val_share=0)) == {"0000.jpg": "cat", "0001.jpg": "ant"}


@pytest.mark.parametrize("data", [b"", b"this is text", bytes(100)])
def test_a_file_that_is_no_tar(data, tmp_path):
    (tmp_path / "a.tar").write_bytes(data)
    text = refusal(tmp_path / "a.tar")
    assert f"{tmp_path / 'a.tar'}: not a readable tar" in text and "\n" not in text


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (700, "unexpected end of data"),  # inside the first file
        (1536, "expected a member or the end mark at 1536, got the end of the file"),  # between two members
        (2000, "expected a member or the end mark at 1536, got the end of the file"),  # inside a header
        (3072, "expected a member or the end mark at 3072, got the end of the file"),  # nothing lacks but the end mark
    ],
)
def test_a_truncated_tar_is_an_error(cut, expected, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 2, jpg="x" * 600))
    path.write_bytes(path.read_bytes()[:cut])
    assert f"a.tar: not a readable tar: {expected}" in refusal(path)
    with tarfile.open(path) as tar:
        assert cut == 700 or len(tar.getmembers()) == (2 if cut == 3072 else 1), "the control: tarfile sees no error"


def test_a_broken_header_is_an_error_and_not_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 3, jpg="x" * 600))
    data = bytearray(path.read_bytes())
    data[1536 + 3] ^= 1
    path.write_bytes(data)
    assert "expected a member or the end mark at 1536, got something else" in refusal(path)


def test_a_tar_that_shrank_after_listing_fails_when_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 1, jpg="x" * 600))
    source = open_source(str(path), val_share=0)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(OSError, match="a.tar ends inside 0000.jpg"):
        source.read(source.splits["train"].to_pylist()[0])


# Remote tars.


@pytest.fixture
def remote():
    """Five tars of eight samples in memory://, whose names run against the order of the tars."""
    fs = fsspec.filesystem("memory")
    for i in range(5):
        write_tar(f"memory://tars/train-{i}.tar", samples(100 - 10 * i, 8, cls="0", jpg="picture {}"))
    yield "memory://tars/train-{0..4}.tar"
    fs.rm("/tars", recursive=True)


def containers(source, shard_size=8):
    """For each shard of the plan, the tars and offsets of its rows."""
    table, whole = source.splits["train"], plan(source, shard_size)
    rows = [table.take(shard_rows(whole, source, *shard)) for shard in whole.shards()]
    return [list(zip(r["container"].to_pylist(), r["offset"].to_pylist(), strict=True)) for r in rows]


def test_remote_tars_are_read_in_order_and_shuffled_within_a_shard(remote):
    source = open_source(remote, val_share=0)
    shards = containers(source)
    assert [{tar for tar, _ in shard} for shard in shards] == [{0}, {1}, {2}, {3}, {4}]
    assert all(len(set(shard)) == 8 for shard in shards)
    assert all(shard != sorted(shard) for shard in shards)
    assert len({tuple(offset for _, offset in shard) for shard in shards}) > 1, "not the same shuffle in each"


def test_local_tars_are_shuffled_across_shards(remote, tmp_path):
    """The control of the test above."""
    fsspec.filesystem("memory").get("/tars/", f"{tmp_path}/", recursive=True)
    shards = containers(open_source(f"{tmp_path}/train-{{0..4}}.tar", val_share=0))
    assert all(len({tar for tar, _ in shard}) > 1 for shard in shards)
    assert len(set().union(*shards)) == 40


@pytest.mark.parametrize("glob", ["train-*.tar", "train-{0..4}.tar", "train-[0-4].tar"])
def test_remote_tars_read_back(remote, glob):
    source = open_source(f"memory://tars/{glob}", val_share=0)
    assert read_all(source) == {
        f"{n:04d}.jpg": f"picture {n}".encode() for i in range(5) for n in range(100 - 10 * i, 108 - 10 * i)
    }


def test_a_remote_val_split_keeps_the_order_of_tars(remote):
    source = open_source(remote, val_share=0.25)
    for split in ("train", "val"):
        pairs = list(zip(*(source.splits[split][c].to_pylist() for c in ("container", "offset")), strict=True))
        assert pairs == sorted(pairs) and len({c for c, _ in pairs}) > 1


def test_a_remote_tar_that_is_missing(remote):
    text = refusal("memory://tars/train-{0..5}.tar")
    assert "memory://tars/train-5.tar" in text and "\n" not in text
    assert "memory://tars/no-*.tar" in refusal("memory://tars/no-*.tar")


# The ILSVRC2012 archives.

WNIDS = ("n01440764", "n02119789", "n03000134")


@pytest.fixture
def imagenet(tmp_path):
    """The train tar of tars (3 classes of 2) and the flat val tar (4 images)."""
    folder = tmp_path / "ILSVRC2012"
    folder.mkdir()
    inner = {}
    for wnid in WNIDS:
        files = {f"{wnid}_{i}.JPEG": f"{wnid} {i}".encode() * 100 for i in (2, 10)}
        inner[f"{wnid}.tar"] = write_tar(tmp_path / "inner.tar", files).read_bytes()
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)
    write_tar(folder / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{i:08d}.JPEG": b"val %d" % i for i in range(1, 5)})
    return folder


VAL_CLASSES = dict(zip(range(1, 5), (WNIDS[2], WNIDS[0], WNIDS[0], WNIDS[1]), strict=True))


def write_devkit(folder):
    """The devkit's numbers run otherwise than the sorted WordNet ids, and it lists inner nodes of the tree too."""
    numbers = {WNIDS[0]: 3, WNIDS[1]: 1, WNIDS[2]: 2, "n00001740": 4}
    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = np.array([(n, w, "words, more", 3 if n == 4 else 0) for w, n in numbers.items()], kind)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets[:, None]})
    truth = "".join(f"{numbers[VAL_CLASSES[i]]}\n" for i in VAL_CLASSES).encode()
    root = "ILSVRC2012_devkit_t12"
    members = {f"{root}/data/meta.mat": mat.getvalue(), f"{root}/data/ILSVRC2012_validation_ground_truth.txt": truth}
    with tarfile.open(folder / f"{root}.tar.gz", "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def extract(imagenet, root):
    """What everybody makes of the archives: train/WNID and val/WNID."""
    for wnid in WNIDS:
        (root / "train" / wnid).mkdir(parents=True)
        archive = imagenet / "ILSVRC2012_img_train.tar"
        with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(f"{wnid}.tar")) as inside:
            inside.extractall(root / "train" / wnid, filter="data")
    with tarfile.open(imagenet / "ILSVRC2012_img_val.tar") as tar:
        for i, wnid in VAL_CLASSES.items():
            (root / "val" / wnid).mkdir(parents=True, exist_ok=True)
            tar.extract(f"ILSVRC2012_val_{i:08d}.JPEG", root / "val" / wnid, filter="data")
    return root


@pytest.mark.parametrize("way", ["devkit", "labels"])
def test_imagenet_tars_are_what_the_extracted_folders_are(way, imagenet, tmp_path):
    options = {}
    if way == "devkit":
        write_devkit(imagenet)
    else:
        rows = [(f"ILSVRC2012_val_{i:08d}.JPEG", wnid) for i, wnid in VAL_CLASSES.items()]
        options["labels"] = write_csv(tmp_path / "val.csv", rows)
    listed = set(os.listdir(imagenet))
    source = open_source(str(imagenet), **options)
    folders = open_source(str(extract(imagenet, tmp_path / "extracted")))
    assert source.classes == folders.classes == sorted(WNIDS)
    for split in ("train", "val"):
        for column in ("key", "source", "label", "size"):
            assert source.splits[split][column].equals(folders.splits[split][column]), column
        assert read_all(source, split) == read_all(folders, split)
    assert keys(source)[:2] == ["train/n01440764/n01440764_2", "train/n01440764/n01440764_10"]
    assert set(os.listdir(imagenet)) == listed, "no cache is left beside the archives"


def test_the_val_tar_without_devkit_is_an_error_that_names_both_ways_out(imagenet):
    for data in (imagenet, imagenet / "ILSVRC2012_img_val.tar"):
        text = refusal(data)
        assert "ILSVRC2012_devkit_t12.tar.gz" in text and "`labels` FILE.csv (filename,class)" in text
        assert "\n" not in text


def test_the_train_tar_alone_needs_no_devkit(imagenet):
    source = open_source(str(imagenet), splits=("train",))
    assert len(source.splits["train"]) == 6, "the val tar is there: nothing of train becomes a val split"
    alone = open_source(str(imagenet / "ILSVRC2012_img_train.tar"))
    assert (len(alone.splits["train"]), len(alone.splits["val"])) == (3, 3)


def test_the_val_tar_alone(imagenet):
    write_devkit(imagenet)
    source = open_source(str(imagenet / "ILSVRC2012_img_val.tar"))
    assert labels(source, "val") == {f"val/{w}/ILSVRC2012_val_{i:08d}.JPEG": w for i, w in VAL_CLASSES.items()}
    text = refusal(imagenet / "ILSVRC2012_img_val.tar", splits=("train",))
    assert "expected a split of ['val'], got `splits` train" in text


def test_a_csv_that_lacks_a_val_image(imagenet, tmp_path):
    table = write_csv(tmp_path / "val.csv", [("ILSVRC2012_val_00000001.JPEG", WNIDS[0])])
    assert "val.csv: expected a class for every image, got none for ILSVRC2012_val_00000002.JPEG" in refusal(
        imagenet, labels=table
    )


def test_a_devkit_that_is_none(imagenet):
    devkit = imagenet / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(b"not a gzip file")
    assert "ILSVRC2012_devkit_t12.tar.gz: not a readable tar" in refusal(imagenet)
    with tarfile.open(devkit, "w:gz"):
        pass
    assert "expected data/ILSVRC2012_validation_ground_truth.txt and data/meta.mat in it" in refusal(imagenet)


@pytest.mark.parametrize("cut", [3000, 5000])
def test_a_truncated_train_tar_is_an_error(cut, imagenet):
    archive = imagenet / "ILSVRC2012_img_train.tar"
    archive.write_bytes(archive.read_bytes()[:cut])
    text = refusal(imagenet, splits=("train",))
    assert "ILSVRC2012_img_train.tar" in text and "not a readable tar" in text


def test_a_member_of_the_train_tar_that_is_no_tar_is_an_error(imagenet):
    write_tar(imagenet / "ILSVRC2012_img_train.tar", {"n01440764.tar": b"text"})
    text = refusal(imagenet, splits=("train",))
    assert "ILSVRC2012_img_train.tar: n01440764.tar: not a readable tar" in text


def test_odd_members_of_the_archives_are_followed_or_fail(imagenet):
    """The class tars hold a link, a FIFO, an image appended again, and what a Mac leaves behind."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for name, data, kind, link in (
            ("n01440764_1.JPEG", b"old", tarfile.REGTYPE, ""),
            ("n01440764_2.JPEG", b"", tarfile.LNKTYPE, "n01440764_1.JPEG"),
            ("n01440764_3.JPEG", b"", tarfile.FIFOTYPE, ""),
            ("._n01440764_1.JPEG", b"junk", tarfile.REGTYPE, ""),
            ("n01440764_1.JPEG", b"new", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data)
            tar.addfile(info, io.BytesIO(data))
    other = write_tar(imagenet / "o", {"n02119789_1.JPEG": b"other"}).read_bytes()
    archive = imagenet / "ILSVRC2012_img_train.tar"
    write_tar(archive, {"n01440764.tar": b"replaced", "n02119789.tar": other, "._n02119789.tar": b"junk"})
    with tarfile.open(archive, "a") as tar:
        info = tarfile.TarInfo("n01440764.tar")
        info.size = len(inner.getvalue())
        tar.addfile(info, io.BytesIO(inner.getvalue()))
    source = open_source(str(archive), val_share=0)
    found = {row["source"].rpartition("/")[2]: row for row in source.splits["train"].to_pylist()}
    with pytest.raises(ImageError, match="expected a plain file, got a FIFO"):
        source.read(found.pop("n01440764_3.JPEG"))
    assert {name: source.read(row)[0] for name, row in found.items()} == {
        "n01440764_1.JPEG": b"new",
        "n01440764_2.JPEG": b"old",
        "n02119789_1.JPEG": b"other",
    }
    assert len(source.notes) == 2
    assert source.notes[0].startswith("2 hidden or system files and folders are skipped")
    assert source.notes[1].startswith("2 members were appended again")


@pytest.mark.parametrize("size", [b"-0000001000\0", b"777777777777"])
def test_a_class_tars_header_that_lies_is_an_error(size, imagenet):
    archive = imagenet / "ILSVRC2012_img_train.tar"
    data = bytearray(archive.read_bytes())
    data[512 + 124 : 512 + 136] = size  # of the first image of the first class
    data[512 + 148 : 512 + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[512:1024]))[0]
    archive.write_bytes(data)
    assert "ILSVRC2012_img_train.tar: n01440764.tar: not a readable tar" in refusal(archive)


def test_folders_beside_the_archives_are_said(imagenet):
    write_devkit(imagenet)
    (imagenet / "train").mkdir()
    assert open_source(str(imagenet)).notes == ["1 folders beside the archives are not read (first: train)"]


def test_a_devkit_of_other_numbers_is_one_line(imagenet):
    write_devkit(imagenet)
    devkit = imagenet / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(devkit) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    for name, data in (("validation_ground_truth.txt", b"1\n999\n"), ("meta.mat", b"no Matlab file")):
        changed = {n: data if n.endswith(name) else d for n, d in members.items()}
        devkit.write_bytes(gzip.compress(write_tar(imagenet / "d", changed).read_bytes()))
        _devkit_labels.cache_clear()
        text = refusal(imagenet)
        assert f"{devkit}: expected the synsets of ILSVRC2012" in text and "\n" not in text


# What was mined before must be mined alike: key, source, label, size, container and offset of every input, in order.

PINNED_TARS = [
    ("d%2E1/y", "./d.1/y.png", 1, 1, 0, 2560),
    ("a", "a.jpg", 2, 3, 1, 5632),
    ("x1", "x1.JPG", 0, 2, 0, 512),
    ("x2", "x2.jpg", 2, 3, 1, 1536),
]


def test_the_listing_of_ordinary_tars_is_pinned(tmp_path):
    write_tar(
        tmp_path / "train-0.tar",
        {"x1.JPG": b"x1", "x1.cls": b"0", "./d.1/y.png": b"y", "./d.1/y.json": b'{"label": 1}'},
    )
    write_tar(tmp_path / "train-1.tar", {"x2.cls": b"2\n", "x2.jpg": b"x-2", "x2.txt": b"words", "x2.seg.png": b"mask", "a.cls": b"2", "a.jpg": b"a-a"})  # fmt: skip
    source = open_source(str(tmp_path), val_share=0)
    assert source.classes == ["0", "1", "2"]
    assert rows(source) == PINNED_TARS
