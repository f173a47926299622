"""Sources: every form that --data accepts, its labels, its keys, and the bytes read back."""

import csv
import io
import json
import os
import re
import tarfile
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from scipy.io import savemat
from torchvision.datasets import ImageFolder

from conftest import mine
from miner.plan import make_plan, shard_rows
from miner.sources import open_source
from miner.sources.source import split_off_val
from shards.errors import TicketSetError
from shards.reader import TicketSet


def write_tree(root, *paths):
    """Files whose contents are their paths; listing never decodes. A path that ends in / is a folder."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(path)
    return root


def write_tar(path, members):
    """A tar of {name: contents}; `path` may be a memory:// URL."""
    with fsspec.open(str(path), "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first, count, **members):
    """Tar members of `count` WebDataset samples; {} in a member's text is the sample's number."""
    out = {}
    for i in range(first, first + count):
        for extension, text in (members or {"cls": "{}", "jpg": "picture {}"}).items():
            out[f"{i:04d}.{extension.replace('_', '.')}"] = text.replace("{}", str(i)).encode()
    return out


def labels(source, split="train"):
    """source path -> class name"""
    columns = (source.splits[split][c].to_pylist() for c in ("source", "label"))
    return {path: None if label is None else source.classes[label] for path, label in zip(*columns, strict=True)}


def keys(source, split="train"):
    return source.splits[split]["key"].to_pylist()


def read_all(source, split="train"):
    """source path -> bytes"""
    return {row["source"]: source.read(row)[0] for row in source.splits[split].to_pylist()}


def plan(source, shard_size=4):
    geometry = {"img_size": 64, "patch_size": 16, "views": 1, "scale": (0.08, 1), "ratio": (0.75, 1.33), "hflip": 0.5}
    storing = {"exif": "ignore", "store_side": None, "images": "copy", "shard_size": shard_size, "limit": None}
    return make_plan(source, {"method": "center"}, k=8, val_share=0, seed=0, batch_size=8, **geometry, **storing)


def refusal(*arguments, **options):
    with pytest.raises(TicketSetError) as error:
        open_source(*map(str, arguments), **options)
    return str(error.value)


# Folders.

TREE = ("ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg")


def split_tree(*splits):
    return [f"{split}/{path}" for split in splits for path in TREE]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "val"), ["train", "val"]),
        (("train", "validation"), ["train", "val"]),
        (("train", "test"), ["train", "val"]),
        (("train", "val", "test"), ["train", "val", "test"]),
        (("val",), ["val"]),
    ],
)
def test_folders_of_splits(folders, splits, tmp_path):
    source = open_source(str(write_tree(tmp_path, *split_tree(*folders))))
    assert sorted(source.splits) == sorted(splits)
    assert source.classes == ["ant", "bee"]
    for split, folder in zip(splits, folders, strict=True):
        assert labels(source, split) == {f"{folder}/{p}": p.partition("/")[0] for p in TREE}
        assert keys(source, split) == [f"{folder}/{p.removesuffix('.jpg')}" for p in TREE]
        assert read_all(source, split) == {f"{folder}/{p}": f"{folder}/{p}".encode() for p in TREE}
    assert source.notes == []


def test_classes_directly(tmp_path):
    source = open_source(str(write_tree(tmp_path, *TREE)), val_share=0)
    assert list(source.splits) == ["train"]
    assert labels(source) == {p: p.partition("/")[0] for p in TREE}


def test_classes_that_are_named_like_splits(tmp_path):
    source = open_source(str(write_tree(tmp_path, "test/1.jpg", "cat/1.jpg", "cat/2.jpg")), val_share=0)
    assert source.classes == ["cat", "test"]


def test_a_flat_folder_is_unlabelled(tmp_path):
    source = open_source(str(write_tree(tmp_path, "b.jpg", "a10.png", "a9.webp")), val_share=0)
    assert source.classes == []
    assert labels(source) == {"a9.webp": None, "a10.png": None, "b.jpg": None}
    assert keys(source) == ["a9", "a10", "b"], "natural order"
    assert read_all(source)["b.jpg"] == b"b.jpg"


def test_a_flat_test_folder_beside_train_is_no_val_split(tmp_path):
    source = open_source(str(write_tree(tmp_path, *split_tree("train"), "test/1.jpg")))
    assert labels(source, "test") == {"test/1.jpg": None}
    assert len(source.splits["train"]) + len(source.splits["val"]) == 4


