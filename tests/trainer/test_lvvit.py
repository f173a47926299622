"""LV-ViT against the public model's names and shapes, and against a plain forward written from its formulas."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from miner.models import load_weights
from shards.errors import TicketSetError
from trainer.families.lvvit_model import LVViT

SMALL = {"img_size": (48, 32), "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}  # 3 x 2 patches
PATCHES = 6
# Parameters of the public code at 224 px; its README gives 8.53, 26.15 and 55.83 M.
PUBLIC = {"lvvit_t": (240, 12, 8_534_720), "lvvit_s": (384, 16, 26_151_824), "lvvit_m": (512, 20, 55_830_544)}


def build(name: str = "lvvit_s", **arguments) -> tuple[LVViT, Tensor]:
    """float64 model in eval mode with everything random, BatchNorm's averages too, and images."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.uniform_(0.5, 1.5)
    return model, torch.randn(3, 3, *SMALL["img_size"], dtype=torch.float64)


def public_shapes(dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    """The public state dict at 224 px, written down from models/lvvit.py and models/layers.py."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim)}

    def layer(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    for i, kernel in ((1, (64, 3, 7, 7)), (2, (64, 64, 3, 3)), (3, (64, 64, 3, 3))):
        layer(f"patch_embed.conv{i}", *kernel, bias=False)
        layer(f"patch_embed.bn{i}", 64)
        shapes[f"patch_embed.bn{i}.running_mean"] = shapes[f"patch_embed.bn{i}.running_var"] = (64,)
        shapes[f"patch_embed.bn{i}.num_batches_tracked"] = ()
    layer("patch_embed.proj", dim, 64, 8, 8)
    for block in (f"blocks.{i}" for i in range(depth)):
        layer(f"{block}.norm1", dim)
        layer(f"{block}.attn.qkv", 3 * dim, dim, bias=False)
        layer(f"{block}.attn.proj", dim, dim)
        layer(f"{block}.norm2", dim)
        layer(f"{block}.mlp.fc1", 3 * dim, dim)
        layer(f"{block}.mlp.fc2", dim, 3 * dim)
    layer("norm", dim)
    layer("head", 1000, dim)
    layer("aux_head", 1000, dim)
    return shapes


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """[B, I, H, W], [O, I, k, k] -> [B, O, h, w], tap by tap."""
    size = weight.shape[-1]
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h + 2 * padding, w + 2 * padding)
    wide[:, :, padding : padding + h, padding : padding + w] = x
    rows, columns = wide.shape[2] - size + 1, wide.shape[3] - size + 1
    taps = [
        torch.einsum("bihw,oi->bohw", wide[:, :, i : i + rows : stride, j : j + columns : stride], weight[:, :, i, j])
        for i in range(size)
        for j in range(size)
    ]
    return torch.stack(taps).sum(0)


def plain_stem(s: dict[str, Tensor], images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, N, D]; s is the state dict."""
    x = images
    for i, stride, padding in ((1, 2, 3), (2, 1, 1), (3, 1, 1)):
        x = convolve(x, s[f"patch_embed.conv{i}.weight"], stride, padding)
        mean, var, weight, bias = (
            s[f"patch_embed.bn{i}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        x = ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)
    x = convolve(x, s["patch_embed.proj.weight"], 8, 0) + s["patch_embed.proj.bias"][:, None, None]
    return torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], dim=1)


def plain_tokens(s: dict[str, Tensor], tokens: Tensor, places: list[list[int]], heads: int, skip_lam: float) -> Tensor:
    """One image at a time: tokens [B, K, D] at their places -> eval logits [B, C]."""

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    def attend(block: str, x: Tensor) -> Tensor:
        q, k, v = (x @ third.T for third in s[f"{block}.attn.qkv.weight"].chunk(3))
        size = x.shape[1] // heads
        parts = []
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            weights = torch.einsum("qd,kd->qk", q[:, own], k[:, own]).div(size**0.5).exp()
            parts.append(torch.einsum("qk,kd->qd", weights / weights.sum(1, keepdim=True), v[:, own]))
        return torch.cat(parts, dim=1) @ s[f"{block}.attn.proj.weight"].T + s[f"{block}.attn.proj.bias"]

    def mlp(block: str, x: Tensor) -> Tensor:
        x = x @ s[f"{block}.mlp.fc1.weight"].T + s[f"{block}.mlp.fc1.bias"]
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x @ s[f"{block}.mlp.fc2.weight"].T + s[f"{block}.mlp.fc2.bias"]

    logits = []
    for image, own in zip(tokens, places, strict=True):
        rows = [s["cls_token"][0, 0] + s["pos_embed"][0, 0]]
        rows += [token + s["pos_embed"][0, place + 1] for token, place in zip(image, own, strict=True)]
        x = torch.stack(rows)
        for i in range(SMALL["depth"]):
            x = x + attend(f"blocks.{i}", norm(f"blocks.{i}.norm1", x)) / skip_lam
            x = x + mlp(f"blocks.{i}", norm(f"blocks.{i}.norm2", x)) / skip_lam
        x = norm("norm", x)
        dense = x[1:] @ s["aux_head.weight"].T + s["aux_head.bias"]
        logits.append(x[0] @ s["head.weight"].T + s["head.bias"] + dense.max(0).values / 2)
    return torch.stack(logits)


def gather(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[-1]))


