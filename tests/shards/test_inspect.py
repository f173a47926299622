"""The inspect commands: what they print, draw and import."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import SELECTOR, inspect, mine
from servers import upload
from shards.console import size
from shards.errors import ImageError
from shards.inspect import draw, pictures
from shards.inspect.compare import overlap
from shards.inspect.draw import rank_tile, ticket_tile, view_tile
from shards.inspect.score import recall
from shards.masks import object_shares
from shards.reader import TicketSet
from shards.views import center_ranking

KEY = "train/ant/ant_0"


@pytest.fixture(scope="module")
def linked(center_set: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tickets of a real selector over the images of `center_set`."""
    out = tmp_path_factory.mktemp("linked") / "evit"
    mine("--data", center_set, "--out", out, "--images", "link", "--selector", SELECTOR, "--weights", weights)
    return out


@pytest.fixture(scope="module")
def masks(center_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every image the mask of its right half."""
    root = tmp_path_factory.mktemp("masks")
    for row in TicketSet.open(str(center_set)).table("train").to_pylist():
        mask = np.zeros((row["height"], row["width"]), np.uint8)
        mask[:, row["width"] // 2 :] = 255
        path = (root / row["source"]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return root


def commands(folder: Path | str, other: Path | str, masks: Path, out: Path) -> list[list[str]]:
    return [
        ["info", str(folder)],
        ["ls", str(folder)],
        ["show", str(folder), KEY, "-o", str(out / "show.png")],
        ["sheet", str(folder), "-o", str(out / "sheet.png")],
        ["stats", str(folder), "-o", str(out / "stats.png")],
        ["explore", str(folder), str(other), "-o", str(out / "explore.html")],
        ["verify", str(folder), "--deep"],
        ["diff", str(folder), str(other)],
        ["score", str(folder), "--masks", str(masks)],
    ]


@pytest.mark.slow
def test_no_inspect_command_and_no_help_imports_torch_or_webdataset(center_set, linked, cut_set, masks, tmp_path):
    """All in one fresh process, on a linked set and a ranked one; the negative control is the miner's own run module."""
    runs = commands(linked, center_set, masks, tmp_path)
    runs += commands(cut_set, center_set, masks, tmp_path)
    helps = [["--help"], *([name, "--help"] for name, *_ in runs)]
    code = f"""
import sys
from click.testing import CliRunner
import miner.cli, shards.inspect.cli
for arguments in {runs + helps!r}:
    result = CliRunner().invoke(shards.inspect.cli.main, arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
assert CliRunner().invoke(miner.cli.main, ["--help"]).exit_code == 0
heavy = {{"torch", "webdataset", "timm", "torchvision"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import miner.run
assert heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ("show", "sheet", "stats"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_info_says_what_a_set_is(center_set, linked):
    text = inspect("info", linked).output
    assert f"evit of {SELECTOR}" in text and "K = 13 of 16 patches, keep rate 0.9 a stage" in text
    assert f"linked from {center_set}" in text
    assert json.loads(inspect("info", linked, "--json").output)["k"] == 13


def test_info_says_how_views_are_stored(center_set, ranked_set, cut_set, tmp_path):
    line = "quality 90, {} of 16 patches stored, as the selector saw them; "
    assert line.format(16) in inspect("info", ranked_set).output
    assert line.format(8) in inspect("info", cut_set).output
    mine("--data", center_set, "--out", tmp_path / "kept", "--images", "ranked")
    text = inspect("info", tmp_path / "kept").output
    assert "the selector saw them before they were stored" in text and "none: ranked views in their place" in text
    assert f"; {size_of_a_view(tmp_path / 'kept')} each" in text and "ranked views  tickets a sample" in text


def size_of_a_view(folder: Path) -> str:
    """Counted in the set itself."""
    opened = TicketSet.open(str(folder))
    sizes = [sample.ranked.size / len(sample.views) for split in opened.splits for sample in opened.stream(split)]
    weights = [len(sample.views) for split in opened.splits for sample in opened.stream(split)]
    return size(float(np.average(sizes, weights=weights)))


def test_ls_filters_by_split_label_and_status(center_set):
    rows = [json.loads(line) for line in inspect("ls", center_set, "-n", 0, "--json").output.splitlines()]
    assert len(rows) == 27 and rows[0]["ticket"] == "eff6"  # all but patches 3, 12, 15
    one = [
        json.loads(x)
        for x in inspect("ls", center_set, "--split", "val", "--label", "bee", "--json").output.splitlines()
    ]
    assert [r["label"] for r in one] == [1, 1] and {r["split"] for r in one} == {"val"}
    assert inspect("ls", center_set, "--status", "failed", "--json").output == ""
    assert "20 of 27 rows" in inspect("ls", center_set).output
    assert "expected a class name or a number below 3" in inspect("ls", center_set, "--label", "dog", code=1).output


def test_show_prints_views_and_tickets(center_set):
    shown = json.loads(inspect("show", center_set, KEY, "--json").output)
    assert len(shown["views"]) == 3 and shown["views"][0]["flip"] == 0 and len(shown["tickets"][0]) == 13
    assert "no sample has the key" in inspect("show", center_set, "nobody", code=1).output


def test_show_takes_the_file_that_a_sample_was_mined_from(center_set, photos, linked):
    by_key = inspect("show", center_set, KEY).output
    for name in ("train/ant/ant_0.jpg", photos / "train/ant/ant_0.jpg", "./photos/train/ant/ant_0.jpg"):
        assert inspect("show", center_set, name).output == by_key
    for name in ("ant_0.jpg", "other/train/ant/ant_0.png", "xtrain/ant/ant_0.jpg"):
        assert "no sample has the key" in inspect("show", center_set, name, code=1).output
    assert inspect("show", linked, f"{KEY}.jpg", "--split", "train").output.split()[:2] == ["split", "train"]


def test_show_asks_which_of_several_samples_is_meant(photos, tmp_path):
    for name in ("a/x.jpg", "a/x.png", "x/a/x.jpg"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "val/bee/bee_0.jpg", path)
    mine("--data", tmp_path / "data", "--out", tmp_path / "set", "--method", "center", "--val-share", 0)
    found = json.loads(inspect("show", tmp_path / "set", "a/x.png", "--json").output)
    assert (found["split"], found["key"], found["class"], found["label"]) == ("train", "a/x-1", "a", 0)
    assert json.loads(inspect("show", tmp_path / "set", "data/x/a/x.png/a/x.png", "--json").output)["key"] == "a/x-1"
    output = inspect("show", tmp_path / "set", "data/x/a/x.jpg", code=1).output
    assert output.endswith("'data/x/a/x.jpg' is a/x in train, x/a/x in train; give a key, and its --split\n")


def test_show_is_for_people_and_its_json_for_programs(linked):
    rows = dict(line.split(maxsplit=1) for line in inspect("show", linked, KEY).output.split("\n\n")[0].splitlines())
    exact = json.loads(inspect("show", linked, KEY, "--json").output)
    assert rows["label"] == "0 (ant)" and (exact["label"], exact["class"]) == (0, "ant")
    for name in ("mean_score", "entropy"):
        assert len(rows[name]) <= 7 and float(rows[name]) == pytest.approx(exact[name], rel=1e-3)


@pytest.mark.parametrize(("classes", "per_class"), [(10, 3), (3, 3), (100, 3), (1000, 1), (1000, 3), (7, 1)])
def test_a_sheet_keeps_its_shape_whatever_it_shows(classes, per_class):
    tile = Image.new("RGB", (16, 16), (200, 0, 0))
    picture = draw.sheet([(f"class {i}", [tile] * 2 * per_class) for i in range(classes)], "")
    assert 1.5 / 1.7 < picture.width / picture.height < 1.5 * 1.7
    red = (np.asarray(picture) == (200, 0, 0)).all(2).sum()
    assert red == classes * per_class * 2 * 16 * 16  # all of them, none over another


def test_a_sheet_says_how_many_of_how_many_classes_it_shows(center_set, tmp_path, monkeypatch):
    out = tmp_path / "sheet.png"
    assert inspect("sheet", center_set, "-o", out).output == f"{out}: 9 images of 3 of 3 classes\n"
    large = Image.open(out).size
    text = inspect("sheet", center_set, "-o", out, "--classes", 2, "--per-class", 1).output
    assert text == f"{out}: 2 images of 2 of 3 classes\n"
    monkeypatch.setattr(pictures, "MANY", 8)
    inspect("sheet", center_set, "-o", out)
    assert Image.open(out).width < large[0]
    monkeypatch.setattr(pictures, "MAX_SHEET", 8)
    output = inspect("sheet", center_set, "-o", out, code=1).output
    assert output == "Error: --classes and --per-class: expected at most 8 images, got 9\n"


def test_a_sheet_of_unlabeled_images_shows_as_many(photos, tmp_path):
    data = tmp_path / "photos"
    data.mkdir()
    for path in (photos / "train").rglob("*.*"):
        shutil.copy(path, data)
    mine("--data", data, "--out", tmp_path / "set", "--method", "center", "--views", 1, "--val-share", 0)
    out = tmp_path / "sheet.png"
    assert inspect("sheet", tmp_path / "set", "-o", out).output == f"{out}: 21 of 21 images\n"
    assert inspect("sheet", tmp_path / "set", "-o", out, "--classes", 2).output == f"{out}: 6 of 21 images\n"
    assert Image.open(out).width > Image.open(out).height


def test_captions_that_are_too_long_are_cut():
    assert draw._cut("ant", 12, 100) == "ant" and draw._cut("a" * 99, 12, 60) in ["a" * n + "..." for n in range(5, 9)]


def test_stats_of_center_tickets_are_the_center(center_set):
    found = json.loads(inspect("stats", center_set, "--json").output)
    frequency = np.array(found["frequency"])
    assert frequency.sum() == 13 and frequency[1:3, 1:3].min() == 1 and frequency[0, 3] == 0 or frequency.max() == 1
    assert found["per_class"]["ant"]["samples"] == 7 and found["entropy"] is None


def test_diff_of_a_set_with_itself_is_one_and_random_sets_meet_the_expectation(center_set, photos, tmp_path):
    same = TicketSet.open(str(center_set))
    assert [v["overlap"] for v in overlap(same, same, "train")["views"]] == [1.0, 1.0, 1.0]
    for seed in (1, 2):
        mine("--data", photos, "--out", tmp_path / f"r{seed}", "--method", "random", "--tokens", 6, "--seed", seed)
    a, b = (TicketSet.open(str(tmp_path / f"r{seed}")) for seed in (1, 2))
    found = overlap(a, b, "train")
    assert found["other_views"] == 21 * 15  # other seeds draw other boxes; the canonical view is shared
    assert found["views"][0]["overlap"] == pytest.approx(found["random"]["overlap"], abs=0.12)
    assert found["random"]["overlap"] == pytest.approx(6 / 16)
    text = inspect("diff", tmp_path / "r1", tmp_path / "r2").output
    assert "random" in text and "21 images in both" in text


@pytest.mark.slow
def test_diff_says_what_ranking_the_stored_views_changed(tickets, photos, weights, tmp_path):
    """Their keys are those of the photos, in whichever set they stand."""
    mine("--data", tickets, "--out", tmp_path / "kept", "--images", "ranked")
    mine("--data", photos, "--out", tmp_path / "seen", "--selector", SELECTOR, "--weights", weights, "--tokens", 8,
         "--views", 4, "--images", "ranked", "--quality", 5)  # fmt: skip
    kept, seen = (json.loads(inspect("diff", tickets, tmp_path / name, "--json").output) for name in ("kept", "seen"))
    assert [view["overlap"] for view in kept["views"]] == [1.0] * 4
    assert all(0.5 < view["overlap"] < 1 for view in seen["views"])
    for found in (kept, seen):
        assert (found["images"], found["only_a"], found["only_b"], found["other_views"]) == (21, 0, 0, 0)


def test_diff_refuses_another_grid(center_set, photos, tmp_path):
    mine("--data", photos, "--out", tmp_path / "fine", "--method", "center", "--patch-size", 8)
    assert "equal patch grids" in inspect("diff", center_set, tmp_path / "fine", code=1).output


def test_score_of_center_tickets_equals_the_center_column(center_set, masks):
    found = recall(TicketSet.open(str(center_set)), "train", str(masks), [4, 8, 13])
    assert found["images"] == 21 and found["mean_object_patches"] == 8
    for row in found["rows"]:
        assert row["ticket"] == row["center"] and row["random"] == row["k"] / 16
    assert found["rows"][0]["ticket"] == 0.25  # two of the four innermost patches


def test_object_patches_follow_box_and_flip(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 60:] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    views = np.array([[0, 40, 40, 40, 0], [0, 40, 40, 40, 1], [0, 0, 40, 40, 0], [0, 50, 40, 20, 0]])
    expected = [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]
    for pixels in ((80, 40), (40, 20), (800, 400), (81, 40)):  # of the mask; views are of the image
        Image.fromarray(mask).resize(pixels, Image.Resampling.NEAREST).save(tmp_path / "m.png")
        assert object_shares(str(tmp_path / "m.png"), (80, 40), views, (2, 2)).tolist() == expected


def test_shares_of_a_mask_are_counted_at_its_own_resolution(tmp_path):
    mask = (np.random.default_rng(0).random((96, 144)) < 0.5).astype(np.uint8) * 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    (found,) = object_shares(str(tmp_path / "m.png"), (72, 48), np.array([[4, 8, 32, 32, 1]]), (4, 4))
    box = mask[8:72, 16:80][:, ::-1] / 255  # two pixels of the mask to one of the image
    assert found.tolist() == box.reshape(4, 16, 4, 16).mean(axis=(1, 3)).flatten().tolist()


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.ones((40, 80), np.uint8), "expected 255 on the object and 0 elsewhere, got 1 at most"),
        (np.zeros((80, 40), np.uint8), "expected the shape of the image, 80x40, got 40x80"),
        (b"no PNG", "not an image"),
    ],
)
def test_a_mask_that_is_none_is_refused_in_words(pixels, words, tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(pixels) if isinstance(pixels, bytes) else Image.fromarray(pixels).save(path)
    with pytest.raises(ImageError, match=words) as caught:
        object_shares(str(path), (80, 40), np.array([[0, 0, 40, 40, 0]]), (2, 2))
    assert str(path) in str(caught.value)


def test_center_ranking_here_is_the_miners(center_set):
    sample = next(TicketSet.open(str(center_set)).stream("train"))
    assert (sample.rankings[0] == center_ranking((4, 4))).all()


def test_score_of_ranked_views_is_that_of_their_tickets(center_set, ranked_set, cut_set, masks):
    tokens = [4, 6, 13]
    found = [
        recall(TicketSet.open(str(each)), "train", str(masks), tokens) for each in (center_set, ranked_set, cut_set)
    ]
    assert found[0]["images"] == 21 and found[0] == found[1] == found[2]


def test_pictures_of_ranked_views_are_the_stored_pixels(ranked_set, cut_set):
    whole, cut = TicketSet.open(str(ranked_set)), TicketSet.open(str(cut_set))
    for sample, part in zip(whole.stream("val"), cut.stream("val"), strict=True):
        ((name, (tile, lit, _)),) = pictures._tiles(whole, sample, [0])
        ((_, (tile_of_part, lit_of_part, _)),) = pictures._tiles(cut, part, [0])
        assert name == "view 0" and tile == view_tile(sample.render(0, 64), (0, 0, 64, 64, 0))
        cells, cells_of_part = (
            np.asarray(each).reshape(4, 40, 4, 40, 3).transpose(0, 2, 1, 3, 4).reshape(16, 40, 40, 3)[:, 8:-8, 8:-8]
            for each in (tile, tile_of_part)
        )  # resizing mixes the rims
        stored, missing = part.rankings[0][:8], part.rankings[0][8:]
        assert np.array_equal(cells_of_part[stored], cells[stored]) and (cells_of_part[missing] == 128).all()
        assert (cells[missing] != 128).any()
        assert set(part.tickets[0]) < set(stored) and lit != lit_of_part != tile_of_part
    note = "(the best 8 are stored; flat gray: not stored)"
    assert note in pictures._what_is_gray(cut) and pictures._what_is_gray(whole) == ""


def test_score_needs_masks_and_a_possible_k(center_set, masks, tmp_path):
    assert "no such folder" in inspect("score", center_set, "--masks", tmp_path / "none", code=1).output
    assert "no image of split train has a mask" in inspect("score", center_set, "--masks", tmp_path, code=1).output
    assert "at most 16" in inspect("score", center_set, "--masks", masks, "--tokens", 17, code=1).output


def test_ticket_tiles_light_the_kept_patches_alone():
    tile = Image.new("RGB", (40, 40), (200, 220, 100))
    lit = np.asarray(ticket_tile(tile, np.array([1, 2]), (2, 2)))
    assert (lit[5, 25] == (200, 220, 100)).all() and (lit[25, 5] == (200, 220, 100)).all()
    assert lit[5, 5].max() < 120 and lit[25, 25].max() < 120
    heat = np.asarray(rank_tile(tile, np.array([3, 1, 2, 0]), (2, 2)), int)
    assert heat[30, 30].sum() > heat[5, 30].sum() > heat[30, 5].sum() > heat[5, 5].sum()


def test_view_tile_shows_the_flipped_box():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 30:] = 255
    plain = np.asarray(view_tile(pixels, (0, 20, 20, 20, 0), 20))
    flipped = np.asarray(view_tile(pixels, (0, 20, 20, 20, 1), 20))
    assert plain[10, 15, 0] > 200 and plain[10, 3, 0] < 50 and (flipped == plain[:, ::-1]).all()


def test_pictures_must_be_png(center_set, tmp_path):
    assert "ends in .png" in inspect("sheet", center_set, "-o", tmp_path / "a.jpg", code=2).output
    assert "no such folder" in inspect("sheet", center_set, "-o", tmp_path / "none/a.png", code=2).output


def test_every_command_refuses_what_is_no_ticket_set(tmp_path, masks):
    for arguments in commands(tmp_path, tmp_path, masks, tmp_path):
        result = inspect(*arguments, code=1)
        assert result.output.startswith("Error: ") and result.output.count("\n") == 1


def test_an_unfinished_set_is_named_as_such(center_set, tmp_path):
    copy = Path(shutil.copytree(center_set, tmp_path / "set"))
    (copy / "manifest.json").unlink()
    assert "not finished" in inspect("info", copy, code=1).output


def test_stats_of_a_split_without_a_good_sample(photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for path in (data / "val").rglob("*.*"):
        path.write_bytes(b"no image")
    mine("--data", data, "--out", tmp_path / "set", "--method", "center", "--max-failures", 1)
    found = json.loads(inspect("stats", tmp_path / "set", "--split", "val", "--json").stdout)
    assert (found["samples"], found["failed"], found["entropy"], found["per_class"]) == (0, 6, None, {})
    assert found["frequency"] == [[0.0] * 4] * 4
    inspect("stats", tmp_path / "set", "--split", "val", "-o", tmp_path / "x.png")


def test_letters_beyond_latin_are_drawn_and_what_no_font_has_is_spelled():
    for text in ("ant", "Kätzchen", "кошка", "γάτα"):
        font, shown = draw._font(text, 12)
        box = bytes(font.getmask("\U0010ffff"))
        assert shown == text and all(bytes(font.getmask(char)) != box for char in text)
    assert draw._font("猫 кот\n", 12)[1] == "U+732B котU+000A"
    plain = draw._font("ant", 12)[0]
    assert bytes(plain.getmask("к")) == bytes(plain.getmask("\U0010ffff")), "the control: Pillow's own font lacks it"
    tile = Image.new("RGB", (160, 160))
    one, other = (np.asarray(draw.page([(text, [tile])], [], "")) for text in ("кошка", "собак"))
    assert not np.array_equal(one, other), "boxes in their place would be equal"


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert inspect("--version").output.split()[-1] == version("datalth")


def test_a_store_is_asked_for_no_more_than_is_shown(photos, s3, faults, tmp_path):
    mine("--data", photos, "--out", tmp_path / "set", "--method", "center", "--views", 2, "--shard-size", 21)
    far, tars = upload(tmp_path / "set", f"{s3}/set"), sorted((tmp_path / "set").glob("*.tar"))
    faults.clear()
    inspect("info", far)
    assert len(faults.requests) == 1
    inspect("sheet", far, "--classes", 2, "--per-class", 1, "-o", tmp_path / "sheet.png")
    largest = max(TicketSet.open(far).table("train")["bytes"].to_pylist())
    assert faults.count("GET", r"\.tar$") == 2 and faults.bytes("GET", r"\.tar$") <= 2 * largest
    faults.clear()
    inspect("verify", far, "--deep")
    assert faults.bytes("GET", r"\.tar$") == sum(path.stat().st_size for path in tars)


@pytest.mark.long
def test_of_sets_in_a_store_every_command_says_and_draws_the_same(photos, masks, s3, tmp_path):
    near = tmp_path / "sets"
    mine("--data", photos, "--out", near / "base", "--method", "center", "--views", 3, "--shard-size", 10)
    mine("--data", near / "base", "--out", near / "link", "--method", "random", "--images", "link")
    far, found = upload(near, f"{s3}/sets"), []
    for root in (str(near), far):
        out = tmp_path / f"drawn-{len(found)}"
        out.mkdir()
        said = [
            inspect(*arguments).output.replace(root, "ROOT").replace(str(out), "OUT")
            for name in ("base", "link")
            for arguments in commands(f"{root}/{name}", f"{root}/base", masks, out)
        ]
        said = [re.sub(r"\d+\.\d+ s\b", "SECONDS", text) for text in said]
        found.append((said, {path.name: path.read_bytes() for path in out.iterdir()}))
    assert found[0] == found[1] and len(found[0][1]) == 4
