"""verdict.html: the sentences, the plots with what each point is, and the tables, in one file."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from shards.console import printable
from shards.inspect.page import assemble
from trainer.verdict.claim import Judge
from trainer.verdict.panels import Line, Panel, Plot, Point, plots
from trainer.verdict.report import Report
from trainer.verdict.tables import Table

_FILES = Path(__file__).parent
WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 14, 30  # margins of a panel
WORDS = {"holds": "holds", "fails": "fails", "open": "cannot be told", "no room": "no room"}
SHAPES = {
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "s": "M-4-4H4V4H-4Z",
    "D": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "p": "M0-5L4.8-1.5L2.9 4.1H-2.9L-4.8-1.5Z",
    "^": "M0-5.5L5 4H-5Z",
    "v": "M0 5.5L5-4H-5Z",
    "P": "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "X": "M-5-2.6L-2.6-5L0-2.4L2.6-5L5-2.6L2.4 0L5 2.6L2.6 5L0 2.4L-2.6 5L-5 2.6L-2.4 0Z",
}
DASHES = ("", "2 4", "8 3 2 3", "1 7")  # of models
ACROSS = "6 4"  # of a level
Place = Callable[[float], float]


def page(report: Report) -> bytes:
    """All of a report."""
    title = "What do the weight tickets show?" if report.ticketed else "Does a ≈ c > b hold?"
    parts = [
        f'<header class="masthead"><div><h1>{title}</h1>',
        f'<p class="faint">{len(report.runs)} runs, margin {report.margin:g} points</p></div>',
        '<button id="theme" type="button" aria-label="Dark theme">Dark</button></header>',
        f'<main><ul class="sentences">{"".join(_sentences(report))}</ul>',
        *(f'<p class="faint small">{_text(line)}</p>' for line in report.reading()),
        *map(_plot, plots(report)),
    ]
    for judge in report.judges:
        parts += [f"<section><h2>{_text(report.title(judge))}</h2>", *map(_table, report.tables(judge))]
        parts += [_list(report.model_notes(judge)), "</section>"]
    runs = "".join(f"<li><code>{_text(str(run.folder))}</code></li>" for run in report.runs)
    parts += [
        f"<section><h2>Notes</h2>{_list(report.notes())}",
        f"<details><summary>{len(report.runs)} runs</summary><ul>{runs}</ul></details></section></main>",
        '<div id="tip" aria-hidden="true" hidden></div>',
    ]
    return assemble("Verdict", "\n".join(parts), [_FILES / "page.css", _FILES / "page.js"])


def _text(text: str) -> str:
    """Folders and classes may be called anything."""
    return escape(printable(text))


def _sentences(report: Report) -> Iterator[str]:
    """Each with its outcome as a word of its own."""
    for judge in report.judges:
        for outcome, sentence in zip(_outcomes(report, judge), report.all_sentences(judge), strict=True):
            badge = f'<strong class="{outcome.replace(" ", "-")}">{WORDS[outcome]}</strong>'
            yield f"<li>{badge}<span>{_text(sentence)}</span></li>"


def _outcomes(report: Report, judge: Judge) -> list[str]:
    outcomes = [claim.outcome for claim in judge.claims(report.margin)]
    return [*outcomes, *(claim.outcome for claim in report.weight_claims(judge))] or ["open"]


def _list(texts: Sequence[str]) -> str:
    return f'<ul class="faint small">{"".join(f"<li>{_text(text)}</li>" for text in texts)}</ul>'


def _table(table: Table) -> str:
    def cells(name: str, row: Sequence[str]) -> str:
        sides = (' class="figure"' if i in table.right else "" for i in range(len(row)))
        return "".join(f"<{name}{side}>{_text(cell)}</{name}>" for side, cell in zip(sides, row, strict=True))

    rows: list[str] = []
    last = None
    for row in table.rows:
        group = None if table.by is None else row[table.by]
        rows.append(f"<tr{' class=gap' if rows and group != last else ''}>{cells('td', row)}</tr>")
        last = group
    head = f"<thead><tr>{cells('th', table.head)}</tr></thead>"
    return f'<div class="scroll"><table><caption>{_text(table.title)}</caption>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _plot(plot: Plot) -> str:
    """Its panels on common axes, and one legend whose entries bring their lines out."""
    points = [point for panel in plot.panels for line in panel.lines for point in line.points]
    if not points:
        return ""
    low, high = min(p.value - p.half for p in points), max(p.value + p.half for p in points)
    room = 0.08 * (high - low) or 1.0
    down = _scale(low - room, high + room, HEIGHT - BOTTOM, TOP)
    heights = [(value, f"{value:g}") for value in _ticks(low - room, high + room)]
    if plot.ticks is None:
        right = 1.05 * max(p.x for p in points) or 1.0
        along = _scale(0, right, LEFT, WIDTH - RIGHT)
        places = [(value, f"{value:g}") for value in _ticks(0, right)]
    else:  # each level of IMP takes the same share of what is left; the sparsest to the right
        kept = [x for x, _ in plot.ticks] or [1.0]
        logs = _scale(math.log(kept[-1] * 1.3), math.log(kept[0] / 1.3), LEFT, WIDTH - RIGHT)
        along, places = (lambda x: logs(math.log(x))), list(plot.ticks)
    labels = list(dict.fromkeys(line.label for panel in plot.panels for line in panel.lines))
    panels = [_panel(panel, along, down, places, heights, labels) for panel in plot.panels]
    lines = {line.label: line for panel in reversed(plot.panels) for line in panel.lines}
    entries = (_entry(lines[label], number) for number, label in enumerate(labels))
    return (
        f'<section class="plot"><h2>{_text(plot.title)}</h2><ul class="legend">{"".join(entries)}</ul>'
        f'<div class="panels">{"".join(panels)}</div><p class="faint small">Up: top-1 in %. Along: {_text(plot.along)}.</p></section>'
    )


def _panel(
    panel: Panel,
    along: Place,
    down: Place,
    places: Iterable[tuple[float, str]],
    heights: Iterable[tuple[float, str]],
    labels: Sequence[str],
) -> str:
    """A panel: the axes, then its lines over them."""
    end, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{end}"/>']
    for value, label in heights:
        y = f"{down(value):.1f}"
        parts.append(
            f'<path class="grid" d="M{LEFT} {y}H{end}"/><text class="right" x="{LEFT - 8}" y="{y}">{label}</text>'
        )
    for value, label in places:
        parts.append(f'<text class="middle" x="{along(value):.1f}" y="{floor + 18}">{label}</text>')
    for line in panel.lines:
        parts.append(_line(line, labels.index(line.label), along, down))
    title = _text(panel.title.replace("\n", " "))
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{title}">{"".join(parts)}</svg>'
    return f'<figure><figcaption class="small">{title}</figcaption><div class="scroll">{drawing}</div></figure>'


def _line(line: Line, number: int, along: Place, down: Place) -> str:
    """A line, its intervals, and its points, which say what they are when they are pointed at."""
    spots = [(along(point.x), down(point.value)) for point in line.points]
    parts = []
    if line.level:
        parts.append(f'<path d="M{LEFT} {spots[0][1]:.1f}H{WIDTH - RIGHT}" stroke-dasharray="{ACROSS}"/>')
    elif len(spots) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        parts.append(f'<path d="M{path}" stroke-dasharray="{DASHES[line.model % len(DASHES)]}"/>')
    for point, (x, y) in zip(line.points, spots, strict=True):
        if not line.marker and point is not line.points[0]:
            continue  # of dense weights only the level is drawn
        x, shape = (x, _marker(line)) if line.marker else (LEFT, '<path class="hidden" d="M0-6H500V6H0Z"/>')
        up, under = down(point.value + point.half) - y, down(point.value - point.half) - y
        bar = (
            f'<path d="M-4 {up:.1f}H4M0 {up:.1f}V{under:.1f}M-4 {under:.1f}H4"/>' if point.half and line.marker else ""
        )
        name = f'<text class="right" x="-9" y="-9">{_text(point.name)}</text>' if point.name else ""
        said = _text(_said(line, point))
        parts.append(
            f'<g class="point" tabindex="0" role="img" aria-label="{said}" transform="translate({x:.1f} {y:.1f})">'
            f"{bar}{shape}{name}</g>"
        )
    return f'<g data-line="{number}" {_color(line)}>{"".join(parts)}</g>'


def _said(line: Line, point: Point) -> str:
    half = f" ± {point.half:.2f}" if point.half else ""
    return f"{line.label}: {point.value:.2f}{half} % ({point.said})"


def _entry(line: Line, number: int) -> str:
    """A line in the legend."""
    across = f'<path d="M0 8H28" stroke-dasharray="{ACROSS if line.level else DASHES[line.model % len(DASHES)]}"/>'
    marker = f'<g transform="translate(14 8)">{_marker(line)}</g>' if line.marker else ""
    swatch = f'<svg viewBox="0 0 28 16" aria-hidden="true"><g {_color(line)}>{across}{marker}</g></svg>'
    return f'<li data-line="{number}">{swatch}{_text(line.label)}</li>'


def _marker(line: Line) -> str:
    return f'<path class="{"hollow" if line.hollow else "marker"}" d="{SHAPES[line.marker]}"/>'


def _color(line: Line) -> str:
    """Black is the ink's color, which is white on a dark page."""
    color = "currentColor" if line.color == "#000000" else line.color
    return f'class="line" color="{color}" opacity="{line.strength:.3g}"'


def _scale(low: float, high: float, start: float, end: float) -> Place:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers in a range."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
