"""What the class token of a ViT looks at: scores of patches and their order. Selectors and dropping ViTs share it.

Shapes: B images, T tokens (prefix tokens, then patches), D width, h heads, d width of a head, Q queries.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import TicketSetError


def class_attention(block: Any, x: Tensor) -> Tensor:
    """[B, T, D] at a block's input -> head-mean attention of the class token after softmax, [B, T].

    Only this row is computed: one query a head and the keys.
    """
    x = block.norm1(x)
    query, key = _queries(block.attn, x[:, :1]), _keys(block.attn, x)
    return _softmax(block.attn, query, key)[:, :, 0].mean(1)


def mean_attention(block: Any, x: Tensor) -> Tensor:
    """Head-mean attention after softmax, [B, T, T]."""
    x = block.norm1(x)
    return _softmax(block.attn, _queries(block.attn, x), _keys(block.attn, x)).mean(1)


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
    queries: Tensor = attn.q_norm(_project(attn, x, 0))
    return queries


def _keys(attn: Any, x: Tensor) -> Tensor:
    keys: Tensor = attn.k_norm(_project(attn, x, 1))
    return keys


def _project(attn: Any, x: Tensor, which: int) -> Tensor:
    """One third of the fused qkv projection: [B, T, D] -> [B, h, T, d]; 0 queries, 1 keys."""
    weight = attn.qkv.weight.chunk(3)[which]
    bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)[which]
    out = nn.functional.linear(x, weight, bias)
    return out.view(*out.shape[:-1], attn.num_heads, -1).transpose(1, 2)


def descending(scores: Tensor) -> Tensor:
    """Indices by falling score; ties go to the lower index."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def check_model(model: Any, grid: tuple[int, int]) -> None:
    """Refuse a model whose attention cannot be read here.

    Raises:
        TicketSetError: no timm ViT with a class token, blocks that are not timm's plain ones, or another patch grid.
    """
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    name = getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise TicketSetError(f"selector {name}: expected a timm VisionTransformer with a class token")
    odd = next((b for b in model.blocks if type(b) is not Block or type(b.attn) is not Attention), None)
    if odd is not None:
        got = type(odd.attn if type(odd) is Block else odd).__name__  # other blocks may have no attn
        raise TicketSetError(f"selector {name}: expected blocks of timm's Block and Attention, got {got}")
    if tuple(model.patch_embed.grid_size) != tuple(grid):
        raise TicketSetError(f"selector {name}: expected a patch grid of {grid}, got {model.patch_embed.grid_size}")
