"""Weights that stay as they start, for fine-tuning: no gradient, no place in the optimizer."""

import difflib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _BatchNorm

from miner.models import classifier_weights
from shards.errors import TicketSetError
from trainer.hooks import Hook

if TYPE_CHECKING:
    from trainer.trainer import Trainer


def freeze(model: Any, patterns: str) -> "list[Hook]":
    """Keep weights of a timm model as they are; its classifier always learns.

    Args:
        patterns: shell patterns between commas, of names of weights or of the modules that hold them:
            `blocks.[0-5],patch_embed`, or `*` for a linear probe.
    Returns:
        What has to go on while it trains: a hook, or none.
    Raises:
        TicketSetError: a pattern that fits no weight but the classifier's.
    """
    head = classifier_weights(model)
    weights = {name: weight for name, weight in model.named_parameters() if name not in head}
    for pattern in patterns.split(","):
        found = [name for name in weights if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not found:
            known = {".".join(name.split(".")[:depth]) for name in weights for depth in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(pattern, sorted(known), 3, 0.4) or sorted(known)[:3]
            raise TicketSetError(
                f"`freeze` {pattern}: expected a pattern of weights before the classifier, found none; near: {', '.join(near)}"
            )
        for name in found:
            weights[name].requires_grad_(False)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and _is_frozen(module)]
    return [FrozenNorms(norms)] if norms else []


def _is_frozen(module: Any) -> bool:
    weights = [*module.parameters()]
    return bool(weights) and not any(weight.requires_grad for weight in weights)


class FrozenNorms(Hook):
    """Batch norms whose weights are frozen keep their running averages too, as with timm's `freeze`, which makes other
    modules of them. Dropout and stochastic depth go on, as everywhere.
    """

    def __init__(self, norms: list[_BatchNorm]) -> None:
        self._norms = norms

    def before_step(self, trainer: "Trainer", update: int) -> None:
        for norm in self._norms:  # an epoch begins with model.train()
            norm.eval()
