"""Ranked views as they are mined: whose pixels a ticket is of, what is kept of a ticket set, the same bytes, refusals."""

import dataclasses
import errno
import io
import multiprocessing
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
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import save_file

import miner.producers.ranked as ranked_producer
import miner.writer
from conftest import SELECTOR, contents, inspect, mine
from inputs import open_source
from miner.job import Job, mine_shard, mine_shards
from miner.producers import build_models
from miner.producers.producer import Image
from miner.settings import Geometry, Labeling, Machine, Selection
from shards.errors import TicketSetError
from shards.ranked import Mosaic, decoded, statistics
from shards.reader import TicketSet
from shards.sample import Sample
from shards.store import open_store

pytestmark = pytest.mark.slow  # mines sets

Arguments = list[object]
QUALITY = 40  # low, so that decoded views rank otherwise than rendered ones
RANKED = ["--images", "ranked", "--quality", QUALITY]


@pytest.fixture(scope="module")
def selector(weights: Path) -> Arguments:
    return ["--selector", SELECTOR, "--weights", weights, "--keep-rate", 0.7, "-b", 4]


@pytest.fixture(scope="module")
def drawn(photos: Path) -> Arguments:
    """3 views of train, 1 of val; shards of 6, 6, 6 and 3 images, and of 6; 4 x 4 patches."""
    return ["--data", photos, "--views", 3, "--shard-size", 6]