@pytest.mark.parametrize("name", PUBLIC)
def test_names_shapes_and_counts_are_the_public_ones(name):
    dim, depth, count = PUBLIC[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == public_shapes(dim, depth)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.blocks[0].attn.num_heads == {"lvvit_t": 4, "lvvit_s": 6, "lvvit_m": 8}[name]
    assert (model.patch_embed.grid_size, model.num_features, model.num_prefix_tokens) == ((14, 14), dim, 1)


@pytest.mark.parametrize(("name", "skip_lam"), [("lvvit_t", 1), ("lvvit_s", 2), ("lvvit_m", 2), ("lvvit_s", 3)])
def test_the_forward_is_the_plain_one_on_all_tokens_and_on_some(name, skip_lam):
    model, images = build(name, skip_lam=skip_lam) if skip_lam == 3 else build(name)
    state = model.state_dict()
    with torch.no_grad():
        tokens = model.patch_embed(images)
        assert (tokens - plain_stem(state, images)).abs().max() < 1e-12
        everything = [list(range(PATCHES))] * 3
        assert (model(images) - plain_tokens(state, tokens, everything, 2, skip_lam)).abs().max() < 1e-12
        assert torch.equal(model(images), model.combine(*model.forward_tokens(tokens)))
        places = torch.tensor([[4, 0, 3], [1, 5, 2], [0, 1, 2]])
        some = gather(tokens, places)
        class_logits, dense_logits = model.forward_tokens(some, places)
        assert (class_logits.shape, dense_logits.shape) == ((3, 5), (3, 3, 5))
        lean = model.combine(class_logits, dense_logits)
        assert (lean - plain_tokens(state, some, places.tolist(), 2, skip_lam)).abs().max() < 1e-12
        # Negative controls: another scale, other places; the same tokens in another order are the same ticket.
        assert (lean - plain_tokens(state, some, places.tolist(), 2, skip_lam + 1)).abs().max() > 1e-3
        assert (lean - model.combine(*model.forward_tokens(some, places.roll(1, 1)))).abs().max() > 1e-3
        turned = model.forward_tokens(some.flip(1), places.flip(1))
        assert (turned[0] - class_logits).abs().max() < 1e-12
        assert (turned[1].flip(1) - dense_logits).abs().max() < 1e-12


def test_gradients_reach_every_parameter_and_checkpointing_leaves_them():
    model, images = build()
    model.train()
    places = torch.tensor([[4, 0, 3], [1, 5, 2], [0, 1, 2]])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        class_logits, dense_logits = model.forward_tokens(gather(model.patch_embed(images), places), places)
        (class_logits.logsumexp(1).sum() + dense_logits.square().sum()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    assert all(g.abs().max() > 0 for g in plain.values())
    assert (plain["pos_embed"][0].abs().sum(1) > 0).all()  # these tickets touch every place, and the class token's
    model.set_grad_checkpointing()
    again = gradients()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_saved_weights_load_by_name(tmp_path):
    model, images = build()
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    other = timm.create_model("lvvit_s", **SMALL).double().eval()
    other.load_state_dict(load_state_dict(path, weights_only=True), strict=True)
    assert torch.equal(other(images), model(images))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "public.pth.tar")
    other = timm.create_model("lvvit_s", **SMALL).double().eval()
    assert load_weights(other, str(tmp_path / "public.pth.tar")) == []
    assert torch.equal(other(images), model(images))


def test_other_classes_and_sizes_start_from_trained_weights(tmp_path):
    """As timm's pretrained weights: both heads are left out, positions are resampled."""
    model, _ = build(img_size=32)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 5}
    wanted = {**SMALL, "img_size": (64, 48), "num_classes": 7}
    tuned = timm.create_model("lvvit_s", pretrained=True, pretrained_cfg_overlay=overlay, **wanted)
    assert (tuned.head.out_features, tuned.aux_head.out_features) == (7, 7)
    assert tuned.pos_embed.shape == (1, 13, 24) and torch.equal(tuned.pos_embed[:, 0], model.pos_embed[:, 0].float())
    assert torch.equal(tuned.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight.float())


def test_timms_habits():
    model, images = build(drop_path_rate=0.2)
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406) and "url" not in model.pretrained_cfg
    assert [b.drop_path2.drop_prob for b in model.blocks if hasattr(b.drop_path2, "drop_prob")] == [pytest.approx(0.2)]
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    seen = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert seen["patch_embed.conv2.weight"] == (0.125, 0.05) and seen["pos_embed"] == (0.125, 0)
    assert seen["blocks.0.mlp.fc1.weight"] == (0.25, 0.05) and seen["blocks.1.attn.qkv.weight"] == (0.5, 0.05)
    assert seen["aux_head.weight"] == seen["head.weight"] == (1.0, 0.05)
    with pytest.raises(TicketSetError, match=r"expected images of \(48, 32\) px, got \(32, 48\)"):
        model(images.mT)
    model.reset_classifier(0)
    assert model(images).shape == (3, 24)
    model.reset_classifier(7)
    assert model.double()(images).shape == (3, 7) and model.aux_head.out_features == 7
