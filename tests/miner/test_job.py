"""A shard is a function: a job mines the same bytes in any process, one shard a call or many."""

import dataclasses
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import miner
from conftest import SELECTOR, contents, mine
from inputs import open_source
from miner import job as jobs
from miner.done import shard_sizes
from miner.job import Job, mine_shard, mine_shards
from miner.models import choose_device
from miner.plan import shard_rows
from miner.settings import Fleet, Geometry, Inputs, Labeling, Machine, Output, Selection
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.store import open_store

pytestmark = pytest.mark.slow


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of the commands that a test runs."""
    found: list[Job] = []
    monkeypatch.setattr("miner.run.mine_shards", lambda job, *rest: (found.append(job), mine_shards(job, *rest))[1])
    return found


@pytest.fixture
def evit(photos: Path, weights: Path) -> list[object]:
    words = ["--data", photos, "--selector", SELECTOR, "--weights", weights, "--views", 3, "--shard-size", 6, "-b", 4]
    return [*words, "--limit", 12]


def elsewhere(job: Job, folder: Path) -> Job:
    """The job for another folder, in which nothing but the plan is there yet."""
    folder.mkdir(exist_ok=True)
    shutil.copy(job.store.at("plan.json"), folder)
    return dataclasses.replace(job, store=open_store(folder))


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if "-0" in name}


def test_a_job_that_was_pickled_mines_the_same_bytes_in_a_fresh_process(
    evit: list[object],
    center_set: Path,
    weights: Path,
    tmp_path: Path,
    captured: list[Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files, and another ticket set whose views are replayed, each by a model that the process builds itself."""
    mine(*evit, "--out", tmp_path / "photos")
    link = ["--data", center_set, "--images", "link", "--selector", SELECTOR, "--weights", weights, "--split", "val"]
    mine(*link, "--out", tmp_path / "link")
    todo = []
    for job, name in zip(captured, ("photos", "link"), strict=True):
        todo += [(elsewhere(job, tmp_path / f"{name}-again"), *shard) for shard in job.plan.shards()]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process: scores may differ in their last bit with the threads
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        stats = pool.starmap(mine_shard, todo, chunksize=1)
    assert [(s.split, s.shard, s.failed) for s in stats] == [(split, number, 0) for _, split, number in todo]
    for name in ("photos", "link"):
        assert shards_of(tmp_path / f"{name}-again") == shards_of(tmp_path / name) != {}


def test_images_of_shards_are_counted_without_dealing_them_out(
    photos: Path, center_set: Path, tmp_path: Path, captured: list[Job]
) -> None:
    """Of files, with a last shard that is not full; of a set, both splits and one; and of one that lacks images."""
    mine("--data", photos, "--method", "center", "--shard-size", 4, "--limit", 13, "--out", tmp_path / "photos")
    mine("--data", center_set, "--images", "link", "--method", "random", "--out", tmp_path / "link")
    mine("--data", center_set, "--images", "link", "--method", "random", "--split", "val", "--out", tmp_path / "val")
    for job in captured:
        expected = {shard: len(shard_rows(job.plan, job.source, *shard)) for shard in job.plan.shards()}
        assert shard_sizes(job.plan, job.source) == expected
    thin = dict(captured[1].source.splits)
    thin["train"] = thin["train"].slice(0, 12)  # its last shard is empty
    fewer = dataclasses.replace(captured[1].source, splits=thin)
    assert list(shard_sizes(captured[1].plan, fewer).values()) == [10, 2, 0, 6]
    assert len(captured) == 3


def test_a_call_a_shard_builds_the_model_once(
    evit: list[object], tmp_path: Path, captured: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], jobs.build_models
    monkeypatch.setattr(jobs, "build_models", lambda *a: (built.append(a), build(*a))[1])
    mine(*evit, "--out", tmp_path / "set")
    job = elsewhere(captured[0], tmp_path / "again")
    for split, number in reversed(job.plan.shards()):
        mine_shard(job, split, number)
    assert len(built) == 1 and shards_of(tmp_path / "again") == shards_of(tmp_path / "set")


def test_shards_may_be_named_one_by_one(evit: list[object], tmp_path: Path, captured: list[Job]) -> None:
    """As where processes claim them: a shard is asked for when the threads get to it, not all at the start."""
    mine(*evit, "--out", tmp_path / "set")
    job, asked = elsewhere(captured[0], tmp_path / "again"), []

    def claimed() -> Iterator[tuple[str, int]]:
        for split, number in job.plan.shards():
            asked.append((split, number, len(list(Path(job.store.url).glob("*-0*.tar*")))))
            yield split, number

    assert [(s.split, s.shard) for s in mine_shards(job, claimed())] == job.plan.shards()
    assert asked[0][2] == 0 < asked[-1][2]
    assert shards_of(tmp_path / "again") == shards_of(tmp_path / "set")


