"""The study on photos: winning tickets of five selectors against every rival that costs nothing to choose by."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np

from commands import HERE, Command, figures, mining, plus_minus, run_all, show, training, write_table
from shards.inspect.score import recall
from shards.reader import TicketSet
from trainer.verdict.statistics import difference, mean, pooled

RECIPE, SIDE = HERE / "photos.yaml", 128
N, EPOCHS = 64, 6  # patches of a view; of every run that is not longer for a reason
VIEWS = 8  # of a picture, where there are several
FINE_TUNING = 4  # epochs
HALF, QUARTER, MOST = 32, 16, 48
# On one set, whose tickets all are tested on: the best selector's.
ARMS = ("winning", "random", "gaussian", "center", "random-fixed")
MODELS = {
    "dinov2": ["--method", "cls-attention", "--selector", "vit_small_patch14_dinov2"],
    "clip": ["--method", "cls-attention", "--selector", "vit_base_patch16_clip_quickgelu_224"],
}
SETS = ("dinov2", "clip", "rollout", "evit", "entropy", "masks")
FILE = click.Path(exists=True, path_type=Path)
DINOV2 = click.option("--dinov2", required=True, type=FILE, help=f"Weights of timm's {MODELS['dinov2'][-1]}.")
CLIP = click.option("--clip", required=True, type=FILE, help=f"Of its {MODELS['clip'][-1]}.")
FOLDER = click.Path(path_type=Path)
OUT = click.option("--out", required=True, type=FOLDER, help="Folder to write into; one that is there goes on.")
SEEDS = click.option("--seeds", default=3, show_default=True, help="Of every arm.")


class Rivals:
    """Folders and commands of the study.

    Args:
        out: folder of everything.
        weights: of the selectors in MODELS, by their names.
    """

    def __init__(self, out: Path, weights: dict[str, Path]) -> None:
        self.out, self.weights = out, weights
        self.photos, self.base, self.runs = out / "photos", out / "base", out / "runs"

    def run(self, name: str, seed: int, *flags: object, on: str = "dinov2") -> Command:
        """A training on one of the sets."""
        tickets = self.out / on
        words = [*flags, "--seed", seed]
        return training(self.runs, f"{name}-{seed}", tickets, *words, needs=[tickets / "manifest.json"], recipe=RECIPE)

    def mined(self, name: str) -> Command:
        """The tickets of one way to choose, on the pictures of the base."""
        teacher = self.runs / "full-0"
        needs = [self.base / "manifest.json"]
        if name in MODELS:
            how = [*MODELS[name], "--weights", self.weights[name]]
        elif name == "masks":
            how = ["--method", "masks", "--masks", self.photos / "masks"]
        elif name == "entropy":
            how = ["--method", "entropy"]
        else:  # a model of the same pictures, as the paper has it
            how = ["--method", name, "--selector", f"local-dir:{teacher}"]
            how += ["--weights", teacher / "model_best.safetensors"]
            needs.append(teacher / "final.json")
        flags = ["--data", self.base, "--images", "link", "--tokens", HALF, *how]
        return mining(self.out / name, *flags, needs=needs, side=SIDE)

    def of_equal_epochs(self, seeds: range) -> Iterator[Command]:
        """Six epochs, every way to choose."""
        for seed in seeds:
            yield self.run("full", seed, "--tickets", "full", on="base")
        for tokens in (QUARTER, HALF):
            for seed in seeds:
                for arm in ARMS:
                    yield self.run(f"{arm}-{tokens}", seed, "--tickets", arm, "--tokens", tokens)
                for name in SETS[1:]:
                    yield self.run(f"{name}-{tokens}", seed, "--tokens", tokens, on=name)
        for tokens in (49, 36, 25, 16):
            for seed in seeds:
                yield self.run(f"resized-{tokens}", seed, "--resize-to-tokens", "--tokens", tokens, on="base")
        for seed in seeds:
            for arm in ARMS[:3]:
                yield self.run(f"{arm}-{MOST}", seed, "--tickets", arm, "--tokens", MOST)
            yield self.run(f"masks-{MOST}", seed, "--tokens", MOST, on="masks")

    def of_equal_cost(self, seeds: range) -> Iterator[Command]:
        """At half of c's cost in six epochs, and at the whole of it in as many as that takes."""
        for seed in seeds:
            # 4 epochs at a quarter of the patches and 2 at all of them cost what 6 at half of them do.
            last = ["--tokens", QUARTER, "--unmask-epochs", 2]
            for arm in ARMS[:3]:
                yield self.run(f"{arm}-unmasked", seed, "--tickets", arm, *last)
            yield self.run("curriculum", seed, "--resize-to-tokens", *last, on="base")
            twice = ["--epochs", 2 * EPOCHS]
            for arm in ARMS[:3]:
                yield self.run(f"{arm}-long", seed, "--tickets", arm, "--tokens", HALF, *twice)
            yield self.run("curriculum-long", seed, "--resize-to-tokens", "--tokens", QUARTER, "--unmask-epochs", 4, *twice,
                           on="base")  # fmt: skip
            longest = ["--tokens", QUARTER, "--epochs", 4 * EPOCHS]
            for arm in ARMS[:3]:
                yield self.run(f"{arm}-longest", seed, "--tickets", arm, *longest)
            yield self.run("resized-longest", seed, "--resize-to-tokens", *longest, on="base")
            yield self.run("full-long", seed, "--tickets", "full", *twice, on="base")

    def of_many_views(self, seeds: range) -> Iterator[Command]:
        """At equal cost again, where a ticket, too, differs from epoch to epoch: another stored view each time."""
        tickets, runs = self.out / f"dinov2-{VIEWS}", self.out / "views-runs"
        how = [*MODELS["dinov2"], "--weights", self.weights["dinov2"], "--tokens", HALF]
        yield mining(tickets, "--data", self.photos, *how, "--views", VIEWS, "--scale", 0.5, 1, side=SIDE)
        for seed in seeds:
            arms = {"full": ["--tickets", "full"]}
            for arm in ARMS[:3]:
                quarter = ["--tickets", arm, "--tokens", QUARTER]
                arms[f"{arm}-longest"] = [*quarter, "--epochs", 4 * EPOCHS]
                arms[f"{arm}-unmasked"] = [*quarter, "--epochs", 17, "--unmask-epochs", 2]  # of the same cost
            arms["full-long"] = ["--tickets", "full", "--epochs", 2 * EPOCHS]
            for name, words in arms.items():
                needs = [tickets / "manifest.json"]
                yield training(runs, f"{name}-{seed}", tickets, *words, "--seed", seed, needs=needs, recipe=RECIPE)

    def of_varying_length(self, seeds: range) -> Iterator[Command]:
        """As many patches on average, shared out by how a view's scores are spread."""
        for tokens in (QUARTER, HALF):
            for seed in seeds:
                varying = ["--tokens", f"auto:{tokens}"]
                for arm in ("winning", "random"):
                    yield self.run(f"{arm}-auto-{tokens}", seed, "--tickets", arm, *varying)
                yield self.run(f"masks-auto-{tokens}", seed, *varying, on="masks")  # as long as the object is large


