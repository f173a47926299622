"""Random access to a split's samples: equal to the stream, for every kind of set and transport."""

import gc
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from conftest import mine
from shards import rows as rows_module
from shards import storage
from shards.copies import TarCopies
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.rows import Rows
from shards.sample import Sample


def plain(sample: Sample) -> tuple:
    return sample.key, sample.image, sample.label, sample.views.tolist(), sample.rankings.tolist(), sample.k


def everything(rows: Rows) -> list[tuple]:
    return [plain(rows.read(shard, row)) for shard, size in enumerate(rows.sizes) for row in range(size)]


def streamed(url: object, split: str = "train") -> list[tuple]:
    return [plain(sample) for sample in TicketSet.open(str(url)).stream(split)]


@pytest.fixture(scope="module")
def pair(center_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ is `center_set`; link/ has other tickets of its images."""
    root = tmp_path_factory.mktemp("rows")
    shutil.copytree(center_set, root / "base")
    mine("--data", root / "base", "--images", "link", "--out", root / "link", "--method", "random")
    return root


@pytest.fixture
def in_memory(pair: Path) -> Iterator[str]:
    """The pair under memory://."""
    memory = fsspec.filesystem("memory")
    for path in pair.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/rows/{path.relative_to(pair).as_posix()}", path.read_bytes())
    yield "memory://rows"
    memory.rm("/rows", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of tars that were read for a copy, in order."""
    urls = []
    blocks = storage.blocks

    def noted(url: str, limit: int) -> Iterator[bytes]:
        urls.extend([url] if url.endswith(".tar") else [])
        return blocks(url, limit)

    monkeypatch.setattr(storage, "blocks", noted)
    return urls


def copies(cache: Path, folder: Path) -> list[str]:
    """Stems of the shards of a set whose tars are in the cache, under the hashes that they have."""
    stems = {hashlib.sha256(path.read_bytes()).hexdigest(): path.stem for path in folder.glob("*.tar")}
    return sorted(stems[path.stem] for path in cache.rglob("*.tar"))


@pytest.mark.parametrize("name", ["base", "link"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_the_stream(pair, name, split):
    rows = Rows(TicketSet.open(str(pair / name)), split)
    assert everything(rows) == streamed(pair / name, split)
    assert rows.sizes == ((10, 10, 1) if split == "train" else (6,))
    assert len(rows) == sum(rows.sizes) and rows.skipped == 0


def test_rows_may_be_read_in_any_order(pair):
    rows = Rows(TicketSet.open(str(pair / "link")), "train")
    expected = streamed(pair / "link")
    for position in np.random.default_rng(0).permutation(21).tolist():
        assert plain(rows.read(*rows.locate(position))) == expected[position]
    assert streamed(pair / "base")[0][4] != expected[0][4]  # the link's tickets are others


def test_positions_and_labels_count_over_all_shards(pair):
    rows = Rows(TicketSet.open(str(pair / "base")), "train")
    assert [rows.locate(p) for p in (0, 9, 10, 19, 20)] == [(0, 0), (0, 9), (1, 0), (1, 9), (2, 0)]
    labels = [sample[2] for sample in streamed(pair / "base")]
    assert rows.labeled and rows.labels.tolist() == labels and len(set(labels)) == 3
    assert rows.labels_of(*np.array([rows.locate(p) for p in range(21)]).T).tolist() == labels


def test_images_without_label_say_so(photos, tmp_path, monkeypatch):
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted((photos / "val").rglob("*.*"))):
        shutil.copy(path, tmp_path / "flat" / f"{i}{path.suffix}")
    monkeypatch.chdir(tmp_path)
    mine("--data", "flat", "--out", "set", "--method", "center", "--val-share", 0, "--views", 1)
    opened = TicketSet.open(str(tmp_path / "set"))
    rows = Rows(opened, opened.splits[0])
    assert (
        not rows.labeled
        and rows.labels_of(np.array([0]), np.array([0])).tolist() == [-1]
        and rows.read(0, 0).label is None
    )


@pytest.fixture(scope="module")
def damaged(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ lacks 2 of 21 photos, which failed; in its tar 3 more broke, so that link/ holds 16; shards of 4."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(photos, root / "photos")
    for name in ("ant/ant_0.jpg", "cat/cat_1.jpg"):
        (root / "photos" / "train" / name).write_bytes(b"no image")
    common = "--method", "center", "--views", 2, "--max-failures", 1
    mine("--data", root / "photos", "--out", root / "base", "--shard-size", 4, *common)
    for key in ("train/bee/bee_1", "train/bee/bee_2", "train/cat/cat_0"):
        opened = TicketSet.open(str(root / "base"))
        _, row = opened.find(key)
        path = root / "base" / f"{row_shard(opened, key)}.tar"
        data = bytearray(path.read_bytes())
        image = next(s.image for s in opened.stream("train") if s.key == key)
        start = data.index(image, row["offset"])
        data[start : start + len(image)] = bytes(len(image))
        path.write_bytes(data)
    mine("--data", root / "base", "--images", "link", "--out", root / "link", "--method", "random", "--max-failures", 1)
    return root


def row_shard(opened: TicketSet, key: str) -> str:
    table = opened.table("train").to_pylist()
    return next(row["shard"] for row in table if row["key"] == key)


def test_failed_images_have_no_rows_and_those_a_link_lacks_are_counted(damaged):
    base = Rows(TicketSet.open(str(damaged / "base")), "train")
    link = Rows(TicketSet.open(str(damaged / "link")), "train")
    assert (len(base), base.skipped) == (19, 0)
    assert (len(link), link.skipped) == (16, 3)
    assert everything(link) == streamed(damaged / "link")
    keys = [sample[0] for sample in everything(base)]
    kept = [sample[0] for sample in everything(link)]
    assert set(keys) - set(kept) == {"train/bee/bee_1", "train/bee/bee_2", "train/cat/cat_0"}
    assert [key for key in keys if key in kept] == kept
    labels = dict(zip(keys, base.labels.tolist(), strict=True))
    assert link.labels.tolist() == [labels[key] for key in kept]


def test_a_shard_of_failures_alone_is_an_empty_shard(photos, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "photos" / "train")
    for path in (tmp_path / "photos" / "train" / "ant").iterdir():
        path.write_bytes(b"no image")
    common = "--method", "center", "--views", 1, "--max-failures", 1, "--val-share", 0
    mine("--data", tmp_path / "photos", "--out", tmp_path / "set", "--shard-size", 1, *common)
    rows = Rows(TicketSet.open(str(tmp_path / "set")), "train")
    assert sorted(rows.sizes) == [0, 0, 1, 1, 1, 1]
    assert [plain(rows.read(*rows.locate(p))) for p in range(4)] == streamed(tmp_path / "set")


def test_a_missing_tar_is_an_error_in_words(pair, tmp_path):
    shutil.copytree(pair, tmp_path / "pair")
    for name, broken in (("link", "link"), ("link", "base"), ("base", "base")):
        path = tmp_path / "pair" / broken / "train-000001.tar"
        content = path.read_bytes()
        path.unlink()
        rows = Rows(TicketSet.open(str(tmp_path / "pair" / name)), "train")
        assert rows.read(0, 0).key
        with pytest.raises(TicketSetError, match=f"{broken}/train-000001.tar: missing; the index lists its samples"):
            rows.read(1, 0)
        path.write_bytes(content)
        assert rows.read(1, 0).key


def test_a_missing_remote_tar_is_an_error_in_words(in_memory, tmp_path):
    fsspec.filesystem("memory").rm("/rows/base/train-000001.tar")
    for name in ("base", "link"):
        rows = Rows(TicketSet.open(f"{in_memory}/{name}"), "train", TarCopies(str(tmp_path)))
        with pytest.raises(TicketSetError, match="memory://rows/base/train-000001.tar: missing"):
            rows.read(1, 0)
        assert rows.read(0, 0).key


def test_a_truncated_or_exchanged_tar_is_an_error_in_words(pair, tmp_path):
    shutil.copytree(pair / "base", tmp_path / "set")
    path = tmp_path / "set" / "train-000000.tar"
    content = path.read_bytes()
    for wrong in (content[:700], b"", (tmp_path / "set" / "train-000001.tar").read_bytes()):
        path.write_bytes(wrong)
        with pytest.raises(TicketSetError, match="train-000000.tar: .*expected"):
            Rows(TicketSet.open(str(tmp_path / "set")), "train").read(0, 0)


def test_an_image_that_the_base_lacks_is_an_error_in_words(pair, damaged, tmp_path):
    """The link of another base, whose manifest was edited: joined by key, never by place."""
    shutil.copytree(damaged / "base", tmp_path / "base")
    shutil.copytree(pair / "link", tmp_path / "link")
    manifest = json.loads((tmp_path / "link" / "manifest.json").read_text())
    manifest["base"]["set_id"] = json.loads((tmp_path / "base" / "manifest.json").read_text())["set_id"]
    (tmp_path / "link" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TicketSetError, match="expected an image of train/.*links to"):
        Rows(TicketSet.open(str(tmp_path / "link")), "train")


# Remote sets.


@pytest.mark.parametrize("name", ["base", "link"])
def test_remote_rows_are_the_local_ones(pair, in_memory, tmp_path, name):
    rows = Rows(TicketSet.open(f"{in_memory}/{name}"), "train", TarCopies(str(tmp_path)))
    assert everything(rows) == streamed(pair / name)


def test_a_remote_tar_is_copied_once_for_all_rows_and_links(pair, in_memory, tmp_path, fetched):
    base, link = (TicketSet.open(f"{in_memory}/{name}") for name in ("base", "link"))
    tars = [f"{in_memory}/base/train-00000{i}.tar" for i in range(3)]
    for _ in range(2):
        rows = Rows(base, "train", TarCopies(str(tmp_path)))
        assert everything(rows) == everything(rows) == streamed(pair / "base")
        assert fetched == tars
    assert everything(Rows(link, "train", TarCopies(str(tmp_path)))) == streamed(pair / "link")
    assert fetched == [*tars, *(tar.replace("base", "link") for tar in tars)]
    assert not list(tmp_path.rglob("*.tmp"))
    elsewhere = Rows(base, "train", TarCopies(str(tmp_path / "elsewhere")))  # negative control
    elsewhere.read(0, 0)
    assert fetched[6:] == tars[:1]


def test_copies_beyond_the_limit_go_and_are_fetched_again(pair, in_memory, tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(rows_module, "OPEN_COPIES", 1)
    opened = TicketSet.open(f"{in_memory}/base")
    tars = [pair / "base" / f"train-00000{shard}.tar" for shard in range(3)]
    room = TarCopies(str(tmp_path), sum(path.stat().st_size for path in tars) - 1)
    rows = Rows(opened, "train", room)
    for shard, tar in enumerate(tars):
        rows.read(shard, 0)
        for path in tmp_path.rglob(f"{hashlib.sha256(tar.read_bytes()).hexdigest()}.tar"):
            os.utime(path, (shard, shard))  # clocks of file systems may be coarse
    assert copies(tmp_path, pair / "base") == ["train-000001", "train-000002"]
    assert everything(Rows(opened, "train", room)) == streamed(pair / "base")
    assert fetched.count(f"{in_memory}/base/train-000000.tar") == 2


def test_a_cache_smaller_than_one_tar_keeps_what_is_open(pair, in_memory, tmp_path, fetched):
    opened = TicketSet.open(f"{in_memory}/base")
    rows = Rows(opened, "train", TarCopies(str(tmp_path), 0))
    assert everything(rows) == everything(rows) == streamed(pair / "base") and len(fetched) == 3
    assert everything(Rows(opened, "train", TarCopies(str(tmp_path), 0))) == streamed(pair / "base")
    assert len(fetched) == 3  # they are open in `rows`
    del rows
    gc.collect()
    assert len(list(tmp_path.rglob("*.tar"))) == 3
    Rows(opened, "val", TarCopies(str(tmp_path), 0)).read(0, 0)
    assert copies(tmp_path, pair / "base") == ["val-000000"]


def test_a_set_mined_anew_under_the_same_url_is_copied_anew(pair, in_memory, photos, tmp_path):
    assert everything(Rows(TicketSet.open(f"{in_memory}/base"), "val", TarCopies(str(tmp_path)))) == streamed(
        pair / "base", "val"
    )
    out = tmp_path / "new"
    mine("--data", photos, "--out", out, "--method", "random", "--views", 3, "--shard-size", 10)
    memory = fsspec.filesystem("memory")
    for path in out.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/rows/base/{path.relative_to(out).as_posix()}", path.read_bytes())
    renewed = everything(Rows(TicketSet.open(f"{in_memory}/base"), "val", TarCopies(str(tmp_path))))
    assert renewed == streamed(out, "val") != streamed(pair / "base", "val")


# Processes.


@pytest.mark.parametrize("name", ["base", "link"])
def test_rows_travel_to_another_process_without_their_open_files(pair, in_memory, tmp_path, name):
    for url in (pair / name, f"{in_memory}/{name}"):
        rows = Rows(TicketSet.open(str(url)), "train", TarCopies(str(tmp_path)))
        first = plain(rows.read(0, 0))
        copy = pickle.loads(pickle.dumps(rows))
        assert plain(copy.read(0, 0)) == first
        assert everything(copy) == streamed(pair / name)
        assert (copy.sizes, copy.skipped, copy.labels.tolist()) == (rows.sizes, rows.skipped, rows.labels.tolist())


def test_few_files_stay_open(pair, monkeypatch):
    opened = []
    open_ranges = storage.open_ranges
    monkeypatch.setattr(rows_module, "OPEN_TARS", 2)
    monkeypatch.setattr(storage, "open_ranges", lambda url: opened.append(url[-10:]) or open_ranges(url))
    rows = Rows(TicketSet.open(str(pair / "base")), "train")
    for shard in (0, 0, 1, 0, 2, 0, 1):
        rows.read(shard, 0)
    assert opened == [f"{i:06d}.tar" for i in (0, 1, 2, 1)]
