"""One datalth-weights mine command: trainings, one after the other, and the masks that come of them.

    imp, oneshot, own scores   level 0 is dense; a level's masks come of the training before; all start from the same weights
    rst                        a level's training presses another random part to zero; its last weights are the start
    soup                       a level's masks are voted for by short trainings that start alike
    random                     no training

Every training is an ordinary run of datalth-train, with the hooks that keep masks.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from shards.flags import function_of
from shards.reader import TicketSet
from trainer.hooks import Hook
from trainer.options import Boards, Recipe
from trainer.output.claim import Claim
from trainer.ranks import Rank
from trainer.trainer import Trainer
from trainer.weights.extrude import Extrude
from trainer.weights.options import METHODS, Mining
from trainer.weights.scores import Kept, drawn, keep_best, votes
from trainer.weights.subnetwork import Subnetwork, named_seed
from trainer.weights.work import Results, State, Stopped, Work

log = logging.getLogger("datalth")
Found = tuple[list[Results], list[int]]  # by level: top-1, and updates before its masks were known


def mine(mining: Mining, recipe: Recipe, boards: Boards, opened: TicketSet, rank: Rank) -> int:
    """Mine a weight ticket, or go on with it; returns the exit code.

    Raises:
        TicketSetError: the folder holds another one, or whatever a person can mend of a training.
    """
    methods = {"rst": by_transformation, "soup": by_votes, "random": by_chance}
    with contextlib.closing(Claim()) as claim:
        work = Work(mining, recipe, boards, opened, rank)
        if not work.begin(claim):
            log.info(f"{work.path}: complete; datalth-weights info {work.path} shows it")
            return 0
        started = time.monotonic()
        try:
            results, updates = methods.get(mining.method, by_scores)(work)
        except Stopped as stopped:
            return int(stopped.args[0])
        work.finish(results, updates, time.monotonic() - started)
        return 0


def magnitude(trainer: Trainer, start: State) -> Mapping[str, Tensor]:
    """Scores of weights: how far from zero training has left them. Source: Han et al. (2015); Frankle and Carbin (2019).

    Args:
        trainer: of the level, trained.
        start: what it started from.
    """
    return {name: weight.detach().abs() for name, weight in trainer.student.model.named_parameters()}


def by_scores(work: Work) -> Found:
    """Train, remove the weights of the lowest scores, begin again from the same weights without them, and so on.

    Source: Frankle and Carbin, The Lottery Ticket Hypothesis (2019); with rewinding Frankle et al. (2020).
    """
    plan = work.plan
    score = magnitude if plan.method in METHODS else function_of(plan.method, "method")
    trains = not getattr(score, "at_start", False)
    recipe, subnetwork, start = work.recipe, None, work.first
    kept: Kept = {}
    hooks: list[Hook] = [_Rewinding(work)] if plan.rewind_epochs else []
    results: list[Results] = []
    updates, spent = [0], 0
    for level in range(plan.levels + 1):
        if level:
            name = f"level-{level - 1:02d}" if trains else None
            scores = partial(work.scores, score, start, name, recipe, subnetwork)
            kept = work.masks(level, partial(_elect, work, level, kept, scores))
            updates.append(spent)
            recipe, subnetwork = work.level(level, kept, start, spent)
        if trains:
            final = work.train(f"level-{level:02d}", recipe, subnetwork, [] if level else hooks)
            results.append({name: figures["top1"] for name, figures in final["results"].items()})
            spent += final["cost"]["updates"]
        else:
            results.append(None)
        if not level:
            start = work.start(None if plan.rewind_epochs else work.first)  # rewinding: level 0 has written others
    return results, updates


def _elect(work: Work, level: int, before: Kept, scores: Callable[[], dict[str, np.ndarray]]) -> Kept:
    return keep_best(scores(), work.count(level), before or None, work.plan.scope)


class _Rewinding(Hook):
    """Writes the weights down as an epoch begins: those that all levels start from."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def before_epoch(self, trainer: Trainer) -> None:
        at = (trainer.state.epoch, trainer.state.step)
        if at == (self._work.plan.rewind_epochs, 0) and trainer.rank.number == 0:
            self._work.write_start(trainer.student.model.state_dict())


def by_transformation(work: Work) -> Found:
    """RST: draw weights that shall go, press them to zero while all learn, draw more, and so on.

    Source: Bai et al., Dual Lottery Ticket Hypothesis (ICLR 2022); what differs is told at `Extrude`.
    """
    plan, start = work.plan, work.first
    kept: Kept = {}
    recipe = work.short(work.mining.transform_epochs or work.recipe.optimization.epochs, plan.seed)
    for level in range(1, plan.levels + 1):
        before, name = kept, f"level-{level:02d}"
        kept = _draw(work, level, before)
        work.train(name, recipe, Subnetwork(before, start, said=work.own), [Extrude(kept, work.mining.power)])
        start = work.trained(name)
    work.start(start)
    each = recipe.optimization.epochs * work.steps
    return [None] * (plan.levels + 1), [level * each for level in range(plan.levels + 1)]


def by_votes(work: Work) -> Found:
    """Soup: short trainings from one start, in other orders, each name the weights that they would keep.

    Source: Jaiswal et al., Instant Soup (ICML 2023). There a weight goes if all name it, and the rest in one cut; here the
    weights with the most votes stay, as many as asked for.
    """
    plan, mining, start = work.plan, work.mining, work.start(work.first)
    kept: Kept = {}
    for level in range(1, plan.levels + 1):
        names = [f"level-{level:02d}-{number}" for number in range(mining.soup_runs)]
        for name in names:
            recipe = work.short(mining.soup_epochs, named_seed("soup", plan.seed, name))
            work.train(name, recipe, Subnetwork(kept, start, said=work.own))
        kept = work.masks(level, partial(_elect, work, level, kept, partial(_votes, work, level, kept, names)))
    each = mining.soup_runs * mining.soup_epochs * work.steps
    return [None] * (plan.levels + 1), [level * each for level in range(plan.levels + 1)]


def _votes(work: Work, level: int, before: Kept, names: Sequence[str]) -> dict[str, np.ndarray]:
    trained = [work.magnitudes(name) for name in names]
    elected = [keep_best(found, work.count(level), before or None, work.plan.scope) for found in trained]
    return votes(elected, trained)


def by_chance(work: Work) -> Found:
    """A random mask at the first weights: the control of all others, and what RST would have transformed."""
    _draw(work, 1, {})
    work.start(work.first)
    return [None, None], [0, 0]


def _draw(work: Work, level: int, before: Kept) -> Kept:
    plan = work.plan
    return work.masks(
        level, lambda: drawn(plan.prunable, work.count(level), "random", plan.seed, before=before or None)
    )
