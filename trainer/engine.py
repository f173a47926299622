"""One epoch of training, as a function of explicit state. Steps are counted since epoch 0, in optimizer updates."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from shards.errors import TicketSetError
from trainer.data.augment import erase
from trainer.data.loader import Batch
from trainer.families.base import TicketModel
from trainer.families.patches import normalize
from trainer.options import Machine, Optimization
from trainer.ranks import Rank


@dataclass
class State:
    """Everything that changes while training; a checkpoint holds it, and what hooks add.

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
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int | None = None


@dataclass(frozen=True)
class Setup:
    """What a step needs to know.

    Attributes:
        mean, std: by which pixels are normalized.
        num_classes: of the labels.
    """

    optimization: Optimization
    machine: Machine
    rank: Rank
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int

    @classmethod
    def of(cls, student: TicketModel, optimization: Optimization, machine: Machine, rank: Rank) -> "Setup":
        """For a student: pixels as its timm model wants them."""
        config = resolve_model_data_config(student.model)
        return cls(optimization, machine, rank, config["mean"], config["std"], student.model.num_classes)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.rank.device

    def autocast(self) -> torch.autocast:
        """Mixed precision, where it is asked for."""
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[self.machine.amp_dtype]
        return torch.autocast(self.device.type, dtype, enabled=self.machine.amp)

    def normalized(self, patches: Tensor) -> Tensor:
        """uint8 [B, K, 3*p*p] -> float32."""
        return normalize(patches, self.mean, self.std)


class Stopped(Exception):
    """A signal asked to stop; the state is at a step boundary."""


class Places(Protocol):
    """Where an epoch calls on whoever runs it."""

    def before_step(self, update: int) -> None:
        """Before the forward of an update."""

    def before_update(self, update: int) -> None:
        """Gradients are whole, not clipped yet."""

    def after_update(self, update: int) -> None:
        """Weights are new, the schedule is not."""

    def share(self) -> None:
        """The epoch's last step: let all ranks have the same running averages."""

    def log(self, figures: dict[str, float]) -> None:
        """Every `log_interval` steps: loss, images a rank, seconds, seconds waited for data."""

    def save(self) -> None:
        """At a step's border: every `recovery_interval` steps, at the epoch's end, and before Stopped."""

    def stop_requested(self) -> bool:
        """Whether to stop after this step; the same answer on all ranks."""


def train_epoch(state: State, batches: Iterable[Batch], steps: int, setup: Setup, places: Places) -> float:
    """Train from `state.step` to the epoch's end.

    Args:
        batches: `grad_accum_steps` micro-batches a step, from state.step on.
        steps: of the whole epoch.
    Returns:
        The epoch's mean training loss over all ranks.
    Raises:
        TicketSetError: the loss is not finite; says where.
        Stopped: see there.
    """
    state.model.train()
    iterator = iter(batches)
    accum, ranks = setup.optimization.grad_accum_steps, setup.rank.size
    log_interval, recovery_interval = setup.machine.log_interval, setup.machine.recovery_interval
    total = torch.zeros((), device=setup.device, dtype=torch.float64)  # so that a stop does not regroup the sum
    bad = torch.full((), steps, device=setup.device)  # the first step whose loss was not finite, without a sync
    pending = seen = 0
    last, waited = time.perf_counter(), 0.0
    while state.step < steps:
        update = state.epoch * steps + state.step
        loss = torch.zeros((), device=setup.device)
        places.before_step(update)
        for micro in range(accum):
            start = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - start
            seen += len(batch["labels"])
            loss += train_micro_batch(state, batch, setup, update, micro)
        apply_update(state, setup, update, places.before_update, places.after_update)
        bad = torch.where((bad == steps) & ~torch.isfinite(loss), state.step, bad)
        total += loss.double()
        pending += 1
        state.step += 1
        if state.step == steps:
            places.share()
        due = bool(recovery_interval) and state.step % recovery_interval == 0
        boundary = due or state.step == steps or state.step % log_interval == 0
        stop = places.stop_requested()
        if stop or boundary:
            if ranks > 1:
                torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MIN)
            check_finite(int(bad), steps, state)  # here the host waits for the device
            losses = setup.rank.mean(torch.stack([total, loss.double()]))
            state.loss_sum, state.loss_count = state.loss_sum + losses[0], state.loss_count + pending
            total, pending = torch.zeros_like(total), 0
            seconds = time.perf_counter() - last
            state.seconds += seconds
            places.log({"loss": losses[1], "images": seen, "seconds": seconds, "waited": waited})
            last, waited, seen = time.perf_counter(), 0.0, 0
            if stop or due or state.step == steps:
                places.save()
            if stop:
                raise Stopped
    return state.loss_sum / max(1, state.loss_count)


def train_micro_batch(state: State, batch: Batch, setup: Setup, update: int, micro: int) -> Tensor:
    """Forward and backward of one micro-batch of a step; returns its share of the step's loss, detached."""
    accum, student = setup.optimization.grad_accum_steps, state.student
    grid_width = int(batch["grid_width"][0])
    batch = {name: tensor.to(setup.device, non_blocking=True) for name, tensor in batch.items()}
    seed_step(setup.machine.seed, update, micro * setup.rank.size + setup.rank.number)
    patches = setup.normalized(batch["patches"])
    if "erase" in batch:
        places = batch["keep_indices"]
        if student.wants_all:
            places = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        patches = erase(patches, places, batch["erase"], grid_width, student.patch_size, None)
    targets = soft_targets(batch, setup.optimization.smoothing, setup.num_classes)
    # Gradients of ranks are summed once a step: with its last micro-batch.
    last = micro == accum - 1 or not hasattr(state.model, "no_sync")
    with nullcontext() if last else state.model.no_sync():
        with setup.autocast():
            extras = {name: batch[name] for name in student.extras if name in batch}
            outputs = state.model(patches, batch["keep_indices"], **extras)
            loss = student.loss(outputs, targets, batch, setup.optimization.smoothing) / accum
        state.scaler.scale(loss).backward()
    return loss.detach()


def apply_update(
    state: State,
    setup: Setup,
    update: int,
    before_update: Callable[[int], None] = lambda update: None,
    after_update: Callable[[int], None] = lambda update: None,
) -> None:
    """Clip, step and schedule."""
    before_update(update)
    if setup.optimization.clip_grad:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.student.model.parameters(), setup.optimization.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    after_update(update)
    state.scheduler.step_update(update + 1)


def soft_targets(batch: Batch, smoothing: float, num_classes: int) -> Tensor:
    """[B, classes]: smoothed labels, those of mixed views by their share, as timm's Mixup."""
    off = smoothing / num_classes
    on = 1 - smoothing + off
    both = []
    for name in ("labels", "partners"):
        full = torch.full((len(batch[name]), num_classes), off, device=batch[name].device)
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
            f" Try a lower `lr_base`, `clip_grad` 1, or `amp_dtype` bfloat16"
        )


def is_better(value: float, best: float | None) -> bool:
    """Whether a metric beats the best so far; one that is no number never does, unless it is the first."""
    return best is None or (math.isfinite(value) and value > best)
