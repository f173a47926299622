"""What a person sees of a run: what is about to happen, a line now and then, the figures at the end."""

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from miner.models import classifier_weights
from shards.console import duration, rate
from trainer.engine import State
from trainer.hooks import Epoch, Hook
from trainer.optimizer import Rates
from trainer.output.folder import RunFolder

if TYPE_CHECKING:
    from trainer.evaluate import Figures
    from trainer.trainer import Trainer

log = logging.getLogger("datalth")


class Progress(Hook):
    """Before the first step what is trained on what, then how long is left, at the end its figures.

    Args:
        folder: of the run; comes before this among the hooks.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def begin(self, trainer: "Trainer") -> None:
        show(trainer)
        log.info(f"output: {self._folder.path}")
        self._work, self._from = Work(trainer), (trainer.state.epoch, trainer.state.step)
        self._start = self._epoch_start = time.monotonic()
        self._trained = 0.0  # seconds of the epoch; a run may go on where its epoch is trained and not tested

    def log(self, trainer: "Trainer", figures: Mapping[str, float]) -> None:
        state = trainer.state
        progress(trainer, figures, self._left(state.epoch, state.step))
        if state.step == trainer.steps:
            self._trained = time.monotonic() - self._epoch_start

    def after_epoch(self, trainer: "Trainer", epoch: Epoch) -> None:
        state, now = trainer.state, time.monotonic()
        times = [f"{duration(self._trained)} training"] if self._trained else []
        tested = "not tested"
        if epoch.results:
            text = ", ".join(f"{name} {figures['top1']:.2f}" for name, figures in epoch.results.items())
            tested = f"top-1 {text}  (best {state.best:.2f}, epoch {state.best_epoch})"
            times.append(f"{duration(now - self._epoch_start - self._trained)} test")
        self._epoch_start, self._trained = now, 0.0
        times.append(f"left {self._left(state.epoch, 0)}")
        log.info(f"Test: {epoch.number}  {tested}  {', '.join(times)}")

    def _left(self, epoch: int, step: int) -> str:
        done = self._work.until(epoch, step) - self._work.until(*self._from)
        rest = self._work.until(self._work.epochs, 0) - self._work.until(epoch, step)
        return duration(rest / done * (time.monotonic() - self._start)) if done else "?"

    def at_end(self, trainer: "Trainer", results: "Mapping[str, Figures]", answers: Tensor) -> None:
        report(trainer.state, results)


class Work:
    """How much of a run is done, in multiply-accumulates of the model: epochs on all patches and validation take longer
    or shorter than other epochs by what they compute.

    Attributes:
        epochs: of the run.
    """

    def __init__(self, trainer: "Trainer") -> None:
        recipe, costs = trainer.recipe, trainer.costs
        self.epochs, self._interval = recipe.optimization.epochs, recipe.machine.val_interval
        self._masked = self.epochs - recipe.tickets.unmask_epochs
        self._steps = trainer.steps
        whole, unmasked = costs["test_gmacs"].get("all", 0.0), recipe.tickets.unmask_epochs
        on_tickets = (self.epochs * costs["train_gmacs"] - unmasked * whole) / self._masked if self._masked else 0.0
        model = trainer.student.model
        head = classifier_weights(model)
        learns = any(weight.requires_grad for name, weight in model.named_parameters() if name not in head)
        passes = 3 if learns else 1  # backward computes twice what forward does, of a linear probe next to nothing
        self._step = [passes * trainer.dataset.global_batch * gmacs for gmacs in (on_tickets, whole)]
        self._tests = [len(trainer.validation.rows) * gmacs for gmacs in costs["test_gmacs"].values()]

    def until(self, epoch: int, step: int) -> float:
        """From the run's first step to a step of an epoch, with the tests between."""
        masked, whole = min(epoch, self._masked) * self._steps, max(0, epoch - self._masked) * self._steps
        masked, whole = (masked + step, whole) if epoch < self._masked else (masked, whole + step)
        # The first two protocols are tested every few epochs, and all of them after the last.
        last = epoch >= self.epochs
        tests = ((epoch - last) // self._interval) * sum(self._tests[:2]) + last * sum(self._tests)
        return masked * self._step[0] + whole * self._step[1] + tests


def show(trainer: "Trainer") -> None:
    """What is about to happen."""
    recipe, student, costs = trainer.recipe, trainer.student, trainer.costs
    model, tickets, optimization = recipe.model, recipe.tickets, recipe.optimization
    own, dense = costs["train_gmacs"], costs["dense_gmacs"]
    arm = "whole views, resized" if tickets.resize_to_tokens else tickets.tickets
    unmasked = f", the last {tickets.unmask_epochs} epochs all" if tickets.unmask_epochs else ""
    count, trained = (
        sum(p.numel() for p in student.parameters() if p.requires_grad or not only) / 1e6 for only in (0, 1)
    )
    frozen = f", {trained:.3g} M of them trained" if model.freeze else ""
    log.info(f"{model.model}: {count:.1f} M parameters{frozen}; {student.feed}")
    if trainer.dataset.labeled:
        of = recipe.data.token_labels or trainer.opened.url
        log.info(f"token labels: of {of}; the images' own labels are not used")
    log.info(
        f"{arm}: {costs['tokens']} of {costs['patches']} tokens{unmasked};"
        f" {own:.3g} GMACs an image (dense {dense:.3g}, {own / dense:.0%})"
    )
    if lengths := trainer.dataset.lengths:
        shares = trainer.dataset.token_shares
        mean = sum(size * share for size, share in shares.items())
        log.info(
            f"K from {min(shares)} to {max(shares)}, mean {mean:.1f} of {costs['patches']}: {lengths.share:.0%} of a view's"
            f" score"
        )
    log.info(
        f"global batch {trainer.dataset.global_batch} = {optimization.batch_size} x {trainer.rank.size} ranks x"
        f" {optimization.grad_accum_steps}, lr {Rates.of(trainer.state.optimizer, trainer.lr)}, {optimization.epochs} epochs of {trainer.steps} steps"
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


def progress(trainer: "Trainer", figures: Mapping[str, float], left: str) -> None:
    """Within an epoch, as timm's."""
    state, steps, dataset = trainer.state, trainer.steps, trainer.dataset
    own = [dataset.tokens_at(state.epoch, state.step - 1, micro) for micro in range(dataset.micro_batches)]
    tokens = round(sum(own) / len(own))
    images, seconds = figures["images"] * trainer.rank.size, figures["seconds"]
    mean = state.loss_sum / state.loss_count
    log.info(
        f"Train: {state.epoch} [{state.step:>4d}/{steps} ({100 * state.step / steps:>3.0f}%)]"
        f"  Loss: {figures['loss']:.3f} ({mean:.3f})  {rate(images, seconds)}"
        f"  LR: {Rates.of(state.optimizer)}  Data: {figures['waited'] / seconds:.0%}  Tokens: {tokens}/{trainer.opened.num_patches}"
        f"  left {left}"
    )


def report(state: State, results: "Mapping[str, Figures]") -> None:
    """At the end."""
    for name, figures in results.items():
        log.info(f"{name:12s} top-1 {figures['top1']:.2f}  top-5 {figures['top5']:.2f}  loss {figures['loss']:.4f}")
    if state.best is not None:
        log.info(f"*** Best metric: {state.best:.2f} (epoch {state.best_epoch})")
