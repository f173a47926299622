"""Swin, Hiera and CNNs on tickets: what their models see, by hand, and every arm through datalth-train."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from conftest import mine
from shards.errors import TicketSetError
from trainer.families import FAMILIES, FEEDS, family_of, feed_of, wrap
from trainer.ticket_vit import patchify
from training import same, stopped_at, train, weights_of

KWARGS = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "test_resnet": {},
    "hiera_tiny_224": {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 2, 1)},
}


def build(name: str, **size: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **KWARGS[name], **size).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keep() -> Tensor:
    """9 of 16 places, not in raster order."""
    return torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s))[:9] for s in (2, 3)])


def taken(images: Tensor, keep: Tensor) -> Tensor:
    patches = patchify(images, 16)
    return patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))


def test_swin_sees_the_tickets_patches_side_by_side_in_raster_order(images, keep):
    model = build("swin_tiny_patch4_window7_224", img_size=48)
    student = wrap("small-dense", model, (4, 4), 16, 48)
    packed = torch.zeros(2, 3, 48, 48)
    for image, ticket, out in zip(images, keep, packed, strict=True):
        for number, place in enumerate(sorted(ticket.tolist())):
            y, x, v, u = (16 * n for n in (*divmod(place, 4), *divmod(number, 3)))
            out[:, v : v + 16, u : u + 16] = image[:, y : y + 16, x : x + 16]
    expected = model(packed)
    assert torch.equal(student(taken(images, keep), keep), expected)
    other_order = keep.flip(1)
    assert torch.equal(student(taken(images, other_order), other_order), expected)
    assert not torch.allclose(student(taken(images, keep).flip(1), keep), expected)
    whole = torch.arange(9).expand(2, -1)
    assert torch.equal(student(patchify(packed, 16), whole), expected)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_resnet"])
def test_zero_feeds_the_image_with_dropped_patches_at_the_mean(images, keep, name):
    model = build(name, **({"img_size": 64} if "swin" in name else {}))
    student = wrap("zero", model, (4, 4), 16, 64)
    masked = images.clone()
    for image, ticket in zip(masked, keep, strict=True):
        for place in set(range(16)) - set(ticket.tolist()):
            y, x = (16 * n for n in divmod(place, 4))
            image[:, y : y + 16, x : x + 16] = 0
    assert torch.equal(student(taken(images, keep), keep), model(masked))
    assert not torch.allclose(model(images), model(masked))
    everything = torch.arange(16).expand(2, -1)
    assert torch.equal(student(patchify(images, 16), everything), model(images))


def test_hiera_drops_the_units_that_its_own_mask_leaves_out():
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    model = build("hiera_tiny_224", img_size=96)
    torch.nn.init.normal_(model.head.fc.weight)  # timm starts it at zero
    student = wrap("units", model, (3, 3), 32, 96)
    patches = patchify(images, 32)
    keep = torch.tensor([[8, 0, 4, 2], [1, 5, 3, 7]])
    mask = torch.zeros(2, 9, dtype=torch.bool).scatter(1, keep, True)
    kept = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
    assert torch.allclose(student(kept, keep), model.head(model(images, mask)), atol=1e-6)
    assert not torch.allclose(student(kept, keep), model(images), atol=1e-3)
    assert torch.equal(student(patches, torch.arange(9).expand(2, -1)), model(images))
    with pytest.raises(
        TicketSetError, match="3x3 mask units of 32 px, got patches of 16 px; mine with --patch-size 32"
    ):
        wrap("units", model, (6, 6), 16, 96)


def test_families_are_told_by_timms_class():
    names = ["deit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "hiera_tiny_224"]
    for name, family in zip(names, FAMILIES[-4:] if len(FAMILIES) > 4 else FAMILIES, strict=True):
        assert family_of(timm.create_model(name, num_classes=3)).timm_class == family.timm_class
    assert {feed for family in FAMILIES for feed in family.feeds} <= FEEDS.keys()
    resnet = timm.create_model("test_resnet")
    assert feed_of(resnet, None) == "zero"
    with pytest.raises(TicketSetError, match="--feed tokens: CNNs take zero"):
        feed_of(resnet, "tokens")
    for other in ("mixer_b32_224", "xcit_nano_12_p16_224", "coat_lite_tiny"):
        with pytest.raises(
            TicketSetError, match=r"cannot take tickets\. What can, and its --feed: .*Swin: small-dense"
        ):
            family_of(timm.create_model(other, num_classes=3))


def flags(name: str) -> list[object]:
    """datalth-train's for a tiny model; `train` adds those of a small ViT first, which this replaces."""
    out: list[object] = ["--model", name, "--drop-path", 0]
    for key, value in KWARGS[name].items():
        out += ["--model-kwargs", f"{key}={value}"]
    return out


