"""What the class token of a ViT looks at: scores of patches and their order. Selectors and dropping ViTs share it.

Two of timm's classes: VisionTransformer, and Eva (EVA-02, DINOv3, PE), whose attention turns queries and keys by the
places of their patches (rotary positions) and which has its projections in other layouts.

Shapes: B images, T tokens (P prefix tokens, then n patches), D width, h heads, d width of a head, Q queries.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import TicketSetError


def embed(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """[B, 3, S, S] -> what goes into the first block, as in timm's forward_features.

    Returns:
        Tokens [B, T, D], and rotary positions [blocks or 1, 1, h or 1, N, 2 d], sines before cosines; None without.
    """
    x = model._pos_embed(model.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    if rope is not None:  # a table [N, 2 d] for all blocks and heads, or one for each, [blocks, h, N, 2 d]
        rope = rope[:, None] if rope.ndim == 4 else rope[None, None, None]
    return model.norm_pre(x) if hasattr(model, "norm_pre") else x, rope  # timm 1.0.15's Eva has none


def run_blocks(model: Any, x: Tensor, rope: Tensor | None, start: int, stop: int) -> Tensor:
    """[B, T, D] through the blocks from `start` to before `stop`; `rope` as of `embed`."""
    for number in range(start, stop):
        block = model.blocks[number]
        x = block(x) if rope is None else block(x, rope=rope_of(rope, number))
    return x


def rope_of(rope: Tensor | None, number: int) -> Tensor | None:
    """Rotary positions of one block, [B or 1, h or 1, n, 2 d]: its own, or those that all share."""
    return None if rope is None else rope[number % len(rope)]


def class_attention(block: Any, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """[B, T, D] at a block's input, and its `rope_of` -> head-mean attention of the class token after softmax, [B, T].

    Only this row is computed: one query a head and the keys.
    """
    x = block.norm1(x)
    query = _queries(block.attn, x[:, :1])  # it has no place, so that nothing turns it
    return _softmax(block.attn, query, _turned(block.attn, _keys(block.attn, x), rope))[:, :, 0].mean(1)


def mean_attention(block: Any, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """Head-mean attention after softmax, [B, T, T]; arguments as `class_attention`'s."""
    x = block.norm1(x)
    query, key = (_turned(block.attn, part(block.attn, x), rope) for part in (_queries, _keys))
    return _softmax(block.attn, query, key).mean(1)


def latent_attention(model: Any, x: Tensor) -> Tensor:
    """[B, T, D] behind the last block -> head-mean attention of the pooling head's query after softmax, [B, n]."""
    pool, x, prefix = model.attn_pool, model.norm(x), model.num_prefix_tokens
    if not getattr(model, "pool_include_prefix", True):  # an Eva, and all in timm 1.0.15, pool prefix tokens too
        x, prefix = x[:, prefix:], 0
    weight, bias = pool.kv.weight.chunk(2)[0], None if pool.kv.bias is None else pool.kv.bias.chunk(2)[0]
    query = pool.q_norm(_heads(pool, pool.q(pool.latent)))
    key = pool.k_norm(_heads(pool, nn.functional.linear(x, weight, bias)))
    return _softmax(pool, query, key)[:, :, 0, prefix:].mean(1)


def _softmax(attn: Any, query: Tensor, key: Tensor) -> Tensor:
    """[B, h, Q, d], [B, h, T, d] -> [B, h, Q, T], never in less than float32.

    bf16 leaves about 33 different scores among 196 patches: the order would be arbitrary.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Without storage, where costs are counted, there is no autocast.
    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
        logits = (query.to(dtype) * attn.scale) @ key.to(dtype).transpose(-2, -1)
        shares: Tensor = logits.softmax(-1)
        return shares


def _queries(attn: Any, x: Tensor) -> Tensor:
    queries = _heads(attn, _project(attn, x, 0))
    return attn.q_norm(queries) if hasattr(attn, "q_norm") else queries  # nor has it these


def _keys(attn: Any, x: Tensor) -> Tensor:
    keys = _heads(attn, _project(attn, x, 1))
    return attn.k_norm(keys) if hasattr(attn, "k_norm") else keys


def _project(attn: Any, x: Tensor, which: int) -> Tensor:
    """[B, T, D] -> [B, T, h * d], 0 queries or 1 keys: by a layer of their own, or by a third of qkv."""
    if attn.qkv is None:
        projected: Tensor = (attn.q_proj, attn.k_proj)[which](x)
        return projected
    bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)[which]
    if getattr(attn, "q_bias", None) is not None:  # an Eva keeps them beside qkv
        bias = (attn.q_bias, attn.k_bias)[which]
    return nn.functional.linear(x, attn.qkv.weight.chunk(3)[which], bias)


def _heads(attn: Any, x: Tensor) -> Tensor:
    """[B, T, h * d] -> [B, h, T, d]"""
    return x.view(*x.shape[:-1], attn.num_heads, -1).transpose(1, 2)


def _turned(attn: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Queries or keys [B, h, T, d], those of patches turned by their places.

    timm's apply_rot_embed_cat, but for bf16, to which it rounds.
    """
    if rope is None:
        return x
    prefix, patches = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    sines, cosines = rope.chunk(2, -1)
    if getattr(attn, "rotate_half", False):  # the halves are pairs, in DINOv3
        first, second = patches.chunk(2, -1)
        turned = torch.cat([-second, first], dim=-1)
    else:  # neighbors are
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([prefix, patches * cosines + turned * sines], dim=2)


def descending(scores: Tensor) -> Tensor:
    """Indices by falling score; ties go to the lower index."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def is_eva(model: Any) -> bool:
    """Whether a model is of timm's Eva class."""
    from timm.models.eva import Eva

    return isinstance(model, Eva)


def check_model(model: Any, grid: tuple[int, int]) -> None:
    """Refuse a model whose attention cannot be read here.

    Raises:
        TicketSetError: no timm ViT, blocks that are not timm's plain ones, or another patch grid.
    """
    from timm import layers
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    name = name_of(model)
    if not isinstance(model, VisionTransformer) and not is_eva(model):
        raise TicketSetError(f"selector {name}: expected a timm VisionTransformer or Eva, got {type(model).__name__}")
    kind: Any = EvaBlock if is_eva(model) else Block
    attentions = (EvaAttention, getattr(layers, "AttentionRope", None)) if is_eva(model) else (Attention,)
    odd = next((b for b in model.blocks if type(b) is not kind or type(b.attn) not in attentions), None)
    if odd is not None:
        got = type(odd.attn if type(odd) is kind else odd).__name__  # other blocks may have no attn
        expected = f"{kind.__name__} and {attentions[0].__name__}"
        raise TicketSetError(f"selector {name}: expected blocks of timm's {expected}, got {got}")
    if any(getattr(block.attn, "num_kv_groups", 1) > 1 for block in model.blocks):
        raise TicketSetError(f"selector {name}: expected a key for each query's head, got keys that heads share")
    if tuple(model.patch_embed.grid_size) != tuple(grid):
        raise TicketSetError(f"selector {name}: expected a patch grid of {grid}, got {model.patch_embed.grid_size}")


def name_of(model: Any) -> str:
    """timm's name of a model, or that of its class."""
    name: str = getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)
    return name
