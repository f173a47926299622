"""Which weights of a student are trained at all, and what it starts from: an arm of a weight ticket."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import TicketSetError, first_line
from trainer.options import WEIGHT_DERIVED, Weights
from trainer.weights.scores import Kept, drawn, shuffled
from trainer.weights.ticket import WeightPlan, WeightTicket


@dataclass(frozen=True, eq=False)
class Subnetwork:
    """A part of a model's weights that is trained; the others are +0.0 from the first step to the last.

    Attributes:
        kept: name -> bool of the weight's shape, True where it is trained; empty: all of them.
        start: timm's state dict of the dense start weights; None: the student's own first weights.
        first_epoch: that training begins at; the start weights saw those before (rewinding).
        seed: of the student's own first weights, where not the run's.
        mining_updates: of the optimizer, spent on finding this mask.
        mined_with: the seed of the ticket.
        said: what args.yaml holds of it.
    """

    kept: Kept
    start: dict[str, Tensor] | None = None
    first_epoch: int = 0
    seed: int | None = None
    mining_updates: int = 0
    mined_with: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Weights, seed: int) -> "Subnetwork | None":
        """The arm of the weight ticket that the settings name; None where they name none.

        Args:
            seed: of the run; it names what is drawn at random.
        Raises:
            TicketSetError: no finished ticket, no such level, or an arm that it does not have.
        """
        if weights.weight_ticket is None:
            return None
        ticket, arm = WeightTicket.open(weights.weight_ticket), weights.weight_arm
        record, plan = ticket.level(weights.weight_level), ticket.plan
        start = _other_start(weights.weight_start, ticket) if weights.weight_start else ticket
        if arm == "reinit" and start is ticket and plan.rewind_epochs:
            raise TicketSetError(
                f"`weight_arm` reinit: {ticket.path} starts at epoch {plan.rewind_epochs}, so fresh weights would have seen"
                " less; give another seed's ticket of this kind as `weight_start`"
            )
        kept: Kept = {}
        if arm == "random":
            kept = drawn(plan.prunable, record.kept, "random", seed)
        elif arm == "shuffled":
            kept = shuffled(ticket.kept(record.level), "shuffled", seed)
        elif arm != "dense":
            kept = ticket.kept(record.level)
        other = start.plan.plan_id if weights.weight_start else None
        said = said_of(plan, record.ticket_id, record.sparsity if kept else 0.0, other)
        fresh = arm == "reinit" and start is ticket
        updates = record.updates
        # A random mask costs nothing to find; a transformed start does, and one of a later epoch, whatever is laid on it.
        if plan.method != "rst" and arm in ("random", "dense"):
            updates = ticket.level(1).updates * plan.rewind_epochs // plan.arguments.get("epochs", 1)
        return cls(
            kept,
            None if fresh else load_start(start.start_bytes(), str(start.path)),
            plan.rewind_epochs,
            named_seed("reinit", seed) if fresh else None,
            updates,
            plan.seed,
            said,
        )

    def lay_on(self, model: nn.Module) -> None:
        """Start weights into timm's model, with zeros where nothing is kept.

        Raises:
            TicketSetError: they are another model's.
        """
        if self.start is not None:
            try:
                model.load_state_dict(self.start)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise TicketSetError(f"`weight_ticket`: of another model than this student: {reason}") from None
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        for name, mask in self.kept.items():
            if shapes.get(name) != mask.shape:
                found = list(shapes[name]) if name in shapes else "none"
                raise TicketSetError(
                    f"`weight_ticket`: of another model than this student: {name}: expected {list(mask.shape)}, got {found}"
                )
        empty(self.pruned(model))

    def counts(self, model: nn.Module) -> dict[str, int]:
        """Of final.json: weights kept, of how many, and how many under the mask are not +0.0 in a model. Empty without a mask."""
        if not self.kept:
            return {}
        total, kept = sum(m.size for m in self.kept.values()), sum(int(m.sum()) for m in self.kept.values())
        return {"kept": kept, "prunable": total, "nonzero_under_mask": not_zero(model, self.kept)}

    def pruned(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """The weights that lose some, and where: bool of a weight's shape, on its device."""
        weights = dict(model.named_parameters())
        return [
            (weights[name], torch.from_numpy(~mask).to(weights[name].device))
            for name, mask in sorted(self.kept.items())
        ]


