"""Token labels of the whole image by a classifier: the member labels.npy."""

import numpy as np
from torch import Tensor

from miner.producers.producer import Image, Item, Normalize
from miner.token_labels import Labeler
from shards.errors import TicketSetError
from shards.sample import Encoded, encode_token_labels

VIEWS_AN_IMAGE = 8  # of a selector's batch: 576 px are 6.6 times the pixels of 224


class TokenLabels:
    """Producer of token labels; see `Producer`.

    Args:
        labeler: answers.
        view_batch: the selector's batch size, of which a batch of whole images is a part.
    """

    name, whole = "token_labels", True

    def __init__(self, labeler: Labeler, view_batch: int) -> None:
        self.size: int | None = labeler.input_size
        self.batch_size = max(1, view_batch // VIEWS_AN_IMAGE)
        self.identity = labeler.identity(self.batch_size)
        self._labeler = labeler
        self._normalize = Normalize(labeler.mean, labeler.std, labeler.device)

    def submit(self, batch: list[Item]) -> tuple[Tensor, ...]:
        """Probabilities float32 and classes int64, [B, T, G, G] each."""
        return self._labeler.label(self._normalize(self.name, batch))

    def collect(self, batch: list[Item], results: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(probabilities, classes) of every image.

        Raises:
            TicketSetError: a probability that is no number.
        """
        answers = list(zip(*results, strict=True))
        for (image, _), (shares, _) in zip(batch, answers, strict=True):
            if not np.isfinite(shares).all():
                raise TicketSetError(
                    f"`token_labels`: expected finite probabilities, got {int((~np.isfinite(shares)).sum())} that are"
                    f" not for {image.row['source']}; are the model's weights sound?"
                )
        return answers

    def encode(self, image: Image, answers: list[tuple[np.ndarray, np.ndarray]]) -> Encoded:
        """One map an image; the row says nothing of it."""
        ((shares, classes),) = answers
        return encode_token_labels(shares, classes)
