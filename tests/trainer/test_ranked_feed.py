"""Training on ranked views: the prefix holds what the whole holds, and no more than it is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feeds import PLAIN, RICH, dataset, equal

from conftest import mine
from miner import writer
from shards import storage
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.rows import Rows
from trainer.data.dataset import TicketDataset, ValidationDataset, Views
from trainer.data.mixing import PatchMixing
from trainer.data.sampler import epoch_samples, view_of_visit
from trainer.families.patches import gather_patches, patchify
from trainer.options import ARMS, Recipe
from trainer.trainer import Trainer
from trainer.verdict.report import verdict
from training import train

PATCHES = {**PLAIN, "mixup": 0.8, "cutmix": 1.0, "mixing": "patches"}


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 photos, 4 views with random rankings of 16 patches, all stored."""
    out = tmp_path_factory.mktemp("ranked") / "set"
    mine("--data", photos, "--out", out, "--method", "random", "--views", 4, "--shard-size", 6, "--images", "ranked")
    return out


@pytest.fixture(scope="module")
def opened(folder: Path) -> TicketSet:
    return TicketSet.open(str(folder))


@pytest.fixture(scope="module")
def cut(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TicketSet:
    """The same, of which the best 8 patches are stored; tickets of 6."""
    out = tmp_path_factory.mktemp("cut") / "set"
    mine("--data", photos, "--out", out, "--method", "random", "--views", 4, "--shard-size", 6, "--images", "ranked",
         "--store-tokens", 7, "--tokens", 6)  # fmt: skip
    return TicketSet.open(str(out))


def through_whole_views(feed: TicketDataset) -> TicketDataset:
    """The same feed, made to put whole views together first."""
    feed._always_whole = "this test"
    return feed


def view_patches(opened: TicketSet, feed: TicketDataset, epoch: int) -> list[torch.Tensor]:
    """Of each sample of an epoch all patches of its view, by the oracle: uint8 [N, C*p*p]."""
    rows, out = Rows(opened, "train"), []
    for shard, row, visit in epoch_samples(feed.seed, epoch, rows.sizes, feed.tickets.repeats).tolist():
        sample = rows.read(shard, row)
        view = sample.render(view_of_visit(feed.seed, shard, row, visit, 4), 64)
        out.append(patchify(torch.from_numpy(view).permute(2, 0, 1)[None], 16)[0])
    return out


def bytes_read(monkeypatch: pytest.MonkeyPatch, feed: TicketDataset) -> int:
    """Of tars, by the first batch of an epoch."""
    read, sizes = storage._LocalRanges.read, []

    def counted(ranges: Any, offset: int, size: int) -> bytes:
        data = read(ranges, offset, size)
        sizes.append(len(data) if ranges._name.endswith(".tar") else 0)
        return data

    monkeypatch.setattr(storage._LocalRanges, "read", counted)
    feed[0, 0, 0]
    monkeypatch.setattr(storage._LocalRanges, "read", read)
    return sum(sizes)


# Prefixes.


@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 8, 15, 16])
def test_a_prefix_holds_the_tickets_patches(opened, tokens):
    feed = dataset(opened, PLAIN, tokens=tokens, repeats=3)
    for epoch in (0, 2):
        batch = feed[epoch, 0, 0]
        assert batch["patches"].shape == (8, tokens, 768) and feed.reads_prefixes(epoch)
        for i, patches in enumerate(view_patches(opened, feed, epoch)[:8]):
            expected = gather_patches(patches[None], batch["keep_indices"][i][None])[0]
            assert torch.equal(batch["patches"][i], expected)
            if tokens < 16:  # negative control: the patches beside them are others
                assert not torch.equal(batch["patches"][i], patches[:tokens])
    whole = through_whole_views(dataset(opened, PLAIN, tokens=tokens, repeats=3))
    assert all(equal(feed[epoch, 0, 0], whole[epoch, 0, 0]) for epoch in range(4))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_fed_the_stored_pixels(opened, arm):
    feed = dataset(opened, PLAIN, tickets=arm, tokens=16 if arm == "full" else 6)
    assert feed.reads_prefixes(0) == (arm == "winning")
    batch = feed[0, 0, 0]
    for i, patches in enumerate(view_patches(opened, feed, 0)[:8]):
        assert torch.equal(batch["patches"][i], gather_patches(patches[None], batch["keep_indices"][i][None])[0])


