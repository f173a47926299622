"""Feed a ticket to timm's Swin, unchanged: its K = m * m patches, in raster order, make a smaller image of m x m patches.

Windows and patch merging need a full grid, so patches move to other places than their own.
Source: Data-LTH (IJCAI 2023), section on Swin, and its public code's `small-dense`.
"""

from typing import Any

from torch import Tensor

from trainer.families.base import TicketModel, square_side
from trainer.families.patches import gather_patches, scatter_patches
from trainer.families.zero import check_input


class TicketSwin(TicketModel):
    """A timm model of images of whole_side = m * patch_size pixels; on all patches, it sees the view resized to that.

    Raises:
        TicketSetError: a model of images of another size.
    """

    one_length = True

    def __init__(self, model: Any, grid: tuple[int, int], patch_size: int, whole_side: int) -> None:
        super().__init__()
        check_input(model, whole_side)
        self.model, self.grid, self.patch_size, self.whole_side = model, grid, patch_size, whole_side
        self.side = whole_side // patch_size
        self.feed = f"tickets packed into {self.side} x {self.side} patches, {whole_side} px"

    @classmethod
    def side_of(cls, tokens: int, img_size: int, patch_size: int) -> int:
        return square_side(tokens, (img_size // patch_size) ** 2, "small-dense") * patch_size

    @classmethod
    def size_arguments(cls, model: Any, side: int) -> dict[str, Any]:
        """Windows shrink with the image, 1/8 of the patch grid a side as timm's 7 at 224 px, where that is whole.

        A window of 7 would be padded at 192 px, and save less than the tokens do.
        """
        window, odd = divmod(side // model.patch_embed.patch_size[0], 8)
        return {"img_size": side} | ({} if odd else {"window_size": window})

    @classmethod
    def wrap(cls, model: Any, feed: str, grid: tuple[int, int], patch_size: int, side: int) -> "TicketSwin":
        return cls(model, grid, patch_size, side)

    def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        order = keep_indices.argsort(1)
        packed = gather_patches(patches, order)
        places = order.sort(1).values  # 0 .. K-1
        return self.model(scatter_patches(packed, places, (self.side, self.side), self.patch_size))
