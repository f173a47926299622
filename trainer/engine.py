"""One epoch of training, as a function of explicit state. Steps are counted since epoch 0, in optimizer updates."""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor

from shards.errors import TicketSetError
from trainer.data.augment import erase
from trainer.data.loader import Batch
from trainer.families.base import TicketModel


@dataclass
class State:
    """Everything that changes while training; a checkpoint holds it.

    Attributes:
        model: the student, perhaps compiled and in DistributedDataParallel.
        student: itself.
        epoch, step: of the next update; step counts within the epoch.
        loss_sum, loss_count: of this epoch so far, over all ranks.
        seconds: spent in training so far, without validation.
        best: best metric so far, and its epoch.
    """

    model: Any
    student: TicketModel
    optimizer: Any
    scheduler: Any
    scaler: Any
    ema: Any
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int | None = None


@dataclass(frozen=True)
class StepOptions:
    """What one update needs to know."""

    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int
    num_classes: int
    smoothing: float
    clip_grad: float | None
    clip_mode: str
    accum: int
    amp_dtype: torch.dtype | None
    seed: int
    rank: int = 0
    world_size: int = 1
    log_interval: int = 50
    recovery_interval: int = 0
    before_update: Callable[[int], None] = field(default=lambda update: None)
    stop_requested: Callable[[], bool] = field(default=lambda: False)


class Stopped(Exception):
    """A signal asked to stop; the state is at a step boundary."""


def train_epoch(
    state: State,
    batches: Iterable[Batch],
    steps: int,
    options: StepOptions,
    log: Callable[[State, int, dict[str, float]], None],
    save_recovery: Callable[[State], None],
) -> float:
    """Train from `state.step` to the epoch's end.

    Args:
        batches: `accum` micro-batches a step, from state.step on.
        steps: of the whole epoch.
        log: called every log_interval steps with loss, mean loss, rate, images a step, seconds, data seconds.
        save_recovery: called every recovery_interval steps, at the epoch's end, and before Stopped.
    Returns:
        The epoch's mean training loss over all ranks.
    Raises:
        TicketSetError: the loss is not finite; says where.
        Stopped: see there.
    """
    state.model.train()
    iterator = iter(batches)
    total = torch.zeros((), device=options.device, dtype=torch.float64)  # so that a stop does not regroup the sum
    bad = torch.full((), steps, device=options.device)  # the first step whose loss was not finite, without a sync
    pending = seen = 0
    last, waited = time.perf_counter(), 0.0
    while state.step < steps:
        update = state.epoch * steps + state.step
        loss = torch.zeros((), device=options.device)
        options.before_update(update)
        for micro in range(options.accum):
            start = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - start
            seen += len(batch["labels"])
            last_micro = micro == options.accum - 1
            loss += train_micro_batch(state, batch, options, update, micro, last_micro)
        apply_update(state, options, update)
        bad = torch.where((bad == steps) & ~torch.isfinite(loss), state.step, bad)
        total += loss.double()
        pending += 1
        state.step += 1
        if state.step == steps and options.world_size > 1:
            share_batch_norm(state, options)
        due = bool(options.recovery_interval) and state.step % options.recovery_interval == 0
        boundary = due or state.step == steps or state.step % options.log_interval == 0
        stop = options.stop_requested()
        if stop or boundary:
            if options.world_size > 1:
                torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MIN)
            check_finite(int(bad), steps, state)  # here the host waits for the device
            losses = mean_over_ranks(torch.stack([total, loss.double()]), options)
            state.loss_sum, state.loss_count = state.loss_sum + losses[0], state.loss_count + pending
            total, pending = torch.zeros_like(total), 0
            seconds = time.perf_counter() - last
            state.seconds += seconds
            log(state, steps, {"loss": losses[1], "images": seen, "seconds": seconds, "waited": waited})
            last, waited, seen = time.perf_counter(), 0.0, 0
            if stop or due or state.step == steps:
                save_recovery(state)
            if stop:
                raise Stopped
    return state.loss_sum / max(1, state.loss_count)


def learning_rate(state: State) -> float:
    """Of the layers that have it whole: --layer-decay gives the lower ones less."""
    return max(group["lr"] for group in state.optimizer.param_groups)


