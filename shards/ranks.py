"""Which of how many processes this is, as torchrun says."""

import os

from shards.errors import TicketSetError

HINT = "start it with torchrun, or unset RANK and WORLD_SIZE"


def rank_and_world() -> tuple[int, int]:
    """RANK and WORLD_SIZE of the environment; 0 of 1 where neither is set.

    Raises:
        TicketSetError: one is no whole number, or RANK is missing or not below WORLD_SIZE: a process that took
            another's place, or none, would leave work undone without a word.
    """
    rank, world = _number("RANK", "0"), _number("WORLD_SIZE", "1")
    if world > 1 and "RANK" not in os.environ:
        raise TicketSetError(f"RANK: expected a number below WORLD_SIZE {world}, it is not set; {HINT}")
    if rank >= world:
        raise TicketSetError(f"RANK: expected a number below WORLD_SIZE {world}, got {rank}; {HINT}")
    return rank, world


def local_rank() -> int:
    """LOCAL_RANK: which of this machine's processes, and so whose GPU; 0 where it is not set."""
    return _number("LOCAL_RANK", "0")


def _number(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise TicketSetError(f"{name}: expected a whole number, got {value[:40]!r}; {HINT}")
    return int(value)
