"""Bad input: every wrong file, folder, flag and weights file has its clear outcome, and none a traceback."""

import argparse
import errno
import gc
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zipfile
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import miner.done
import miner.reading
import miner.run
from conftest import SELECTOR, contents, mine
from miner.lock import FolderLock
from miner.writer import Writer
from shards.errors import TicketSetError
from shards.format import MANIFEST
from shards.reader import TicketSet
from shards.store import open_store
from shards.writer import ShardWriter

pytestmark = pytest.mark.slow  # mines a set for every fault

CENTER = ("--method", "center", "--views", 2, "--shard-size", 5)
BAD = {
    "train/ant/text.jpg": "not an image: cannot identify image file",
    "train/bee/bee_0.jpg": "cannot be decoded: image file is truncated",
    "train/bee/empty.png": "not an image: cannot identify image file",
    "train/bee/huge.png": "too large: 10000x10000 is more than 89478485 pixels",
    "train/cat/gone.jpg": "cannot be read: No such file or directory",
}


@pytest.fixture
def copy(photos, tmp_path):
    """A copy of `photos` that a test may spoil."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture
def bad(copy):
    """19 photos to train on that are fine, one that is cut, and four files that are none."""
    (copy / "train/ant/text.jpg").write_text("this is text\n")
    (copy / "train/bee/empty.png").touch()
    (copy / "train/bee/huge.png").write_bytes(huge_png())
    (copy / "train/cat/gone.jpg").symlink_to("nowhere.jpg")
    cut(copy / "train/bee/bee_0.jpg")
    return copy


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def huge_png():
    """A header that promises 100 megapixels."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def failure(*arguments, code=1):
    """The one line on which datalth-mine ended."""
    result = mine(*arguments, code=code)
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ") and "Traceback" not in result.output
    assert code == 2 or sum(line.startswith("Error") for line in lines) == 1
    return lines[-1]


def rows(out, split="train"):
    return {row["source"]: row for row in TicketSet.open(str(out)).table(split).to_pylist()}


def manifest(out):
    return json.loads((out / MANIFEST).read_bytes())


def shards_done(out):
    return sorted(p.stem for p in out.glob("*-[0-9]*.json"))


# Files that are no images.


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_become_failed_rows_and_are_counted(bad, tmp_path):
    out = tmp_path / "out"
    result = mine("--data", bad, "--out", out, *CENTER, "--max-failures", 1)
    failed = {source: row for source, row in rows(out).items() if row["status"] != "ok"}
    assert failed.keys() == BAD.keys()
    for source, row in failed.items():
        assert row["status"] == "failed" and row["error"].startswith(BAD[source])
        assert row["label"] == ["ant", "bee", "cat"].index(source.split("/")[1])
        assert row["offset"] is row["bytes"] is row["width"] is row["ticket"] is None
    assert len(rows(out)) == 25
    totals, train = manifest(out)["totals"], manifest(out)["splits"]["train"]
    assert (train["samples"], train["failed"], totals["samples"], totals["failed"]) == (20, 5, 26, 5)
    assert len(list(TicketSet.open(str(out)).stream("train"))) == 20
    assert "5 images failed (first: train/" in result.output and "--retry-failed" in result.output
    assert any(line.split()[:3] == ["train", "20", "5"] for line in result.output.splitlines())


def test_good_files_are_mined_the_same_beside_bad_ones(copy, photos, tmp_path, center_set):
    """And the control: a set without bad files counts none."""
    cut(copy / "train/bee/bee_0.jpg")
    mine("--data", copy, "--out", tmp_path / "out", *CENTER, "--views", 3, "--max-failures", 1)
    spoiled, clean = (
        {s.key: s for s in TicketSet.open(str(p)).stream("train")} for p in (tmp_path / "out", center_set)
    )
    assert clean.keys() - spoiled.keys() == {"train/bee/bee_0"}
    for key, sample in spoiled.items():
        assert sample.image == clean[key].image and np.array_equal(sample.views, clean[key].views)
    assert manifest(center_set)["totals"]["failed"] == 0


def test_too_many_failures_stop_the_run_in_one_line(bad, tmp_path):
    out = tmp_path / "out"
    line = failure("--data", bad, "--out", out, *CENTER, "--max-failures", 0)
    assert line.startswith("Error: 1 images failed, --max-failures allows 0 of this run (train/")
    assert "raise --max-failures and run the same command again" in line
    assert not (out / MANIFEST).exists() and not list(out.rglob("*.tmp"))


def test_a_share_of_failures_is_allowed(copy, tmp_path):
    cut(copy / "train/bee/bee_0.jpg")  # one of 27
    assert "1 images failed" in failure("--data", copy, "--out", tmp_path / "less", *CENTER, "--max-failures", 0.036)
    mine("--data", copy, "--out", tmp_path / "more", *CENTER, "--max-failures", 0.038)
    assert "1 images failed" in failure("--data", copy, "--out", tmp_path / "default", *CENTER)


def spoil_last_shard(copy, tmp_path):
    """Cut an image of the last of five train shards."""
    mine("--data", copy, "--out", tmp_path / "clean", *CENTER)
    source = pq.read_table(tmp_path / "clean/index/train-000004.parquet")["source"][0].as_py()
    cut(copy / source)
    return source