def share_batch_norm(state: State, options: StepOptions) -> None:
    """Give all ranks the mean of their running averages: validation and checkpoints are then of one model."""
    for model in [state.student.model, *([state.ema.module] if state.ema is not None else [])]:
        distribute_bn(model, options.world_size, reduce=True)


def train_micro_batch(
    state: State, batch: Batch, options: StepOptions, update: int, micro: int, last_micro: bool
) -> Tensor:
    """Forward and backward of one micro-batch; returns its share of the step's loss, detached."""
    grid_width = int(batch["grid_width"][0])
    batch = {name: tensor.to(options.device, non_blocking=True) for name, tensor in batch.items()}
    seed_step(options.seed, update, micro * options.world_size + options.rank)
    patches = normalise(batch["patches"], options)
    if "erase" in batch:
        places = batch["keep_indices"]
        if state.student.wants_all:
            places = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        patches = erase(patches, places, batch["erase"], grid_width, options.patch_size, None)
    targets = soft_targets(batch, options)
    sync = nullcontext() if last_micro or not hasattr(state.model, "no_sync") else state.model.no_sync()
    with sync:
        with torch.autocast(options.device.type, options.amp_dtype, enabled=options.amp_dtype is not None):
            extras = {name: batch[name] for name in state.student.extras if name in batch}
            outputs = state.model(patches, batch["keep_indices"], **extras)
            loss = state.student.loss(outputs, targets, batch, options.smoothing) / options.accum
        state.scaler.scale(loss).backward()
    return loss.detach()


def apply_update(state: State, options: StepOptions, update: int) -> None:
    """Clip, step, schedule and average."""
    if options.clip_grad:
        state.scaler.unscale_(state.optimizer)
        parameters = model_parameters(state.student.model, exclude_head=options.clip_mode == "agc")
        dispatch_clip_grad(parameters, options.clip_grad, options.clip_mode)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update(state.student.model, step=update + 1)
    state.scheduler.step_update(update + 1)


def normalise(patches: Tensor, options: StepOptions) -> Tensor:
    """uint8 [B, K, 3*p*p] -> float32, by the model's mean and std."""
    b, k, _ = patches.shape
    mean, std = _levels(options.mean, patches.device), _levels(options.std, patches.device)
    return patches.view(b, k, 3, -1).float().sub_(mean).div_(std).view(b, k, -1)


@functools.lru_cache(maxsize=8)
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1] in uint8 levels, made once: a copy from the host in every step would make it wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).mul(255)[:, None]


def mean_over_ranks(values: Tensor, options: StepOptions) -> list[float]:
    if options.world_size > 1:
        torch.distributed.all_reduce(values)
    return (values / options.world_size).tolist()


def soft_targets(batch: Batch, options: StepOptions) -> Tensor:
    """[B, classes]: smoothed labels, those of mixed views by their share, as timm's Mixup."""
    off = options.smoothing / options.num_classes
    on = 1 - options.smoothing + off
    both = []
    for name in ("labels", "partners"):
        full = torch.full((len(batch[name]), options.num_classes), off, device=batch[name].device)
        both.append(full.scatter_(1, batch[name][:, None], on))
    lam = batch["lam"][:, None]
    return both[0] * lam + both[1] * (1 - lam)


def seed_step(seed: int, update: int, micro: int) -> None:
    """Every random number of a step (drop path, erasing noise) comes from its place alone: resuming is exact.

    `micro` counts within the global batch, so that ranks and accumulation steps can stand for each other.
    """
    digest = hashlib.blake2b(f"step/{seed}/{update}/{micro}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def check_finite(bad: int, steps: int, state: State) -> None:
    """Stop before anything that is not finite is saved; an update can break the weights though its loss was finite.

    Raises:
        TicketSetError: the loss of step `bad`, the same on all ranks, where that is below `steps`, or a weight.
    """
    if bad == steps and not bool(torch.stack([p.isfinite().all() for p in state.student.model.parameters()]).all()):
        bad = state.step - 1
    if bad < steps:
        raise TicketSetError(
            f"loss is not finite at epoch {state.epoch}, step {bad}; the last checkpoint before is kept."
            f" Try a lower --lr-base, --clip-grad 1, or --amp-dtype bfloat16"
        )


def is_better(value: float, best: float | None) -> bool:
    return best is None or (math.isfinite(value) and value > best)
