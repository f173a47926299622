"""Runs that may be compared, and those that differ in nothing but the seed as one group."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from shards.console import printable
from shards.errors import TicketSetError
from trainer.options import ARMS, FREE_TO_CHANGE, PROTOCOLS, WEIGHT_DERIVED
from trainer.verdict.runs import Run, Weights

ORDER = (*(arm for arm in ARMS if arm != "full"), "resized")  # of a table, below full
# What tells arms apart, or names the set; base_set_id is compared on its own.
ARM_FIELDS = frozenset(
    ["tickets", "tokens", "resize_to_tokens", "unmask_epochs", "seed", "model"]
    + ["set_id", "set_method", "base_set_id", "resolved_tokens", "resolved_share"]
    + ["weight_ticket", "weight_level", "weight_arm", "weight_start", *WEIGHT_DERIVED]
)
PLAN = "weight_group_id"  # what `allow_diff` may name of these: tickets of several plans
# A resumed run may say these otherwise because its weights come from the checkpoint; here they are another experiment.
START_FIELDS = frozenset(["initial_checkpoint", "pretrained"])
FREE = (FREE_TO_CHANGE - START_FIELDS) | ARM_FIELDS


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        arm: "winning", "random +5 unmasked", "winning auto" (K varies), ...
        tokens: K, trained on and tested on; its mean at most where it varies; N for full.
        patches: N, of the un-resized view.
        set_id: None for full and resized, unmasked or not.
        weights: what a weight ticket makes of it; None without one.
        differs: ((argument, value), ...) of those that --allow-diff names; beside weight tickets also of `epochs`.
        runs: by seed.
    """

    arm: str
    tokens: int
    patches: int
    model: str
    set_id: str | None
    weights: Weights | None
    differs: tuple[tuple[str, Any], ...]
    runs: tuple[Run, ...]

    @property
    def own(self) -> str:
        """The protocol that the arm is trained for."""
        return "all" if self.arm in ("full", "resized") or self.arm.endswith(" unmasked") else "tickets"

    @property
    def data_arm(self) -> str:
        """Of `trainer.options.ARMS`, or resized: the arm but for how many patches it is fed when."""
        return self.arm.split(" ")[0]

    @property
    def name(self) -> str:
        """The arm, its weights, and what `allow_diff` lets differ."""
        weights = f"x {self.weights.name} s={self.weights.sparsity:.4g} " if self.weights else ""
        return f"{self.arm} {weights}{self.differing}".rstrip()

    @property
    def differing(self) -> str:
        """`differs` as text; may be empty."""
        return differing(self.differs)

    @property
    def but_epochs(self) -> tuple[tuple[str, Any], ...]:
        """`differs` without epochs."""
        return tuple(found for found in self.differs if found[0] != "epochs")

    @cached_property
    def protocols(self) -> tuple[str, ...]:
        """Those that all runs were tested under, on the same patches: full runs may come from several sets or K."""
        tested = {(run.args["set_id"], run.args["tokens"]) for run in self.runs}
        names = ("all",) if self.set_id is None and len(tested) > 1 else PROTOCOLS
        return tuple(name for name in names if all(name in run.top1 for run in self.runs))

    def top1(self, protocol: str) -> np.ndarray:
        """Percent, one number a run: [seeds]."""
        return np.array([run.top1[protocol] for run in self.runs])

    def cost(self, name: str) -> float:
        """A figure of `Run.cost`, mean over the runs."""
        return float(np.mean([run.cost[name] for run in self.runs]))

    @property
    def updates(self) -> float | None:
        """Of the optimizer in training and in finding the mask, mean over the runs; None where older runs do not say."""
        if any("updates" not in run.cost for run in self.runs):
            return None
        return float(np.mean([run.cost["updates"] + run.cost.get("mining_updates", 0) for run in self.runs]))

    def test_gmacs(self, protocol: str) -> float | None:
        """GMACs of one image's forward under a protocol, or None where it was not tested so."""
        return self.runs[0].cost["test_gmacs"].get(protocol) if protocol in self.protocols else None