@pytest.fixture(scope="module")
def sets(selector: Arguments, drawn: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same views as a copy, as ranked views; of the copy a link with tickets at random, and its val ranked; read-only."""
    root = tmp_path_factory.mktemp("sets") / "sets"
    mine(*drawn, *selector, "--out", root / "copy")
    mine(*drawn, *selector, *RANKED, "--out", root / "ranked")
    mine("--data", root / "copy", "--images", "link", "--method", "random", "--tokens", 5, "--out", root / "link")
    mine("--data", root / "link", *RANKED, "--split", "val", "--out", root / "kept")
    return root


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`mine` as one rank of several."""

    def run(rank: int, world: int, *arguments: object) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(world))
            return mine(*arguments)

    return run


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of the commands that a test runs."""
    found: list[Job] = []
    monkeypatch.setattr("miner.run.mine_shards", lambda job, *rest: (found.append(job), mine_shards(job, *rest))[1])
    return found


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def samples(folder: Path, split: str = "train") -> dict[str, Sample]:
    return {sample.key: sample for sample in TicketSet.open(str(folder)).stream(split)}


def all_views(sample: Sample) -> np.ndarray:
    return sample.render(range(len(sample.views)), 64)


# --- whose pixels a ticket is of


def test_a_ticket_is_of_the_pixels_that_are_stored(sets: Path, weights: Path) -> None:
    geometry, machine = Geometry(img_size=64, views=3), Machine(4, device="cpu")
    (rankings,) = build_models(Selection(SELECTOR, str(weights), keep_rate=0.7), Labeling(), geometry, machine, ())

    def rank(key: str, pixels: np.ndarray) -> np.ndarray:
        image = Image({"key": key}, inputs={"selector": pixels})
        return rankings.submit([(image, number) for number in range(len(pixels))])[0].numpy()

    found = {}
    for kind in ("ranked", "copy"):
        for split in ("train", "val"):
            for key, sample in samples(sets / kind, split).items():
                found[kind, key] = sample.rankings
                assert np.array_equal(sample.rankings, rank(key, all_views(sample))), key
    # The negative control: these pixels differ enough for it to matter.
    differing = [key for kind, key in found if not np.array_equal(found["ranked", key], found["copy", key])]
    assert differing


def test_stored_pixels_are_the_views_as_a_jpeg_gives_them(sets: Path) -> None:
    """Every view of train, and the one of val; the boxes are those of a copy."""
    mosaic = Mosaic((4, 4), 16, 16, 16)
    for split, views in (("train", 3), ("val", 1)):
        copy = samples(sets / "copy", split)
        for key, sample in samples(sets / "ranked", split).items():
            photo = all_views(copy[key])
            assert np.array_equal(sample.views, copy[key].views) and len(sample.views) == views == len(photo)
            expected = np.stack([decoded(view, mosaic, QUALITY) for view in photo])
            assert np.array_equal(all_views(sample), expected) and not np.array_equal(expected, photo)
            assert [sample.ranked.statistics(number) for number in range(views)] == [statistics(v) for v in expected]
    assert inspect("verify", sets / "ranked", "--deep")


# --- what is kept of a ticket set


@pytest.mark.parametrize("name", ["copy", "link"])
def test_rankings_of_a_ticket_set_are_kept(sets: Path, tmp_path: Path, name: str) -> None:
    """Byte by byte; whatever the selector was, it is not asked again."""
    output = mine("--data", sets / name, *RANKED, "--out", tmp_path / "kept").output
    assert f"rankings are kept from {sets / name}" in output
    there, kept = TicketSet.open(str(sets / name)), TicketSet.open(str(tmp_path / "kept"))
    assert kept.manifest.ranked and not kept.manifest.ranked.decoded and kept.base is None
    assert kept.manifest.selector == there.manifest.selector and kept.k == there.k
    mosaic = Mosaic((4, 4), 16, 16, 16)
    for split in there.splits:
        columns = ["key", "source", "label", "ticket", "mean_score", "entropy", "width", "height"]
        assert kept.table(split).select(columns).equals(there.table(split).select(columns))
        photos = samples(sets / name, split)
        assert list(samples(tmp_path / "kept", split)) == list(photos)
        for key, sample in samples(tmp_path / "kept", split).items():
            assert np.array_equal(sample.rankings, photos[key].rankings)
            assert np.array_equal(sample.views, photos[key].views)
            expected = [decoded(view, mosaic, QUALITY) for view in all_views(photos[key])]
            assert np.array_equal(all_views(sample), np.stack(expected))
            assert [sample.ranked.statistics(number) for number in range(len(expected))] == list(
                map(statistics, expected)
            )
    inspect("verify", tmp_path / "kept", "--deep")


@pytest.mark.parametrize("name", ["copy", "link"])
def test_a_selector_that_is_asked_for_ranks_anew(sets: Path, selector: Arguments, tmp_path: Path, name: str) -> None:
    output = mine("--data", sets / name, *selector, *RANKED, "--out", tmp_path / "set").output
    assert "mined on the pixels that are stored" in output and "kept" not in output
    assert TicketSet.open(str(tmp_path / "set")).manifest.ranked.decoded
    assert tars(tmp_path / "set") == tars(sets / "ranked")


def test_a_method_that_is_typed_ranks_anew_even_if_it_is_the_default(sets: Path, tmp_path: Path) -> None:
    """evit of pretrained weights, which are not here: it is asked for all the same."""
    output = mine("--data", sets / "copy", "--method", "evit", *RANKED, "--out", tmp_path / "x", code=1).output
    assert "deit_small" in output
    mine("--data", sets / "copy", "--method", "center", *RANKED, "--out", tmp_path / "set")
    assert TicketSet.open(str(tmp_path / "set")).manifest.selector.method == "center"


def test_the_plan_says_what_differs(sets: Path, drawn: Arguments, tmp_path: Path) -> None:
    undecoded = "mined on undecoded pixels: on those stored here a few patches may rank differently"
    assert undecoded in mine("--data", sets / "copy", *RANKED, "--out", tmp_path / "kept").output
    random = mine("--data", sets / "link", "--images", "ranked", "--store-tokens", 8, "--out", tmp_path / "link").output
    assert undecoded not in random and "pixels that are stored" not in random  # it looked at none
    assert "ranked views  the best 8 of 16 patches of a view, JPEG quality 90\n" in random
    whole = mine(*drawn, "--method", "center", *RANKED, "--out", tmp_path / "center").output
    assert f"ranked views  all 16 patches of a view, JPEG quality {QUALITY}\n" in whole and "kept" not in whole


def test_settings_of_a_model_that_is_not_asked_are_refused(sets: Path, tmp_path: Path) -> None:
    for flag in ("--amp", "--torchcompile"):
        output = mine("--data", sets / "copy", *RANKED, flag, "--out", tmp_path / "x", code=1).output
        assert output == f"Error: {flag}: the rankings of --data are kept, without a model; leave it out\n"


def test_the_estimate_is_of_the_right_size(photos: Path, tmp_path: Path) -> None:
    """Of pictures that are no photos: within a factor, but with every view in it."""
    words = ["--data", photos, "--method", "center", "--views", 8, "--images", "ranked", "--split", "train"]
    output = mine(*words, "--out", tmp_path).output
    (line,) = [line for line in output.splitlines() if line.startswith("output")]
    number, unit = line.split("about ")[1].split()
    size = sum(len(data) for data in tars(tmp_path).values())
    assert 0.4 < float(number) * {"kB": 1e3, "MB": 1e6}[unit] / size < 2.5


# --- the same plan, the same bytes


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_byte(
    sets: Path, selector: Arguments, drawn: Arguments, tmp_path: Path, workers: int
) -> None:
    mine(*drawn, *selector, *RANKED, "-j", workers, "--out", tmp_path)
    assert contents(tmp_path) == contents(sets / "ranked")


def test_ranks_give_the_same_bytes(
    sets: Path, selector: Arguments, drawn: Arguments, tmp_path: Path, as_rank: Callable[..., Any]
) -> None:
    as_rank(1, 2, *drawn, *selector, *RANKED, "--out", tmp_path)
    assert {path.stem for path in tmp_path.glob("*.tar")} == {"train-000001", "train-000003"}
    as_rank(0, 2, *drawn, *selector, *RANKED, "--out", tmp_path)
    assert contents(tmp_path) == contents(sets / "ranked")


@pytest.mark.long
def test_a_job_mines_the_same_bytes_in_another_process(
    sets: Path, selector: Arguments, drawn: Arguments, tmp_path: Path, captured: list[Job], monkeypatch: Any
) -> None:
    """Of photos, and of a linked set whose rankings are kept."""
    mine(*drawn, *selector, *RANKED, "--out", tmp_path / "photos")
    mine("--data", sets / "link", *RANKED, "--out", tmp_path / "link")
    todo = []
    for job, name in zip(captured, ("photos", "link"), strict=True):
        again = tmp_path / f"{name}-again"
        again.mkdir()
        shutil.copy(job.store.at("plan.json"), again)
        todo += [(dataclasses.replace(job, store=open_store(again)), *shard) for shard in job.plan.shards()]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.starmap(mine_shard, todo, chunksize=1)
    assert tars(tmp_path / "photos-again") == tars(sets / "ranked")
    assert tars(tmp_path / "link-again") == tars(tmp_path / "link") != {}


def test_killed_and_resumed_gives_the_same_bytes(sets: Path, tmp_path: Path) -> None:
    words = ["--data", sets / "copy", "--img-size", 64, *RANKED, "--out", tmp_path / "set", "-j", 2]
    slow = "import shards.ranked as r, time; e = r._encode; r._encode = lambda *a: (time.sleep(0.02), e(*a))[1]"
    killed = [sys.executable, "-c", f"{slow}; import miner.cli; miner.cli.main()", *map(str, words)]
    process = subprocess.Popen(killed, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "set").glob("*-0*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert list((tmp_path / "set").glob("*-0*.json")) and not (tmp_path / "set/manifest.json").exists()
    mine(*words)
    mine(*words[:-4], "--out", tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(errno.EMFILE, "Too many open files", "view"), 1, "allow more open files"),
        (KeyboardInterrupt(), 130, "finished shards are safe"),
    ],
)
def test_what_is_raised_while_encoding_stops_the_run_and_leaves_the_shards_before(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    original, calls = ranked_producer.encode_ranked, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 9:
            raise error
        return original(*arguments)

    words = ["--data", sets / "copy", *RANKED, "--out", tmp_path / "set", "-j", 1]
    with monkeypatch.context() as patch:
        patch.setattr(ranked_producer, "encode_ranked", failing)
        assert expected in mine(*words, code=code).output
    assert [path.name for path in (tmp_path / "set").glob("*.tar")] == ["train-000000.tar"]
    assert not list((tmp_path / "set").rglob("*.tmp"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read", "write", "encode"))]
    mine(*words)
    mine(*words[:-4], "--out", tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_views_that_wait_for_an_encoder_are_bounded(
    sets: Path, tmp_path: Path, captured: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine("--data", sets / "copy", *RANKED, "--split", "train", "--out", tmp_path / "set", "-j", 1)
    (job,) = captured
    original, tickets = ranked_producer.encode_ranked, job.source.tickets

    def peak(most: int, patience: float) -> int:
        """Images read and not yet encoded, at most, of 21, when encoding stands still at the first until all are read."""
        seen, all_read = {"read": 0, "encoded": 0, "peak": 0}, threading.Event()

        def read(row: dict[str, Any]) -> Any:
            seen["read"] += 1
            seen["peak"] = max(seen["peak"], seen["read"] - seen["encoded"])
            if seen["read"] == 21:
                all_read.set()
            return tickets.read(row)

        def encode(*arguments: Any) -> Any:
            if not seen["encoded"]:
                all_read.wait(patience)
            seen["encoded"] += 1
            return original(*arguments)

        folder = tmp_path / str(most)
        folder.mkdir()
        shutil.copy(job.store.at("plan.json"), folder)
        monkeypatch.setattr(miner.writer, "WAITING_BYTES", most)
        monkeypatch.setattr(ranked_producer, "encode_ranked", encode)
        source = dataclasses.replace(job.source, tickets=tickets._replace(read=read))
        mine_shards(dataclasses.replace(job, store=open_store(folder), source=source), job.plan.shards())
        assert seen["read"] == seen["encoded"] == 21
        return seen["peak"]

    image = 3 * 3 * 64 * 64  # bytes of its views
    # 1 read ahead and 1 in its thread, 1 in hand, 3 before the writer, 1 in it: each leg may hold one more for a moment.
    assert peak(3 * image, patience=0.5) <= 9
    # The negative control: nothing but 64 images bounds them.
    assert peak(1 << 30, patience=30) > 18


# --- settings of it


def test_patches_beyond_those_stored_are_left_out(sets: Path, tmp_path: Path) -> None:
    """5 is rounded up to two rows; statistics stay those of whole views."""
    words = ["--data", sets / "link", *RANKED]
    mine(*words, "--out", tmp_path / "whole")
    mine(*words, "--store-tokens", 5, "--out", tmp_path / "cut")
    assert TicketSet.open(str(tmp_path / "cut")).manifest.ranked.tokens == 8
    whole = samples(tmp_path / "whole")
    for key, sample in samples(tmp_path / "cut").items():
        for number in range(3):
            assert np.array_equal(sample.ranked.patches(number, 8), whole[key].ranked.patches(number, 8))
            assert sample.ranked.statistics(number) == whole[key].ranked.statistics(number)
        with pytest.raises(TicketSetError, match="at most 8 patches, all that is stored of a view, got 9"):
            sample.ranked.patches(0, 9)
    inspect("verify", tmp_path / "cut", "--deep")


@pytest.mark.parametrize("tokens", [4, 17])
def test_fewer_than_a_ticket_or_more_than_a_view_cannot_be_stored(sets: Path, tmp_path: Path, tokens: int) -> None:
    output = mine("--data", sets / "link", *RANKED, "--store-tokens", tokens, "--out", tmp_path / "x", code=1).output
    assert output == f"Error: --store-tokens {tokens}: expected K = 5, a ticket, to N = 16, a view\n"


def test_a_selector_sees_views_whose_patches_are_not_all_stored(
    sets: Path, selector: Arguments, drawn: Arguments, tmp_path: Path
) -> None:
    mine(*drawn, *selector, *RANKED, "--store-tokens", 7, "--out", tmp_path)
    whole = samples(sets / "ranked")
    for key, sample in samples(tmp_path).items():
        assert np.array_equal(sample.rankings, whole[key].rankings)
        assert [sample.ranked.statistics(n) for n in range(3)] == [whole[key].ranked.statistics(n) for n in range(3)]
        assert sample.ranked.jpeg(2) == whole[key].ranked.jpeg(2, 8)


def test_quality_is_that_of_the_jpegs(sets: Path, tmp_path: Path) -> None:
    words = ["--data", sets / "copy", "--images", "ranked"]
    sizes = []
    for flags, quality in (([], 90), (["--quality", 10], 10)):
        out = tmp_path / str(quality)
        mine(*words, *flags, "--out", out)
        assert TicketSet.open(str(out)).manifest.ranked.quality == quality
        data = next(iter(samples(out).values())).ranked.jpeg(0)
        expected = io.BytesIO()
        Pillow.new("RGB", (8, 8)).save(expected, "JPEG", quality=quality)
        tables = [Pillow.open(io.BytesIO(d)).quantization for d in (data, expected.getvalue())]
        assert tables[0] == tables[1]
        sizes.append(len(data))
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("flag", ["--quality 80", "--store-tokens 8"])
def test_settings_of_ranked_views_are_refused_elsewhere(photos: Path, tmp_path: Path, flag: str) -> None:
    words = ["--data", photos, "--method", "center", *flag.split(), "--out", tmp_path / "x"]
    output = mine(*words, code=2).output
    assert f"{flag.split()[0]}: of ranked views; expected --images ranked beside it, got copy" in output


@pytest.mark.parametrize(("img_size", "patch_size", "cell"), [(56, 14, 16), (64, 8, 8), (32, 16, 16), (64, 32, 32)])
def test_patches_are_stored_in_whole_blocks(
    photos: Path, tmp_path: Path, img_size: int, patch_size: int, cell: int
) -> None:
    geometry = ["--img-size", img_size, "--patch-size", patch_size, "--views", 2, "--tokens", 3, "--limit", 4]
    words = ["--data", photos, "--method", "random", *geometry]
    mine(*words, "--out", tmp_path / "copy")
    mine(*words, *RANKED, "--quality", 100, "--out", tmp_path / "ranked")
    assert TicketSet.open(str(tmp_path / "ranked")).manifest.ranked.cell == cell
    copy = samples(tmp_path / "copy")
    for key, sample in samples(tmp_path / "ranked").items():
        found, expected = sample.render([0, 1], img_size), copy[key].render([0, 1], img_size)
        assert np.abs(found.astype(int) - expected).mean() < 1.5 < np.abs(expected[0].astype(int) - expected[1]).mean()
    inspect("verify", tmp_path / "ranked", "--deep")


@pytest.mark.parametrize(("img_size", "patch_size"), [(56, 7), (60, 12)])
def test_patches_that_leave_more_of_a_block_empty_are_refused(
    photos: Path, tmp_path: Path, img_size: int, patch_size: int
) -> None:
    words = ["--data", photos, "--method", "center", "--img-size", img_size, "--patch-size", patch_size, *RANKED]
    output = mine(*words, "--out", tmp_path / "x", code=1).output
    assert output == f"Error: --patch-size {patch_size}: expected multiples of 8 px, or 14, to store ranked views\n"


def test_token_labels_are_those_of_the_photos(sets: Path, tmp_path: Path) -> None:
    """Beside rankings that are kept, and beside those that are mined: of the whole photo, as in a copy."""
    torch.manual_seed(0)
    import timm

    model = timm.create_model("test_resnet", num_classes=3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "labeler.safetensors")
    labels = ["--token-labels", "test_resnet", "--token-label-weights", tmp_path / "labeler.safetensors"]
    words = ["--data", sets / "copy", "--split", "val", *labels]
    mine(*words, "--method", "random", "--out", tmp_path / "copy")
    mine(*words, *RANKED, "--out", tmp_path / "kept")
    mine(*words, *RANKED, "--method", "random", "--out", tmp_path / "ranked")
    expected, kept, ranked = (samples(tmp_path / name, "val") for name in ("copy", "kept", "ranked"))
    for key, sample in expected.items():
        assert np.array_equal(kept[key].token_labels, sample.token_labels)
        assert np.array_equal(ranked[key].token_labels, sample.token_labels)
        assert np.array_equal(ranked[key].rankings, sample.rankings)
        assert not np.array_equal(kept[key].rankings, sample.rankings)
    # Of a set that has them, and of one that is linked, they are kept beside the rankings.
    mine("--data", tmp_path / "copy", "--images", "link", "--method", "center", "--out", tmp_path / "link")
    for source, name in (("copy", "both"), ("link", "of-base")):
        output = mine("--data", tmp_path / source, *RANKED, "--out", tmp_path / name).output
        assert f"rankings and token labels are kept from {tmp_path / source}" in output
        found = samples(tmp_path / name, "val")
        assert all(np.array_equal(found[key].token_labels, expected[key].token_labels) for key in expected)
        assert TicketSet.open(str(tmp_path / name)).manifest.token_labels is not None
    for name in ("kept", "ranked", "both", "of-base"):
        inspect("verify", tmp_path / name, "--deep")


# --- images that fail, and sets that are there


def test_a_broken_photo_is_a_failed_row_that_can_be_mended(
    photos: Path, selector: Arguments, drawn: Arguments, sets: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "photos"
    shutil.copytree(photos, broken)
    victim = broken / "train/bee/bee_3.jpg"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    words = ["--data", broken, *drawn[2:], *selector, *RANKED, "--out", tmp_path / "set", "--max-failures", 0.5]
    mine(*words)
    rows = TicketSet.open(str(tmp_path / "set")).table("train").to_pylist()
    assert {row["source"]: row["status"] for row in rows if row["status"] != "ok"} == {"train/bee/bee_3.jpg": "failed"}
    inspect("verify", tmp_path / "set", "--deep")

    before = contents(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    (tmp_path / "set/train-000000.json").unlink()
    assert "resuming: 4 of 5 shards are done" in mine(*words).output
    assert contents(tmp_path / "set") == before

    victim.write_bytes(whole)
    assert tars(tmp_path / "set") != tars(sets / "ranked")
    mine(*words, "--retry-failed")
    assert tars(tmp_path / "set") == tars(sets / "ranked")


def test_another_kind_of_set_in_the_same_folder(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(sets / "ranked", out)
    words = ["--data", sets / "copy", "--images", "ranked", "--out", out]
    output = mine(*words, code=1).output
    assert "ranked.quality: 40 there, 90 here" in output and contents(out) == contents(sets / "ranked")
    mine(*words, "--overwrite")
    mine(*words[:-1], tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_limit_takes_the_first_images(photos: Path, tmp_path: Path) -> None:
    words = ["--data", photos, "--method", "center", "--views", 2, *RANKED]
    mine(*words, "--out", tmp_path / "all")
    mine(*words, "--limit", 4, "--out", tmp_path / "few")
    few, whole = samples(tmp_path / "few"), samples(tmp_path / "all")
    assert list(few) == list(whole)[:4]
    assert all(few[key].ranked.data() == whole[key].ranked.data() for key in few)


@pytest.mark.parametrize(
    "flags",
    ["", "--images link --method random", "--images ranked", "--exif apply", "--store-side 32", "--img-size 32"]
    + ["--images link --method none --token-labels test_resnet"],
)
def test_a_set_without_photos_is_no_source(sets: Path, tmp_path: Path, flags: str) -> None:
    words = ["--data", sets / "ranked", "--out", tmp_path / "x", *flags.split()]
    lacks = "holds ranked views of 64 px and no photos, which mining needs; expected"
    output = mine(*words, code=1).output
    assert output == f"Error: --data {sets / 'ranked'}: {lacks} the photos that it was made of\n"
    output = mine("--data", sets / "kept", *words[2:], code=1).output
    made_of = TicketSet.open(str(sets / "copy")).manifest.set_id[:12]  # of the link's base: it has the images
    assert output == f"Error: --data {sets / 'kept'}: {lacks} the ticket set {made_of} that it was made of\n"
    assert not (tmp_path / "x").exists()


def test_a_set_that_was_taken_from_a_pickled_source_is_the_same(sets: Path) -> None:
    import pickle

    source = open_source(sets / "link")
    copy = pickle.loads(pickle.dumps(source))
    for row in source.splits["train"].to_pylist():
        ours, theirs = source.tickets.read(row), copy.tickets.read(row)
        assert ours[0] == theirs[0] and np.array_equal(ours[1], theirs[1])
        assert np.array_equal(ours[2].rankings, theirs[2].rankings) and ours[2][1:] == theirs[2][1:]
