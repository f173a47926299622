"""Feeding tokens equals timm's own forward: the lean feed against timm's patch_drop slot."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from shards.errors import TicketSetError
from trainer.families.coarse import CoarseViT
from trainer.families.patches import gather_patches, patchify, scatter_patches
from trainer.families.vit import TicketViT

SMALL = {"img_size": 48, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MODELS = {
    "deit": ("deit_tiny_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "distilled, dynamic": ("deit_tiny_distilled_patch16_224", {**SMALL, "dynamic_img_size": True}),
    "deit3": ("deit3_small_patch16_224", SMALL),
    "dynamic": ("vit_tiny_patch16_224", {**SMALL, "dynamic_img_size": True}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", SMALL),
    "siglip": ("vit_base_patch16_siglip_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 42}),
    "average pool": ("vit_base_patch16_224", {**SMALL, "global_pool": "avg", "class_token": False}),
    "grad checkpointing": ("deit_tiny_patch16_224", SMALL),
}
EVAS = ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"]


class Slot(nn.Module):
    """The oracle: selection after timm's own position embedding."""

    def __init__(self, prefix: int, keep: torch.Tensor) -> None:
        super().__init__()
        self.prefix, self.keep = prefix, keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([torch.arange(self.prefix).expand(len(x), -1), self.keep + self.prefix], dim=1)
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))


def build(name: str) -> tuple[VisionTransformer, torch.Tensor, torch.Tensor]:
    """float64 model with every parameter random, images, and a random subset of places."""
    torch.manual_seed(0)
    timm_name, arguments = MODELS[name]
    model = timm.create_model(timm_name, **arguments).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.set_grad_checkpointing(name == "grad checkpointing")
    size = arguments["img_size"]
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    keep = torch.stack([torch.randperm(9)[:5] for _ in range(3)])
    return model, images, keep


@pytest.mark.parametrize("name", MODELS)
def test_a_coarser_view_equals_timms_model_of_that_size_and_all_patches_the_full_one(name):
    """Timm's own way to another size: its checkpoint filter's resampling, here of the position table alone."""
    model, images, _ = build(name)
    timm_name, arguments = MODELS[name]
    patch, prefix = model.patch_embed.patch_size[0], 0 if model.no_embed_class else model.num_prefix_tokens
    small = timm.create_model(timm_name, **{**arguments, "img_size": 2 * patch}).double().eval()
    table = resample_abs_pos_embed(model.pos_embed, [2, 2], [3, 3], num_prefix_tokens=prefix)
    small.load_state_dict({**model.state_dict(), "pos_embed": table})
    student, coarse = CoarseViT(model, (2, 2)), images[:, :, : 2 * patch, : 2 * patch]
    assert (student.grid, student.whole_side) == ((2, 2), 3 * patch)
    every = [torch.arange(count).expand(3, -1) for count in (4, 9)]
    answer = student(patchify(coarse, patch), every[0])
    assert torch.allclose(answer, small(coarse), atol=1e-6)
    assert torch.allclose(student(patchify(images, patch), every[1]), model(images), atol=1e-10)
    answer.sum().backward()
    assert model.pos_embed.grad[:, prefix:].abs().sum(-1).min() > 0, "every position learns"


@pytest.mark.parametrize("name", MODELS)
def test_all_patches_equal_timm(name):
    model, images, _ = build(name)
    keep = torch.stack([torch.randperm(9) for _ in range(3)])
    patches = gather_patches(patchify(images, model.patch_embed.patch_size[0]), keep)
    assert (TicketViT(model)(patches, keep) - model(images)).abs().max() < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_a_subset_and_its_gradients_equal_selection_after_the_position_embedding(name):
    model, images, keep = build(name)
    model.train()
    model.distilled_training = False
    patches = gather_patches(patchify(images, model.patch_embed.patch_size[0]), keep)
    lean = TicketViT(model)(patches, keep)
    lean.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.patch_drop = Slot(model.num_prefix_tokens, keep)
    oracle = model(images)
    oracle.square().sum().backward()
    assert (lean - oracle).abs().max() < 1e-12
    for parameter_name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max() + 1e-30
        assert (gradients[parameter_name] - parameter.grad).abs().max() / scale < 1e-10, parameter_name
    model.patch_drop = Slot(model.num_prefix_tokens, keep.roll(1, 0))  # negative control: other places
    assert (lean - model(images)).abs().max() > 1e-3


@pytest.mark.parametrize("name", EVAS)
def test_rope_models_follow_the_places(name):
    if not timm.is_model(name):
        pytest.skip("a newer timm's")
    torch.manual_seed(0)
    size = 42 if "patch14" in name else 48
    model = timm.create_model(name, img_size=size, embed_dim=48, depth=2, num_heads=2, num_classes=5).double().eval()
    assert isinstance(model, Eva)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    whole = model(images)
    patches = patchify(images, model.patch_embed.patch_size[0])
    lean = TicketViT(model)
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    assert (lean(gather_patches(patches, order), order) - whole).abs().max() < 1e-12
    subset = order[:, :4]
    some = lean(gather_patches(patches, subset), subset)
    turned = subset.flip(1)
    assert (lean(gather_patches(patches, turned), turned) - some).abs().max() < 1e-12
    assert (lean(gather_patches(patches, subset), turned) - some).abs().max() > 1e-4  # negative control


def test_scatter_is_the_inverse_of_patchify_and_gather():
    images = torch.randn(2, 3, 32, 48)
    keep = torch.stack([torch.randperm(6) for _ in range(2)])
    assert torch.equal(scatter_patches(gather_patches(patchify(images, 16), keep), keep, (2, 3), 16), images)
    blank = scatter_patches(gather_patches(patchify(images, 16), keep[:, :1]), keep[:, :1], (2, 3), 16)
    assert (blank != 0).sum() == 2 * 3 * 256


def test_the_wrapped_models_state_dict_is_untouched():
    model, _, _ = build("deit")
    assert set(TicketViT(model).model.state_dict()) == set(timm.create_model(*MODELS["deit"][:1], **SMALL).state_dict())


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("resnet18", {}, "cannot take tickets"),
        ("beit_base_patch16_224", {"depth": 1}, "cannot take tickets"),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, "patch stem"),
        ("deit_tiny_patch16_224", {"depth": 1, "patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("deit_tiny_patch16_224", {"depth": 1, "pos_drop_rate": 0.1}, "dropout of position"),
    ],
)
def test_models_that_cannot_take_tickets_are_refused_in_words(name, arguments, reason):
    with pytest.raises(TicketSetError, match=reason):
        TicketViT(timm.create_model(name, **arguments))


@pytest.mark.slow
def test_the_library_name_is_the_class_and_the_package_alone_needs_no_torch():
    import subprocess
    import sys

    import trainer

    assert trainer.TicketViT is TicketViT
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        trainer.Other  # noqa: B018
    code = "import sys, trainer; assert 'torch' not in sys.modules; trainer.TicketViT; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
