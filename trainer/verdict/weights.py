"""Groups with weight tickets -> what they say about LTH, DLTH and LOTUS, each with the controls that it needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from trainer.verdict.claim import Difference, Judge
from trainer.verdict.groups import Group
from trainer.verdict.runs import DENSE, Weights
from trainer.verdict.statistics import LEVEL, Estimate, Outcome, decide

EQUAL = 0.02  # how far updates of two groups may be apart and count as as many, relative


@dataclass(frozen=True)
class Part:
    """One condition of a claim: a difference that must be above a bound."""

    difference: Difference
    bound: float

    @property
    def outcome(self) -> Outcome:
        """Of this part alone."""
        return decide([(self.difference.estimate, self.bound)])


@dataclass(frozen=True)
class Square:
    """LOTUS's 2 x 2: all patches or tickets, dense or with the mask; None where there are no runs.

    Attributes:
        interaction: both - data only - weights only + neither; above 0: together they cost less than what each costs alone.
    """

    neither: Group | None
    weights: Group | None
    data: Group | None
    both: Group
    interaction: Estimate | None


@dataclass
class WeightClaim:
    """The verdict on one group of winning weight tickets; its differences are added one by one.

    Attributes:
        name: which claim it is.
        winning: the group; its data arm, K, method and sparsity are the claim's.
        margin: points.
        level: of all its intervals.
        parts: the conditions whose runs were found.
        rows: differences beside them that decide nothing.
        missing: the conditions without runs.
        room: random mask - dense; None where one of them is missing.
        square: of LOTUS.
    """

    judge: Judge
    name: Literal["LTH", "DLTH", "LOTUS"]
    winning: Group
    margin: float
    level: float
    parts: list[Part] = field(default_factory=list)
    rows: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    room: Difference | None = None
    square: Square | None = None

    @property
    def weights(self) -> Weights:
        """The winning group's."""
        return weights_of(self.winning)

    @property
    def outcome(self) -> Outcome | Literal["no room"]:
        """Of all parts; no room: a random mask is as good as dense, so that nothing at this sparsity can show more."""
        if self.room is not None and decide([(self.room.estimate, -self.margin)]) == "holds":
            return "no room"
        found = decide([(part.difference.estimate, part.bound) for part in self.parts])
        return "open" if found == "holds" and self.missing else found

    def has(self, *kinds: str) -> bool:
        """Whether one of these conditions has runs."""
        return any(part.difference.kind in kinds for part in self.parts)

    def ask(self, kind: str, other: Group | None, bound: float, missing: str) -> None:
        """Add a condition on winning - other, or why it cannot be told."""
        if other is None:
            self.missing.append(missing)
        else:
            self.parts.append(Part(self._difference(kind, self.winning, other), bound))

    def show(self, kind: str, first: Group | None, second: Group | None) -> Difference | None:
        """Add a row, if its runs are there."""
        if first is None or second is None:
            return None
        self.rows.append(self._difference(kind, first, second))
        return self.rows[-1]

    def _difference(self, kind: str, first: Group, second: Group) -> Difference:
        """Each tested as it is trained."""
        return self.judge.difference(kind, (first, first.own), (second, second.own), level=self.level)


def weight_claims(judge: Judge, margin: float) -> list[WeightClaim]:
    """The claims that a model's groups allow, at a level that takes into account how many sparsities are judged.

    Bonferroni: with m of them, each interval is one of 1 - (1 - LEVEL) / m.
    """
    claims = _claims(judge, margin, LEVEL)
    judged = sparsities(claims)
    return claims if len(judged) < 2 else _claims(judge, margin, 1 - (1 - LEVEL) / len(judged))


def sparsities(claims: Sequence[WeightClaim]) -> list[float]:
    """At which anything is compared."""
    return sorted({claim.weights.sparsity for claim in claims if claim.parts})


def _claims(judge: Judge, margin: float, level: float) -> list[WeightClaim]:
    winning = [group for group in judge.ticketed if weights_of(group).arm == "winning"]
    rst = [group for group in winning if weights_of(group).method == "rst"]
    lth = [_lth(judge, group, margin, level) for group in winning if group not in rst]
    dlth = [_dlth(judge, group, margin, level) for group in rst]
    lotus = [_lotus(judge, group, margin, level) for group in winning if group.arm == "winning"]
    return [
        *(_controlled(lth, "winning - reinit", "winning - shuffled") or _sparsest(lth)),
        *(_controlled(dlth, "rst - imp", "rst - random mask of as many updates") or _sparsest(dlth)),
        *_controlled(lotus, "both - tickets with a random mask", "both - random patches with the mask"),
    ]


def _controlled(claims: Sequence[WeightClaim], *kinds: str) -> list[WeightClaim]:
    """Those with runs for one of the conditions: IMP trains many levels, and most are rows of a table alone."""
    return [claim for claim in claims if claim.has(*kinds)]


def _sparsest(claims: Sequence[WeightClaim]) -> list[WeightClaim]:
    """One, to say what is missing."""
    return sorted(claims, key=lambda claim: -claim.weights.sparsity)[:1]


def _lth(judge: Judge, winning: Group, margin: float, level: float) -> WeightClaim:
    """winning ~ dense, and better than the same mask on other weights and than the same densities at other places."""
    claim = WeightClaim(judge, "LTH", winning, margin, level)
    peers = _Peers(judge, winning)
    dense, random = peers.dense(), peers.random()
    claim.ask("winning - dense", dense, -margin, peers.none("dense", peers.unmasked))
    for arm in ("reinit", "shuffled"):
        controls = peers.having(replace(claim.weights, arm=arm))
        claim.ask(f"winning - {arm}", peers.alike(controls), 0, peers.none(arm, controls))
    claim.show("winning - random mask", winning, random)
    claim.room = claim.show("random mask - dense", random, dense)
    longer = _as_many(peers.unmasked, winning)
    claim.show("winning - dense of as many updates", winning, longer if longer is not dense else None)
    return claim


