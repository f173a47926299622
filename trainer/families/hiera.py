"""Feed a ticket to timm's Hiera through its own mask: a ticket's patches are its mask units, 32 pixels a side."""

from typing import Any

from timm.models import checkpoint_seq
from torch import Tensor

from shards.errors import TicketSetError
from trainer.families.base import TicketModel
from trainer.families.patches import scatter_patches


class TicketHiera(TicketModel):
    """Hiera drops units before its first block, as its own mask does; dropped pixels are not even given.

    Raises:
        TicketSetError: the set's patches are not the model's mask units, or the model drops units at random itself.
    """

    feed = "Hiera's own mask units"

    def __init__(self, model: Any, patch_size: int, whole_side: int) -> None:
        super().__init__()
        self.model, self.patch_size, self.whole_side = model, patch_size, whole_side
        self.grid = tuple(model.mask_spatial_shape)
        unit = whole_side // self.grid[0]
        if self.grid != tuple(s // patch_size for s in (whole_side, whole_side)) or unit != patch_size:
            raise TicketSetError(
                f"Hiera of {whole_side} px: expected tickets of its {self.grid[0]}x{self.grid[1]} mask units of {unit} px,"
                f" got patches of {patch_size} px; mine with datalth-mine --patch-size {unit}"
            )
        if model.patch_drop_rate:
            raise TicketSetError("model Hiera: patch_drop_rate drops units at random beside the tickets; leave it 0")

    @classmethod
    def wrap(cls, model: Any, feed: str, grid: tuple[int, int], patch_size: int, side: int) -> "TicketHiera":
        return cls(model, patch_size, side)

    def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        images = scatter_patches(patches, keep_indices, self.grid, self.patch_size)
        if keep_indices.shape[1] == self.grid[0] * self.grid[1]:
            return self.model(images)
        return self.model.forward_head(self._kept_features(images, keep_indices))

    def _kept_features(self, images: Tensor, keep_indices: Tensor) -> Tensor:
        """timm's forward_features with a mask. It takes the kept units by a boolean mask, whose count the host would wait
        for in every step; here by their places, in raster order as there."""
        model = self.model
        x = model.unroll(model._pos_embed(model.patch_embed(images)))  # [B, tokens of a unit * N, D]
        places = keep_indices.sort(1).values[:, None, :, None]
        units = x.unflatten(1, (model.mu_size, -1))
        x = units.gather(2, places.expand(-1, model.mu_size, -1, x.shape[-1])).flatten(1, 2)
        if model.grad_checkpointing:
            return checkpoint_seq(model.blocks, x)
        for block in model.blocks:
            x = block(x)
        return x