@click.command()
@OUT
@DINOV2
@CLIP
@SEEDS
def rivals(out: Path, dinov2: Path, clip: Path, seeds: int) -> None:
    """Photos: does a ≈ c > b hold, and against rivals that need no selector? docs/RESULTS.md shows it."""
    study = Rivals(out, {"dinov2": dinov2, "clip": clip})
    if not study.photos.exists():
        show(HERE / "make_photos.py", "--out", study.photos)
    show(
        *mining(
            study.base, "--data", study.photos, "--method", "center", "--tokens", HALF, "--views", 1, side=SIDE
        ).words
    )
    parts = [[*part(range(seeds))] for part in (study.of_equal_epochs, study.of_varying_length, study.of_equal_cost)]
    views = [*study.of_many_views(range(seeds))]
    run_all([*map(study.mined, SETS), *itertools.chain(*parts), *views], 2)
    show("datalth-verdict", *(command.done.parent for command in parts[0]), "-o", out / "verdict")
    accuracies(out / "rivals.md", list(itertools.chain(*parts)), EPOCHS)
    accuracies(out / "views.md", views[1:], EPOCHS)
    recalls(study, range(seeds))


@click.command()
@OUT
@DINOV2
@CLIP
@SEEDS
def pretrained(out: Path, dinov2: Path, clip: Path, seeds: int) -> None:
    """Fine-tune DINOv2-S and CLIP's B/16 on 300 photos, on tickets that each chose; validation shows other objects."""
    photos = out / "photos"
    if not photos.exists():
        show(HERE / "make_photos.py", "--out", photos, "--unseen", "--train", 300, "--val", 300)
    for name, weights in (("dinov2", dinov2), ("clip", clip)):
        commands = [*fine_tuning(out, name, weights, range(seeds))]
        run_all(commands, 2)
        _, *runs = commands
        show("datalth-verdict", *(run.done.parent for run in runs), "-o", out / f"{name}-verdict")
        accuracies(out / f"{name}.md", runs, FINE_TUNING)


