"""The student: timm's model at the size that the set asks for, its K, and what it costs."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from miner.models import create, load_weights, meta_model, timm_name
from shards.errors import TicketSetError, first_line
from shards.reader import TicketSet
from shards.views import CROP_PCT
from trainer.families.base import TicketModel
from trainer.families.dropping import KEEP_RATE, DroppingViT, keep_rate_at, without_drops
from trainer.families.registry import feed_of
from trainer.families.swin import square_side
from trainer.families.zero import TicketZero
from trainer.options import Options

log = logging.getLogger("datalth")


def build_student(options: Options, opened: TicketSet) -> TicketModel:
    """The timm model at the size that its feed asks for, with its starting weights, ready to take tickets.

    Raises:
        TicketSetError: timm cannot build it, it cannot take these tickets, or the weights do not fit.
    """
    outline = meta_model(lambda: _create(options, opened))
    feed, kind = feed_of(outline, options.feed)
    side, patch = _side(options, opened, kind), opened.manifest.patch_size
    grid = (side // patch,) * 2 if options.resize_to_tokens else opened.grid
    model = _create(options, opened, pretrained=options.pretrained, **kind.size_arguments(outline, side))
    if options.initial_checkpoint:
        fresh = load_weights(model, options.initial_checkpoint, "initial_checkpoint", opened.classes)
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
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise TicketSetError(f"--grad-checkpointing: {options.model} has none: {first_line(error)}") from None
    student = kind.wrap(model, feed, grid, patch, side)
    if options.drop_blocks is not None:
        if feed != "tokens":
            raise TicketSetError(f"--drop-blocks trains a ticket selector: expected a ViT, got {options.model}")
        student = DroppingViT(model, options.drop_blocks, options.keep_rate or KEEP_RATE, options.fuse_token)
    _check_student(options, opened, student, grid)
    return student


def check_flags(options: Options) -> None:
    """Flags that would be without effect beside the others.

    Raises:
        TicketSetError: names them.
    """
    selectors = {"--keep-rate": options.keep_rate, "--fuse-token": options.fuse_token}
    selectors |= {"--shrink-start-epoch": options.shrink_start_epoch, "--shrink-epochs": options.shrink_epochs}
    unused = [flag for flag, value in selectors.items() if value]
    if options.drop_blocks is None:
        if unused:
            raise TicketSetError(
                f"{unused[0]}: of a selector that drops patches inside; give --drop-blocks too."
                " How much of a view a ticket holds is mined; --tokens takes another K of its ranking"
            )
        return
    if options.tickets != "full" or options.resize_to_tokens:
        raise TicketSetError("--drop-blocks trains a ticket selector: expected --tickets full beside it")
    if options.tokens or options.unmask_epochs:
        flag = "--tokens" if options.tokens else "--unmask-epochs"
        raise TicketSetError(f"{flag}: of students; a selector sees all patches and drops by --keep-rate")


def _create(options: Options, opened: TicketSet, pretrained: bool = False, **size: Any) -> Any:
    arguments = {"num_classes": len(opened.classes), **size, **options.model_kwargs}
    if options.drop_path:
        arguments["drop_path_rate"] = options.drop_path
    if arguments.get("in_chans", 3) != 3:
        raise TicketSetError(f"--model-kwargs: expected 3 input channels, got {arguments['in_chans']}")
    try:
        model: Any = create(options.model, "model", pretrained, **arguments)
    except TicketSetError as error:
        if "drop_path_rate" in str(error):
            raise TicketSetError(f"--model {options.model}: has no stochastic depth; give --drop-path 0") from None
        raise
    if model.num_classes != len(opened.classes):
        raise TicketSetError(
            f"--model-kwargs num_classes: expected {len(opened.classes)}, the set's, got {model.num_classes}"
        )
    return model


def _side(options: Options, opened: TicketSet, kind: type[TicketModel]) -> int:
    """Pixels of the whole views that the student takes.

    Raises:
        TicketSetError: a K that is no square, where views or tickets of K patches make an image.
    """
    tokens, patch = options.tokens or opened.k, opened.manifest.patch_size
    if tokens > opened.num_patches:
        raise TicketSetError(f"--tokens {tokens}: expected at most {opened.num_patches}, the patches of a view")
    if not options.resize_to_tokens:
        return kind.side_of(tokens, opened.manifest.img_size, patch)
    if options.tickets not in ("winning", "full"):
        raise TicketSetError(f"--resize-to-tokens shows whole views: leave --tickets {options.tickets} out")
    return square_side(tokens, opened.num_patches, "--resize-to-tokens") * patch


def _check_student(options: Options, opened: TicketSet, student: TicketModel, grid: tuple[int, int]) -> None:
    patch = opened.manifest.patch_size
    if options.token_labels not in (None, "none") and not student.wants_token_labels:
        raise TicketSetError(f"--token-labels: {options.model} has no use for them; LV-ViT has")
    if options.mix_token and "box" not in student.extras:
        raise TicketSetError(f"--mix-token: {options.model} has none; it is LV-ViT's")
    if student.grid != grid or student.patch_size != patch:
        raise TicketSetError(
            f"--model {options.model}: has a {student.grid[0]}x{student.grid[1]} grid of {student.patch_size} px patches,"
            f" but what {opened.url} feeds is {grid[0]}x{grid[1]} of {patch} px;"
            f" leave img_size and patch_size out of --model-kwargs, or mine with --patch-size {student.patch_size}"
        )


def timm_config(options: Options, opened: TicketSet, student: TicketModel) -> dict[str, Any]:
    """config.json of timm's hub format: the model that the weights beside it are of, and how it is shown an image.

    `timm.create_model("local-dir:RUN", pretrained=True)` builds it, from timm 1.0.29 on; before, timm took the last
    checkpoint that it found in a folder, and from 1.0.16 on `checkpoint_path=` names it.
    """
    model, side = student.model, student.whole_side
    shown = resolve_model_data_config(model)
    kept = {name: model.pretrained_cfg.get(name) for name in ("fixed_input_size", "first_conv", "classifier")}
    return {
        "architecture": timm_name(options.model).partition(".")[0],  # without timm's tag of pretrained weights
        "num_classes": len(opened.classes),
        "label_names": opened.classes,
        "model_args": {**student.size_arguments(model, side), **options.model_kwargs},
        "pretrained_cfg": {
            **kept,
            "num_classes": len(opened.classes),
            "input_size": (3, side, side),
            "crop_pct": CROP_PCT,  # view 0's
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": shown["mean"],
            "std": shown["std"],
        },
    }


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
    side, patch = opened.manifest.img_size, opened.manifest.patch_size
    if student.whole_side != side:
        if "window_size" in options.model_kwargs:  # Swin's is of the smaller image; timm's own is of the whole
            kept = {name: value for name, value in options.model_kwargs.items() if name != "window_size"}
            options = replace(options, model_kwargs=kept)
        model = _create(options, opened, **TicketZero.size_arguments(student.model, side))
        student = TicketZero(model, opened.grid, patch, side)
    return gmacs(student, opened.num_patches)


def _selector_gmacs(options: Options, student: DroppingViT, tokens: int) -> float:
    """In training, as the mean over the epochs; a keep rate that falls is looked at 16 times."""
    first, last = options.shrink_start_epoch, options.shrink_start_epoch + options.shrink_epochs
    points, total = 16 if last else 1, 0.0
    shrinking = copy.copy(student)
    for point in range(points):
        epoch = (point + 0.5) / points * options.epochs
        shrinking.set_rate(keep_rate_at(epoch, first, last, student.keep_rate))
        total += gmacs(shrinking, tokens)
    return total / points


def costs(
    options: Options, opened: TicketSet, student: TicketModel, tokens: int, test_tokens: int, names: Sequence[str]
) -> dict[str, Any]:
    """Tokens, and GMACs of a view's forward: in training as the mean over the epochs, and under each protocol.

    Args:
        tokens: K in training.
        test_tokens: K of the ticket and random protocols.
        names: of the protocols.
    """
    if isinstance(student, DroppingViT):  # its tickets are its own, and it may learn to drop by and by
        at_k, at_test = _selector_gmacs(options, student, tokens), gmacs(student, tokens)
    else:
        at_k, at_test = gmacs(student, tokens), gmacs(student, test_tokens)
    whole = gmacs(without_drops(student), (student.whole_side // student.patch_size) ** 2)
    unmasked = options.unmask_epochs / options.epochs
    return {
        "tokens": tokens,
        "patches": opened.num_patches,
        "train_gmacs": (1 - unmasked) * at_k + unmasked * whole,
        "test_gmacs": {name: whole if name == "all" else at_test for name in names},
        "dense_gmacs": dense_gmacs(options, opened, without_drops(student)),
    }
