"""The plots as a PNG, by matplotlib."""

import io
from typing import Any

from trainer.verdict.panels import Line, Plot, plots
from trainer.verdict.report import Report

SIZE, DPI = (12.0, 5.0), 100  # 1200 x 500 pixels a row
STYLES = ("-", ":", "-.", (0, (1, 3)))  # of models


def draw(report: Report) -> bytes:
    """A PNG of a row or two of SIZE."""
    from matplotlib.figure import Figure  # no pyplot: no screen, nothing global

    found = plots(report)
    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(found)), dpi=DPI, layout="constrained")
    parts: Any = figure.subfigures(len(found), 1) if len(found) > 1 else [figure]
    for plot, part in zip(found, parts, strict=True):
        _draw_plot(plot, part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_plot(plot: Plot, figure: Any) -> None:
    """Panels that share the y axis, a title and a legend."""
    axes = figure.subplots(1, len(plot.panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, plot.panels, strict=True):
        if plot.ticks is not None:
            axis.set_xscale("log")  # each level of IMP takes the same share of what is left
            if plot.ticks:
                axis.set_xlim(plot.ticks[-1][0] * 1.3, plot.ticks[0][0] / 1.3)  # the sparsest to the right
        for line in panel.lines:
            handles.setdefault(_plain(line.label), _draw_line(axis, line))
        axis.set_title(panel.title, fontsize=10)
        if plot.ticks is None:
            axis.set_xlim(left=0)
            axis.locator_params(axis="x", nbins=6)
        else:
            axis.minorticks_off()
            axis.set_xticks([x for x, _ in plot.ticks], [label for _, label in plot.ticks])
        axis.margins(y=0.08)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1, %")
    figure.supxlabel(plot.along, fontsize=10)
    figure.suptitle(plot.title, fontsize=12)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)


def _draw_line(axis: Any, line: Line) -> Any:
    """What the legend shows of it."""
    from matplotlib.colors import to_rgb

    color = tuple(1 - line.strength * (1 - part) for part in to_rgb(line.color))
    if line.level:
        drawn = axis.axhline(line.points[0].value, color=color, linestyle="--", linewidth=1.2, alpha=0.8)
        if not line.marker:
            return drawn
    xs, ys, halves = zip(*((point.x, point.value, point.half) for point in line.points), strict=True)
    style = "--" if line.level else STYLES[line.model % len(STYLES)] if len(xs) > 1 else "none"
    for point in line.points:
        axis.annotate(
            _plain(point.name), (point.x, point.value), (-7, 5), textcoords="offset points", ha="right", fontsize=8
        )
    return axis.errorbar(
        xs, ys, yerr=halves, color=color, linestyle=style, linewidth=1.6, capsize=3, elinewidth=1.2,
        marker=line.marker, markersize=6, markerfacecolor="white" if line.hollow else color,
    )  # fmt: skip


def _plain(text: str) -> str:
    """No formula to matplotlib."""
    return text.replace("$", r"\$")
