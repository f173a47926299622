"""The whole story on cluttered digits, through the public commands alone.

    python examples/study.py demo --out .demo         # minutes; what `make demo` runs
    python examples/study.py results --out .results   # an hour and more; run again, it goes on
    python examples/study.py families --out .results  # another hour
    python examples/study.py ranked --out .results    # two hours
    python examples/study.py lengths --out .lengths   # minutes
    python examples/study.py weights --out .results   # hours on two cores

Every command is printed as one would type it. Trainings run two at a time, one thread each, with logs beside their runs.
"""

import csv
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rivals import pretrained, rivals

from commands import HERE, figures, mine, mining, plus_minus, run_all, say, show, training, write_table
from trainer.verdict.statistics import difference, mean, pooled
from weights import SELECTOR, weights

AT_ONCE = 2  # trainings
# The demo: half as deep a student, half as long. What three seeds tell apart is 8 points; 5 points would take five seeds, twice as long.
DEMO = ["--model-kwargs", "depth=3", "--epochs", 5, "--lr", 2e-3]
TOKENS, SEEDS, MARGIN, BATCH = 9, range(3), 10, 64
SWIN = ["embed_dim=24", "depths=(2,2,2)", "num_heads=(1,2,4)"]
LVVIT = ["embed_dim=64", "depth=4", "num_heads=4", "stem_width=16"]
MODELS: dict[str, list[Any]] = {  # name: timm's model, its arguments, flags
    "swin-small-dense": ["swin_tiny_patch4_window7_224", [*SWIN, "window_size=4"], "--tokens", 16],
    "swin-zero": ["swin_tiny_patch4_window7_224", [*SWIN, "window_size=6"], "--tokens", 16, "--feed", "zero"],
    "lvvit-late": ["lvvit_t", LVVIT],
    "lvvit-early": ["lvvit_t", LVVIT, "--feed", "early"],
    "lvvit-labels": ["lvvit_t", LVVIT, "--mix-token"],
    "cnn": ["test_resnet", []],
    "hiera": ["hiera_tiny_224", ["embed_dim=24", "num_heads=1", "stages=(1,1,2,1)"]],
}
LONGER = 40  # epochs on random crops, where digits stand off the grid
PICTURES = 3000  # of the training split
CROPS = ["--scale", 0.5, 1, "--ratio", 0.9, 1.1, "--hflip", 0]
Job = tuple[str, Path, Sequence[object]]  # name of the run, ticket set, further flags


def train(runs: Path, jobs: Sequence[Job]) -> None:
    """Train what is not finished, two at a time."""
    run_all([training(runs, name, tickets, *flags) for name, tickets, flags in jobs], AT_ONCE)


@click.group()
def main() -> None:
    """Mine, look, train, judge: on cluttered digits."""


main.add_command(weights)
main.add_command(rivals)
main.add_command(pretrained)


