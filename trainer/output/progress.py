"""What a person sees of a run: what is about to happen, a line now and then, the figures at the end."""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from shards.console import rate
from trainer.engine import State, learning_rate
from trainer.hooks import Epoch, Hook
from trainer.output.folder import RunFolder

if TYPE_CHECKING:
    from trainer.evaluate import Figures
    from trainer.trainer import Trainer

log = logging.getLogger("datalth")


class Progress(Hook):
    """Before the first step what is trained on what, at the end its figures.

    Args:
        folder: of the run; comes before this among the hooks.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def begin(self, trainer: "Trainer") -> None:
        show(trainer)
        log.info(f"output: {self._folder.path}")

    def log(self, trainer: "Trainer", figures: Mapping[str, float]) -> None:
        progress(trainer, figures)

    def after_epoch(self, trainer: "Trainer", epoch: Epoch) -> None:
        state = trainer.state
        text = ", ".join(f"{name} {figures['top1']:.2f}" for name, figures in epoch.results.items())
        log.info(f"Test: {epoch.number}  top-1 {text}  (best {state.best:.2f}, epoch {state.best_epoch})")

    def at_end(self, trainer: "Trainer", results: "Mapping[str, Figures]", answers: Tensor) -> None:
        report(trainer.state, results)


def show(trainer: "Trainer") -> None:
    """What is about to happen."""
    recipe, student, costs = trainer.recipe, trainer.student, trainer.costs
    model, tickets, optimization = recipe.model, recipe.tickets, recipe.optimization
    own, dense = costs["train_gmacs"], costs["dense_gmacs"]
    arm = "whole views, resized" if tickets.resize_to_tokens else tickets.tickets
    unmasked = f", the last {tickets.unmask_epochs} epochs all" if tickets.unmask_epochs else ""
    log.info(f"{model.model}: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters; {student.feed}")
    if trainer.dataset.labeled:
        of = recipe.data.token_labels or trainer.opened.url
        log.info(f"token labels: of {of}; the images' own labels are not used")
    log.info(
        f"{arm}: {costs['tokens']} of {costs['patches']} tokens{unmasked};"
        f" {own:.3g} GMACs an image (dense {dense:.3g}, {own / dense:.0%})"
    )
    log.info(
        f"global batch {trainer.dataset.global_batch} = {optimization.batch_size} x {trainer.rank.size} ranks x"
        f" {optimization.grad_accum_steps}, lr {trainer.lr:.3e}, {optimization.epochs} epochs of {trainer.steps} steps"
    )
    warmup, min_lr = optimization.warmup_epochs, optimization.min_lr
    if warmup >= optimization.epochs:
        log.warning(
            f"`warmup_epochs` {warmup}: not less than `epochs` {optimization.epochs}; the learning rate only rises"
        )
    if trainer.lr < min_lr and optimization.sched not in ("step", "multistep", "constant"):
        log.warning(f"`min_lr` {min_lr:g}: above the learning rate {trainer.lr:.3g}, which rises to it by the end")
    if skipped := sorted(set(trainer.dataset.color.skipped)):
        log.info(f"`aa`: geometry is mined; {', '.join(skipped)} leave the view as it is")


def progress(trainer: "Trainer", figures: Mapping[str, float]) -> None:
    """Within an epoch, as timm's."""
    state, steps, dataset = trainer.state, trainer.steps, trainer.dataset
    whole = dataset.is_whole(state.epoch)
    tokens = math.prod(dataset.views.at(True)[1]) if whole else dataset.tokens
    images, seconds = figures["images"] * trainer.rank.size, figures["seconds"]
    mean = state.loss_sum / state.loss_count
    log.info(
        f"Train: {state.epoch} [{state.step:>4d}/{steps} ({100 * state.step / steps:>3.0f}%)]"
        f"  Loss: {figures['loss']:.3f} ({mean:.3f})  {rate(images, seconds)}"
        f"  LR: {learning_rate(state):.3e}  Data: {figures['waited'] / seconds:.0%}  Tokens: {tokens}/{trainer.opened.num_patches}"
    )


def report(state: State, results: "Mapping[str, Figures]") -> None:
    """At the end."""
    for name, figures in results.items():
        log.info(f"{name:12s} top-1 {figures['top1']:.2f}  top-5 {figures['top5']:.2f}  loss {figures['loss']:.4f}")
    if state.best is not None:
        log.info(f"*** Best metric: {state.best:.2f} (epoch {state.best_epoch})")
