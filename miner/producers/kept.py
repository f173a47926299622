"""What a ticket set has already, rankings and token labels: members as they are there."""

from typing import Any

from miner.producers.producer import Encoder, Image
from shards import format as fmt
from shards.sample import Encoded, encode_tickets
from shards.schema import LabelerIdentity, SelectorIdentity


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
        kept = image.kept
        assert kept is not None
        members, columns = encode_tickets(image.views, kept.rankings, self.identity.counts[-1])
        return members, columns | {"mean_score": kept.mean_score, "entropy": kept.entropy}


class KeptTokenLabels(Encoder):
    """Producer of token labels that were read; see `Producer`.

    Args:
        identity: of the model that made them.
    """

    name = "token_labels"

    def __init__(self, identity: LabelerIdentity) -> None:
        self.identity = identity

    def encode(self, image: Image, answers: list[Any]) -> Encoded:
        """The map that was read."""
        assert image.kept is not None and image.kept.token_labels is not None
        return {fmt.TOKEN_LABELS: fmt.encode_npy(image.kept.token_labels)}, {}