def test_labels_are_torchvisions(tmp_path):
    names = ["ant", "Bee", "10", "9", "_x", "été"]
    root = write_tree(tmp_path, *(f"train/{n}/{i}.png" for n in names for i in (1, 2)))
    source, folder = open_source(str(root), val_share=0), ImageFolder(str(root / "train"))
    assert {name: i for i, name in enumerate(source.classes)} == folder.class_to_idx
    ours = {row["source"]: row["label"] for row in source.splits["train"].to_pylist()}
    assert ours == {os.path.relpath(path, root): label for path, label in folder.samples}
    assert source.classes != sorted(names, key=str.lower), "the control: a friendlier order is another one"


def test_hidden_folders_and_files_are_left_out(tmp_path):
    hidden = (".git/1.jpg", "train/.ipynb_checkpoints/1.jpg", "train/ant/.thumbs/1.jpg", "train/ant/._1.jpg")
    source = open_source(str(write_tree(tmp_path, *split_tree("train", "val"), *hidden)))
    assert source.classes == ["ant", "bee"]
    assert list(labels(source)) == [f"train/{p}" for p in TREE]


def test_other_endings_are_counted_in_a_note(tmp_path):
    others = ("train/ant/readme.txt", "train/bee/a.txt", "train/bee/b.HEIC", "train/bee/noending")
    source = open_source(str(write_tree(tmp_path, *split_tree("train", "val"), *others)))
    assert len(source.splits["train"]) == 4
    assert source.notes == ["train: 4 files are not images by their ending: .txt 2, .heic 1, (none) 1"]


@pytest.mark.parametrize("name", ["a.JPG", "a.jpeg", "a.tiff", "a.avif", "a.PNG", "a.bmp"])
def test_image_endings(name, tmp_path):
    assert len(open_source(str(write_tree(tmp_path, name)), val_share=0).splits["train"]) == 1


def test_images_beside_the_class_folders_are_noted(tmp_path):
    source = open_source(str(write_tree(tmp_path, *split_tree("train", "val"), "train/loose.jpg", "train/loose2.jpg")))
    assert len(source.splits["train"]) == 4
    assert source.notes == ["train: 2 images lie beside the class folders and are left out (first: loose.jpg)"]


def test_an_empty_class_keeps_its_label_and_is_noted(tmp_path):
    source = open_source(str(write_tree(tmp_path, *split_tree("train", "val"), "train/awl/")))
    assert source.classes == ["ant", "awl", "bee"]
    assert set(source.splits["train"]["label"].to_pylist()) == {0, 2}
    assert source.notes == ["1 of 3 classes hold no images (first: awl); they keep their label"]


def test_a_val_class_that_train_lacks_is_an_error(tmp_path):
    root = write_tree(tmp_path, *split_tree("train", "val"), "val/cat/1.jpg")
    for splits in ((), ("val",)):
        text = refusal(root, splits=splits)
        assert "split val: class 'cat' (val/cat/1.jpg) is not among train's 2" in text and str(root) in text


@pytest.mark.parametrize(
    "paths", [("train/", "val/"), ("ant/", "bee/"), ("a.txt", "ant/b.txt"), ("train/ant/1.jpg", "val/")]
)
def test_a_folder_without_images_is_an_error_that_names_it(paths, tmp_path):
    text = refusal(write_tree(tmp_path, *paths))
    assert "no images in" in text and str(tmp_path) in text and "\n" not in text


def test_an_empty_folder_is_an_error(tmp_path):
    assert "no images in" in refusal(tmp_path)


def test_nested_folders_belong_to_their_class(tmp_path):
    source = open_source(
        str(write_tree(tmp_path, "train/ant/may/1.jpg", "train/ant/june/1.jpg", "train/bee/1.jpg")), val_share=0
    )
    assert labels(source) == {"train/ant/june/1.jpg": "ant", "train/ant/may/1.jpg": "ant", "train/bee/1.jpg": "bee"}
    assert keys(source) == ["train/ant/june/1", "train/ant/may/1", "train/bee/1"]


def test_one_stem_with_two_endings_gives_two_keys_and_a_note(tmp_path):
    source = open_source(str(write_tree(tmp_path, "a/x.jpg", "a/x.png", "a/x-1.jpg")), val_share=0)
    by_path = dict(zip(labels(source), keys(source), strict=True))
    assert by_path == {"a/x.jpg": "a/x", "a/x.png": "a/x-2", "a/x-1.jpg": "a/x-1"}
    assert source.notes == ["1 inputs share a key with another and got -1, -2, ... (first: a/x.png)"]
    assert read_all(source)["a/x.png"] == b"a/x.png"


