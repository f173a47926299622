"""The scripts of examples/: a second set of pictures, what waits for what, and the smallest ones to their ends."""

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_readme
from click.testing import CliRunner
from PIL import Image

from conftest import SELECTOR

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch) -> Any:
    """Imports a file of examples/ by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in (
        "commands",
        "weights",
        "make_symbols",
        "make_digits",
        "photos",
        "make_photos",
        "rivals",
    ):  # `weights` is too plain a name to stay
        sys.modules.pop(name, None)


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_symbols_are_a_function_of_the_seed_and_stand_where_masks_say(example, tmp_path):
    main = example("make_symbols").main
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        flags = ["--out", str(tmp_path / name), "--train", "10", "--val", "1", "--seed", seed]
        assert CliRunner().invoke(main, flags).exit_code == 0
    first, again, other = (written(tmp_path / name) for name in "abc")
    assert first == again and first.keys() == other.keys() and len(first) == 22
    assert all(first[name] != other[name] for name in first)
    for path in (tmp_path / "a" / "train").rglob("*.png"):
        mask = np.asarray(Image.open(tmp_path / "a" / "masks" / path.relative_to(tmp_path / "a")))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert Image.open(path).size == (110, 110) and mask.shape == (110, 110)
        assert 7 <= min(rows[0], columns[0]) and max(rows[-1], columns[-1]) < 103  # the view leaves 7 pixels out
        assert (
            40 <= max(len(rows), len(columns)) <= 56
            and mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        )


def test_every_symbol_is_one_of_the_font(example):
    symbols = example("make_symbols")
    drawn = {text: symbols.symbol(text).tobytes() for text in [*symbols.CLASSES.values(), *symbols.OTHERS]}
    missing = symbols.symbol("\U0010ffff").tobytes()  # the box that a font draws for what it does not have
    assert len(set(drawn.values()) | {missing}) == len(drawn) + 1
    assert len(drawn) == len(symbols.CLASSES) + len(symbols.OTHERS) and len(symbols.CLASSES) == 10


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_a_thing_on_a_photo_is_as_large_as_said_whole_in_view_0_and_where_its_mask_is(example, size):
    photos = example("make_photos")
    stamp = Image.new("RGBA", (90, 60), (250, 0, 250, 255))  # a color of no scene
    scene = Image.effect_noise((300, 200), 20).convert("RGB")
    low, high = photos.SIZES[size]
    for seed in range(20):
        draws = photos.random.Random(seed)
        picture, mask = photos.compose(stamp, scene, draws.uniform(low, high), draws)
        pixels, inside = np.asarray(picture, int), np.asarray(mask) == 255
        magenta = pixels[..., 0] + pixels[..., 2] - 2 * pixels[..., 1] > 200
        assert 0.98 * low <= inside.sum() / photos.VIEW**2 <= 1.02 * high
        assert not inside[: photos.MARGIN].any() and not inside[:, photos.SIDE - photos.MARGIN :].any()
        assert (magenta == inside).mean() > 0.99 and (magenta == inside[::-1]).mean() < 0.99


def test_things_that_look_alike_stand_on_one_side(example):
    halves = example("make_photos").halves
    names = [f"food/fruit/apple_{i}" for i in range(2)] + [f"food/fruit/{i}" for i in range(10)]
    for seed in range(10):
        split = halves(names, str(seed))
        assert sorted(split["train"] + split["val"]) == sorted(names) and len(split["val"]) >= 3
        assert len({side for side, found in split.items() for name in found if "apple" in name}) == 1
    assert len({tuple(halves(names, str(seed))["val"]) for seed in range(10)}) > 1


def test_rivals_commands_are_ours_and_wait_for_what_another_writes(example, tmp_path):
    from command_lines import check_taken

    rivals = example("rivals")
    weights = {name: tmp_path / name for name in rivals.MODELS}
    study, seeds = rivals.Rivals(tmp_path / "out", weights), range(2)
    runs = [*study.of_equal_epochs(seeds), *study.of_equal_cost(seeds), *study.of_varying_length(seeds)]
    commands = [*map(study.mined, rivals.SETS), *runs]
    for command in commands:
        check_taken([str(word) for word in command.words])
    files = [command.done for command in commands]
    assert len(set(files)) == len(files) == 6 + 2 * (29 + 13 + 6)  # sets, and runs of a seed
    there = {*files, study.base / "manifest.json"}
    assert {path for command in commands for path in command.needs} <= there


def test_fine_tuning_commands_are_ours_and_wait_for_their_tickets(example, tmp_path):
    from command_lines import check_taken

    rivals = example("rivals")
    for name in rivals.MODELS:
        mining, *runs = rivals.fine_tuning(tmp_path, name, tmp_path / "weights", range(2))
        for command in (mining, *runs):
            check_taken([str(word) for word in command.words])
        assert len({run.done for run in runs}) == len(runs) == 2 * 7
        assert {path for run in runs for path in run.needs} == {mining.done}


def test_digits_of_three_sizes_fill_whole_patches(example, tmp_path):
    digits = example("make_digits")
    patches = {}
    for name, flags in (("one", []), ("three", ["--sizes"])):
        out = tmp_path / name
        made = CliRunner().invoke(digits.main, ["--out", str(out), "--train", "24", "--val", "1", *flags])
        assert made.exit_code == 0, made.output
        patches[name] = []
        for path in (out / "masks" / "train").rglob("*.png"):
            view = np.asarray(Image.open(path))[7:103, 7:103].reshape(6, 16, 6, 16) / 255
            inside = view.mean((1, 3))
            assert set(inside.ravel()) == {0, 1}  # a patch is in or out
            patches[name].append(int(inside.sum()))
    assert set(patches["one"]) == {4} and set(patches["three"]) == {4, 9, 16}


def test_what_a_command_waits_for_is_what_another_writes(example, tmp_path):
    weights = example("weights")
    study = weights.Study(tmp_path, tmp_path / "tickets", 2)
    digits = [command for name, part in weights.PARTS.items() if name != "symbols" for command in part(study, 0)]
    for commands in (digits, weights.symbols(study, 0)):
        files = [command.done for command in commands]
        assert len(set(files)) == len(files)
        assert {path for command in commands for path in command.needs} <= set(files)


@pytest.mark.long
def test_photos_of_ones_own_to_their_classes(example, photos, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    small = ["--model", SELECTOR, "--weights", weights, "--img-size", 64, "--tokens", 8]
    quick = ["--epochs", 1, "--warmup-epochs", 0, "--unmask-epochs", 0, "-j", 0]
    line = [*map(str, [photos, "--out", tmp_path / "work", "--new", photos / "val", *small, "--", *quick])]
    for _ in range(2):  # the second time all is done
        result = CliRunner().invoke(example("photos").main, line)
        assert result.exit_code == 0, result.output
    asked = [
        words
        for text in result.output.splitlines()
        if (words := shlex.split(text.removeprefix("$ "))) and text[0] == "$"
    ]
    assert [words[0].removeprefix("datalth-") for words in asked] == ["mine", "shards", "train", "predict", "predict"]
    on_all, on_both = ((tmp_path / "work" / name).read_text() for name in ("classes.csv", "on-tickets.csv"))
    assert len(on_all.splitlines()) == 1 + 6 and len(on_both.splitlines()) == 1 + 12
    assert set(on_all.splitlines()) < set(on_both.splitlines())
    assert "<!doctype html>" in (tmp_path / "work" / "explore.html").read_text(encoding="utf-8").lower()
    typed = [shlex.split(line, comments=True) for line in test_readme.commands(EXAMPLES.parent / "docs" / "PHOTOS.md")]
    told = {word for words in typed for word in words if word.startswith("--")}
    assert {word for words in asked for word in words if word.startswith("--")} <= told | {
        "--output",
        "--resume",
        *quick,
    }


@pytest.mark.long
def test_smallest_study_of_weights_to_its_end(example, tmp_path, monkeypatch):
    weights = example("weights").weights
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    flags = ["--seeds", "1", "--epochs", "1", "--pictures", "64", "--parts", "symbols", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(weights, flags)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "out" / "weights.md").read_text(encoding="utf-8")
    for row in ("dense", "imp winning", "imp reinit", "imp shuffled", "random mask"):
        assert f"| full | {row} |" in table
    judged = json.loads((tmp_path / "out" / "verdict-weights-symbols" / "verdict.json").read_text(encoding="utf-8"))
    assert len(judged["runs"]) == 6 and (tmp_path / "out" / "weights-symbols.png").exists()
    again = CliRunner().invoke(weights, flags)
    assert again.exit_code == 0 and "0 commands to run" in again.output
