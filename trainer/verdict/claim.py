"""Groups of runs -> accuracies and differences with intervals, and what they say about a ~ c > b."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import TicketSetError
from trainer.options import PROTOCOLS
from trainer.verdict.groups import Group
from trainer.verdict.runs import Run
from trainer.verdict.statistics import LEVEL, Estimate, Outcome, Spread, bootstrap, contrast, decide, mean, pooled

OWN = "own"  # each arm in the protocol it is trained for
SEVERAL = "several groups of {}, none with the arguments of winning (a)"
Side = tuple[Group, str]  # and the protocol it is tested under


@dataclass(frozen=True)
class Difference:
    """First minus second, each under a protocol.

    Attributes:
        kind: "a - c"; "a - b"; "a - rival" (random patches with a dense test, PatchDropout); "rival - c"; "whole - c"
            (another arm tested on all patches). Of weight tickets: see `trainer.verdict.weights`.
    """

    kind: str
    first: Group
    first_protocol: str
    second: Group
    second_protocol: str
    estimate: Estimate


@dataclass(frozen=True)
class Claim:
    """The verdict on one ticket set, K and (with `allow_diff`) set of arguments.

    Attributes:
        a: the winning group, or None.
        ac, ab, rival: the differences; None where runs are missing. The rival has no part in the outcome.
        missing: why there is no a - b or a - c; empty where both are there.
    """

    tokens: int | None
    set_id: str | None
    a: Group | None
    ac: Difference | None
    ab: Difference | None
    rival: Difference | None
    missing: str
    outcome: Outcome

    @property
    def differences(self) -> list[Difference]:
        """Those that were found: a - c, a - b, rival - c."""
        return [found for found in (self.ac, self.ab, self.rival) if found is not None]


class Judge:
    """The groups of one model, and how certain their figures are.

    Attributes:
        groups: without weight tickets, which a ~ c > b is about.
        ticketed: with weight tickets.
        resampled: every group has one seed, so that intervals come from resampling images.
        spreads: {protocol or OWN: Spread}, pooled over all groups; not used where `resampled`.
        full: the groups that c may be.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = [group for group in groups if group.weights is None]
        self.ticketed = [group for group in groups if group.weights is not None]
        self.model, self.patches = groups[0].model, groups[0].patches
        self.resampled = all(len(group.runs) == 1 for group in groups)
        self.full = [group for group in self.groups if group.arm == "full"]
        samples = {p: [g.top1(p) for g in groups if p in g.protocols] for p in PROTOCOLS}
        samples[OWN] = [group.top1(group.own) for group in groups]
        self.spreads: dict[str, Spread] = {name: pooled(found) for name, found in samples.items()}

    def accuracy(self, group: Group, protocol: str) -> Estimate | None:
        """Mean top-1 under a protocol, or the arm's OWN; None where it does not apply."""
        name = group.own if protocol == OWN else protocol
        if name not in group.protocols:
            return None
        if self.resampled:
            return bootstrap(group.runs[0].hits[name])
        return mean(group.top1(name), self.spreads[protocol])

    def reference(self, group: Group) -> Group | None:
        """The full runs (c) that a group is held against; of a model that packs its tickets, those at its own K."""
        return self._choose([c for c in self.full if c.tokens in (group.tokens, self.patches)], group)

    def share(self, group: Group) -> float:
        """Training cost of a group against full's, in multiply-accumulates; without full runs, against what they would cost."""
        c = self.reference(group)
        epochs = group.runs[0].args["epochs"]
        whole = group.cost("dense_gmacs") * (c.runs[0].args["epochs"] if c else epochs)
        return group.cost("train_gmacs") * epochs / whole

    def differences(self) -> list[Difference]:
        """Every arm on whole images against c."""
        return [
            self.difference("rival - c" if group.arm == "random" else "whole - c", (group, "all"), (c, "all"), "all")
            for group in self.groups
            for c in [self.reference(group)]
            if group.arm != "full" and c is not None
        ]

    def claims(self, margin: float) -> list[Claim]:
        """One for every group of winning runs, and for every K that only random runs have; none beside weight tickets alone."""
        winning = [group for group in self.groups if group.arm == "winning"]
        random = [group for group in self.groups if group.arm == "random"]
        covered = {_cell(group) for group in winning}
        claims = [self._claim(a, [b for b in random if _cell(b) == _cell(a)], margin) for a in winning]
        for b in random:
            if _cell(b) not in covered:
                covered.add(_cell(b))
                claims.append(_unheard(f"no runs of winning (a) at K={b.tokens}", b))
        return claims or ([] if self.ticketed else [_unheard("no runs of winning (a)")])

    def _claim(self, a: Group, random: Sequence[Group], margin: float) -> Claim:
        b, c = self._choose(random, a), self.reference(a)
        several = "no runs of {} with the arguments of winning (a)" if self.ticketed else SEVERAL
        missing = []
        if b is None:
            name = f"random (b) at K={a.tokens}"
            missing.append(several.format(name) if random else f"no runs of {name}")
        if c is None:
            missing.append(several.format("full (c)") if self.full else "no runs of full (c)")
        ab = None if b is None else self.difference("a - b", (a, "tickets"), (b, "tickets"))
        ac = None if c is None else self.difference("a - c", (a, "tickets"), (c, "all"))
        rival = None if b is None else self.difference("a - rival", (a, "tickets"), (b, "all"))
        outcome = "open" if ab is None or ac is None else decide([(ac.estimate, -margin), (ab.estimate, 0)])
        return Claim(a.tokens, a.set_id, a, ac, ab, rival, " and ".join(missing), outcome)

    def difference(self, kind: str, x: Side, y: Side, spread: str = OWN, level: float = LEVEL) -> Difference:
        """x minus y, with an interval of `level`."""
        return Difference(kind, *x, *y, self.contrast([x], [y], spread, level))

    def contrast(
        self, plus: Sequence[Side], minus: Sequence[Side], spread: str = OWN, level: float = LEVEL
    ) -> Estimate:
        """Some groups minus others, each tested under a protocol."""
        if self.resampled:
            sides = [[(group.runs[0], protocol) for group, protocol in side] for side in (plus, minus)]
            return bootstrap(paired(*sides), level=level)
        added, taken = ([group.top1(protocol) for group, protocol in side] for side in (plus, minus))
        return contrast(added, taken, self.spreads[spread], level)

    def _choose(self, candidates: Sequence[Group], a: Group) -> Group | None:
        """The one of the same arguments as a, else the only one; beside weight tickets, where epochs differ unasked, of as many."""
        same = [group for group in candidates if group.differs == a.differs]
        if self.ticketed:
            epochs = a.runs[0].args["epochs"]
            candidates = [group for group in candidates if group.runs[0].args["epochs"] == epochs]
        return same[0] if same else candidates[0] if len(candidates) == 1 else None

    def notes(self) -> list[str]:
        """What a reader should know of these figures."""
        groups = [*self.groups, *self.ticketed]
        single = list(dict.fromkeys(f"{g.name} K={g.tokens}" for g in groups if len(g.runs) == 1))
        notes = []
        if single and not self.resampled:
            notes.append(
                f"one seed only: {', '.join(single)}; the interval takes the spread of the other groups' seeds"
            )
        if not self.resampled and self.spreads[OWN].df and self.spreads[OWN].sd == 0:
            notes.append(
                "all seeds of a group have the same accuracy, so the intervals have no width: copies of one run?"
            )
        for group in self.full:
            if "tickets" not in group.protocols:
                notes.append("full on tickets is n/a: its runs come from several ticket sets or K")
        return notes


