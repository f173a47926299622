"""How much two weight tickets agree, beside what places drawn at random would."""

from typing import Any

from shards.errors import TicketSetError
from trainer.weights.ticket import PLAN, WeightTicket


def overlap(a: WeightTicket, b: WeightTicket, level: int | None = None) -> dict[str, Any]:
    """Compare which weights two tickets keep.

    Chance is what masks of the same counts a tensor have in common on average when their places are random, as the
    verdict's shuffled arm has them: a * b / n weights. So it says what is more than the layers' densities.

    Args:
        a, b: of the same prunable tensors.
        level: of both; None: the last of each.
    Returns:
        levels of the two; tensors: name -> figures; total: figures. Figures: prunable, kept of the two, both, and
        overlap (share of a's kept that b keeps), jaccard (both / either), hamming (share of weights on which they differ,
        the distance of Early-Bird tickets), each with `_by_chance`. Overlap and jaccard of nothing kept are None.
    Raises:
        TicketSetError: other tensors or shapes, no such level, or a mask file is damaged.
    """
    if a.plan.prunable != b.plan.prunable:
        raise TicketSetError(_other_shapes(a, b))
    of_a, of_b = a.kept(level), b.kept(level)
    counts = {
        name: (mask.size, int(mask.sum()), int(of_b[name].sum()), int((mask & of_b[name]).sum()))
        for name, mask in of_a.items()
    }
    chances = {name: kept_a * kept_b / size for name, (size, kept_a, kept_b, _) in counts.items()}
    size, kept_a, kept_b, both = (sum(column) for column in zip(*counts.values(), strict=True))
    return {
        "levels": [a.level(level).level, b.level(level).level],
        "tensors": {name: _figures(*row, chances[name]) for name, row in counts.items()},
        "total": _figures(size, kept_a, kept_b, both, sum(chances.values())),
    }


def _figures(size: int, kept_a: int, kept_b: int, both: int, chance: float) -> dict[str, Any]:
    out: dict[str, Any] = {"prunable": size, "kept": [kept_a, kept_b], "both": both}
    for common, suffix in ((both, ""), (chance, "_by_chance")):
        either = kept_a + kept_b - common
        out[f"overlap{suffix}"] = common / kept_a if kept_a else None
        out[f"jaccard{suffix}"] = common / either if either else None
        out[f"hamming{suffix}"] = (either - common) / size
    return out


def _other_shapes(a: WeightTicket, b: WeightTicket) -> str:
    shapes, others = a.plan.prunable, b.plan.prunable
    name = min(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    said = [list(found[name]) if name in found else "none" for found in (shapes, others)]
    return f"{b.path}: expected the prunable tensors of {a.path}: {name}: {said[0]} there, {said[1]} here ({PLAN})"