def check_comparable(runs: Sequence[Run], allowed: Sequence[str]) -> None:
    """Refuse runs that differ in more than arms do.

    Raises:
        TicketSetError: other base images, or other arguments; names the arguments and two folders' values.
    """
    comparable = {name for run in runs for name in run.args} - FREE
    known = comparable | ({PLAN} if _ticketed(runs) else set())
    unknown = [name for name in allowed if name not in known]
    if unknown:
        raise TicketSetError(f"`allow_diff` {unknown[0]}: expected one of {', '.join(sorted(known))}")
    first = runs[0]
    for run in runs:
        if run.args["base_set_id"] != first.args["base_set_id"]:
            raise TicketSetError(
                f"{run.folder}: trained on other images (base_set_id {run.args['base_set_id'][:16]})"
                f" than {first.folder} ({first.args['base_set_id'][:16]}); these do not compare"
            )
    differing = {}
    for name in sorted(comparable - set(_telling(runs, allowed))):
        # A weight ticket holds the weights to start from.
        among = [run for run in runs if name not in START_FIELDS or run.weights is None] or [first]
        one = among[0]
        other = next((run for run in among if run.args.get(name) != one.args.get(name)), None)
        if other is not None:
            differing[name] = (
                f"{name}: {_text(one.args.get(name))} in {one.folder}, {_text(other.args.get(name))} in {other.folder}"
            )
    if differing:
        flags = " ".join(f"`allow_diff` {name}" for name in differing)
        raise TicketSetError(f"runs of different arguments: {'; '.join(differing.values())} ({flags} lets them differ)")


def group_runs(runs: Sequence[Run], allowed: Sequence[str]) -> list[Group]:
    """Groups in a table's order: by model; full, then K by K, arm by arm.

    Raises:
        TicketSetError: a group holds one seed twice, or tickets of two plans that nothing tells apart.
    """
    telling = _telling(runs, allowed)
    by_key: dict[tuple[Any, ...], dict[int, Run]] = {}
    for run in runs:
        weights = run.weights
        if weights is not None and weights.plan is not None and PLAN in allowed:
            weights = replace(weights, mark=weights.plan[:8])
        key = (
            run.arm,
            run.args["resolved_tokens"],
            run.cost["patches"],
            run.args["model"],
            run.set_id,
            weights,
            json.dumps(_differing(run, runs, telling)),
        )
        members = by_key.setdefault(key, {})
        if run.seed in members:
            why = "" if run.set_id else f" ({run.arm} runs of any ticket set and K are trained alike)"
            if weights is not None and weights.plan is None:
                why = f" ({weights.name} is the same whatever the weight ticket)"
            raise TicketSetError(
                f"{run.folder} and {members[run.seed].folder}: the same arm and seed {run.seed} twice{why}; give one of them"
            )
        members[run.seed] = run
    _check_plans(by_key)
    groups = []
    for (arm, tokens, patches, model, set_id, weights, _), members in by_key.items():
        ordered = tuple(members[seed] for seed in sorted(members))
        differs = _differing(ordered[0], runs, telling)
        groups.append(Group(arm, tokens, patches, model, set_id, weights, differs, ordered))
    return sorted(groups, key=place)


def _ticketed(runs: Sequence[Run]) -> bool:
    return any(run.weights is not None for run in runs)


def _telling(runs: Sequence[Run], allowed: Sequence[str]) -> list[str]:
    """Arguments that may differ and tell groups apart. Weight tickets need baselines of as many updates: other `epochs`."""
    more = ["epochs"] if _ticketed(runs) else []
    return [name for name in dict.fromkeys([*allowed, *more]) if name != PLAN]


def _check_plans(by_key: Mapping[tuple[Any, ...], Mapping[int, Run]]) -> None:
    """
    Raises:
        TicketSetError: weight tickets of two plans differ in nothing else; each seed has its own ticket, but of one plan.
    """
    first: dict[tuple[Any, ...], Run] = {}
    for key, members in by_key.items():
        weights = key[-2]
        if weights is None or weights.mark:
            continue
        run = next(iter(members.values()))
        other = first.setdefault((*key[:-2], replace(weights, plan=None), key[-1]), run)
        if other is not run:
            ids = " and ".join(one.args[PLAN][:8] for one in (other, run))
            raise TicketSetError(
                f"{other.folder} and {run.folder}: {weights.name} tickets of two plans, {PLAN} {ids};"
                f" give one of them, or tell them apart with `allow_diff` {PLAN}"
            )


def _differing(run: Run, runs: Sequence[Run], allowed: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """Those of the allowed arguments in which runs of the same model really differ, and this run's values."""
    peers = [other for other in runs if other.args["model"] == run.args["model"]]
    names = [name for name in allowed if any(other.args.get(name) != run.args.get(name) for other in peers)]
    return tuple((name, run.args.get(name)) for name in names)


def place(group: Group) -> tuple[Any, ...]:
    """In a table's order."""
    below = -1 if group.arm == "full" else ORDER.index(group.data_arm)
    weights = group.weights.place if group.weights else ()
    return (
        group.model,
        group.patches,
        group.arm != "full",
        -group.tokens,
        group.set_id or "~",
        below,
        weights,
        group.name,
    )


def differing(differs: Iterable[tuple[str, Any]]) -> str:
    """Arguments and values as text; may be empty."""
    return " ".join(f"{field}={_text(value)}" for field, value in differs)


def _text(value: Any) -> str:
    """One line for an argument's value."""
    return printable(value if isinstance(value, str) else json.dumps(value))[:200]