@pytest.mark.parametrize(
    ("name", "more", "feed"),
    [
        ("swin_tiny_patch4_window7_224", ["--tokens", 9], "packed into 3 x 3 patches, 48 px"),
        ("swin_tiny_patch4_window7_224", ["--feed", "zero"], "show the mean colour"),
        ("test_resnet", [], "show the mean colour"),
    ],
)
@pytest.mark.parametrize("arm", ["winning", "random", "full"])
def test_every_arm_of_other_families_trains(tickets, tmp_path, name, more, feed, arm):
    output = train(tickets, tmp_path, "run", *flags(name), *more, "--tickets", arm, "--epochs", 1, plain=True).output
    assert feed in output
    final = json.loads((tmp_path / "run/final.json").read_text())
    assert list(final["results"]) == ["tickets", "all", "random"]
    gmacs = final["cost"]["test_gmacs"]
    packed = "packed" in feed
    assert (gmacs["tickets"] < final["cost"]["dense_gmacs"]) == packed  # zero saves nothing
    plain = timm.create_model(
        name, num_classes=3, **KWARGS[name], **({"img_size": 48 if packed else 64} if "swin" in name else {})
    )
    plain.load_state_dict(weights_of(tmp_path / "run"))


def test_swin_resumes_to_the_same_weights(tickets, tmp_path, monkeypatch):
    swin = [*flags("swin_tiny_patch4_window7_224"), "--tokens", 9, "--unmask-epochs", 1]
    train(tickets, tmp_path, "whole", *swin, plain=True)
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        train(tickets, tmp_path, "run", *swin, plain=True, code=143)
    train(tickets, tmp_path, "run", *swin, "--resume", "latest", plain=True)
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_hiera_trains_on_units(photos, tmp_path):
    mine("--data", photos, "--out", tmp_path / "set", "--method", "random", "--img-size", 96, "--patch-size", 32,
         "--tokens", 4, "--views", 3)  # fmt: skip
    output = train(tmp_path / "set", tmp_path, "run", *flags("hiera_tiny_224"), "--epochs", 1, plain=True).output
    assert "Hiera's own mask units" in output and "winning: 4 of 9 tokens" in output


def test_what_a_family_cannot_take_is_refused(tickets, tmp_path: Path):
    refused = train(tickets, tmp_path, "x", "--token-labels", tmp_path / "maps", code=1).output
    assert "deit_tiny has no use for them; LV-ViT has" in refused
    refused = train(tickets, tmp_path, "x", "--mix-token", code=1).output
    assert "--mix-token: deit_tiny has none; it is LV-ViT's" in refused
    swin = flags("swin_tiny_patch4_window7_224")
    refused = train(tickets, tmp_path, "x", *swin, plain=True, code=1).output
    assert "8 tokens are no square, so that they fill no image; choose --tokens 4 or 9" in refused
    assert (
        "take small-dense, zero" in train(tickets, tmp_path, "x", *swin, "--feed", "tokens", plain=True, code=1).output
    )


LVVIT = ["--model", "lvvit_t", "--model-kwargs", "embed_dim=48", "--model-kwargs", "depth=2", "--drop-path", 0]
NO_MIX = ["--mixup", 0, "--cutmix", 0]


@pytest.fixture(scope="module")
def maps(tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token labels of the same images, alone, from an untrained classifier of the set's classes."""
    root = tmp_path_factory.mktemp("maps")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), root / "labeller.pth")
    mine("--data", tickets, "--images", "link", "--method", "none", "--out", root / "set", "--token-labels",
         "test_resnet", "--token-label-weights", root / "labeller.pth")  # fmt: skip
    return root / "set"


