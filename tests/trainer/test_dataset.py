"""The training feed: batches are pure functions of their place, and hold the pixels and patches they say."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from feeds import PLAIN, RICH, dataset, equal
from timm.data.mixup import Mixup, mixup_target

from conftest import long, mine
from shards import images
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.rows import Rows
from shards.sample import Sample
from shards.views import center_ranking
from trainer.data.augment import seeded
from trainer.data.dataset import TicketDataset, ValidationDataset, Views, loader
from trainer.data.sampler import epoch_samples, view_of_visit
from trainer.families.patches import gather_patches, patchify
from trainer.families.vit import TicketViT
from trainer.options import ARMS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 photos, 4 views with random rankings, shards of 6, 6, 6 and 3."""
    out = tmp_path_factory.mktemp("feed") / "set"
    mine("--data", photos, "--out", out, "--method", "random", "--views", 4, "--shard-size", 6)
    return out


@pytest.fixture(scope="module")
def opened(folder: Path) -> TicketSet:
    return TicketSet.open(str(folder))


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[tuple[int, int], Sample]:
    """(shard, row) -> sample, read as a stream."""
    opened = TicketSet.open(str(folder))
    return {
        (shard, row): sample
        for shard, name in enumerate(opened.shard_names("train"))
        for row, sample in enumerate(opened.stream_shard(name))
    }


def shown(feed: TicketDataset, epoch: int) -> list[tuple[int, int, int]]:
    """(shard, row, view) of an epoch's samples."""
    samples = epoch_samples(feed.seed, epoch, feed.rows.sizes, feed.tickets.repeats).tolist()
    return [(s, r, view_of_visit(feed.seed, s, r, visit, 4)) for s, r, visit in samples]


def whole(sample: Sample, view: int) -> torch.Tensor:
    """uint8 [N, C*p*p] by the oracle's patchify."""
    pixels = torch.from_numpy(sample.render(view, 64))
    return patchify(pixels.permute(2, 0, 1)[None], 16)[0]


# Purity.


def test_batches_are_equal_for_any_number_of_workers(opened):
    feed = dataset(opened, RICH)
    places = [(epoch, step, 0) for epoch in (0, 1) for step in range(feed.steps)]
    direct = [feed[place] for place in places]
    for workers in (0, 1, 3):
        batches = list(loader(feed, places, workers, CPU))
        assert len(batches) == len(places) == 6
        assert all(equal(a, b) for a, b in zip(batches, direct, strict=True)), workers
    assert not any(equal(a, b) for i, a in enumerate(direct) for b in direct[:i])


@pytest.mark.slow
@pytest.mark.parametrize("method", [long("spawn"), "fork"])
def test_batches_are_equal_however_workers_start(opened, method):
    feed = dataset(opened, RICH)
    places = [(0, 0, 0), (1, 2, 0)]
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        for place, batch in zip(places, loader(feed, places, 1, CPU), strict=True):
            assert equal(batch, feed[place])
    finally:
        torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("arm", ["winning", "random"])
def test_micro_batches_of_two_ranks_and_two_accumulation_steps_make_the_one_big_batch(opened, arm):
    options = dict(RICH, tickets=arm)
    big = dataset(opened, options, batch_size=16)
    small = dataset(opened, options, batch_size=4, micro_batches=4)
    assert small.places(0, 1, rank=1, ranks=2) == [(0, 1, 1), (0, 1, 3)]
    for epoch, step in ((0, 0), (0, 1), (3, 1)):  # step 1 begins the epoch anew
        one = big[epoch, step, 0]
        parts = [small[epoch, step, micro] for micro in range(4)]
        assert equal(one, {name: torch.cat([part[name] for part in parts]) for name in one})
        assert len({lam for part in parts for lam in part["lam"].tolist()}) == 1
        shuffled = {name: torch.cat([parts[i][name] for i in (0, 2, 1, 3)]) for name in one}
        assert not equal(one, shuffled)


def test_a_batch_depends_on_seed_epoch_and_step(opened):
    feed = dataset(opened, RICH)
    batch = feed[1, 1, 0]
    assert equal(batch, dataset(opened, RICH)[1, 1, 0])
    others = {
        "seed": dataset(opened, RICH, seed=1)[1, 1, 0],
        "epoch": feed[2, 1, 0],
        "cycle": feed[4, 1, 0],
        "step": feed[1, 0, 0],
    }
    for name, other in others.items():
        for field in ("patches", "keep_indices", "lam", "erase"):
            assert not torch.equal(batch[field], other[field]), (name, field)


