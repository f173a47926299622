"""What a weight ticket is, in words and tables."""

import math

from shards.console import printable, table
from shards.keys import natural_sorted
from trainer.weights.ticket import WeightTicket

NOT_FASTER = (
    "Zeros at any place make nothing faster or smaller by themselves: GMACs without them are theory, and a device"
    " computes the dense ones."
)


def title(ticket: WeightTicket) -> str:
    """One line: method, sparsity, levels, model, seed, start."""
    plan = ticket.plan
    levels = f"{plan.levels} level" + ("s" if plan.levels > 1 else "")
    said = f"{plan.method}, sparsity {plan.sparsity:g} in {levels} ({plan.scope}), of {str(plan.arguments.get('model'))[:100]}"
    return f"{said}, seed {plan.seed}, start at epoch {plan.rewind_epochs}"


def screen(ticket: WeightTicket) -> str:
    """The line, what the last level keeps of each tensor, and every level."""
    ids = {
        "data set": ticket.plan.arguments.get("set_id"),
        "ticket": ticket.level().ticket_id,
        "group": ticket.plan.group_id,
    }
    shortened = ", ".join(f"{name} {str(value)[:12]}" for name, value in ids.items())
    line = printable(f"{title(ticket)}; {shortened}")
    return "\n\n".join([line, _tensors(ticket), _levels(ticket), NOT_FASTER])


def _tensors(ticket: WeightTicket) -> str:
    record = ticket.level()
    rows: list[list[object]] = []
    for name in natural_sorted(ticket.plan.prunable):
        shape, kept = ticket.plan.prunable[name], record.tensors[name]
        rows.append([name, " x ".join(map(str, shape)), kept, kept / math.prod(shape)])
    rows.append(["all", "", record.kept, record.kept / record.prunable])
    return table(rows, ["tensor", "shape", "kept", "share"])


def _levels(ticket: WeightTicket) -> str:
    records = ticket.manifest.levels
    protocols = sorted({protocol for record in records for protocol in record.results or {}})
    rows = []
    for record in records:
        found = [(record.results or {}).get(protocol) for protocol in protocols]
        kept = f"{record.kept} of {record.prunable}"
        gmacs = f"{record.gmacs:.3g} of {record.dense_gmacs:.3g}"
        rows.append([record.level, record.sparsity, kept, *found, record.updates, gmacs])
    head = [
        "level",
        "sparsity",
        "kept",
        *(f"top-1 ({protocol})" for protocol in protocols),
        "updates",
        "GMACs in theory",
    ]
    return table(rows, head)