def test_shards_before_too_many_failures_are_kept_and_a_higher_limit_goes_on(copy, tmp_path, monkeypatch):
    source = spoil_last_shard(copy, tmp_path)
    out = tmp_path / "out"
    gate = threading.Event()  # nothing is written before the run has stopped: the worst case
    add, abort = ShardWriter.add, Writer.close
    monkeypatch.setattr(ShardWriter, "add", lambda self, *a: gate.wait(30) and add(self, *a))
    monkeypatch.setattr(Writer, "close", lambda self: (gate.set(), abort(self)))
    line = failure("--data", copy, "--out", out, *CENTER, "--max-failures", 0)
    assert source in line
    assert {f"train-{i:06d}" for i in range(4)} <= set(shards_done(out))
    monkeypatch.undo()
    result = mine("--data", copy, "--out", out, *CENTER, "--max-failures", 1)
    assert "are done" in result.output
    mine("--data", copy, "--out", tmp_path / "at-once", *CENTER, "--max-failures", 1)
    assert contents(out) == contents(tmp_path / "at-once")


def test_failures_of_shards_that_are_done_count_too(copy, tmp_path):
    """Stopping and going on must not let more through than one run would."""
    out = tmp_path / "out"
    for name in ("ant/ant_0.jpg", "bee/bee_0.jpg"):
        cut(copy / "train" / name)
    mine("--data", copy, "--out", out, *CENTER, "--max-failures", 1)
    (out / MANIFEST).unlink()
    last = [n for n in shards_done(out) if json.loads((out / f"{n}.json").read_bytes())["failed"]][-1]
    (out / f"{last}.json").unlink()
    assert "images failed" in failure("--data", copy, "--out", out, *CENTER, "--max-failures", 0.04)
    mine("--data", copy, "--out", out, *CENTER, "--max-failures", 0.08)


def test_odd_images_are_mined_and_kept(tmp_path, weights):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    images = {
        "cmyk.jpg": rgb.convert("CMYK"),
        "palette.png": rgb.convert("P"),
        "grey.jpg": rgb.convert("L"),
        "alpha.png": rgb.convert("RGBA"),
        "deep.png": Image.fromarray(rng.integers(0, 65536, (40, 50), np.uint16)),
        "one.png": rgb.crop((0, 0, 1, 1)),
        "line.png": rgb.crop((0, 0, 50, 1)),
        "moving.gif": rgb.convert("P"),
        "bare.bmp": rgb,
    }
    (tmp_path / "odd").mkdir()
    for name, image in images.items():
        image.save(tmp_path / "odd" / name)
    (tmp_path / "odd/names").mkdir()
    rgb.save(tmp_path / "odd/names/v1.0 été.jpg")
    shutil.move(tmp_path / "odd/names/v1.0 été.jpg", tmp_path / "odd/v1.0 été.jpg")
    (tmp_path / "odd/names").rmdir()
    out, options = tmp_path / "out", ("--selector", SELECTOR, "--weights", weights, "--views", 3, "--val-share", 0)
    mine("--data", tmp_path / "odd", "--out", out, *options)
    assert {source: row["status"] for source, row in rows(out).items()} == dict.fromkeys(
        [*images, "v1.0 été.jpg"], "ok"
    )
    assert {source for source, row in rows(out).items() if row["transcoded"]} == {"moving.gif", "bare.bmp"}
    for sample in TicketSet.open(str(out)).stream("train"):
        assert (np.sort(sample.rankings, axis=1) == np.arange(16)).all()


# Flags.


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--method", "center", "--tokens", 17), 1, "--tokens: expected 1 to 16, the patches of a view, got 17"),
        (("--method", "center", "--keep-rate", 0), 1, "--keep-rate: expected a keep rate in (0, 1], got 0.0"),
        (("--method", "center", "--keep-rate", 1.5), 1, "--keep-rate: expected a keep rate in (0, 1], got 1.5"),
        (("--method", "center", "--tokens", 4, "--keep-rate", 0.5), 2, "--tokens and --keep-rate both say"),
        (("--method", "center", "--patch-size", 24), 2, "--img-size 64 is no multiple of --patch-size 24"),
        (("--method", "center", "--scale", 0.5, 0.1), 2, "--scale: expected 0 < MIN <= MAX <= 1, got 0.5 0.1"),
        (("--method", "center", "--ratio", 0, 1), 2, "--ratio: expected 0 < MIN <= MAX, got 0 1"),
        (("--method", "center", "--images", "link"), 1, "is no ticket set; there is nothing to link to"),
        (
            ("--method", "centre"),
            1,
            "--method centre: expected one of evit, cls-attention, rollout, pool-attention, entropy, random, masks, center",
        ),
        (("--method", "entropy"), 1, "--selector: --method entropy uses no model; leave it out"),
        (("--method", "center", "--weights", "w.pth"), 1, "--weights: --method center uses no model; leave it out"),
        (("--method", ":f"), 1, "--method :f: "),
        (("--method", "math:sqrt"), 1, "--method: expected a function in a Python file"),
        (("--method", "nowhere:f"), 1, "--method nowhere:f: No module named 'nowhere'"),
        (("--drop-blocks", "3,x"), 2, "'--drop-blocks': expected block numbers like 3,6,9, got '3,x'"),
        (("--drop-blocks", "1,6"), 1, "expected ascending block numbers from 0 to 5"),
        (("--drop-blocks", "3,1"), 1, "expected ascending block numbers from 0 to 5"),
        (("--drop-blocks", "2,2"), 1, "expected ascending block numbers from 0 to 5"),
        (("--drop-blocks", "-1"), 1, "expected ascending block numbers from 0 to 5"),
        (("--method", "rollout", "--drop-blocks", "1,2"), 1, "--method rollout: expected one block in --drop-blocks"),
        (("--method", "center", "--store-side", 65501), 2, "'--store-side': 65501 is not in the range 1<=x<=65500"),
        (("--device", "nonsense"), 1, "--device nonsense: "),
        (("--split", "test", "--method", "center"), 1, "expected a split of ['train', 'val'], got --split test"),
    ],
)
def test_flags_that_cannot_be_meant(arguments, code, expected, photos, weights, tmp_path):
    out = tmp_path / "out"
    model = () if "center" in arguments else ("--selector", SELECTOR, "--weights", weights)
    line = failure("--data", photos, "--out", out, *model, *arguments, code=code)
    assert expected in line
    assert not out.exists(), "nothing is made before it is known what to make"