def test_other_weights_under_the_same_name_are_noticed_where_a_job_arrives(
    evit: list[object], weights: Path, tmp_path: Path, captured: list[Job]
) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copy(weights, tmp_path / "w.safetensors"))
    mine(*evit, "--weights", copy, "--out", tmp_path / "set")
    state = load_file(copy)
    state["cls_token"] += 1e-6
    save_file(state, copy)
    jobs._built.cache_clear()
    job = elsewhere(captured[0], tmp_path / "again")
    with pytest.raises(TicketSetError, match="`selector`: expected the model, weights and versions of the plan"):
        mine_shard(job, "train", 0)
    assert not list(Path(job.store.url).rglob("*.tar*"))


def test_a_ticket_set_that_was_pickled_gives_the_same_images_and_views(center_set: Path) -> None:
    source = open_source(center_set)
    rows = source.splits["train"].to_pylist()
    found = [source.read(row) for row in rows]
    copy = pickle.loads(pickle.dumps(source))
    for row, (image, views) in zip(rows, found, strict=True):
        again = copy.read(row)
        assert again[0] == image and views is not None and np.array_equal(again[1], views)


def test_a_program_mines_what_the_command_mines(photos: Path, weights: Path, tmp_path: Path) -> None:
    words = ["--selector", SELECTOR, "--weights", weights, "--tokens", 8, "--drop-blocks", "1,3", "--views", 2]
    mine("--data", photos, "--out", tmp_path / "command", *words, "--hflip", 0.25, "-b", 4)
    miner.mine(
        Inputs(str(photos)),
        Output(str(tmp_path / "program")),
        Selection(SELECTOR, str(weights), tokens=8, drop_blocks=(1, 3)),
        Geometry(img_size=64, views=2, hflip=0.25),
        machine=Machine(batch_size=4, device="cpu"),
    )
    assert contents(tmp_path / "program") == contents(tmp_path / "command")
    assert TicketSet.open(str(tmp_path / "program")).k == 8


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Geometry(img_size=64, patch_size=24), "`img_size` 64 is no multiple of `patch_size` 24"),
        (lambda: Geometry(scale=(0.5, 0.1)), "`scale`: expected 0 < MIN <= MAX <= 1, got 0.5 0.1"),
        (lambda: Geometry(ratio=(0.0, 1.0)), "`ratio`: expected 0 < MIN <= MAX, got 0 1"),
        (lambda: Geometry(views=0), "`views` 0: "),
        (lambda: Selection(tokens=4, keep_rate=0.5), "`tokens` and `keep_rate` both say"),
        (lambda: Labeling(token_label_size=96), "`token_label_size`: expected `token_labels` NAME beside it"),
        (lambda: Inputs(""), "`data`: expected a name"),
        (lambda: Fleet(elastic=True, ray="auto"), "`ray` and `elastic` both say who mines"),
        (lambda: Output(""), "`out`: expected a name"),
        (lambda: Output("x", images="move"), "`images` 'move': "),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_a_program_too(make, expected: str) -> None:
    with pytest.raises(TicketSetError) as error:
        make()
    assert str(error.value).startswith(expected)


def test_a_rank_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: what is asked of torch is looked at."""
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *a, device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == choose_device("cuda") == torch.device("cuda:3") == asked[0]
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == choose_device(kinds=("cpu",)) == torch.device("cpu")
    for name in ("nonsense", "meta"):
        with pytest.raises(TicketSetError, match=f"^`device` {name}: "):
            choose_device(name, ("cuda", "cpu"))


@pytest.mark.parametrize(
    ("rank", "flag", "code", "expected"),
    [
        ("0", "--overwrite", 2, "--overwrite under torchrun: "),
        ("0", "--retry-failed", 2, "--retry-failed under torchrun: "),
        ("2", "--overwrite", 1, "RANK: expected a number below WORLD_SIZE 2, got 2"),
    ],
)
def test_what_ranks_would_undo_for_each_other_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, flag: str, code: int, expected: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert expected in mine("--data", photos, "--out", tmp_path / "x", "--method", "center", flag, code=code).stderr
    assert not (tmp_path / "x").exists()


def test_the_version_is_that_of_the_package() -> None:
    assert mine("--version").output.split()[-1] == version("datalth")


def test_selectors_convolve_in_float32_where_torch_would_take_tf32(photos, weights, tmp_path, monkeypatch):
    """What it does to rankings only a GPU shows: `python -m benchmarks gpu rankings`."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    mine("--data", photos, "--out", tmp_path / "set", "--selector", SELECTOR, "--weights", weights, "--limit", 4)
    assert not torch.backends.cudnn.allow_tf32
