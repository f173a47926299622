"""The student: timm's model at the size that the set asks for, its K, and what it costs."""

import copy
import logging
from dataclasses import replace
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from miner.models import load_weights, sketch, timm_name
from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer.options import Options
from trainer.ticket_vit import TicketViT

log = logging.getLogger("datalth")


def build_model(options: Options, opened: TicketSet) -> Any:
    """The timm model at the student's size; with --resize-to-tokens at the smaller one."""
    side = student_side(options, opened)
    arguments = {"num_classes": len(opened.classes), "img_size": side, **options.model_kwargs}
    try:
        model: Any = timm.create_model(
            timm_name(options.model), pretrained=options.pretrained, drop_path_rate=options.drop_path, **arguments
        )
    except Exception as error:  # timm's builders and hubs have no common class
        raise TicketSetError(f"--model {options.model}: timm cannot build it: {str(error).splitlines()[0]}") from None
    if model.num_classes != len(opened.classes):
        raise TicketSetError(
            f"--model-kwargs num_classes: expected {len(opened.classes)}, the set's, got {model.num_classes}"
        )
    if options.initial_checkpoint:
        fresh = load_weights(model, options.initial_checkpoint, "--initial-checkpoint")
        if fresh:
            log.info(f"--initial-checkpoint {options.initial_checkpoint}: {', '.join(fresh)} start anew")
        if fresh and options.eval:
            raise TicketSetError(
                f"--eval: {options.initial_checkpoint} has no trained {fresh[0]} for the {len(opened.classes)} classes of {opened.url}"
            )
    elif options.pretrained and options.eval and model.pretrained_cfg.get("num_classes") != model.num_classes:
        raise TicketSetError(
            f"--eval: the pretrained weights are for {model.pretrained_cfg.get('num_classes')} classes,"
            f" but {opened.url} has {model.num_classes}; train first"
        )
    if options.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def student_side(options: Options, opened: TicketSet) -> int:
    """Pixels of the student's input.

    Raises:
        TicketSetError: --resize-to-tokens with a K that is no square.
    """
    if not options.resize_to_tokens:
        return opened.manifest["img_size"]
    tokens = options.tokens or opened.k
    side = round(tokens**0.5)
    if side * side != tokens:
        raise TicketSetError(
            f"--resize-to-tokens: {tokens} tokens are no square; the nearest --tokens are {side**2} and {(side + 1) ** 2}"
        )
    return side * opened.manifest["patch_size"]


def gmacs(model: TicketViT, tokens: int) -> float:
    """Multiply-accumulates of one image's forward, in units of 1e9, as torch counts them.

    Counted on a copy without storage: of the CPU's attention kernel torch counts nothing.
    """
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    patches = torch.empty(1, tokens, 3 * model.patch_size**2, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches, torch.arange(tokens, device="meta")[None])
    return counter.get_total_flops() / 2e9


def dense_gmacs(options: Options, opened: TicketSet) -> float:
    """GMACs of the student on all patches at the set's size, also where it is trained on smaller views."""
    plain = replace(options, resize_to_tokens=False, pretrained=False, initial_checkpoint=None)
    return gmacs(sketch(lambda: TicketViT(build_model(plain, opened))), opened.num_patches)


def resolve_tokens(options: Options, opened: TicketSet, model: TicketViT) -> int:
    """K in training.

    Raises:
        TicketSetError: the model's grid is not the set's, or K larger than N.
    """
    grid, patch = opened.grid, opened.manifest["patch_size"]
    if options.resize_to_tokens:
        if options.tickets not in ("winning", "full"):
            raise TicketSetError(f"--resize-to-tokens shows whole views: leave --tickets {options.tickets} out")
        grid = (student_side(options, opened) // patch,) * 2
    if model.grid != grid or model.patch_size != patch:
        raise TicketSetError(
            f"--model {options.model}: has a {model.grid[0]}x{model.grid[1]} grid of {model.patch_size} px patches,"
            f" but what {opened.url} feeds is {grid[0]}x{grid[1]} of {patch} px;"
            f" leave img_size and patch_size out of --model-kwargs, or mine with --patch-size {model.patch_size}"
        )
    if options.resize_to_tokens:
        return grid[0] * grid[1]
    if (options.tokens or 1) > opened.num_patches:
        raise TicketSetError(f"--tokens {options.tokens}: expected at most {opened.num_patches}, the patches of a view")
    return opened.num_patches if options.tickets == "full" else options.tokens or opened.k
