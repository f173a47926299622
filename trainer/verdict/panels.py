"""What the plots show, before anything is drawn: accuracy against training cost, one line an arm and one point a K, the full
runs right across. Of weight tickets: accuracy against sparsity, one line an arm, dense right across."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.verdict.claim import OWN, Judge
from trainer.verdict.groups import Group, place
from trainer.verdict.report import Report, lettered
from trainer.verdict.sentences import RESAMPLED
from trainer.verdict.weight_report import dense_beside

Looks = Mapping[str, tuple[str, str]]
# Of each arm Okabe and Ito's color, told apart by the color-blind too, and a shape, in every picture the same ones; gray
# stands for their yellow, which is too faint for a line.
LOOKS: Looks = {
    "winning": ("#0072B2", "o"),
    "random": ("#D55E00", "s"),
    "random-fixed": ("#E69F00", "D"),
    "gaussian": ("#7F7F7F", "p"),
    "center": ("#009E73", "^"),
    "inverse": ("#CC79A7", "v"),
    "resized": ("#56B4E9", "P"),
    "full": ("#000000", "X"),
}
WEIGHT_LOOKS: Looks = {
    "winning": ("#0072B2", "o"),
    "reinit": ("#E69F00", "D"),
    "shuffled": ("#009E73", "^"),
    "random": ("#D55E00", "s"),
    "dense": ("#000000", ""),
}
PALER, PALEST = 0.6, 0.3  # of the color: the second line of one arm, and the last of many
DODGE = 0.006  # between arms of the same cost, as a share of full's
SPAN = 0.2  # of all arms of the same sparsity, as a share of what is left
PANELS = (
    (OWN, "tested as trained: winning, random, ... on tickets;\nfull, unmasked, resized on all patches"),
    ("all", "every arm tested on all patches\n(random: PatchDropout)"),
)


@dataclass(frozen=True)
class Point:
    """One group's accuracy.

    Attributes:
        x: where it is drawn: a little beside its place where others have the same one.
        value, half: top-1 in %, and half its interval; 0 where that is unknown.
        said: what its place is, in words.
        name: that is written beside it; may be empty.
    """

    x: float
    value: float
    half: float
    said: str
    name: str = ""


@dataclass(frozen=True)
class Line:
    """Groups that differ in K or sparsity alone.

    Attributes:
        label: of the legend.
        color, marker: of the arm; no marker: no points are drawn.
        strength: of the color, 0 to 1.
        hollow: markers are.
        level: the height of its first point is drawn right across.
        model: number of its model among all, which differ in their style.
        points: from left to right, or from sparse to dense.
    """

    label: str
    color: str
    marker: str
    strength: float
    hollow: bool
    level: bool
    model: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """Lines under a title."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Plot:
    """Panels that share both axes.

    Attributes:
        ticks: (place, label) on an axis of logarithms, falling from left to right; None: numbers from 0.
    """

    title: str
    along: str
    panels: Sequence[Panel]
    ticks: Sequence[tuple[float, str]] | None = None


def plots(report: Report) -> list[Plot]:
    """What data tickets cost, and what weight tickets leave; either or both."""
    tickets = any(group.arm != "full" for judge in report.judges for group in judge.groups)
    found = [_costs(report)] if tickets or not report.ticketed else []
    return [*found, *([_sparsities(report)] if report.ticketed else [])]


def _costs(report: Report) -> Plot:
    panels = [
        Panel(
            title,
            [
                line
                for n, judge in enumerate(report.judges)
                for line in _paler([*_cost_lines(report, judge, n, protocol)])
            ],
        )
        for protocol, title in PANELS
    ]
    along = f"{report.unit()[0]} to train on one view (forward){_epochs(report)}; equal costs side by side"
    return Plot(_title(report, "training cost"), along, panels)


def _cost_lines(report: Report, judge: Judge, model: int, protocol: str) -> Iterator[Line]:
    """Lines of one model; none where all of its runs have weight tickets."""
    lines = _by_label(report, judge)
    (unit, factor), named = report.unit(), protocol == OWN and len(report.set_names) == len(report.judges) == 1
    widest = factor * max((group.cost("dense_gmacs") for group in judge.groups), default=0)
    for index, (label, groups) in enumerate(lines.items()):
        arm, _, tuned = groups[0].arm.partition(" ")
        beside = 0 if arm == "full" else widest * DODGE * (index - (len(lines) - 2) / 2)
        points = []
        for group in groups:
            found, cost = judge.accuracy(group, protocol), factor * judge.share(group) * group.cost("dense_gmacs")
            if found is not None:
                said = f"K={group.tokens}, {cost:.3g} {unit}, {_seeds(group)}"
                name = f"K={group.tokens}" if named and groups[0].arm == "winning" else ""
                points.append(Point(cost + beside, found.value, found.half or 0.0, said, name))
        if points:
            color, marker = LOOKS[arm]
            points.sort(key=lambda point: point.x)
            yield Line(label, color, marker, 1.0, bool(tuned), arm == "full", model, points)