def test_no_more_is_read_than_the_patches_and_what_finds_them(opened, monkeypatch):
    read = {k: bytes_read(monkeypatch, dataset(opened, PLAIN, tokens=k)) for k in (4, 8, 12, 16)}
    head = 8 * (4 * 512 + 3 * 512 + 4 * (4 * 5 + 8))  # headers, padded members, the table
    rows, jpegs = Rows(opened, "train"), dict.fromkeys(read, 0)
    for shard, row, visit in epoch_samples(0, 0, rows.sizes, 1)[:8].tolist():
        ranked, view = rows.read(shard, row).ranked, view_of_visit(0, shard, row, visit, 4)
        for k in read:
            jpegs[k] += len(ranked.jpeg(view, k))
    assert read == {k: head + size for k, size in jpegs.items()}
    assert read[4] < read[8] < read[12] < read[16]
    whole = bytes_read(monkeypatch, dataset(opened, PLAIN, tickets="random", tokens=4))
    assert whole == read[16]  # a view, and not the four that a sample has
    assert read[16] < sum(int(size) for size in rows._extents[:8, 1]) / 2


def test_view_0_is_what_is_tested(opened):
    batch = ValidationDataset(opened, "val", batch_size=6)[0]
    for i, sample in enumerate(opened.stream("val")):
        view = torch.from_numpy(sample.render(0, 64)).permute(2, 0, 1)[None]
        assert torch.equal(batch["patches"][i], patchify(view, 16)[0])
        assert batch["rankings"][i].tolist() == sample.rankings[0].tolist()


def test_a_student_of_another_size_is_shown_views_that_are_resized_again(opened):
    feed = dataset(opened, PLAIN, tickets="full", views=Views(32, 32, 16))
    assert not feed.reads_prefixes(0)
    assert feed[0, 0, 0]["patches"].shape == (8, 4, 768)
    batch = ValidationDataset(opened, "val", views=Views(64, 32, 16), batch_size=6)[0]
    assert batch["whole"].shape == (6, 4, 768) and batch["patches"].shape == (6, 16, 768)


def test_mixing_by_pixels_is_that_of_whole_views(opened):
    feed = dataset(opened, RICH)
    assert not feed.reads_prefixes(0) and equal(feed[0, 0, 0], through_whole_views(dataset(opened, RICH))[0, 0, 0])


# A set that holds no whole views.


def test_a_cut_set_feeds_up_to_what_is_stored(opened, cut):
    assert (cut.stored_tokens, cut.holds_whole_views) == (8, False)
    a, b = (dataset(each, PLAIN, tokens=8)[0, 0, 0] for each in (opened, cut))
    assert equal(a, b)
    mixed = dataset(cut, PATCHES, tokens=8)[0, 0, 0]
    assert equal(mixed, dataset(opened, PATCHES, tokens=8)[0, 0, 0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 9}, "`tokens` 9: expected at most 8"),
        ({"tickets": "random"}, "`tickets` random"),
        ({"tickets": "random-fixed"}, "`tickets` random-fixed"),
        ({"tickets": "gaussian"}, "`tickets` gaussian"),
        ({"tickets": "inverse"}, "`tickets` inverse"),
        ({"tickets": "center"}, "`tickets` center"),
        ({"tickets": "full"}, "`tickets` full"),
        ({"mixup": 0.8}, "`mixing` patches"),
        ({"cutmix": 1.0}, "`mixing` patches"),
        ({"mix_token": True}, "`mix_token`"),
        ({"unmask_from": 1}, "`unmask_epochs`"),
        ({"views": Views(64, 64, 16, wants_all=True)}, "given all patches"),
        ({"tickets": "full", "views": Views(32, 32, 16)}, "`tickets` full"),
    ],
)
def test_what_needs_whole_views_is_refused_in_words(opened, cut, changes, said):
    dataset(opened, PLAIN, **changes)[0, 0, 0]
    with pytest.raises(TicketSetError, match=said) as caught:
        dataset(cut, PLAIN, **changes)
    assert "8" in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_set_trains_and_is_tested_on_tickets_alone(cut, tmp_path):
    flags = ["--tokens", 6, "--mixing", "patches", "--aa", "", "--color-jitter", 0]
    result = train(Path(cut.url), tmp_path, "run", *flags)
    assert "tickets" in result.output
    header = (tmp_path / "run" / "summary.csv").read_text().splitlines()[0]
    assert "tickets" in header and "all_" not in header and "random" not in header
    assert [group.protocols for group in verdict([tmp_path / "run"]).judges[0].groups] == [("tickets",)]
    refused = train(Path(cut.url), tmp_path, "no", "--unmask-epochs", 1, *flags, code=1)
    assert "--unmask-epochs" in refused.output and len(refused.output.strip().splitlines()) == 1