# --out.


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_with_other_files_is_refused_and_left_alone(overwrite, photos, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    line = failure("--data", photos, "--out", tmp_path, *CENTER, *overwrite)
    assert line == f"Error: --out {tmp_path}: holds other files (first: notes.txt); give an empty or new folder"
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_of_source_code_is_refused_in_these_words(overwrite, photos, tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "plan.json").touch()
    line = failure("--data", photos, "--out", tmp_path, *CENTER, *overwrite)
    assert "this is Python source code (it holds __init__.py)" in line and "another --out" in line
    assert sorted(os.listdir(tmp_path)) == ["__init__.py", "plan.json"]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_plan_json_of_something_else_protects_its_folder(overwrite, photos, tmp_path):
    (tmp_path / "plan.json").write_text('{"tasks": ["buy milk"]}')
    (tmp_path / "holiday-2024.tar").write_text("photos")
    line = failure("--data", photos, "--out", tmp_path, *CENTER, *overwrite)
    assert "plan.json" in line
    assert sorted(os.listdir(tmp_path)) == ["holiday-2024.tar", "plan.json"]


def test_out_inside_data_is_refused(copy):
    for out in (copy, copy / "tickets", copy / "train" / "ant"):
        assert f"lies inside --data {copy}" in failure("--data", copy, "--out", out, *CENTER)
    assert "lies inside --data file://" in failure("--data", f"file://{copy}", "--out", copy / "tickets", *CENTER)
    assert not (copy / "tickets").exists()


def test_out_inside_data_under_datalth_data_is_refused(copy, monkeypatch):
    monkeypatch.setenv("DATALTH_DATA", str(copy.parent))
    assert "lies inside --data photos" in failure("--data", "photos", "--out", copy / "tickets", *CENTER)


def test_out_that_is_a_file_or_of_an_unknown_store_is_refused(photos, tmp_path):
    (tmp_path / "file").touch()
    line = failure("--data", photos, "--out", tmp_path / "file", *CENTER)
    assert line == f"Error: --out {tmp_path / 'file'}: expected a folder, got a file"
    assert (
        failure("--data", photos, "--out", "nope://a/set", *CENTER) == "Error: nope://a/set: Protocol not known: nope"
    )


def test_data_that_is_nowhere_leaves_no_folder(tmp_path):
    result = mine("--data", tmp_path / "nowhere", "--out", tmp_path / "out", *CENTER, code=1)
    assert "no such path; expected one of" in result.stderr and "timm:hfds/uoft-cs/cifar10" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_of_data_is_one_line(tmp_path):
    (tmp_path / "data/ant").mkdir(parents=True)
    assert "no images in" in failure("--data", tmp_path / "data", "--out", tmp_path / "out", *CENTER)


# Another plan in the same folder.


@pytest.fixture
def small(photos, tmp_path):
    """A finished set of `photos` by center that a test may spoil."""
    mine("--data", photos, "--out", tmp_path / "small", *CENTER)
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seed", 1), "seed: 0 there, 1 here"),
        (("--tokens", 4), "k: 13 there, 4 here"),
        (("--views", 4), "splits.train.views: 2 there, 4 here"),
        (("--method", "random"), "selector.method: center there, random here"),
        (("--exif", "apply"), "exif: ignore there, apply here"),
        (("--store-side", 32), "store_side: None there, 32 here"),
        (("--shard-size", 4), "splits.train.shard_size: 5 there, 4 here"),
        (("--limit", 3), "splits.train.images: 21 there, 3 here"),
        (("-b", 7), "batch_size: 16 there, 7 here"),
        (("--hflip", 0.25), "splits.train.hflip: 0.5 there, 0.25 here"),
    ],
)
def test_another_plan_is_refused_and_the_field_named(arguments, expected, small, photos):
    before = contents(small)
    line = failure("--data", photos, "--out", small, *CENTER, *arguments)
    assert f"{small}: holds a ticket set of another plan (" in line
    assert expected in line and "--overwrite" in line
    assert contents(small) == before