def fine_tuning(out: Path, name: str, weights: Path, seeds: range) -> Iterator[Command]:
    """A pretrained model looks at photos, and learns from what it chose."""
    tickets, model = out / name, MODELS[name][-1]
    views = ["--views", 4, "--scale", 0.5, 1]
    how = [*MODELS[name], "--weights", weights, "--tokens", HALF, *views]
    yield mining(tickets, "--data", out / "photos", *how, side=112)  # 7 x 7 patches
    learns = ["--model", model, "--initial-checkpoint", weights, "--epochs", FINE_TUNING, "--val-interval", FINE_TUNING]
    for seed in seeds:
        arms = {"full": ["--tickets", "full"]}
        for arm, tokens in itertools.product(ARMS[:3], (HALF, QUARTER)):
            arms[f"{arm}-{tokens}"] = ["--tickets", arm, "--tokens", str(tokens)]
        for run, words in arms.items():
            flags = [*learns, "--workers", 0, *words, "--seed", seed]
            needs = [tickets / "manifest.json"]
            yield training(out / f"{name}-runs", f"{run}-{seed}", tickets, *flags, needs=needs, recipe=Path("finetune"))


def accuracies(path: Path, commands: Sequence[Command], epochs: int) -> None:
    """A row for runs that differ in the seed alone: accuracy under each protocol, and minus c's on all patches.

    Args:
        epochs: of c.
    """
    runs: dict[str, list[Path]] = {}
    for command in commands:
        if command.done.exists():
            runs.setdefault(command.name.rsplit("-", 1)[0], []).append(command.done.parent)
    tested = {name: [figures(run) for run in folders] for name, folders in runs.items()}
    costs = {
        name: json.loads((folders[0] / "final.json").read_text(encoding="utf-8"))["cost"]
        for name, folders in runs.items()
    }
    samples = {
        protocol: {
            name: np.array([one[protocol] for one in found]) for name, found in tested.items() if protocol in found[0]
        }
        for protocol in ("tickets", "all", "random")
    }
    spreads = {protocol: pooled([*groups.values()]) for protocol, groups in samples.items()}
    dense = samples["all"]["full"]
    lines = ["| trained on | K | epochs | seeds | cost of c | tickets | all | random | tickets - c | all - c |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, cost in costs.items():
        share = cost["train_gmacs"] * cost["updates"] / (costs["full"]["train_gmacs"] * costs["full"]["updates"])
        cells = [
            name,
            cost["tokens"],
            round(epochs * cost["updates"] / costs["full"]["updates"]),
            len(runs[name]),
            f"{share:.0%}",
        ]
        for protocol, groups in samples.items():
            cells.append(plus_minus(mean(groups[name], spreads[protocol])) if name in groups else "")
        for protocol in ("tickets", "all"):
            found = samples[protocol].get(name)
            cells.append("" if found is None else plus_minus(difference(found, dense, spreads["all"]), "+"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    write_table(path, lines)


def recalls(study: Rivals, seeds: range) -> None:
    """Does a set that holds more of the objects make a better student? A table and a picture, over the ways to choose."""
    from matplotlib.figure import Figure

    sets = {name: TicketSet.open(str(study.out / name)) for name in SETS}
    found = {
        name: recall(one, "val", str(study.photos / "masks"), [QUARTER, HALF])["rows"] for name, one in sets.items()
    }
    lines = ["| chosen by | K | object patches held | top-1 on tickets |", "|---|---:|---:|---:|"]
    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for at, (tokens, marker) in enumerate(((QUARTER, "o"), (HALF, "s"))):
        points = {name: (rows[at]["ticket"], "winning" if name == "dinov2" else name) for name, rows in found.items()}
        points |= {name: (found["dinov2"][at][name], name) for name in ("center", "random")}
        for place, (name, (share, arm)) in enumerate(sorted(points.items(), key=lambda item: -item[1][0])):
            accuracy = np.mean([figures(study.runs / f"{arm}-{tokens}-{seed}")["tickets"] for seed in seeds])
            lines.append(f"| {name} | {tokens} | {share:.2f} | {accuracy:.1f} |")
            axis.plot(share, accuracy, marker, color=f"C{at}")
            aside = {"xytext": (6, -3), "ha": "left"} if place % 2 == 0 else {"xytext": (-6, -3), "ha": "right"}
            axis.annotate(name, (share, accuracy), textcoords="offset points", fontsize=8, **aside)
        axis.plot([], [], marker, color=f"C{at}", label=f"K = {tokens} of {N}")
    dense = float(np.mean([figures(study.runs / f"full-{seed}")["all"] for seed in seeds]))
    axis.axhline(dense, color="gray", linestyle="--", linewidth=1, label="all patches (c)")
    axis.set(xlim=(0.15, 1.1), xlabel="object patches that a ticket holds", ylabel="top-1 on tickets, %")
    axis.legend(frameon=False, loc="upper left")
    figure.savefig(study.out / "recall.png", metadata={"Software": None})
    write_table(study.out / "recall.md", lines)