@main.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
def demo(out: Path) -> None:
    """Winning tickets, random ones and all patches at 9 of 36 patches, three seeds each: does a ≈ c > b hold?"""
    start = time.perf_counter()
    digits, base, tickets, runs = out / "digits", out / "base", out / "tickets", out / "runs"
    click.echo(
        "Does a Vision Transformer need every patch of a picture? Nine small ones are trained, three of each kind:"
        "\n  a  on winning tickets: the 9 of 36 patches that a ticket selector picks\n  b  on 9 random patches\n  c  on all 36\nThe claim: a is about as good as c, and better than b. About three minutes on two free cores;"
        " every command is shown as you would type it."
    )
    say("1 of 5  Pictures: a digit among pieces of other digits. Where it stands is known, but no model is told")
    show(HERE / "make_digits.py", "--out", digits)
    mine(base, "--data", digits, "--method", "center", "--tokens", TOKENS, "--views", 1)
    say(
        "2 of 5  Train on all patches (c). The first of these models is the selector too: it looks once at each picture"
    )
    full = [training(runs, f"full-{seed}", base, *DEMO, "--tickets", "full", "--seed", seed) for seed in SEEDS]
    selector = full[0].done.parent
    selection = ["--method", "rollout", "--selector", f"local-dir:{selector}", "--tokens", TOKENS,
                 "--weights", selector / "model_best.safetensors"]  # fmt: skip
    ranked = mining(tickets, "--data", base, "--images", "link", *selection, needs=[full[0].done])
    run_all([*full[:AT_ONCE], ranked, *full[AT_ONCE:]], AT_ONCE)
    say(f"3 of 5  Look: how much of the digit do the selector's {TOKENS} patches hold, and how much do random ones?")
    show("datalth-shards", "score", tickets, "--masks", digits / "masks", "--split", "train")
    show("datalth-shards", "sheet", tickets, "-o", out / "tickets.png")
    say("4 of 5  Train on tickets (a) and on random patches (b); both are tested on tickets")
    run_all([training(runs, f"{arm}-{seed}", tickets, *DEMO, "--tickets", arm, "--seed", seed)
             for seed in SEEDS for arm in ("winning", "random")], AT_ONCE)  # fmt: skip
    say(
        f"5 of 5  The verdict. As good as c means here: within {MARGIN} points. {len(SEEDS)} seeds tell no finer, their"
        " intervals are some 8 points to each side; 1 point takes hours"
    )
    show(
        "datalth-verdict",
        *sorted(p.parent for p in runs.glob("*/final.json")),
        "--margin",
        MARGIN,
        "-o",
        out / "verdict",
    )
    say("What it cost")
    click.echo(bill(runs, PICTURES))
    click.echo(
        f"\nDone in {time.perf_counter() - start:.0f} s. Look at {out}/tickets.png (pictures and their tickets) and at"
        f" {out}/verdict/verdict.html (accuracy against cost).\nThis is easy data, a tiny model and a short training:"
        " docs/RESULTS.md has five seeds trained longer, and controls. Your own photos: README.md."
    )


def bill(runs: Path, pictures: int) -> str:
    """The arithmetic of a's trainings with its selector's, against c's; a step is three forward passes."""
    costs = {arm: [json.loads(path.read_text(encoding="utf-8"))["cost"] for path in sorted(runs.glob(f"{arm}-*/final.json"))]
             for arm in ("winning", "full")}  # fmt: skip
    a, c = (sum(3 * cost["train_gmacs"] * cost["updates"] * BATCH for cost in costs[arm]) for arm in costs)
    first = costs["full"][0]
    selector = 3 * first["train_gmacs"] * first["updates"] * BATCH + first["dense_gmacs"] * pictures
    count = len(costs["winning"])
    return (
        f"{count} trainings on all patches take {c:,.0f} GMACs (1e9 multiply-adds), {count} on tickets {a:,.0f}, and their"
        f" selector, trained and asked once about each picture, {selector:,.0f}: together {(a + selector) / c:.0%} of c. The"
        f" selector is paid once: each further student adds {a / c:.0%}."
    )


@main.command()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write into; one that is there goes on."
)
@click.option("--seeds", default=5, show_default=True, help="Of every arm.")
def results(out: Path, seeds: int) -> None:
    """Every arm and its controls at three K; how many stored views it takes. What docs/RESULTS.md shows."""
    digits = pictures(out)
    arms(out, digits, range(seeds))
    views(out, digits, range(seeds))


@main.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of `results`, or a new one.")
@click.option("--seeds", default=3, show_default=True, help="Of every arm.")
def families(out: Path, seeds: int) -> None:
    """Swin, LV-ViT, a CNN and Hiera on tickets; a selector that is taught to drop patches."""
    digits = pictures(out)
    teach(out, digits, range(seeds))
    selectors(out, digits, range(seeds))
    other_models(out, digits, range(seeds))


