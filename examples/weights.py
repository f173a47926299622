"""The study of weight tickets: what study.py's `weights` runs, on cluttered digits and on symbols.

Parts of it are lists of commands for one seed; those that need what others write wait for it.
"""

import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from commands import HERE, RECIPE, Command, figures, mine, plus_minus, run_all, show, training, write_table
from trainer.config import read_yaml
from trainer.verdict.statistics import difference, mean, pooled

SELECTOR = "test_vit"  # the student's own model; examples/digits.yaml names it too
# IMP keeps .1 ** (1/3) of the weights a level, so that level 3 of 4 has s = .9.
LEVELS, SPARSITY, AT_90 = 4, 0.953584112, 3
TOKENS = 9  # LOTUS: a quarter of the patches
MARGIN = 3  # points: five seeds here tell no less apart
SPARSE, TO_99 = 4, 0.99  # IMP on the tickets themselves; level 3 of 4 has s = .968
GRID = list(itertools.product((1.0, 3.0), (3e-4,)))  # of RST: power and learning rate


@dataclass(frozen=True, eq=False)
class Study:
    """One data set's.

    Attributes:
        home: its weight tickets, runs and sets.
        tickets: the set that all its runs are trained on.
        epochs: of every training but those of as many updates as RST's in all.
        flags: of every command that trains.
    """

    home: Path
    tickets: Path
    epochs: int
    flags: Sequence[object] = ()

    def mine(self, name: str, seed: int, *flags: object) -> Command:
        """A weight ticket, mined on all patches."""
        out = self.home / f"{name}-{seed}"
        words = ["datalth-weights", "mine", "--out", out, "--shards", self.tickets, "-c", RECIPE]
        return Command([*words, *self._flags(self.epochs, seed, *flags)], out / "manifest.json")

    def run(self, name: str, seed: int, *flags: object, ticket: str | None = None, longer: int = 1) -> Command:
        """A training on all patches, unless flags say otherwise, with a weight ticket of its seed or without one."""
        words = self._flags(longer * self.epochs, seed, *flags)
        needs = []
        if ticket is not None:
            words += ["--weight-ticket", self.home / f"{ticket}-{seed}"]
            needs.append(self.home / f"{ticket}-{seed}" / "manifest.json")
        return training(self.home / "runs", f"{name}-{seed}", self.tickets, *words, needs=needs)

    def _flags(self, epochs: int, seed: int, *flags: object) -> list[object]:
        given = [*self.flags, *flags]
        patches = [] if "--tickets" in given else ["--tickets", "full"]
        return [*patches, "--epochs", epochs, "--seed", seed, *given]

    def imp(self, seed: int) -> Command:
        """Level 0 is dense; the others are the winning arm's runs."""
        return self.mine("imp", seed, "--levels", LEVELS, "--sparsity", SPARSITY)

    def controls(self, seed: int, ticket: str, level: int, *arms: str) -> list[Command]:
        """Runs of a ticket's other arms."""
        at = ["--weight-level", level, "--weight-arm"]
        return [self.run(f"{ticket}-{level}-{arm}", seed, *at, arm, ticket=ticket) for arm in arms]


def lth(study: Study, seed: int) -> list[Command]:
    """IMP, and the controls at both sparsities."""
    return [
        study.imp(seed),
        study.mine("random", seed, "--method", "random"),
        *study.controls(seed, "imp", AT_90, "reinit", "shuffled"),
        study.run("random", seed, ticket="random"),
        *study.controls(seed, "imp", LEVELS, "reinit", "shuffled", "random"),
    ]


def lotus(study: Study, seed: int) -> list[Command]:
    """Data tickets times weight tickets; what is trained on all patches is of `lth`."""
    at, mask = ["--tokens", TOKENS, "--tickets"], ["--weight-level", AT_90]
    return [
        study.run("tickets-imp", seed, *at, "winning", *mask, ticket="imp"),
        study.run("tickets-dense", seed, *at, "winning"),
        study.run("tickets-random", seed, *at, "winning", ticket="random"),
        study.run("patches-imp", seed, *at, "random", *mask, ticket="imp"),
    ]


def sparse(study: Study, seed: int) -> list[Command]:
    """IMP on tickets, a mining for a quarter of the arithmetic, to where random masks fall behind."""
    on = ["--tickets", "winning", "--tokens", TOKENS]
    arms = ("reinit", "shuffled", "random")
    return [
        study.mine("sparse", seed, *on, "--levels", SPARSE, "--sparsity", TO_99),
        *(study.run(f"sparse-{arm}", seed, *on, "--weight-arm", arm, ticket="sparse") for arm in arms),
    ]


