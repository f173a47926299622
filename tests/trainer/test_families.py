"""Swin, Hiera and CNNs on tickets: what their models see, by hand, and every arm through datalth-train."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from torch import Tensor

from conftest import long, mine
from miner.models import meta_model
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.rows import Rows
from trainer.cli import main
from trainer.engine import Stopped
from trainer.families.hiera import TicketHiera
from trainer.families.patches import patchify
from trainer.families.registry import FAMILIES, Family, family_of, feed_of
from trainer.families.swin import TicketSwin
from trainer.families.zero import TicketZero
from trainer.trainer import Trainer
from training import arguments, same, stopped_at, train, two_ranks, weights_of

pytestmark = pytest.mark.slow  # trains every family

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
    student = TicketSwin(model, (4, 4), 16, 48)
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
    student = TicketZero(model, (4, 4), 16, 64)
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
    student = TicketHiera(model, 32, 96)
    patches = patchify(images, 32)
    keep = torch.tensor([[8, 0, 4, 2], [1, 5, 3, 7]])
    mask = torch.zeros(2, 9, dtype=torch.bool).scatter(1, keep, True)
    kept = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
    assert torch.allclose(student(kept, keep), model.head(model(images, mask)), atol=1e-6)
    assert not torch.allclose(student(kept, keep), model(images), atol=1e-3)
    assert torch.equal(student(patches, torch.arange(9).expand(2, -1)), model(images))
    with pytest.raises(
        TicketSetError, match="3x3 mask units of 32 px, got patches of 16 px; mine with datalth-mine --patch-size 32"
    ):
        TicketHiera(model, 16, 96)


def test_families_are_told_by_timms_class():
    names = {
        "lvvit_t": "LVViT",
        "deit_tiny_patch16_224": "VisionTransformer",
        "eva02_tiny_patch14_224": "Eva",
        "swin_tiny_patch4_window7_224": "SwinTransformer",
        "hiera_tiny_224": "Hiera",
    }
    assert [family.timm_class for family in FAMILIES] == list(names.values())

    def family(name: str) -> Family:
        return family_of(meta_model(lambda: timm.create_model(name)))

    for name, timm_class in names.items():
        assert family(name).timm_class == timm_class
    for name in ("resnet50_clip", "convmixer_768_32", "resnest14d", "vgg11", "convnext_atto", "tf_efficientnet_b0"):
        assert family(name).name == "CNNs"
    for name in ("mixer_s32_224", "xcit_nano_12_p16_224", "gmlp_ti16_224"):
        with pytest.raises(TicketSetError, match="cannot take tickets. What can, and its `feed`: LV-ViT"):
            family(name)
    resnet = timm.create_model("test_resnet")
    assert feed_of(resnet, None) == ("zero", TicketZero)
    with pytest.raises(TicketSetError, match="`feed` tokens: CNNs take zero"):
        feed_of(resnet, "tokens")
    for other in ("mixer_b32_224", "xcit_nano_12_p16_224", "coat_lite_tiny"):
        with pytest.raises(
            TicketSetError, match=r"cannot take tickets\. What can, and its `feed`: .*Swin: small-dense"
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
        ("swin_tiny_patch4_window7_224", ["--feed", "zero"], "show the mean color"),
        ("test_resnet", [], "show the mean color"),
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


@pytest.mark.parametrize(
    ("name", "more"),
    [("swin_tiny_patch4_window7_224", ["--tokens", 9, "--unmask-epochs", 1]), long("test_resnet", [])],
)
def test_other_families_resume_to_the_same_weights(tickets, tmp_path, monkeypatch, name, more):
    assert_resumes(tickets, tmp_path, monkeypatch, *flags(name), *more)


def assert_resumes(tickets: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *model: object) -> None:
    """A run that SIGTERM stops in mid-epoch ends in the weights of one that was never stopped."""
    train(tickets, output, "whole", *model, plain=True)
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        train(tickets, output, "run", *model, plain=True, code=143)
    train(tickets, output, "run", *model, "--resume", "latest", plain=True)
    assert same(weights_of(output / "run"), weights_of(output / "whole"))


@pytest.mark.parametrize("arm", ["winning", "random"])
@pytest.mark.parametrize("feed", ["small-dense", "zero"])
def test_swin_trains_on_the_arms_own_patches(tickets, tmp_path, monkeypatch, feed, arm):
    """The paper's public code has it otherwise: its random arm drops nothing where patches are zeroed."""
    seen: dict[str, list[Tensor]] = {"keep": [], "images": []}
    kind = TicketSwin if feed == "small-dense" else TicketZero
    forward = kind.forward

    def looked_at(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
        if self.training and not keep_indices.is_meta:
            seen["keep"].append(keep_indices.sort(1).values)
            hook = self.model.register_forward_pre_hook(lambda _, inputs: seen["images"].append(inputs[0].detach()))
            out = forward(self, patches, keep_indices)
            hook.remove()
            return out
        return forward(self, patches, keep_indices)

    monkeypatch.setattr(kind, "forward", looked_at)
    more = ["--feed", feed, "--tokens", 9, "--tickets", arm, "--reprob", 0, *NO_MIX]
    train(tickets, tmp_path, "run", *flags("swin_tiny_patch4_window7_224"), *more, plain=True)
    keep, images = torch.cat(seen["keep"]), torch.cat(seen["images"])
    assert all(len(set(ticket)) == 9 for ticket in keep.tolist())
    blank = (patchify(images, 16) == 0).all(-1)
    if feed == "zero":
        assert torch.equal(blank, torch.ones(len(keep), 16).scatter(1, keep, 0).bool())
    else:
        assert images.shape[-2:] == (48, 48) and not blank.any()
    different = {tuple(ticket) for ticket in keep.tolist()}
    assert (different <= mined_tickets(tickets, 9)) == (arm == "winning")
    assert arm == "winning" or len(different) > 0.8 * len(keep)  # a last batch begins the epoch anew


def mined_tickets(folder: Path, tokens: int) -> set[tuple[int, ...]]:
    """All tickets of training views, as sorted patches."""
    rows = Rows(TicketSet.open(str(folder)), "train")
    rankings = [rows.read(*rows.locate(i)).rankings[1:] for i in range(len(rows))]
    return {tuple(sorted(r[:tokens].tolist())) for r in np.concatenate(rankings)}


@pytest.mark.long
def test_two_ranks_validate_and_save_one_model_where_batch_norm_averages(tickets, tmp_path):
    """Without it, each rank validates with averages of its own images."""
    resnet = [*flags("test_resnet"), "--epochs", 1, "--model-ema-decay", 0.5]
    ranks = two_ranks(*arguments(tickets, tmp_path, "two", *resnet, "-b", 2, plain=True))
    assert [(rank.communicate(timeout=120), rank.returncode)[1] for rank in ranks] == [0, 0]
    results = json.loads((tmp_path / "two/final.json").read_text())["results"]
    again = train(tickets, tmp_path, "x", "--eval", "--resume", tmp_path / "two", plain=True).output
    assert {"tickets", "ema_tickets"} <= results.keys()
    for name, figures in results.items():
        assert f"{name:12s} top-1 {figures['top1']:.2f}" in again and f"loss {figures['loss']:.4f}" in again


def test_swins_cost_is_held_against_the_whole_view_at_timms_own_window(tickets, tmp_path):
    def cost(*more: object) -> tuple[float, float]:
        train(tickets, tmp_path, "run", *flags("swin_tiny_patch4_window7_224"), *more, "--epochs", 1, plain=True)
        found = json.loads((tmp_path / "run/final.json").read_text())["cost"]
        shutil.rmtree(tmp_path / "run")
        return found["train_gmacs"], found["dense_gmacs"]

    (small, dense), (wide, same_dense) = cost("--tokens", 4), cost("--tokens", 4, "--model-kwargs", "window_size=4")
    assert dense == same_dense and small < wide
    assert small <= 4 / 16 * dense


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "test_resnet", "lvvit_t", "vit_small_patch16_dinov3"]
)
def test_a_curriculum_of_resolution_is_of_plain_vits_alone(tickets, tmp_path, name):
    words = ["--model", name, "--resize-to-tokens", "--tokens", 9, "--unmask-epochs", 1]
    said = train(tickets, tmp_path, "x", *words, plain=True, code=1).output.splitlines()[-1]
    assert "--unmask-epochs with --resize-to-tokens: expected a ViT, got" in said and not (tmp_path / "x").exists()