def judges_of(groups: Sequence[Group]) -> list[Judge]:
    """One for each model and number of patches."""
    by_model: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        by_model.setdefault((group.model, group.patches), []).append(group)
    return [Judge(members) for members in by_model.values()]


def key_notes(runs: Sequence[Run]) -> list[str]:
    """Warnings where runs were validated on different images."""
    first = runs[0]
    other = [run for run in runs if not run.keys.equals(first.keys)]
    if not other:
        return []
    return [
        "WARNING: not all runs were validated on the same images, so differences are not of arms alone:"
        + f" {len(other)} of {len(runs)} differ from {first.folder} ({len(first.keys)} images),"
        + f" first {other[0].folder} ({len(other[0].keys)})"
    ]


def paired(plus: Sequence[tuple[Run, str]], minus: Sequence[tuple[Run, str]]) -> np.ndarray:
    """Hits of some runs minus hits of others, each under a protocol, on the images that all have: int8 [images].

    Raises:
        TicketSetError: they have none in common.
    """
    signed = [(run, protocol, sign) for sign, side in ((1, plus), (-1, minus)) for run, protocol in side]
    first, last = signed[0][0], signed[-1][0]
    runs = [run for run, _, _ in signed]
    places = [None if run.keys.equals(last.keys) else pc.index_in(last.keys, run.keys) for run in runs]
    common = np.ones(len(last.keys), bool)
    for place in places:
        if place is not None:
            common &= place.is_valid().to_numpy(zero_copy_only=False)
    if not common.any():
        raise TicketSetError(f"{first.folder} and {last.folder}: validated on no image in common; these do not compare")
    total = np.zeros(int(common.sum()), np.int8)
    for (run, protocol, sign), place in zip(signed, places, strict=True):
        chosen = common if place is None else place.filter(pa.array(common)).to_numpy()
        total += sign * run.hits[protocol][chosen].astype(np.int8)
    return total


def _cell(group: Group) -> tuple[str | None, int]:
    return group.set_id, group.tokens


def _unheard(missing: str, b: Group | None = None) -> Claim:
    return Claim(b.tokens if b else None, b.set_id if b else None, None, None, None, None, missing, "open")