def pictures(out: Path) -> Path:
    digits = out / "digits"
    if not digits.exists():
        show(HERE / "make_digits.py", "--out", digits)
    return digits


def teach(out: Path, digits: Path, seeds: range) -> list[Job]:
    """Base, models trained on all patches (c), and the tickets of the first; returns its jobs."""
    base, runs = out / "base", out / "runs"
    mine(base, "--data", digits, "--method", "center", "--tokens", 9, "--views", 1)
    full: list[Job] = [(f"full-{seed}", base, ["--tickets", "full", "--seed", seed]) for seed in seeds]
    train(runs, full)
    mine(out / "tickets", "--data", base, "--images", "link", "--method", "rollout", "--selector", SELECTOR,
         "--weights", runs / "full-0" / "model_best.safetensors", "--tokens", 9)  # fmt: skip
    return full


def arms(out: Path, digits: Path, seeds: range) -> None:
    """One set of tickets; its rankings at K = 14, 9 and 5 are the keep rates 0.7, 0.6 and 0.5 at three stages."""
    full = teach(out, digits, seeds)
    base, tickets, runs = out / "base", out / "tickets", out / "runs"
    jobs: list[Job] = []
    for seed, tokens in itertools.product(seeds, (14, 9, 5)):
        at = ["--tokens", tokens, "--seed", seed]
        for arm in ("winning", "random", "center"):
            jobs.append((f"{arm}-{tokens}-{seed}", tickets, ["--tickets", arm, *at]))
        for arm in ("winning", "random"):
            jobs.append((f"{arm}-unmasked-{tokens}-{seed}", tickets, ["--tickets", arm, "--unmask-epochs", 3, *at]))
    for seed in seeds:
        for arm in ("random-fixed", "inverse"):
            jobs.append((f"{arm}-9-{seed}", tickets, ["--tickets", arm, "--tokens", 9, "--seed", seed]))
        for tokens in (25, 16, 9):
            jobs.append((f"resized-{tokens}-{seed}", base, ["--resize-to-tokens", "--tokens", tokens, "--seed", seed]))
    train(runs, jobs)
    judge(runs, [name for name, _, _ in [*full, *jobs]], out / "arms")


def selectors(out: Path, digits: Path, seeds: range) -> None:
    """evit's tickets at K = 9: of the model trained on all patches, and of the same taught to drop for 5 epochs."""
    base, runs, teacher = out / "base", out / "runs", out / "runs" / "full-0"
    dropping = ["--tickets", "full", "--drop-blocks", "1,3,4", "--keep-rate", 0.6, "--epochs", 5, "--lr", 3e-4]
    train(runs, [("dropping", base, [*dropping, "--initial-checkpoint", teacher / "model_best.safetensors"])])
    names: list[str] = [f"full-{seed}" for seed in seeds]
    for name, selector in (("evit", teacher), ("evit-dropping", runs / "dropping")):
        tickets = out / name
        mine(tickets, "--data", base, "--images", "link", "--method", "evit", "--selector", SELECTOR,
             "--weights", selector / "model_best.safetensors", "--keep-rate", 0.6)  # fmt: skip
        show("datalth-shards", "score", tickets, "--masks", digits / "masks")
        jobs: list[Job] = [
            (f"{name}-{arm}-{seed}", tickets, ["--tickets", arm, "--seed", seed])
            for seed in seeds
            for arm in ("winning", "random")
        ]
        train(runs, jobs)
        names += [job[0] for job in jobs]
    judge(runs, names, out / "selectors")


