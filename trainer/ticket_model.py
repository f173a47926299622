"""What the trainer asks of a model that is fed tickets: one subclass a family, in a file of its own."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class TicketModel(nn.Module, ABC):
    """A timm model behind a stem that takes patches and their places.

    Attributes:
        model: timm's; its state_dict is what checkpoints hold.
        grid: (gh, gw) of the views that tickets are cut from.
        patch_size: in pixels.
        whole_side: pixels of the whole view that it takes where all patches are fed; the views' own side, but for
            a model that packs its tickets into a smaller image.
        wants_all: whether forward is given all N patches of a view beside the places of the K kept ones.
        feed: what a ticket becomes for this model, in words.
        wants_token_labels: whether `loss` has a use for mined token labels in the batch.
        extras: names of what forward takes of a batch beside patches and places, where the batch has it.
    """

    model: Any
    grid: tuple[int, int]
    patch_size: int
    whole_side: int
    wants_all = False
    wants_token_labels = False
    feed = ""
    extras: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, patches: Tensor, keep_indices: Tensor) -> Any:
        """[B, K, C*p*p] normalised pixels ([B, N, C*p*p] where `wants_all`) and [B, K] row-major places in [0, N).

        Where the whole view is `whole_side` pixels and K is all its patches, places count in that view's own grid.

        Returns:
            In eval mode logits [B, classes]; in training what `loss` takes.
        """

    def loss(self, outputs: Any, targets: Tensor, batch: dict[str, Tensor], smoothing: float) -> Tensor:
        """Mean loss of a batch.

        Args:
            outputs: of forward in training.
            targets: [B, classes], soft, smoothed and mixed.
            batch: of the feed, on the device; a family may find more there.
            smoothing: of labels that stand in the batch.
        """
        return soft_cross_entropy(outputs, targets)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """As timm's SoftTargetCrossEntropy; with smoothed one-hot targets as its LabelSmoothingCrossEntropy."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()