def _paler(lines: Sequence[Line]) -> Iterator[Line]:
    """The same; of several lines of one arm each is paler than the one before, and none too pale to be seen."""
    count, drawn = Counter(line.color for line in lines), Counter[str]()
    for line in lines:
        step = min(1 - PALER, (1 - PALEST) / max(1, count[line.color] - 1))
        yield replace(line, strength=1 - step * drawn[line.color])
        drawn[line.color] += 1


def _by_label(report: Report, judge: Judge) -> dict[str, list[Group]]:
    """Groups that differ in K alone, under what the legend calls them; full last."""
    lines: dict[str, list[Group]] = {}
    for group in sorted(judge.groups, key=lambda g: g.arm == "full"):
        label = lettered(group)
        if len(report.set_names) > 1 and group.set_id:
            label += f", {report.set_name(group.set_id)}"
        if len(report.judges) > 1:
            label += f", {judge.model}"
        lines.setdefault(label, []).append(group)
    return lines


def _sparsities(report: Report) -> Plot:
    """A panel for runs on all patches, and one for those on tickets."""
    titles = {"trained and tested on all patches": True, "trained and tested on tickets, or on random patches": False}
    groups = [group for judge in report.judges for group in judge.ticketed]
    panels = [
        Panel(
            title,
            [
                line
                for n, judge in enumerate(report.judges)
                for line in _paler([*_weight_lines(report, judge, n, full)])
            ],
        )
        for title, full in titles.items()
        if any((group.arm == "full") == full for group in groups)
    ]
    kept = sorted({_kept(group) for group in groups if not _is_dense(group)})
    along = "sparsity: share of the prunable weights that are removed; equal ones side by side"
    ticks = [(share, f"{1 - share:.4g}") for share in _apart(kept)]
    return Plot(_title(report, "sparsity"), along, panels, ticks)


def _weight_lines(report: Report, judge: Judge, model: int, full: bool) -> Iterator[Line]:
    """Lines of one model in one panel, dense first."""
    lines: dict[str, list[Group]] = {}
    groups = [group for group in [*dense_beside(judge), *judge.ticketed] if (group.arm == "full") == full]
    for group in sorted(groups, key=place):
        name = group.weights.name if group.weights else "dense"
        names = [name, "" if full else report.data_of(group), group.differing]
        label = ", ".join(filter(None, [*names, judge.model if len(report.judges) > 1 else ""]))
        lines.setdefault(label, []).append(group)
    dashed = sum(_is_dense(members[0]) for members in lines.values())
    for index, (label, members) in enumerate(sorted(lines.items(), key=lambda line: not _is_dense(line[1][0]))):
        arm = members[0].weights.arm if members[0].weights else "dense"
        beside = 0 if arm == "dense" else SPAN * (0.5 - (index - dashed + 1) / (len(lines) - dashed + 1))
        found = [(group, judge.accuracy(group, OWN)) for group in members]
        points = [
            Point(_kept(group) * (1 + beside), e.value, e.half or 0.0, f"s={1 - _kept(group):.4g}, {_seeds(group)}")
            for group, e in found
            if e is not None
        ]
        if points:
            color, marker = WEIGHT_LOOKS[arm]
            points.sort(key=lambda point: point.x)
            yield Line(label, color, marker, 1.0, False, arm == "dense", model, points)


def _is_dense(group: Group) -> bool:
    return group.weights is None or group.weights.arm == "dense"


def _kept(group: Group) -> float:
    """Share of the prunable weights that are left."""
    return max(1e-6, 1 - group.weights.sparsity) if group.weights else 1.0


def _seeds(group: Group) -> str:
    return f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"


def _apart(values: Iterable[float], factor: float = 1.15) -> list[float]:
    """Of rising values, those that have room for a label on an axis of logarithms."""
    out: list[float] = []
    for value in values:
        if not out or value > out[-1] * factor:
            out.append(value)
    return out


def _title(report: Report, against: str) -> str:
    resampled = [judge.resampled for judge in report.judges]
    basis = RESAMPLED if all(resampled) else "over seeds"
    if any(resampled) and not all(resampled):
        basis = f"over seeds; where there is one: {RESAMPLED}"
    return f"Accuracy against {against} (bars: 95 % intervals, {basis})"


def _epochs(report: Report) -> str:
    differ = any(field == "epochs" for judge in report.judges for group in judge.groups for field, _ in group.differs)
    return ", times epochs / full's" if differ else ""
