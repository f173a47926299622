"""TicketViT: feed the patches of a ticket to a timm Vision Transformer. The only file that knows timm's insides.

timm's order is patch_embed -> _pos_embed -> patch_drop -> norm_pre -> blocks. Dropping tokens in timm's
`patch_drop` slot equals dropping the pixels before a linear stem, and the second is what a lean trainer
wants. `_pos_embed` is affine in its input, so one call of it on zeros gives prefix tokens and the position
table of every variant (registers, distillation token, no_embed_class, dynamic_img_size).

Shapes: B images, K kept patches, N = gh * gw patches, P prefix tokens, D width, C*p*p values of a patch in
the order of the stem's weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from miner.attention import is_eva
from shards.errors import TicketSetError
from trainer.families.base import TicketModel
from trainer.families.patches import gather_patches, scatter_patches


class TicketViT(TicketModel):
    """A timm ViT that takes patches and their places instead of an image.

    Args:
        model: timm VisionTransformer with a linear patch stem, or an Eva. It is not changed (an Eva's empty
            patch_drop slot is filled, which adds no parameter), and its state_dict is what checkpoints hold.
    Raises:
        TicketSetError: a model that cannot take tickets.
    """

    feed = "patches are gathered before the patch embedding, each at its own position"

    def __init__(self, model: Any) -> None:
        super().__init__()
        check_model(model)
        self.model = model
        self.grid = tuple(model.patch_embed.grid_size)
        self.patch_size = model.patch_embed.patch_size[0]
        self.whole_side = self.grid[0] * self.patch_size
        self.takes_places_twice = not is_eva(model)  # which scatters patches over a view
        if is_eva(model):
            model.patch_drop = _Slot(model.num_prefix_tokens)

    @classmethod
    def patch_of(cls, model: Any, patch_size: int) -> int:
        """Its own: of a set of 14 x 14 patches of 16 px (224 px), a DINOv2 is fed 14 x 14 of 14 px (196 px)."""
        check_model(model)
        return int(model.patch_embed.patch_size[0])

    def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        """[B, K, C*p*p] normalized pixels and [B, K] row-major places in [0, N) -> logits [B, classes].

        In training a distilled model in distilled_training mode gives its pair of logits, as timm's does.
        """
        if is_eva(self.model):
            self.model.patch_drop.keep_indices = keep_indices
            return self.model(scatter_patches(patches, keep_indices, self.grid, self.patch_size))
        model = self.model
        x = model.norm_pre(self._embed(patches, keep_indices))
        if model.grad_checkpointing and self.training:
            from timm.models import checkpoint_seq

            x = checkpoint_seq(model.blocks, x)
        else:
            x = model.blocks(x)
        return model.forward_head(model.norm(x))

    def _embed(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        """[B, P + K, D]: prefix tokens, then embedded patches at their own positions."""
        stem, prefix = self.model.patch_embed, self.model.num_prefix_tokens
        weight, table = stem.proj.weight.flatten(1), self._table(patches.shape[1])
        x = stem.norm(nn.functional.linear(patches, weight, stem.proj.bias)) + table[0, prefix:][keep_indices]
        return torch.cat([table[:, :prefix].expand(len(x), -1, -1).to(x.dtype), x], dim=1)

    def _table(self, count: int) -> Tensor:
        """[1, P + N, D]: prefix tokens and the positions of all places, for an input of `count` patches."""
        model, weight, (rows, columns) = (
            self.model,
            self.model.patch_embed.proj.weight,
            self.model.patch_embed.grid_size,
        )
        shape = (rows, columns) if model.dynamic_img_size else (rows * columns,)
        table: Tensor = model._pos_embed(weight.new_zeros(1, *shape, len(weight)))
        return table


class _Slot(nn.Module):
    """Stands in an Eva's patch_drop slot and keeps the given patches; RoPE follows the indices it returns."""

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.keep_indices: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        keep = self.keep_indices
        if keep is None:
            return x, None
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, gather_patches(patches, keep)], dim=1), keep


def check_model(model: Any) -> None:
    """Refuse models whose forward would not equal timm's on these tokens.

    Raises:
        TicketSetError: says what the model lacks.
    """
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    name = type(model).__name__
    if not (isinstance(model, VisionTransformer) or is_eva(model)):
        raise TicketSetError(f"model {name}: cannot take tickets; expected a timm VisionTransformer or Eva")
    stem: Any = getattr(model.patch_embed, "proj", None)
    size = tuple(model.patch_embed.patch_size)
    linear = (
        isinstance(model.patch_embed, PatchEmbed)
        and isinstance(stem, nn.Conv2d)
        and stem.kernel_size == stem.stride == size
        and stem.padding == (0, 0)
    )
    if not linear or size[0] != size[1] or stem.groups != 1:
        raise TicketSetError(f"model {name}: expected a patch stem of one square convolution without overlap")
    if stem.in_channels != 3:
        raise TicketSetError(f"model {name}: expected 3 input channels, got {stem.in_channels}")
    if not model.global_pool:
        raise TicketSetError(f"model {name}: expected a head that pools the tokens, got global_pool ''")
    if model.patch_embed.grid_size is None:
        raise TicketSetError(f"model {name}: expected a fixed patch grid; build it with img_size")
    if model.pos_drop.p:
        raise TicketSetError(f"model {name}: expected no dropout of position embeddings, got {model.pos_drop.p}")
    if not is_eva(model) and not isinstance(model.patch_drop, nn.Identity):
        raise TicketSetError(f"model {name}: patch_drop_rate drops patches at random beside the tickets; leave it 0")