def oneshot(study: Study, seed: int) -> list[Command]:
    """All at once, after one training."""
    return [
        study.mine("oneshot", seed, "--method", "oneshot"),
        *study.controls(seed, "oneshot", 1, "reinit", "shuffled"),
    ]


def dlth(study: Study, seed: int) -> list[Command]:
    """RST, and a random mask and dense after as many updates as its two trainings have."""
    return [
        study.mine("rst", seed, "--method", "rst", *tuned(study)),
        study.run("rst", seed, ticket="rst"),
        study.run("random-longer", seed, ticket="random", longer=2),
        study.run("dense-longer", seed, longer=2),
    ]


def soup(study: Study, seed: int) -> list[Command]:
    """Votes of five short trainings."""
    return [study.mine("soup", seed, "--method", "soup"), study.run("soup", seed, ticket="soup")]


def symbols(study: Study, seed: int) -> list[Command]:
    """IMP in two levels, .9 and .99, and its controls at the last."""
    return [
        study.mine("imp", seed, "--levels", 2, "--sparsity", TO_99),
        *study.controls(seed, "imp", 2, "reinit", "shuffled", "random"),
    ]


PARTS: dict[str, Callable[[Study, int], list[Command]]] = {
    "lth": lth, "lotus": lotus, "oneshot": oneshot, "sparse": sparse, "dlth": dlth, "soup": soup, "symbols": symbols,
}  # fmt: skip


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of `results`, or a new one.")
@click.option("--seeds", default=5, show_default=True, help="Of every arm; symbols have three at most.")
@click.option("--epochs", default=20, show_default=True, help="Of every run; another number needs another folder.")
@click.option("--at-once", default=2, show_default=True, help="Commands.")
@click.option("--device", help="cuda, cpu.  [default: cuda where there is one]")
@click.option(
    "--parts", default=",".join(PARTS), show_default=True, help="Which, the most wanted first; '': only judge."
)
@click.option("--tune", is_flag=True, help="First tune RST on seed 0; what is found there is left alone afterwards.")
@click.option(
    "--pictures", default=3000, show_default=True, help="Of each training split; a sixth more for validation."
)
def weights(
    out: Path, seeds: int, epochs: int, at_once: int, device: str | None, parts: str, tune: bool, pictures: int
) -> None:
    """LTH, DLTH and LOTUS with their controls; LTH once more on symbols. What docs/WEIGHTS.md shows."""
    chosen = [part for part in parts.split(",") if part]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise click.UsageError(f"--parts {unknown[0]}: expected some of {', '.join(PARTS)}")
    flags = ["--device", device] if device else []
    studies = {
        name: Study(out / f"weights-{name}", out / f"weights-{name}" / "tickets", epochs, flags)
        for name in ("digits", "symbols")
    }
    wanted = {"digits": bool(set(chosen) - {"symbols"}) or tune, "symbols": "symbols" in chosen}
    for name, make in (("digits", digits_set), ("symbols", symbols_set)):
        if wanted[name] and not (studies[name].tickets / "manifest.json").exists():  # one from elsewhere will do
            make(out, studies[name], pictures)
    if tune:
        tune_rst(studies["digits"], at_once)
    commands: list[Command] = []
    for part in chosen:
        study, few = (studies["symbols"], min(3, seeds)) if part == "symbols" else (studies["digits"], seeds)
        of_seeds = [PARTS[part](study, seed) for seed in range(few)]
        commands += itertools.chain.from_iterable(zip(*of_seeds, strict=True))  # the same of all seeds, then the next
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_all(commands, at_once)
    finally:  # what is there is judged, after `timeout` too
        runs = {study: finished(study.home) for study in studies.values()}
        runs = {study: found for study, found in runs.items() if found}
        tables = [[f"{study.home.name}:", "", *rows(found), ""] for study, found in runs.items()]
        write_table(out / "weights.md", [*itertools.chain.from_iterable(tables)][:-1])
        for study, found in runs.items():
            judge(out, study.home, found)


