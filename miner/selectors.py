"""Ticket selectors: images -> rankings of their patches.

A method is one function `(selector, images, seeds) -> (ranking [B, N], scores [B, N])`;
`register_method` adds one, and `--method module:function` takes it from any importable module.

Sources: evit: EViT (ICLR 2022) section 3.1 as Data-LTH's public code uses it (no fused token);
cls-attention: DINO (ICCV 2021); rollout: Abnar and Zuidema (ACL 2020); pool-attention: SigLIP's pooling head (ICCV 2023);
entropy: APT's score of a patch (Choudhury et al., Accelerating Vision Transformers with Adaptive Patch Sizes, ICLR 2026).

Shapes: B images, N patches, P prefix tokens, T = P + N tokens at most, D width, h heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miner.attention import (
    check_model,
    class_attention,
    descending,
    embed,
    latent_attention,
    mean_attention,
    name_of,
    rope_of,
    run_blocks,
)
from miner.drop import check_blocks, default_blocks
from shards.errors import TicketSetError
from shards.flags import function_of
from shards.views import center_distance

Model = Any  # a timm VisionTransformer or Eva; torch would type each of its attributes Tensor | Module
Method = Callable[["Selector", Any, list[int] | None], tuple[Tensor, Tensor]]
METHODS: dict[str, Method] = {}
BLIND = {"random", "center", "masks"}  # look at no pixels of the image, let alone a model's
MODEL_FREE = BLIND | {"entropy"}  # and these at pixels alone
READS = {"evit": "cls_token", "cls-attention": "cls_token", "rollout": "cls_token", "pool-attention": "attn_pool"}


def register_method(name: str, needs_model: bool = False) -> Callable[[Method], Method]:
    """Make a function a selector method under a name.

    Args:
        name: for `method` and `create_selector`.
        needs_model: without a model it cannot rank; `method` then loads `selector`'s, typed or not. A function of
            `module:function` says the same by an attribute, `function.needs_model = True`.
    """

    def add(function: Method) -> Method:
        if needs_model:
            function.needs_model = True  # type: ignore[attr-defined]
        METHODS[name] = function
        return function

    return add


def find_method(name: str) -> Method:
    """A registered method, or the function of `module:function`, registered from now on.

    Raises:
        TicketSetError: there is none.
    """
    if ":" in name and name not in METHODS:
        METHODS[name] = function_of(name, "method")
    if name not in METHODS:
        raise TicketSetError(f"`method` {name}: expected one of {', '.join(METHODS)}, or module:function")
    return METHODS[name]


def needs_model(name: str) -> bool:
    """Whether a method cannot rank without a model.

    Raises:
        TicketSetError: see `find_method`.
    """
    return bool(getattr(find_method(name), "needs_model", False))


@dataclass(frozen=True, slots=True)
class Selector:
    """Ranks patches. Build it with `create_selector`.

    Attributes:
        method: its name.
        model: timm VisionTransformer or Eva in eval mode; None for a method that was given none.
        grid: (gh, gw).
        blocks: where scores are taken.
        counts: patches kept after each of evit's stages; the last is K.
        device: where it computes.
        amp: bf16 autocast of the model; scores stay float32.
    """

    method: str
    model: Model
    grid: tuple[int, int]
    blocks: tuple[int, ...]
    counts: tuple[int, ...]
    device: torch.device
    amp: bool = False

    @property
    def num_patches(self) -> int:
        """N = gh * gw"""
        return self.grid[0] * self.grid[1]

    @property
    def k(self) -> int:
        """K, patches in a ticket."""
        return self.counts[-1]

    def rank(self, images: Tensor | None, seeds: list[int] | None = None) -> Tensor:
        """Rank the patches of a batch.

        Args:
            images: [B, 3, S, S], normalized with the model's mean and std, S = grid * the model's patch size; without
                a model in [0, 1], at the set's `img_size`; for `masks` the object's share of each patch, [B, N].
            seeds: one a row, for `random` and `masks`.
        Returns:
            int64 [B, N] patch indices, row-major, most informative first; a permutation in each row.
        """
        return self.rank_and_score(images, seeds)[0]

    @torch.inference_mode()
    def rank_and_score(self, images: Tensor | None, seeds: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """`rank`, and float [B, N] scores by which the patches of an image can be compared.

        Scores are those of the method's first look at all N patches (evit: the first stage's attention).
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return METHODS[self.method](self, images, seeds)