def test_the_global_generators_are_left_as_they_were(opened):
    feed = dataset(opened, RICH)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state()
    feed[0, 0, 0]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1] and np.random.get_state()[2:] == before[2]
    assert torch.equal(torch.get_rng_state(), before[3])
    feed.color(np.zeros((8, 8, 3), np.uint8))  # negative control: without its guard it draws from them
    assert np.random.get_state()[2:] != before[2]


def test_a_failed_sample_leaves_the_generators_as_they_were():
    random.seed(1)
    state = random.getstate()
    with pytest.raises(ZeroDivisionError), seeded("x"):
        random.random()
        raise ZeroDivisionError
    assert random.getstate() == state


# Pixels and patches.


@pytest.mark.parametrize("arm", ARMS)
def test_patches_are_the_arms_patches_of_the_rendered_view(opened, stored, arm):
    options = dict(PLAIN, tickets=arm, tokens=16 if arm == "full" else 6, repeats=3)
    feed = dataset(opened, options)
    for epoch in (0, 4):
        places = shown(feed, epoch)
        for step in range(2):
            batch = feed[epoch, step, 0]
            assert batch["patches"].dtype == torch.uint8 and batch["keep_indices"].dtype == torch.int64
            assert (batch["lam"] == 1).all() and "erase" not in batch
            for i, (shard, row, view) in enumerate(places[8 * step : 8 * step + 8]):
                sample, keep = stored[shard, row], batch["keep_indices"][i]
                expected = {
                    "winning": sample.rankings[view][:6],
                    "inverse": sample.rankings[view][::-1][:6],
                    "center": center_ranking((4, 4))[:6],
                    "full": np.arange(16),
                }
                assert len(set(keep.tolist())) == len(keep)
                if arm in expected:
                    assert keep.tolist() == expected[arm].tolist()
                assert torch.equal(batch["patches"][i], gather_patches(whole(sample, view)[None], keep[None])[0])
                assert batch["labels"][i] == batch["partners"][i] == sample.label


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.8}, {"cutmix": 1.0}])
def test_all_patches_may_be_fewer_and_coarser_than_the_ticket_was_mined_on(opened, stored, changes):
    """--resize-to-tokens: whole views of 32 px, four patches, of a set with sixteen."""
    feed = dataset(opened, PLAIN, tickets="full", views=Views(32, 32, 16), **changes)
    batch = feed[0, 0, 0]
    assert batch["keep_indices"].tolist() == [[0, 1, 2, 3]] * 8
    if not changes:
        for patches, (shard, row, view) in zip(batch["patches"], shown(feed, 0), strict=False):
            sample = stored[shard, row]
            pixels = torch.from_numpy(sample.render(view, 32))
            assert torch.equal(patches, patchify(pixels.permute(2, 0, 1)[None], 16)[0])


