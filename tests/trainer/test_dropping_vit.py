"""DroppingViT: what survives in it is the miner's ticket; its forward against EViT written naively in float64."""

import math
from collections.abc import Callable

import pytest
import timm
import torch
from test_selectors import FAMILIES, GRID, PREFIX, N, embedded, full_attention, mlp, pixels, sharpened, vit
from timm.models.vision_transformer import Block, ParallelThingsBlock
from torch import Tensor, nn

from miner.drop import keep_counts
from miner.selectors import create_selector
from shards.errors import TicketSetError
from trainer.families.dropping import FUSED, DroppingViT, keep_rate_at
from trainer.families.patches import patchify
from trainer.families.vit import TicketViT

pytestmark = pytest.mark.slow

BLOCKS = (1, 3, 4)


def places(images: Tensor) -> Tensor:
    return torch.arange(N).expand(len(images), -1)


def feed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """All patches of the images, and their places."""
    return patchify(images, model.patch_embed.patch_size[0]), places(images)


def naive(
    model: nn.Module, image: Tensor, prefix: int, rate: float, fuse: bool, blocks: tuple[int, ...] = BLOCKS
) -> tuple[Tensor, list[int]]:
    """EViT in its own order, of one image: logits [1, classes], and the survivors, most attended first."""
    x = embedded(model, image[None])
    alive = list(range(N))
    ranked: list[int] = []
    for number, block in enumerate(model.blocks):
        weights, out = full_attention(block, x)
        x = x + block.ls1(out)
        if number in blocks:
            score = weights.mean(1)[0, 0, prefix:]
            order = sorted(range(len(alive)), key=lambda i: -score[i].item())
            left = math.ceil(rate * len(alive))
            kept, lost = order[:left], order[left:]
            ranked = [alive[i] for i in kept]
            tokens = [*x[0, :prefix], *(x[0, prefix + i] for i in kept)]
            alive = list(ranked)
            if fuse and lost:
                tokens.append(sum(score[i] * x[0, prefix + i] for i in lost))
                alive.append(FUSED)
            x = torch.stack(tokens)[None]
        x = mlp(block, x)
    x = model.norm(x)
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2, ranked
    return model.head(x[:, 0]), ranked


