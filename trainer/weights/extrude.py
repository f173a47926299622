"""Regularization as transformation (RST): a random part of the weights is pressed to zero while all of them train."""

from typing import TYPE_CHECKING

import torch

from trainer.hooks import Hook
from trainer.weights.scores import Kept
from trainer.weights.subnetwork import Subnetwork, empty

if TYPE_CHECKING:
    from trainer.trainer import Trainer


def factor(update: int, updates: int, power: float) -> float:
    """By which weights are multiplied after an update, counted from 0: a(t + 1) / a(t) with a(t) = (1 - t / T) ** p."""
    return float(((updates - update - 1) / (updates - update)) ** power)


class Extrude(Hook):
    """Weights that are not kept shrink by a factor of the update's number, exactly to +0.0 after the last one.

    Bai et al. (Dual Lottery Ticket Hypothesis, ICLR 2022) add lambda * w to the gradient, with SGD. Under AdamW's decoupled
    decay that form does nothing (the balance of lambda * w and Adam's step lies above the weights of a ViT), and under Adam
    it is abrupt. This one depends on no optimizer, loss scale or state, so that going on is exact, and what is removed at
    the end changes no logit. docs/WEIGHTS.md shows both. The optimizer's own decay goes on beside it.

    Args:
        kept: name -> bool, of the weights that stay.
        power: p; above 1, weights are pressed earlier.
    """

    def __init__(self, kept: Kept, power: float) -> None:
        self._kept, self._power = kept, power

    def begin(self, trainer: "Trainer") -> None:
        self._pruned = Subnetwork(self._kept).pruned(trainer.student.model)
        self._updates = trainer.recipe.optimization.epochs * trainer.steps

    @torch.no_grad()
    def after_update(self, trainer: "Trainer", update: int) -> None:
        if update == self._updates - 1:
            empty(self._pruned)
            return
        r = factor(update, self._updates, self._power)
        for weight, where in self._pruned:
            weight.copy_(torch.where(where, weight * r, weight))
