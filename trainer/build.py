"""What a run starts from: a ticket set that is whole, this process's place, and the state before the first step."""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from shards.errors import TicketSetError, first_line
from shards.ranks import rank_and_world
from shards.reader import TicketSet
from shards.rows import Rows
from shards.verify import verify
from trainer.engine import State
from trainer.families.base import TicketModel
from trainer.options import Options

log = logging.getLogger("datalth")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def open_set(options: Options) -> TicketSet:
    """The ticket set, if it is whole.

    Raises:
        TicketSetError: unfinished, damaged, without the wanted splits, or without labels.
    """
    opened = TicketSet.open(options.shards, options.base)
    problems = verify(opened)
    if problems:
        raise TicketSetError(
            f"{options.shards}: {problems[0]} ({len(problems)} problems; datalth-shards verify lists them)"
        )
    for split in (options.train_split, options.val_split):
        opened.shard_names(split)
    if not opened.classes:
        raise TicketSetError(f"{options.shards}: its images have no labels; there is nothing to train on")
    return opened


def start_world(options: Options) -> World:
    """
    Raises:
        TicketSetError: no such place among the processes, no such device, or the others are not to be had.
    """
    rank, size = rank_and_world()
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        if device.type not in ("cuda", "cpu"):
            raise RuntimeError("expected cuda or cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise TicketSetError(f"--device {name}: {first_line(error)}") from None
    if size > 1:
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise TicketSetError(f"WORLD_SIZE {size}: no process group, {first_line(error)}") from None
    return World(rank, size, device)


def on_first_rank(world: World, action: Callable[[], T]) -> T:
    """Do on rank 0 what touches the disk; all ranks get its result, or raise its error.

    Raises:
        TicketSetError, OSError: the action's.
    """
    answer: list[Any] = [None]
    if world.rank == 0:
        try:
            answer = [action()]
        except (TicketSetError, OSError) as error:
            answer = [error]
    if world.size > 1:
        torch.distributed.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def open_rows(options: Options, opened: TicketSet, split: str) -> Rows:
    """The samples of a split.

    Raises:
        TicketSetError: no image or images without a label, or too few images or views for --repeats.
    """
    labels = None
    if options.token_labels not in (None, "none") and split == options.train_split and not options.eval:
        labels = TicketSet.open(options.token_labels, options.base, images=False)
    rows = Rows(opened, split, token_labels=labels)
    if not len(rows):
        raise TicketSetError(f"{opened.url}: split {split} has no image that could be read")
    if not rows.labeled:
        bare = (rows.labels < 0).nonzero()[0]
        raise TicketSetError(
            f"{opened.url}: split {split} has {len(bare)} of {len(rows)} images without label (first:"
            f" {rows.keys[int(bare[0])]}); training needs one for each: mine again with labels"
        )
    if rows.skipped:
        log.info(f"{split}: {rows.skipped} images of the base have no ticket and are skipped")
    if split != options.train_split:
        return rows
    if len(rows) < options.repeats:
        raise TicketSetError(f"--repeats {options.repeats}: split {split} has only {len(rows)} images")
    views = max(1, opened.manifest.splits[split].views - 1)
    if options.repeats > views:
        raise TicketSetError(
            f"--repeats {options.repeats}: {opened.url} has {views} training views an image;"
            f" take --repeats {views}, or mine with --views {options.repeats + 1} or more"
        )
    return rows


def build_state(options: Options, student: TicketModel, world: World, lr: float, steps: int) -> State:
    """Model, optimizer, schedule and averages before the first step, made by timm.

    Raises:
        TicketSetError: timm does not know the optimizer or the schedule.
    """
    model, device = student.model, world.device
    try:
        optimizer = create_optimizer_v2(
            model,
            options.opt,
            lr=lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            layer_decay=options.layer_decay,
            **options.opt_kwargs,
        )
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("second-order optimizers are not supported")
        scheduler, _ = create_scheduler_v2(
            optimizer,
            options.sched,
            num_epochs=options.epochs,
            min_lr=options.min_lr,
            warmup_lr=options.warmup_lr,
            warmup_epochs=options.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        if scheduler is None:
            raise ValueError("expected a schedule; constant leaves the learning rate as it is")
        scheduler.step_update(0)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:  # timm's factories, for unknown names
        reason = first_line(error) if str(error) else "not supported here"
        raise TicketSetError(f"--opt {options.opt}, --sched {options.sched}, --lr {lr:g}: {reason}") from None
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and options.amp_dtype == "float16")
    ema = ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=True) if options.model_ema else None
    trained: Any = student
    if options.torchcompile:
        trained = torch.compile(trained)  # before DDP, as timm
    if world.size > 1:
        # Prefix tokens' gradients are slices of the position table's: a few numbers, not worth two warnings a rank.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        ids = [device.index] if device.type == "cuda" else None
        trained = torch.nn.parallel.DistributedDataParallel(trained, device_ids=ids)
    return State(trained, student, optimizer, scheduler, scaler, ema)
