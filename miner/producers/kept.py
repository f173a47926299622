"""What a ticket set has already, rankings and token labels: members as they are there."""

from typing import Any

from miner.producers.producer import Image
from shards import format as fmt
from shards.sample import Encoded, encode_tickets


class _Kept:
    """A producer, but for its name and `encode`; see `Producer`.

    Args:
        identity: of the model or method that made what is kept.
    """

    whole = False

    def __init__(self, identity: Any) -> None:
        self.identity = identity


class KeptRankings(_Kept):
    """Rankings that were read."""

    name = "selector"

    def encode(self, image: Image, answers: list[Any]) -> Encoded:
        """The rankings and boxes that were read, and what the row of the index said of them."""
        kept = image.kept
        assert kept is not None
        members, columns = encode_tickets(image.views, kept.rankings, self.identity.counts[-1])
        return members, columns | {"mean_score": kept.mean_score, "entropy": kept.entropy, "spread": kept.spread}


class KeptTokenLabels(_Kept):
    """Token labels that were read."""

    name = "token_labels"

    def encode(self, image: Image, answers: list[Any]) -> Encoded:
        """The map that was read."""
        assert image.kept is not None and image.kept.token_labels is not None
        return {fmt.TOKEN_LABELS: fmt.encode_npy(image.kept.token_labels)}, {}