def test_a_ticket_is_places_whatever_pixels_a_students_patch_has(opened, stored):
    """A set of 4 x 4 patches of 16 px, a student of 14 px: the same places, in the same view at 56 px."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=56, embed_dim=32, depth=1, num_heads=2)
    views = Views.of(opened, TicketViT(model))
    assert (views.side, views.whole_side, views.patch_size) == (56, 56, 14)
    feed = dataset(opened, PLAIN, views=views)
    batch = feed[0, 0, 0]
    assert torch.equal(batch["keep_indices"], dataset(opened, PLAIN)[0, 0, 0]["keep_indices"])
    for patches, keep, (shard, row, view) in zip(batch["patches"], batch["keep_indices"], shown(feed, 0), strict=False):
        pixels = torch.from_numpy(stored[shard, row].render(view, 56))
        assert torch.equal(patches, gather_patches(patchify(pixels.permute(2, 0, 1)[None], 14), keep[None])[0])


def test_every_image_is_decoded_once_a_batch(opened, monkeypatch):
    calls = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data, *rest: calls.append(data) or decode(data, *rest))
    feed = dataset(opened, RICH, batch_size=18)
    feed[0, 0, 0]
    assert len(calls) == len(set(calls)) == len({(s, r) for s, r, _ in shown(feed, 0)[:18]}) == 7
    calls.clear()
    dataset(opened, RICH, batch_size=18, repeats=1)[0, 0, 0]
    assert len(calls) == len(set(calls)) == 18


def test_a_cycle_of_epochs_shows_every_training_view_of_every_image_once_and_never_view_0(opened, stored):
    """Views are told by their pixels."""
    view_of = {whole(s, v).numpy().tobytes(): (s.key, v) for s in stored.values() for v in range(4)}
    assert len(view_of) == 84
    feed = dataset(opened, PLAIN, tickets="full", tokens=16, repeats=3, batch_size=7)
    for cycle in range(2):
        seen: Counter = Counter()
        for epoch in range(3 * cycle, 3 * cycle + 3):
            assert feed.steps == 3
            for step in range(3):
                seen.update(view_of[p.numpy().tobytes()] for p in feed[epoch, step, 0]["patches"])
        assert seen == Counter((s.key, v) for s in stored.values() for v in (1, 2, 3))


def test_a_set_of_one_view_trains_on_view_0(photos, tmp_path):
    mine("--data", photos, "--out", tmp_path / "set", "--method", "center", "--views", 1, "--limit", 6)
    opened = TicketSet.open(str(tmp_path / "set"))
    views = {whole(s, 0).numpy().tobytes() for s in opened.stream("train")}
    feed = dataset(opened, PLAIN, tickets="full", tokens=16, batch_size=len(Rows(opened, "train")))
    for epoch in range(2):
        assert {p.numpy().tobytes() for p in feed[epoch, 0, 0]["patches"]} == views


def test_unmasked_epochs_hold_all_patches_of_the_same_views(opened):
    feed = dataset(opened, RICH, unmask_from=2)
    masked = dataset(opened, RICH)
    assert equal(feed[1, 0, 0], masked[1, 0, 0])
    batch, ticket = feed[2, 0, 0], masked[2, 0, 0]
    assert batch["keep_indices"].tolist() == [list(range(16))] * 8
    assert torch.equal(gather_patches(batch["patches"], ticket["keep_indices"]), ticket["patches"])
    assert all(torch.equal(batch[n], ticket[n]) for n in ("labels", "partners", "lam", "erase"))


@pytest.mark.parametrize("mixing", ["pixels", "patches"])
def test_coarse_epochs_are_those_of_resized_and_the_last_those_of_full(opened, mixing):
    rich = {**RICH, "mixing": mixing}
    size = {"resize_to_tokens": True, "tokens": 9}
    both = dataset(opened, rich, **size, unmask_epochs=1, unmask_from=2, views=Views(48, 64, 16))
    coarse = dataset(opened, rich, **size, views=Views(48, 48, 16))
    full = dataset(opened, rich, tickets="full", views=Views(64, 64, 16))
    assert (both.tokens, coarse.tokens, full.tokens) == (9, 9, 16)
    for epoch, alone in ((0, coarse), (1, coarse), (2, full)):
        assert equal(both[epoch, 0, 0], alone[epoch, 0, 0])
    assert both[1, 0, 0]["patches"].shape == (8, 9, 768) and both[2, 0, 0]["patches"].shape == (8, 16, 768)


@pytest.mark.parametrize("arm", ["winning", "random", "random-fixed", "gaussian", "center", "inverse"])
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_another_number_of_tokens_is_another_prefix(opened, arm, mixup):
    six, three = (dataset(opened, PLAIN, tickets=arm, tokens=k, mixup=mixup)[0, 0, 0] for k in (6, 3))
    assert torch.equal(six["keep_indices"][:, :3], three["keep_indices"])
    assert torch.equal(six["patches"][:, :3], three["patches"])
    assert three["patches"].shape == (8, 3, 768)


def test_inverse_patches_are_the_last_of_the_ranking(opened):
    whole_ranking = dataset(opened, PLAIN, tokens=16)[0, 0, 0]["keep_indices"]
    inverse = dataset(opened, PLAIN, tickets="inverse")[0, 0, 0]["keep_indices"]
    assert torch.equal(inverse.flip(1), whole_ranking[:, -6:])


def kept_by_view(opened: TicketSet, arm: str, seed: int = 0) -> list[dict[tuple[int, int, int], tuple[int, ...]]]:
    """Per turn of three epochs, in which every training view is shown once: (shard, row, view) -> patches."""
    feed = dataset(opened, PLAIN, tickets=arm, seed=seed, tokens=16, batch_size=21)
    turns = []
    for turn in range(2):
        kept = {}
        for epoch in range(3 * turn, 3 * turn + 3):
            keep = feed[epoch, 0, 0]["keep_indices"].tolist()
            kept.update(zip(shown(feed, epoch), map(tuple, keep), strict=True))
        assert len(kept) == 63
        turns.append(kept)
    return turns


def test_random_is_drawn_anew_for_every_epoch_and_view_and_random_fixed_is_not(opened):
    for arm in ("random", "gaussian"):
        first, second = kept_by_view(opened, arm)
        assert len(set(first.values()) | set(second.values())) == 126
    first, second = kept_by_view(opened, "random-fixed")
    assert first == second
    assert len(set(first.values())) == 63
    assert not set(kept_by_view(opened, "random-fixed", seed=1)[0].values()) & set(first.values())
    counts = np.array([[t[:6].count(p) for p in range(16)] for t in kept_by_view(opened, "random")[0].values()]).sum(0)
    assert 63 * 6 == counts.sum() and counts.min() > 8 and counts.max() < 40  # about 24 each


def test_linked_sets_give_the_bases_images_with_their_own_tickets(folder, opened, tmp_path):
    mine("--data", folder, "--images", "link", "--out", tmp_path / "link", "--method", "center")
    linked = TicketSet.open(str(tmp_path / "link"))
    full = dict(PLAIN, tickets="full", tokens=16)
    assert equal(dataset(linked, full)[0, 0, 0], dataset(opened, full)[0, 0, 0])
    own, base = dataset(linked, PLAIN)[0, 0, 0], dataset(opened, PLAIN)[0, 0, 0]
    assert own["keep_indices"].tolist() == [center_ranking((4, 4))[:6].tolist()] * 8
    assert not torch.equal(own["keep_indices"], base["keep_indices"])
    assert torch.equal(own["labels"], base["labels"])


# Mixing.


def naive_mix(pixels: torch.Tensor, labels: torch.Tensor, options: dict[str, Any], epoch: int, step: int):
    """timm's Mixup, pair by pair: mixed uint8 [B, C, S, S], targets, lam, and the partner's share of each pixel."""
    mixup = Mixup(options["mixup"], options["cutmix"], label_smoothing=0, num_classes=3)
    mixed, targets = pixels.float(), []
    for i in range(0, len(pixels), 2):
        with seeded("mix", options["seed"], epoch, step):
            mixed[i : i + 2], target = mixup(mixed[i : i + 2], labels[i : i + 2])
        targets.append(target)
    with seeded("mix", options["seed"], epoch, step):
        share, _ = mixup(torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)]), labels[:2])
    return mixed.round().byte(), torch.cat(targets), share[0, 0]


def naive_ticket(own: list[int], other: list[int], shares: list[float], count: int) -> list[int]:
    weighted = [((1 - s) * own.index(p) + s * other.index(p), p) for p, s in enumerate(shares)]
    return [p for _, p in sorted(weighted)[:count]]


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_timms_on_whole_views_and_tickets_go_by_weighted_rank(opened, alphas):
    plain = dict(PLAIN, tokens=16)
    mixing = {**PLAIN, **alphas}
    plain_feed, feed = dataset(opened, plain), dataset(opened, mixing)
    unmasked = dataset(opened, mixing, unmask_from=0)
    kinds = Counter()
    for epoch in range(4):
        for step in range(2):
            before, batch, everything = (f[epoch, step, 0] for f in (plain_feed, feed, unmasked))
            rankings = before["keep_indices"]
            raster = gather_patches(before["patches"], rankings.argsort(1))
            pixels = raster.reshape(8, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(8, 3, 64, 64)
            mixed, targets, share = naive_mix(pixels, before["labels"], mixing, epoch, step)
            assert torch.equal(everything["patches"], patchify(mixed, 16))
            assert torch.equal(batch["patches"], gather_patches(patchify(mixed, 16), batch["keep_indices"]))
            assert batch["labels"].tolist() == before["labels"].tolist()
            assert batch["partners"].tolist() == [before["labels"][i ^ 1] for i in range(8)]
            lam = batch["lam"]
            assert len(set(lam.tolist())) == 1 and abs(lam[0] - (1 - share.mean())) < 1e-5
            one_hot = torch.eye(3)
            soft = lam[:, None] * one_hot[batch["labels"]] + (1 - lam[:, None]) * one_hot[batch["partners"]]
            assert (soft - targets).abs().max() < 1e-6
            covered = share.reshape(4, 16, 4, 16).double().mean((1, 3)).flatten().tolist()
            for i in range(8):
                ticket = naive_ticket(rankings[i].tolist(), rankings[i ^ 1].tolist(), covered, 6)
                assert batch["keep_indices"][i].tolist() == ticket
            kind = "none" if lam[0] == 1 else "cutmix" if set(share.flatten().tolist()) <= {0.0, 1.0} else "mixup"
            kinds[kind] += 1
    assert set(kinds) == set(alphas)


def test_mixing_without_tickets_keeps_raster_order(opened):
    batch = dataset(opened, PLAIN, tickets="full", tokens=16, mixup=0.8)[0, 0, 0]
    assert batch["keep_indices"].tolist() == [list(range(16))] * 8 and batch["lam"][0] < 1


def test_neighbors_mix_two_different_images(opened, stored):
    feed = dataset(opened, RICH)
    for epoch in range(3):
        pairs = np.array(shown(feed, epoch)[:20])[:, :2].reshape(10, 2, 2)
        assert (pairs[:, 0] != pairs[:, 1]).any(axis=1).all(), epoch


def test_mixing_an_odd_batch_is_refused_in_words(opened):
    for alphas in ({"mixup": 0.8}, {"cutmix": 1.0}):
        with pytest.raises(TicketSetError, match="even.*got 7"):
            dataset(opened, PLAIN, batch_size=7, **alphas)
    assert len(dataset(opened, PLAIN, batch_size=7)[0, 0, 0]["labels"]) == 7


def test_timms_targets_are_what_lam_and_partners_say():
    """The rule of a batch of two in timm, whose partner is the other one."""
    labels = torch.tensor([2, 0])
    assert mixup_target(labels, 3, 0.75).tolist() == [[0.25, 0, 0.75], [0.75, 0, 0.25]]


# Evaluation.


@pytest.mark.parametrize("world", [1, 2, 4, 5, 23])
def test_evaluation_sees_every_sample_once_over_all_ranks(opened, stored, world):
    everything = list(stored.values())
    seen = []
    for rank in range(world):
        feed = ValidationDataset(opened, "train", batch_size=4, rank=rank, ranks=world)
        for batch in loader(feed, range(len(feed)), 0, CPU):
            for i, position in enumerate(batch["positions"].tolist()):
                sample = everything[position]
                assert torch.equal(batch["patches"][i], whole(sample, 0))
                assert batch["rankings"][i].tolist() == sample.rankings[0].tolist()
                assert batch["labels"][i] == sample.label
            seen += batch["positions"].tolist()
    assert sorted(seen) == list(range(21))


# Shards of any shape.


@pytest.mark.parametrize("shard_size", [5, 100])
def test_uneven_shards_and_one_shard_are_read_whole_by_more_workers_than_shards(photos, tmp_path, shard_size):
    mine("--data", photos, "--out", tmp_path / "set", "--method", "center", "--views", 2, "--shard-size", shard_size)
    opened = TicketSet.open(str(tmp_path / "set"))
    assert Rows(opened, "train").sizes == ((5, 5, 5, 5, 1) if shard_size == 5 else (21,))
    by_pixels = {whole(s, 1).numpy().tobytes(): s.key for s in opened.stream("train")}
    feed = dataset(opened, PLAIN, tickets="full", tokens=16, batch_size=3)
    batches = loader(feed, [(0, step, 0) for step in range(feed.steps)], 2, CPU)
    seen = Counter(by_pixels[p.numpy().tobytes()] for batch in batches for p in batch["patches"])
    assert seen == Counter(s.key for s in opened.stream("train"))


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 7, 32])
def test_every_epoch_has_the_same_steps_and_they_hold_all_its_samples(opened, repeats, batch):
    feed = dataset(opened, PLAIN, repeats=repeats, batch_size=batch)
    most = max(len(feed.samples(epoch)) for epoch in range(repeats))
    assert (feed.steps - 1) * batch < most <= feed.steps * batch


def test_a_batch_larger_than_the_set_begins_anew(opened, stored):
    feed = dataset(opened, PLAIN, batch_size=32)
    assert feed.steps == 1
    batch = feed[0, 0, 0]
    assert torch.equal(batch["labels"][21:], batch["labels"][:11])
    assert Counter(batch["labels"][:21].tolist()) == Counter(s.label for s in stored.values())
