"""TicketLVViT: feed tickets to an LV-ViT, mixed by MixToken where asked for, and its loss on token labels.

The stem's convolutions overlap, so it takes a whole view and tokens are gathered after it. They can carry traces of
dropped neighbors (`late`, as in Data-LTH's code), or these are blanked before the stem (`early`).

MixToken (LV-ViT's own CutMix) puts the partner's tokens into a box, after the stem. Here a token of a ticket is a pair:
the image it comes from (`sources`) and its place. Pixels that may be seen, tokens, lambda and labels all follow from
these pairs, so that they cannot disagree. Image i's partner is i ^ 1.

Shapes: B images (even where they are mixed), N = gh * gw patches, K of them kept, F = 3*p*p values of a patch in the
order of trainer.families.patches.patchify, D width, C classes. A box is (top, bottom, left, right) in cells of the grid,
bottom and right excluded; it is empty where nothing is mixed.
"""

from typing import Any

import torch
from torch import Tensor

from shards.errors import TicketSetError
from shards.token_labels import UNIT
from trainer.data.token_labels import cut, smoothed
from trainer.families.base import TicketModel, soft_cross_entropy
from trainer.families.lvvit_model import LVViT
from trainer.families.patches import gather_patches, unpatchify

FEEDS = {
    "late": "whole views to the stem, a ticket's tokens after it",
    "early": "views with dropped patches in the mean color to the stem, a ticket's tokens after it",
}
Pair = tuple[Tensor, Tensor]


class TicketLVViT(TicketModel):
    """An LV-ViT that takes the patches of whole views and the places of those to keep.

    It wants all patches in both modes: `late` shows them to the stem, and under MixToken `early` shows those that either
    image of a pair uses, which are not K. So there is one way in, and the mask is made here.

    Args:
        model: LVViT; it is not changed.
        mode: of FEEDS.
    Raises:
        TicketSetError: another model, channels other than 3, an unknown mode.
    """

    wants_all = True
    wants_token_labels = True
    extras = ("box",)

    def __init__(self, model: Any, mode: str = "late") -> None:
        super().__init__()
        if not isinstance(model, LVViT):
            raise TicketSetError(f"model {type(model).__name__}: expected an LV-ViT, such as lvvit_s")
        if mode not in FEEDS:
            raise TicketSetError(f"LV-ViT: expected a mode of {', '.join(FEEDS)}, got {mode}")
        stem: Any = model.patch_embed
        if stem.conv1.in_channels != 3:
            raise TicketSetError(f"model LVViT: expected 3 input channels, got {stem.conv1.in_channels}")
        self.model, self.mode, self.feed = model, mode, FEEDS[mode]
        self.grid, self.patch_size = tuple(stem.grid_size), stem.patch_size[0]
        self.whole_side = self.grid[0] * self.patch_size

    @classmethod
    def wrap(cls, model: Any, feed: str, grid: tuple[int, int], patch_size: int, side: int) -> "TicketLVViT":
        return cls(model, feed)

    def forward(self, patches: Tensor, keep_indices: Tensor, box: Tensor | None = None) -> Tensor | Pair:
        """
        Args:
            patches: [B, N, F] normalized pixels of whole views, row-major, not mixed.
            keep_indices: int64 [B, K] places of the tickets; with a box, of the mixed ones (`trainer.data.mixing.mixed_tickets`).
            box: int64 [4], the box of MixToken.
        Returns:
            In eval mode logits [B, C]; in training class logits [B, C] and dense logits [B, K, C] in the order of
            keep_indices.
        Raises:
            TicketSetError: not all patches of the views.
        """
        if patches.shape[1] != self.grid[0] * self.grid[1]:
            raise TicketSetError(
                f"LV-ViT: expected all {self.grid[0] * self.grid[1]} patches of each view, got {patches.shape[1]}"
            )
        source = sources(keep_indices, box, self.grid[1])
        if self.mode == "early":
            patches = blank_unused(patches, keep_indices, source)
        tokens = self.model.patch_embed(unpatchify(patches, self.grid, self.patch_size))
        tokens = gather_patches(tokens, keep_indices) if box is None else tokens[source, keep_indices]
        logits = self.model.forward_tokens(tokens, keep_indices)
        return logits if self.model.training else LVViT.combine(*logits)

    def loss(self, outputs: Pair, targets: Tensor, batch: dict[str, Tensor], smoothing: float) -> Tensor:
        """Mean loss of a batch: `token_loss` where it holds token labels, else on the logits that evaluation reads.

        The public recipe for the second case (--dense-weight 0) trains the class logits alone, and evaluation still
        adds the dense ones, of a head that gets no gradient.

        Args:
            outputs: of forward in training.
            targets: [B, C], soft; under MixToken mixed by the lambda of `mixed_tickets`.
            batch: with token labels, token_labels int [B, 2, T, G, G], boxes float [B, 4] and flips [B] as `cut` takes.
            smoothing: of token labels, as LV-ViT's.
        """
        if "token_labels" not in batch:
            return soft_cross_entropy(LVViT.combine(*outputs), targets)
        keep, units = batch["keep_indices"], batch["token_labels"]
        values, ids = units[:, 0].float() / UNIT, units[:, 1]
        with torch.autocast(units.device.type, enabled=False):
            dense, whole = cut(values, ids, batch["boxes"], batch["flips"], self.grid, targets.shape[1])
        source = sources(keep, batch.get("box"), self.grid[1])
        wanted = ticket_targets(smoothed(whole, smoothing), smoothed(dense, smoothing), keep, source)
        return self.token_loss(outputs, *wanted)

    def token_loss(self, outputs: Pair, class_targets: Tensor, dense_targets: Tensor) -> Tensor:
        """LV-ViT's loss with token labels: class logits and dense logits each against their own, with equal weight.

        Args:
            outputs: of forward in training.
            class_targets: [B, C], soft.
            dense_targets: [B, K, C], soft, of the ticket's tokens alone; both as `ticket_targets` gives them.
        """
        class_logits, dense_logits = outputs
        return soft_cross_entropy(class_logits, class_targets) + soft_cross_entropy(dense_logits, dense_targets)