def test_the_same_plan_is_not_refused(small, photos):
    """The control: speed options are no part of the plan."""
    before = contents(small)
    mine("--data", photos, "--out", small, *CENTER, "-j", 1, "--max-failures", 0.5)
    assert contents(small) == before


def test_inputs_that_changed_are_another_plan(small, copy):
    (copy / "train/ant/ant_0.jpg").write_bytes((copy / "train/bee/bee_0.jpg").read_bytes())
    line = failure("--data", copy, "--out", small, *CENTER)
    assert "splits.train.inputs: " in line


def test_other_weights_are_another_plan(photos, weights, tmp_path):
    options = "--data", photos, "--out", tmp_path / "out", "--selector", SELECTOR, "--views", 1, "--split", "val"
    mine(*options, "--weights", weights)
    state = load_file(weights)
    state["cls_token"] += 1e-6
    save_file(state, tmp_path / "other.safetensors")
    assert "selector.state: " in failure(*options, "--weights", tmp_path / "other.safetensors")
    shutil.copy(weights, tmp_path / "moved.safetensors")
    mine(*options, "--weights", tmp_path / "moved.safetensors")  # the control: the tensors count, not the file


def test_a_broken_plan_is_one_line(small, photos):
    (small / "plan.json").write_text("{")
    assert "plan.json: not readable as a plan" in failure("--data", photos, "--out", small, *CENTER)


def test_overwrite_starts_anew_and_leaves_nothing_of_before(small, photos, tmp_path):
    options = "--method", "random", "--views", 1, "--shard-size", 9
    mine("--data", photos, "--out", small, *options, "--overwrite")
    mine("--data", photos, "--out", tmp_path / "fresh", *options)
    assert contents(small) == contents(tmp_path / "fresh")


def test_overwrite_with_a_mistake_elsewhere_removes_nothing(small, photos):
    before = contents(small)
    mine("--data", photos.parent / "typo", "--out", small, *CENTER, "--overwrite", code=1)
    failure("--data", photos, "--out", small, *CENTER, "--overwrite", "--tokens", 17)
    failure("--data", photos, "--out", small, "--weights", "typo.pth", "--overwrite")
    assert contents(small) == before


def test_overwrite_of_the_set_that_is_the_source_is_refused(small):
    before = contents(small)
    failure("--data", small, "--out", small, "--method", "random", "--overwrite")
    assert contents(small) == before


def test_overwrite_of_the_base_of_a_linked_source_is_refused(small, tmp_path):
    link = tmp_path / "link"
    mine("--data", small, "--images", "link", "--out", link, "--method", "random")
    before = contents(small)
    failure("--data", link, "--out", small, "--method", "random", "--overwrite")
    assert contents(small) == before


def test_an_overwrite_that_was_killed_half_way_can_be_run_again(small, photos, monkeypatch):
    monkeypatch.setattr("miner.run.write_plan", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    failure("--data", photos, "--out", small, *CENTER, "--overwrite")
    monkeypatch.undo()
    mine("--data", photos, "--out", small, *CENTER)


# --retry-failed.


def test_retry_failed_mines_the_mended_file_and_makes_links_say_so(copy, photos, tmp_path):
    out, link = tmp_path / "out", tmp_path / "link"
    cut(copy / "train/bee/bee_0.jpg")
    command = "--data", copy, "--out", out, *CENTER, "--max-failures", 1
    mine(*command)
    mine("--data", out, "--images", "link", "--out", link, "--method", "random")
    before, untouched = manifest(out), contents(out)
    shutil.copy(photos / "train/bee/bee_0.jpg", copy / "train/bee/bee_0.jpg")
    assert "--retry-failed" in failure(*command), "a mended file is another input: the error says what to do"

    mine(*command, "--retry-failed")
    assert manifest(out)["set_id"] != before["set_id"]
    assert manifest(out)["totals"]["failed"] == 0 and {row["status"] for row in rows(out).values()} == {"ok"}
    mine("--data", photos, "--out", tmp_path / "clean", *CENTER)
    for name, data in contents(tmp_path / "clean").items():
        if name.endswith(".tar"):
            assert contents(out)[name] == data
    changed = {name for name, data in contents(out).items() if untouched[name] != data and name.endswith(".tar")}
    assert len(changed) == 1, "only the shard that held the failed image"
    with pytest.raises(TicketSetError, match="has changed: expected set_id .* mine this link again"):
        TicketSet.open(str(link))
    assert "mine this link again" in failure("--data", link, "--out", tmp_path / "other", "--method", "random")
    mine(*command)  # the same command again, without the flag, finds nothing to do
    mine("--data", out, "--images", "link", "--out", link, "--method", "random", "--overwrite")
    assert TicketSet.open(str(link)).base is not None


def test_retry_failed_without_mending_changes_nothing(bad, tmp_path):
    command = "--data", bad, "--out", tmp_path / "out", *CENTER, "--max-failures", 1
    mine(*command)
    before = contents(tmp_path / "out")
    mine(*command, "--retry-failed")
    assert contents(tmp_path / "out") == before


def test_retry_failed_again_counts_failures_against_the_limit(bad, tmp_path):
    command = "--data", bad, "--out", tmp_path / "out", *CENTER, "--max-failures"
    mine(*command, 1)
    assert "images failed, --max-failures allows 0" in failure(*command, 0, "--retry-failed")


def test_retry_failed_refuses_inputs_that_had_not_failed(copy, tmp_path):
    cut(copy / "train/bee/bee_0.jpg")
    command = "--data", copy, "--out", tmp_path / "out", *CENTER, "--max-failures", 1
    mine(*command)
    before = contents(tmp_path / "out")
    shutil.copy(copy / "train/cat/cat_0.jpg", copy / "train/ant/ant_0.jpg")
    assert "splits.train.inputs: " in failure(*command, "--retry-failed")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["renamed", "added"])
