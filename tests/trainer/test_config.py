"""-c: recipes by name, files of one's own, a run's args.yaml; what is not plain is a line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from shards.errors import TicketSetError
from trainer.cli import main
from trainer.config import RECIPES, find_config, read_yaml
from training import SMALL, same, summary_of, train, weights_of


def invoked(*flags: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, flags)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [
            "--tokens",
            5,
            "--clip-grad",
            1,
            "--aa",
            "",
            "--lr",
            1e-3,
            "--opt-kwargs",
            "betas=(0.9, 0.95)",
            "--layer-decay",
            0.9,
        ],
        ["--unmask-epochs", 1, "--no-model-ema", "--sched", "step", "--resume", "latest", "--device", "cpu"],
    ],
)
def test_a_runs_own_args_repeat_it(tickets, tmp_path, monkeypatch, more):
    """With a name of its own, or without one: the run's own name and --resume are not another run's."""
    train(tickets, tmp_path, "run", *more)
    run = tmp_path / "run"
    invoked("-c", run / "args.yaml", "--experiment", "other")
    invoked("-c", run / "args.yaml", "--output", tmp_path / "named")
    (by_time,) = (tmp_path / "named").iterdir()
    for again in (tmp_path / "other", by_time):
        assert same(weights_of(again), weights_of(run))
        assert summary_of(again) == summary_of(run)
    then, now = (yaml.safe_load((folder / "args.yaml").read_text()) for folder in (run, tmp_path / "other"))
    assert {name for name in then if then[name] != now[name]} <= {"experiment", "resume"}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: null", "epochs: expected a whole number, got null; leave the line out for the default"),
        ("sched: ~", "sched: expected text, got null; leave the line out for the default"),
        ("amp: null", "amp: expected true or false, got null"),
        ("epochs: yes", "epochs: expected a whole number, got True"),
        ("mixup: no", "mixup: expected a number, got False"),
        ("mixup: .nan", "nan is no finite number"),
        ("lr: .inf", "inf is no finite number"),
        ("lr: fast", "lr: expected a number: 'fast' is not a valid float"),
        ("epochs: 2.7", "epochs: expected a whole number: '2.7' is not a valid integer"),
        ("experiment: 2024-01-02", "experiment: expected text, got datetime.date(2024, 1, 2); put it in quotes"),
        ("experiment: 010", "experiment: expected text, got 8; put it in quotes"),
        ("experiment: no", "experiment: expected text, got False; put it in quotes"),
        ("amp: maybe", "amp: expected true or false, got 'maybe'"),
        ("tickets: best", "tickets: expected winning or random or"),
        ("mixup: [1]", "mixup: expected a number, got [1]"),
        ("shards: {a: 1}", "shards: expected text, got {'a': 1}"),
        ("model: !!binary aGk=", "model: expected text, got b'hi'"),
        ("model-kwargs: 3", "model_kwargs: expected lines of name: value, got 3"),
        ("epochs: 3\nepochs: 4", "line 2: 'epochs' a second time"),
        ("lr-base: 1\nlr_base: 2", "lr_base: a second time, with - and with _"),
        ("epoch: 3", "no such flag: 'epoch'; near: epochs"),
        ("[1, 2]", "expected lines of name: value, got [1, 2]"),
        ("a: [", "line 1: "),
        ("a: !!int ''", "not readable"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: &x 1\nb: *x", "line 2: expected values, got a *reference to another"),
        (BOMB, "line 2: expected values, got a *reference to another"),
        ("[" * 5000, "not readable"),
        ("epochs: " + "9" * 5000, "not readable"),
        ("# " + "x" * 100_000, "expected at most 100000 bytes of flags"),
        ("epochs: \x07", "special characters"),
        (b"model: \xff", "not readable"),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_a_line(tmp_path, text, said):
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    output = invoked("-c", path, "--shards", "none", code=2)
    assert said in output and str(path) in output, output
    assert len(output.splitlines()) == 4 and output.replace("\n", "").isprintable(), output  # usage, help, blank, error


def test_no_file_is_a_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path, "expected a file, got a folder"),
        (tmp_path / "pipe", "expected a file, got something else"),
        (tmp_path / "none", "expected a file or a recipe (deit_base, "),
        ("x" * 5000, "expected a file or a recipe"),
    ):
        assert said in invoked("-c", path, "--shards", "none", code=2)


def test_numbers_are_finite_on_the_command_line_too(tmp_path):
    for flag in ("--lr", "--mixup", "--layer-decay", "--drop-path"):
        assert "finite" in invoked("--shards", "none", flag, "nan", code=2)
    assert "expected numbers, text" in invoked("--shards", "none", "--opt-kwargs", "betas={1, 2}", code=2)


def test_recipes_are_found_by_their_names_anywhere(tickets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quick").mkdir()  # somebody's folder is no recipe
    for name in ("quick", "quick.yaml", "recipes/quick.yaml"):
        assert find_config(name) == RECIPES["quick"]
    Path("quick.yaml").write_text("epochs: 7")
    assert read_yaml(find_config("./quick.yaml")) == {"epochs": 7} == read_yaml(find_config("quick.yaml"))
    help_text = " ".join(invoked("--help").split())
    assert set(RECIPES) >= {"quick", "deit_tiny", "selector"} and f"a recipe ({', '.join(RECIPES)})" in help_text
    invoked(
        "-c", "quick", "--shards", tickets, *SMALL, "--epochs", 1, "--warmup-epochs", 0, "-j", 0, "--experiment", "x"
    )
    saved = yaml.safe_load(Path("output/x/args.yaml").read_text())
    assert (saved["batch_size"], saved["epochs"], saved["model_ema"], saved["aa"]) == (32, 1, False, "")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_made_of_flags(recipe, tmp_path):
    """Read to the end: what is refused is the set that is not there."""
    assert "none" in invoked("-c", recipe, "--shards", tmp_path / "none", code=1)


def test_a_config_is_read_without_torch():
    code = "import sys, trainer.config; print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_empty_file_sets_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    with pytest.raises(TicketSetError, match="got none"):
        read_yaml(tmp_path / "none.yaml")
