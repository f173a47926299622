"""Feed a ticket to timm's Swin, unchanged: its K = m * m patches, in raster order, make a smaller image of m x m patches.

The paper's `small-dense`. Windows and patch merging need a full grid, so patches move to other places than their own.
"""

from typing import Any

from torch import Tensor

from shards.errors import TicketSetError
from trainer.ticket_model import TicketModel
from trainer.ticket_vit import gather_patches, scatter_patches


class TicketSwin(TicketModel):
    """A timm model of images of whole_side = m * patch_size pixels; on all patches, it sees the view resized to that."""

    def __init__(self, model: Any, grid: tuple[int, int], patch_size: int, whole_side: int) -> None:
        super().__init__()
        self.model, self.grid, self.patch_size, self.whole_side = model, grid, patch_size, whole_side
        self.side = whole_side // patch_size
        self.feed = f"tickets packed into {self.side} x {self.side} patches, {whole_side} px"

    def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        order = keep_indices.argsort(1)
        packed = gather_patches(patches, order)
        places = order.sort(1).values  # 0 .. K-1
        return self.model(scatter_patches(packed, places, (self.side, self.side), self.patch_size))


def packed_side(tokens: int, num_patches: int) -> int:
    """m for K = m * m.

    Raises:
        TicketSetError: K is no square; names the nearest that are.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        low = int(tokens**0.5)
        near = [str(m * m) for m in (low, low + 1) if m and m * m <= num_patches]
        raise TicketSetError(
            f"small-dense: {tokens} tokens are no square, so that they fill no image; choose --tokens {' or '.join(near)}"
        )
    return side
