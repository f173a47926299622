"""--method masks: rankings by true masks, against shares counted by hand; what it does without a mask."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import contents, inspect, mine, write_image
from miner.producers.rankings import entropy_bits
from shards.reader import TicketSet

FLAGS = ["--views", 4, "--shard-size", 10]


@pytest.fixture(scope="module")
def masks(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blob of its own for every photo, anywhere in it."""
    root = tmp_path_factory.mktemp("masks")
    for number, photo in enumerate(sorted(photos.rglob("*_*"))):
        draw = np.random.default_rng(number)
        across, down = np.meshgrid(np.arange(80), np.arange(60))
        x, y, wide, high = (draw.uniform(low, top) for low, top in ((10, 70), (10, 50), (8, 25), (8, 25)))
        inside = ((across - x) / wide) ** 2 + ((down - y) / high) ** 2 < 1
        path = (root / photo.relative_to(photos)).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(inside.astype(np.uint8) * 255).save(path)
    return root


@pytest.fixture(scope="module")
def oracle(photos: Path, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set by the masks; read-only."""
    out = tmp_path_factory.mktemp("oracle") / "set"
    mine("--data", photos, "--method", "masks", "--masks", masks, *FLAGS, "--out", out)
    return out


def cells(count: int) -> np.ndarray:
    """Of each of `count` pixels in a row the patch of four that its center lies in; on a border the first."""
    return -(-(2 * np.arange(count) + 1) * 4 // (2 * count)) - 1


def shares(mask: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Of a 4 x 4 grid, pixel by pixel."""
    top, left, height, width, flip = view.tolist()
    box = mask[top : top + height, left : left + width]
    hits, pixels = np.zeros((4, 4)), np.zeros((4, 4))
    for line, row in zip(box, cells(height), strict=True):
        np.add.at(hits[row], cells(width), line > 0)
        np.add.at(pixels[row], cells(width), 1)
    return (hits / pixels)[:, :: -1 if flip else 1].flatten()


def test_patches_rank_by_how_much_of_them_is_object_in_every_view(oracle: Path, masks: Path, center_set: Path) -> None:
    opened = TicketSet.open(str(oracle))
    seen, missed, flips = 0, 0, 0
    for split in opened.splits:
        rows = {row["key"]: row for row in opened.table(split).to_pylist()}
        for sample in opened.stream(split):
            mask = np.asarray(Image.open((masks / rows[sample.key]["source"]).with_suffix(".png")))
            for view, ranking in zip(sample.views, sample.rankings, strict=True):
                share = shares(mask, view)
                assert (np.diff(share[ranking]) < 1e-6).all(), "falling"
                count = int((share >= 0.5).sum())
                assert (share[ranking[:count]] >= 0.5).all() and (share[ranking[count:]] < 0.5).all()
                seen, flips = seen + count, flips + int(view[4])
            first = shares(mask, sample.views[0])
            assert rows[sample.key]["mean_score"] == pytest.approx(first[sample.rankings[0][: opened.k]].mean())
            assert rows[sample.key]["entropy"] == pytest.approx(entropy_bits(first))
    for sample in TicketSet.open(str(center_set)).stream("train"):
        mask = np.asarray(Image.open((masks / "train" / sample.key.split("/", 1)[1]).with_suffix(".png")))
        share = shares(mask, sample.views[0])
        missed += int((share[sample.rankings[0][int((share >= 0.5).sum()) :]] >= 0.5).sum())
    assert seen > 200 and flips > 10 and missed > 10, "the control, another method, misses some"


def test_score_with_the_same_masks_finds_every_object_patch(oracle: Path, masks: Path, center_set: Path) -> None:
    found, control = (
        json.loads(inspect("score", folder, "--masks", masks, "--tokens", 12, "--json").output)
        for folder in (oracle, center_set)
    )
    assert found["images"] == control["images"] > 15 and found["rows"][0]["ticket"] == 1.0
    assert control["rows"][0]["ticket"] < 0.97


def test_equal_patches_come_in_the_order_of_random(oracle: Path, masks: Path, photos: Path, tmp_path: Path) -> None:
    mine("--data", photos, "--method", "random", *FLAGS, "--out", tmp_path / "random")
    drawn = {sample.key: sample for sample in TicketSet.open(str(tmp_path / "random")).stream("train")}
    rising = []
    for sample in TicketSet.open(str(oracle)).stream("train"):
        mask = np.asarray(Image.open((masks / "train" / sample.key.split("/", 1)[1]).with_suffix(".png")))
        for view, ranking, other in zip(sample.views, sample.rankings, drawn[sample.key].rankings, strict=True):
            background = [patch for patch in ranking.tolist() if shares(mask, view)[patch] == 0]
            assert background == [patch for patch in other.tolist() if patch in background]
            rising.append(background == sorted(background))
    assert not all(rising[:20])


def test_an_image_without_a_mask_or_with_one_that_is_none_fails_with_its_reason(photos, masks, tmp_path) -> None:
    few = Path(shutil.copytree(masks, tmp_path / "masks"))
    (few / "train/ant/ant_0.png").unlink()
    Image.new("L", (80, 60), 1).save(few / "train/bee/bee_1.png")
    Image.new("L", (60, 80), 255).save(few / "train/cat/cat_2.png")
    words = ["--data", photos, "--method", "masks", "--masks", few, *FLAGS, "--out", tmp_path / "set"]
    line = mine(*words, code=1).output.splitlines()[-1]
    assert "images failed" in line and "has no mask: expected a PNG of its name in" in line
    mine(*words, "--max-failures", 1)
    rows = {row["source"]: row for row in TicketSet.open(str(tmp_path / "set")).table("train").to_pylist()}
    failed = {source: row["error"] for source, row in rows.items() if row["status"] != "ok"}
    assert sorted(failed) == ["train/ant/ant_0.jpg", "train/bee/bee_1.jpg", "train/cat/cat_2.png"]
    assert "no mask" in failed["train/ant/ant_0.jpg"]
    assert "expected 255 on the object and 0 elsewhere, got 1 at most" in failed["train/bee/bee_1.jpg"]
    assert "expected the shape of the image, 80x60, got 60x80" in failed["train/cat/cat_2.png"]


def test_an_empty_mask_is_an_image_like_another(photos, masks, tmp_path) -> None:
    others = Path(shutil.copytree(masks, tmp_path / "masks"))
    Image.new("L", (80, 60)).save(others / "train/ant/ant_0.png")
    mine("--data", photos, "--method", "masks", "--masks", others, *FLAGS, "--out", tmp_path / "set")
    row = next(r for r in TicketSet.open(str(tmp_path / "set")).table("train").to_pylist() if "ant_0" in r["source"])
    assert (row["status"], row["mean_score"], row["entropy"]) == ("ok", 0.0, None)


def test_masks_are_of_the_frame_that_boxes_are_in(tmp_path: Path) -> None:
    """With --exif apply upright; a mask drawn on the file's own frame is refused, as one on the wrong image would be."""
    write_image(tmp_path / "photo.jpg", 0)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo = tmp_path / "data/train/ant/a.jpg"
    photo.parent.mkdir(parents=True)
    Image.open(tmp_path / "photo.jpg").save(photo, exif=turned)
    (tmp_path / "masks/ant").mkdir(parents=True)  # found without the split's folder, too
    upright = np.zeros((80, 60), np.uint8)
    upright[:30] = 255
    Image.fromarray(upright).save(tmp_path / "masks/ant/a.png")
    words = ["--data", tmp_path / "data", "--val-share", 0, "--method", "masks", "--masks", tmp_path / "masks"]
    words += ["--max-failures", 1, "--views", 1]
    for exif in ("apply", "ignore"):
        mine(*words, "--exif", exif, "--tokens", 4, "--out", tmp_path / exif)
    (sample,) = TicketSet.open(str(tmp_path / "apply")).stream("train")
    assert sorted(sample.rankings[0][:4].tolist()) == [0, 1, 2, 3]
    (row,) = TicketSet.open(str(tmp_path / "ignore")).table("train").to_pylist()
    assert "expected the shape of the image, 80x60, got 60x80" in row["error"]


def test_the_plan_knows_the_masks_by_their_names_and_sizes(photos, masks, oracle, tmp_path) -> None:
    others = Path(shutil.copytree(masks, tmp_path / "masks"))
    words = ["--data", photos, "--method", "masks", *FLAGS]
    mine(*words, "--masks", others, "--out", tmp_path / "set")
    assert contents(tmp_path / "set") == contents(oracle), "wherever they lie"
    with (others / "val/cat/cat_1.png").open("ab") as file:
        file.write(b"\0")
    line = mine(*words, "--masks", others, "--out", tmp_path / "set", code=1).output
    assert "another plan (selector.state" in line


@pytest.mark.slow
def test_elastic_workers_ranks_links_and_ranked_views_have_the_same_rankings(
    photos, masks, oracle, center_set, tmp_path, monkeypatch
) -> None:
    words = ["--data", photos, "--method", "masks", "--masks", masks, *FLAGS]
    mine(*words, "--elastic", "--out", tmp_path / "elastic")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        mine(*words, "--out", tmp_path / "ranks")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    whole = contents(oracle)
    assert contents(tmp_path / "ranks") == whole
    assert {name: data for name, data in contents(tmp_path / "elastic").items() if name.endswith(".tar")} == {
        name: data for name, data in whole.items() if name.endswith(".tar")
    }
    mine("--data", oracle, "--images", "ranked", "--out", tmp_path / "kept")
    mine("--data", center_set, "--images", "link", "--method", "masks", "--masks", masks, "--out", tmp_path / "link")
    known = {sample.key: sample for sample in TicketSet.open(str(oracle)).stream("train")}
    for name, views in (("kept", 4), ("link", 3)):
        for sample in TicketSet.open(str(tmp_path / name)).stream("train"):
            assert np.array_equal(sample.rankings, known[sample.key].rankings[:views])


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--method", "masks"], 2, "--method masks: expected --masks DIR beside method masks, and beside no other"),
        (["--method", "center", "--masks", "{masks}"], 2, "--method center: expected --masks DIR beside method masks"),
        (["--method", "masks", "--masks", "{tmp}/none"], 1, "--masks {tmp}/none: no such folder"),
        (["--method", "masks", "--masks", "{tmp}"], 1, "--masks {tmp}: expected PNGs, one an image, got none"),
        (["--method", "masks", "--masks", "{masks}", "--selector", "test_vit"], 1, "--method masks uses no model"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(flags, code, words, photos, masks, tmp_path) -> None:
    known = {"masks": masks, "tmp": tmp_path}
    said = mine("--data", photos, "--out", tmp_path / "x", *(flag.format(**known) for flag in flags), code=code).output
    assert words.format(**known) in said.splitlines()[-1] and not (tmp_path / "x").exists()
