"""Feeding tickets to LV-ViT: against its own forward, and MixToken against loops over images and tokens."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from shards.errors import TicketSetError
from trainer.data.augment import seeded
from trainer.data.mixing import draw_box, mixed_tickets
from trainer.families.lvvit import TicketLVViT, blank_unused, sources, ticket_targets
from trainer.families.lvvit_model import LVViT
from trainer.families.patches import gather_patches, patchify

pytestmark = pytest.mark.slow

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
GRID, N, K, B, C = (4, 4), 16, 7, 4, 5
MODES = ("late", "early")
BOXES = {"inside": (1, 3, 1, 4), "at the border": (0, 2, 2, 4), "empty": (2, 2, 0, 3), "everything": (0, 4, 0, 4)}


def build(mode: str) -> tuple[TicketLVViT, LVViT, Tensor, Tensor]:
    """float64 model in eval mode with everything random, images and random places of K patches."""
    torch.manual_seed(0)
    model = timm.create_model("lvvit_s", **SMALL).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(B, 3, 64, 64, dtype=torch.float64)
    keep = torch.stack([torch.randperm(N)[:K] for _ in range(B)])
    return TicketLVViT(model, mode), model, images, keep


def tickets(box: tuple[int, ...]) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Rankings, the box, and the mixed tickets' places and lambda."""
    rng = np.random.default_rng(2)
    rankings = np.stack([rng.permutation(N) for _ in range(B)])
    keep, lam = mixed_tickets(rankings, np.array(box), GRID, K)
    return rankings, torch.tensor(box), torch.from_numpy(keep), torch.from_numpy(lam)


def in_box(cell: int, box: tuple[int, ...]) -> bool:
    top, bottom, left, right = box
    return top <= cell // GRID[1] < bottom and left <= cell % GRID[1] < right


@pytest.mark.parametrize("mode", MODES)
def test_all_patches_equal_the_models_own_forward(mode):
    wrapped, model, images, _ = build(mode)
    whole = model(images)
    keep = torch.stack([torch.randperm(N) for _ in range(B)])
    assert (wrapped(patchify(images, 16), keep) - whole).abs().max() < 1e-12
    moved = wrapped(patchify(images, 16).roll(1, 1), keep)  # negative control
    assert (moved - whole).abs().max() > 1e-3


def test_late_is_the_stem_on_the_whole_view_then_gathering():
    wrapped, model, images, keep = build("late")
    class_logits, dense = model.forward_tokens(gather_patches(model.patch_embed(images), keep), keep)
    assert (wrapped(patchify(images, 16), keep) - LVViT.combine(class_logits, dense)).abs().max() < 1e-12
    wrapped.train()
    tokens = gather_patches(model.patch_embed(images), keep)
    expected = model.forward_tokens(tokens, keep)
    outputs = wrapped(patchify(images, 16), keep)
    assert outputs[1].shape == (B, K, C)
    assert all((ours - theirs).abs().max() < 1e-12 for ours, theirs in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [False, True])
