"""Accuracy against training cost: one line an arm, one point a K; the full runs as a dashed line. Of weight tickets:
accuracy against sparsity, one line an arm, dense as a dashed line."""

import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

from trainer.verdict.claim import OWN, Judge
from trainer.verdict.groups import Group, place
from trainer.verdict.report import Report, lettered
from trainer.verdict.sentences import RESAMPLED
from trainer.verdict.weight_report import dense_beside

SIZE, DPI = (12.0, 5.0), 100  # 1200 x 500 pixels a row
# Of each arm Okabe and Ito's color, told apart by the color-blind too, and a shape, in every picture the same ones.
LOOKS = {
    "winning": ("#0072B2", "o"),
    "random": ("#D55E00", "s"),
    "random-fixed": ("#E69F00", "D"),
    "center": ("#009E73", "^"),
    "inverse": ("#CC79A7", "v"),
    "resized": ("#56B4E9", "P"),
    "full": ("#000000", "X"),
}
WEIGHT_LOOKS = {
    "winning": ("#0072B2", "o"),
    "reinit": ("#E69F00", "D"),
    "shuffled": ("#009E73", "^"),
    "random": ("#D55E00", "s"),
    "dense": ("#000000", "X"),
}
PALER = 0.6  # of the color, of each further line of one arm
STYLES = ("-", ":", "-.", (0, (1, 3)))
DODGE = 0.006  # between arms of the same cost, as a share of full's
SPAN = 0.2  # of all arms of the same sparsity, as a share of what is left
PANELS = (
    (OWN, "tested as trained: winning, random, ... on tickets;\nfull, unmasked, resized on all patches"),
    ("all", "every arm tested on all patches\n(random: PatchDropout)"),
)


def draw(report: Report) -> bytes:
    """A PNG of a row or two of SIZE: what data tickets cost, and what weight tickets leave."""
    from matplotlib.figure import Figure  # no pyplot: no screen, nothing global

    tickets = any(group.arm != "full" for judge in report.judges for group in judge.groups)
    rows = [
        *([_draw_costs] if tickets or not report.ticketed else []),
        *([_draw_sparsities] if report.ticketed else []),
    ]
    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(rows)), dpi=DPI, layout="constrained")
    parts: Any = figure.subfigures(len(rows), 1) if len(rows) > 1 else [figure]
    for row, part in zip(rows, parts, strict=True):
        row(report, part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_costs(report: Report, figure: Any) -> None:
    """Two panels that share the y axis."""
    axes = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    for axis, (protocol, title) in zip(axes, PANELS, strict=True):
        for number, judge in enumerate(report.judges):
            _draw_model(report, judge, axis, protocol, number, handles)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=6)
        _dress(axis)
    axes[0].set_ylabel("top-1, %")
    cost = f"{report.unit()[0]} to train on one view (forward){_epochs(report)}; equal costs side by side"
    figure.supxlabel(cost, fontsize=10)
    _head(report, figure, "training cost", handles)


def _draw_sparsities(report: Report, figure: Any) -> None:
    """A panel for runs on all patches, and one for those on tickets."""
    panels = {"trained and tested on all patches": True, "trained and tested on tickets, or on random patches": False}
    groups = [group for judge in report.judges for group in judge.ticketed]
    panels = {title: full for title, full in panels.items() if any((group.arm == "full") == full for group in groups)}
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    kept = sorted({_kept(group) for group in groups if group.weights and group.weights.arm != "dense"})
    handles: dict[str, Any] = {}
    for axis, (title, full) in zip(axes, panels.items(), strict=True):
        axis.set_xscale("log")  # each level of IMP takes the same share of what is left
        if kept:
            axis.set_xlim(kept[-1] * 1.3, kept[0] / 1.3)  # the sparsest to the right
        for number, judge in enumerate(report.judges):
            _draw_weights(report, judge, axis, full, number, handles)
        axis.set_title(title, fontsize=10)
        axis.minorticks_off()
        ticks = _apart(kept)
        axis.set_xticks(ticks, [f"{1 - x:.4g}" for x in ticks])
        _dress(axis)
    axes[0].set_ylabel("top-1, %")
    figure.supxlabel("sparsity: share of the prunable weights that are removed; equal ones side by side", fontsize=10)
    _head(report, figure, "sparsity", handles)


def _draw_weights(report: Report, judge: Judge, axis: Any, full: bool, number: int, handles: dict[str, Any]) -> None:
    """All lines of one model in one panel."""
    lines: dict[str, list[Group]] = {}
    groups = [group for group in [*dense_beside(judge), *judge.ticketed] if (group.arm == "full") == full]
    for group in sorted(groups, key=place):
        name = group.weights.name if group.weights else "dense"
        names = [name, "" if full else report.data_of(group), group.differing]
        label = ", ".join(filter(None, [*names, judge.model if len(report.judges) > 1 else ""]))
        lines.setdefault(label.replace("$", r"\$"), []).append(group)
    dashed = sum(_is_dense(members[0]) for members in lines.values())
    drawn_of: Counter[str] = Counter()
    for index, (label, members) in enumerate(sorted(lines.items(), key=lambda line: not _is_dense(line[1][0]))):
        found = [(group, judge.accuracy(group, OWN)) for group in members]
        points = sorted((_kept(group), e.value, e.half or 0.0) for group, e in found if e is not None)
        if not points:
            continue
        xs, ys, halves = zip(*points, strict=True)
        arm = members[0].weights.arm if members[0].weights else "dense"
        color, marker = _look(WEIGHT_LOOKS, arm, 0 if arm == "dense" else drawn_of[arm])
        drawn_of[arm] += 1
        looks: dict[str, Any] = {"color": color, "linestyle": STYLES[number % 4], "linewidth": 1.6}
        if arm == "dense":  # lines of one panel differ in their data or their epochs
            looks |= {"linestyle": "--", "linewidth": 1.2, "alpha": max(0.3, 0.9 - 0.25 * index)}
            drawn = axis.axhline(ys[0], **looks)
        else:
            xs = tuple(x * (1 + SPAN * (0.5 - (index - dashed + 1) / (len(lines) - dashed + 1))) for x in xs)
            drawn = axis.errorbar(xs, ys, yerr=halves, capsize=3, elinewidth=1.2, marker=marker, markersize=6, **looks)
        handles.setdefault(label, drawn)