def test_odd_names_are_read_back(tmp_path):
    names = ["a b.jpg", "v1.0.jpg", "été.jpg", "100%.jpg", "a\nb.jpg"]
    source = open_source(str(write_tree(tmp_path, *names)), val_share=0)
    assert read_all(source) == {name: name.encode() for name in names}
    assert len(set(keys(source))) == 5


def test_a_name_that_is_no_utf8_is_read_back(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"latin")
    (tmp_path / "caf\\udce9.jpg").write_bytes(b"spelled out")
    source = open_source(str(tmp_path), val_share=0)
    rows = {row["key"]: source.read(row)[0] for row in source.splits["train"].to_pylist()}
    assert rows == {"caf%E9": b"latin", "caf%5Cudce9": b"spelled out"}


def test_a_dangling_link_is_listed_and_fails_when_read(tmp_path):
    write_tree(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    source = open_source(str(tmp_path), val_share=0)
    rows = {row["source"]: row for row in source.splits["train"].to_pylist()}
    assert rows["b.jpg"]["size"] == -1
    with pytest.raises(OSError, match="No such file"):
        source.read(rows["b.jpg"])


def test_links_to_folders_are_followed(tmp_path):
    write_tree(tmp_path / "elsewhere", "1.jpg")
    write_tree(tmp_path / "data", "ant/1.jpg")
    (tmp_path / "data" / "bee").symlink_to(tmp_path / "elsewhere")
    assert labels(open_source(str(tmp_path / "data"), val_share=0)) == {"ant/1.jpg": "ant", "bee/1.jpg": "bee"}


def test_sizes_are_listed(tmp_path):
    table = open_source(str(write_tree(tmp_path, "abc.jpg", "d.jpg")), val_share=0).splits["train"]
    assert table["size"].to_pylist() == [7, 5]


# --labels.


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_labels_from_a_csv(tmp_path):
    write_tree(tmp_path / "flat", "1.jpg", "2.jpg")
    table = write_csv(
        tmp_path / "l.csv", [("filename", "class"), ("1.jpg", "bee"), ("2.jpg", " ant "), ("3.jpg", "cat")]
    )
    source = open_source(str(tmp_path / "flat"), labels=table, val_share=0)
    assert labels(source) == {"1.jpg": "bee", "2.jpg": "ant"}


def test_labels_from_a_csv_for_flat_splits_are_trains(tmp_path):
    write_tree(tmp_path / "flat", "train/1.jpg", "train/2.jpg", "val/3.jpg")
    names = {"1.jpg": "bee", "2.jpg": "ant", "3.jpg": "bee"}
    source = open_source(str(tmp_path / "flat"), labels=write_csv(tmp_path / "l.csv", names.items()))
    assert source.classes == ["ant", "bee"]
    assert labels(source, "val") == {"val/3.jpg": "bee"}
    names["3.jpg"] = "cat"
    text = refusal(tmp_path / "flat", labels=write_csv(tmp_path / "l.csv", names.items()))
    assert "class 'cat' (val/3.jpg) is not among train's 2" in text


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("1.jpg", "bee")], "expected a class for every image, got none for 2.jpg"),
        ([("1.jpg", "a", "b")], "expected lines of filename,class, got '1.jpg,a,b'"),
    ],
)
def test_a_csv_that_does_not_fit(rows, expected, tmp_path):
    write_tree(tmp_path / "flat", "1.jpg", "2.jpg")
    text = refusal(tmp_path / "flat", labels=write_csv(tmp_path / "l.csv", rows))
    assert expected in text and "l.csv" in text


def test_a_csv_that_is_not_there(tmp_path):
    assert "--labels nowhere.csv: " in refusal(write_tree(tmp_path, "1.jpg"), labels="nowhere.csv")


# Splits.


@pytest.fixture
def unsplit(tmp_path):
    """40 ants, 20 bees, 3 cats, 1 dog."""
    counts = {"ant": 40, "bee": 20, "cat": 3, "dog": 1}
    return str(write_tree(tmp_path / "unsplit", *(f"{n}/{i}.jpg" for n, count in counts.items() for i in range(count))))