def other_models(out: Path, digits: Path, seeds: range) -> None:
    """Small models of each family, 5 epochs, three arms; Hiera on tickets of its own units of 32 px."""
    runs, units = out / "runs", out / "units"
    few = ["--epochs", 5]
    mine(out / "base-32", "--data", digits, "--method", "center", "--tokens", 4, "--views", 1, "--patch-size", 32)
    coarse = ["--tickets", "full", "--seed", 0, "--model-kwargs", "patch_size=32"]
    # A classifier of digits anywhere and at any size, for token labels: the digits of `tickets` stand on a grid.
    mine(out / "crops", "--data", digits, "--method", "center", "--tokens", 9, "--views", 8, *CROPS)
    labeller = ["--model", "test_resnet", "--tickets", "full", "--seed", 0, "--epochs", 15]
    train(runs, [("full-32", out / "base-32", coarse), ("labeller", out / "crops", labeller)])
    mine(units, "--data", out / "base-32", "--images", "link", "--method", "rollout", "--selector", SELECTOR,
         "--weights", runs / "full-32" / "model_best.safetensors", "--patch-size", 32, "--tokens", 4)  # fmt: skip
    mine(out / "labels", "--data", out / "base", "--images", "link", "--method", "none", "--token-labels",
         "test_resnet", "--token-label-weights", runs / "labeller" / "model_best.safetensors",
         "--token-label-size", 128)  # fmt: skip
    for name in MODELS:
        labels = ["--token-labels", out / "labels"] if "labels" in name else []
        tickets = units if name == "hiera" else out / "tickets"
        jobs: list[Job] = [
            (f"{name}-{arm}-{seed}", tickets, [*family(name, arm, seed), *few, *labels])
            for seed in seeds
            for arm in ("winning", "random", "full")
        ]
        train(runs, jobs)
        judge(runs, [job[0] for job in jobs], out / "families" / name)
    lines = ["| family | K | a | b | c | a - c | a - b | loss of a, first to last epoch | its MACs, of dense |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|", *(row(out, name) for name in MODELS)]
    write_table(out / "families.md", lines)


def row(out: Path, name: str) -> str:
    """One family in the table: each arm in its own protocol, from its verdict and its first run's summary."""
    found = json.loads((out / "families" / name / "verdict.json").read_text(encoding="utf-8"))["models"][0]
    groups = {group["arm"]: group for group in found["groups"]}
    own = [
        f"{g['value']:.1f} ±{g['half']:.1f}" for g in (groups[a]["top1"]["own"] for a in ("winning", "random", "full"))
    ]
    verdict = found["verdicts"][0]
    differences = [
        f"{d['value']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f})" for d in (verdict["a_minus_c"], verdict["a_minus_b"])
    ]
    with open(out / "runs" / f"{name}-winning-0" / "summary.csv", newline="", encoding="utf-8") as file:
        losses = [float(line["train_loss"]) for line in csv.DictReader(file)]
    loss = f"{losses[0]:.2f} to {losses[-1]:.2f}"
    cost = json.loads((out / "runs" / f"{name}-winning-0" / "final.json").read_text(encoding="utf-8"))["cost"]
    share = cost["train_gmacs"] / cost["dense_gmacs"]
    return f"| {' | '.join([name, str(verdict['tokens']), *own, *differences, loss, f'{share:.0%}'])} |"


def family(name: str, arm: str, seed: int) -> list[object]:
    """Flags of a run of one of MODELS."""
    model, arguments, *flags = MODELS[name]
    words = [word for argument in arguments for word in ("--model-kwargs", argument)]
    return ["--model", model, *words, *flags, "--tickets", arm, "--seed", seed]


def views(out: Path, digits: Path, seeds: range) -> None:
    """K = 14, 40 epochs: V - 1 stored views an image are trained on in turn."""
    stored = (2, 4, 8, 16)
    crops(out, digits, stored, LONGER)
    names = {count: [f"views-{count}-{seed}" for seed in seeds] for count in stored}
    train(out / "runs", [(names[count][seed], out / f"tickets-{count}", ["--seed", seed, "--epochs", LONGER])
                         for seed in seeds for count in stored])  # fmt: skip
    found = measured(out / "runs", names)
    lines = ["| V | trained on | tickets | all |", "|---:|---:|---:|---:|"]
    for count in stored:
        texts = [plus_minus(mean(one[count], pooled([*one.values()]))) for one in found]
        lines.append(f"| {count} | {count - 1} | {' | '.join(texts)} |")
    write_table(out / "views.md", lines)


