"""datalth-verdict: the statistics, what it decides, what it refuses, and its files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from browser import Browser, needs_chromium
from pages import Page, check_self_contained
from trainer.options import ARMS
from trainer.verdict import panels
from trainer.verdict.cli import main
from trainer.verdict.page import SHAPES
from trainer.verdict.statistics import Estimate, Spread, bootstrap, decide, difference, mean, pooled, t_quantile

K, N, IMAGES = 20, 36, 200
ARGS = {
    "shards": "set", "base": None, "model": "deit_tiny", "tickets": "winning", "tokens": None,
    "resize_to_tokens": False, "unmask_epochs": 0, "repeats": 3, "epochs": 20, "lr_base": 5e-4, "pretrained": False,
    "batch_size": 64, "output": "output", "model_kwargs": {"depth": 4},
    "set_id": "e" * 64, "base_set_id": "b" * 64, "set_method": "evit", "world_size": 1, "global_batch": 64,
}  # fmt: skip
FLAT = {"winning": (63, 48, 44), "random": (39, 53, 44), "full": (50, 57, 44)}  # top-1: tickets, all, random


def write_run(folder: Path, top1: tuple[float, float, float], seed: int = 0, **changed: Any) -> Path:
    """A finished run of given accuracies on IMAGES images; the first images are the right ones."""
    args = {**ARGS, "experiment": folder.name, "seed": seed, **changed}
    whole = args["tickets"] == "full" and not args["resize_to_tokens"]
    tokens = N if whole else args["tokens"] or K
    tokens = args.pop("resolved", tokens)  # of a model that packs its tickets, also in full
    args["resolved_tokens"] = tokens
    names = ["all"] if args["resize_to_tokens"] else ["tickets", "all", "random"]
    found = dict(zip(["tickets", "all", "random"], top1, strict=True))
    labels = np.arange(IMAGES, dtype=np.int32) % 10
    columns: dict[str, Any] = {"key": [f"val/{i:03}" for i in range(IMAGES)], "label": labels}
    for name in names:
        columns[name] = np.where(np.arange(IMAGES) < round(found[name] * IMAGES / 100), labels, (labels + 1) % 10)
    results = {
        name: {"top1": 100 * float(np.mean(columns[name] == labels)), "top5": 99.0, "loss": 1.0} for name in names
    }
    gmacs = (tokens * (20 - args["unmask_epochs"]) + N * args["unmask_epochs"]) / 20 / 100
    tests = {
        name: (N if name == "all" and not args["resize_to_tokens"] else args["tokens"] or K) / 100 for name in names
    }
    cost = {"tokens": tokens, "patches": N, "train_gmacs": gmacs, "test_gmacs": tests, "dense_gmacs": N / 100}
    final = {"epoch": args["epochs"] - 1, "results": results, "best": 1.0, "cost": {**cost, "seconds": 100 * gmacs}}
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(args, sort_keys=False))
    (folder / "final.json").write_text(json.dumps(final))
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    return folder


def write_arms(root: Path, seeds: int = 3, shift: dict[str, float] | None = None, **changed: Any) -> list[Path]:
    """winning, random and full; seeds lie half a point below, at, and half a point above FLAT (one standard deviation)."""
    out = []
    for arm, top1 in FLAT.items():
        for seed in range(seeds):
            by = (shift or {}).get(arm, 0) + (seed - (seeds - 1) / 2) * 0.5
            moved = (top1[0] + by, top1[1] + by, top1[2] + by)
            out.append(write_run(root / f"{arm}-{seed}", moved, seed, tickets=arm, **changed))
    return out


def verdict(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output + str(result.exc_info)
    if code:
        assert len(result.output.splitlines()) == 1 and "Traceback" not in result.output
    return result.output


def as_json(out: Path, *arguments: object) -> dict[str, Any]:
    verdict(*arguments, "-o", out)
    return json.loads((out / "verdict.json").read_text())


def sentences(output: str) -> str:
    return " ".join(output.partition("VERDICT\n")[2].partition("\n\n")[0].split())


def test_pooled_spread_and_intervals_are_the_textbooks() -> None:
    from scipy import stats

    first, second = np.array([1.0, 2.0, 3.0]), np.array([10.0, 14.0])
    spread = pooled([first, second, np.array([7.0])])
    assert spread == Spread(pytest.approx(((2 + 8) / 3) ** 0.5), 3)  # the single seed adds nothing
    assert t_quantile(3) == pytest.approx(stats.t.ppf(0.975, 3)) == pytest.approx(3.182446, abs=1e-6)
    found = difference(second, first, pooled([first, second]))
    theirs = stats.ttest_ind(second, first).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    one = stats.t.interval(0.95, 2, first.mean(), stats.sem(first))
    assert (mean(first, pooled([first])).low, mean(first, pooled([first])).high) == pytest.approx(one)
    assert mean(np.array([5.0]), pooled([np.array([5.0])])) == Estimate(5.0, None, None)


def test_bootstrap_is_that_of_resampling_images() -> None:
    rng = np.random.default_rng(1)
    scores = rng.choice([-1, 0, 1], 400, p=[0.1, 0.6, 0.3])
    found = bootstrap(scores)
    assert found.value == pytest.approx(100 * scores.mean())
    drawn = 100 * scores[rng.integers(0, 400, (4000, 400))].mean(1)  # image by image
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.4)
    normal = 1.96 * 100 * scores.std() / 20
    assert found.half == pytest.approx(normal, rel=0.05)
    assert bootstrap(scores) == found  # seeded
    assert bootstrap(np.zeros(50, np.int8)) == Estimate(0.0, 0.0, 0.0)


def test_pairs_are_images_not_positions(tmp_path: Path) -> None:
    from trainer.verdict.claim import paired
    from trainer.verdict.runs import read_run

    x = read_run(write_run(tmp_path / "x", (60, 50, 40)))
    mixed = np.random.default_rng(0).permutation(IMAGES)[: IMAGES - 5]
    y = replace(x, keys=x.keys.take(pa.array(mixed)), hits={name: hits[mixed] for name, hits in x.hits.items()})
    same, every = ([(x, name)] for name in ("tickets", "all"))
    assert (paired(same, [(y, "tickets")]) == 0).all() and len(paired(every, [(y, "all")])) == IMAGES - 5
    assert (paired([(y, "all"), (x, "tickets")], [(x, "all"), (y, "tickets")]) == 0).all()
    assert (x.hits["all"][: IMAGES - 5] != y.hits["all"]).any()  # position by position they differ


@pytest.mark.parametrize(
    ("ac", "ab", "outcome"),
    [
        ((-0.9, 0.5), (0.1, 2), "holds"),
        ((-1.0, 0.5), (0.1, 2), "open"),  # the bound itself is not above
        ((-0.9, 0.5), (0.0, 2), "open"),
        ((-3, -1.1), (0.1, 2), "fails"),
        ((-3, -1.0), (0.1, 2), "open"),
        ((-0.9, 0.5), (-2, -0.1), "fails"),
        ((-0.9, 0.5), (-2, 0.0), "open"),
        ((None, None), (0.1, 2), "open"),
        ((None, None), (-2, -0.1), "fails"),  # one part is enough
    ],
)
def test_decision(ac: tuple[float, float], ab: tuple[float, float], outcome: str) -> None:
    assert decide([(Estimate(0, *ac), -1.0), (Estimate(0, *ab), 0)]) == outcome


@pytest.mark.parametrize(
    ("shift", "margin", "words"),
    [
        ({}, 1, "the claim holds: winning tickets are as good as all patches to within 1.0 points, a - c = +6.00"),
        ({"winning": -6.5}, 1, "cannot be told from these runs: a - c = -0.50"),
        ({"winning": -6.5}, 2, "the claim holds"),
        (
            {"winning": -9},
            1,
            "the claim fails: winning tickets are more than 1.0 points below all patches, a - c = -3.00",
        ),
        ({"random": 24}, 1, "may be above or below 0"),
        ({"random": 26}, 1, "the claim fails: winning tickets are worse than random patches, a - b = -2.00"),
        ({"winning": -26, "random": 4}, 1, "and winning tickets are worse than random patches"),
    ],
)
def test_the_verdict_follows_the_runs(tmp_path: Path, shift: dict[str, float], margin: float, words: str) -> None:
    write_arms(tmp_path, shift=shift)
    output = sentences(verdict(*tmp_path.iterdir(), "--margin", margin))
    assert output.startswith("deit_tiny, evit, K=20: ") and words in output


def test_figures_of_three_seeds(tmp_path: Path) -> None:
    found = as_json(tmp_path / "out", *write_arms(tmp_path / "runs"))["models"][0]
    half = 2.446912 * 0.5 * (2 / 3) ** 0.5  # t of 6 degrees of freedom; each group's standard deviation is 0.5
    (claim,) = found["verdicts"]
    assert (claim["outcome"], claim["tokens"], claim["set"]) == ("holds", 20, "evit")
    assert claim["a_minus_c"]["low"] == pytest.approx(6 - half, abs=1e-5)
    assert claim["a_minus_b"]["high"] == pytest.approx(24 + half, abs=1e-5)
    kinds = {d["kind"]: d["value"] for d in found["differences"]}
    assert kinds == pytest.approx({"a - c": 6, "a - b": 24, "a - rival": 10, "whole - c": -9, "rival - c": -4})
    full, winning, _ = found["groups"]
    assert full["top1"]["own"]["runs"] == pytest.approx([56.5, 57.0, 57.5])
    assert winning["top1"]["own"]["runs"] == pytest.approx([62.5, 63.0, 63.5])
    assert winning["train_share_of_full"] == pytest.approx(20 / 36) and winning["test_gmacs"]["tickets"] == 0.2
    assert found["intervals"]["over"] == "seeds" and found["intervals"]["pooled"]["own"]["df"] == 6


def test_one_seed_resamples_images_and_says_so_everywhere(tmp_path: Path) -> None:
    runs = write_arms(tmp_path / "runs", seeds=1)
    output = verdict(*runs, "-o", tmp_path / "out")
    words = "images resampled: says nothing about other seeds"
    assert words in sentences(output) and words in output.partition("VERDICT")[0]
    assert words in (tmp_path / "out" / "verdict.md").read_text()
    found = json.loads((tmp_path / "out" / "verdict.json").read_text())["models"][0]
    assert found["intervals"]["over"] == "images" and words in found["intervals"]["meaning"]
    # The right images of c are among those of a, so that just 12 of 200 differ: 6 points, standard error 1.7.
    (claim,) = found["verdicts"]
    assert claim["a_minus_c"]["low"] == pytest.approx(3, abs=0.51)
    more = write_run(tmp_path / "runs" / "full-1", (50, 58, 44), 1, tickets="full")
    output = verdict(*runs, more)
    assert words not in output and "one seed only: winning K=20, random K=20" in output


def test_rows(tmp_path: Path) -> None:
    """Each K its own claim; unmasked and resized as arms of their own; what does not apply is n/a."""
    runs = write_arms(tmp_path / "k20")
    runs += [run for run in write_arms(tmp_path / "k12", shift={"winning": -10}, tokens=12) if "full" not in run.name]
    runs.append(write_run(tmp_path / "tuned", (55, 56, 44), unmask_epochs=5))
    runs.append(write_run(tmp_path / "resized", (0, 50, 0), resize_to_tokens=True, tokens=25))
    sizes = {"resize_to_tokens": True, "tokens": 25, "unmask_epochs": 5}
    runs.append(write_run(tmp_path / "curriculum", (0, 54, 0), set_id="d" * 64, **sizes))
    output = verdict(*runs)
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert any(line.startswith("resized +5 unmasked 25 1 n/a 54.00 ") for line in lines)
    assert "resized, unmasked: at K coarser patches first" in output
    assert any(line.startswith("winning +5 unmasked 20 1 55.00 ") for line in lines)
    (resized,) = (line for line in lines if line.startswith("resized 25 1 "))
    assert resized.startswith("resized 25 1 n/a 50.00 ") and resized.endswith("n/a, 0.250")
    assert "K=20: the claim holds" in output and "K=12: the claim fails" in output
    assert "winning +5 unmasked on all" in output and "resized on all" in output
    assert max(map(len, output.splitlines())) <= 120


def test_missing_arms(tmp_path: Path) -> None:
    runs = write_arms(tmp_path)
    without = {arm: [run for run in runs if not run.name.startswith(arm)] for arm in FLAT}
    assert sentences(verdict(*without["random"])).endswith("K=20: cannot be told: no runs of random (b) at K=20.")
    assert sentences(verdict(*without["full"])).endswith("cannot be told: no runs of full (c).")
    assert sentences(verdict(*without["winning"])).endswith("cannot be told: no runs of winning (a) at K=20.")
    assert sentences(verdict(runs[-1])) == "deit_tiny: cannot be told: no runs of winning (a)."


def test_random_of_another_set_is_no_b(tmp_path: Path) -> None:
    runs = [run for run in write_arms(tmp_path / "evit") if "random" not in run.name]
    other = {"set_id": "c" * 64, "set_method": "cls-attention"}
    runs += [run for run in write_arms(tmp_path / "cls", **other) if "random" in run.name]
    output = sentences(verdict(*runs))
    assert "evit, K=20: cannot be told: no runs of random (b) at K=20" in output
    assert "cls-attention, K=20: cannot be told: no runs of winning (a) at K=20" in output
    same = [run for run in write_arms(tmp_path / "more") if "random" in run.name]
    assert "evit, K=20: the claim holds" in sentences(verdict(*runs, *same))


def test_full_runs_of_any_set_are_c(tmp_path: Path) -> None:
    runs = [run for run in write_arms(tmp_path / "evit") if "full-2" not in run.name]
    runs.append(write_run(tmp_path / "base", (50, 57.5, 44), 2, tickets="full", set_id="b" * 64, set_method="center"))
    found = as_json(tmp_path / "out", *runs)["models"][0]
    assert found["verdicts"][0]["outcome"] == "holds" and found["groups"][0]["seeds"] == [0, 1, 2]
    assert found["groups"][0]["top1"]["tickets"] is None  # those are tickets of two sets
    twice = write_run(tmp_path / "again", (50, 57.5, 44), 0, tickets="full", tokens=12)
    assert "are trained alike" in verdict(*runs, twice, code=1)


def test_allow_diff_groups_by_the_field(tmp_path: Path) -> None:
    runs = [run for run in write_arms(tmp_path / "short") if "random" not in run.name]
    runs += [run for run in write_arms(tmp_path / "long", epochs=37) if "random" in run.name]
    message = verdict(*runs, code=1)
    assert "epochs: 20 in " in message and "37 in " in message and str(runs[-3]) in message
    output = verdict(*runs, "--allow-diff", "epochs")
    assert "epochs=20, b: epochs=37: the claim holds" in sentences(output) and "random (b) epochs=37" in output
    assert "0.200 (103%)" in next(line for line in output.splitlines() if line.startswith("random (b)"))
    assert "--allow-diff seed: expected one of epochs, global_batch, " in verdict(*runs, "--allow-diff", "seed", code=1)


def test_models_are_told_apart(tmp_path: Path) -> None:
    runs = [*write_arms(tmp_path / "tiny"), *write_arms(tmp_path / "small", shift={"winning": -20}, model="deit_small")]
    found = sentences(verdict(*runs))
    assert "deit_tiny, evit, K=20: the claim holds" in found and "deit_small, evit, K=20: the claim fails" in found


def edit(path: Path, **changed: Any) -> None:
    values = yaml.safe_load(path.read_text())
    path.write_text(json.dumps({**values, **changed}))


def test_refusals(tmp_path: Path) -> None:
    runs = write_arms(tmp_path / "runs", seeds=1)
    run, rest = runs[0], runs[1:]
    (tmp_path / "file").write_text("")
    assert "no such folder" in verdict(tmp_path / "none", code=1)
    assert "no args.yaml" in verdict(tmp_path, code=1)
    assert "not a run's folder" in verdict(tmp_path / "file", code=1)
    assert "expected a folder, got a file" in verdict(*runs, "-o", tmp_path / "file", code=1)
    args, final, predictions = (run / name for name in ("args.yaml", "final.json", "predictions.parquet"))
    originals = {path: path.read_bytes() for path in (args, final, predictions)}

    def refused(words: str) -> None:
        message = verdict(*rest, run, code=1)
        assert words in message and str(run) in message, message
        for path, data in originals.items():
            path.write_bytes(data)

    edit(args, lr_base=1e-3)
    refused("lr_base: 0.0005 in")
    edit(args, pretrained=True)  # where training starts from matters here, though a resumed run may say it otherwise
    refused("pretrained: false in")
    edit(args, base_set_id="x" * 64)
    refused("trained on other images")
    args.write_text("a: [")
    refused("args.yaml: not readable")
    args.write_text("tickets: winning")
    refused("args.yaml: lacks the field 'tokens'")
    final.write_text("{")
    refused("final.json: not readable")
    edit(final, epoch=3)
    refused("expected epoch 19, the last, got 3")
    edit(final, results={})
    refused("final.json: results: lacks the field 'tickets'")
    edit(final, results={name: {} for name in ("tickets", "all", "random")})
    refused("final.json: results: tickets: lacks the field 'top1'")
    edit(final, cost={})
    refused("final.json: cost: lacks the field 'tokens'")
    predictions.unlink()
    refused("predictions.parquet: expected a file, found none")
    predictions.write_bytes(originals[predictions][:-200])
    refused("predictions.parquet: damaged")
    pq.write_table(pq.read_table(predictions).drop_columns(["all"]), predictions)
    refused("no column all")
    predictions.write_bytes((rest[0] / "predictions.parquet").read_bytes())
    refused("not this run's")
    assert "the claim holds" in verdict(*runs)  # what was changed above is all that was wrong


def test_other_folders_are_named_and_left_out(tmp_path: Path) -> None:
    """output/* also holds runs under way, selectors, logs and other folders."""
    runs = write_arms(tmp_path / "runs", seeds=1)
    (write_run(tmp_path / "runs/under-way", FLAT["winning"], 7) / "final.json").unlink()
    write_run(tmp_path / "runs/selector", FLAT["full"], 7, tickets="full", drop_blocks=[3, 6, 9])
    (tmp_path / "runs/notes.txt").write_text("mine")
    (tmp_path / "runs/odd\x1b[31m\nname").mkdir()
    plain = verdict(*runs).splitlines()
    output = verdict(*sorted((tmp_path / "runs").iterdir()), "-o", tmp_path / "out")
    assert "the claim holds" in sentences(output)
    said = " ".join(output.split())
    for name, why in (("under-way", "not finished: no final.json; datalth-train --resume"),
                      ("selector", "a ticket selector's run"), ("notes.txt", "not a run's folder: no args.yaml"),
                      ("odd\\x1b[31m name", "not a run's folder: no args.yaml")):  # fmt: skip
        assert f"left out: {tmp_path}/runs/{name}: {why}" in said, (name, said)
    assert not set(plain) - set(output.splitlines())  # nothing else is said otherwise
    assert "left out: " in (tmp_path / "out" / "verdict.md").read_text()
    assert (
        len([n for n in json.loads((tmp_path / "out/verdict.json").read_text())["models"][0]["notes"] if "left" in n])
        == 4
    )
    others = [path for path in (tmp_path / "runs").iterdir() if path not in runs]
    assert "; nor is any of 3 others" in verdict(*others, code=1)
    assert "no such folder" in verdict(*runs, tmp_path / "mistyped", code=1)


ODD = [None, True, "", "x", "\x1b[2J", "a\nb", "$x^$", [], [[1]], {}, {"a": 1}, -1, 0, 1.5, 10**400, 2**63, 1e308, float("nan"),
       float("inf"), "9" * 5000]  # fmt: skip


def mutated(folder: Path, rng: np.random.Generator) -> str:
    """Change one of a run's three files; returns how."""
    name = ("args.yaml", "final.json", "predictions.parquet")[rng.integers(3)]
    path = folder / name
    data = path.read_bytes()
    if name != "predictions.parquet" and rng.random() < 0.7:
        values = yaml.safe_load(data)
        inside = values
        while True:  # down to a value somewhere
            key = list(inside)[rng.integers(len(inside))]
            if not isinstance(inside[key], dict) or not inside[key] or rng.random() < 0.2:
                break
            inside = inside[key]
        odd = ODD[rng.integers(len(ODD))]
        if rng.random() < 0.2:
            del inside[key]
        else:
            inside[key] = odd
        path.write_text(yaml.safe_dump(values) if name == "args.yaml" else json.dumps(values))
        return f"{name}: {key} = {odd!r:.30}"
    if name == "predictions.parquet" and rng.random() < 0.5:
        table = pq.read_table(path)
        column = int(rng.integers(table.num_columns))
        others: list[Any] = [pa.nulls(IMAGES), pa.array(["x"] * IMAGES), pa.array([0.5] * IMAGES), pa.array([[1]] * IMAGES),
                             pa.array([b"\xff"] * IMAGES), pa.array(range(IMAGES)), pa.array([2**40] * IMAGES),
                             pa.array([None, *range(1, IMAGES)]), pa.array(["y" * 2000, *map(str, range(1, IMAGES))])]  # fmt: skip
        chosen = others[rng.integers(len(others))]
        pq.write_table(table.set_column(column, table.column_names[column], chosen), path)
        return f"{name}: column {column} = {chosen.type}"
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(changed)))
        changed[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
    if rng.random() < 0.3:
        del changed[int(rng.integers(len(changed) + 1)) :]
    path.write_bytes(changed)
    return f"{name}: bytes"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_runs_files_hold_ends_in_a_verdict_or_a_line(tmp_path: Path, seed: int) -> None:
    """Mutations of one run among sound ones: never a traceback, nothing that acts on a terminal."""
    rng = np.random.default_rng(seed)
    runs = write_arms(tmp_path / "runs", seeds=1)
    sound = {path: path.read_bytes() for run in runs for path in run.iterdir()}
    codes = []
    for _ in range(40):
        how = mutated(runs[0], rng)
        allowed = ["--allow-diff", "lr_base"] if rng.random() < 0.2 else []
        result = CliRunner().invoke(main, [*map(str, runs), *allowed])
        assert result.exit_code in (0, 1), (how, result.exc_info)
        assert result.exit_code == 0 or result.output.count("\n") == 1, (how, result.output)
        assert result.exc_info is None or result.exc_info[0] in (SystemExit, None.__class__), (how, result.exc_info)
        assert result.output.replace("\n", "").isprintable(), (how, result.output)
        codes.append(result.exit_code)
        for path, data in sound.items():
            path.write_bytes(data)
    assert 20 <= sum(codes) < 40  # most are refused, and some cannot matter
    verdict(*runs)


def test_special_files_are_no_runs_files(tmp_path: Path) -> None:
    runs = write_arms(tmp_path / "runs", seeds=1)
    for name in ("args.yaml", "final.json", "predictions.parquet"):
        data = (runs[0] / name).read_bytes()
        (runs[0] / name).unlink()
        os.mkfifo(runs[0] / name)
        assert "expected a file, " in verdict(*runs, code=1)
        (runs[0] / name).unlink()
        (runs[0] / name).write_bytes(data)
    (runs[0] / "final.json").write_text("[" * 100_000)
    assert "not readable" in verdict(*runs, code=1)


def test_names_may_look_like_formulas(tmp_path: Path) -> None:
    """To matplotlib, $ begins one."""
    runs = write_arms(tmp_path / "runs", set_method="m$^$", model="a$_{")
    runs += write_arms(tmp_path / "more", set_method="n$", model="a$_{", set_id="d" * 64)[:6]
    assert "a$_{, m$^$, K=20: the claim holds" in verdict(*runs, "-o", tmp_path / "out")


def test_a_margin_is_a_number() -> None:
    assert "nan is no finite number" in CliRunner().invoke(main, ["x", "--margin", "nan"]).output


def test_what_cannot_matter_may_differ(tmp_path: Path) -> None:
    runs = write_arms(tmp_path, seeds=1)
    edit(
        runs[0] / "args.yaml", batch_size=32, world_size=2, output="elsewhere", shards="moved", base="there", workers=9
    )
    assert "the claim holds" in verdict(*runs)


def test_same_seed_twice(tmp_path: Path) -> None:
    runs = write_arms(tmp_path / "runs", seeds=2)
    again = write_run(tmp_path / "again", FLAT["winning"], 1)
    message = verdict(*runs, again, code=1)
    assert str(again) in message and str(tmp_path / "runs" / "winning-1") in message and "seed 1 twice" in message


def test_seeds_that_do_not_differ_are_doubted(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{arm}-{seed}", FLAT[arm], seed, tickets=arm) for arm in FLAT for seed in (0, 1)]
    assert "copies of one run?" in verdict(*runs)
    assert "copies" not in verdict(*write_arms(tmp_path / "real"))


def test_other_validation_images_are_told(tmp_path: Path) -> None:
    runs = write_arms(tmp_path, seeds=1)
    assert "WARNING" not in verdict(*runs)
    table = pq.read_table(runs[0] / "predictions.parquet")
    keys = [*table["key"].to_pylist()[:-1], "val/other"]
    pq.write_table(table.set_column(0, "key", pa.array(keys)), runs[0] / "predictions.parquet")
    assert "WARNING: not all runs were validated on the same images" in verdict(*runs)
    for run in runs[1:]:
        table = pq.read_table(run / "predictions.parquet")
        pq.write_table(
            table.set_column(0, "key", pa.array([f"no/{i}" for i in range(IMAGES)])), run / "predictions.parquet"
        )
    assert "no image in common" in verdict(*runs, code=1)


def test_files(tmp_path: Path) -> None:
    out = tmp_path / "out" / "deep"
    output = verdict(*write_arms(tmp_path / "runs"), "-o", out)
    names = ["verdict.html", "verdict.json", "verdict.md", "verdict.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with Image.open(out / "verdict.png") as picture:
        picture.load()
        assert picture.size == (1200, 500) and len(set(picture.convert("L").resize((120, 50)).tobytes())) > 20
    text = (out / "verdict.md").read_text()
    widths = {
        line.count("|") for line in text.split("Top-1 in %")[1].split("Differences")[0].splitlines() if "|" in line
    }
    assert widths == {10} and "**deit_tiny, evit, K=20: the claim holds" in text
    assert str(out / "verdict.json") in output
    content = json.loads((out / "verdict.json").read_text())
    assert content["margin"] == 1.0 and len(content["runs"]) == 9


def test_the_page_says_what_the_report_says(tmp_path: Path) -> None:
    runs = write_arms(tmp_path / "<script>alert(1)<", shift={"winning": -9})
    output = verdict(*runs, "-o", tmp_path / "out")
    page = Page((tmp_path / "out" / "verdict.html").read_bytes())
    check_self_contained(page, scripts=1)
    text = " ".join("".join(page.texts["span"]).split())
    assert text.startswith("deit_tiny, evit, K=20: the claim fails: ") and text in " ".join(output.split())
    assert page.texts["strong"] == ["fails"]
    assert str(runs[0]) in page.texts["code"]
    cells = [cell for cell in page.texts["td"] if cell in ("54.00 ±0.71", "57.00 ±0.71")]
    assert sorted(set(cells)) == ["54.00 ±0.71", "57.00 ±0.71"]
    points = [a["aria-label"] for tag, a in page.tags if tag == "g" and a.get("class") == "point"]
    assert points[0] == "winning (a): 54.00 ± 0.71 % (K=20, 0.2 GMACs, 3 seeds)" and len(points) == 6
    again = tmp_path / "again"
    verdict(*runs, "-o", again)
    assert (again / "verdict.html").read_bytes() == (tmp_path / "out" / "verdict.html").read_bytes()


@pytest.mark.long
@needs_chromium
def test_points_say_what_they_are_in_a_browser(tmp_path: Path, chromium: Browser) -> None:
    verdict(*write_arms(tmp_path / "runs"), "-o", tmp_path / "out")
    chromium.open(tmp_path / "out" / "verdict.html")
    point, tip = "document.querySelectorAll('.point')[1]", "document.getElementById('tip')"
    assert chromium.js(f"{tip}.hidden")
    x, y = chromium.js(
        f"(({{ x, y, width, height }}) => [x + width / 2, y + height / 2])({point}.getBoundingClientRect())"
    )
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert chromium.js(f"{tip}.checkVisibility()")
    assert chromium.js(f"{tip}.textContent === {point}.getAttribute('aria-label')")
    assert chromium.js("document.querySelectorAll('.line.on').length") == 3, "in both panels and the legend"
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert chromium.js(f"{tip}.hidden") and chromium.js("document.querySelectorAll('.line.on').length") == 0
    chromium.js(f"{point}.focus()")
    assert chromium.js(f"{tip}.checkVisibility()")
    for width in (360, 1600):
        chromium.resize(width, 800)
        assert chromium.js("document.documentElement.scrollWidth") <= width
    chromium.resize(1200, 900)
    assert chromium.complaints() == []


def test_starts_without_torch_or_plots() -> None:
    code = "import sys; from trainer.verdict import claim, cli, files, report; print([m for m in ('torch', 'matplotlib', 'scipy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_selectors_run_is_named_for_what_it_is(tmp_path):
    run = write_run(tmp_path / "selector", FLAT["full"], tickets="full", drop_blocks=[3, 6, 9])
    assert "a ticket selector's run (it has drop_blocks), which is of no arm" in verdict(run, code=1)


def test_full_runs_of_packed_tickets_are_held_against_tickets_of_their_own_k(tmp_path):
    """Swin's small-dense: full at 16 tokens is another, smaller model than full at 25."""
    runs = []
    for tokens, full in ((16, 40), (25, 70)):
        for arm, (top1, _, _) in FLAT.items():
            for seed in (0, 1):
                figures = (top1, full + seed, 44) if arm == "full" else (top1 + seed, 50 + seed, 44)
                folder = tmp_path / f"{arm}-{tokens}-{seed}"
                run = write_run(folder, figures, seed, tickets=arm, tokens=tokens, resolved=tokens)
                runs.append(run)
    verdict(*runs, "-o", tmp_path / "out")
    verdicts = json.loads((tmp_path / "out/verdict.json").read_text())["models"][0]["verdicts"]
    assert {v["tokens"]: round(v["a_minus_c"]["value"], 6) for v in verdicts} == {16: 23, 25: -7}


def test_every_arm_has_a_look_and_its_shape_is_drawn_on_the_page() -> None:
    looks = panels.LOOKS
    assert set(looks) == {*ARMS, "resized"} and len(set(looks.values())) == len(looks)
    assert {marker for _, marker in looks.values()} <= set(SHAPES)


def test_an_arm_has_its_own_color_and_shape_in_every_picture(tmp_path: Path, monkeypatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, set[tuple[float, ...]]] = {}
    errorbar = Axes.errorbar

    def noted(axis: Any, *points: Any, **looks: Any) -> Any:
        drawn.setdefault(looks["marker"], set()).add(looks["color"])
        return errorbar(axis, *points, **looks)

    monkeypatch.setattr(Axes, "errorbar", noted)
    runs = write_arms(tmp_path / "runs")
    blue, orange, black = (0.0, 0.447, 0.698), (0.835, 0.369, 0.0), (0.0, 0.0, 0.0)
    for given in (runs, runs[3:], [*runs, *write_arms(tmp_path / "more", set_id="d" * 64, set_method="n")[:3]]):
        drawn.clear()
        verdict(*given, "-o", tmp_path / "out")
        found = {marker: sorted(tuple(round(part, 3) for part in color) for color in drawn[marker]) for marker in drawn}
        assert found.pop("s") == [orange] and found.pop("X") == [black]
        # A second line of an arm, of another set, is a paler one.
        paler = [(0.4, 0.668, 0.819)] if len(given) > 9 else []
        assert found == ({} if given == runs[3:] else {"o": [blue, *paler]})
