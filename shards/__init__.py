"""The ticket-set format: what is on disk; read it, write it, check it, show it.

Imports numpy, pyarrow and Pillow. torch is imported only inside `render_view(s)` (resizing) and
webdataset only inside the tar writer, so that every inspection command starts in well under a second.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.images import render_view, render_views
    from shards.reader import TicketSet
    from shards.sample import Sample

__all__ = ["Sample", "TicketSet", "render_view", "render_views"]
_HOMES = {"Sample": "sample", "TicketSet": "reader"}  # others are of the images


def __getattr__(name: str) -> Any:
    """Import pyarrow only when one of these is asked for: every `--help` comes through this package."""
    if name in __all__:
        return getattr(importlib.import_module(f"shards.{_HOMES.get(name, 'images')}"), name)
    raise AttributeError(f"module 'shards' has no attribute {name!r}")