def crops(out: Path, digits: Path, stored: Sequence[int], epochs: int) -> list[object]:
    """Sets of random crops, half the area and more, as base-V; links with a selector's tickets, tickets-V.

    Returns:
        Flags of the selector: one for all, trained on the 15 training views of base-16.
    """
    for count in stored:
        mine(out / f"base-{count}", "--data", digits, "--method", "center", "--tokens", 14, "--views", count, *CROPS)
    train(out / "runs", [("views-selector", out / "base-16", ["--tickets", "full", "--seed", 0, "--epochs", epochs])])
    weights = out / "runs" / "views-selector" / "model_best.safetensors"
    selection = ["--method", "rollout", "--selector", SELECTOR, "--weights", weights, "--tokens", 14]
    for count in stored:
        mine(out / f"tickets-{count}", "--data", out / f"base-{count}", "--images", "link", *selection)
    return selection


@main.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of `results`, or a new one.")
@click.option("--seeds", default=3, show_default=True, help="Of every set.")
@click.option("--epochs", default=LONGER, show_default=True, help="Of every run; another number needs another folder.")
def ranked(out: Path, seeds: int, epochs: int) -> None:
    """Views stored by their ranking against copied pictures: what it costs in accuracy. Mixing by patches."""
    stored, qualities = (4, 8, 16), (85, 90, 95)
    selection = crops(out, pictures(out), stored, epochs)
    sets = {(count, "copy"): (out / f"tickets-{count}", f"views-{count}") for count in stored}
    for count, quality in itertools.product(stored, qualities):
        tickets = out / f"ranked-{count}-{quality}"
        mine(tickets, "--data", out / f"base-{count}", "--images", "ranked", "--quality", quality, *selection)
        sets[count, str(quality)] = (tickets, tickets.name)
    mixed = {mixing: f"mixing-{mixing}" for mixing in ("pixels", "patches")}
    jobs: list[Job] = []
    for seed in range(seeds):
        at = ["--seed", seed, "--epochs", epochs]
        jobs += [(f"{name}-{seed}", tickets, at) for tickets, name in sets.values()]
        mixing = ["--mixup", 0.8, "--cutmix", 1.0, "--mixing"]
        jobs += [(f"{name}-{seed}", out / "ranked-16-90", [*mixing, how, *at]) for how, name in mixed.items()]
    train(out / "runs", jobs)
    accuracy_of_sets(out, sets, seeds)
    found = measured(out / "runs", {how: [f"{name}-{seed}" for seed in range(seeds)] for how, name in mixed.items()})
    lines = ["| mixing | tickets | minus pixels | all | minus pixels |", "|---|---:|---:|---:|---:|"]
    for how in mixed:
        lines.append(f"| {how} | {' | '.join(against(found, [how], ['pixels']))} |")
    write_table(out / "mixing.md", lines)


def accuracy_of_sets(out: Path, sets: dict[tuple[int, str], tuple[Path, str]], seeds: int) -> None:
    """The table of `ranked`; sets: (V, copy or a quality): its folder, and the name of its runs."""
    found = measured(
        out / "runs", {key: [f"{name}-{seed}" for seed in range(seeds)] for key, (_, name) in sets.items()}
    )
    lines = ["| V | images | kB a picture | its tickets in copy's | tickets | minus copy | all | minus copy |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|---:|")
    for count, kind in sets:
        folder, link = sets[count, kind][0], sets[count, "copy"][0]
        tars = (out / f"base-{count}" if folder == link else folder).glob("train-*.tar")
        size = sum(tar.stat().st_size for tar in tars) / PICTURES / 1000
        cells = [f"{size:.1f}", f"{agreement(folder, link):.1%}", *against(found, [(count, kind)], [(count, "copy")])]
        lines.append(f"| {count} | {kind} | {' | '.join(cells)} |")
    counts, kinds = (list(dict.fromkeys(part)) for part in zip(*sets, strict=True))
    copies = [(count, "copy") for count in counts]
    for name, some in [*((kind, [kind]) for kind in kinds), ("85 to 95", kinds[1:])]:  # more runs, narrower intervals
        cells = against(found, [*itertools.product(counts, some)], copies)
        lines.append(f"| all | {name} | | | {' | '.join(cells)} |")
    write_table(out / "ranked.md", lines)


