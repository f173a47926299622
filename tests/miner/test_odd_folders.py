"""Photo folders that are not plain ones: no image vanishes, none is listed twice, nothing is waited for."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import mine, write_image
from inputs import keys, labels, open_source, plan, read_all, refusal, rows, write_csv, write_tar, write_tree
from miner.plan import base_link, write_plan
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.store import open_store

TREE = ("train/ant/1.jpg", "train/ant/2.jpg", "train/bee/1.jpg", "val/ant/1.jpg", "val/bee/1.jpg")
UP = "links to folders are not followed: they lead back to a folder that they are in (first: "


def listed(path):
    return open_source(str(path), val_share=0)


# Links.


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/", "../ant", "up"])
def test_a_link_to_a_folder_that_it_is_in_is_not_followed(target, tmp_path):
    root = write_tree(tmp_path / "d", *TREE)
    link = root / "train/ant/up"
    link.symlink_to(target)
    if target == "up":  # it leads nowhere at all
        assert "train/ant/up: a link that leads nowhere" in refusal(root)
        return
    source = listed(root)
    assert keys(source) == ["train/ant/1", "train/ant/2", "train/bee/1"]
    assert source.notes == [f"1 {UP}train/ant/up)"]


def test_a_class_folder_that_is_a_link_to_all_of_them_holds_nothing(tmp_path):
    root = write_tree(tmp_path, *TREE)
    (root / "train/all").symlink_to(".")
    source = listed(root)
    assert source.classes == ["all", "ant", "bee"] and len(source.splits["train"]) == 3
    assert f"1 {UP}train/all)" in source.notes


def test_a_link_to_another_class_and_one_to_elsewhere_are_followed(tmp_path):
    root = write_tree(tmp_path / "d", *TREE)
    write_tree(tmp_path / "else", "deep/3.jpg")
    (root / "train/bee/other").symlink_to("../ant")
    (root / "train/cat").symlink_to(tmp_path / "else")
    assert labels(listed(root)) == {
        "train/ant/1.jpg": "ant", "train/ant/2.jpg": "ant", "train/bee/1.jpg": "bee", "train/bee/other/1.jpg": "bee",
        "train/bee/other/2.jpg": "bee", "train/cat/deep/3.jpg": "cat",
    }  # fmt: skip


def test_a_folder_reached_twice_in_a_class_is_listed_under_its_own_name(tmp_path):
    root = write_tree(tmp_path / "d", "train/ant/z/1.jpg", "train/bee/1.jpg")
    (root / "train/ant/a").symlink_to("z")
    source = listed(root)
    assert keys(source) == ["train/ant/z/1", "train/bee/1"]
    assert source.notes == [
        "1 folders behind links are not read: their class has them under another name (first: train/ant/a)"
    ]


def test_links_between_folders_never_multiply(tmp_path):
    """20 folders, each with links to all of them: more than 10^24 paths."""
    elsewhere = write_tree(tmp_path / "else", *(f"f{i}/{i}.jpg" for i in range(20)))
    for i in range(20):
        for j in range(20):
            (elsewhere / f"f{i}/to{j}").symlink_to(elsewhere / f"f{j}")
    root = write_tree(tmp_path / "d", "train/ant/1.jpg", "train/bee/1.jpg")
    (root / "train/ant/in").symlink_to(elsewhere / "f0")
    source = listed(root)
    assert len(source.splits["train"]) == 22
    assert sorted(read_all(source).values()) == sorted(
        [b"train/ant/1.jpg", b"train/bee/1.jpg", *(f"f{i}/{i}.jpg".encode() for i in range(20))]
    )


@pytest.mark.parametrize("link", ["train", "val", "train/cat", "train/ant/more"])
def test_a_link_to_a_folder_that_is_gone_is_an_error(link, tmp_path):
    root = write_tree(tmp_path, "train/ant/1.jpg", "train/bee/1.jpg")
    if link == "train":
        (root / "train").rename(root / "other")
    (root / link).symlink_to("/mnt/unplugged")
    assert f"{root / link}: a link that leads nowhere, maybe to a folder" in refusal(root)


# What cannot be listed or read.


@pytest.mark.parametrize("folder", ["", "train", "train/ant", "train/ant/more"])
def test_a_folder_that_cannot_be_listed_is_an_error(folder, tmp_path, monkeypatch):
    root = write_tree(tmp_path, *TREE, "train/ant/more/3.jpg")
    scandir, closed = os.scandir, os.fsencode(os.path.join(root, folder))

    def guarded(path):  # tests may run as root, whom no folder is closed to
        if os.path.normpath(os.fsencode(path)) == os.path.normpath(closed):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    text = refusal(root)
    assert "cannot be listed: Permission denied" in text and os.path.join(root, folder).rstrip("/") in text
    assert "\n" not in text


def test_what_is_no_plain_file_is_a_failed_row_and_not_waited_for(tmp_path):
    for i, name in enumerate(("ant", "bee")):
        write_image(tmp_path / "d" / name / "1.jpg", i)
    os.mkfifo(tmp_path / "d/ant/pipe.jpg")
    (tmp_path / "d/bee/link.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path / "d/ant")  # the name of a socket is short
        server.bind("sock.gif")
        os.chdir(here)
    mine(
        "--data", tmp_path / "d", "--out", tmp_path / "set", "--method", "center", "--val-share", 0, "--max-failures", 1
    )
    found = TicketSet.open(str(tmp_path / "set")).table("train").to_pylist()
    why = "cannot be read: expected a plain file, got a FIFO, a socket, a device or a folder"
    assert {row["source"]: row["error"] for row in found} == {
        "ant/1.jpg": None, "bee/1.jpg": None, "ant/pipe.jpg": why, "ant/sock.gif": why, "bee/link.png": why,
    }  # fmt: skip


def test_a_file_that_is_no_images_size_is_not_read(tmp_path):
    (tmp_path / "big.jpg").touch()
    os.truncate(tmp_path / "big.jpg", 1 << 40)
    source = listed(tmp_path)
    with pytest.raises(ValueError, match="expected an image file of at most 1073741824 bytes, got 1099511627776"):
        source.read(source.splits["train"].to_pylist()[0])


# Which folder is which split.


@pytest.mark.parametrize(
    "pair", [("Train", "train"), ("train", "training"), ("val", "validation"), ("VALID", "val"), ("test", "Test")]
)
def test_two_folders_for_one_split_are_an_error(pair, tmp_path):
    root = write_tree(tmp_path, *(f"{folder}/ant/1.jpg" for folder in {"train", *pair}))
    text = refusal(root)
    assert "both stand for split" in text and all(f"{folder}/" in text for folder in pair)


@pytest.mark.parametrize(
    ("paths", "right"),
    [
        (["photos/train/ant/1.jpg", "photos/val/ant/1.jpg"], "photos"),
        (["photos/train/ant/1.jpg", "photos/TEST/ant/1.jpg", "@eaDir/x.jpg", ".cache/x.jpg"], "photos"),
        (["photos/train/ant/1.jpg"], "photos"),
        (["train/train/ant/1.jpg", "train/val/ant/1.jpg"], "train"),
        (["bottle/train/1.jpg", "bottle/test/1.jpg", "cable/train/1.jpg", "cable/test/1.jpg"], "bottle"),
    ],
)
def test_data_one_level_too_high_is_refused_with_the_right_one(paths, right, tmp_path):
    root = write_tree(tmp_path, *paths)
    text = refusal(root)
    assert f"give `data` {root / right}" in text and "\n" not in text
    if right != "bottle":
        assert listed(root / right).classes == ["ant"], "and that works"


def test_one_class_of_several_folders_is_noted(tmp_path):
    source = listed(write_tree(tmp_path, "photos/ant/1.jpg", "photos/bee/1.jpg"))
    assert source.classes == ["photos"]
    assert source.notes == [
        "all images are of one class, photos; if its folders are the classes, they are what `data` expects"
    ]


def test_folders_beside_the_splits_are_said(tmp_path):
    source = listed(write_tree(tmp_path, *TREE, "more/ant/1.jpg", "extra/1.jpg"))
    assert source.notes == ["2 folders beside train/ are not read (first: extra)"]


def test_a_class_called_train_is_not_taken_for_the_split(tmp_path):
    root = write_tree(tmp_path, "bus/1.jpg", "car/1.jpg", "train/1.jpg")
    text = refusal(root)
    assert "train/ has no class folders and stands beside bus/: a split or a class?" in text


def test_tars_beside_folders_are_said(tmp_path):
    root = write_tree(tmp_path, *TREE)
    write_tar(root / "backup.tar", {"x.jpg": b"x"})
    (note,) = listed(root).notes
    assert note.startswith("1 tars beside the folders are not read") and "backup.tar" in note


def test_hidden_and_system_things_are_counted_once(tmp_path):
    junk = (".git/1.jpg", "train/@eaDir/1.jpg", "train/ant/__MACOSX/1.jpg", "train/ant/._1.jpg", "lost+found/x.jpg",
            "train/bee/Thumbs.db", "train/bee/.DS_Store")  # fmt: skip
    source = listed(write_tree(tmp_path, *TREE, *junk))
    assert source.classes == ["ant", "bee"] and len(source.splits["train"]) == 3
    assert source.notes == ["7 hidden or system files and folders are skipped (first: .git)"]


# Names beyond UTF-8.


def test_class_names_are_escaped_as_sources_are(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "tea", "two\nlines", "nel\x85", "sep\u2028", "été"]
    root = write_tree(tmp_path, *(f"train/{name}/1.jpg" for name in names))
    source = listed(root)
    assert source.classes == ["caf\\udce9", "nel\\x85", "sep\\u2028", "tea", "two\\nlines", "été"], "raw names' order"
    assert len("".join(f"{name}\n" for name in source.classes).splitlines()) == 6
    assert sorted(read_all(source).values()) == sorted(
        f"train/{n}/1.jpg".encode("utf-8", "surrogateescape") for n in names
    )


def test_two_classes_that_would_be_spelled_alike_are_an_error(tmp_path):
    root = write_tree(tmp_path, "caf\\udce9/1.jpg")
    (root / os.fsdecode(b"caf\xe9")).mkdir()
    (root / os.fsdecode(b"caf\xe9/1.jpg")).write_bytes(b"x")
    text = refusal(root)
    assert "would both be spelled caf\\udce9; rename one" in text
    text.encode()


def test_a_class_name_of_spaces_is_an_error(tmp_path):
    assert "expected a name for every class, got '  '" in refusal(write_tree(tmp_path, "  /1.jpg", "a/1.jpg"))


def test_a_lone_surrogate_in_a_json_label_is_spelled(tmp_path):
    members = {"a.json": b'{"label": "\\ud800x"}', "a.jpg": b"a", "b.json": b'{"label": "y"}', "b.jpg": b"b"}
    assert labels(listed(write_tar(tmp_path / "a.tar", members))) == {"a.jpg": "\\ud800x", "b.jpg": "y"}


def test_a_set_of_such_names_is_mined_and_read(tmp_path):
    for i, name in enumerate((os.fsdecode(b"caf\xe9"), "two\nlines")):
        for j in range(2):
            write_image(tmp_path / "d" / name / f"{j}.jpg", 2 * i + j)
    mine("--data", tmp_path / "d", "--out", tmp_path / "set", "--method", "center", "--val-share", 0)
    opened = TicketSet.open(str(tmp_path / "set"))
    assert opened.classes == ["caf\\udce9", "two\\nlines"]
    assert {row["key"]: row["label"] for row in opened.table("train").to_pylist()} == {
        "caf%E9/0": 0, "caf%E9/1": 0, "two%0Alines/0": 1, "two%0Alines/1": 1,
    }  # fmt: skip


def test_a_base_that_json_cannot_name_is_refused_before_mining(center_set, tmp_path):
    base = tmp_path / os.fsdecode(b"in\xe9") / "base"
    shutil.copytree(center_set, base)
    source = open_source(str(base))
    copied = plan(source)
    linked = replace(copied, common=replace(copied.common, images="link"))
    with pytest.raises(TicketSetError, match="expected a base whose path is UTF-8, got in.+udce9/base"):
        write_plan(open_store(tmp_path), linked, source, "cpu")
    assert not (tmp_path / "plan.json").exists()
    beside = base.parent / "link"  # whose path to the base has no such byte
    assert base_link(linked, source, str(beside)).path == "../base"


def test_a_list_of_the_locale_is_that_of_utf8(tmp_path):
    """In plain ASCII, as under LC_ALL=C without Python's UTF-8 mode, names are the same as here."""
    root = write_tree(tmp_path, "train/été/1.jpg", "train/zoo/é 2.jpg", "train/ﬁ/1.jpg")
    code = (
        "import sys; from miner.sources import open_source; from miner.settings import Inputs;"
        "s = open_source(Inputs(sys.argv[1], val_share=0));"
        "t = s.splits['train'].to_pylist(); d = [s.read(r)[0] for r in t];"
        "print(ascii((sys.getfilesystemencoding(), s.classes, [tuple(r.values()) for r in t], d)))"
    )
    place = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, root], env=place, capture_output=True, text=True, check=True)
    source = listed(root)
    data = [source.read(row)[0] for row in source.splits["train"].to_pylist()]
    assert done.stdout.strip() == ascii(("ascii", source.classes, rows(source), data))


