"""What a run starts from: a ticket set that is whole, this process's place, and the model."""

import os
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from miner.models import load_weights, timm_name
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.verify import verify
from trainer.options import Options
from trainer.ticket_vit import TicketViT


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
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise TicketSetError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


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
        load_weights(model, options.initial_checkpoint, "--initial-checkpoint")
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
    """Multiply-accumulates of one image's forward, in units of 1e9, as torch counts them."""
    weight = next(model.parameters())
    patches = weight.new_zeros(1, tokens, 3 * model.patch_size**2)
    training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches, torch.arange(tokens, device=weight.device)[None])
    model.train(training)
    return counter.get_total_flops() / 2e9