def agreement(first: Path, second: Path) -> float:
    """Share of the patches of training tickets that stand in both sets' tickets, over all views."""
    command = [
        sys.executable,
        "-m",
        "shards.inspect.cli",
        "diff",
        str(first),
        str(second),
        "--split",
        "train",
        "--json",
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return float(np.mean([view["overlap"] for view in json.loads(done.stdout)["views"]]))


def measured(runs: Path, groups: dict[Any, list[str]]) -> list[dict[Any, np.ndarray]]:
    """Top-1 of the runs of each group, [seeds]: on tickets, and on all patches."""
    found = {group: [figures(runs / name) for name in names] for group, names in groups.items()}
    return [{group: np.array([run[p] for run in all_]) for group, all_ in found.items()} for p in ("tickets", "all")]


def against(found: list[dict[Any, np.ndarray]], ours: list[Any], theirs: list[Any]) -> list[str]:
    """Cells: top-1 of some groups together and its distance to others', under each protocol."""
    cells = []
    for samples in found:
        spread = pooled([*samples.values()])
        first, second = (np.concatenate([samples[group] for group in groups]) for groups in (ours, theirs))
        cells += [
            plus_minus(mean(first, spread)),
            "" if ours == theirs else plus_minus(difference(first, second, spread), "+"),
        ]
    return cells


@main.command()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write into; not that of `results`."
)
@click.option("--seeds", default=3, show_default=True, help="Of every arm.")
def lengths(out: Path, seeds: int) -> None:
    """Digits on 4, 9 or 16 patches: do tickets of varying length beat a fixed K of the same mean?"""
    digits, masks = out / "digits", out / "masks"
    if not digits.exists():
        show(HERE / "make_digits.py", "--out", digits, "--sizes")
    full = teach(out, digits, range(seeds))
    whole = ["--method", "masks", "--masks", digits / "masks", "--tokens", 12]
    mine(masks, "--data", out / "base", "--images", "link", *whole)
    sets = {"winning": out / "tickets", "random": out / "tickets", "masks": masks}
    jobs: list[Job] = []
    names: dict[Any, list[str]] = {}
    for arm, kind in itertools.product(sets, ("12", "auto:12")):
        names[arm, kind] = [f"{arm}-{kind}-{seed}".replace(":", "-") for seed in range(seeds)]
        flags = ["--tickets", "random" if arm == "random" else "winning", "--tokens", kind, "--seed"]
        jobs += [(name, sets[arm], [*flags, seed]) for seed, name in enumerate(names[arm, kind])]
    train(out / "runs", jobs)
    judge(out / "runs", [name for name, _, _ in [*full, *jobs]], out / "verdict")
    found = measured(out / "runs", names)
    lines = ["| trained on | K | tickets | minus 12 | all | minus 12 |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {arm} | {kind} | {' | '.join(against(found, [(arm, kind)], [(arm, '12')]))} |" for arm, kind in names]
    write_table(out / "lengths.md", lines)


def judge(runs: Path, names: Sequence[str], out: Path) -> None:
    show("datalth-verdict", *(runs / name for name in sorted(names)), "-o", out)


if __name__ == "__main__":
    main()