def draw_pictures(out: Path, script: str, count: int) -> None:
    if not out.exists():
        show(HERE / script, "--out", out, "--train", count, "--val", count // 6)


def digits_set(out: Path, study: Study, pictures: int) -> None:
    """Views stored by the rollout of a dense model, seed 0: ranked ones are read fastest, in full as well."""
    home, base = study.home, out / "base"
    draw_pictures(out / "digits", "make_digits.py", pictures)
    mine(base, "--data", out / "digits", "--method", "center", "--tokens", TOKENS, "--views", 1)
    dense = training(home, "selector", base, "--tickets", "full", "--seed", 0, *study.flags)
    run_all([dense], 1)
    mine(study.tickets, "--data", base, "--images", "ranked", "--method", "rollout", "--selector", SELECTOR,
         "--weights", home / "selector" / "model_best.safetensors", "--tokens", TOKENS, *study.flags)  # fmt: skip


def symbols_set(out: Path, study: Study, pictures: int) -> None:
    """They are trained on all patches alone."""
    draw_pictures(out / "symbols", "make_symbols.py", pictures)
    mine(study.tickets, "--data", out / "symbols", "--images", "ranked", "--method", "center", "--tokens", TOKENS,
         "--views", 1, *study.flags)  # fmt: skip


def tuned(study: Study) -> list[object]:
    """RST's flags: what `tune_rst` found, else the defaults."""
    path = study.home / "rst.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return ["--power", found["power"], "--mining-lr", found["mining_lr"]]


def tune_rst(study: Study, at_once: int) -> None:
    """Power and learning rate of the transformation, by what seed 0 reaches after it; written once."""
    path = study.home / "rst.json"
    if path.exists():
        return
    tuning = Study(study.home / "tuning", study.tickets, study.epochs, study.flags)
    names = {f"rst-{power:g}-{lr:g}": (power, lr) for power, lr in GRID}
    commands = [
        tuning.mine(name, 0, "--method", "rst", "--power", power, "--mining-lr", lr)
        for name, (power, lr) in names.items()
    ]
    run_all([*commands, *(tuning.run(name, 0, ticket=name) for name in names)], at_once)
    top1 = {name: figures(tuning.home / "runs" / f"{name}-0")["all"] for name in names}
    power, lr = names[max(top1, key=lambda name: top1[name])]
    path.write_text(json.dumps({"power": power, "mining_lr": lr, "top1": top1}, indent=1) + "\n", encoding="utf-8")


def finished(home: Path) -> list[Path]:
    """Runs that arms are made of. Of `oneshot` and `sparse` level 0 is dense again, and at s = .9 there is imp's mask; what RST
    and soup train on the way is of no arm."""
    patterns = ("runs/*", "imp-*/level-*", "oneshot-*/level-01", "sparse-*/level-0[34]")
    return sorted(path.parent for one in patterns for path in home.glob(f"{one}/final.json"))


def judge(out: Path, home: Path, runs: Sequence[Path]) -> None:
    """The verdict, and the picture of seed 0's ticket."""
    for ticket in home.glob("imp-0/manifest.json"):
        show("datalth-weights", "info", ticket.parent, "-o", out / f"{home.name}.png")
    show("datalth-verdict", *runs, "--margin", MARGIN, "-o", out / f"verdict-{home.name}")


def rows(runs: Iterable[Path]) -> list[str]:
    """A table: what runs of all seeds reached, as they were trained, beside dense on all patches."""
    top1: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        args = read_yaml(run / "args.yaml")
        cost = json.loads((run / "final.json").read_text(encoding="utf-8"))["cost"]
        method, arm = args["weight_method"], args["weight_arm"]
        name = "random mask" if "random" in (method, arm) else f"{method} {arm}" if method else "dense"
        sparsity = round(args["weight_sparsity"] or 0.0, 3)
        key = (args["tickets"], name, sparsity, cost["updates"], cost.get("mining_updates", 0))
        top1.setdefault(key, []).append(figures(run)["all" if args["tickets"] == "full" else "tickets"])
    samples = {key: np.array(values) for key, values in top1.items()}
    spread = pooled([*samples.values()])
    dense = samples.get(min((key for key in samples if key[:3] == ("full", "dense", 0.0)), default=()))
    lines = ["| patches | weights | s | updates | of mining | seeds | top-1 | minus dense |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for key, sample in sorted(samples.items()):
        cells = [*key, len(sample), plus_minus(mean(sample, spread))]
        cells.append("" if dense is None else plus_minus(difference(sample, dense, spread), "+"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