@pytest.mark.parametrize("rate", [0.9, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_survivors_are_the_miners_ticket(family: str, rate: float) -> None:
    model = sharpened(FAMILIES[family]())
    images = pixels(model, 4)
    selector = create_selector("evit", model, GRID, keep_counts(N, rate), BLOCKS)
    survivors = DroppingViT(model, BLOCKS, rate).survivors(*feed(model, images))
    assert survivors.tolist() == selector.rank(images)[:, : selector.k].tolist()
    # The negative controls: another image's ticket, and a drop block less.
    assert survivors.tolist() != selector.rank(images.roll(1, 0))[:, : selector.k].tolist()
    assert survivors.tolist() != DroppingViT(model, BLOCKS[1:], rate).survivors(*feed(model, images)).tolist()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("family", ["deit", "distilled", "registers"])
def test_survivors_are_the_miners_ticket_in_float32_and_under_bf16(family: str, amp: bool) -> None:
    model = sharpened(FAMILIES[family]()).float()
    images = pixels(model, 4).float()
    selector = create_selector("evit", model, GRID, keep_counts(N, 0.7), BLOCKS, amp=amp)
    seen: list[Tensor] = []
    dropping = DroppingViT(model, BLOCKS, 0.7)
    drop = dropping._drop
    dropping._drop = lambda x, at, scores, count: seen.append(scores) or drop(x, at, scores, count)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        survivors = dropping.survivors(*feed(model, images))
    assert survivors.tolist() == selector.rank(images)[:, : selector.k].tolist()
    assert [scores.dtype for scores in seen] == [torch.float32] * 2
    assert [scores.shape[1] for scores in seen] == [36, 26]


def test_survivors_of_a_forward_are_those_of_survivors() -> None:
    model = sharpened(vit())
    images = pixels(model)
    dropping = DroppingViT(model, BLOCKS, 0.7)
    patches, at = feed(model, images)
    _, left = dropping._run(patches, at, 6)
    survivors = dropping.survivors(patches, at)
    assert left.tolist() == survivors.sort(dim=1).values.tolist()  # tokens stay in raster order
    assert left.tolist() != survivors.tolist()
    turned = torch.randperm(N)  # patches may come in any order
    assert torch.equal(dropping.survivors(patches[:, turned], at[:, turned]), survivors)
    assert torch.equal(dropping(patches[:, turned], at[:, turned]), dropping(patches, at))
    with pytest.raises(ValueError, match="expected all 36 patches to drop some of, got 9"):
        dropping(patches[:, :9], at[:, :9])


def test_equal_scores_keep_the_lower_patches() -> None:
    model = sharpened(vit())
    for block in model.blocks:  # no queries: attention is exactly uniform, whatever the pixels
        block.attn.qkv.weight[:48] = 0
        block.attn.qkv.bias[:48] = 0
    for fuse in (False, True):  # a fused token stands behind the patches
        survivors = DroppingViT(model, BLOCKS, 0.7, fuse).survivors(*feed(model, pixels(model, 2)))
        assert survivors.tolist() == [list(range(14))] * 2


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("rate", [0.9, 0.55])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_a_naive_one(family: str, rate: float, fuse: bool) -> None:
    model, prefix = sharpened(FAMILIES[family]()), PREFIX.get(family, 1)
    images = pixels(model, 2)
    dropping = DroppingViT(model, BLOCKS, rate, fuse)
    logits, survivors = dropping(*feed(model, images)), dropping.survivors(*feed(model, images))
    for row, image in enumerate(images):
        expected, ranked = naive(model, image, prefix, rate, fuse)
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-9, atol=1e-9)
        assert survivors[row].tolist() == ranked
    # The negative controls: the other kind of drop, and none.
    assert (logits[:1] - naive(model, images[0], prefix, rate, not fuse)[0]).abs().max() > 1e-4
    assert (logits - model(images)).abs().max() > 1e-4


def test_a_fused_token_competes_at_the_next_drop_block() -> None:
    model = sharpened(vit())
    images = pixels(model, 24)
    kept = (DroppingViT(model, BLOCKS, 0.8, True).survivors(*feed(model, images)) == FUSED).sum(1)
    assert 0 < (kept > 0).sum() < 24  # kept in some images, fused again in others: the naive forward knows both


@pytest.mark.parametrize(("fuse", "tokens"), [(False, [36, 26, 26, 19, 14, 14]), (True, [36, 27, 27, 20, 15, 15])])
def test_how_many_tokens_reach_each_mlp(fuse: bool, tokens: list[int]) -> None:
    model = sharpened(vit())
    shapes = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[1] - 1))
    DroppingViT(model, BLOCKS, 0.7, fuse)(*feed(model, pixels(model)))
    assert shapes == tokens  # fused: ceil(.7 * 27) + 1 = 20, ceil(.7 * 20) + 1 = 15


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    forward().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, gradient in some.items():
        scale = gradient.abs().max() + 1e-30
        assert (gradient - others[name]).abs().max() / scale < 1e-9, name


@pytest.mark.parametrize("family", ["deit", "distilled", "registers"])
def test_without_dropping_it_is_timms_model(family: str) -> None:
    model = sharpened(FAMILIES[family]()).requires_grad_(True)
    images = pixels(model, 2)
    patches, at = feed(model, images)
    plain = gradients(model, lambda: model(images))
    for fuse in (False, True):
        dropping = DroppingViT(model, BLOCKS, 1.0, fuse)
        assert (dropping(patches, at) - model(images)).abs().max() < 1e-10
        assert_same(plain, gradients(model, lambda: dropping(patches, at)))  # noqa: B023
    dropping.set_rate(0.7)
    some = dropping(patches, at)
    assert (some - model(images)).abs().max() > 1e-4
    dropping.drops = False
    assert (dropping(patches, at) - model(images)).abs().max() < 1e-10
    assert (dropping(patches[:, :9], at[:, :9]) - TicketViT(model)(patches[:, :9], at[:, :9])).abs().max() == 0


@pytest.mark.parametrize("fuse", [False, True])
def test_gradients_are_those_of_the_naive_forward_with_checkpointing_too(fuse: bool) -> None:
    model = sharpened(vit(drop_path_rate=0.3)).requires_grad_(True)
    images = pixels(model, 2)
    inputs = feed(model, images)
    dropping = DroppingViT(model, BLOCKS, 0.7, fuse)
    ours = gradients(model, lambda: dropping(*inputs))
    assert_same(ours, gradients(model, lambda: torch.cat([naive(model, i, 1, 0.7, fuse)[0] for i in images])))
    dropping.train()

    def seeded() -> Tensor:
        torch.manual_seed(3)
        return dropping(*inputs)

    plain = gradients(model, seeded)
    model.set_grad_checkpointing(True)
    assert_same(plain, gradients(model, seeded))
    assert not torch.equal(plain["cls_token"], ours["cls_token"])  # drop path was on