def test_val_share_takes_its_part_of_every_class(unsplit):
    source = open_source(unsplit)
    count = {n: list(labels(source, "val").values()).count(n) for n in source.classes}
    assert count == {"ant": 4, "bee": 2, "cat": 1, "dog": 0}, "a class gives at least one and keeps at least one"
    every = open_source(unsplit, val_share=0)
    assert sorted(keys(source) + keys(source, "val")) == sorted(keys(every)), "disjoint and complete"
    assert keys(source) == [k for k in keys(every) if k in keys(source)], "natural order stays"
    assert source.notes == [
        "no val split: 7 of 64 images became one (--val-share 0.1, by hash of the key, from every class)"
    ]


def test_val_share_zero_turns_it_off(unsplit):
    source = open_source(unsplit, val_share=0)
    assert list(source.splits) == ["train"] and source.notes == []


def test_val_share_depends_on_the_seed_and_on_nothing_else(unsplit, tmp_path):
    chosen = set(keys(open_source(unsplit), "val"))
    assert set(keys(open_source(unsplit), "val")) == chosen
    assert set(keys(open_source(unsplit, seed=1), "val")) != chosen
    whole = open_source(unsplit, val_share=0)
    order = np.random.default_rng(0).permutation(len(whole.splits["train"]))
    shuffled = replace(whole, splits={"train": whole.splits["train"].take(pa.array(order))})
    assert set(split_off_val(shuffled, 0.1, 0).splits["val"]["key"].to_pylist()) == chosen


def test_val_share_of_one_class_does_not_depend_on_another(unsplit, tmp_path):
    before = {k for k in keys(open_source(unsplit), "val") if k.startswith("ant")}
    write_tree(tmp_path / "unsplit", *(f"bee/more{i}.jpg" for i in range(30)))
    after = keys(open_source(unsplit), "val")
    assert {k for k in after if k.startswith("ant")} == before
    assert sum(k.startswith("bee") for k in after) == 5


def test_single_images_stay_in_train(tmp_path):
    source = open_source(str(write_tree(tmp_path, "ant/1.jpg", "bee/1.jpg")))
    assert list(source.splits) == ["train"] and len(source.splits["train"]) == 2
    assert source.notes == ["no val split: no class has an image to spare for one"]


def test_unlabelled_images_are_split_as_one_class(tmp_path):
    source = open_source(str(write_tree(tmp_path, *(f"{i}.jpg" for i in range(30)))))
    assert (len(source.splits["train"]), len(source.splits["val"])) == (27, 3)


def test_asking_for_one_split_changes_nothing_of_it(unsplit, tmp_path):
    """A split may be added later by the same command: it must be the one that both together give."""
    for data in (unsplit, str(write_tree(tmp_path / "split", *split_tree("train", "val", "test")))):
        both = open_source(data)
        for split in both.splits:
            alone = open_source(data, splits=(split,))
            assert list(alone.splits) == [split]
            assert alone.classes == both.classes
            assert alone.splits[split].equals(both.splits[split])


def test_a_train_split_asked_for_alone_gives_nothing_to_a_val_split_that_exists(tmp_path):
    source = open_source(str(write_tree(tmp_path, *split_tree("train", "val"))), splits=("train",))
    assert len(source.splits["train"]) == 4
    assert source.notes == []


def test_a_split_that_is_not_there(unsplit, tmp_path):
    assert "expected a split of ['train', 'val'], got --split test" in refusal(unsplit, splits=("test",))
    assert "expected a split of ['train'], got --split val" in refusal(unsplit, splits=("val",), val_share=0)
    data = write_tree(tmp_path / "split", *split_tree("train", "val"))
    assert "expected a split of ['train', 'val'], got --split test" in refusal(data, splits=("test",))


# Finding it.


def test_a_name_is_looked_up_under_datalth_data(tmp_path, monkeypatch):
    write_tree(tmp_path / "store", *(f"photos/{p}" for p in TREE))
    monkeypatch.setenv("DATALTH_DATA", str(tmp_path / "store"))
    assert len(open_source("photos", val_share=0).splits["train"]) == 4
    monkeypatch.delenv("DATALTH_DATA")
    assert "no such path" in refusal("photos")


def test_a_path_goes_before_datalth_data(tmp_path, monkeypatch):
    write_tree(tmp_path / "store", "photos/1.jpg", "photos/2.jpg")
    write_tree(tmp_path / "here", "photos/1.jpg")
    monkeypatch.setenv("DATALTH_DATA", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path / "here")
    assert len(open_source("photos", val_share=0).splits["train"]) == 1


def test_an_unknown_path_lists_the_forms_with_an_example_each():
    text = refusal("nowhere")
    assert text.startswith("--data nowhere: no such path; expected one of")
    examples = re.findall(r"--data (\S+)", text)[1:]
    assert examples == [
        "photos",
        "ILSVRC2012",
        "'tars/train-{0000..0127}.tar'",
        "shards",
        "timm:hfds/uoft-cs/cifar10",
        "imagenet",
    ]


