"""Selectors: against naive full-matrix forwards in float64, and what they may not compute."""

import argparse
import hashlib
import importlib
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SELECTOR, mine
from miner.drop import default_blocks, keep_counts, keep_counts_for
from miner.models import build_vit, load_weights, meta_model, patch_size_of, state_hash
from miner.selectors import METHODS, Selector, create_selector, register_method
from miner.settings import Selection
from shards.errors import TicketSetError
from shards.reader import TicketSet

GRID = (6, 6)
N = 36


def sharpened(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random float64 weights under which attention differs from patch to patch."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.6 if "qkv.weight" in name else 0.15
        parameter.data = noise * scale + (1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0)
    return model.double().eval().requires_grad_(False)


def vit(**kwargs: object) -> VisionTransformer:
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 0}
    return VisionTransformer(**{**options, **kwargs})


class DiffAttention(nn.Identity):
    """Has timm's name for one kind of attention that older timms lack."""


def other_attention() -> VisionTransformer:
    model = vit()
    model.blocks[0].attn = DiffAttention()
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "deit": vit,
    "distilled": lambda: VisionTransformerDistilled(
        img_size=48, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=0
    ),
    "deit3": lambda: vit(init_values=0.1, no_embed_class=True),
    "registers": lambda: vit(reg_tokens=4, no_embed_class=True, init_values=0.1),
    "clip": lambda: vit(pre_norm=True, act_layer="quick_gelu", qkv_bias=True),
    "dinov2": lambda: vit(patch_size=14, img_size=84, init_values=1.0),
    "qk_norm": lambda: vit(qk_norm=True, qkv_bias=False),
}
PREFIX = {"distilled": 2, "registers": 5}


