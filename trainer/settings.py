"""From flags to what the feed, a step and validation need to know."""

from collections.abc import Callable

import torch
from timm.data import resolve_model_data_config

from shards.reader import TicketSet
from trainer.build import World
from trainer.data.dataset import FeedOptions
from trainer.engine import StepOptions
from trainer.evaluate import DROPPING_PROTOCOLS, PROTOCOLS
from trainer.families.base import TicketModel
from trainer.families.dropping import DroppingViT
from trainer.options import Options


def feed_options(options: Options, opened: TicketSet, student: TicketModel, tokens: int, ranks: int) -> FeedOptions:
    """What a batch is made of."""
    return FeedOptions(
        arm="full" if options.resize_to_tokens else options.tickets,
        tokens=tokens,
        img_size=student.whole_side if options.resize_to_tokens else opened.manifest.img_size,
        whole_size=student.whole_side,
        wants_all=student.wants_all,
        token_labels=student.wants_token_labels and options.token_labels != "none",
        patch_size=opened.manifest.patch_size,
        seed=options.seed,
        batch_size=options.batch_size,
        global_batch=options.batch_size * ranks * options.grad_accum_steps,
        repeats=options.repeats,
        aa=options.aa,
        color_jitter=options.color_jitter,
        mean=resolve_model_data_config(student.model)["mean"],
        reprob=options.reprob,
        mixup=options.mixup,
        cutmix=options.cutmix,
        mixup_prob=options.mixup_prob,
        mixup_switch_prob=options.mixup_switch_prob,
        mix_token=options.mix_token,
        unmask_from=options.epochs - options.unmask_epochs if options.unmask_epochs else None,
    )


def step_options(
    options: Options,
    opened: TicketSet,
    student: TicketModel,
    world: World,
    before_update: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> StepOptions:
    """What a step needs to know."""
    config = resolve_model_data_config(student.model)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[options.amp_dtype]
    return StepOptions(
        device=world.device,
        mean=config["mean"],
        std=config["std"],
        patch_size=opened.manifest.patch_size,
        num_classes=len(opened.classes),
        smoothing=options.smoothing,
        clip_grad=options.clip_grad,
        clip_mode=options.clip_mode,
        accum=options.grad_accum_steps,
        amp_dtype=dtype if options.amp else None,
        seed=options.seed,
        rank=world.rank,
        world_size=world.size,
        log_interval=options.log_interval,
        recovery_interval=options.recovery_interval,
        before_update=before_update,
        stop_requested=stop_requested,
    )


def protocols(options: Options, student: TicketModel) -> tuple[tuple[str, ...], str]:
    """The protocols of the last validation (others take the first two), and the one that the best epoch goes by."""
    if isinstance(student, DroppingViT):
        return DROPPING_PROTOCOLS, "dropped"
    if options.resize_to_tokens:
        return ("all",), "all"
    return PROTOCOLS, "all" if options.tickets == "full" or options.unmask_epochs else "tickets"
