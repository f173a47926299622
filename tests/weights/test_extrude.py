"""RST: what is pressed out is exactly zero at the end, its removal changes no logit, and going on is exact."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.reader import TicketSet
from trainer.hooks import Hook
from trainer.options import Recipe
from trainer.output import checkpoint
from trainer.trainer import Trainer
from trainer.weights.extrude import Extrude, factor
from trainer.weights.scores import drawn
from trainer.weights.subnetwork import Subnetwork, not_zero, prunable
from training import same

SMALL = {"model_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2}, "batch_size": 4, "repeats": 2, "workers": 0}
CONSTANT = {**SMALL, "epochs": 3, "warmup_epochs": 0, "sched": "constant", "lr": 1e-3, "model_ema": False}


@pytest.fixture(scope="module")
def opened(center_set: Path) -> TicketSet:
    return TicketSet.open(str(center_set))


def trainer(opened: TicketSet, *hooks: Hook, **settings: Any) -> Trainer:
    return Trainer(opened, Recipe.of({"shards": opened.url, **CONSTANT, **settings}), hooks)


@pytest.fixture(scope="module")
def kept(opened: TicketSet) -> dict[str, np.ndarray]:
    return drawn(prunable(trainer(opened).student.model), 2500, "test")


def pressed(found: Trainer, kept: dict[str, np.ndarray]) -> torch.Tensor:
    weights = dict(found.student.model.named_parameters())
    return torch.cat([weights[name].detach()[torch.from_numpy(~mask)] for name, mask in kept.items()])


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_factors_multiply_to_the_ramp(power):
    a = 1.0
    for t in range(9):
        a *= factor(t, 10, power)
        assert a == pytest.approx((1 - (t + 1) / 10) ** power)
    assert factor(9, 10, power) == 0 and factor(0, 1, power) == 0  # of one update: the hard mask at once


def test_what_is_pressed_out_is_zero_and_removing_it_changes_no_logit(opened, kept):
    found = trainer(opened, Extrude(kept, 1.0))
    sizes = []

    class Watch(Hook):
        def after_update(self, trainer: Trainer, update: int) -> None:
            sizes.append(float(pressed(trainer, kept).norm()))

    first = {name: p.detach().clone() for name, p in found.student.model.named_parameters()}
    found.hooks.append(Watch())
    found.fit()
    assert not_zero(found.student.model, kept) == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(sizes)) and sizes[0] > 0
    assert not any(torch.equal(p[m], first[n][m]) for n, p in found.student.model.named_parameters() if n in kept and (m := torch.from_numpy(kept[n])).any())  # fmt: skip
    found.student.eval()
    patches, places = torch.rand(2, 16, 3 * 16 * 16), torch.arange(16).expand(2, -1)
    before = found.student(patches, places)
    Subnetwork(kept).lay_on(found.student.model)
    assert torch.equal(found.student(patches, places), before)


def test_in_the_middle_removal_changes_logits(opened, kept):
    """The negative control of the test above."""
    found = trainer(opened, _Until(kept, 1.0))
    found.fit()
    found.student.eval()
    patches, places = torch.rand(2, 16, 3 * 16 * 16), torch.arange(16).expand(2, -1)
    before = found.student(patches, places)
    Subnetwork(kept).lay_on(found.student.model)
    assert not torch.equal(found.student(patches, places), before)


class _Until(Extrude):
    """Of a transformation twice as long as the run."""

    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self._updates *= 2


@pytest.mark.parametrize("update", [1, 5, 7])
def test_stopped_and_restored_it_gives_the_same_weights(opened, kept, update, tmp_path):
    whole = trainer(opened, Extrude(kept, 2.0))
    whole.fit()

    class Stop(Hook):
        def after_update(self, trainer: Trainer, number: int) -> None:
            trainer._stop = lambda: 15 if number == update else 0

        def save(self, trainer: Trainer) -> None:
            checkpoint.save(tmp_path / checkpoint.RECOVERY, trainer, {"model": "deit_tiny"}, None)

    from trainer.engine import Stopped

    with pytest.raises(Stopped):
        trainer(opened, Extrude(kept, 2.0), Stop()).fit()
    resumed = trainer(opened, Extrude(kept, 2.0))
    checkpoint.restore(tmp_path / checkpoint.RECOVERY, resumed)
    assert resumed.updates == update + 1
    resumed.fit()
    assert same(resumed.student.model.state_dict(), whole.student.model.state_dict())


class _Published(Hook):
    """lambda * w, with lambda from 0 to 1: as decoupled decay beside AdamW's own, or in the gradient as with SGD's."""

    def __init__(self, kept: dict[str, np.ndarray], decoupled: bool) -> None:
        self._kept, self._decoupled = kept, decoupled

    def begin(self, trainer: Trainer) -> None:
        self._pruned = Subnetwork(self._kept).pruned(trainer.student.model)
        self._updates = trainer.recipe.optimization.epochs * trainer.steps

    def before_update(self, trainer: Trainer, update: int) -> None:
        if not self._decoupled:
            for weight, where in self._pruned:
                weight.grad += torch.where(where, update / self._updates * weight.detach(), 0)

    @torch.no_grad()
    def after_update(self, trainer: Trainer, update: int) -> None:
        if self._decoupled:
            lr = trainer.state.optimizer.param_groups[0]["lr"]
            for weight, where in self._pruned:
                weight.mul_(torch.where(where, 1 - lr * update / self._updates, 1.0))


@pytest.mark.parametrize(("optimizer", "decoupled", "gone"), [("adamw", True, False), ("sgd", False, True)])
def test_the_published_form_does_nothing_under_decoupled_decay(opened, kept, optimizer, decoupled, gone):
    """With SGD and its large steps it presses weights out as published; decoupled, as AdamW takes decay, it does not."""
    lr = {"adamw": 1e-3, "sgd": 0.1}[optimizer]
    settings = {
        "opt": optimizer,
        "lr": lr,
        "epochs": 20,
        "weight_decay": 0.0,
        "opt_kwargs": {"nesterov": False} if gone else {},
    }
    found = trainer(opened, _Published(kept, decoupled), **settings)
    first = pressed(found, kept).norm()
    found.fit()
    left = float(pressed(found, kept).norm() / first)
    assert left < 0.2 if gone else left > 0.8, left