def test_hiera_trains_on_units(photos, tmp_path):
    mine("--data", photos, "--out", tmp_path / "set", "--method", "random", "--img-size", 96, "--patch-size", 32,
         "--tokens", 4, "--views", 3)  # fmt: skip
    output = train(tmp_path / "set", tmp_path, "run", *flags("hiera_tiny_224"), "--epochs", 1, plain=True).output
    assert "Hiera's own mask units" in output and "winning: 4 of 9 tokens" in output


def test_what_a_family_cannot_take_is_refused(tickets, photos, tmp_path: Path):
    refused = train(tickets, tmp_path, "x", "--token-labels", tmp_path / "maps", code=1).output
    assert "deit_tiny has no use for them; LV-ViT has" in refused
    refused = train(tickets, tmp_path, "x", "--mix-token", *NO_MIX, code=1).output
    assert "--mix-token: deit_tiny has none; it is LV-ViT's" in refused
    swin = flags("swin_tiny_patch4_window7_224")
    refused = train(tickets, tmp_path, "x", *swin, plain=True, code=1).output
    assert "8 is not a square; use --tokens 4 or 9" in refused
    hiera = [*flags("hiera_tiny_224"), "--model-kwargs", "patch_drop_rate=0.5"]
    for model, said in (
        ([*swin, "--feed", "tokens"], "take small-dense, zero"),
        ([*swin, "--tokens", 9, "--model-kwargs", "img_size=64"], "is for images of 64 px, but what it is fed has 48"),
        ([*swin, "--feed", "zero", "--model-kwargs", "in_chans=1"], "expected 3 input channels, got 1"),
        (["--model", "dla46_c", "--drop-path", 0, "--grad-checkpointing"], "--grad-checkpointing: dla46_c"),
        (["--model", "vgg11"], "--model vgg11: has no stochastic depth; use --drop-path 0"),
        (["--model", "resnet51"], "near: "),
        (["--model", "resnet10t", "--pretrained"], "--initial-checkpoint FILE"),
    ):
        assert said in train(tickets, tmp_path, "x", *model, plain=True, code=1).output
    units = tmp_path / "units"
    mine("--data", photos, "--out", units, "--method", "center", "--img-size", 64, "--patch-size", 32, "--tokens", 2,
         "--views", 2)  # fmt: skip
    assert "patch_drop_rate drops units" in train(units, tmp_path, "x", *hiera, plain=True, code=1).output


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