def _dlth(judge: Judge, rst: Group, margin: float, level: float) -> WeightClaim:
    """RST's ticket ~ IMP's, and better than the random mask that it began with after as many updates."""
    claim = WeightClaim(judge, "DLTH", rst, margin, level)
    peers = _Peers(judge, rst)
    imp = [group for group in peers.groups if _is_imp(group.weights, claim.weights.sparsity)]
    claim.ask("rst - imp", peers.alike(imp), -margin, peers.none("winning tickets of imp", imp))
    others = ", ".join(sorted({_count(group.updates) for group in peers.masked}))
    missing = f"no runs of a random mask of as many updates, {_count(rst.updates)}"
    missing += f" (only of {others})" if others else ""
    claim.ask("rst - random mask of as many updates", _as_many(peers.masked, rst), 0, missing)
    claim.show("rst - dense of as many updates", rst, _as_many(peers.unmasked, rst))
    return claim


def _lotus(judge: Judge, both: Group, margin: float, level: float) -> WeightClaim:
    """Tickets of both kinds ~ neither, and better than with one of them replaced by a random one."""
    claim = WeightClaim(judge, "LOTUS", both, margin, level)
    tickets, full, patches = (_Peers(judge, both, arm) for arm in ("winning", "full", "random"))
    neither, data, random = full.dense(), tickets.dense(), tickets.random()
    masked = patches.having(claim.weights)
    claim.ask("both - dense on all patches", neither, -margin, full.none("dense on all patches", full.unmasked))
    claim.ask(
        "both - tickets with a random mask", random, 0, tickets.none("tickets with a random mask", tickets.masked)
    )
    what = "random patches with the mask"
    claim.ask(f"both - {what}", patches.alike(masked), 0, patches.none(what, masked))
    weights = full.alike(full.having(claim.weights))
    claim.show("both - data only", both, data)
    claim.show("both - weights only", both, weights)
    claim.room = claim.show("tickets: random mask - dense", random, data)
    interaction = None
    if neither and data and weights:
        plus, minus = ([(group, group.own) for group in side] for side in ((both, neither), (data, weights)))
        interaction = judge.contrast(plus, minus, level=level)
    claim.square = Square(neither, weights, data, both, interaction)
    return claim


class _Peers:
    """Groups that differ from one group in weights and epochs alone, or in the data arm too.

    Attributes:
        unmasked: dense: plain runs, then those of a weight ticket's dense start.
        masked: with a random mask of the same sparsity.
    """

    def __init__(self, judge: Judge, group: Group, arm: str | None = None) -> None:
        self.group, arm = group, arm or group.arm
        # Full's K is N, but for models that pack their tickets; it has no set.
        tokens = (group.tokens, judge.patches) if arm == "full" else (group.tokens,)
        set_id = None if arm == "full" else group.set_id
        every = [*judge.groups, *judge.ticketed]
        same = [g for g in every if g.arm == arm and g.tokens in tokens and g.set_id == set_id]
        self.groups = [g for g in same if g.but_epochs == group.but_epochs]
        weights = weights_of(group)
        plain = [g for g in self.groups if g.weights is None]
        # A start that was given is no plain run's; a rewound one is of its plan alone, and plain runs have seen as many epochs.
        # RST is held against masks on the first weights.
        if weights.start in ("first", "transformed"):
            self.unmasked = [*plain, *self.having(DENSE)]
            self.masked = self.having(Weights("random", "random", weights.sparsity, None))
        else:
            dense = self.having(replace(weights, arm="dense", sparsity=0.0))
            self.unmasked = dense if weights.start == "given" else [*plain, *dense]
            self.masked = self.having(replace(weights, arm="random"))

    def having(self, weights: Weights) -> list[Group]:
        """Those of some weights."""
        return [group for group in self.groups if group.weights == weights]

    def alike(self, candidates: Sequence[Group]) -> Group | None:
        """The only one of as many epochs."""
        found = [group for group in candidates if group.differs == self.group.differs]
        return found[0] if len(found) == 1 else None

    def dense(self) -> Group | None:
        """Plain runs of as many epochs, else those of a ticket's dense start."""
        return next((group for group in self.unmasked if group.differs == self.group.differs), None)

    def random(self) -> Group | None:
        """The random mask of as many epochs."""
        return self.alike(self.masked)

    def none(self, what: str, candidates: Sequence[Group]) -> str:
        """Why there is none."""
        if len([group for group in candidates if group.differs == self.group.differs]) > 1:
            return f"several groups of {what}"
        return f"no runs of {what}" + (" of as many epochs" if candidates else "")


def weights_of(group: Group) -> Weights:
    """Of a group that has a weight ticket."""
    assert group.weights is not None
    return group.weights


def _is_imp(weights: Weights | None, sparsity: float) -> bool:
    """IMP's ticket, of any plan."""
    return weights is not None and (weights.arm, weights.method, weights.sparsity) == ("winning", "imp", sparsity)


def _as_many(groups: Sequence[Group], like: Group) -> Group | None:
    """The one that has had as many updates in all as another group, those of mining included."""
    total = like.updates or 0.0
    near = [(abs(group.updates - total), i) for i, group in enumerate(groups) if group.updates is not None]
    return groups[min(near)[1]] if near and min(near)[0] <= EQUAL * total else None


def _count(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.0f}"