def test_protocols_that_need_whole_views_are_refused_and_said(cut, caplog):
    flags = {"model": "deit_tiny", "model_kwargs": {"embed_dim": 32, "depth": 1, "num_heads": 2}, "batch_size": 4}
    caplog.set_level("INFO")
    trainer = Trainer(
        cut, Recipe.of({**flags, "mixing": "patches", "aa": "", "repeats": 1, "workers": 0, "device": "cpu"})
    )
    assert trainer.protocols == ("tickets",) and "tested on tickets alone" in caplog.text
    assert trainer.evaluate(["tickets"])[0].keys() == {"tickets"}
    for protocols in (["all"], ["tickets", "random"]):
        with pytest.raises(TicketSetError, match="others need whole views, and only the best 8 of 16"):
            trainer.evaluate(protocols)


def test_a_member_of_a_later_version_is_passed_over(photos, opened, tmp_path, monkeypatch):
    """It stands before the views, so that more than expected must be read to find them."""
    encode = writer.encode_image

    def with_another(*arguments: Any) -> Any:
        members, columns = encode(*arguments)
        return members | {"later.bin": bytes(3000)}, columns

    monkeypatch.setattr(writer, "encode_image", with_another)
    mine("--data", photos, "--out", tmp_path / "set", "--method", "random", "--views", 4, "--shard-size", 6,
         "--images", "ranked")  # fmt: skip
    later = TicketSet.open(str(tmp_path / "set"))
    assert later.table("train")["bytes"] != opened.table("train")["bytes"]
    assert equal(dataset(later, PLAIN)[0, 0, 0], dataset(opened, PLAIN)[0, 0, 0])


# Mixing by patches.


def pick(share: float, inside: list[int] | None, tokens: int, rankings: list[list[int]]) -> tuple[Any, Any, Any]:
    box = None if inside is None else np.isin(np.arange(16), inside)
    mixing = PatchMixing(share, box, tokens)
    return mixing.pick(np.array(rankings)[:, : mixing.needed])


def test_mixup_takes_as_many_of_each_views_best_as_its_share_says():
    own, other = list(range(16)), list(range(15, -1, -1))
    views, ranks, lam = pick(0.75, None, 8, [own, other])
    assert [sorted(zip(v.tolist(), r.tolist(), strict=True)) for v, r in zip(views, ranks, strict=True)] == [
        [(0, r) for r in range(6)] + [(1, r) for r in range(2)],
        [(0, r) for r in range(2)] + [(1, r) for r in range(6)],
    ]
    assert lam.tolist() == [0.75, 0.75]
    assert PatchMixing(0.75, None, 8).needed == 6 and PatchMixing(0.1, None, 8).needed == 7
    assert pick(1.0, None, 8, [own, other])[2].tolist() == [1, 1]


def test_cutmix_takes_its_own_outside_the_box_and_the_others_inside():
    own, other = list(range(16)), list(range(15, -1, -1))
    views, ranks, lam = pick(0.75, [0, 1, 4, 5], 8, [own, other])
    places = np.array([own, other])[views, ranks]
    # Its own outside are 2, 3, 6, 7, and none of the other's best eight is inside: the next best of both fill up.
    assert places[0][views[0] == 0].tolist() == [2, 3, 6, 7, 0, 1]
    assert places[0][views[0] == 1].tolist() == [15, 14]
    assert places[1][views[1] == 1].tolist() == [15, 14, 13, 12, 11, 10]
    assert places[1][views[1] == 0].tolist() == [0, 1]
    assert lam.tolist() == [0.75, 0.75]