# `labels`.


@pytest.mark.parametrize("head", ["filename,class", "FileName , CLASS", "filename,label"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_csv_from_excel(mark, head, tmp_path):
    write_tree(tmp_path / "flat", "1.jpg", "é.jpg")
    (tmp_path / "l.csv").write_bytes(mark + f"{head}\r\n1.jpg, bee \r\n\r\né.jpg,ant\r\n1.jpg,bee\r\n".encode())
    source = open_source(str(tmp_path / "flat"), labels=str(tmp_path / "l.csv"), val_share=0)
    assert labels(source) == {"1.jpg": "bee", "é.jpg": "ant"}


def test_a_byte_order_mark_without_a_header(tmp_path):
    write_tree(tmp_path / "flat", "1.jpg")
    (tmp_path / "l.csv").write_bytes(b"\xef\xbb\xbf1.jpg,bee\n")
    assert labels(open_source(str(tmp_path / "flat"), labels=str(tmp_path / "l.csv"), val_share=0)) == {"1.jpg": "bee"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            [("1.jpg", "a"), ("2.jpg", "b"), ("1.jpg", "b")],
            "l.csv, line 3: 1.jpg is of class 'b' here, of 'a' further up",
        ),
        ([("1.jpg", "a"), ("2.jpg", " ")], "l.csv, line 2: expected lines of filename,class, got '2.jpg,'"),
        ([("filename", "class"), ("", "a")], "l.csv, line 2: expected lines of filename,class, got ',a'"),
        ([("1.jpg", "a"), ("", "")], "l.csv, line 2: expected lines of filename,class, got ','"),
        ([("1.jpg;a",)], "l.csv, line 1: expected lines of filename,class, got '1.jpg;a'"),
    ],
)
def test_a_csv_with_a_wrong_line_names_it(lines, expected, tmp_path):
    write_tree(tmp_path / "flat", "1.jpg", "2.jpg")
    assert expected in refusal(tmp_path / "flat", labels=write_csv(tmp_path / "l.csv", lines))


def test_a_csv_that_is_no_utf8_is_one_line(tmp_path):
    write_tree(tmp_path / "flat", "1.jpg")
    (tmp_path / "l.csv").write_bytes("1.jpg,bee\n".encode("utf-16"))
    text = refusal(tmp_path / "flat", labels=str(tmp_path / "l.csv"))
    assert "l.csv" in text and "\n" not in text
