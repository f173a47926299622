"""What keeps weights under a mask at zero while a plain timm model trains: no wrapper, no buffer, no other forward."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shards.errors import TicketSetError
from trainer.hooks import Average, Hook
from trainer.weights.subnetwork import Subnetwork, empty, not_zero

if TYPE_CHECKING:
    from trainer.evaluate import Figures
    from trainer.trainer import Trainer

log = logging.getLogger("datalth")


class Masked(Hook):
    """Gradients of weights under the mask are zero before they are clipped, the weights +0.0 after every update.

    Both are needed. Without the first, Adam's moments fill up and the clipped norm counts what is not trained. Without the
    second an optimizer that mixes entries, as Muon does, brings them back.

    Args:
        model: timm's, with the subnetwork laid on it.
    """

    def __init__(self, subnetwork: Subnetwork, model: nn.Module) -> None:
        self._kept, self._pruned = subnetwork.kept, subnetwork.pruned(model)

    def begin(self, trainer: "Trainer") -> None:
        said, count = trainer.subnetwork.said, trainer.subnetwork.counts(trainer.student.model)
        log.info(
            f"weight ticket {said.get('weight_method', '')}, {trainer.recipe.weights.weight_arm}: {count['kept']} of"
            f" {count['prunable']} weights are trained; GMACs and time are those of the dense model"
        )
        seed, of = trainer.recipe.machine.seed, trainer.subnetwork.mined_with
        if of is not None and seed != of:
            log.warning(
                f"`seed` {seed}: the weight ticket was mined with {of}; a ticket belongs to its seed's first weights"
            )

    def before_update(self, trainer: "Trainer", update: int) -> None:
        for weight, where in self._pruned:
            if weight.grad is not None:
                weight.grad.masked_fill_(where, 0)

    def after_update(self, trainer: "Trainer", update: int) -> None:
        empty(self._pruned)

    def on_save(self, trainer: "Trainer") -> dict[str, Any]:
        """Nothing to keep.

        Raises:
            TicketSetError: a weight under the mask is not +0.0: some other hook has changed it.
        """
        averages = [hook.ema.module for hook in trainer.hooks if isinstance(hook, Average)]
        for model in (trainer.student.model, *averages):
            found = not_zero(model, self._kept)
            if found:
                raise TicketSetError(f"weight ticket: {found} weights under the mask are not zero; nothing is saved")
        return {}

    def at_end(self, trainer: "Trainer", results: "Mapping[str, Figures]", answers: Tensor) -> None:
        count = trainer.subnetwork.counts(trainer.student.model)
        log.info(
            f"sparsity {1 - count['kept'] / count['prunable']:.4f} ({count['kept']} of {count['prunable']} kept);"
            f" weights under the mask that are not zero: {count['nonzero_under_mask']}"
        )
