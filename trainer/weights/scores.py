"""Scores or chance -> which weights are kept: exact counts, ties by place, what is gone stays gone. numpy alone.

Weights are arrays by name; wherever several are ranked or counted together they stand in the order of their names.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from shards.errors import TicketSetError
from shards.permutation import permutation

Kept = dict[str, np.ndarray]  # bool arrays of the weights' shapes
MOST_A_LEVEL = 0.2  # of what remains, as Frankle & Carbin's


def default_levels(sparsity: float) -> int:
    """The fewest levels that remove at most MOST_A_LEVEL of what remains at each: 11 for .9."""
    return math.ceil(math.log(1 - sparsity) / math.log(1 - MOST_A_LEVEL) - 1e-9)


def sparsity_at(sparsity: float, levels: int, level: int) -> float:
    """The share that is gone after a level; the last one's is exact. Each level keeps the same share of what remains."""
    return sparsity if level == levels else 1 - (1 - sparsity) ** (level / levels)


def count_of(total: int, sparsity: float) -> int:
    """How many of all weights are kept; at least one."""
    return max(1, round(total * (1 - sparsity)))


def even_counts(shapes: Mapping[str, tuple[int, ...]], count: int, before: Kept | None = None) -> dict[str, int]:
    """`count` kept weights, spread over tensors by their sizes; the counts sum up exactly.

    Args:
        before: what there is to keep of. Apportioning alone may give a tensor one more of a smaller count.
    """
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    room = sizes if before is None else {name: int(np.count_nonzero(before[name])) for name in sizes}
    total, seen, given = sum(sizes.values()), 0, 0
    counts = {}
    for name, size in sizes.items():
        seen += size
        until = count * seen // total  # whole numbers: no rounding that a platform could do otherwise
        counts[name], given = min(until - given, room[name]), until
    lack = count - sum(counts.values())
    for name in sizes:
        more = min(lack, room[name] - counts[name])
        counts[name], lack = counts[name] + more, lack - more
    return counts


def keep_best(scores: Mapping[str, np.ndarray], count: int, before: Kept | None, scope: str) -> Kept:
    """The `count` weights of the highest scores among those that are still there; ties to the lower place.

    Args:
        scores: arrays of any float type by name.
        before: what the last level kept; None: all.
        scope: "global" ranks all weights together; "layer" keeps the same share of every tensor.
    Raises:
        TicketSetError: a score is not finite.
    """
    names = sorted(scores)
    flat = {name: _remaining(name, scores[name], before[name] if before else None) for name in names}
    if scope == "global":
        best = _best(np.concatenate([flat[name] for name in names]), count)
        parts = np.split(best, np.cumsum([flat[name].size for name in names])[:-1])
    else:
        counts = even_counts({name: scores[name].shape for name in names}, count, before)
        parts = [_best(flat[name], counts[name]) for name in names]
    return {name: part.reshape(scores[name].shape) for name, part in zip(names, parts, strict=True)}


def _remaining(name: str, scores: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    flat = scores.astype(np.float64).ravel()  # exact for every float type that a model has
    there = flat if before is None else flat[before.ravel()]
    if not np.isfinite(there).all():
        raise TicketSetError(f"{name}: expected finite scores of its weights, got {there[~np.isfinite(there)][0]}")
    return flat if before is None else np.where(before.ravel(), flat, -np.inf)


def _best(flat: np.ndarray, count: int) -> np.ndarray:
    """bool [n]: the `count` greatest. A threshold alone would keep too many or too few where scores are equal."""
    if count == 0:
        return np.zeros(flat.size, bool)
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    best = flat > threshold
    ties = np.flatnonzero(flat == threshold)
    best[ties[: count - np.count_nonzero(best)]] = True
    return best


def votes(elected: Sequence[Kept], trained: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Scores of a soup: how many trainings kept a weight; where equal, its mean magnitude over them.

    Source: Instant Soup (Jaiswal et al., ICML 2023), whose union of masks is the case of one vote; here exact counts.
    """
    sizes = {
        name: np.mean([np.abs(weights[name].astype(np.float64)) for weights in trained], axis=0) for name in elected[0]
    }
    most = max(float(size.max()) for size in sizes.values())  # of all: where votes are equal, tensors compete too
    return {
        name: sum(kept[name].astype(np.float64) for kept in elected) + size / (1 + 2 * most)  # below a vote
        for name, size in sizes.items()
    }


def drawn(shapes: Mapping[str, tuple[int, ...]], count: int, *name: object, before: Kept | None = None) -> Kept:
    """`count` weights kept at random, every tensor at the same density.

    Args:
        name: of the draw; the tensor's is added. The same name gives the same order of weights, so that a smaller count
            keeps some of what a larger one keeps.
        before: what a larger one kept.
    """
    kept = {}
    for tensor, wanted in even_counts(shapes, count, before).items():
        chosen = np.zeros(math.prod(shapes[tensor]), bool)
        chosen[permutation(chosen.size, *name, tensor)[:wanted]] = True
        kept[tensor] = chosen.reshape(shapes[tensor])
    return kept


def shuffled(kept: Kept, *name: object) -> Kept:
    """As many weights of each tensor, at other places: the control that tells a mask from its layers' densities.

    Source: Frankle et al., Pruning Neural Networks at Initialization (2021), section 5; Su et al. (2020).
    """
    return {
        tensor: mask.ravel()[permutation(mask.size, *name, tensor)].reshape(mask.shape) for tensor, mask in kept.items()
    }
