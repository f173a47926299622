"""Ranked views of an image: the member ranked.bin. No model: it takes the rankings as another producer gives them."""

from typing import Any

from miner.producers.producer import Image
from miner.settings import DEFAULT_QUALITY, Geometry, Output
from shards.errors import TicketSetError
from shards.ranked import Mosaic, cell_of
from shards.sample import Encoded, encode_ranked
from shards.schema import RankedViews


class RankedPixels:
    """Producer of ranked views; see `Producer`."""

    name, whole = "ranked", False

    def __init__(self, identity: RankedViews, geometry: Geometry) -> None:
        self.identity = identity
        self._mosaic = Mosaic(geometry.grid, geometry.patch_size, identity.cell, identity.tokens)

    def encode(self, image: Image, answers: list[Any]) -> Encoded:
        """All views, each in the order that its sample's ranking.npy says."""
        assert image.rendered is not None
        rendered, image.rendered = image.rendered, None  # by far the most of what an image holds
        return encode_ranked(rendered, image.rankings(), self._mosaic, self.identity.quality, image.statistics)


def ranked_pixels(output: Output, geometry: Geometry, k: int, decoded: bool) -> RankedPixels:
    """A producer by the settings.

    Args:
        k: patches of a ticket.
        decoded: the selector is shown the views as they are stored; else rankings are kept that a set has already.
    Raises:
        TicketSetError: patches that cannot be stored so, or fewer of them than a ticket has.
    """
    grid = geometry.grid
    n, width = grid[0] * grid[1], grid[1]
    tokens = output.store_tokens or n
    if not k <= tokens <= n:
        raise TicketSetError(f"`store_tokens` {tokens}: expected K = {k}, a ticket, to N = {n}, a view")
    whole_rows = -(-tokens // width) * width
    quality, cell = output.quality or DEFAULT_QUALITY, cell_of(geometry.patch_size, grid)
    return RankedPixels(RankedViews(quality=quality, tokens=whole_rows, cell=cell, decoded=decoded), geometry)
