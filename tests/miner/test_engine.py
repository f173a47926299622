"""The mining run: equal plans give equal bytes, whatever the threads, ranks, kills and restarts."""

import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import miner.writer
from conftest import SELECTOR, contents, mine
from inputs import open_source
from miner.cli import main
from miner.job import Job, Progress, mine_shards
from miner.plan import make_plan, shard_rows, write_plan
from miner.producers import Producer, build_models
from miner.producers.producer import Item
from miner.settings import Geometry, Inputs, Labeling, Machine, Output, Selection
from miner.sources import Source
from miner.sources.source import SCHEMA
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.store import open_store
from shards.writer import ShardWriter

pytestmark = pytest.mark.slow  # mines a set for every way to be interrupted

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
Arguments = list[str]
Pairs = list[tuple[str, int]]


@pytest.fixture(scope="module")
def arguments(photos: Path, weights: Path) -> Arguments:
    """evit over 3 views: train in shards of 6, 6, 6 and 3 images, val in one of 6; batches of 4 views."""
    words = f"--data {photos} --selector {SELECTOR} --weights {weights} --keep-rate 0.7 --views 3 --shard-size 6 -b 4"
    return words.split()


@pytest.fixture(scope="module")
def reference(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`arguments` mined without a break; read-only."""
    out = tmp_path_factory.mktemp("reference") / "set"
    mine(*arguments, "--out", out)
    return out


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`mine` as one rank of several."""

    def run(rank: int, world: int, *arguments: object) -> Any:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        result = mine(*arguments)
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
        return result

    return run


def command(*arguments: object) -> Arguments:
    return [sys.executable, "-m", "miner.cli", "--img-size", "64", "-j", "2", "--device", "cpu", *map(str, arguments)]


def times(folder: Path) -> dict[str, int]:
    """When each tar and parquet was written."""
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix in (".tar", ".parquet")}


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_a_whole_set_is_these_files(reference: Path) -> None:
    stems = ["train-000000", "train-000001", "train-000002", "train-000003", "val-000000"]
    expected = {"plan.json", "manifest.json", "_info.json", "sizes.json"}
    expected |= {f"{s}.tar" for s in stems} | {f"{s}.json" for s in stems} | {f"index/{s}.parquet" for s in stems}
    assert set(contents(reference)) == expected


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_byte(arguments: Arguments, reference: Path, tmp_path: Path, workers: int) -> None:
    mine(*arguments, "--out", tmp_path, "-j", workers)
    assert contents(tmp_path) == contents(reference)