def _look(looks: dict[str, tuple[str, str]], arm: str, before: int) -> tuple[tuple[float, ...], str]:
    """Color and marker of a line of an arm, of which so many were drawn before: of other sets, methods or epochs."""
    from matplotlib.colors import to_rgb

    color, marker = looks[arm]
    return tuple(1 - PALER**before * (1 - part) for part in to_rgb(color)), marker


def _is_dense(group: Group) -> bool:
    return group.weights is None or group.weights.arm == "dense"


def _kept(group: Group) -> float:
    """Share of the prunable weights that are left."""
    return max(1e-6, 1 - group.weights.sparsity) if group.weights else 1.0


def _apart(values: Iterable[float], factor: float = 1.15) -> list[float]:
    """Of rising values, those that have room for a label on an axis of logarithms."""
    out: list[float] = []
    for value in values:
        if not out or value > out[-1] * factor:
            out.append(value)
    return out


def _dress(axis: Any) -> None:
    axis.margins(y=0.08)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _head(report: Report, figure: Any, against: str, handles: dict[str, Any]) -> None:
    """Title and legend."""
    figure.suptitle(f"Accuracy against {against} (bars: 95 % intervals, {_basis(report)})", fontsize=12)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)


def _basis(report: Report) -> str:
    resampled = [judge.resampled for judge in report.judges]
    basis = RESAMPLED if all(resampled) else "over seeds"
    if any(resampled) and not all(resampled):
        basis = f"over seeds; where there is one: {RESAMPLED}"
    return basis


def _epochs(report: Report) -> str:
    differ = any(field == "epochs" for judge in report.judges for group in judge.groups for field, _ in group.differs)
    return ", times epochs / full's" if differ else ""


def _draw_model(report: Report, judge: Judge, axis: Any, protocol: str, number: int, handles: dict[str, Any]) -> None:
    """All lines of one model; models differ in their line style."""
    if not judge.groups:  # all of its runs have weight tickets
        return
    style = STYLES[number % 4]
    lines, drawn_of = _lines(report, judge), Counter[str]()
    factor = report.unit()[1]
    widest = factor * max(group.cost("dense_gmacs") for group in judge.groups)
    for index, (label, groups) in enumerate(lines.items()):
        points = [(factor * judge.share(g) * g.cost("dense_gmacs"), judge.accuracy(g, protocol)) for g in groups]
        found = sorted((x, e.value, e.half or 0.0) for x, e in points if e is not None)
        if not found:
            continue
        xs, ys, halves = zip(*found, strict=True)
        arm = groups[0].arm.partition(" +")[0]
        tuned = " +" in groups[0].arm
        color, marker = _look(LOOKS, arm, drawn_of[arm])
        drawn_of[arm] += 1
        looks = {"color": color, "marker": marker, "markersize": 6, "markerfacecolor": "white" if tuned else color}
        looks |= {"linestyle": "--" if arm == "full" else style if len(xs) > 1 else "none"}
        if arm == "full":
            axis.axhline(ys[0], color=color, linestyle="--", linewidth=1, alpha=0.7)
        else:  # arms of one cost stand side by side
            xs = tuple(x + widest * DODGE * (index - (len(lines) - 2) / 2) for x in xs)
        bars = axis.errorbar(xs, ys, yerr=halves, capsize=3, elinewidth=1.2, linewidth=1.6, **looks)
        handles.setdefault(label, bars)
        if groups[0].arm == "winning" and protocol == OWN and len(report.set_names) == len(report.judges) == 1:
            for x, y, tokens in zip(xs, ys, sorted(g.tokens for g in groups), strict=True):
                axis.annotate(f"K={tokens}", (x, y), (-7, 5), textcoords="offset points", ha="right", fontsize=8)


def _lines(report: Report, judge: Judge) -> dict[str, list[Group]]:
    """Groups that differ in K alone, under what the legend calls them."""
    lines: dict[str, list[Group]] = {}
    for group in sorted(judge.groups, key=lambda g: g.arm == "full"):  # full last in the legend
        label = lettered(group)
        if len(report.set_names) > 1 and group.set_id:
            label += f", {report.set_name(group.set_id)}"
        if len(report.judges) > 1:
            label += f", {judge.model}"
        lines.setdefault(label.replace("$", r"\$"), []).append(group)  # no formula to matplotlib
    return lines
