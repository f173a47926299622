"""Sources: every form that `data` accepts, its labels, its keys, and the bytes read back."""

import errno
import io
import itertools
import json
import os
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from torchvision.datasets import ImageFolder

from conftest import mine
from inputs import keys, labels, open_source, plan, read_all, refusal, rows, write_csv, write_tree
from miner.plan import shard_rows
from miner.sources.source import split_off_val
from shards.errors import ImageError
from shards.reader import TicketSet

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


def test_a_flat_folder_is_unlabeled(tmp_path):
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


# `labels`.


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
    assert "`labels` nowhere.csv: " in refusal(write_tree(tmp_path, "1.jpg"), labels="nowhere.csv")


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
        "no val split: 7 of 64 images became one (`val_share` 0.1, by hash of the key, from every class)"
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


def test_unlabeled_images_are_split_as_one_class(tmp_path):
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
    assert "expected a split of ['train', 'val'], got `splits` test" in refusal(unsplit, splits=("test",))
    assert "expected a split of ['train'], got `splits` val" in refusal(unsplit, splits=("val",), val_share=0)
    data = write_tree(tmp_path / "split", *split_tree("train", "val"))
    assert "expected a split of ['train', 'val'], got `splits` test" in refusal(data, splits=("test",))


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
    assert text.startswith("`data` nowhere: no such path; expected one of")
    examples = re.findall(r"`data` (\S+)", text)[1:]
    assert examples == [
        "photos",
        "ILSVRC2012",
        "'tars/train-{0000..0127}.tar'",
        "shards",
        "timm:hfds/uoft-cs/cifar10",
        "imagenet",
        "s3://bucket/photos",
    ]


def test_a_single_file_is_no_source(tmp_path):
    assert "a single file; expected one of" in refusal(write_tree(tmp_path, "a.jpg") / "a.jpg")


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
    assert list(read_all(source).values()) == [item[1] for item in ITEMS]
    assert len(read_all(source, "val")) == 3
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
        ("timm:wds/imagenet", "give the tars themselves: `data` 'DIR/train-{0000..0127}.tar'"),
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


def test_class_names_of_a_timm_reader_are_those_of_its_numbers(monkeypatch):
    """Numbers that are not 0, 1, 2, ... are their own names: the third of four names need not be class 2."""
    timm_readers(monkeypatch, train=Reader(ITEMS, {"a": 0, "b": 1, "c": 5, "d": 7}))
    assert open_source("timm:hfds/owner/name").classes == ["0", "1"]
    timm_readers(monkeypatch, train=Reader(ITEMS, {"a": "x", "b": None}))
    assert open_source("timm:hfds/owner/name").classes == ["0", "1"]


class Broken(Reader):
    """Raises what a backend may raise, in two lines."""

    def __init__(self, where):
        super().__init__(ITEMS)
        self.where = where

    def __len__(self):
        if self.where == "length":
            raise RuntimeError("no such table\nat line 3")
        return len(self.items)

    def iter_targets(self):
        if self.where == "targets":
            raise KeyError("label")
        if self.where == "endless":
            return itertools.cycle([0])
        return iter([0] * (11 if self.where == "short" else 12))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("length", "timm cannot list split train: RuntimeError: no such table"),
        ("targets", "timm cannot list split train: KeyError: 'label'"),
        ("short", "split train: expected a class number for each of 12, got 11"),
        ("endless", "split train: expected a class number for each of 12, got 13"),
    ],
)
def test_what_a_timm_reader_raises_while_listed_is_one_line(where, expected, monkeypatch):
    timm_readers(monkeypatch, train=Broken(where))
    text = refusal("timm:hfds/owner/name")
    assert expected in text and "\n" not in text


def test_what_a_timm_reader_raises_while_read_is_the_images_or_the_machines(monkeypatch):
    reader = Reader(ITEMS)
    timm_readers(monkeypatch, train=reader)
    source = open_source("timm:hfds/owner/name", val_share=0)
    row = source.splits["train"].to_pylist()[0]
    reader.items = [(None, "text", 0)]  # no bytes
    with pytest.raises(ImageError, match="^cannot be read: TypeError: "):
        source.read(row)
    monkeypatch.setattr(Reader, "__getitem__", lambda self, i: os.stat("/nowhere"))
    with pytest.raises(OSError) as error:
        source.read(row)
    assert error.value.errno == errno.ENOENT, "with its number, so that EMFILE is told from a bad image"


# Ticket sets.


def test_a_ticket_set_is_a_source(center_set, photos):
    source = open_source(str(center_set))
    opened = TicketSet.open(str(center_set))
    assert source.base.manifest.set_id == opened.manifest.set_id
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
    assert "`base`" in refusal(tmp_path / "link")
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


# What was mined before must be mined alike: key, source, label, size, container and offset of every input, in order.

PINNED_FOLDER = [
    ("train/9/a%20b", "train/9/a b.jpg", 1, 15, 0, 0),
    ("train/9/x2", "train/9/x2.JPEG", 1, 15, 0, 0),
    ("train/9/x10", "train/9/x10.jpg", 1, 15, 0, 0),
    ("train/9/x10-1", "train/9/x10.png", 1, 15, 0, 0),
    ("train/10/b", "train/10/b.png", 0, 14, 0, 0),
    ("train/Bee/deep/er/1%2E0", "train/Bee/deep/er/1.0.webp", 2, 26, 0, 0),
    ("train/%C3%A9t%C3%A9/1", "train/été/1.gif", 3, 17, 0, 0),
    ("train/%C3%A9t%C3%A9/link", "train/été/link.jpg", 3, 15, 0, 0),
]


def test_the_listing_of_an_ordinary_folder_is_pinned(tmp_path):
    root = write_tree(tmp_path, *(row[1] for row in PINNED_FOLDER if "link" not in row[1]), "val/Bee/1.jpg")
    (root / "train/été/link.jpg").symlink_to(root / "train/9/x2.JPEG")
    source = open_source(str(root))
    assert source.classes == ["10", "9", "Bee", "été"]
    assert rows(source) == PINNED_FOLDER
    assert rows(source, "val") == [("val/Bee/1", "val/Bee/1.jpg", 2, 13, 0, 0)]