@pytest.mark.parametrize(
    ("arm", "feed"),
    [
        ("winning", "late"),
        ("full", "early"),
        *(long(arm, "late") for arm in ("random", "full")),
        *(long(arm, "early") for arm in ("winning", "random")),
    ],
)
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
    assert_resumes(tickets, tmp_path, monkeypatch, *lvvit)


def test_token_labels_and_mixed_pixels_are_refused_and_labels_can_be_left_out(tickets, maps, tmp_path):
    refused = train(tickets, tmp_path, "x", *LVVIT, "--token-labels", maps, plain=True, code=1).output
    assert "expected --mixup 0 --cutmix 0" in refused and "--token-labels none" in refused
    labeled = train(tickets, tmp_path, "a", *LVVIT, *NO_MIX, "--token-labels", maps, "--epochs", 1, plain=True).output
    assert f"token labels: of {maps}" in labeled
    without = train(tickets, tmp_path, "b", *LVVIT, "--token-labels", "none", "--epochs", 1, plain=True).output
    assert "token labels" not in without


def test_the_feed_gives_each_view_its_own_part_of_the_map(tickets, maps):
    from trainer.data.dataset import TicketDataset, Views
    from trainer.data.sampler import view_of_visit
    from trainer.options import Augment, Tickets

    opened = TicketSet.open(str(tickets))
    plain = Augment(mixup=0.0, cutmix=0.0, aa="", color_jitter=0.0, reprob=0.0)
    labels, views = TicketSet.open(str(maps), images=False), Views(64, 64, 16, token_labels=True)

    def dataset(**given: object) -> TicketDataset:
        return TicketDataset(opened, tickets=Tickets(repeats=2), augment=plain, batch_size=4, seed=0, **given)

    feed = dataset(views=views, token_labels=labels)
    rows, batch = feed.rows, feed[0, 0, 0]
    assert "token_labels" not in dataset(token_labels=labels)[0, 0, 0]  # a ViT has no use for them
    assert "token_labels" not in dataset(views=views, token_labels=False)[0, 0, 0]
    for slot, (shard, row, visit) in enumerate(feed.samples(0)[:4].tolist()):
        sample = rows.read(shard, row)
        top, left, height, width, flip = sample.views[view_of_visit(0, shard, row, visit, 4)].tolist()
        assert torch.equal(batch["token_labels"][slot], torch.from_numpy(sample.token_labels.astype("int32")))
        assert batch["boxes"][slot].tolist() == pytest.approx([top / 60, left / 80, height / 60, width / 80])
        assert bool(batch["flips"][slot]) == bool(flip)


