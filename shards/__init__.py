"""The ticket-set format: what is on disk; read it, write it, check it, show it.

Imports numpy, pyarrow and Pillow, when a name is first asked for. torch is imported only inside `render_view(s)`
(resizing) and webdataset only inside the tar writer, so that every inspection command starts in well under a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.images import render_view, render_views
    from shards.reader import TicketSet
    from shards.sample import Sample

__all__ = ["Sample", "TicketSet", "render_view", "render_views"]

_HOMES = {"Sample": "sample", "TicketSet": "reader", "render_view": "images", "render_views": "images"}


def __getattr__(name: str) -> Any:
    """A public name; `--help` of a command needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    return getattr(import_module(f"shards.{_HOMES[name]}"), name)