def test_scores_do_not_cut_gradients_under_autocast() -> None:
    model = sharpened(vit()).float().requires_grad_(True)
    inputs = feed(model, pixels(model, 2).float())
    dropping = DroppingViT(model, BLOCKS, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model, lambda: dropping(*inputs).float())
    assert rough.keys() == gradients(model, lambda: dropping(*inputs)).keys()
    assert all(gradient.abs().max() > 0 for name, gradient in rough.items() if "weight" in name)


def test_a_dropped_patch_reaches_the_loss_through_attention_or_a_fused_token_alone() -> None:
    def reach(fuse: bool, drops: bool = True) -> list[bool]:
        patches.grad = None
        dropping = DroppingViT(model, (0,), 0.7, fuse)
        dropping.drops = drops
        dropping(patches, at).square().sum().backward()
        return (patches.grad.abs().amax((0, 2)) > 0).tolist()

    model = sharpened(vit())
    patches, at = feed(model, pixels(model, 1))
    patches.requires_grad_(True)
    kept = set(DroppingViT(model, (0,), 0.7).survivors(patches, at)[0].tolist())
    assert reach(False) == [True] * N  # the other tokens attended to it in block 0, before it was dropped
    nn.init.zeros_(model.blocks[0].attn.proj.weight)  # now block 0 mixes no tokens
    assert reach(False) == [patch in kept for patch in range(N)]
    assert reach(True) == reach(False, drops=False) == [True] * N  # the negative controls


def test_only_a_fused_token_gives_scores_a_gradient() -> None:
    model = sharpened(vit(depth=1)).requires_grad_(True)
    inputs = feed(model, pixels(model, 2))
    nn.init.zeros_(model.blocks[0].attn.proj.weight)  # queries and keys matter to the scores alone
    model.global_pool = "avg"  # a head that reads the fused token
    for fuse in (False, True):
        found = gradients(model, lambda: DroppingViT(model, (0,), 0.7, fuse)(*inputs))  # noqa: B023
        assert bool(found["blocks.0.attn.qkv.weight"][:96].any()) is fuse


def test_the_schedule_is_evits() -> None:
    at = [keep_rate_at(update, 10, 110, 0.7) for update in (0, 9, 10, 35, 60, 85, 109, 110, 5000)]
    # .7 + .3 * (1 + cos(0, 45, 90, 135, 178.2 degrees)) / 2
    assert at == pytest.approx([1, 1, 1, 0.956066017, 0.85, 0.743933983, 0.700074015, 0.7, 0.7], abs=1e-9)
    assert [keep_rate_at(update, 0, 0, 0.9) for update in (0, 1)] == [0.9, 0.9]
    assert [keep_rate_at(update, 5, 5, 0.9) for update in (4, 5)] == [1.0, 0.9]
    rates = [keep_rate_at(update, 10, 110, 0.7) for update in range(130)]
    assert rates == sorted(rates, reverse=True)


def test_its_checkpoint_is_timms() -> None:
    dropping = DroppingViT(timm.create_model("test_vit", img_size=64, num_classes=3), (1, 3), 0.7, True)
    fresh = timm.create_model("test_vit", img_size=64, num_classes=3)
    assert list(dropping.model.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(dropping.model.state_dict())
    assert (dropping.grid, dropping.patch_size, dropping.whole_side, dropping.wants_all) == ((4, 4), 16, 64, False)
    assert dropping.feed == "patches, of which blocks 1, 3 drop some"


def unusual() -> nn.Module:
    model = vit()
    model.blocks[2] = ParallelThingsBlock(48, 3)
    assert isinstance(model.blocks[1], Block)
    return model


@pytest.mark.parametrize(
    ("build", "arguments", "reason"),
    [
        (vit, {"drop_blocks": (3, 6)}, "`drop_blocks` 3,6: expected ascending block numbers from 0 to 5"),
        (vit, {"drop_blocks": (3, 1)}, "ascending"),
        (vit, {"drop_blocks": ()}, "ascending"),
        (vit, {"keep_rate": 0}, r"`keep_rate` 0: expected a keep rate in \(0, 1\], got 0"),
        (vit, {"keep_rate": 1.2}, "got 1.2"),
        (lambda: vit(class_token=False, global_pool="avg"), {}, "with a class token"),
        (lambda: timm.create_model("resnet18"), {}, "cannot take tickets"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), {}, "with a class token"),
        (lambda: vit(pos_drop_rate=0.1), {}, "dropout of position"),
        (unusual, {}, "got ParallelThingsBlock"),
    ],
)
def test_refusals_are_one_line(build: Callable[[], nn.Module], arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(TicketSetError, match=reason) as error:
        DroppingViT(build(), **arguments)
    assert "\n" not in str(error.value)
