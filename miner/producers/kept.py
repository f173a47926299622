"""Rankings that a ticket set has already: the members ranking.npy and views.npy as they are there."""

from typing import Any

from miner.producers.producer import Encoder, Image
from shards.sample import Encoded, encode_tickets
from shards.schema import SelectorIdentity


class KeptRankings(Encoder):
    """Producer of rankings that were read; see `Producer`.

    Args:
        identity: of the selector that made them.
    """

    name = "selector"

    def __init__(self, identity: SelectorIdentity) -> None:
        self.identity = identity

    def encode(self, image: Image, answers: list[Any]) -> Encoded:
        """The rankings and boxes that were read, and what the row of the index said of them."""
        assert image.kept is not None
        members, columns = encode_tickets(image.views, image.kept.rankings, self.identity.counts[-1])
        return members, columns | {"mean_score": image.kept.mean_score, "entropy": image.kept.entropy}
