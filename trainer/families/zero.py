"""Feed a ticket as an image: dropped patches show the mean color. For CNNs and other models of whole images.

Nothing is saved by it: it is the paper's control of what a ticket holds, not of what it costs.
"""

from typing import Any

from torch import Tensor

from shards.errors import TicketSetError
from trainer.families.base import TicketModel
from trainer.families.patches import scatter_patches


class TicketZero(TicketModel):
    """Any timm classifier of images of whole_side pixels; zero is the mean color, since pixels are normalized.

    Raises:
        TicketSetError: a model of images of another size.
    """

    feed = "dropped patches show the mean color"

    def __init__(self, model: Any, grid: tuple[int, int], patch_size: int, whole_side: int) -> None:
        super().__init__()
        check_input(model, whole_side)
        self.model, self.grid, self.patch_size, self.whole_side = model, grid, patch_size, whole_side

    @classmethod
    def size_arguments(cls, model: Any, side: int) -> dict[str, Any]:
        """Nothing for models of any size."""
        return {"img_size": side} if model.pretrained_cfg.get("fixed_input_size") else {}

    @classmethod
    def wrap(cls, model: Any, feed: str, grid: tuple[int, int], patch_size: int, side: int) -> "TicketZero":
        return cls(model, grid, patch_size, side)

    def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        return self.model(scatter_patches(patches, keep_indices, self.grid, self.patch_size))


def check_input(model: Any, side: int) -> None:
    """
    Raises:
        TicketSetError: a model of images of another size, where it says which.
    """
    expected = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if expected is not None and tuple(expected) != (side, side):
        raise TicketSetError(
            f"model {type(model).__name__}: is for images of {expected[0]} px, but what it is fed has {side} px;"
            " leave img_size out of `model_kwargs`"
        )