def test_retry_failed_refuses_another_list_of_inputs(change, copy, tmp_path):
    """Shards are cut from the permuted list: one more name would put images into two shards or none."""
    cut(copy / "train/bee/bee_0.jpg")
    command = "--data", copy, "--out", tmp_path / "out", *CENTER, "--max-failures", 1
    mine(*command)
    before = contents(tmp_path / "out")
    if change == "renamed":
        (copy / "train/cat/cat_0.jpg").rename(copy / "train/cat/zebra.jpg")
    else:
        shutil.copy(copy / "train/cat/cat_0.jpg", copy / "train/cat/zebra.jpg")
    assert "splits.train" in failure(*command, "--retry-failed")
    assert contents(tmp_path / "out") == before


# A full disk.


@pytest.mark.parametrize("full_at", ["plan.json", "tar", "train-000002.tar", "train-000002.parquet", "train-000002.json", "sizes.json", "manifest.json"])  # fmt: skip
def test_a_full_disk_leaves_what_is_finished_and_the_next_run_completes_it(full_at, photos, tmp_path, monkeypatch):
    out, command = tmp_path / "out", ("--data", photos, "--out", tmp_path / "out", *CENTER)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        def write(self, data):
            raise full

    if full_at == "tar":  # in the middle of the third shard
        write = ShardWriter.add

        def add(self, row, members):
            if self.name == "train-000002" and len(self._rows) == 2:
                self._file.file = Full()
            return write(self, row, members)

        monkeypatch.setattr(ShardWriter, "add", add)
    else:
        replace = os.replace

        def full_replace(source, target):
            if os.fspath(target).endswith(full_at):
                raise full
            return replace(source, target)

        monkeypatch.setattr(os, "replace", full_replace)
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: noise.append(str(event.exc_value)))
    line = failure(*command)
    gc.collect()
    assert noise == [], "Python would print `Exception ignored in ...` for each"
    assert "No space left on device" in line
    if full_at != "plan.json":
        assert "what is finished is safe: free some space and run the same command again" in line
        assert str(out) in line
        assert {"train-000000", "train-000001"} <= set(shards_done(out))
    assert not list(out.rglob("*.tmp"))
    assert not (out / MANIFEST).exists()
    monkeypatch.undo()
    mine(*command)
    mine("--data", photos, "--out", tmp_path / "clean", *CENTER)
    assert contents(out) == contents(tmp_path / "clean")


# Several miners in one folder.


def begun(photos, out, *more):
    """A folder with a plan by which nothing is mined yet, and what a killed run left."""
    mine("--data", photos, "--out", out, *CENTER, *more)
    for path in [*out.glob("*-0*.json"), out / MANIFEST]:
        path.unlink()
    (out / "train-000000.tar.7-abcdef.tmp").touch()
    (out / "index/train-000000.parquet.7-abcdef.tmp").touch()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seed", 1), "another datalth-mine is at work in it by another plan (seed: 0 there, 1 here)"),
        (("--seed", 1, "--overwrite"), "--overwrite: another datalth-mine is at work in"),
        (("--overwrite",), "--overwrite: another datalth-mine is at work in"),
        (("--retry-failed",), "--retry-failed: another datalth-mine is at work in"),
    ],
)
def test_another_plan_is_refused_while_somebody_mines(arguments, expected, photos, tmp_path):
    out = tmp_path / "out"
    begun(photos, out)
    before = contents(out)
    with FolderLock(open_store(out)) as other:
        assert other.alone
        other.share()
        assert expected in failure("--data", photos, "--out", out, *CENTER, *arguments)
        assert contents(out) == before, "not even the other's temporary files are touched"
    begun(photos, tmp_path / "control")
    mine("--data", photos, "--out", tmp_path / "control", *CENTER, *arguments)


def test_a_split_is_not_added_while_somebody_mines(photos, tmp_path):
    out = tmp_path / "out"
    begun(photos, out, "--split", "train")
    with FolderLock(open_store(out)) as other:
        other.share()
        assert "this command would change its plan" in failure("--data", photos, "--out", out, *CENTER)
    mine("--data", photos, "--out", out, *CENTER)
    assert TicketSet.open(str(out)).splits == ["train", "val"]