@pytest.mark.long
def test_a_selector_whose_keep_rate_falls_resumes_exactly_and_is_tested_at_its_final_rate(
    tickets, tmp_path, monkeypatch
):
    selector = ["--tickets", "full", "--drop-blocks", "0,1", "--keep-rate", 0.4, "--epochs", 2, "--shrink-epochs", 2]
    train(tickets, tmp_path, "whole", *selector)
    cost = json.loads((tmp_path / "whole/final.json").read_text())["cost"]
    assert cost["test_gmacs"]["dropped"] < cost["train_gmacs"] < cost["test_gmacs"]["all"]

    def figures(run: str) -> list[list[str]]:
        return [line.split(",")[1:10] for line in (tmp_path / run / "summary.csv").read_text().splitlines()[1:]]

    def interrupted(self, batches):
        monkeypatch.setattr(Trainer, "_until_stopped", whole_validation)
        self.stopped_by = signal.SIGTERM
        raise Stopped

    whole_validation = Trainer._until_stopped
    monkeypatch.setattr(Trainer, "_until_stopped", interrupted)  # in the first epoch's validation, in mid-schedule
    train(tickets, tmp_path, "run", *selector, code=143)
    train(tickets, tmp_path, "run", *selector, "--resume", "latest")
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))
    assert figures("run") == figures("whole")
    never = tmp_path / "never"
    never.mkdir()
    again = train(tickets, never, "run", *selector[:6], "--epochs", 1, "--shrink-start-epoch", 1).output
    final = json.loads((never / "run/final.json").read_text())["results"]
    assert final["dropped"]["loss"] != final["all"]["loss"], again  # it has not dropped in training yet


@pytest.mark.long
def test_a_selector_learns_to_drop_and_the_miner_takes_it(tickets, photos, tmp_path):
    """Its survivors are the miner's tickets: tests/test_dropping_vit.py holds them against each other."""
    selector = ["--tickets", "full", "--drop-blocks", "0,1", "--keep-rate", 0.7, "--shrink-epochs", 1]
    output = train(tickets, tmp_path, "run", *selector).output
    assert "of which blocks 0, 1 drop some" in output
    results = json.loads((tmp_path / "run/final.json").read_text())["results"]
    assert list(results) == ["dropped", "all"] and results["dropped"]["loss"] != results["all"]["loss"]
    again = train(tickets, tmp_path, "x", "--eval", "--resume", tmp_path / "run").output
    assert f"top-1 {results['dropped']['top1']:.2f}" in again
    config = tmp_path / "run" / "args.yaml"
    repeated = CliRunner().invoke(main, ["-c", str(config), "--experiment", "repeated"])
    assert repeated.exit_code == 0, repeated.output
    assert same(weights_of(tmp_path / "repeated"), weights_of(tmp_path / "run"))
    assert "ascending block numbers from 0 to 1" in (
        train(tickets, tmp_path, "bad", "--tickets", "full", "--drop-blocks", "1,5", code=1).output
    )
    for flags, said in (
        (["--drop-blocks", "0,1"], "expected --tickets full beside it"),
        (["--keep-rate", 0.5], "--keep-rate: of a selector that drops patches inside; give --drop-blocks too"),
        (["--shrink-epochs", 1], "--shrink-epochs: of a selector"),
        ([*selector, "--tokens", 5], "--tokens: of students"),
        ([*selector, "--unmask-epochs", 1], "--unmask-epochs: of students"),
    ):
        assert said in train(tickets, tmp_path, "bad", *flags, code=1).output
    assert "expected block numbers like" in train(tickets, tmp_path, "bad", "--drop-blocks", "a", code=2).output
