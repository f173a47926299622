"""The verdict on weight tickets in words: tables, notes, and one plain sentence for each claim."""

import math
from collections.abc import Callable, Sequence

from shards.console import duration
from trainer.verdict.claim import OWN, Difference, Judge
from trainer.verdict.groups import Group, differing, place
from trainer.verdict.sentences import RESAMPLED, interval
from trainer.verdict.statistics import LEVEL
from trainer.verdict.tables import Table, cell
from trainer.verdict.weights import Part, WeightClaim, sparsities, weights_of

WEIGHT_READING = (
    "Weights: winning: a mask on the weights it was found for; reinit: on others; shuffled: as many a layer at other places;",
    "random mask: drawn at random; dense: none. LTH: winning ~ dense, > reinit, > shuffled. DLTH: rst ~ imp, > random mask of",
    "as many updates. LOTUS: both tickets ~ dense on all patches, > either of the two replaced by a random one.",
)
# What a part of a claim says where it is surely above its bound, surely below, or neither.
WORDS = {
    "winning - dense": (
        "as good as dense to within {margin} points",
        "more than {margin} points below dense",
        "may be more than {margin} points below dense",
    ),
    "winning - reinit": (
        "better than the same mask on other weights",
        "a good mask, any init",
        "may be a good mask for any init",
    ),
    "winning - shuffled": (
        "better than the same layer densities at other places",
        "layer densities alone explain it",
        "layer densities alone may explain it",
    ),
    "rst - imp": (
        "as good as imp's tickets to within {margin} points",
        "more than {margin} points below imp's tickets",
        "may be more than {margin} points below imp's tickets",
    ),
    "rst - random mask of as many updates": (
        "better than a random mask of as many updates",
        "a random mask of as many updates is better",
        "a random mask of as many updates may do as well",
    ),
    "both - dense on all patches": (
        "as good as dense on all patches to within {margin} points",
        "more than {margin} points below dense on all patches",
        "may be more than {margin} points below dense on all patches",
    ),
    "both - tickets with a random mask": (
        "better than the tickets with a random mask",
        "a random mask is better on the tickets",
        "a random mask may do as well on the tickets",
    ),
    "both - random patches with the mask": (
        "better than random patches with the mask",
        "random patches are better with the mask",
        "random patches may do as well with the mask",
    ),
}


def weight_sentence(claim: WeightClaim, where: str) -> str:
    """The verdict on one claim.

    Args:
        where: model, data arm, K.
    """
    where = _list(where, claim.winning.differing, claim_name(claim))
    # What decides stands first.
    parts = sorted(claim.parts, key=lambda part: ("fails", "open", "holds").index(part.outcome))
    said, missing = "; ".join(_phrase(claim, part) for part in parts), " and ".join(claim.missing)
    if claim.outcome == "no room" and claim.room is not None:
        text = (
            f"no room: random masks do as well as dense at s={_share(claim.weights.sparsity)}, {_figure(claim, claim.room)},"
            " so this sparsity can show nothing"
        )
    elif claim.outcome == "holds":
        text = f"the claim holds: {said}"
    elif claim.outcome == "fails":
        text = f"the claim fails: {said}" + (f"; {missing}" if missing else "")
    elif missing:
        text = f"cannot be told: {missing}" + (f"; {said}" if said else "")
    else:
        text = f"cannot be told from these runs: {said}"
    return f"{where}: {text}." + (f" ({RESAMPLED[0].upper()}{RESAMPLED[1:]}.)" if claim.judge.resampled else "")


def claim_name(claim: WeightClaim) -> str:
    """ "LTH of imp at s=0.9"."""
    method = " ".join(filter(None, [claim.weights.method, claim.weights.mark]))
    return f"{claim.name} of {method} at s={_share(claim.weights.sparsity)}"


def _phrase(claim: WeightClaim, part: Part) -> str:
    words = WORDS[part.difference.kind][("holds", "fails", "open").index(part.outcome)]
    return f"{words.format(margin=claim.margin)}, {_figure(claim, part.difference)}"


def _figure(claim: WeightClaim, found: Difference) -> str:
    return f"{found.kind} = {found.estimate.value:+.2f} ({_percent(claim.level)}: {interval(found.estimate)})"


def weight_tables(
    judge: Judge, claims: Sequence[WeightClaim], data_of: Callable[[Group], str], unit: str, factor: int
) -> list[Table]:
    """Accuracy and cost of each arm; differences; each LOTUS's 2 x 2.

    Args:
        data_of: what a group was trained on, in words.
        unit: what costs are told in, and how many of it are a GMAC.
    """
    squares = [_square(claim, data_of) for claim in claims if claim.square is not None]
    return [_arms(judge, data_of, unit, factor), _differences(claims, data_of), *squares]


