"""The ticket-set format: what is on disk; read it, write it, check it, show it.

Imports numpy, pyarrow and Pillow. torch is imported only inside `render_view(s)` (resizing) and
webdataset only inside the tar writer, so that every inspection command starts in well under a second.
"""

from shards.images import render_view, render_views
from shards.reader import TicketSet
from shards.sample import Sample

__all__ = ["Sample", "TicketSet", "render_view", "render_views"]
