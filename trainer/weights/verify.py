"""Checking a weight ticket against what it says of itself."""

import itertools
from collections.abc import Iterator

import numpy as np

from shards.errors import TicketSetError, first_line
from shards.storage import list_names
from trainer.weights.scores import count_of
from trainer.weights.ticket import (
    MANIFEST,
    MASKS_PREFIX,
    PLAN,
    START,
    LevelRecord,
    WeightTicket,
    masks_name,
    read_tensors,
    ticket_identity,
)

MAX_PROBLEMS = 1000


def verify(ticket: WeightTicket) -> list[str]:
    """Everything that is wrong with a ticket, one line each; empty where it is sound. After MAX_PROBLEMS it stops.

    Args:
        ticket: as `WeightTicket.read` gives it; its other files may be anything.
    """
    return list(itertools.islice(_problems(ticket), MAX_PROBLEMS))


def _problems(ticket: WeightTicket) -> Iterator[str]:
    plan, manifest = ticket.plan, ticket.manifest
    for field, found in zip(("group_id", "plan_id"), plan.identities(), strict=True):
        if getattr(plan, field) != found:
            yield f"{PLAN}: not what its {field} {getattr(plan, field)[:12]} was made of"
    if manifest.group_id != plan.group_id:
        yield f"{MANIFEST}: expected group_id {plan.group_id[:12]} ({PLAN}), got {manifest.group_id[:12]}"
    if manifest.digest != manifest.identity():
        yield f"{MANIFEST}: not as it was written: its digest is of other contents"
    for record in manifest.levels:
        yield from (f"{MANIFEST}: level {record.level}: {problem}" for problem in _of_level(ticket, record))
    yield from _of_masks(ticket)
    try:
        yield from (f"{START}: {problem}" for problem in _of_start(ticket))
    except (TicketSetError, OSError) as error:
        yield _in_words(ticket, error)
    known = {name for name, _ in ticket.files()}
    for name in list_names(str(ticket.path)):
        if name.endswith(".tmp") or (name.startswith(MASKS_PREFIX) and name not in known):
            yield f"{name}: not one of this ticket's files"


def _of_level(ticket: WeightTicket, record: LevelRecord) -> Iterator[str]:
    """What reading the manifest does not look at: sparsities and ids."""
    if record.kept != count_of(record.prunable, record.sparsity):
        yield f"expected sparsity {record.sparsity:g}, got {record.kept} of {record.prunable} weights kept"
    if record.level == ticket.levels and record.sparsity != ticket.plan.sparsity:
        yield f"expected sparsity {ticket.plan.sparsity:g} ({PLAN}), got {record.sparsity:g}"
    if record.masks is not None and record.ticket_id != ticket_identity(record.masks, ticket.manifest.start):
        yield "its ticket_id is not that of its masks and start weights"


def _of_masks(ticket: WeightTicket) -> Iterator[str]:
    """Every mask file by itself, and that each level keeps nothing that the one before had removed."""
    before: dict[str, np.ndarray] = {}
    for level in range(1, ticket.levels + 1):
        try:
            kept = ticket.kept(level)
        except (TicketSetError, OSError) as error:
            yield _in_words(ticket, error)
            continue
        for name, mask in before.items():
            if revived := int((kept[name] & ~mask).sum()):
                yield f"{masks_name(level)}: {name}: keeps {revived} weights that a level before removed"
        before = kept


def _of_start(ticket: WeightTicket) -> Iterator[str]:
    tensors, _ = read_tensors(ticket.start_bytes(), START)
    for name, shape in ticket.plan.prunable.items():
        if name not in tensors:
            yield f"lacks {name}"
        elif tensors[name].shape != shape:
            yield f"{name}: expected shape {list(shape)} ({PLAN}), got {list(tensors[name].shape)}"
    for name, weights in sorted(tensors.items()):
        if not np.isfinite(weights).all():
            yield f"{name}: expected finite numbers, got {int((~np.isfinite(weights)).sum())} others"


def _in_words(ticket: WeightTicket, error: TicketSetError | OSError) -> str:
    """An error of reading, without the ticket's own place, which the reader of these lines knows."""
    text = (
        str(error) if isinstance(error, TicketSetError) else f"{error.filename}: {error.strerror or first_line(error)}"
    )
    return text.removeprefix(f"{ticket.path}/")
