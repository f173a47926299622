"""What decides a weight ticket's bytes."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import TicketSetError
from shards.flags import function_of
from trainer.options import FREE_TO_CHANGE, LATER
from trainer.weights.options import METHODS, Mining
from trainer.weights.scores import default_levels
from trainer.weights.subnetwork import heads_of, prunable
from trainer.weights.ticket import WeightPlan

if TYPE_CHECKING:
    from trainer.trainer import Trainer


def plan_of(mining: Mining, trainer: "Trainer") -> WeightPlan:
    """The plan of a ticket whose dense training is a trainer's.

    Raises:
        TicketSetError: the model has nothing to prune, or the method's function is not to be had.
    """
    model = trainer.student.model
    names = prunable(model, mining.prune, mining.keep)
    by_levels = mining.method == "imp" or mining.method not in METHODS
    by_chance = mining.method in ("rst", "random")
    score = None if mining.method in METHODS else function_of(mining.method, "method")
    if mining.rewind_epochs and getattr(score, "at_start", False):
        raise TicketSetError(f"`rewind_epochs`: {mining.method} scores weights before any training; leave it out")
    if mining.rewind_epochs >= trainer.recipe.optimization.epochs:
        raise TicketSetError(f"`rewind_epochs` {mining.rewind_epochs}: expected less than `epochs`")
    return WeightPlan.of(
        method=mining.method,
        score_sha256=None if score is None else _sha256_of(score, mining.method),
        sparsity=mining.sparsity,
        levels=mining.levels or (default_levels(mining.sparsity) if by_levels else 1),
        scope=mining.scope or ("layer" if by_chance else "global"),
        rewind_epochs=mining.rewind_epochs,
        mining=mining.own,
        prunable=names,
        heads=heads_of(model, names),
        arguments=_arguments(trainer),
        classes=trainer.opened.classes,
        seed=trainer.recipe.machine.seed,
    )


def _arguments(trainer: "Trainer") -> dict[str, Any]:
    """Those that a resumed run may not change, and where the first weights come from; the seed stands on its own."""
    said = {
        name: value
        for name, value in trainer.arguments().items()
        if name not in FREE_TO_CHANGE and name != "seed" and not name.startswith("weight_")
        if not (name in LATER and value is None)
    }
    model = trainer.recipe.model
    start = _sha256(model.initial_checkpoint) if model.initial_checkpoint else None
    found: dict[str, Any] = json.loads(json.dumps(said | {"pretrained": model.pretrained, "initial_checkpoint": start}))
    return found


def _sha256_of(score: Any, method: str) -> str:
    try:
        return _sha256(inspect.getfile(score))
    except TypeError:
        raise TicketSetError(f"`method` {method}: expected a function of a file of yours, got a built-in one") from None


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def difference(there: WeightPlan, here: WeightPlan) -> str:
    """The first things in which two plans differ."""
    ours, theirs = ({**plan.to_json(), **plan.arguments} for plan in (here, there))
    names = [n for n in ours | theirs if n not in ("arguments", "plan_id", "group_id") and ours.get(n) != theirs.get(n)]
    return "; ".join(
        f"{name}: {str(theirs.get(name))[:80]} there, {str(ours.get(name))[:80]} here" for name in names[:5]
    )