def sources(keep_indices: Tensor, box: Tensor | None, grid_width: int) -> Tensor:
    """int64 [B, K]: the image that each token comes from, the partner inside the box."""
    own = torch.arange(len(keep_indices), device=keep_indices.device)[:, None].expand_as(keep_indices)
    if box is None:
        return own
    top, bottom, left, right = box.unbind()
    row, column = keep_indices // grid_width, keep_indices % grid_width
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return torch.where(inside, own ^ 1, own)


def blank_unused(patches: Tensor, keep_indices: Tensor, source: Tensor) -> Tensor:
    """[B, N, F] -> the same with zeros, the mean color, where no ticket takes its token from.

    An image shows its own kept patches outside the box and those that its partner takes from it inside.
    """
    used = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    used[source, keep_indices] = True
    return patches.masked_fill(~used[:, :, None], 0)


def ticket_targets(
    class_targets: Tensor, dense_targets: Tensor, keep_indices: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    """The targets of tickets, from those of whole views that are not mixed.

    Args:
        class_targets: [B, C].
        dense_targets: [B, N, C], row-major.
        keep_indices: [B, K].
        source: [B, K], of `sources`.
    Returns:
        [B, C], mixed by the share of tokens that are the image's own, and [B, K, C], each of where its token is from.
    """
    own = torch.arange(len(source), device=source.device)
    share = (source == own[:, None]).to(class_targets).mean(1)[:, None]
    partner = (own ^ 1).clamp_max(len(own) - 1)  # the last of an odd batch, which cannot be mixed, has none
    mixed = share * class_targets + (1 - share) * class_targets[partner]
    return mixed, dense_targets[source, keep_indices]