def test_a_single_file_is_no_source(tmp_path):
    assert "a single file; expected one of" in refusal(write_tree(tmp_path, "a.jpg") / "a.jpg")


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
    named = open_source(str(tar), val_share=0, label_field="other")
    assert named.classes == ["n0", "n1", "n2"]
    assert labels(open_source(str(tar), val_share=0, label_field="none")) == dict.fromkeys(labels(named))


def test_cls_goes_before_json(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(0, 2, cls="1\n", json='{"label": 0}', png="p"))
    assert set(labels(open_source(str(tar), val_share=0)).values()) == {"1"}


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
    assert source.notes == [
        "1 images are left out: WebDataset's samples end at the first dot of a name, so that they share one with another"
        f" image; rename them without that dot (first: {tar}: img: img.2.jpg)"
    ]


def test_one_sample_name_in_two_tars_gives_two_keys(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"x.jpg": name.encode()})
    source = open_source(str(tmp_path / "{a,b}.tar"), val_share=0)
    assert keys(source) == ["x", "x-1"]
    assert [source.read(row)[0] for row in source.splits["train"].to_pylist()] == [b"a", b"b"]


def test_folders_inside_a_tar_are_part_of_the_key(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"./d.1/x.jpg": b"1", "d.2/x.jpg": b"2"})
    assert keys(open_source(str(tar), val_share=0)) == ["d%2E1/x", "d%2E2/x"]


def test_unlabelled_tars_take_labels_from_a_csv(tmp_path):
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
        assert "ILSVRC2012_devkit_t12.tar.gz" in text and "--labels FILE.csv (filename,class)" in text
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
    assert "expected a split of ['val'], got --split train" in text


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


# timm's readers.


class Reader:
    """What timm's map-style readers offer, over a list of (file name, bytes, target)."""

    def __init__(self, items, class_to_idx=None):
        self.items = items
        if class_to_idx:
            self.class_to_idx = class_to_idx

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return io.BytesIO(self.items[i][1]), self.items[i][2]

    def filename(self, index, basename=False, absolute=False):
        return self.items[index][0]


def timm_readers(monkeypatch, **readers):
    """Readers by split, as timm's factory would make them."""

    def create_reader(name, root=None, split="train", **options):
        if split not in readers:
            raise ValueError(f"Unknown split {split!r}.\nSee the docs.")
        return readers[split]

    monkeypatch.setattr("timm.data.readers.create_reader", create_reader)


ITEMS = [(f"cache/im.{i}.jpg", b"bytes %d" % i, i % 2) for i in range(12)]


def test_a_timm_reader_is_listed_and_read(monkeypatch):
    timm_readers(monkeypatch, train=Reader(ITEMS, {"dog": 1, "cat": 0}), validation=Reader(ITEMS[:3]))
    source = open_source("timm:hfds/owner/name")
    assert source.classes == ["cat", "dog"]
    assert keys(source)[1] == "train/00000001"
    assert labels(source)["train/00000001"] == "dog"
    assert [source.read(row)[0] for row in source.splits["train"].to_pylist()] == [item[1] for item in ITEMS]
    assert keys(source, "val")[0] == "val/00000000"
    assert len(source.splits["val"]) == 3


def test_a_timm_reader_without_class_and_file_names(monkeypatch):
    timm_readers(monkeypatch, train=Reader([(None, b"x", None), (None, b"y", -1)]))
    source = open_source("timm:hfds/owner/name", val_share=0)
    assert source.classes == [] and keys(source) == ["train/00000000", "train/00000001"]
    timm_readers(monkeypatch, train=Reader([(None, b"x", 0), (None, b"y", 2)]))
    assert open_source("timm:hfds/owner/name", val_share=0).classes == ["0", "1", "2"]


def test_a_timm_reader_without_val_gives_val_share(monkeypatch):
    timm_readers(monkeypatch, train=Reader(ITEMS))
    source = open_source("timm:hfds/owner/name", val_share=0.25)
    assert {split: len(table) for split, table in source.splits.items()} == {"train": 8, "val": 4}