def create_selector(
    method: str,
    model: Model | None,
    grid: tuple[int, int],
    counts: tuple[int, ...],
    blocks: tuple[int, ...] | None = None,
    device: str | torch.device = "cpu",
    amp: bool = False,
    compile: bool = False,
) -> Selector:
    """A selector whose arguments fit each other.

    Args:
        method: evit, cls-attention, rollout, pool-attention, entropy, masks, random, center, a registered name, or
            module:function.
        model: timm VisionTransformer or Eva of this grid; None where the method needs none.
        grid: (gh, gw) of the tickets.
        counts: `miner.drop.keep_counts` of N; for evit one a block.
        blocks: 0-based; None = quarter points for evit, none for pool-attention, the last block for the others.
        device: to compute on.
        amp: bf16 autocast.
        compile: torch.compile the model's blocks.
    Raises:
        TicketSetError: unknown method, a block the model lacks, a model without what the method reads or of another grid.
    """
    needed = needs_model(method)
    if method in BLIND:
        return Selector(method, None, grid, (), counts, torch.device("cpu"))
    device = torch.device(device)
    if model is None:
        if needed:
            raise TicketSetError(f"`method` {method}: needs a selector model")
        torch.empty(0, device=device)  # is it there?
        return Selector(method, None, grid, (), counts, device, amp)
    check_model(model, grid)
    _check_reads(model, method)
    blocks = _blocks(method, blocks, len(model.blocks))
    if method == "evit" and len(counts) != len(blocks):
        raise TicketSetError(f"evit: expected a keep count for each of {len(blocks)} blocks, got {len(counts)}")
    if method in ("cls-attention", "rollout") and len(blocks) != 1:
        raise TicketSetError(f"`method` {method}: expected one block in `drop_blocks`, got {len(blocks)}")
    model = model.eval().to(device)
    if compile:
        for block in model.blocks[: blocks[-1] + 1] if blocks else model.blocks:
            block.compile(dynamic=True)
    return Selector(method, model, grid, blocks, counts, device, amp)


def _check_reads(model: Model, method: str) -> None:
    """Refuse a model without the class token, or the pooling head of attention, that a method reads."""
    from timm.layers import AttentionPoolLatent

    there = {
        "cls_token": getattr(model, "cls_token", None) is not None,
        "attn_pool": type(getattr(model, "attn_pool", None)) is AttentionPoolLatent,
    }
    needed = READS.get(method)
    if needed is None or there[needed]:
        return
    what = {"cls_token": "a class token", "attn_pool": "a pooling head of attention, as SigLIP's"}[needed]
    fit = [name for name, other in READS.items() if there[other]]
    instead = f"; what it has serves `method` {' or '.join(fit)}" if fit else ""
    raise TicketSetError(
        f"selector {name_of(model)}: `method` {method} expects a model with {what}, got one without{instead}"
    )


def _blocks(method: str, blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """Where scores are taken, checked."""
    if method == "pool-attention":
        if blocks:
            raise TicketSetError(f"`drop_blocks`: `method` {method} looks behind the last block; leave it out")
        return ()
    if blocks is None:
        blocks = default_blocks(depth) if method == "evit" else (depth - 1,)
    check_blocks(blocks, depth)
    return tuple(blocks)


@register_method("evit", needs_model=True)
def evit(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """The paper's selector: at each drop block keep the patches that the class token attends to most.

    The ranking is the first K by the last stage's attention, then what was dropped at the last stage,
    the one before, and so on, each by the attention that dropped it. A token is dropped after its block
    rather than between attention and MLP: the MLP works token by token, so survivors are the same.
    """
    model, prefix = selector.model, selector.model.num_prefix_tokens
    x, rope = embed(model, images)
    patches = torch.arange(selector.num_patches, device=x.device).expand(len(x), -1)  # [B, n] survivors
    dropped: list[Tensor] = []
    scores: list[Tensor] = []
    start = 0
    for block, count in zip(selector.blocks, selector.counts, strict=True):
        x = run_blocks(model, x, rope, start, block)
        attention = class_attention(model.blocks[block], x, rope_of(rope, block))[:, prefix:]
        scores.append(attention)
        order = descending(attention)
        if block == selector.blocks[-1]:
            dropped.append(patches.gather(1, order))  # the kept and the last dropped, by the same attention
            break
        x = run_blocks(model, x, rope, block, block + 1)
        dropped.append(patches.gather(1, order[:, count:]))
        kept = order[:, :count].sort(dim=1).values  # raster order, so that ties go to the lower patch
        patches = patches.gather(1, kept)
        rows = kept[:, :, None].expand(-1, -1, x.shape[2])
        x = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, rows)], dim=1)
        if rope is not None:  # the survivors' own
            rope = rope.take_along_dim(kept[None, :, None, :, None], dim=3)
        start = block + 1
    return torch.cat(dropped[::-1], dim=1), scores[0]


