"""DroppingViT: a ViT that drops patches inside, as EViT; what a ticket selector is fine-tuned as.

Source: EViT (Liang et al., ICLR 2022), its paper and public code (github.com/youweiliang/evit, evit.py and helpers.py).
The model stays timm's, so that a checkpoint of it is what `datalth-mine --weights` takes. Scores and their order are
the miner's, so that without a fused token the survivors of a forward are the ticket that evit mines with these weights.

Shapes: B images, N = gh * gw patches, P prefix tokens, n candidates of a drop block (patches, perhaps a fused token),
K survivors, D width.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miner.attention import check_model, class_attention, descending, is_eva, name_of
from miner.drop import DEFAULT_KEEP_RATE, check_blocks, default_blocks, keep_counts
from shards.errors import TicketSetError
from trainer.families.patches import gather_patches, scatter_patches
from trainer.families.vit import TicketViT
from trainer.hooks import Hook
from trainer.options import Dropping

FUSED = -1  # the place of a fused token, which has none


class DroppingViT(TicketViT):
    """A TicketViT whose drop blocks keep the ceil(keep_rate * n) patches that the class token attends to most.

    It is given all N patches of a view. Prefix tokens are never dropped; EViT's code lets a distillation token compete.

    Args:
        model: timm VisionTransformer with a class token and timm's own blocks.
        drop_blocks: 0-based, ascending; None: quarter points, as the miner's evit.
        keep_rate: of each drop block, in (0, 1].
        fuse_token: append the attention-weighted sum of the dropped, and carry it on.
    Attributes:
        drops: False: what it is given passes all blocks, as in a TicketViT; that may be a ticket. See `undropped`.
        keep_rate: as given; `set_rate` may let it keep more for a while.
    Raises:
        TicketSetError: a model that cannot take tickets or has no class token, blocks that it lacks, a bad keep rate.
    """

    protocols = ("dropped", "all")

    def __init__(
        self,
        model: Any,
        drop_blocks: Sequence[int] | None = None,
        keep_rate: float = DEFAULT_KEEP_RATE,
        fuse_token: bool = False,
    ) -> None:
        super().__init__(model)
        check_model(model, self.grid)
        if is_eva(model) or model.cls_token is None:
            raise TicketSetError(
                f"model {name_of(model)}: cannot drop patches inside; expected a timm VisionTransformer with a class token"
            )
        depth = len(model.blocks)
        blocks = default_blocks(depth) if drop_blocks is None else tuple(drop_blocks)
        check_blocks(blocks, depth)
        self.feed = f"patches, of which blocks {', '.join(map(str, blocks))} drop some"
        self.drop_blocks = blocks
        self.fuse_token = fuse_token
        self.drops = True
        self.keep_rate = keep_rate
        self.set_rate(keep_rate)

    def set_rate(self, rate: float) -> None:
        """Of every drop block, from the next forward on.

        Raises:
            TicketSetError: not in (0, 1].
        """
        try:
            keep_counts(1, rate)
        except ValueError as error:
            raise TicketSetError(f"`keep_rate` {rate}: {error}") from None
        self._rate = rate

    def undropped(self) -> "DroppingViT":
        plain = copy.copy(self)
        plain.drops = False
        return plain

    def tested(self) -> "DroppingViT":
        """At its final keep rate, whatever it has come down to."""
        final = copy.copy(self)
        final.set_rate(self.keep_rate)
        return final

    def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        """As TicketViT's: [B, N, C*p*p] normalized pixels and [B, N] row-major places -> logits [B, classes].

        Raises:
            ValueError: not all patches, though `drops`.
        """
        if not self.drops:
            return super().forward(patches, keep_indices)
        x, _ = self._run(patches, keep_indices, len(self.model.blocks))
        return self.model.forward_head(self.model.norm(x))

    @torch.no_grad()
    def survivors(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        """Places of what the last drop block keeps, most attended first: a view's ticket. Arguments as forward's.

        Returns:
            int64 [B, K]; FUSED stands for the fused token of an earlier drop block, where that is kept.
        """
        last = self.drop_blocks[-1]
        x, places = self._run(patches, keep_indices, last)
        order = descending(self._scores(self.model.blocks[last], x))
        return places.gather(1, order[:, : self._count(last, places.shape[1])])

    def _embed(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        """[B, P + K, D]; all N patches are put in raster order, and go through timm's stem.

        TicketViT's own embedding of them differs from it in the last bit, which under bf16 makes other survivors than
        the miner's: 1 % of them, measured with random weights.
        """
        if not self._is_whole(patches):
            return super()._embed(patches, keep_indices)
        images = scatter_patches(patches, keep_indices, self.grid, self.patch_size)
        return self.model._pos_embed(self.model.patch_embed(images))

    def _is_whole(self, patches: Tensor) -> bool:
        return patches.shape[1] == math.prod(self.grid)

    def _run(self, patches: Tensor, keep_indices: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Everything before block `stop`: [B, P + n, D], and the places [B, n] of what is left, in raster order."""
        if not self._is_whole(patches):
            raise ValueError(f"expected all {math.prod(self.grid)} patches to drop some of, got {patches.shape[1]}")
        x = self.model.norm_pre(self._embed(patches, keep_indices))
        places = torch.arange(patches.shape[1], device=x.device).expand(len(x), -1)
        for number in range(stop):
            if self.model.grad_checkpointing and self.training:
                x, places = checkpoint(self._block, number, x, places, use_reentrant=False)
            else:
                x, places = self._block(number, x, places)
        return x, places

    def _block(self, number: int, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """One block, by its halves where it drops, since a fused token is made of what attention gives.

        Like EViT, nothing is scored or fused where ceil(r * n) = n.
        """
        block, count = self.model.blocks[number], self._count(number, places.shape[1])
        if count == places.shape[1]:
            return block(x), places
        scores = self._scores(block, x)
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x, places = self._drop(x, places, scores, count)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), places

    def _count(self, number: int, candidates: int) -> int:
        """How many of its candidates a block keeps."""
        return keep_counts(candidates, self._rate, 1)[0] if number in self.drop_blocks else candidates

    def _scores(self, block: Any, x: Tensor) -> Tensor:
        """[B, P + n, D] at a block's input -> [B, n], at least float32; a fused token alone gives them gradients."""
        scores = class_attention(block, x)[:, self.model.num_prefix_tokens :]
        return scores if self.fuse_token else scores.detach()

    def _drop(self, x: Tensor, places: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keep `count` of the candidates, in the order in which they stand, so that ties go to the lower patch.

        The fused token is the sum of the dropped ones weighted by their scores, which are not normalized anew: small,
        where little attention went. At the next drop block it is a candidate like any patch: it counts in n, stands
        behind all patches, and is kept, or fused again, by its own score. All this is EViT's code.
        """
        prefix, order = self.model.num_prefix_tokens, descending(scores)
        kept = order[:, :count].sort(dim=1).values
        tokens = [x[:, :prefix], gather_patches(x[:, prefix:], kept)]
        places = places.gather(1, kept)
        if self.fuse_token:
            dropped = order[:, count:]
            weights = scores.gather(1, dropped)[:, :, None]
            tokens.append((weights * gather_patches(x[:, prefix:], dropped)).sum(1, keepdim=True).to(x.dtype))
            places = torch.nn.functional.pad(places, (0, 1), value=FUSED)
        return torch.cat(tokens, dim=1), places


def keep_rate_at(update: float, first: int, last: int, keep_rate: float) -> float:
    """EViT's schedule: 1 before update (or epoch) `first`, then half a cosine down to keep_rate, which holds from `last` on.

    EViT trains from scratch with 300 epochs, first = 10 and last = 110 of them; it fine-tunes with first = last = 0.

    >>> [round(keep_rate_at(update, 10, 110, 0.7), 4) for update in (0, 10, 60, 110)]
    [1.0, 1.0, 0.85, 0.7]
    """
    if update < first:
        return 1.0
    if update >= last:
        return keep_rate
    return keep_rate + (1 - keep_rate) * (math.cos(math.pi * (update - first) / (last - first)) + 1) / 2


class FallingKeepRate(Hook):
    """Lets a selector drop more and more; a function of the update, so that going on after a stop is exact.

    Args:
        dropping: from which epoch on, and over how many.
    """

    def __init__(self, dropping: Dropping) -> None:
        self._first, self._epochs = dropping.shrink_start_epoch, dropping.shrink_epochs

    def before_step(self, trainer: Any, update: int) -> None:
        first, last = self._first * trainer.steps, (self._first + self._epochs) * trainer.steps
        trainer.student.set_rate(keep_rate_at(update, first, last, trainer.student.keep_rate))
