"""CoarseViT: shown whole views in fewer, coarser patches first, and in all of them at last: a curriculum of resolution."""

from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from miner.attention import is_eva
from shards.errors import TicketSetError
from trainer.families.vit import TicketViT


class CoarseViT(TicketViT):
    """A timm ViT of whole views at two sizes. On the coarser one its position embeddings are resampled on the way, and learn
    through that, so that its weights are those of the full size at any time.

    Args:
        model: timm VisionTransformer, of the full size.
        grid: (m, m), the coarser.
    Raises:
        TicketSetError: a model that cannot take tickets, or with rotary positions.
    """

    feed = "whole views in coarser patches, with position embeddings resampled to them, then in all patches"

    def __init__(self, model: Any, grid: tuple[int, int]) -> None:
        super().__init__(model)
        if is_eva(model):
            raise TicketSetError(f"`unmask_epochs` with `resize_to_tokens`: expected a ViT, got {type(model).__name__}")
        self._whole, self.grid = self.grid, grid

    def _table(self, count: int) -> Tensor:
        table = super()._table(count)
        if count == self._whole[0] * self._whole[1]:
            return table
        prefix = self.model.num_prefix_tokens
        return resample_abs_pos_embed(table, list(self.grid), list(self._whole), num_prefix_tokens=prefix)
