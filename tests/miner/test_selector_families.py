"""Selectors on timm's other ViTs, rotary ones and such as pool by attention: against naive forwards in float64."""

from pathlib import Path

import pytest
import timm
import torch
from test_selectors import GRID, N, embedded, full_attention, mlp, pixels, ranking_of, saved, sharpened
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from conftest import mine
from miner.drop import keep_counts
from miner.models import build_vit
from miner.selectors import create_selector
from shards.errors import TicketSetError
from shards.reader import TicketSet

SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
ROTARY = {  # timm's name, and its prefix tokens
    "eva02_tiny_patch14_224": 1,
    "eva02_base_patch16_clip_224": 1,  # separate projections, normalized attention
    "eva_giant_patch14_224": 1,  # no rotary positions
    "vit_small_patch16_dinov3": 5,
    "vit_small_patch16_dinov3_qkvb": 5,
    "vit_small_patch16_rope_mixed_224": 1,  # positions of each block and head
    "vit_base_patch16_sapiens2": 9,  # normalized queries and keys
    "vit_pe_core_base_patch16_224": 1,
}
POOLING = {
    "vit_base_patch16_siglip_224": 0,
    "test_vit3": 1,  # pools its register too
    "vit_pe_core_base_patch16_224": 1,  # and its class token
}


def build(name: str, **options: object) -> nn.Module:
    """A small model of one of timm's own classes and kinds, with random sharpened weights."""
    if not timm.is_model(name):
        pytest.skip("a newer timm's")
    size = 6 * (14 if "patch14" in name else 16)
    options = {"num_kv_heads": 3, **options} if "sapiens" in name else options  # it has a number a block
    model = sharpened(timm.create_model(name, img_size=size, **{**SIZES, **options}))
    for block in model.blocks:  # whose names the sharpening does not know
        for projection in ("q_proj", "k_proj"):
            if getattr(block.attn, projection, None) is not None:
                getattr(block.attn, projection).weight *= 4
    return model


