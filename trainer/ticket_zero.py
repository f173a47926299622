"""Feed a ticket as an image: dropped patches show the mean colour. For CNNs and other models of whole images.

Nothing is saved by it: it is the paper's control of what a ticket holds, not of what it costs.
"""

from typing import Any

from torch import Tensor

from trainer.ticket_model import TicketModel
from trainer.ticket_vit import scatter_patches


class TicketZero(TicketModel):
    """Any timm classifier of images of whole_side pixels; zero is the mean colour, since pixels are normalised."""

    feed = "dropped patches show the mean colour"

    def __init__(self, model: Any, grid: tuple[int, int], patch_size: int, whole_side: int) -> None:
        super().__init__()
        self.model, self.grid, self.patch_size, self.whole_side = model, grid, patch_size, whole_side

    def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        return self.model(scatter_patches(patches, keep_indices, self.grid, self.patch_size))
