"""The student: timm's model at the size that the set asks for, its K, and what it costs."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from miner.models import load_weights, sketch, timm_name
from shards.errors import TicketSetError, first_line
from shards.reader import TicketSet
from trainer.dropping_vit import DroppingViT, without_drops
from trainer.families import feed_of, size_arguments, whole_side, wrap
from trainer.options import Options
from trainer.ticket_model import TicketModel
from trainer.ticket_zero import TicketZero

log = logging.getLogger("datalth")


def build_student(options: Options, opened: TicketSet) -> TicketModel:
    """The timm model at the size that its feed asks for, with its starting weights, ready to take tickets.

    Raises:
        TicketSetError: timm cannot build it, it cannot take these tickets, or the weights do not fit.
    """
    outline = sketch(lambda: _create(options, opened))
    feed, side = feed_of(outline, options.feed), _side(options, opened, outline)
    model = _create(options, opened, pretrained=options.pretrained, **size_arguments(outline, side))
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
    student = _wrap(feed, model, options, opened, side)
    _check_grid(options, opened, student, side)
    return student


def _create(options: Options, opened: TicketSet, pretrained: bool = False, **size: Any) -> Any:
    arguments = {"num_classes": len(opened.classes), **size, **options.model_kwargs}
    if options.drop_path:
        arguments["drop_path_rate"] = options.drop_path
    try:
        model: Any = timm.create_model(timm_name(options.model), pretrained=pretrained, **arguments)
    except Exception as error:  # timm's builders and hubs have no common class
        raise TicketSetError(f"--model {options.model}: timm cannot build it: {first_line(error)}") from None
    if model.num_classes != len(opened.classes):
        raise TicketSetError(
            f"--model-kwargs num_classes: expected {len(opened.classes)}, the set's, got {model.num_classes}"
        )
    return model


def _side(options: Options, opened: TicketSet, outline: Any) -> int:
    """Pixels of the whole views that the student takes.

    Raises:
        TicketSetError: a K that is no square, where views or tickets of K patches make an image.
    """
    tokens, patch = options.tokens or opened.k, opened.manifest["patch_size"]
    if tokens > opened.num_patches:
        raise TicketSetError(f"--tokens {tokens}: expected at most {opened.num_patches}, the patches of a view")
    if not options.resize_to_tokens:
        return whole_side(feed_of(outline, options.feed), tokens, opened.manifest["img_size"], patch)
    if options.tickets not in ("winning", "full"):
        raise TicketSetError(f"--resize-to-tokens shows whole views: leave --tickets {options.tickets} out")
    side = round(tokens**0.5)
    if side * side != tokens:
        raise TicketSetError(
            f"--resize-to-tokens: {tokens} tokens are no square; the nearest --tokens are {side**2} and {(side + 1) ** 2}"
        )
    return side * patch


def _wrap(feed: str, model: Any, options: Options, opened: TicketSet, side: int) -> TicketModel:
    patch = opened.manifest["patch_size"]
    grid = (side // patch,) * 2 if options.resize_to_tokens else opened.grid
    student = wrap(feed, model, grid, patch, side)
    if options.token_labels is not None and not student.wants_token_labels:
        raise TicketSetError(f"--token-labels: {options.model} has no use for them; LV-ViT has")
    if options.mix_token and "box" not in student.extras:
        raise TicketSetError(f"--mix-token: {options.model} has none; it is LV-ViT's")
    if options.drop_blocks is None:
        return student
    if feed != "tokens" or options.tickets != "full":
        raise TicketSetError("--drop-blocks trains a selector: expected a ViT with --tickets full")
    return DroppingViT(model, options.drop_blocks, options.keep_rate, options.fuse_token)


def _check_grid(options: Options, opened: TicketSet, student: TicketModel, side: int) -> None:
    patch = opened.manifest["patch_size"]
    grid = (side // patch,) * 2 if options.resize_to_tokens else opened.grid
    if student.grid != grid or student.patch_size != patch:
        raise TicketSetError(
            f"--model {options.model}: has a {student.grid[0]}x{student.grid[1]} grid of {student.patch_size} px patches,"
            f" but what {opened.url} feeds is {grid[0]}x{grid[1]} of {patch} px;"
            f" leave img_size and patch_size out of --model-kwargs, or mine with --patch-size {student.patch_size}"
        )


def gmacs(student: TicketModel, tokens: int) -> float:
    """Multiply-accumulates of one image's forward, in units of 1e9, as torch counts them.

    Counted on a copy without storage: of the CPU's attention kernel torch counts nothing.
    """
    try:
        return _count(copy.deepcopy(student).to("meta"), tokens)
    except NotImplementedError:  # Hiera's mask counts what is there; the plain kernel is counted on a CPU too
        with sdpa_kernel(SDPBackend.MATH):
            return _count(copy.deepcopy(student).cpu(), tokens)


def _count(student: TicketModel, tokens: int) -> float:
    student.eval().requires_grad_(False)
    device = next(student.parameters()).device
    given = student.grid[0] * student.grid[1] if student.wants_all else tokens
    patches = torch.zeros(1, given, 3 * student.patch_size**2, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(patches, torch.arange(tokens, device=device)[None])
    return counter.get_total_flops() / 2e9


def dense_gmacs(options: Options, opened: TicketSet, student: TicketModel) -> float:
    """GMACs of the student on whole views of the set's own size, also where it is trained on smaller ones."""
    side, patch = opened.manifest["img_size"], opened.manifest["patch_size"]
    if student.whole_side != side:
        model = _create(options, opened, **size_arguments(student.model, side))
        student = TicketZero(model, opened.grid, patch, side)
    return gmacs(student, opened.num_patches)


def costs(
    options: Options, opened: TicketSet, student: TicketModel, tokens: int, test_tokens: int, names: Sequence[str]
) -> dict[str, Any]:
    """Tokens, and GMACs of a view's forward: in training as the mean over the epochs, and under each protocol.

    Args:
        tokens: K in training.
        test_tokens: K of the ticket and random protocols.
        names: of the protocols.
    """
    at_k = gmacs(student, tokens)
    dropping = isinstance(student, DroppingViT)
    at_test = at_k if dropping else gmacs(student, test_tokens)  # a selector's tickets are its own
    whole = gmacs(without_drops(student), (student.whole_side // student.patch_size) ** 2)
    unmasked = options.unmask_epochs / options.epochs
    return {
        "tokens": tokens,
        "patches": opened.num_patches,
        "train_gmacs": (1 - unmasked) * at_k + unmasked * whole,
        "test_gmacs": {name: whole if name == "all" else at_test for name in names},
        "dense_gmacs": dense_gmacs(options, opened, without_drops(student)),
    }