def test_what_belongs_goes_before_the_share():
    own = [2, 0, 3, 1, 6, 5, 7, 4, 8, 9, 10, 11, 12, 13, 14, 15]
    views, ranks, lam = pick(0.75, [0, 1, 4, 5], 4, [own, own])
    places = np.array([own, own])[views, ranks]
    # Three were wanted of its own, but only 2 and 3 are outside; the other has 0 and 1 inside.
    assert [dict(zip(p.tolist(), v.tolist(), strict=True)) for p, v in zip(places, views, strict=True)] == [
        {2: 0, 3: 0, 0: 1, 1: 1},
        {2: 1, 3: 1, 0: 0, 1: 0},
    ]
    assert lam.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("alphas", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
def test_a_batch_mixed_by_patches_holds_patches_of_both_views_unchanged(opened, alphas):
    feed = dataset(opened, PATCHES, **alphas, tokens=8)
    plain = dataset(opened, PLAIN, tokens=16)
    shares = set()
    for step in range(2):
        batch, patches = feed[0, step, 0], view_patches(opened, feed, 0)
        rankings = plain[0, step, 0]["keep_indices"]
        for i in range(8):
            at = (8 * step + i) % 21, (8 * step + (i ^ 1)) % 21
            own, other = patches[at[0]], patches[at[1]]
            fed = [
                "own" if torch.equal(patch, own[place]) else "other" if torch.equal(patch, other[place]) else "none"
                for patch, place in zip(batch["patches"][i], batch["keep_indices"][i].tolist(), strict=True)
            ]
            count = fed.count("own")
            assert "none" not in fed and batch["lam"][i] == count / 8
            if alphas["mixup"]:  # the best of each
                places = batch["keep_indices"][i].tolist()
                assert {p for p, f in zip(places, fed, strict=True) if f == "own"} == set(rankings[i][:count].tolist())
                assert {p for p, f in zip(places, fed, strict=True) if f == "other"} == set(
                    rankings[i ^ 1][: 8 - count].tolist()
                )
            shares.add(count)
        assert batch["partners"].tolist() == batch["labels"].view(-1, 2).flip(1).flatten().tolist()
    assert shares - {0, 8}


def test_mixing_by_patches_is_the_same_of_photos_but_for_the_jpeg(photos, opened, tmp_path):
    """The same rankings, the same draws: the same places and shares; pixels as near as quality 90 brings them."""
    mine("--data", photos, "--out", tmp_path / "copy", "--method", "random", "--views", 4, "--shard-size", 6)
    copy = TicketSet.open(str(tmp_path / "copy"))
    for step in range(2):
        a, b = (dataset(each, PATCHES, tokens=8)[0, step, 0] for each in (opened, copy))
        assert all(torch.equal(a[name], b[name]) for name in a if name != "patches")
        difference = (a["patches"].int() - b["patches"].int()).abs().float().mean()
        assert 0 < difference < 6
    exact = dataset(copy, {**PATCHES, "mixing": "pixels"}, tokens=8)[0, 0, 0]
    assert not torch.equal(exact["patches"], dataset(copy, PATCHES, tokens=8)[0, 0, 0]["patches"])


def test_mixing_by_patches_reads_no_more_than_it_needs(opened, monkeypatch):
    feed = dataset(opened, PATCHES, tokens=8)
    whole = dataset(opened, {**PATCHES, "mixing": "pixels"}, tokens=8)
    assert bytes_read(monkeypatch, feed) < bytes_read(monkeypatch, whole)


def test_where_all_patches_are_fed_mixing_is_by_pixels(opened):
    pixels, patches = (dataset(opened, {**PATCHES, "mixing": name}, unmask_from=1) for name in ("pixels", "patches"))
    assert equal(pixels[1, 0, 0], patches[1, 0, 0])
    assert not torch.equal(pixels[0, 0, 0]["patches"], patches[0, 0, 0]["patches"])


def test_models_that_cannot_take_a_place_twice_refuse_mixing_by_patches(folder, tmp_path):
    result = train(folder, tmp_path, "run", "--model", "lvvit_t", "--mixing", "patches", plain=True, code=1)
    assert "--mixing patches" in result.output
    with pytest.raises(TicketSetError, match="`mixing` patches"):
        dataset(TicketSet.open(str(folder)), PATCHES, views=Views(64, 64, 16, wants_all=True))
