"""Accuracy against training cost: one line an arm, one point a K; the full runs as a dashed line."""

import io
from typing import Any

from trainer.verdict.claim import OWN, Judge
from trainer.verdict.groups import Group
from trainer.verdict.report import Report, lettered
from trainer.verdict.sentences import RESAMPLED

SIZE, DPI = (12.0, 5.0), 100  # 1200 x 500 pixels
# Okabe and Ito's colors, told apart by the color-blind too; an arm always has the same one.
COLORS = {
    "winning": "#0072B2",
    "random": "#D55E00",
    "random-fixed": "#E69F00",
    "center": "#009E73",
    "inverse": "#CC79A7",
    "resized": "#56B4E9",
    "full": "#000000",
}
MARKERS = "osD^vP*X"
DODGE = 0.006  # between arms of the same cost, as a share of full's
PANELS = (
    (OWN, "tested as trained: winning, random, ... on tickets;\nfull, unmasked, resized on all patches"),
    ("all", "every arm tested on all patches\n(random: PatchDropout)"),
)


def draw(report: Report) -> bytes:
    """A PNG of SIZE; two panels that share the y axis."""
    from matplotlib.figure import Figure  # no pyplot: no screen, nothing global

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    for axis, (protocol, title) in zip(axes, PANELS, strict=True):
        for number, judge in enumerate(report.judges):
            _draw_model(report, judge, axis, protocol, number, handles)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=6)
        axis.margins(y=0.08)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1, %")
    cost = f"{report.unit()[0]} to train on one view (forward){_epochs(report)}; equal costs side by side"
    figure.supxlabel(cost, fontsize=10)
    figure.suptitle(_title(report), fontsize=12)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _title(report: Report) -> str:
    resampled = [judge.resampled for judge in report.judges]
    basis = RESAMPLED if all(resampled) else "over seeds"
    if any(resampled) and not all(resampled):
        basis = f"over seeds; where there is one: {RESAMPLED}"
    return f"Accuracy against training cost (bars: 95 % intervals, {basis})"


def _epochs(report: Report) -> str:
    differ = any(field == "epochs" for judge in report.judges for group in judge.groups for field, _ in group.differs)
    return ", times epochs / full's" if differ else ""


def _draw_model(report: Report, judge: Judge, axis: Any, protocol: str, number: int, handles: dict[str, Any]) -> None:
    """All lines of one model; models differ in their line style."""
    style = ("-", ":", "-.", (0, (1, 3)))[number % 4]
    lines = _lines(report, judge)
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
        looks = {"color": COLORS[arm], "marker": MARKERS[index % len(MARKERS)], "markersize": 6}
        looks |= {"markerfacecolor": "white" if tuned else COLORS[arm]}
        looks |= {"linestyle": "--" if arm == "full" else style if len(xs) > 1 else "none"}
        if arm == "full":
            axis.axhline(ys[0], color=COLORS[arm], linestyle="--", linewidth=1, alpha=0.7)
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