def said_of(plan: WeightPlan, ticket_id: str | None, sparsity: float, start_id: str | None = None) -> dict[str, Any]:
    """What args.yaml holds of an arm of a ticket."""
    said = (ticket_id, plan.group_id, plan.method, sparsity, plan.start, start_id)
    return dict(zip(WEIGHT_DERIVED, said, strict=True))


@torch.no_grad()
def empty(pruned: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Weights under the mask become +0.0. Not by multiplying: half of them would be -0.0, and infinity stays NaN."""
    for weight, where in pruned:
        weight.masked_fill_(where, 0)


def not_zero(model: nn.Module, kept: Kept) -> int:
    """How many weights under the masks are not +0.0, bit for bit."""
    weights = dict(model.named_parameters())
    found = 0
    for name, mask in kept.items():
        weight = weights[name].detach()
        wrong = (weight != 0) | torch.signbit(weight)  # NaN differs from 0
        found += int((wrong & torch.from_numpy(~mask).to(weight.device)).sum())
    return found


def prunable(model: Any, more: tuple[str, ...] = (), fewer: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Weights that a ticket may remove, name -> shape: linear and convolutional ones between the stem and the head.

    Biases, norms, positions, class tokens, LayerScale and relative position tables stay, as in every code that prunes ViTs.

    Args:
        more: patterns, * and ?, of names to add: weights of the stem or the head.
        fewer: of names to leave out.
    Raises:
        TicketSetError: there are none, or a pattern fits nothing.
    """
    layers = (nn.Linear, nn.Conv2d)
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}
    weights = {name: weight for name, weight in model.named_parameters() if name in names}
    # timm's word for what belongs together: patterns of names, alone or each with what follows it; of a few models a function.
    groups = model.group_matcher(coarse=True)
    if not isinstance(groups, dict):
        raise TicketSetError(f"model {type(model).__name__}: timm does not say which of its weights are the stem's")
    stems = [groups["stem"]] if isinstance(groups["stem"], str) else [first for first, *_ in groups["stem"]]
    head = model.pretrained_cfg.get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    outside = {
        name for name in weights if name.removesuffix(".weight") in heads or any(re.match(s, name) for s in stems)
    }
    inside = weights.keys() - outside
    for patterns, add in ((more, True), (fewer, False)):
        for pattern in patterns:
            found = {name for name in weights if fnmatchcase(name, pattern)}
            if not found:
                raise TicketSetError(
                    f"`{'prune' if add else 'keep'}` {pattern}: fits no weight of a linear or convolutional layer, such as"
                    f" {min(weights, default='none')}"
                )
            inside = inside | found if add else inside - found
    if not inside:
        raise TicketSetError(
            f"model {type(model).__name__}: expected weights to prune between stem and head, found none"
        )
    return {name: tuple(weights[name].shape) for name in sorted(inside)}


def heads_of(model: nn.Module, names: Mapping[str, Any]) -> dict[str, int]:
    """Of the qkv weights among the names: how many heads share their rows."""
    return {
        f"{name}.qkv.weight": module.num_heads
        for name, module in model.named_modules()
        if f"{name}.qkv.weight" in names and isinstance(getattr(module, "num_heads", None), int)
    }


def load_start(data: bytes, where: str) -> dict[str, Tensor]:
    """A state dict out of a safetensors file.

    Raises:
        TicketSetError: it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise TicketSetError(f"{where}: start weights: not readable as safetensors: {first_line(error)}") from None


def named_seed(*name: object) -> int:
    """A seed that depends on nothing but its name."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits


def _other_start(path: str, ticket: WeightTicket) -> WeightTicket:
    """Another seed's ticket of the same kind, whose start weights a reinit run takes.

    Raises:
        TicketSetError: it is of another kind, or the same.
    """
    other = WeightTicket.open(path)
    if other.plan.group_id != ticket.plan.group_id or other.plan.seed == ticket.plan.seed:
        raise TicketSetError(
            f"`weight_start` {path}: expected the ticket of another seed, mined as {ticket.path} was (group"
            f" {ticket.plan.group_id[:12]}, seed {ticket.plan.seed}), got group {other.plan.group_id[:12]}, seed {other.plan.seed}"
        )
    return other
