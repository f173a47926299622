"""A labeled image set -> a ticket set: rank every image's patches once, for many trainings."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miner.selectors import Selector, create_selector, register_method

__all__ = ["Selector", "create_selector", "register_method"]


def __getattr__(name: str) -> Any:
    """Import torch only when a selector is asked for: `datalth-mine --help` answers without it."""
    if name in __all__:
        from miner import selectors

        return getattr(selectors, name)
    raise AttributeError(f"module 'miner' has no attribute {name!r}")
