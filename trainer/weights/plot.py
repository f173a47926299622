"""What a weight ticket keeps, as a picture: per layer, per head, and accuracy over its levels."""

import io
import re
from typing import Any

import numpy as np

from shards.console import printable
from shards.keys import natural_sorted
from trainer.weights.info import title
from trainer.weights.ticket import LevelRecord, WeightTicket

HEIGHT, DPI = 4.6, 100  # inches; pixels an inch
# Okabe and Ito's colors, told apart by the color-blind too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = "osD^v"
# blocks.3 . attn.qkv . weight; the block's number is the last one that something other than a number follows
_BLOCK = re.compile(r"(.*\.\d+)\.([A-Za-z_].*)\.weight")
MAX_CELLS = 1 << 20  # of the heat map: somebody's plan may name any number of heads


def draw(ticket: WeightTicket) -> bytes:
    """A PNG: a panel of layers, one of heads where the plan knows some, one of levels."""
    from matplotlib.figure import Figure  # no pyplot: no screen, nothing global

    draws = [_draw_layers, _draw_heads, _draw_levels] if head_shares(ticket)[0] else [_draw_layers, _draw_levels]
    widths = [7.0, 5.5, 4.5] if len(draws) == 3 else [8.0, 5.0]
    figure = Figure(figsize=(sum(widths), HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(draws), width_ratios=widths)
    for axis, panel in zip(axes, draws, strict=True):
        panel(ticket, axis)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_text(title(ticket)), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def layers(ticket: WeightTicket) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Blocks in the order of depth, and kind of layer -> block -> share of its weights that the last level keeps."""
    record, kinds = ticket.level(), dict[str, dict[str, float]]()
    for name, shape in ticket.plan.prunable.items():
        block, kind = _place(name)
        kinds.setdefault(kind, {})[block] = record.tensors[name] / float(np.prod(shape, dtype=float))
    return natural_sorted({block for shares in kinds.values() for block in shares}), kinds


def head_shares(ticket: WeightTicket) -> tuple[list[str], np.ndarray]:
    """Names of qkv weights in the order of depth, and [weights, 3, heads]: the share that the last level keeps of the
    rows of q, k and v; NaN where a weight has fewer heads than the most.
    """
    names = [
        name
        for name in natural_sorted(ticket.plan.heads)
        if name in ticket.plan.prunable and ticket.plan.prunable[name][0] % (3 * ticket.plan.heads[name]) == 0
    ]
    most = max((ticket.plan.heads[name] for name in names), default=0)
    if not names or 3 * most * len(names) > MAX_CELLS:
        return [], np.zeros((0, 3, 0))
    kept = ticket.kept()
    shares = np.full((len(names), 3, most), np.nan)
    for number, name in enumerate(names):
        heads = ticket.plan.heads[name]
        shares[number, :, :heads] = kept[name].reshape(3, heads, -1).mean(axis=2)  # rows: (q, k, v) x heads x head_dim
    return names, shares


def _place(name: str) -> tuple[str, str]:
    """(block, kind of layer) of a tensor's name."""
    found = _BLOCK.fullmatch(name)
    return (found[1], found[2]) if found else (name.removesuffix(".weight"), "others")


def _draw_layers(ticket: WeightTicket, axis: Any) -> None:
    blocks, kinds = layers(ticket)
    middles, width = {block: place for place, block in enumerate(blocks)}, 0.8 / len(kinds)
    for number, (kind, shares) in enumerate(kinds.items()):
        places = [middles[block] + width * (number - (len(kinds) - 1) / 2) for block in shares]
        looks = {"color": COLORS[number % len(COLORS)], "hatch": ("", "//", "..")[number // len(COLORS) % 3]}
        axis.bar(places, [100 * share for share in shares.values()], width, label=_text(kind), **looks)
    record = ticket.level()
    total = 100 * record.kept / record.prunable
    axis.axhline(total, color="#666666", linestyle="--", linewidth=1, label=f"all: {total:.3g} %")
    axis.set_xticks(range(len(blocks)), _short(blocks), fontsize=8)
    axis.set_xlim(-0.6, len(blocks) - 0.4)
    axis.set_xlabel("block")
    axis.set_ylabel("weights kept, %")
    axis.set_title(f"what level {record.level} keeps of each layer", fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.margins(y=0.25)  # for the legend
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")


def _draw_heads(ticket: WeightTicket, axis: Any) -> None:
    names, shares = head_shares(ticket)
    heads = shares.shape[2]
    # One empty column between q, k and v.
    padded = np.concatenate([shares, np.full((len(names), 3, 1), np.nan)], axis=2).reshape(len(names), -1)[:, :-1]
    image = axis.imshow(100 * padded, aspect="auto", cmap="cividis", vmin=0)
    middles = [part * (heads + 1) + (heads - 1) / 2 for part in range(3)]
    axis.set_xticks(middles, [f"{part}: heads 0 to {heads - 1}" if heads > 1 else part for part in "qkv"], fontsize=8)
    axis.set_yticks(range(len(names)), _short([_place(name)[0] for name in names]), fontsize=8)
    axis.tick_params(length=0)
    axis.set_ylabel("block")
    axis.set_title(f"what level {ticket.levels} keeps of each head", fontsize=10)
    axis.figure.colorbar(image, ax=axis, label="weights kept, %")


def _draw_levels(ticket: WeightTicket, axis: Any) -> None:
    levels = [record for record in ticket.manifest.levels if record.kept]  # the axis has no 0
    trained = [record for record in levels if record.results]
    shown = [record for record in levels if record.results or record.level in (0, ticket.levels)]
    protocols = sorted({protocol for record in trained for protocol in record.results or {}})
    for number, protocol in enumerate(protocols):
        points = [(_share(r), r.results[protocol]) for r in trained if r.results and protocol in r.results]
        color = COLORS[number % len(COLORS)]
        axis.plot(
            *zip(*points, strict=True), color=color, marker=MARKERS[number % 5], label=_text(f"tested on {protocol}")
        )
        if trained[0].level == 0 and protocol in (trained[0].results or {}):
            axis.axhline(points[0][1], color=color, linestyle="--", linewidth=1, alpha=0.7)  # the dense model
    axis.set_xscale("log")
    axis.set_xlim(115, 0.85 * min(_share(record) for record in shown))
    axis.set_xticks([_share(record) for record in shown], [f"{_share(record):.3g}" for record in shown], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("weights kept, %")
    axis.set_ylabel("top-1, %")
    axis.set_title("accuracy of the levels as mined (dashed: dense)", fontsize=10)
    axis.grid(alpha=0.25)
    if protocols:
        axis.legend(frameon=False, fontsize=8)
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "mining has trained no level", transform=axis.transAxes, ha="center", color="#666666")


def _share(record: LevelRecord) -> float:
    return 100 * record.kept / record.prunable


def _short(blocks: list[str]) -> list[str]:
    """Blocks by their numbers: 2.17 for stages.2.blocks.17; only some where they are many."""
    step = -(-len(blocks) // 24)
    numbers = [".".join(re.findall(r"\d+", block)) or block for block in blocks]
    return ["" if place % step else _text(number) for place, number in enumerate(numbers)]


def _text(text: str) -> str:
    return printable(text).replace("$", r"\$")  # no formula to matplotlib
