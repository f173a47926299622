"""A labelled image set -> a ticket set: rank every image's patches once, for many trainings."""

from miner.selectors import Selector, create_selector, register_method

__all__ = ["Selector", "create_selector", "register_method"]
