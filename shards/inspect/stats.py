"""Figures over a ticket set's index: where tickets lie, how sure the selector was, what failed."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.reader import TicketSet


def statistics(opened: TicketSet, split: str, table: pa.Table | None = None) -> dict[str, Any]:
    """Figures of one split, from view 0's tickets.

    Args:
        table: `opened.table(split)`, where it was read already.
    Returns:
        samples, failed, k, n, errors {reason: count}, entropy {mean, p5, p50, p95} in bits or None,
        frequency [gh][gw] (share of tickets that hold a patch), per_class {name: {samples, frequency}}.
    Raises:
        TicketSetError: the set holds token labels alone.
    """
    opened.require_tickets()
    table = opened.table(split) if table is None else table
    ok = table.filter(pc.equal(table["status"], "ok"))
    n = opened.num_patches
    packed = np.frombuffer(b"".join(ok["ticket"].to_pylist()), np.uint8).reshape(len(ok), -(-n // 8))
    masks = np.unpackbits(packed, axis=1, count=n)  # [images, N]
    labels = np.array([-1 if v is None else v for v in ok["label"].to_pylist()])
    per_class = {}
    for label, name in enumerate(opened.classes):
        of_class = masks[labels == label]
        if len(of_class):
            per_class[name] = {"samples": len(of_class), "frequency": _map(of_class, opened)}
    errors = Counter(e.split(":")[0] for e in table["error"].to_pylist() if e)
    entropy = np.array([e for e in ok["entropy"].to_pylist() if e is not None])
    return {
        "split": split,
        "samples": len(ok),
        "failed": len(table) - len(ok),
        "k": opened.k,
        "n": n,
        "errors": dict(errors),
        "entropy": _quantiles(entropy),
        "frequency": _map(masks, opened),
        "per_class": per_class,
    }


def _map(masks: np.ndarray, opened: TicketSet) -> list[list[float]]:
    share = masks.mean(axis=0) if len(masks) else np.zeros(opened.num_patches)
    rows: list[list[float]] = share.reshape(opened.grid).round(4).tolist()
    return rows


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    p5, p50, p95 = np.percentile(values, [5, 50, 95])
    return {"mean": float(values.mean()), "p5": float(p5), "p50": float(p50), "p95": float(p95)}