def test_torch_threads_do_not_change_a_byte(arguments: Arguments, reference: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        mine(*arguments, "--out", tmp_path)
    finally:
        torch.set_num_threads(1)
    assert contents(tmp_path) == contents(reference)


def test_another_seed_or_keep_rate_changes_bytes(arguments: Arguments, reference: Path, tmp_path: Path) -> None:
    for flag, value in (("--seed", 1), ("--keep-rate", 0.8)):
        mine(*arguments, "--out", tmp_path / flag, flag, value)
        assert tars(tmp_path / flag) != tars(reference)


def test_ranks_one_after_the_other_give_the_same_bytes(
    arguments: Arguments, reference: Path, tmp_path: Path, ranked: Callable[..., Any]
) -> None:
    ranked(1, 2, *arguments, "--out", tmp_path)
    assert {p.stem for p in tmp_path.glob("*.tar")} == {"train-000001", "train-000003"}
    assert not (tmp_path / "manifest.json").exists()
    ranked(0, 2, *arguments, "--out", tmp_path)
    assert contents(tmp_path) == contents(reference)


@pytest.mark.long
def test_ranks_at_once_give_the_same_bytes(arguments: Arguments, reference: Path, tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            command(*arguments, "--out", tmp_path),
            env={**ONE_THREAD, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert contents(tmp_path) == contents(reference)


def test_a_dead_rank_is_made_up_for_by_another_number_of_ranks(
    arguments: Arguments, reference: Path, tmp_path: Path, ranked: Callable[..., Any]
) -> None:
    ranked(1, 2, *arguments, "--out", tmp_path)
    done = times(tmp_path)
    for rank in (2, 0, 1):
        assert not (tmp_path / "manifest.json").exists()
        ranked(rank, 3, *arguments, "--out", tmp_path)
    assert contents(tmp_path) == contents(reference)
    assert done == {name: t for name, t in times(tmp_path).items() if name in done}


@pytest.mark.parametrize("order", [("train", "val"), ("val", "train")])
def test_a_split_added_later_gives_what_both_at_once_give(
    arguments: Arguments, reference: Path, tmp_path: Path, order: tuple[str, str]
) -> None:
    views = {"train": 3, "val": 1}  # a split that is named has as many as are asked for
    mine(*arguments, "--out", tmp_path, "--split", order[0], "--views", views[order[0]])
    first = times(tmp_path)
    assert TicketSet.open(str(tmp_path)).splits == [order[0]]
    mine(*arguments, "--out", tmp_path, "--split", order[1], "--views", views[order[1]])
    assert contents(tmp_path) == contents(reference)
    assert first == {name: t for name, t in times(tmp_path).items() if name in first}


def test_a_finished_set_is_left_alone(arguments: Arguments, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(reference, out)
    before = times(out)
    mine(*arguments, "--out", out)
    assert times(out) == before and contents(out) == contents(reference)


def test_resuming_mines_only_what_is_not_done(arguments: Arguments, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(reference, out)
    before = times(out)
    (out / "manifest.json").unlink()
    (out / "train-000002.json").unlink()
    (out / "train-000002.tar").write_bytes(b"cut off")
    assert "resuming: 4 of 5 shards are done" in mine(*arguments, "--out", out).output
    changed = {name for name, written in times(out).items() if written != before[name]}
    assert changed == {"train-000002.tar", "train-000002.parquet"}
    assert contents(out) == contents(reference)


def test_another_plan_in_the_same_folder_is_refused(arguments: Arguments, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(reference, out)
    output = mine(*arguments, "--out", out, "--keep-rate", "0.8", "-b", 5, code=1).output
    assert "batch_size: 4 there, 5 here" in output and "selector.keep_rate: 0.7 there, 0.8 here" in output
    assert contents(out) == contents(reference)


# One process imports everything and forks a child for every moment, before any thread has started. A
# child is killed with SIGKILL before or after its nth os.replace, or after its nth sample.
KILLER = """
import itertools, os, signal, sys
import safetensors.torch, timm, torch, webdataset
import miner.cli, miner.run, shards.writer

out, count, *arguments = sys.argv[1:]
replace, add = os.replace, shards.writer.ShardWriter.add
calls = {"replace": itertools.count(1), "add": itertools.count(1)}  # two shards are written at once: each call keeps its own number

def hit(*now):
    if moment == now:
        os.kill(os.getpid(), signal.SIGKILL)

def counted_replace(*args):
    number = next(calls["replace"])
    hit("replace", number, "before")
    replace(*args)
    hit("replace", number, "after")

def counted_add(*args):
    add(*args)
    hit("add", next(calls["add"]), "after")

os.replace, shards.writer.ShardWriter.add = counted_replace, counted_add
moments = [("replace", n, when) for n in range(1, int(count) + 1) for when in ("before", "after")]
moments += [("add", n, "after") for n in (1, 2, 3)]
for number, moment in enumerate(moments):
    child = os.fork()
    if child == 0:
        miner.cli.main([*arguments, "--out", f"{out}/{number}"])
        os._exit(9)
    status = os.waitpid(child, 0)[1]
    print(*moment, os.WTERMSIG(status) if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", sep=",")
"""
COMMITS = 10  # files that a set of two shards renames: the plan, two shards' three, three at the end


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_commit_and_resumed_gives_the_same_bytes(arguments: Arguments, tmp_path: Path) -> None:
    short = [*arguments, "--split", "train", "--limit", "4", "--shard-size", "2", "-j", "2"]
    mine(*short, "--out", tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    killer = [sys.executable, "-c", KILLER, str(tmp_path / "killed"), str(COMMITS)]
    run = subprocess.run(
        [*killer, "--img-size", "64", "--device", "cpu", *short],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    moments = [line.split(",") for line in run.stdout.splitlines() if line.startswith(("replace,", "add,"))]
    assert len(moments) == 2 * COMMITS + 3
    assert {m[3] for m in moments} == {str(int(signal.SIGKILL))}, run.stdout
    left = set()
    for number, moment in enumerate(moments):
        out = tmp_path / "killed" / str(number)
        left |= {p.name.split(".")[0] for p in out.rglob("*.tmp")}
        finished = moment[:3] == ["replace", str(COMMITS), "after"]
        assert (out / "manifest.json").exists() == finished
        mine(*short, "--out", out)
        stale = {p.name for p in out.rglob("*.tmp") if p.name.startswith("train-")}
        assert not stale, moment
        got = {name: data for name, data in contents(out).items() if not name.endswith(".tmp")}
        assert got == expected, moment
    # The negative control: the kills did hit while each of these was being written.
    assert left == {"plan", "train-000000", "train-000001", "_info", "sizes", "manifest"}


def test_nothing_temporary_is_left_after_a_resume(arguments: Arguments, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(reference, out)
    (out / "manifest.json").unlink()
    for name in ("plan.json", "manifest.json", "_info.json", "sizes.json"):
        (out / f"{name}.77-abcdef.tmp").write_bytes(b"{")
    mine(*arguments, "--out", out)
    assert not list(out.rglob("*.tmp"))


def test_killed_from_outside_and_resumed_gives_the_same_bytes(arguments: Arguments, tmp_path: Path) -> None:
    many = [*arguments, "--shard-size", "1", "--out", tmp_path / "killed"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*many), env=ONE_THREAD, **quiet)
    first = tmp_path / "killed" / "train-000000.json"
    deadline = time.monotonic() + 60
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert first.exists() and not (tmp_path / "killed" / "manifest.json").exists()
    before = times(tmp_path / "killed")
    mine(*many)
    assert times(tmp_path / "killed")["train-000000.tar"] == before["train-000000.tar"]
    mine(*many[:-1], tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def small_job(
    source: Source, folder: Path, batch_size: int, workers: int, views: int, shard_size: int
) -> tuple[Job, tuple[Producer, ...], list[Pairs]]:
    """A job by `random` on a 4x4 grid, its producers, and the list they log their batches into."""
    geometry, selection = Geometry(img_size=64, views=views), Selection(method="random", tokens=8)
    machine, output = Machine(batch_size, workers, "cpu"), Output(str(folder), shard_size=shard_size)
    (rankings,) = build_models(selection, Labeling(), geometry, machine, tuple(source.classes))
    plan = make_plan(source, Inputs("x"), output, geometry, {rankings.name: rankings.identity}, batch_size)
    folder.mkdir(exist_ok=True)
    write_plan(open_store(folder), plan, source, "cpu")
    batches: list[Pairs] = []
    submit = rankings.submit

    def logged(batch: list[Item]) -> Any:
        batches.append([(image.row["key"], view) for image, view in batch])
        return submit(batch)

    rankings.submit = logged  # type: ignore[method-assign]
    return Job(plan, source, open_store(folder), selection, Labeling(), geometry, machine, output), (rankings,), batches


def well_formed(batches: list[Pairs], shard_of: dict[str, str], batch_size: int) -> bool:
    """No batch crosses a shard, and all are full but for each shard's last."""
    shards = [{shard_of[key] for key, _ in batch} for batch in batches]
    if any(len(found) != 1 for found in shards):
        return False
    names = [found.pop() for found in shards]
    last = {name: i for i, name in enumerate(names)}
    return all(len(b) == batch_size or (len(b) < batch_size and last[n] == i) for i, (b, n) in enumerate(zip(batches, names)))  # fmt: skip


@pytest.mark.parametrize("broken", [frozenset(), frozenset({"train/bee/bee_3", "train/cat/cat_0", "val/ant/ant_1"})])
def test_batches_are_fixed_by_the_plan_and_never_cross_a_shard(
    photos: Path, tmp_path: Path, broken: frozenset[str]
) -> None:
    source = open_source(str(photos))

    def read(row: dict[str, Any]) -> tuple[bytes, None]:
        if row["key"] in broken:
            raise OSError("unplugged")
        return source.read(row)

    logs = []
    for workers in (1, 4):
        reading = dataclasses.replace(source, read=read)
        job, producers, batches = small_job(reading, tmp_path / str(workers), 5, workers, views=3, shard_size=4)
        progress = Progress(max_failures=len(broken))
        mine_shards(job, job.plan.shards(), producers, progress)
        logs.append(batches)
        assert progress.failures == len(broken)
    assert logs[0] == logs[1]

    order = [
        (f"{split}-{number}", source.splits[split]["key"][int(row)].as_py())
        for split, number in job.plan.shards()
        for row in shard_rows(job.plan, source, split, number)
    ]
    shard_of = {key: shard for shard, key in order}
    views_of = {"train": 3, "val": 1}
    pairs = [(key, view) for _, key in order if key not in broken for view in range(views_of[key.split("/")[0]])]
    assert [pair for batch in logs[0] for pair in batch] == pairs
    assert well_formed(logs[0], shard_of, 5)
    # The negative control: the same pairs, in batches that take no notice of shards.
    assert not well_formed([pairs[i : i + 5] for i in range(0, len(pairs), 5)], shard_of, 5)


def peak_in_flight(monkeypatch: pytest.MonkeyPatch, folder: Path, shard_size: int, patience: float) -> int:
    """Images read and not yet written, at most, of 400, when the writer stands still at its first image."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 200)).save(out, "PNG")
    count, lock, all_read = 400, threading.Lock(), threading.Event()
    seen = {"read": 0, "written": 0, "peak": 0}

    def read(row: dict[str, Any]) -> tuple[bytes, None]:
        with lock:
            seen["read"] += 1
            seen["peak"] = max(seen["peak"], seen["read"] - seen["written"])
            if seen["read"] == count:
                all_read.set()
        return out.getvalue(), None

    def slow_add(writer: ShardWriter, row: dict[str, Any], members: dict[str, bytes]) -> None:
        if not seen["written"]:
            all_read.wait(patience)
        original(writer, row, members)
        with lock:
            seen["written"] += 1

    original = ShardWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", slow_add)
        rows = [{"key": f"k{i}", "source": f"k{i}.png", "label": 0, "size": 1, "container": 0, "offset": 0} for i in range(count)]  # fmt: skip
        source = Source("made", ["only"], {"train": pa.Table.from_pylist(rows, SCHEMA)}, read)
        job, producers, _ = small_job(source, folder, 8, 2, views=1, shard_size=shard_size)
        mine_shards(job, job.plan.shards(), producers)
    assert seen["read"] == seen["written"] == count
    return seen["peak"]


@pytest.mark.parametrize("shard_size", [100, 50])  # of 50, the second is begun while the first waits
def test_images_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int) -> None:
    # 18 read ahead and 2 in threads, 8 in flight and 8 gathered for the next batch, 64 before the writer, 1 in it.
    assert peak_in_flight(monkeypatch, tmp_path / "a", shard_size, patience=0.5) <= 105
    # The negative control: more room than there are images lets everything in.
    monkeypatch.setattr(miner.writer, "WAITING_IMAGES", 1000)
    assert peak_in_flight(monkeypatch, tmp_path / "b", shard_size, patience=30) > 390


def test_random_rankings_do_not_depend_on_batches_or_workers(photos: Path, tmp_path: Path) -> None:
    common = ["--data", photos, "--method", "random", "--views", "3", "--shard-size", "10"]
    sets = []
    for i, flags in enumerate((["-b", "1", "-j", "1"], ["-b", "7", "-j", "4"], ["-b", "7", "-j", "4", "--seed", "5"])):
        mine(*common, *flags, "--out", tmp_path / str(i))
        sets.append(tars(tmp_path / str(i)))
    assert sets[0] == sets[1]
    assert sets[0] != sets[2]


def samples(folder: Path, split: str = "train") -> dict[str, Any]:
    return {sample.key: sample for sample in TicketSet.open(str(folder)).stream(split)}


def test_more_views_leave_the_first_ones_as_they_are(photos: Path, tmp_path: Path) -> None:
    for views in (2, 5):
        mine("--data", photos, "--method", "random", "--views", views, "--out", tmp_path / str(views))
    few, many = samples(tmp_path / "2"), samples(tmp_path / "5")
    assert few.keys() == many.keys() and len(few) == 21
    for key, sample in few.items():
        assert many[key].views.shape == (5, 5)
        assert np.array_equal(many[key].views[:2], sample.views)
        assert np.array_equal(many[key].rankings[:2], sample.rankings)
        assert len({tuple(v) for v in many[key].views.tolist()}) == 5


def test_seeds_change_every_view_but_the_canonical_one(photos: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        mine("--data", photos, "--method", "center", "--views", 2, "--seed", seed, "--out", tmp_path / str(seed))
    zero, one = samples(tmp_path / "0"), samples(tmp_path / "1")
    assert list(zero) != list(one) and zero.keys() == one.keys()  # the order of the shards too
    for key, sample in zero.items():
        assert np.array_equal(sample.views[0], one[key].views[0])
        assert not np.array_equal(sample.views[1], one[key].views[1])


def test_a_limit_takes_the_first_of_the_permuted_images(reference: Path, arguments: Arguments, tmp_path: Path) -> None:
    mine(*arguments, "--limit", "4", "--out", tmp_path)
    for split in ("train", "val"):
        whole, some = samples(reference, split), samples(tmp_path, split)
        assert list(some) == list(whole)[:4]
    assert len({key.split("/")[1] for key in samples(reference)}) == 3
    first = [key.split("/")[1] for key in list(samples(reference))[:6]]
    assert len(set(first)) > 1  # no shard of one class


def test_the_order_of_the_inputs_is_a_fixed_function_of_the_seed(reference: Path) -> None:
    short = [key.removeprefix("train/").split("/")[1] for key in list(samples(reference))[:6]]
    assert short == ["bee_5", "cat_0", "bee_2", "ant_0", "ant_2", "cat_4"]


def test_plan_id_is_a_hash_of_what_the_plan_says(reference: Path) -> None:
    def digest(value: Any) -> str:
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        return hashlib.sha256(text.encode()).hexdigest()

    plan = json.loads((reference / "plan.json").read_bytes())
    ids = {}
    for name, split in plan["splits"].items():
        rest = {field: value for field, value in split.items() if field != "plan_id"}
        ids[name] = digest({"common": plan["common"], "name": name, "split": rest})
        assert split["plan_id"] == ids[name]
        assert json.loads((reference / f"{name}-000000.json").read_bytes())["plan_id"] == ids[name]
    assert plan["plan_id"] == digest(ids)
    assert json.loads((reference / "manifest.json").read_bytes())["plan_id"] == plan["plan_id"]
    assert plan["common"]["selector"]["counts"] == [12, 9, 7] and plan["common"]["k"] == 7
    plan["common"]["seed"] = 1
    assert digest({"common": plan["common"], "name": name, "split": rest}) != ids[name]


def test_the_inputs_hash_is_over_the_sorted_listing(reference: Path, photos: Path) -> None:
    lines = []
    for path in (photos / "val").rglob("*.*"):
        label = ["ant", "bee", "cat"].index(path.parent.name)
        lines.append((path.relative_to(photos).with_suffix("").as_posix(), path.stat().st_size, label))
    text = "".join(f"{key} {size} {label}\n" for key, size, label in sorted(lines))
    plan = json.loads((reference / "plan.json").read_bytes())
    assert plan["splits"]["val"]["inputs"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def evit_flags(arguments: Arguments) -> Arguments:
    """The selector of `arguments` without its data, views and shards."""
    start = arguments.index("--selector")
    return [*arguments[start : arguments.index("--views")], "-b", "4"]


@pytest.fixture(scope="module")
def linked(photos: Path, evit_flags: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` by center with the views and shards of `reference`, and `link` by evit; read-only."""
    folder = tmp_path_factory.mktemp("linked") / "sets"
    mine("--data", photos, "--method", "center", "--views", 3, "--shard-size", 6, "--out", folder / "base")
    mine("--data", folder / "base", *evit_flags, "--images", "link", "--out", folder / "link")
    return folder


def test_a_link_has_its_base_s_views_and_the_tickets_of_a_direct_run(linked: Path, reference: Path) -> None:
    link = TicketSet.open(str(linked / "link"))
    assert link.manifest.base.path == "../base"
    for split in ("train", "val"):
        base, direct, ours = (samples(folder, split) for folder in (linked / "base", reference, linked / "link"))
        assert list(ours) == list(base)
        for key, sample in ours.items():
            assert np.array_equal(sample.views, base[key].views)
            assert np.array_equal(sample.rankings, direct[key].rankings)
            assert not np.array_equal(sample.rankings, base[key].rankings)
            assert (sample.image, sample.label) == (base[key].image, base[key].label)


def test_a_copy_of_a_ticket_set_is_whole_and_the_same_tars(
    linked: Path, reference: Path, evit_flags: Arguments, tmp_path: Path
) -> None:
    for source in ("base", "link"):
        mine("--data", linked / source, *evit_flags, "--images", "copy", "--out", tmp_path / source)
        copy = TicketSet.open(str(tmp_path / source))
        assert copy.base is None and copy.manifest.base is None
        assert tars(tmp_path / source) == tars(reference)


def test_a_link_to_a_link_leads_to_the_set_with_the_images(linked: Path, tmp_path: Path) -> None:
    shutil.copytree(linked, tmp_path / "sets")
    mine("--data", tmp_path / "sets/link", "--method", "random", "--images", "link", "--out", tmp_path / "second")
    second = TicketSet.open(str(tmp_path / "second"))
    assert second.manifest.base.path == "../sets/base"
    assert second.manifest.base.set_id == TicketSet.open(str(linked / "base")).manifest.set_id
    shutil.rmtree(tmp_path / "sets/link")
    assert samples(tmp_path / "second").keys() == samples(linked / "base").keys()


def test_a_link_of_one_split_is_a_source_like_any_other(linked: Path, tmp_path: Path) -> None:
    common = ["--method", "random", "--images", "link"]
    mine("--data", linked / "base", *common, "--split", "val", "--out", tmp_path / "val")
    assert len(samples(tmp_path / "val", "val")) == 6
    mine("--data", tmp_path / "val", *common, "--out", tmp_path / "again")
    assert list(samples(tmp_path / "again", "val")) == list(samples(tmp_path / "val", "val"))
    assert tars(tmp_path / "again") == tars(tmp_path / "val")


def test_links_live_on_when_both_folders_move_together(linked: Path, tmp_path: Path) -> None:
    shutil.copytree(linked, tmp_path / "far" / "away")
    assert TicketSet.open(str(tmp_path / "far/away/link")).base.url == str(tmp_path / "far/away/base")
    assert samples(tmp_path / "far/away/link").keys() == samples(linked / "link").keys()


def test_a_base_that_moved_is_named_again_with_base(linked: Path, tmp_path: Path) -> None:
    shutil.copytree(linked, tmp_path / "sets")
    (tmp_path / "sets/base").rename(tmp_path / "moved")
    again = ["--data", tmp_path / "sets/link", "--method", "random", "--images", "link", "--out", tmp_path / "again"]
    output = mine(*again, code=1).output
    assert "its images are in a base set that cannot be opened" in output and "--base" in output
    mine(*again, "--base", tmp_path / "moved")
    assert TicketSet.open(str(tmp_path / "again")).manifest.base.path == "../moved"
    assert samples(tmp_path / "again").keys() == samples(linked / "base").keys()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"train": 16, "val": 1}),
        ("--views 4", {"train": 4, "val": 1}),
        ("--views 4 --split train --split val", {"train": 4, "val": 4}),
        ("--views 4 --split val", {"val": 4}),
        ("--split val", {"val": 1}),
    ],
)
def test_views_are_of_train_unless_another_split_is_named(
    photos: Path, tmp_path: Path, flags: str, expected: dict[str, int]
) -> None:
    mine("--data", photos, "--method", "center", *flags.split(), "--out", tmp_path)
    manifest = TicketSet.open(str(tmp_path)).manifest
    assert {name: split.views for name, split in manifest.splits.items()} == expected
    assert {name: len(next(iter(samples(tmp_path, name).values())).views) for name in expected} == expected


@pytest.fixture(scope="module")
def fine(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 8 x 8 patches of 7 pixels."""
    out = tmp_path_factory.mktemp("fine") / "set"
    mine("--data", photos, "--method", "center", "--views", 2, "--img-size", 56, "--patch-size", 7, "--out", out)
    return out


@pytest.mark.parametrize("images", ["link", "copy"])
def test_a_ticket_set_as_source_brings_its_sizes(fine: Path, tmp_path: Path, images: str) -> None:
    words = ["--data", str(fine), "--out", str(tmp_path / "out"), "--method", "random", "--images", images]
    result = CliRunner().invoke(main, [*words, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    manifest = TicketSet.open(str(tmp_path / "out")).manifest
    assert (manifest.img_size, manifest.patch_size, manifest.grid) == (56, 7, (8, 8))
    assert len(next(iter(samples(tmp_path / "out").values())).rankings[0]) == 64
    for flag, there, other in (("--img-size", 56, 64), ("--patch-size", 7, 14)):
        output = mine(*words[:2], *words[4:], "--img-size", 56, flag, other, "--out", tmp_path / "x", code=1).output
        assert output == f"Error: {flag}: the ticket set {fine} is of {there} pixels, got {other}; leave it out\n"
    mine(*words, "--img-size", 56, "--patch-size", 7)  # the same again is no mistake


@pytest.mark.parametrize(
    "flag", ["--views 4", "--seed 0", "--scale 0.5 1", "--hflip 0", "--exif apply", "--shard-size 5"]
)
def test_what_a_base_decides_cannot_be_given(linked: Path, tmp_path: Path, flag: str) -> None:
    words = ["--data", linked / "base", "--method", "random", "--images", "link", "--out", tmp_path / "x"]
    output = mine(*words, *flag.split(), code=1).output
    assert f"{flag.split()[0]}: inherited from the ticket set" in output


def test_linking_to_what_is_no_ticket_set_is_an_error(photos: Path, tmp_path: Path) -> None:
    output = mine("--data", photos, "--method", "random", "--images", "link", "--out", tmp_path / "x", code=1).output
    assert "there is nothing to link to" in output


def test_index_rows_hold_the_numbers_of_view_zero(reference: Path, linked: Path) -> None:
    for row in TicketSet.open(str(reference)).table("train").to_pylist():
        assert 0 < row["mean_score"] < 1 and 0 < row["entropy"] <= math.log2(16) + 1e-6
    for row in TicketSet.open(str(linked / "base")).table("train").to_pylist():
        assert row["entropy"] is None  # center has no distribution


def test_too_many_failures_stop_the_run_and_keep_the_shards_before(photos: Path, tmp_path: Path) -> None:
    source = open_source(str(photos))
    folder = tmp_path / "set"
    plan = small_job(source, folder, 5, 2, views=2, shard_size=4)[0].plan
    order = [source.splits["train"]["key"][int(row)].as_py() for row in shard_rows(plan, source, "train", 2)]

    def read(row: dict[str, Any]) -> tuple[bytes, None]:
        if row["key"] == order[1]:
            raise OSError("unplugged")
        return source.read(row)

    job, producers, _ = small_job(dataclasses.replace(source, read=read), folder, 5, 2, views=2, shard_size=4)
    with pytest.raises(TicketSetError, match="1 images failed, `max_failures` allows 0 .*unplugged"):
        mine_shards(job, job.plan.shards(), producers, Progress(max_failures=0))
    assert sorted(p.name for p in folder.glob("*-*.json")) == ["train-000000.json", "train-000001.json"]
    assert not list(folder.rglob("*.tmp")) and not (folder / "train-000002.tar").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith(("read", "write"))]


def test_a_shard_that_is_given_up_leaves_no_file_and_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: noise.append(found.exc_value))
    with pytest.raises(KeyboardInterrupt), ShardWriter(open_store(tmp_path), "train", 0, 16, "plan") as writer:
        writer.add({"key": "a"}, {"cls": b"1"})
        raise KeyboardInterrupt
    del writer
    gc.collect()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not noise


def test_a_device_without_memory_is_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would say it; never seen on one."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr("miner.run.mine_shards", full)
    output = mine("--data", photos, "--out", tmp_path / "x", "--method", "center", code=1).output.splitlines()[-1]
    assert output == "Error: --device cpu: CUDA out of memory. Tried to allocate 2.00 GiB. Take a smaller --batch-size"