def test_the_same_plan_is_mined_together_and_temporary_files_go_with_the_last(photos, tmp_path):
    out, command = tmp_path / "out", ("--data", photos, "--out", tmp_path / "out", *CENTER)
    begun(photos, out)
    with FolderLock(open_store(out)) as other:
        other.share()
        mine(*command)
        assert len(list(out.rglob("*.tmp"))) == 2
    mine(*command)
    mine("--data", photos, "--out", tmp_path / "clean", *CENTER)
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("locks", [True, False])
def test_two_plans_at_once_leave_one_whole_set(locks, photos, tmp_path, monkeypatch):
    """The second starts while the first is in its first shard. Without locks it may overwrite it, and the first finds out."""
    out, add, results = tmp_path / "out", ShardWriter.add, []
    plans, lock, second_has_ended = [], threading.Lock(), threading.Event()
    if not locks:
        monkeypatch.setattr("miner.lock.fcntl", None)

    def add_and_mine(self, row, members):
        with lock:
            plans.append(self._plan_id)
            first = len(plans) == 1
        if first:
            try:
                how = [] if locks else ["--overwrite"]
                results.append(mine("--data", photos, "--out", out, *CENTER, "--seed", 1, *how, code=int(locks)))
            finally:
                second_has_ended.set()
        elif (
            self._plan_id == plans[0]
        ):  # the first's other shard, which would be written while the second clears the folder
            second_has_ended.wait()
        return add(self, row, members)

    monkeypatch.setattr(ShardWriter, "add", add_and_mine)
    if locks:
        mine("--data", photos, "--out", out, *CENTER)
        assert "(seed: 0 there, 1 here)" in results[0].output
    else:
        line = failure("--data", photos, "--out", out, *CENTER)
        # Or what it was writing is gone.
        assert "plan.json: another datalth-mine has changed it since this one began" in line or ".tmp: No such" in line
    monkeypatch.undo()
    mine("--data", photos, "--out", tmp_path / "winner", *CENTER, "--seed", 0 if locks else 1)
    assert contents(out) == contents(tmp_path / "winner")


@pytest.mark.parametrize("locks", [True, False])
def test_a_plan_without_shards_is_replaced_only_where_it_is_sure_that_nobody_mines_by_it(
    locks, photos, tmp_path, monkeypatch
):
    begun(photos, tmp_path)
    for file in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.tar"), *tmp_path.rglob("*.parquet")]:
        if file.name != "plan.json":
            file.unlink()
    if locks:
        mine("--data", photos, "--out", tmp_path, *CENTER, "--seed", 1)
        return
    monkeypatch.setattr("miner.lock.fcntl", None)
    assert "(seed: 0 there, 1 here)" in failure("--data", photos, "--out", tmp_path, *CENTER, "--seed", 1)