def turned(attn: nn.Module, x: Tensor, table: Tensor) -> Tensor:
    """[h, n, d] of patches times e^(i angle), pair by pair; `table` [., n, 2 d] has sines, then cosines."""
    sines, cosines = table.chunk(2, -1)
    width = x.shape[-1]
    first, second = (range(width // 2), range(width // 2, width)) if getattr(attn, "rotate_half", False) else (
        range(0, width, 2),
        range(1, width, 2),
    )  # fmt: skip
    first, second = list(first), list(second)
    product = torch.complex(x[..., first], x[..., second]) * torch.complex(cosines[..., first], sines[..., first])
    out = torch.empty_like(x)
    out[..., first], out[..., second] = product.real, product.imag
    return out


def rotary_attention(block: nn.Module, x: Tensor, table: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    """As `full_attention`, of one image: x [T, D] -> the attention matrix [h, T, T], and what attention gives."""
    attn, x = block.attn, block.norm1(x)
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        q, k, v = (x @ attn.qkv.weight.T).chunk(3, dim=-1)
        biases = (attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias) if getattr(attn, "q_bias", None) is not None else (
            (0, 0, 0) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        )  # fmt: skip
        q, k, v = q + biases[0], k + biases[1], v + biases[2]
    q, k, v = (t.reshape(len(x), attn.num_heads, -1).transpose(0, 1) for t in (q, k, v))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if table is not None:
        q, k = (torch.cat([t[:, :prefix], turned(attn, t[:, prefix:], table)], dim=1) for t in (q, k))
    logits = torch.einsum("hqd,hkd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.einsum("hqk,hkd->hqd", weights, v).transpose(0, 1).flatten(1)
    return weights, attn.proj(attn.norm(out))


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


class Naive:
    """One image through an Eva by hand, block by block, with whole attention matrices; patches may be dropped on the way."""

    def __init__(self, model: nn.Module, image: Tensor, prefix: int) -> None:
        patch = model.patch_embed.patch_size[0]
        cells = image.reshape(3, 6, patch, 6, patch).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        x = cells @ model.patch_embed.proj.weight.flatten(1).T
        if model.patch_embed.proj.bias is not None:
            x = x + model.patch_embed.proj.bias
        first = torch.cat([t[0] for t in (model.cls_token, getattr(model, "reg_token", None)) if t is not None])
        assert len(first) == prefix
        table = model.pos_embed
        if table is not None and table.shape[1] == N:
            x = x + table[0]
        x = torch.cat([first, x])
        if table is not None and table.shape[1] > N:
            x = x + table[0]
        self.model, self.prefix = model, prefix
        self.x = model.norm_pre(x) if hasattr(model, "norm_pre") else x
        self.alive = list(range(N))

    def table(self, number: int) -> Tensor | None:
        """Rotary positions of the patches that are left, in one block."""
        if self.model.rope is None:
            return None
        table = self.model.rope.get_embed([6, 6] if self.model.dynamic_img_size else None).double()
        table = table[number] if table.ndim == 4 else table[None]
        return table[:, self.alive]

    def block(self, number: int, left: int | None = None) -> Tensor:
        """Pass one block, and drop all but `left` patches behind its attention; gives the matrix [h, T, T]."""
        block = self.model.blocks[number]
        weights, out = rotary_attention(block, self.x, self.table(number), self.prefix)
        self.x = self.x + scaled(out, block.gamma_1)
        if left is not None:
            score = weights.mean(0)[0, self.prefix :].tolist()
            self.order = sorted(range(len(self.alive)), key=lambda i: -score[i])
            self.stage = [self.alive[i] for i in self.order[:left]], [self.alive[i] for i in self.order[left:]]
            self.alive = self.stage[0]
            self.x = self.x[[*range(self.prefix), *(self.prefix + i for i in self.order[:left])]]
        self.x = self.x + scaled(block.mlp(block.norm2(self.x)), block.gamma_2)
        return weights


@pytest.mark.parametrize("name", ROTARY)
def test_the_naive_forward_is_timms(name: str) -> None:
    model = build(name)
    image = pixels(model, 1)
    naive = Naive(model, image[0], ROTARY[name])
    for number in range(4):
        naive.block(number)
    torch.testing.assert_close(model.norm(naive.x), model.forward_features(image)[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("name", ROTARY)
def test_cls_attention_of_a_rotary_vit_equals_the_full_matrix(name: str, block: int) -> None:
    model = build(name)
    images, prefix = pixels(model), ROTARY[name]
    ranking, scores = create_selector("cls-attention", model, GRID, (9,), (block,)).rank_and_score(images)
    for row, image, ranked in zip(scores, images, ranking, strict=True):
        naive = Naive(model, image, prefix)
        for number in range(block + 1):
            weights = naive.block(number)
        expected = weights.mean(0)[0, prefix:]
        torch.testing.assert_close(row, expected, rtol=1e-7, atol=0)
        assert ranked.tolist() == expected.argsort(descending=True).tolist()
    assert (ranking[0] != ranking[1]).any()


@pytest.mark.parametrize("name", ROTARY)
def test_rollout_of_a_rotary_vit_equals_the_product_of_full_matrices(name: str) -> None:
    model = build(name)
    images, prefix = pixels(model), ROTARY[name]
    scores = create_selector("rollout", model, GRID, (9,), (2,)).rank_and_score(images)[1]
    for row, image in zip(scores, images, strict=True):
        naive = Naive(model, image, prefix)
        flow = identity = torch.eye(prefix + N, dtype=torch.float64)
        for number in range(3):
            flow = (0.5 * naive.block(number).mean(0) + 0.5 * identity) @ flow
        torch.testing.assert_close(row, flow[0, prefix:], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ROTARY)
def test_evit_on_a_rotary_vit_equals_a_naive_full_forward(name: str) -> None:
    model = build(name)
    images, blocks, rate = pixels(model), (0, 2, 3), 0.7
    counts = keep_counts(N, rate, 3)
    ranking = create_selector("evit", model, GRID, counts, blocks).rank(images)
    for row, image in zip(ranking.tolist(), images, strict=True):
        naive, stages = Naive(model, image, ROTARY[name]), []
        for number in range(4):
            left = dict(zip(blocks, counts, strict=True)).get(number)
            naive.block(number, left)
            if left is not None:
                stages.append(naive.stage)
        assert row == ranking_of(stages)


def pooled(model: nn.Module, x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The pooling head by hand, of one image's tokens [T, D] -> attention [h, T], and what the head gives [D]."""
    pool, heads = model.attn_pool, model.attn_pool.num_heads
    k, v = (x @ pool.kv.weight.T + pool.kv.bias).chunk(2, dim=-1)
    q = pool.latent[0] @ pool.q.weight.T + pool.q.bias
    q, k, v = (t.reshape(len(t), heads, -1).transpose(0, 1) for t in (q, k, v))
    shares = (torch.einsum("hqd,hkd->hqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    out = pool.proj((shares @ v).transpose(0, 1).flatten(1))
    return shares[:, 0], (out + pool.mlp(pool.norm(out)))[0]


@pytest.mark.parametrize("name", POOLING)
def test_pool_attention_equals_the_pooling_head_by_hand(name: str) -> None:
    model, prefix = build(name), POOLING[name]
    model.attn_pool.latent *= 20  # else its attention is flat
    images = pixels(model)
    selector = create_selector("pool-attention", model, GRID, (9,))
    ranking, scores = selector.rank_and_score(images)
    assert selector.blocks == ()
    for row, ranked, image, whole in zip(scores, ranking, images, model(images), strict=True):
        x = naive_tokens(model, image, prefix)
        shares, out = pooled(model, model.norm(x), prefix)
        torch.testing.assert_close(model.forward_head(model.norm(x)[None])[0], whole, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(model.fc_norm(out), whole, rtol=1e-7, atol=1e-7)
        expected = shares.mean(0)[prefix:]
        torch.testing.assert_close(row, expected, rtol=1e-7, atol=0)
        assert ranked.tolist() == expected.argsort(descending=True).tolist()


def naive_tokens(model: nn.Module, image: Tensor, prefix: int) -> Tensor:
    """One image through all blocks by hand, [T, D]."""
    if isinstance(model, VisionTransformer):
        x = embedded(model, image[None])
        for block in model.blocks:
            x = mlp(block, x + block.ls1(full_attention(block, x)[1]))
        return x[0]
    naive = Naive(model, image, prefix)
    for number in range(4):
        naive.block(number)
    return naive.x


def test_dinov2_with_registers_equals_the_full_matrix() -> None:
    model = build("vit_small_patch14_reg4_dinov2")
    images = pixels(model)
    x = embedded(model, images)
    for block in model.blocks:
        weights, out = full_attention(block, x)
        x = mlp(block, x + block.ls1(out))
    scores = create_selector("cls-attention", model, GRID, (9,)).rank_and_score(images)[1]
    torch.testing.assert_close(scores, weights.mean(1)[:, 0, 5:], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_weights_of_another_grid_are_loaded_as_timm_resamples_them(name: str, tmp_path: Path) -> None:
    if not timm.is_model(name):
        pytest.skip("a newer timm's")
    if not hasattr(Eva, "set_input_size"):
        pytest.skip("a newer timm resamples in place")
    given = timm.create_model(name, num_classes=3)  # at its own 224 or 256 px
    for parameter in given.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = build_vit(name, (10, 10), saved(tmp_path / "w.pth", given.state_dict()))
    assert model.patch_embed.grid_size == (10, 10)
    side = 10 * model.patch_embed.patch_size[0]
    given.reset_classifier(0)
    given.set_input_size((side, side))
    image = torch.randn(1, 3, side, side)
    torch.testing.assert_close(model(image), given.eval()(image), rtol=1e-4, atol=1e-4)


def test_bf16_keeps_the_scores_of_rotary_vits_apart() -> None:
    model = build("vit_small_patch16_dinov3").float()
    for block in model.blocks:  # attention as flat as a trained model's
        block.attn.qkv.weight *= 0.08
    images = pixels(model).float()
    for method, counts in (("evit", (25, 18, 13)), ("cls-attention", (13,)), ("rollout", (13,))):
        scores = create_selector(method, model, GRID, counts, amp=True).rank_and_score(images)[1]
        assert scores.dtype == torch.float32, method
        assert min(len(set(row)) for row in scores.tolist()) == N, method


@pytest.mark.parametrize(
    ("name", "method", "options", "words"),
    [
        ("vit_base_patch16_siglip_224", "evit", {}, "expects a model with a class token, got one without; what it has serves `method` pool-attention"),
        ("eva02_tiny_patch14_224", "pool-attention", {}, "serves `method` evit or cls-attention or rollout"),
        ("vit_medium_patch16_rope_reg1_gap_256", "cls-attention", {}, "expects a model with a class token, got one without"),
        ("eva02_enormous_patch14_clip_224", "cls-attention", {}, "EvaBlock and EvaAttention, got EvaBlockPostNorm"),
        ("vit_base_patch16_sapiens2", "cls-attention", {"num_kv_heads": 1, "qkv_fused": False}, "keys that heads share"),
    ],
)  # fmt: skip
def test_a_method_that_finds_nothing_to_read_says_what_would(name: str, method: str, options: dict, words: str) -> None:
    counts = (25, 18, 13) if method == "evit" else (13,)
    with pytest.raises(TicketSetError) as error:
        create_selector(method, build(name, **options), GRID, counts)
    assert words in str(error.value) and name in str(error.value)


def test_a_set_of_pool_attention_says_what_it_is(photos: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", timm.create_model("test_vit3").state_dict())
    flags = ["--data", photos, "--out", tmp_path / "out", "--views", 1, "--selector", "test_vit3", "--weights", path]
    mine(*flags, "--method", "pool-attention")
    opened = TicketSet.open(str(tmp_path / "out"))
    selector = opened.manifest.selector
    assert (selector.method, selector.model, selector.blocks) == ("pool-attention", "test_vit3", ())
    assert len({sample.rankings[0].tobytes() for sample in opened.stream("train")}) > 1
    assert (
        "--method pool-attention looks behind"
        in mine(*flags, "--method", "pool-attention", "--drop-blocks", 2, code=1).output
    )


def test_pool_attention_takes_no_block() -> None:
    with pytest.raises(TicketSetError, match="`drop_blocks`: `method` pool-attention looks behind the last block"):
        create_selector("pool-attention", build("vit_base_patch16_siglip_224"), GRID, (9,), (2,))