def test_dropped_pixels_reach_late_alone(mode, training):
    wrapped, _, images, keep = build(mode)
    wrapped.train(training)
    patches = patchify(images, 16)
    noise = torch.randn_like(patches).scatter(1, keep[:, :, None].expand(-1, -1, patches.shape[-1]), 0)
    before, after = wrapped(patches, keep), wrapped(patches + noise, keep)
    pairs = zip(before, after, strict=True) if training else [(before, after)]
    difference = max((a - b).abs().max() for a, b in pairs)
    assert difference == 0 if mode == "early" else difference > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_without_token_labels_both_heads_learn(mode):
    wrapped, model, images, keep = build(mode)
    targets = torch.randn(B, C, dtype=torch.float64).softmax(-1)
    patches = patchify(images, 16)
    by_hand = -(targets * wrapped(patches, keep).log_softmax(-1)).sum() / B  # eval mode: what is tested is trained
    logits, dense = model.forward_tokens(wrapped_tokens(wrapped, patches, keep), keep)
    loss = wrapped.loss((logits, dense), targets, {}, 0.0)
    assert abs(loss.item() - by_hand.item()) < 1e-6
    wrapped.train()
    wrapped.loss(wrapped(patches, keep), targets, {}, 0.0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def wrapped_tokens(wrapped: TicketLVViT, patches: Tensor, keep: Tensor) -> Tensor:
    """The tokens that enter the first block."""
    seen = []
    hook = wrapped.model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    wrapped(patches, keep)
    hook.remove()
    return seen[0][:, 1:] - wrapped.model.pos_embed[0, 1:][keep]


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_mixed_tickets_against_a_loop(box):
    rankings, _, keep, lam = tickets(box)
    for i in range(B):
        ranks = [list(rankings[i ^ 1 if in_box(cell, box) else i]).index(cell) for cell in range(N)]
        expected = sorted(range(N), key=lambda cell: (ranks[cell], cell))[:K]
        assert keep[i].tolist() == expected
        assert abs(lam[i] - sum(not in_box(cell, box) for cell in expected) / K) < 1e-6
    if box == BOXES["empty"]:
        assert np.array_equal(keep, rankings[:, :K]) and lam.tolist() == [1] * B


def loop_views(images: Tensor, keep: Tensor, box: tuple[int, ...]) -> Tensor:
    """What the stem may see in `early`: each image's patches that some ticket uses."""
    seen = torch.zeros_like(images)
    for i in range(B):
        for cell in keep[i].tolist():
            source = i ^ 1 if in_box(cell, box) else i
            y, x = cell // GRID[1] * 16, cell % GRID[1] * 16
            seen[source, :, y : y + 16, x : x + 16] = images[source, :, y : y + 16, x : x + 16]
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_mix_token_against_a_loop(mode, box):
    wrapped, model, images, _ = build(mode)
    _, box_tensor, keep, lam = tickets(box)
    wrapped.train()
    views = loop_views(images, keep, box) if mode == "early" else images
    stemmed = model.patch_embed(views)  # in training mode: BatchNorm sees the whole batch at once
    class_targets = torch.randn(B, C, dtype=torch.float64).softmax(-1)
    dense_targets = torch.randn(B, N, C, dtype=torch.float64).softmax(-1)
    tokens, labels, mixed = [], [], []
    for i in range(B):
        from_whom = [i ^ 1 if in_box(cell, box) else i for cell in keep[i].tolist()]
        tokens.append([stemmed[who, cell] for who, cell in zip(from_whom, keep[i].tolist(), strict=True)])
        labels.append([dense_targets[who, cell] for who, cell in zip(from_whom, keep[i].tolist(), strict=True)])
        mixed.append(sum(class_targets[who] for who in from_whom) / K)
    expected = model.forward_tokens(torch.stack([torch.stack(row) for row in tokens]), keep)
    outputs = wrapped(patchify(images, 16), keep, box_tensor)
    assert all((ours - theirs).abs().max() < 1e-11 for ours, theirs in zip(outputs, expected, strict=True))
    source = sources(keep, box_tensor, GRID[1])
    classes, dense = ticket_targets(class_targets, dense_targets, keep, source)
    assert (classes - torch.stack(mixed)).abs().max() < 1e-12
    assert torch.equal(dense, torch.stack([torch.stack(row) for row in labels]))
    by_lam = lam[:, None] * class_targets + (1 - lam[:, None]) * class_targets[torch.arange(B) ^ 1]
    assert (classes - by_lam).abs().max() < 1e-6
    swapped = wrapped(patchify(images, 16), keep, None if box != BOXES["empty"] else torch.tensor([0, 4, 0, 4]))
    assert (swapped[0] - outputs[0]).abs().max() > 1e-3  # negative control


def test_early_blanks_what_neither_of_a_pair_uses():
    _, _, images, _ = build("early")
    box = BOXES["at the border"]
    _, box_tensor, keep, _ = tickets(box)
    shown = blank_unused(patchify(images, 16), keep, sources(keep, box_tensor, GRID[1]))
    assert torch.equal(shown, patchify(loop_views(images, keep, box), 16))
    counts = shown.any(-1).sum(1)
    assert counts.sum() == B * K and len(set(counts.tolist())) > 1  # K a ticket, not K an image


def test_early_with_mix_token_sees_no_unused_pixel():
    wrapped, _, images, _ = build("early")
    box = BOXES["inside"]
    _, box_tensor, keep, _ = tickets(box)
    noise = torch.randn_like(images)
    used = loop_views(torch.ones_like(images), keep, box)
    wrapped.train()
    before = wrapped(patchify(images, 16), keep, box_tensor)
    after = wrapped(patchify(images + noise * (1 - used), 16), keep, box_tensor)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for i in range(B):  # and every used patch counts
        for cell in used[i, 0, ::16, ::16].flatten().nonzero().flatten().tolist()[:2]:
            changed = patchify(images, 16)
            changed[i, cell] += 1
            assert not torch.equal(wrapped(changed, keep, box_tensor)[0], before[0])


def test_token_loss_by_hand_and_its_gradient():
    wrapped, _, _, keep = build("late")
    class_logits = torch.randn(B, C, requires_grad=True)
    all_dense = torch.randn(B, N, C, requires_grad=True)
    class_targets, dense_targets = torch.randn(B, C).softmax(-1), torch.randn(B, N, C).softmax(-1)
    targets = ticket_targets(class_targets, dense_targets, keep, sources(keep, None, GRID[1]))
    loss = wrapped.token_loss((class_logits, gather_patches(all_dense, keep)), *targets)
    expected = 0.0
    for i in range(B):
        expected -= sum(class_targets[i, c] * math.log(class_logits[i].softmax(0)[c].item()) for c in range(C)) / B
        for cell in keep[i].tolist():
            logs = all_dense[i, cell].softmax(0).log()
            expected -= (dense_targets[i, cell] * logs).sum().item() / (B * K)
    assert abs(loss.item() - float(expected)) < 1e-5
    loss.backward()
    kept = torch.zeros(B, N, dtype=torch.bool).scatter(1, keep, True)
    assert all_dense.grad is not None and torch.equal(all_dense.grad.any(-1), kept)


@pytest.mark.parametrize("mode", MODES)
def test_dense_targets_of_dropped_places_do_not_matter(mode):
    wrapped, model, images, _ = build(mode)
    _, box, keep, _ = tickets(BOXES["inside"])
    source = sources(keep, box, GRID[1])
    used = torch.zeros(B, N, dtype=torch.bool)
    used[source, keep] = True
    class_targets, dense = torch.randn(B, C).softmax(-1), torch.randn(B, N, C).softmax(-1)
    other = torch.where(used[:, :, None], dense, torch.randn(B, N, C).softmax(-1))
    wrapped.train()
    outputs = wrapped(patchify(images, 16), keep, box)
    losses = [wrapped.token_loss(outputs, *ticket_targets(class_targets, d, keep, source)) for d in (dense, other)]
    assert torch.equal(*losses)
    losses[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_an_odd_batch_that_is_not_mixed_keeps_its_targets():
    keep = torch.arange(6).view(3, 2)
    classes, dense = torch.randn(3, C), torch.randn(3, N, C)
    mixed, kept = ticket_targets(classes, dense, keep, sources(keep, None, GRID[1]))
    assert torch.equal(mixed, classes) and torch.equal(kept, gather_patches(dense, keep))


def test_boxes_have_the_public_codes_distribution():
    """Against all centers and many lambdas; its sides are even but where the border cuts them."""
    with seeded("box"):
        boxes = np.stack([draw_box((14, 10)) for _ in range(4000)])
    with seeded("box"):
        assert np.array_equal(draw_box((14, 10)), boxes[0])
    top, bottom, left, right = boxes.T
    assert (boxes >= 0).all() and bottom.max() == 14 and right.max() == 10
    heights, widths = bottom - top, right - left
    assert (heights[(top > 0) & (bottom < 14)] % 2 == 0).all() and (widths[(left > 0) & (right < 10)] % 2 == 0).all()
    areas = []
    for lam in np.linspace(0, 1, 2001):
        mean = 1.0
        for side in (14, 10):
            half, centers = int(side * math.sqrt(1 - lam)) // 2, np.arange(side)
            mean *= (np.minimum(centers + half, side) - np.maximum(centers - half, 0)).mean()
        areas.append(mean / 140)
    share = (heights * widths / 140).mean()
    assert abs(share - np.mean(areas)) < 0.015
    assert abs((heights / 14).mean() - (widths / 10).mean()) < 0.03


@pytest.mark.parametrize(
    ("name", "arguments", "mode", "reason"),
    [
        ("deit_tiny_patch16_224", {"depth": 1}, "late", "expected an LV-ViT"),
        ("lvvit_t", {"depth": 1}, "middle", "late, early, got middle"),
        ("lvvit_t", {"depth": 1, "in_chans": 1}, "late", "3 input channels, got 1"),
    ],
)
def test_what_it_cannot_feed_is_refused_in_words(name, arguments, mode, reason):
    with pytest.raises(TicketSetError, match=reason):
        TicketLVViT(timm.create_model(name, **arguments), mode)


def test_patches_of_a_ticket_alone_are_refused_and_the_state_dict_is_untouched():
    wrapped, _, images, keep = build("early")
    with pytest.raises(TicketSetError, match="all 16 patches of each view, got 7"):
        wrapped(gather_patches(patchify(images, 16), keep), keep)
    assert set(wrapped.model.state_dict()) == set(timm.create_model("lvvit_s", **SMALL).state_dict())
    assert (wrapped.grid, wrapped.patch_size, wrapped.whole_side) == (GRID, 16, 64) and wrapped.wants_all
