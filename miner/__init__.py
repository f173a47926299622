"""A labeled image set -> a ticket set: rank every image's patches once, for many trainings."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miner.job import Job, mine_shard
    from miner.run import mine
    from miner.selectors import Selector, create_selector, register_method

__all__ = ["Job", "Selector", "create_selector", "mine", "mine_shard", "register_method"]
_HOMES = {"mine": "run", "Job": "job", "mine_shard": "job"}  # others are of the selectors


def __getattr__(name: str) -> Any:
    """Import torch only when one of these is asked for: `datalth-mine --help` answers without it."""
    if name in __all__:
        return getattr(importlib.import_module(f"miner.{_HOMES.get(name, 'selectors')}"), name)
    raise AttributeError(f"module 'miner' has no attribute {name!r}")