@register_method("cls-attention", needs_model=True)
def cls_attention(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """Head-mean attention of the class token at one block, all patches present."""
    model, (block,) = selector.model, selector.blocks
    x, rope = embed(model, images)
    x = run_blocks(model, x, rope, 0, block)
    scores = class_attention(model.blocks[block], x, rope_of(rope, block))[:, model.num_prefix_tokens :]
    return descending(scores), scores


@register_method("rollout", needs_model=True)
def rollout(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """Attention rollout from block 0 to one block: the product of (A + I) / 2, head means, class token's row."""
    model, (last,) = selector.model, selector.blocks
    x, rope = embed(model, images)
    identity = torch.eye(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    flow = identity
    for i in range(last + 1):
        attention = mean_attention(model.blocks[i], x, rope_of(rope, i))  # [B, T, T]
        with torch.autocast(x.device.type, enabled=False):
            flow = (attention + identity) / 2 @ flow
        if i < last:
            x = run_blocks(model, x, rope, i, i + 1)
    scores = flow[:, 0, model.num_prefix_tokens :]
    return descending(scores), scores


@register_method("pool-attention", needs_model=True)
def pool_attention(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """Head-mean attention of the pooling head's query, of a model that pools its patches by attention."""
    model = selector.model
    x, rope = embed(model, images)
    scores = latent_attention(model, run_blocks(model, x, rope, 0, len(model.blocks)))
    return descending(scores), scores


@register_method("entropy")
def entropy(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """Bits of a patch's gray levels, as APT's public code counts them (rccchoudhury/apt, `entropy_utils.py`).

    Gray is .2989 R + .5870 G + .1140 B, in 512 bins from 0 to 255. It is all in whole numbers, as is what is compared, so
    that neither a batch nor a device changes a ranking.
    """
    b, (rows, columns) = len(images), selector.grid
    weights = torch.tensor([2989, 5870, 1140], device=images.device)
    gray = ((images * 255).round().long() * weights[:, None, None]).sum(1)  # [B, S, S], in 1 / 10000 of a level
    cells = gray.view(b, rows, gray.shape[1] // rows, columns, -1).transpose(2, 3).flatten(3).flatten(0, 2)
    size = cells.shape[1]  # pixels of a patch
    counts = torch.zeros(len(cells), 512, dtype=torch.int64, device=images.device)  # [B * N, 512]
    counts.scatter_add_(1, cells * 512 // (255 * 10_000), torch.ones_like(cells))
    # With c pixels in a bin, bits = log2(size) - sum of c log2(c) / size; in 2^-32 of a pixel's bit.
    some = np.arange(1, size + 1)
    terms = torch.from_numpy(np.rint([0, *some * np.log2(some) * 2.0**32]).astype(np.int64)).to(images.device)
    found = (terms[-1] - terms[counts].sum(1)).view(b, -1)
    return descending(found), found.float() / (size * 2.0**32)


@register_method("random")
def random(selector: Selector, images: Tensor | None, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """A uniform ranking a row, a pure function of its seed."""
    if seeds is None:
        raise ValueError("random: expected a seed for each row")
    bits = [np.random.Philox(key=seed).random_raw(selector.num_patches) >> 11 for seed in seeds]
    scores = torch.from_numpy(np.stack(bits).astype(np.float64) * 2.0**-53)
    return descending(scores), scores


@register_method("masks")
def masks(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """By how much of a patch lies on the object; equal patches, the background's, as `random` has them: by no place."""
    order, _ = random(selector, None, seeds)
    return order.gather(1, descending(images.gather(1, order))), images


@register_method("center")
def center(selector: Selector, images: Any, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """Nearest to the center of the view first: what a photographer's framing alone is worth."""
    scores = -torch.from_numpy(center_distance(selector.grid)).double()
    scores = scores.expand(len(images if seeds is None else seeds), -1)
    return descending(scores), scores