@pytest.mark.parametrize("feed", ["late", "early"])
@pytest.mark.parametrize("arm", ["winning", "random", "full"])
def test_lvvit_trains_on_tickets_token_labels_and_mixed_tokens(tickets, maps, tmp_path, feed, arm):
    more = ["--feed", feed, "--mix-token", "--token-labels", maps, "--tickets", arm, "--epochs", 1]
    train(tickets, tmp_path, "run", *LVVIT, *NO_MIX, *more, plain=True)
    losses = []
    for name, flags in (("labels", more[:2] + more[3:]), ("plain", more[:2] + more[5:])):
        train(tickets, tmp_path, name, *LVVIT, *NO_MIX, *flags, plain=True)
        losses.append((tmp_path / name / "summary.csv").read_text().splitlines()[1].split(",")[1])
    assert losses[0] != losses[1]  # the labels are heard
    plain = timm.create_model("lvvit_t", num_classes=3, img_size=64, embed_dim=48, depth=2)
    plain.load_state_dict(weights_of(tmp_path / "run"))


def test_lvvit_resumes_to_the_same_weights(tickets, maps, tmp_path, monkeypatch):
    lvvit = [*LVVIT, *NO_MIX, "--mix-token", "--token-labels", maps, "--unmask-epochs", 1]
    train(tickets, tmp_path, "whole", *lvvit, plain=True)
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        train(tickets, tmp_path, "run", *lvvit, plain=True, code=143)
    train(tickets, tmp_path, "run", *lvvit, "--resume", "latest", plain=True)
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_the_feed_gives_each_view_its_own_part_of_the_map(tickets, maps):
    from shards.reader import TicketSet
    from shards.rows import Rows
    from trainer.feed import FeedOptions, TrainFeed
    from trainer.order import view_of_visit

    opened = TicketSet.open(str(tickets))
    rows = Rows(opened, "train", token_labels=TicketSet.open(str(maps), images=False))
    feed = TrainFeed(rows, FeedOptions("winning", 8, 64, 16, "ignore", 0, 4, 4, repeats=2, token_labels=True))
    batch = feed[0, 0, 0]
    assert "token_labels" not in TrainFeed(rows, replace(feed.options, token_labels=False))[0, 0, 0]
    for slot, (shard, row, visit) in enumerate(feed.samples(0)[:4].tolist()):
        sample = rows.read(shard, row)
        top, left, height, width, flip = sample.views[view_of_visit(0, shard, row, visit, 4)].tolist()
        assert torch.equal(batch["token_labels"][slot], torch.from_numpy(sample.token_labels.astype("int32")))
        assert batch["boxes"][slot].tolist() == pytest.approx([top / 60, left / 80, height / 60, width / 80])
        assert bool(batch["flips"][slot]) == bool(flip)


def test_a_selector_learns_to_drop_and_the_miner_takes_it(tickets, photos, tmp_path):
    """Its survivors are the miner's tickets: tests/test_dropping_vit.py holds them against each other."""
    selector = ["--tickets", "full", "--drop-blocks", "0,1", "--keep-rate", 0.7, "--shrink-epochs", 1]
    output = train(tickets, tmp_path, "run", *selector).output
    assert "of which blocks 0, 1 drop some" in output
    results = json.loads((tmp_path / "run/final.json").read_text())["results"]
    assert list(results) == ["dropped", "all"] and results["dropped"]["loss"] != results["all"]["loss"]
    again = train(tickets, tmp_path, "x", "--eval", "--resume", tmp_path / "run").output
    assert f"top-1 {results['dropped']['top1']:.2f}" in again
    refused = train(tickets, tmp_path, "bad", "--drop-blocks", "0,1", code=1).output
    assert "expected a ViT with --tickets full" in refused
    assert "ascending block numbers from 0 to 1" in (
        train(tickets, tmp_path, "bad", "--tickets", "full", "--drop-blocks", "1,5", code=1).output
    )
    assert "expected block numbers such as" in train(tickets, tmp_path, "bad", "--drop-blocks", "a", code=2).output