def pixels(model: nn.Module, count: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    height, width = model.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    """[B, T, D] before block 0: patches, prefix tokens, position embeddings, by hand."""
    patch = model.patch_embed.patch_size[0]
    batch, _, height, width = images.shape
    cells = images.reshape(batch, 3, height // patch, patch, width // patch, patch)
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = cells @ model.patch_embed.proj.weight.flatten(1).T
    if model.patch_embed.proj.bias is not None:
        x = x + model.patch_embed.proj.bias
    prefix = [model.cls_token, getattr(model, "dist_token", None), getattr(model, "reg_token", None)]
    tokens = [p.expand(batch, -1, -1) for p in prefix if p is not None]
    if model.no_embed_class:
        x = torch.cat([*tokens, x + model.pos_embed], dim=1)
    else:
        x = torch.cat([*tokens, x], dim=1) + model.pos_embed
    return model.norm_pre(x)


def full_attention(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole attention matrix [B, h, T, T], and the attention's output after its projection."""
    attn = block.attn
    q, k, v = torch.einsum("btd,ed->bte", block.norm1(x), attn.qkv.weight).chunk(3, dim=-1)
    if attn.qkv.bias is not None:
        q, k, v = (t + b for t, b in zip((q, k, v), attn.qkv.bias.chunk(3), strict=True))
    q, k, v = (t.reshape(*t.shape[:2], attn.num_heads, -1).transpose(1, 2) for t in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2).flatten(2)
    return weights, attn.proj(out)


def mlp(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.ls2(block.mlp(block.norm2(x)))


def naive_evit(
    model: nn.Module, images: Tensor, prefix: int, blocks: tuple[int, ...], keep_rate: float
) -> list[list[tuple[list[int], list[int]]]]:
    """EViT in its own order: every block whole, patches dropped between attention and MLP.

    Returns:
        For each image and stage, the kept and the dropped patches, each most attended first.
    """
    results = []
    for image in images:
        x = embedded(model, image[None])
        alive = list(range(x.shape[1] - prefix))
        stages = []
        for number, block in enumerate(model.blocks):
            weights, out = full_attention(block, x)
            x = x + block.ls1(out)
            if number in blocks:
                score = weights.mean(1)[0, 0, prefix:].tolist()
                left = -int(-keep_rate * len(alive) // 1)
                order = sorted(range(len(alive)), key=lambda i: -score[i])
                stages.append(([alive[i] for i in order[:left]], [alive[i] for i in order[left:]]))
                alive = stages[-1][0]
                rows = torch.tensor([*range(prefix), *(prefix + i for i in order[:left])])
                x = x[:, rows]
            x = mlp(block, x)
        results.append(stages)
    return results


def ranking_of(stages: list[tuple[list[int], list[int]]]) -> list[int]:
    """What the selector promises: kept at the last stage, then dropped at the last, the one before..."""
    return stages[-1][0] + [patch for _, dropped in reversed(stages) for patch in dropped]


def evit_for(model: nn.Module, blocks: tuple[int, ...], keep_rate: float) -> Selector:
    return create_selector("evit", model, GRID, keep_counts(N, keep_rate, len(blocks)), blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_evit_equals_a_naive_full_forward(family: str) -> None:
    model = sharpened(FAMILIES[family]())
    images = pixels(model)
    for blocks, rate in (((1, 3, 4), 0.7), ((0, 5), 0.55)):
        selector = evit_for(model, blocks, rate)
        naive = naive_evit(model, images, PREFIX.get(family, 1), blocks, rate)
        ranking = selector.rank(images)
        for row, stages in zip(ranking.tolist(), naive, strict=True):
            assert row[: selector.k] == stages[-1][0]
            assert row == ranking_of(stages)
            assert sorted(row) == list(range(N))


def test_a_changed_weight_or_keep_rate_changes_the_ranking() -> None:
    model = sharpened(vit())
    images = pixels(model)
    blocks = (1, 3, 4)
    before = evit_for(model, blocks, 0.7).rank(images).tolist()
    other_rate = [ranking_of(s) for s in naive_evit(model, images, 1, blocks, 0.8)]
    assert before != other_rate
    model.blocks[3].attn.qkv.weight[: 2 * 48] *= -1.5
    after = evit_for(model, blocks, 0.7).rank(images).tolist()
    assert after != before
    assert after == [ranking_of(s) for s in naive_evit(model, images, 1, blocks, 0.7)]


def test_layer_scale_is_respected() -> None:
    model = sharpened(vit(init_values=0.1))
    images = pixels(model)
    with_scale = evit_for(model, (1, 3, 4), 0.7).rank(images)
    for block in model.blocks:
        block.ls1, block.ls2 = nn.Identity(), nn.Identity()
    assert not torch.equal(with_scale, evit_for(model, (1, 3, 4), 0.7).rank(images))


@pytest.mark.parametrize("family", ["deit", "distilled", "registers"])
@pytest.mark.parametrize("block", [0, 3, 5])
def test_cls_attention_equals_the_full_matrix(family: str, block: int) -> None:
    model = sharpened(FAMILIES[family]())
    images, prefix = pixels(model), PREFIX.get(family, 1)
    x = embedded(model, images)
    for number in range(block + 1):
        weights, out = full_attention(model.blocks[number], x)
        x = mlp(model.blocks[number], x + model.blocks[number].ls1(out))
    expected = weights.mean(1)[:, 0, prefix:]
    ranking, scores = create_selector("cls-attention", model, GRID, (9,), (block,)).rank_and_score(images)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
    assert ranking.tolist() == expected.argsort(dim=1, descending=True).tolist()


@pytest.mark.parametrize("family", ["deit", "distilled", "clip"])
@pytest.mark.parametrize("last", [0, 2, 5])
def test_rollout_equals_the_product_of_full_matrices(family: str, last: int) -> None:
    model = sharpened(FAMILIES[family]())
    images, prefix = pixels(model), PREFIX.get(family, 1)
    x = embedded(model, images)
    flow = torch.eye(x.shape[1], dtype=torch.float64).expand(len(x), -1, -1)
    for number in range(last + 1):
        weights, out = full_attention(model.blocks[number], x)
        flow = (0.5 * weights.mean(1) + 0.5 * torch.eye(x.shape[1], dtype=torch.float64)) @ flow
        x = mlp(model.blocks[number], x + model.blocks[number].ls1(out))
    expected = flow[:, 0, prefix:]
    ranking, scores = create_selector("rollout", model, GRID, (9,), (last,)).rank_and_score(images)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
    assert ranking.tolist() == expected.argsort(dim=1, descending=True).tolist()


def test_blocks_default_to_the_last_one_and_another_block_ranks_otherwise() -> None:
    model = sharpened(vit())
    images = pixels(model)
    for method in ("cls-attention", "rollout"):
        selector = create_selector(method, model, GRID, (9,))
        assert selector.blocks == (5,)
        other = create_selector(method, model, GRID, (9,), (2,))
        assert not torch.equal(selector.rank(images), other.rank(images))
    assert create_selector("evit", model, GRID, (9, 9, 9)).blocks == (1, 3, 4)


def test_scores_of_evit_are_the_first_stage_over_all_patches() -> None:
    model = sharpened(vit())
    images = pixels(model)
    first = create_selector("cls-attention", model, GRID, (9,), (1,)).rank_and_score(images)[1]
    assert torch.equal(evit_for(model, (1, 3, 4), 0.7).rank_and_score(images)[1], first)


def test_every_ranking_is_a_permutation() -> None:
    model = sharpened(vit())
    images = pixels(model, 4)
    for method in ("evit", "cls-attention", "rollout", "random", "center"):
        counts = (25, 18, 13) if method == "evit" else (13,)
        ranking, scores = create_selector(method, model, GRID, counts).rank_and_score(images, [1, 2, 3, 4])
        assert ranking.dtype == torch.int64 and ranking.shape == scores.shape == (4, N), method
        assert torch.equal(ranking.sort(dim=1).values, torch.arange(N).expand(4, -1)), method


def test_equal_scores_rank_by_index() -> None:
    model = sharpened(vit())
    for block in model.blocks:  # no queries: attention is exactly uniform, whatever the pixels
        block.attn.qkv.weight[:48] = 0
        block.attn.qkv.bias[:48] = 0
    for method, counts in (("evit", (25, 18, 13)), ("cls-attention", (13,))):
        ranking, scores = create_selector(method, model, GRID, counts).rank_and_score(pixels(model, 2))
        assert scores.unique().numel() == 1
        # evit: the kept are 0-12, then come those dropped last, 13-17, then 18-24, then 25-35.
        assert ranking.tolist() == [list(range(N))] * 2


def test_ties_among_some_patches_go_to_the_lower_index() -> None:
    @register_method("two-levels")
    def two_levels(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
        from miner.attention import descending

        scores = (torch.arange(N) % 3).double().expand(len(images), -1)
        return descending(scores), scores

    try:
        row = create_selector("two-levels", sharpened(vit()), GRID, (9,)).rank(torch.zeros(1, 3, 48, 48))[0].tolist()
    finally:
        del METHODS["two-levels"]
    assert row == [*range(2, N, 3), *range(1, N, 3), *range(0, N, 3)]


def textured(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [B, 48, 48, 3]: every patch of 8 x 8 has its own number of levels, the first is flat."""
    draw = np.random.default_rng(seed)
    images = np.empty((count, 48, 48, 3), np.uint8)
    for number, patch in enumerate(draw.permutation(N).tolist()):
        top, left = 8 * (number // 6), 8 * (number % 6)
        images[:, top : top + 8, left : left + 8] = draw.integers(0, 1 + 7 * patch, (count, 8, 8, 3))
    return images


def test_entropy_counts_a_patchs_gray_levels_as_apt_does() -> None:
    images = textured(3)
    ranking, scores = create_selector("entropy", None, GRID, (9,)).rank_and_score(
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    )
    for image, order, bits in zip(images, ranking.tolist(), scores.tolist(), strict=True):
        naive = []
        for number in range(N):
            top, left = 8 * (number // 6), 8 * (number % 6)
            red, green, blue = image[top : top + 8, left : left + 8].astype(np.float64).reshape(-1, 3).T
            gray = 0.2989 * red + 0.5870 * green + 0.1140 * blue
            share = np.histogram(gray, bins=512, range=(0, 255))[0] / 64
            naive.append(-sum(p * np.log2(p) for p in share if p))
        assert bits == pytest.approx(naive, abs=1e-6) and min(bits) == 0 and max(bits) > 5
        assert order == sorted(range(N), key=lambda patch: (-round(naive[patch], 9), patch))


def test_entropy_of_a_view_is_the_same_in_every_batch_and_under_amp() -> None:
    images = torch.from_numpy(textured(5)).permute(0, 3, 1, 2).float() / 255
    together = create_selector("entropy", None, GRID, (9,)).rank_and_score(images)
    alone = [create_selector("entropy", None, GRID, (9,), amp=True).rank_and_score(image[None]) for image in images]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert len({tuple(row) for row in together[0].tolist()}) == 5


def test_random_is_a_pure_function_of_the_seed() -> None:
    selector = create_selector("random", None, (4, 4), (8,))
    assert selector.rank(None, [5, 6]).tolist() == [
        [14, 8, 7, 11, 6, 0, 5, 1, 3, 4, 15, 13, 2, 10, 9, 12],
        [12, 15, 0, 11, 8, 6, 10, 14, 9, 1, 3, 13, 7, 4, 2, 5],
    ]
    rows = selector.rank(None, list(range(40)))
    assert torch.equal(rows[[7, 30]], selector.rank(torch.zeros(2, 3, 1, 1), [7, 30]))
    assert len({tuple(r) for r in rows.tolist()}) == 40


def test_random_is_uniform_over_patches_and_center_is_not() -> None:
    seeds = list(range(3000))

    def spread(method: str) -> float:
        """Chi-square of how often each of 16 patches is among the first 4, a degree of freedom."""
        kept = create_selector(method, None, (4, 4), (4,)).rank(None, seeds)[:, :4]
        counts = kept.flatten().bincount(minlength=16).double()
        return float(((counts - 750) ** 2 / 750).sum() / 15)

    assert spread("random") < 2
    assert spread("center") > 100


def test_center_takes_the_nearest_first_and_the_lower_index_of_equals() -> None:
    four = create_selector("center", None, (4, 4), (8,)).rank(None, [0, 1])
    assert four.tolist() == [[5, 6, 9, 10, 1, 2, 4, 7, 8, 11, 13, 14, 0, 3, 12, 15]] * 2
    fourteen = create_selector("center", None, (14, 14), (98,)).rank(torch.zeros(1, 3, 1, 1))[0].tolist()
    assert fourteen[:16] == [90, 91, 104, 105, 76, 77, 89, 92, 103, 106, 118, 119, 75, 78, 117, 120]
    assert fourteen[-4:] == [0, 13, 182, 195]


def test_bf16_keeps_float32_scores_apart() -> None:
    model = sharpened(vit(img_size=112)).float()  # 196 patches
    for block in model.blocks:  # attention as flat as a trained model's
        block.attn.qkv.weight *= 0.08
    images = pixels(model).float()
    for method, counts in (("evit", (137, 96, 68)), ("cls-attention", (98,)), ("rollout", (98,))):
        scores = create_selector(method, model, (14, 14), counts, amp=True).rank_and_score(images)[1]
        assert scores.dtype == torch.float32, method
        assert min(len(set(row)) for row in scores.tolist()) > 190, method
    # The negative control: with its softmax in bf16 too, the same attention has few different values.
    model = model.bfloat16()
    x = embedded(model, images.bfloat16())
    for block in model.blocks:
        weights, out = full_attention(block, x)
        x = mlp(block, x + out)
    assert max(len(set(row)) for row in weights.mean(1)[:, 0, 1:].tolist()) < 100


def test_no_autograd_graph_is_built() -> None:
    model = sharpened(vit()).requires_grad_(True)
    images = pixels(model).requires_grad_(True)
    for method, counts in (("evit", (25, 18, 13)), ("cls-attention", (9,)), ("rollout", (9,))):
        scores = create_selector(method, model, GRID, counts).rank_and_score(images)[1]
        assert scores.grad_fn is None and not scores.requires_grad, method
    x = model.blocks[0](embedded(model, images))  # the negative control
    assert x.grad_fn is not None


def calls_while_ranking(selector: Selector, images: Tensor) -> Counter[str]:
    """How often each block, and each part of one, runs."""
    counts: Counter[str] = Counter()
    handles = []
    for name, module in selector.model.named_modules():
        if name.startswith("blocks.") or name == "norm":
            handles.append(module.register_forward_hook(lambda *_, name=name: counts.update([name])))
    try:
        selector.rank(images)
    finally:
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("method", ["evit", "cls-attention", "rollout"])
def test_computing_stops_at_the_last_scoring_block(method: str) -> None:
    model = sharpened(vit())
    blocks, counts = ((1, 3), (25, 18)) if method == "evit" else ((3,), (18,))
    calls = calls_while_ranking(create_selector(method, model, GRID, counts, blocks), pixels(model))
    assert [calls[f"blocks.{i}"] for i in range(6)] == [1, 1, 1, 0, 0, 0]
    assert calls["blocks.3.norm1"] == 1
    assert calls["blocks.3.attn"] == calls["blocks.3.attn.proj"] == calls["blocks.3.mlp"] == 0
    assert not [name for name in calls if name.startswith(("blocks.4", "blocks.5", "norm"))]


class _Softmaxes(TorchDispatchMode):
    """Shapes of every softmax that is computed outside of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "softmax" in str(function):
            self.shapes.append(tuple(out.shape))
        return out


def test_only_the_row_of_the_class_token_is_computed() -> None:
    model = sharpened(vit())
    images = pixels(model)
    shapes = {}
    for method, counts in (("evit", (25, 18, 13)), ("cls-attention", (9,)), ("rollout", (9,))):
        with _Softmaxes() as seen:
            create_selector(method, model, GRID, counts).rank(images)
        shapes[method] = seen.shapes
    assert shapes["evit"] == [(3, 3, 1, 37), (3, 3, 1, 26), (3, 3, 1, 19)]
    assert shapes["cls-attention"] == [(3, 3, 1, 37)]
    assert shapes["rollout"] == [(3, 3, 37, 37)] * 6  # the negative control: rollout needs all of it


def test_keep_counts_are_the_papers() -> None:
    rates = (0.95, 0.9, 0.85, 0.8, 0.75)
    assert [keep_counts(196, rate) for rate in rates] == [
        (187, 178, 170),
        (177, 160, 144),
        (167, 142, 121),
        (157, 126, 101),
        (147, 111, 84),
    ]
    assert keep_counts(196, 1.0) == (196, 196, 196)
    assert keep_counts(16, 0.1, 2) == (2, 1)
    for rate in (0, 1.1, -0.5):
        with pytest.raises(ValueError, match="keep rate"):
            keep_counts(196, rate)


def test_tokens_are_reached_in_equal_ratios() -> None:
    assert keep_counts_for(196, 98) == (156, 124, 98)
    assert keep_counts_for(196, 49) == (124, 78, 49)
    assert keep_counts_for(196, 196) == (196, 196, 196)
    assert keep_counts_for(196, 1, 2) == (14, 1)
    assert keep_counts_for(16, 3, 1) == (3,)
    for tokens in (0, 197):
        with pytest.raises(ValueError, match="1 to 196"):
            keep_counts_for(196, tokens)


def test_stages_never_grow_on_the_way_to_any_number_of_tokens() -> None:
    for tokens in range(1, 197):
        counts = (196, *keep_counts_for(196, tokens))
        assert list(counts) == sorted(counts, reverse=True) and counts[-1] == tokens


def test_default_blocks_are_quarter_points() -> None:
    assert [default_blocks(depth) for depth in (12, 6, 24, 4)] == [(3, 6, 9), (1, 3, 4), (6, 12, 18), (1, 2, 3)]
    assert default_blocks(1) == (0,)


def by_first_pixel(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """A method of this module, as a user's would be."""
    first = images[:, 0, :: 48 // 6, :: 48 // 6].flatten(1)
    return first.sort(dim=1, descending=True).indices, first


def test_methods_are_pluggable_by_name_and_by_module() -> None:
    model, images = sharpened(vit()), torch.rand(2, 3, 48, 48)
    register_method("mine")(by_first_pixel)
    try:
        named = create_selector("mine", model, GRID, (9,)).rank(images)
    finally:
        del METHODS["mine"]
    imported = create_selector("test_selectors:by_first_pixel", model, GRID, (9,)).rank(images)
    assert torch.equal(named, imported)
    assert imported[0, 0] == images[0, 0, ::8, ::8].flatten().argmax()


OWN = """
import torch

seen = []

def brightest(selector, images, seeds):
    seen.append((images, selector.model))
    gh, gw = selector.grid
    scores = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), (gh, gw)).flatten(1)
    return scores.argsort(dim=1, descending=True, stable=True), scores

def by_model(selector, images, seeds):
    return brightest(selector, images, seeds)

by_model.needs_model = True
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module of methods."""
    (tmp_path / "own_methods.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_methods")
    del sys.modules["own_methods"]
    for name in [name for name in METHODS if ":" in name]:
        del METHODS[name]


def test_a_method_without_a_model_sees_pixels_from_0_to_1(own: ModuleType, tmp_path: Path) -> None:
    """A white square on black, over one patch of the canonical view: third row, second column of 4."""
    picture = np.zeros((80, 80, 3), np.uint8)  # the canonical view is its middle 70 pixels
    picture[5 + 35 : 5 + 35 + 17, 5 + 18 : 5 + 18 + 17] = 255
    (tmp_path / "data/train/a").mkdir(parents=True)
    Image.fromarray(picture).save(tmp_path / "data/train/a/square.png")
    out = tmp_path / "out"
    mine("--data", tmp_path / "data", "--out", out, "--method", "own_methods:brightest", "--views", 1)
    (images, model), *_ = own.seen
    assert model is None and images.shape == (1, 3, 64, 64) and images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    (sample,) = TicketSet.open(str(out)).stream("train")
    assert sample.rankings[0, 0] == 2 * 4 + 1
    selector = TicketSet.open(str(out)).manifest.selector
    assert (selector.model, selector.input_size) == (None, 64)
    assert (selector.mean, selector.std) == ((0.0,) * 3, (1.0,) * 3)


def test_a_method_is_given_a_model_where_it_or_the_user_asks_for_one(
    own: ModuleType, photos: Path, weights: Path, tmp_path: Path
) -> None:
    data, model = ["--data", photos, "--views", 1], ["--selector", SELECTOR, "--weights", weights]
    mine(*data, "--out", tmp_path / "a", "--method", "own_methods:brightest", *model)
    mine(*data, "--out", tmp_path / "b", "--method", "own_methods:by_model", *model)
    assert {type(found).__name__ for _, found in own.seen} == {"VisionTransformer"}
    selector = TicketSet.open(str(tmp_path / "b")).manifest.selector
    assert selector.model == SELECTOR and selector.state
    del own.seen[:]
    output = mine(*data, "--out", tmp_path / "c", "--method", "own_methods:by_model", "--selector", "no_such", code=1)
    assert "--selector no_such: expected a timm model" in output.output and not own.seen
    flags = [*data, "--out", tmp_path / "d", "--method", "own_methods:brightest", "--drop-blocks", "1"]
    assert "--drop-blocks: --method own_methods:brightest uses no model" in mine(*flags, code=1).output


def test_a_registered_method_says_whether_it_needs_a_model() -> None:
    try:
        register_method("with", needs_model=True)(lambda selector, images, seeds: (images, images))
        register_method("without")(lambda selector, images, seeds: (images, images))
        with pytest.raises(TicketSetError, match="`method` with: needs a selector model"):
            create_selector("with", None, GRID, (9,))
        assert create_selector("without", None, GRID, (9,)).model is None
    finally:
        METHODS.pop("with", None), METHODS.pop("without", None)


def test_a_method_may_lie_in_the_folder_where_the_user_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def backwards(selector, images, seeds):\n    scores = images[:, 0].flatten(1)[:, :36]\n"
    (tmp_path / "my_method.py").write_text(text + "    return scores.argsort(dim=1), scores\n")
    model, images = sharpened(vit()), torch.arange(36.0).flip(0).expand(1, 3, 1, 36)
    with pytest.raises(TicketSetError, match="No module named 'my_method'"):  # the negative control
        create_selector("my_method:backwards", model, GRID, (9,))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    ranking = create_selector("my_method:backwards", model, GRID, (9,)).rank(images)
    assert ranking.tolist() == [list(range(35, -1, -1))]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("from 0 to 5", {"blocks": (1, 3, 6)}),
        ("ascending", {"blocks": (3, 1, 4)}),
        ("ascending", {"blocks": (1, 1, 3)}),
        ("ascending", {"blocks": (-1, 1, 3)}),
        ("each of 2 blocks, got 3", {"blocks": (1, 3)}),
        ("one block in `drop_blocks`, got 3", {"method": "rollout", "blocks": (1, 3, 4)}),
        ("one block in `drop_blocks`, got 2", {"method": "cls-attention", "blocks": (1, 3)}),
        ("patch grid of (7, 7), got (6, 6)", {"grid": (7, 7)}),
        ("expected one of evit, cls-attention", {"method": "evti"}),
        ("no_such_module", {"method": "no_such_module:function"}),
        ("no_function", {"method": "test_selectors:no_function"}),
        ("expected a function, got int", {"method": "test_selectors:N"}),
        ("needs a selector model", {"model": None}),
        ("a class token", {"model": vit(class_token=False, global_pool="avg")}),
        ("expected a timm VisionTransformer or Eva, got Linear", {"model": nn.Linear(1, 1)}),
        ("and Attention, got DiffAttention", {"model": other_attention()}),
        ("and Attention, got ParallelThingsBlock", {"model": vit(block_fn=ParallelThingsBlock)}),
    ],
)
def test_create_selector_refuses_what_does_not_fit(words: str, arguments: dict[str, object]) -> None:
    options = {"method": "evit", "model": vit(), "grid": GRID, "counts": (25, 18, 13), **arguments}
    with pytest.raises(TicketSetError) as error:
        create_selector(**options)
    assert words in str(error.value)


def saved(path: Path, state: object) -> str:
    torch.save(state, path)
    return str(path)


def reference_state(seed: int = 3) -> dict[str, Tensor]:
    return {k: v.float() for k, v in sharpened(timm.create_model("test_vit", num_classes=4), seed).state_dict().items()}


def test_a_patch_14_vit_serves_a_14x14_grid_at_196_px(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2"
    assert patch_size_of(name) == 14 and patch_size_of("deit_small") == 16
    shapes = meta_model(
        lambda: timm.create_model(name, num_classes=0)
    ).state_dict()  # 518 px: 37x37 position embeddings
    state = {k: torch.randn(v.shape) * 0.02 for k, v in shapes.items()}
    model = build_vit(name, (14, 14), saved(tmp_path / "w.pth", state))
    assert model.patch_embed.img_size == (196, 196) and model.patch_embed.grid_size == (14, 14)
    assert model.pos_embed.shape == (1, 197, 384)
    selector = create_selector("cls-attention", model, (14, 14), (98,), (0,))
    assert selector.rank(torch.randn(1, 3, 196, 196)).shape == (1, 196)


def test_position_embeddings_are_resampled_only_where_the_grid_differs(tmp_path: Path) -> None:
    state = reference_state()
    path = saved(tmp_path / "w.pth", state)
    same = build_vit("test_vit", (10, 10), path)
    assert torch.equal(same.pos_embed, state["pos_embed"])
    smaller = build_vit("test_vit", (5, 5), path)
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[5, 5], num_prefix_tokens=1)
    torch.testing.assert_close(smaller.pos_embed, expected)
    assert torch.equal(smaller.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert state_hash(smaller) != state_hash(same)


def test_weights_come_from_every_kind_of_file(tmp_path: Path) -> None:
    state, other = reference_state(), reference_state(4)
    save_file(state, tmp_path / "a.safetensors")
    files = [
        str(tmp_path / "a.safetensors"),
        saved(tmp_path / "plain.pth", state),
        saved(tmp_path / "state_dict.pth", {"state_dict": state, "epoch": 3}),
        saved(tmp_path / "deit.pth", {"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 299}),
        saved(tmp_path / "ema.pth", {"state_dict": other, "state_dict_ema": state}),
        saved(tmp_path / "model_ema.pth", {"model": other, "model_ema": state}),
        saved(tmp_path / "ddp.pth", {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
    ]
    hashes = {path: state_hash(build_vit("test_vit", (10, 10), path)) for path in files}
    assert len(set(hashes.values())) == 1, hashes
    headless = timm.create_model("test_vit", num_classes=0)
    headless.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")})
    assert set(hashes.values()) == {state_hash(headless)}
    control = state_hash(build_vit("test_vit", (10, 10), saved(tmp_path / "other.pth", other)))
    assert control not in hashes.values()


class _Sneaky:
    """A pickle that would run code."""

    ran = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (_Sneaky, "ran", True)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0)
    path = saved(tmp_path / "evil.pth", {"model": reference_state(), "args": _Sneaky()})
    with pytest.raises(TicketSetError, match="not a loadable checkpoint"):
        load_weights(model, path)
    assert not _Sneaky.ran
    torch.load(path, weights_only=False)
    assert _Sneaky.ran  # the negative control


def test_weights_of_another_model_are_refused_with_an_example(tmp_path: Path) -> None:
    state = reference_state()
    model = timm.create_model("test_vit", num_classes=0)
    for change, words in (
        ({k: v for k, v in state.items() if k != "blocks.2.mlp.fc1.bias"}, "1 tensors missing"),
        ({**state, "blocks.9.norm1.weight": torch.zeros(64)}, "1 unknown"),
        ({**state, "norm.bias": torch.zeros(7)}, "expected norm.bias [64], got [7]"),
    ):
        with pytest.raises(TicketSetError) as error:
            load_weights(model, saved(tmp_path / "w.pth", change))
        assert words in str(error.value)
    for content, words in ((b"not a checkpoint", "not a loadable checkpoint"), (None, "no such file")):
        path = tmp_path / "bad.pth"
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
        with pytest.raises(TicketSetError, match=words):
            load_weights(model, str(path))


def test_unknown_and_unfit_models_are_refused() -> None:
    with pytest.raises(TicketSetError, match="expected a timm model or one of deit_tiny"):
        build_vit("vit_smal_patch16_224", (14, 14), "w.pth")
    with pytest.raises(TicketSetError, match="expected a timm VisionTransformer or Eva, got ResNet"):
        patch_size_of("resnet18")


def test_without_network_and_weights_the_error_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs: object) -> nn.Module:
        if pretrained:
            raise OSError("Network is unreachable\nmore")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(TicketSetError) as error:
        build_vit("deit_tiny", (14, 14))
    text = str(error.value)
    assert "\n" not in text and "OSError" in text
    where = "https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k/resolve/main/model.safetensors"
    assert f"fetch {where} where there is a network, and give it with `weights` FILE" in text


def test_dinov2_stands_for_a_model_and_the_method_that_suits_it() -> None:
    """A method that is typed stays, and of every other selector the method is the paper's."""
    assert Selection(selector="dinov2").method == "cls-attention"
    assert Selection(selector="dinov2", method="evit").method == "evit"
    assert Selection().method == Selection(selector="vit_small_patch14_dinov2").method == "evit"
    assert patch_size_of("dinov2") == 14


class _Numbers(nn.Module):
    def __init__(self, names: tuple[str, ...] = ("a", "b"), **values: Tensor) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, values.get(name, torch.tensor([1.0, 2.0])))


def test_state_hash_depends_on_every_tensor_and_not_on_their_order() -> None:
    plain = state_hash(_Numbers())
    text = b"a torch.float32 [2]\n" + struct.pack("<2f", 1, 2) + b"b torch.float32 [2]\n" + struct.pack("<2f", 1, 2)
    assert plain == hashlib.sha256(text).hexdigest()
    assert plain == "ac4ac8ca0b34d04eb2dc4959fb5a31a24bbf96d30c163463348a2d56aa0bce55"
    assert plain == state_hash(_Numbers(("b", "a")))
    changed = [
        _Numbers(a=torch.tensor([1.0, 2.0000002])),
        _Numbers(a=torch.tensor([[1.0], [2.0]])),
        _Numbers(a=torch.tensor([1.0, 2.0], dtype=torch.float64)),
        _Numbers(a=torch.tensor([1, 2])),
        _Numbers(("a", "c")),
        _Numbers(("a",)),
        _Numbers(a=torch.tensor(1.0)),
    ]
    assert len({plain, *map(state_hash, changed)}) == 1 + len(changed)
