"""What a person sees of a run: what is about to happen, a line now and then, the figures at the end."""

import logging
from typing import Any

from trainer.data.dataset import FeedOptions
from trainer.engine import State, learning_rate
from trainer.evaluate import Figures
from trainer.families.base import TicketModel
from trainer.options import Options

log = logging.getLogger("datalth")


def show(
    options: Options,
    student: TicketModel,
    costs: dict[str, Any],
    feed: FeedOptions,
    lr: float,
    steps: int,
    labelled: bool,
) -> None:
    """Before the first step; `labelled`: token labels are in use."""
    own, dense = costs["train_gmacs"], costs["dense_gmacs"]
    arm = "whole views, resized" if options.resize_to_tokens else options.tickets
    unmasked = f", the last {options.unmask_epochs} epochs all" if options.unmask_epochs else ""
    ranks = feed.global_batch // options.batch_size // options.grad_accum_steps
    log.info(f"{options.model}: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters; {student.feed}")
    if labelled:
        log.info(f"token labels: of {options.token_labels or options.shards}; the images' own labels are not used")
    log.info(
        f"{arm}: {costs['tokens']} of {costs['patches']} tokens{unmasked};"
        f" {own:.3g} GMACs an image (dense {dense:.3g}, {own / dense:.0%})"
    )
    log.info(
        f"global batch {feed.global_batch} = {options.batch_size} x {ranks} ranks x {options.grad_accum_steps},"
        f" lr {lr:.3e}, {options.epochs} epochs of {steps} steps"
    )
    if options.warmup_epochs >= options.epochs:
        log.warning(
            f"--warmup-epochs {options.warmup_epochs}: not less than --epochs {options.epochs}; the learning rate only rises"
        )
    if lr < options.min_lr and options.sched not in ("step", "multistep", "constant"):
        log.warning(f"--min-lr {options.min_lr:g}: above the learning rate {lr:.3g}, which rises to it by the end")


def progress(state: State, steps: int, figures: dict[str, float], ranks: int, tokens: str) -> None:
    """Within an epoch, as timm's."""
    images, seconds = figures["images"] * ranks, figures["seconds"]
    mean = state.loss_sum / state.loss_count
    log.info(
        f"Train: {state.epoch} [{state.step:>4d}/{steps} ({100 * state.step / steps:>3.0f}%)]"
        f"  Loss: {figures['loss']:.3f} ({mean:.3f})  {images / seconds:.1f}/s"
        f"  LR: {learning_rate(state):.3e}  Data: {figures['waited'] / seconds:.0%}  Tokens: {tokens}"
    )


def report(state: State, results: dict[str, Figures]) -> None:
    """At the end."""
    for name, figures in results.items():
        log.info(f"{name:12s} top-1 {figures['top1']:.2f}  top-5 {figures['top5']:.2f}  loss {figures['loss']:.4f}")
    if state.best is not None:
        log.info(f"*** Best metric: {state.best:.2f} (epoch {state.best_epoch})")