def _arms(judge: Judge, data_of: Callable[[Group], str], unit: str, factor: int) -> Table:
    head = ["trained on", "weights", "s", "epochs", "seeds", "top-1", "updates", "mining"]
    head += [f"train {unit}", "in theory", "train time"]
    rows = []
    for group in sorted([*dense_beside(judge), *judge.ticketed], key=place):
        name, sparsity = (group.weights.name, group.weights.sparsity) if group.weights else ("dense", 0.0)
        counts = [_share(sparsity), str(group.runs[0].args["epochs"]), str(len(group.runs))]
        accuracy = cell(judge.accuracy(group, OWN))
        rows.append(
            [_list(data_of(group), differing(group.but_epochs)), name, *counts, accuracy, *_cost_cells(group, factor)]
        )
    title = "Weight tickets: top-1 in % as trained (full: on all patches, else on tickets); updates of the run, of finding the mask"
    return Table(title, head, rows, frozenset(range(2, len(head))), 0)


def dense_beside(judge: Judge) -> list[Group]:
    """Plain runs of the data that weight tickets were trained on."""
    data = {(group.arm, group.tokens, group.set_id) for group in judge.ticketed}
    return [group for group in judge.groups if (group.arm, group.tokens, group.set_id) in data]


def _cost_cells(group: Group, factor: int) -> list[str]:
    """Updates of the run and of mining; MACs as run, and with the zeros left out; time."""
    if group.updates is None:
        updates = ["n/a", "n/a"]
    else:
        mining = group.cost("mining_updates") if group.weights else 0.0
        updates = [f"{group.updates - mining:.0f}", f"{mining:.0f}"]
    whole = factor * group.cost("train_gmacs")
    digits = max(0, 2 - math.floor(math.log10(whole))) if whole > 0 else 3
    theory = "-"
    if group.weights:
        sparse = factor * group.cost("sparse_gmacs")
        theory = f"{sparse:.{digits}f}" + (f" ({sparse / whole:.0%})" if whole else "")
    return [*updates, f"{whole:.{digits}f}", theory, duration(group.cost("seconds"))]


def _differences(claims: Sequence[WeightClaim], data_of: Callable[[Group], str]) -> Table:
    level = claims[0].level if claims else LEVEL
    head = ["claim", "difference", "must be", "points", f"{_percent(level)} interval"]
    rows = []
    for claim in claims:
        name = _list(claim_name(claim), data_of(claim.winning), claim.winning.differing)
        found = [(part.difference.kind, f"> {part.bound:g}", part.difference.estimate) for part in claim.parts]
        found += [(row.kind, "", row.estimate) for row in claim.rows]
        if claim.square is not None and claim.square.interaction is not None:
            found.append(("interaction", "", claim.square.interaction))
        rows += [[name, kind, bound, f"{e.value:+.2f}", interval(e)] for kind, bound, e in found]
    title = "Differences in points: what claims need, and more (interaction: both - data only - weights only + neither)"
    return Table(title, head, rows, frozenset([3, 4]), 0)


def _square(claim: WeightClaim, data_of: Callable[[Group], str]) -> Table:
    found = claim.square
    assert found is not None
    cells = [
        [cell(claim.judge.accuracy(group, OWN) if group else None) for group in row]
        for row in ((found.neither, found.weights), (found.data, found.both))
    ]
    rows = [["full", *cells[0]], [data_of(claim.winning), *cells[1]]]
    title = f"{claim_name(claim)}: 2 x 2, top-1 in %"
    return Table(title, ["trained on", "dense", claim.weights.name], rows, frozenset([1, 2]), None)


def weight_notes(judge: Judge, claims: Sequence[WeightClaim]) -> list[str]:
    """What a reader should know of these figures; nothing without weight tickets."""
    if not judge.ticketed:
        return []
    notes = [
        "unstructured zeros save no time by themselves: GMACs as run and the time are what it cost; in theory: zeros left out"
    ]
    if claims and claims[0].level != LEVEL:
        judged = sparsities(claims)
        notes.append(
            f"{len(judged)} sparsities are judged ({', '.join(map(_share, judged))}), so each interval of a claim on weights is"
            f" at {_percent(claims[0].level)}, for {_percent(LEVEL)} in all (Bonferroni)"
        )
    for group in judge.ticketed:
        tickets = {run.args["weight_ticket_id"] for run in group.runs}
        if weights_of(group).plan is not None and len(tickets) < len(group.runs):
            notes.append(
                f"WARNING: {len(group.runs)} seeds of {weights_of(group).name} share {len(tickets)} weight tickets: the intervals say"
                " nothing about other tickets; mine one for each seed"
            )
    blind = dict.fromkeys(claim_name(claim) for claim in claims if claim.name != "DLTH" and claim.room is None)
    if blind:
        notes.append(
            f"whether there is room for tickets is not known without a random mask and dense: {', '.join(blind)}"
        )
    return notes


def _list(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _share(sparsity: float) -> str:
    return f"{sparsity:.4g}"


def _percent(level: float) -> str:
    return f"{100 * level:.4g} %"
