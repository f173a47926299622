"""What the trainer asks of a model that is fed tickets: one subclass a family, in a file of its own."""

import copy
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from shards.errors import TicketSetError
from trainer.options import PROTOCOLS


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
        one_length: it is built for tickets of one K.
        takes_places_twice: whether a ticket may hold two patches of one place, as of two views that are mixed by patches.
        wants_token_labels: whether `loss` has a use for mined token labels in the batch.
        extras: names of what forward takes of a batch beside patches and places, where the batch has it.
        protocols: how it is tested.
    """

    model: Any
    grid: tuple[int, int]
    patch_size: int
    whole_side: int
    wants_all = False
    one_length = False
    takes_places_twice = False
    wants_token_labels = False
    feed = ""
    extras: tuple[str, ...] = ()
    protocols: tuple[str, ...] = PROTOCOLS

    @classmethod
    def patch_of(cls, model: Any, patch_size: int) -> int:
        """Side in pixels of the patches that a timm model is fed, where those of the set are of `patch_size`.

        A ticket is places of a grid; a view cut into that grid may be rendered at any size.
        """
        return patch_size

    @classmethod
    def side_of(cls, tokens: int, img_size: int, patch_size: int) -> int:
        """Pixels of the whole views that a model is built for, where tickets are K patches of views of img_size pixels.

        Raises:
            TicketSetError: no model can take tickets of so many patches.
        """
        return img_size

    @classmethod
    def size_arguments(cls, model: Any, side: int) -> dict[str, Any]:
        """What timm.create_model must be told for whole views of `side` pixels; `model` is one of another size."""
        return {"img_size": side}

    @classmethod
    def wrap(cls, model: Any, feed: str, grid: tuple[int, int], patch_size: int, side: int) -> "TicketModel":
        """A timm model that takes tickets of views of (gh, gw) patches, and whole views of `side` pixels.

        Args:
            feed: the name under which trainer.families.registry knows this class.
        Raises:
            TicketSetError: it cannot take these.
        """
        return cls(model)

    @abstractmethod
    def forward(self, patches: Tensor, keep_indices: Tensor) -> Any:
        """[B, K, C*p*p] normalized pixels ([B, N, C*p*p] where `wants_all`) and [B, K] row-major places in [0, N).

        Where the whole view is `whole_side` pixels and K is all its patches, places count in that view's own grid.

        Returns:
            In eval mode logits [B, classes]; in training what `loss` takes.
        """

    def undropped(self) -> "TicketModel":
        """The same weights, with nothing dropped inside."""
        return self

    def tested(self) -> "TicketModel":
        """The same weights as they will be used when training is over; testing it changes nothing in this one."""
        return self

    def with_weights_of(self, model: Any) -> "TicketModel":
        """The same with another timm model of the same kind inside."""
        other = copy.copy(self)
        other._modules = {**self._modules, "model": model}
        return other

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


def square_side(tokens: int, num_patches: int, what: str) -> int:
    """m for K = m * m.

    Args:
        what: needs it, for the error.

    Raises:
        TicketSetError: K is no square; names the nearest that are.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        low = int(tokens**0.5)
        near = [str(m * m) for m in (low, low + 1) if m and m * m <= num_patches]
        raise TicketSetError(f"{what}: {tokens} is not a square; use `tokens` {' or '.join(near)}")
    return side
