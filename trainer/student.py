"""The student: timm's model at the size that its tickets ask for, with its starting weights."""

import logging
from typing import Any

from timm.data import resolve_model_data_config

from miner.drop import DEFAULT_KEEP_RATE
from miner.models import create, load_weights, meta_model, timm_name
from shards.errors import TicketSetError, first_line
from shards.reader import TicketSet
from shards.views import CROP_PCT
from trainer.data.dataset import ticket_size
from trainer.data.lengths import Lengths
from trainer.families.base import TicketModel, square_side
from trainer.families.coarse import CoarseViT
from trainer.families.dropping import DroppingViT
from trainer.families.registry import feed_of
from trainer.options import Dropping, Model, Tickets

log = logging.getLogger("datalth")


def build_student(
    opened: TicketSet, model: Model, tickets: Tickets, dropping: Dropping, trained: bool = False
) -> TicketModel:
    """The timm model at the size that its feed asks for, with its starting weights, ready to take tickets.

    Args:
        trained: it is only tested, so that weights which start anew are no use.
    Raises:
        TicketSetError: timm cannot build it, it cannot take these tickets, or the weights do not fit.
    """
    meta = meta_model(lambda: create_model(model, opened))
    feed, kind = feed_of(meta, model.feed)
    if tickets.varying and kind.one_length:
        raise TicketSetError(
            f"`tokens` {tickets.tokens}: {model.model} with `feed` {feed} is built for tickets of one K, a square; give K"
        )
    patch = kind.patch_of(meta, opened.manifest.patch_size)
    if tickets.coarse_first and feed != "tokens":
        raise TicketSetError(f"`unmask_epochs` with `resize_to_tokens`: expected a ViT, got {model.model}")
    side = _side(opened, tickets, kind, patch)
    coarse = (side // patch,) * 2
    if tickets.coarse_first:
        side = opened.grid[0] * patch
    grid = coarse if tickets.resize_to_tokens and not tickets.coarse_first else opened.grid
    timm_model = create_model(model, opened, pretrained=model.pretrained, **kind.size_arguments(meta, side))
    _start_weights(timm_model, model, opened, trained)
    if model.grad_checkpointing:
        try:
            timm_model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise TicketSetError(f"`grad_checkpointing`: {model.model} has none: {first_line(error)}") from None
    student = kind.wrap(timm_model, feed, grid, patch, side)
    if dropping.drop_blocks is not None:
        if feed != "tokens":
            raise TicketSetError(f"`drop_blocks` trains a ticket selector: expected a ViT, got {model.model}")
        rate = dropping.keep_rate or DEFAULT_KEEP_RATE
        student = DroppingViT(timm_model, dropping.drop_blocks, rate, dropping.fuse_token)
    if student.grid != grid or student.patch_size != patch:
        raise TicketSetError(
            f"`model` {model.model}: has a {student.grid[0]}x{student.grid[1]} grid of {student.patch_size} px patches,"
            f" but what {opened.url} feeds is {grid[0]}x{grid[1]} of {patch} px; leave img_size and patch_size out of"
            f" `model_kwargs`, or mine with datalth-mine --img-size {student.whole_side} --patch-size {student.patch_size}"
        )
    if patch != opened.manifest.patch_size:
        log.info(f"{model.model} has patches of {patch} px: it is fed the views' {grid[0]}x{grid[1]} at {side} px")
    return CoarseViT(timm_model, coarse) if tickets.coarse_first else student


def create_model(model: Model, opened: TicketSet, pretrained: bool = False, **size: Any) -> Any:
    """timm's model for the set's classes.

    Raises:
        TicketSetError: timm cannot build it.
    """
    arguments = {"num_classes": len(opened.classes), **size, **model.model_kwargs}
    if model.drop_path:
        arguments["drop_path_rate"] = model.drop_path
    if arguments.get("in_chans", 3) != 3:
        raise TicketSetError(f"`model_kwargs`: expected 3 input channels, got {arguments['in_chans']}")
    try:
        created: Any = create(model.model, "model", pretrained, **arguments)
    except TicketSetError as error:
        if "drop_path_rate" in str(error):
            raise TicketSetError(f"`model` {model.model}: has no stochastic depth; use `drop_path` 0") from None
        raise
    if created.num_classes != len(opened.classes):
        raise TicketSetError(
            f"`model_kwargs` num_classes: expected {len(opened.classes)}, the set's, got {created.num_classes}"
        )
    return created


def _start_weights(timm_model: Any, model: Model, opened: TicketSet, trained: bool) -> None:
    if model.initial_checkpoint:
        fresh = load_weights(timm_model, model.initial_checkpoint, "initial_checkpoint", opened.classes)
        if fresh:
            log.info(f"initial checkpoint {model.initial_checkpoint}: {', '.join(fresh)} start anew")
        if fresh and trained:
            raise TicketSetError(
                f"`eval`: {model.initial_checkpoint} has no trained {fresh[0]} for the {len(opened.classes)} classes of {opened.url}"
            )
    elif model.pretrained and trained and timm_model.pretrained_cfg.get("num_classes") != timm_model.num_classes:
        raise TicketSetError(
            f"`eval`: the pretrained weights are for {timm_model.pretrained_cfg.get('num_classes')} classes,"
            f" but {opened.url} has {timm_model.num_classes}; train first"
        )


def _side(opened: TicketSet, tickets: Tickets, kind: type[TicketModel], patch: int) -> int:
    """Pixels of the whole views that the student takes, in patches of `patch` pixels.

    Raises:
        TicketSetError: a K that is no square, where views or tickets of K patches make an image.
    """
    tokens = ticket_size(opened, tickets)
    if not tickets.resize_to_tokens:
        return kind.side_of(tokens, opened.grid[0] * patch, patch)
    if tickets.tickets not in ("winning", "full"):
        raise TicketSetError(f"`resize_to_tokens` shows whole views: leave `tickets` {tickets.tickets} out")
    return square_side(tokens, opened.num_patches, "`resize_to_tokens`") * patch


def views_said(opened: TicketSet, tickets: Tickets, model: Model, lengths: Lengths | None = None) -> dict[str, Any]:
    """What config.json says beside timm's fields: how views were cut of photos, and tickets of views, see `trainer.predict`.

    Args:
        lengths: how K varies; None where it does not.
    """
    return {
        "exif": opened.exif,
        "img_size": opened.manifest.img_size,
        "patch_size": opened.manifest.patch_size,
        "tokens": ticket_size(opened, tickets),
        "feed": model.feed,
        "resized": tickets.resize_to_tokens,
        **({"share": lengths.share, "sizes": list(lengths.sizes)} if lengths else {}),
    }


def timm_config(model: Model, classes: list[str], student: TicketModel) -> dict[str, Any]:
    """config.json of timm's hub format: the model that the weights beside it are of, and how it is shown an image.

    `timm.create_model("local-dir:RUN", pretrained=True)` builds it, from timm 1.0.29 on; before, timm took the last
    checkpoint that it found in a folder, and from 1.0.16 on `checkpoint_path=` names it.
    """
    timm_model, side = student.model, student.whole_side
    shown = resolve_model_data_config(timm_model)
    kept = {name: timm_model.pretrained_cfg.get(name) for name in ("fixed_input_size", "first_conv", "classifier")}
    return {
        "architecture": timm_name(model.model).partition(".")[0],  # without timm's tag of pretrained weights
        "num_classes": len(classes),
        "label_names": classes,
        "model_args": {**student.size_arguments(timm_model, side), **model.model_kwargs},
        "pretrained_cfg": {
            **kept,
            "num_classes": len(classes),
            "input_size": (3, side, side),
            "crop_pct": CROP_PCT,  # view 0's
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": shown["mean"],
            "std": shown["std"],
        },
    }