def test_a_plan_that_changes_before_the_manifest_is_not_believed(photos, tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    for folder, seed in ((out, 0), (other, 1)):
        mine("--data", photos, "--out", folder, *CENTER, "--seed", seed)
    (out / MANIFEST).unlink()
    committed = miner.done.committed

    def committed_and_changed(store, plan, shards):
        found = committed(store, plan, shards)
        shutil.copy(other / "plan.json", out / "plan.json")
        return found

    monkeypatch.setattr(miner.done, "committed", committed_and_changed)
    assert "plan" in failure("--data", photos, "--out", out, *CENTER)
    assert not (out / MANIFEST).exists()


@pytest.mark.long
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_two_processes_at_once(seeds, photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "miner.cli", "--data", photos, "--out", out, *CENTER, "--img-size", 64]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [*map(str, command), "--device", "cpu", "--seed", str(seed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for seed in seeds
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == ([0, 0] if seeds == (0, 0) else [0, 1]), errors
    if 1 in codes:
        assert errors[codes.index(1)].startswith("Error: ") and "seed: " in errors[codes.index(1)]
    mine("--data", photos, "--out", tmp_path / "clean", *CENTER, "--seed", seeds[codes.index(0)])
    assert contents(out) == contents(tmp_path / "clean")


# Errors of the machine, and being stopped.

FEW_FILES = """
import os, resource, sys
import miner.cli, miner.run
from PIL import Image
from shards.writer import ShardWriter

Image.init()
enter, commit, hogs = ShardWriter.__enter__, ShardWriter.commit, []

def enter_and_hog(self):  # photos are what is read from here on
    entered = enter(self)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 4096))
    return entered

def commit_in_peace(self, timing):
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
    return commit(self, timing)

ShardWriter.__enter__, ShardWriter.commit = enter_and_hog, commit_in_peace
miner.cli.main()
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
def test_too_few_open_files_stop_the_run_and_fail_no_photo(photos, tmp_path):
    command = ["--data", photos, "--out", tmp_path / "out", *CENTER, "--max-failures", 1, "-b", 1]
    run = subprocess.run(
        [sys.executable, "-c", FEW_FILES, *map(str, command), "--img-size", "64", "--device", "cpu", "-j", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 1, run.stderr
    # On some machines torch's cpuinfo, in C, finds no file left for /proc/cpuinfo and prints a line of its own.
    (line,) = [line for line in run.stderr.splitlines() if not line.startswith("Error in cpuinfo: ")]
    assert line.startswith("Error: ")
    assert ": Too many open files; what is finished is safe: allow more open files (ulimit -n)" in line
    mine(*command)
    assert manifest(tmp_path / "out")["totals"]["failed"] == 0
    mine("--data", photos, "--out", tmp_path / "clean", *CENTER, "-b", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_memory_that_is_full_is_one_line_and_fails_no_photo(photos, tmp_path, monkeypatch):
    command, store, calls = ("--data", photos, "--out", tmp_path / "out", *CENTER), miner.reading.store_image, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise MemoryError
        return store(*arguments)

    monkeypatch.setattr(miner.reading, "store_image", full)
    assert failure(*command).startswith("Error: out of memory; what is finished is safe: ")
    monkeypatch.undo()
    mine(*command)
    assert manifest(tmp_path / "out")["totals"]["failed"] == 0


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_says_so_and_goes_on(stop, photos, tmp_path, monkeypatch):
    out, add, before = tmp_path / "out", ShardWriter.add, signal.getsignal(signal.SIGTERM)

    def add_and_stop(self, row, members):
        if self.name == "train-000002" and not sent:
            sent.append(stop)
            os.kill(os.getpid(), stop)
            put_away.wait(10)
        return add(self, row, members)

    sent, put_away, abort = [], threading.Event(), Writer.close
    monkeypatch.setattr(Writer, "close", lambda self: (put_away.set(), abort(self)))
    monkeypatch.setattr(ShardWriter, "add", add_and_stop)
    result = mine("--data", photos, "--out", out, *CENTER, code=128 + stop)
    said = f"{stop.name}: stopped; finished shards are safe, and the same command goes on from there\n"
    assert result.stderr == said
    assert {"train-000000", "train-000001"} <= set(shards_done(out))
    assert not list(out.rglob("*.tmp")) and not (out / MANIFEST).exists()
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    mine("--data", photos, "--out", out, *CENTER)
    mine("--data", photos, "--out", tmp_path / "clean", *CENTER)
    assert contents(out) == contents(tmp_path / "clean")


# Selectors and their weights.


def selector_failure(photos, tmp_path, weights, selector=SELECTOR):
    given = ("--weights", weights) if weights else ()
    line = failure("--data", photos, "--out", tmp_path / "out", "--selector", selector, *given)
    assert not (tmp_path / "out").exists()
    return line


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("data", [b"this is text\n", b"", bytes(4096)])
def test_a_file_that_holds_no_weights(name, data, photos, tmp_path):
    (tmp_path / name).write_bytes(data)
    line = selector_failure(photos, tmp_path, tmp_path / name)
    assert f"--weights {tmp_path / name}: not a loadable checkpoint" in line


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_run(how, photos, tmp_path):
    trap, path = str(tmp_path / "trap"), tmp_path / "evil.pth"
    if how == "torch.save":
        torch.save({"model": Evil(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Evil(trap)}))
    line = selector_failure(photos, tmp_path, path)
    assert f"--weights {path}: not a loadable checkpoint" in line
    assert not os.path.exists(trap)
    torch.load(path, weights_only=False) if how == "torch.save" else pickle.loads(path.read_bytes())
    assert os.path.exists(trap), "the control: the trap works"


def test_a_deit_style_checkpoint_is_read(photos, weights, tmp_path):
    path = tmp_path / "deit.pth"
    torch.save({"model": load_file(weights), "args": argparse.Namespace(lr=1), "epoch": 3}, path)
    options = "--selector", SELECTOR, "--split", "val"
    mine("--data", photos, "--out", tmp_path / "a", *options, "--weights", path)
    mine("--data", photos, "--out", tmp_path / "b", *options, "--weights", weights)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_weights_of_another_model(photos, tmp_path):
    save_file(timm.create_model("test_vit3").state_dict(), tmp_path / "other.safetensors")
    line = selector_failure(photos, tmp_path, tmp_path / "other.safetensors")
    assert "do not fit VisionTransformer of depth 6, width 64" in line and "first: expected" in line


def altered(weights, path, **tensors):
    """A checkpoint of SELECTOR's own tensors, but for some."""
    torch.save({**load_file(weights), **tensors}, path)
    return path


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"extra.thing": torch.ones(2)}, "do not fit VisionTransformer of depth 6, width 64: 0 tensors missing, 1 unknown, 0 of another shape (first: unknown tensor extra.thing)"),
        ({"cls_token": torch.ones(1, 1, 8)}, "do not fit VisionTransformer of depth 6, width 64: 0 tensors missing, 0 unknown, 1 of another shape (first: expected cls_token [1, 1, 64], got [1, 1, 8])"),
        ({"norm.weight": torch.ones(64, dtype=torch.int8)}, "expected norm.weight in floating point, got torch.int8: weights of a quantized model"),
        ({"cls_token": {"a": 1}}, "expected tensors by name, got dict 'cls_token'"),
        ({"cls_token": 3}, "expected tensors by name, got int 'cls_token'"),
        ({"acc": np.float64(0.7)}, "not a loadable checkpoint: it holds numpy._core.multiarray.scalar, and nothing but tensors, numbers and text is read; save model.state_dict() alone"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_say_what_is_wrong(tensors, reason, photos, weights, tmp_path):
    path = altered(weights, tmp_path / "w.pth", **tensors)
    line = selector_failure(photos, tmp_path, path)
    assert line.replace("numpy.core", "numpy._core") == f"Error: --weights {path}: {reason}"
    line = selector_failure(photos, tmp_path, tmp_path)
    assert line == f"Error: --weights {tmp_path}: expected a file, got a folder"


def test_weights_that_lack_a_tensor(photos, weights, tmp_path):
    state = load_file(weights)
    del state["pos_embed"]
    torch.save(state, tmp_path / "w.pth")
    assert "(first: pos_embed is missing)" in selector_failure(photos, tmp_path, tmp_path / "w.pth")


def test_weights_of_a_distilled_model_name_it(photos, tmp_path):
    distilled = "deit_tiny_distilled_patch16_224"
    torch.save({"model": timm.create_model(distilled, depth=1).state_dict()}, tmp_path / "w.pth")
    line = selector_failure(photos, tmp_path, tmp_path / "w.pth", "deit_tiny")
    assert line.endswith(f"weights of a distilled model (they hold dist_token); name that model, like {distilled}")
    assert "depth 12" in selector_failure(photos, tmp_path, tmp_path / "w.pth", distilled), (
        "the control: it gets further"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["list", "text", "script", "zip", "html", "cut", "safetensors"])
def test_files_that_are_no_checkpoint_get_our_words(kind, photos, weights, tmp_path):
    path, words = tmp_path / "w.pth", "no whole file of torch.save; one of safetensors is to be named .safetensors"
    if kind == "list":
        torch.save([1, 2], path)
        words = "expected a dict of tensors by name"
    elif kind == "text":
        torch.save("hello", path)
        words = "expected a dict of tensors by name"
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
        words = "a TorchScript archive; save model.state_dict() instead"
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "hello")
    elif kind == "html":
        path.write_text("<!DOCTYPE html><html></html>")
    elif kind == "cut":
        cut(altered(weights, path))
    else:
        shutil.copy(weights, path)
    assert selector_failure(photos, tmp_path, path) == f"Error: --weights {path}: not a loadable checkpoint: {words}"


def test_blocks_that_cannot_be_compiled_are_one_line(photos, weights, tmp_path, monkeypatch):
    """What torch raises at the first batch where there is no C++ compiler."""
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(*arguments):
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: self.register_forward_pre_hook(fail))
    command = "--data", photos, "--out", tmp_path / "out", "--selector", SELECTOR, "--weights", weights
    line = failure(*command, "--torchcompile")
    assert line.startswith("Error: --torchcompile: torch cannot compile here (No working C++ compiler found in ")
    monkeypatch.undo()
    mine(*command)


