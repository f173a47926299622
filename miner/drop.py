"""The drop rule: how many patches survive each stage. The miner's selectors and dropping ViTs share it."""

import math
from collections.abc import Sequence

from shards.errors import TicketSetError

DEFAULT_KEEP_RATE = 0.9  # per stage
PAPER_STAGES = 3  # drop blocks of the paper: 3, 6 and 9 of 12


def default_blocks(depth: int) -> tuple[int, ...]:
    """Quarter points of a ViT: 3, 6, 9 of 12 blocks (Data-LTH, EViT)."""
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


def keep_counts(num_patches: int, keep_rate: float, stages: int = PAPER_STAGES) -> tuple[int, ...]:
    """Patches left after each stage when every stage keeps ceil(keep_rate * n), as EViT's code rounds.

    >>> keep_counts(196, 0.9)
    (177, 160, 144)

    Raises:
        ValueError: keep_rate is not in (0, 1].
    """
    if not 0 < keep_rate <= 1:
        raise ValueError(f"expected a keep rate in (0, 1], got {keep_rate}")
    counts = []
    for _ in range(stages):
        num_patches = math.ceil(keep_rate * num_patches)
        counts.append(num_patches)
    return tuple(counts)


def keep_counts_for(num_patches: int, tokens: int, stages: int = PAPER_STAGES) -> tuple[int, ...]:
    """Patches left after each stage on the way to exactly `tokens`: ceil(N * (K / N) ** (i / m)).

    Raises:
        ValueError: tokens is not in 1..num_patches.
    """
    if not 1 <= tokens <= num_patches:
        raise ValueError(f"expected 1 to {num_patches}, the patches of a view, got {tokens}")
    share = tokens / num_patches
    counts = [math.ceil(num_patches * share ** (i / stages)) for i in range(1, stages)]
    return (*counts, tokens)


def parse_blocks(text: str | None) -> tuple[int, ...] | None:
    """`3,6,9` -> (3, 6, 9)

    Raises:
        TicketSetError: other text.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise TicketSetError(f"expected block numbers like 3,6,9, got {text!r}") from None


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """
    Raises:
        TicketSetError: not ascending, or a model of `depth` blocks lacks one.
    """
    if not blocks or list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < depth:
        raise TicketSetError(
            f"`drop_blocks` {','.join(map(str, blocks))}: expected ascending block numbers from 0 to {depth - 1}"
        )