def test_timms_train_split_alone_is_whole_where_there_is_a_val_split(monkeypatch):
    timm_readers(monkeypatch, train=Reader(ITEMS), val=Reader(ITEMS[:3]))
    assert len(open_source("timm:hfds/owner/name", splits=("train",)).splits["train"]) == 12
    assert len(open_source("timm:hfds/owner/name", splits=("val",)).splits["val"]) == 3


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("timm:wds/imagenet", "give the tars themselves: --data 'DIR/train-{0000..0127}.tar'"),
        ("timm:tfds/imagenet2012", "use timm:hfds/NAME"),
        ("timm:hfids/owner/name", "use timm:hfds/NAME"),
    ],
)
def test_iterable_readers_are_refused_with_advice(spec, advice):
    text = refusal(spec)
    assert advice in text and "can only be read in order" in text and "\n" not in text


def test_a_reader_without_getitem_is_refused(monkeypatch):
    class Stream:
        def __iter__(self):
            return iter(ITEMS)

    timm_readers(monkeypatch, train=Stream())
    assert "Stream can only be read in order; use a map-style reader" in refusal("timm:hfds/owner/name")


def test_what_timm_cannot_open_is_one_line(monkeypatch):
    timm_readers(monkeypatch)
    text = refusal("timm:hfds/owner/name")
    assert "timm cannot open split train: Unknown split 'train'." in text and "\n" not in text


def test_a_timm_prefix_that_is_none():
    text = refusal("timm:folder/photos")
    assert "timm:hfds/" in text and "\n" not in text


@pytest.mark.parametrize("target", ["cat", (0, 1), 1.5])
def test_timm_targets_that_are_no_class(target, monkeypatch):
    timm_readers(monkeypatch, train=Reader([("a.jpg", b"x", target)]))
    text = refusal("timm:hfds/owner/name")
    assert "timm:hfds/owner/name" in text and "expected a class number" in text and repr(target) in text


# Ticket sets.


def test_a_ticket_set_is_a_source(center_set, photos):
    source = open_source(str(center_set))
    opened = TicketSet.open(str(center_set))
    assert source.base.manifest["set_id"] == opened.manifest["set_id"]
    assert source.classes == ["ant", "bee", "cat"]
    for split in ("train", "val"):
        stored = {s.key: s for s in opened.stream(split)}
        assert keys(source, split) == list(stored)
        for row in source.splits[split].to_pylist():
            data, views = source.read(row)
            assert data == (photos / row["source"]).read_bytes()
            assert np.array_equal(views, stored[row["key"]].views)
            assert row["label"] == stored[row["key"]].label


def test_a_linked_set_leads_to_its_base(center_set, photos, tmp_path):
    mine("--data", center_set, "--images", "link", "--out", tmp_path / "link", "--method", "random")
    source = open_source(str(tmp_path / "link"))
    assert source.base.url == str(center_set)
    assert keys(source) == keys(open_source(str(center_set)))
    for row in source.splits["val"].to_pylist():
        assert source.read(row)[0] == (photos / row["source"]).read_bytes()
    assert shards_of(source) == shards_of(open_source(str(center_set)))


def test_a_linked_set_of_one_split_leads_to_that_split(center_set, tmp_path):
    mine("--data", center_set, "--images", "link", "--split", "val", "--out", tmp_path / "link", "--method", "random")
    source = open_source(str(tmp_path / "link"))
    assert list(source.splits) == ["val"]
    assert shards_of(source) == {k: v for k, v in shards_of(open_source(str(center_set))).items() if k[0] == "val"}


def test_a_base_that_moved_is_named(center_set, tmp_path):
    mine("--data", center_set, "--images", "link", "--out", tmp_path / "link", "--method", "random")
    manifest = tmp_path / "link" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["base"]["path"] = "../gone"
    manifest.write_text(json.dumps(content))
    assert "--base" in refusal(tmp_path / "link")
    assert keys(open_source(str(tmp_path / "link"), base=str(center_set))) == keys(open_source(str(center_set)))


def test_a_ticket_set_that_is_not_finished_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    assert "this ticket set is not finished" in refusal(tmp_path)


def shards_of(source):
    """(split, number) -> keys of the shard"""
    whole = plan(source)
    return {
        (split, number): source.splits[split].take(shard_rows(whole, source, split, number))["key"].to_pylist()
        for split, number in whole.shards()
    }


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("training", "validation"), ("TRAIN", "Test")])
def test_split_folders_in_other_spellings_are_no_classes(tmp_path, train, val):
    for folder in (train, val):
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "1.jpg").write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert source.classes == ["cat", "dog"] and list(source.splits) == ["train", "val"]
    assert keys(source, "val") == [f"{val}/cat/1", f"{val}/dog/1"]