def test_weights_that_are_nowhere(photos, tmp_path):
    assert "--weights nowhere.pth: no such file" in selector_failure(photos, tmp_path, "nowhere.pth")


def test_a_selector_without_class_token(photos, tmp_path):
    save_file(timm.create_model("test_vit2").state_dict(), tmp_path / "test_vit2.safetensors")
    line = selector_failure(photos, tmp_path, tmp_path / "test_vit2.safetensors", "test_vit2")
    assert "selector test_vit2: --method evit expects a model with a class token, got one without" in line


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "deit_smal",
            "--selector deit_smal: expected a timm model or one of deit_tiny, deit_small, deit_base, dinov2; near: ",
        ),
        ("test_resnet", "--selector test_resnet: expected a timm VisionTransformer or Eva, got ResNet"),
    ],
)
def test_a_selector_that_is_none(name, expected, photos, weights, tmp_path):
    assert expected in selector_failure(photos, tmp_path, weights, name)


def test_pretrained_weights_that_cannot_be_had(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: pytest.fail("went to the network"))
    line = selector_failure(photos, tmp_path, None)
    assert f"--selector {SELECTOR}: no pretrained weights here (" in line
    assert (
        "fetch https://huggingface.co/timm/" in line
        and "model.safetensors where there is a network, and give it with --weights FILE" in line
    )


# What a selector gives.


def test_weights_with_nan_are_refused_before_anything_is_written(photos, weights, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    state["blocks.0.norm1.weight"][3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    arguments = ["--data", photos, "--out", tmp_path / "out", "--selector", SELECTOR]
    line = failure(*arguments, "--weights", tmp_path / "nan.safetensors")
    assert "are the selector's weights sound?" in line
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_a_method_of_ones_own_must_give_permutations(photos, weights, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import torch\n\ndef constant(selector, images, seeds):\n"
        "    return torch.zeros(len(images), 16, dtype=torch.long), torch.ones(len(images), 16)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--data", photos, "--out", tmp_path / "out", "--selector", SELECTOR, "--weights", weights]
    assert "expected a permutation of 16 patches" in failure(*arguments, "--method", "own:constant")


def test_a_plan_by_which_nothing_was_mined_may_be_replaced(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--data", photos, "--out", out, "--method", "center"]
    mine(*arguments)
    for path in [*out.glob("*-0*.json"), out / "manifest.json"]:
        path.unlink()
    mine(*arguments, "--seed", 5)
    assert json.loads((out / "manifest.json").read_bytes())["seed"] == 5


@pytest.mark.parametrize(
    ("url", "reason"), [("foo://bucket/set", "Protocol not known"), ("memory://none/set", "found no manifest")]
)
def test_urls_that_lead_nowhere(url, reason):
    from conftest import inspect

    output = inspect("info", url, code=1).output
    assert reason in output and output.count("\n") == 1
