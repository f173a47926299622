"""The study on photos: winning tickets of five selectors against every rival that costs nothing to choose by."""

from collections.abc import Iterator
from pathlib import Path

import click

from commands import HERE, Command, mining, run_all, show, training

RECIPE, SIDE = HERE / "photos.yaml", 128
N, EPOCHS = 64, 6  # patches of a view; of every run that is not longer for a reason
HALF, QUARTER, MOST = 32, 16, 48
# On one set, whose tickets all are tested on: the best selector's.
ARMS = ("winning", "random", "gaussian", "center", "random-fixed")
MODELS = {
    "dinov2": ["--method", "cls-attention", "--selector", "vit_small_patch14_dinov2"],
    "clip": ["--method", "cls-attention", "--selector", "vit_base_patch16_clip_quickgelu_224"],
}
SETS = ("dinov2", "clip", "rollout", "evit", "entropy", "masks")


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

    def of_varying_length(self, seeds: range) -> Iterator[Command]:
        """As many patches on average, shared out by how a view's scores are spread."""
        for tokens in (QUARTER, HALF):
            for seed in seeds:
                for arm in ("winning", "random"):
                    yield self.run(f"{arm}-auto-{tokens}", seed, "--tickets", arm, "--tokens", f"auto:{tokens}")


@click.command()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write into; one that is there goes on."
)
@click.option(
    "--dinov2",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Weights of timm's vit_small_patch14_dinov2.",
)
@click.option(
    "--clip",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Of its vit_base_patch16_clip_quickgelu_224.",
)
@click.option("--seeds", default=3, show_default=True, help="Of every arm.")
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
    commands = [study.mined(name) for name in SETS]
    for part in (study.of_equal_epochs, study.of_varying_length, study.of_equal_cost):
        commands += part(range(seeds))
    run_all(commands, 2)
