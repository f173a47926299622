"""The order of an epoch: exact coverage, fresh orders, mixing, and independence of ranks and workers."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sampler import WINDOW, batch_positions, cycle_images, epoch_samples, view_of_visit

SIZES = (10, 7, 1, 10, 10, 3)


def images_of(samples: np.ndarray) -> Counter:
    return Counter(map(tuple, samples[:, :2].tolist()))


def test_without_repeats_every_epoch_shows_every_image_once_in_another_order():
    first, second = (epoch_samples(0, epoch, SIZES) for epoch in (0, 1))
    everything = {(s, r): 1 for s, size in enumerate(SIZES) for r in range(size)}
    assert images_of(first) == images_of(second) == everything
    assert (first[:, :2] != second[:, :2]).any() and (first != epoch_samples(1, 0, SIZES)).any()
    assert (first == epoch_samples(0, 0, SIZES)).all()


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_a_cycle_of_repeats_shows_every_image_equally_often_and_epochs_keep_their_length(repeats):
    epochs = [epoch_samples(0, epoch, SIZES, repeats) for epoch in range(repeats)]
    assert set(images_of(np.concatenate(epochs)).values()) == {repeats}
    assert set(images_of(epochs[0]).values()) == {repeats}  # all views of an image in one epoch
    assert all(abs(len(e) - sum(SIZES)) < repeats for e in epochs)
    together = [tuple(v) for v in np.concatenate(epochs).tolist()]
    assert len(set(together)) == len(together)  # each with a visit number of its own


@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
def test_neighbors_that_mix_are_of_different_images(repeats):
    samples = epoch_samples(0, 0, (100, 60), repeats)
    pairs = samples[: len(samples) // 2 * 2].reshape(-1, 2, 3)
    assert (pairs[:, 0, :2] != pairs[:, 1, :2]).any(axis=1).all()
    partners = Counter(
        tuple(sorted(map(tuple, p[:, :2].tolist()))) for p in pairs[: len(pairs) // repeats**2 * repeats**2]
    )
    assert max(partners.values()) == 1  # and never twice the same two


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_neighbors_differ_whatever_number_of_images_is_left_over(repeats):
    for images in range(2 * repeats, 10 * repeats):
        for epoch in range(repeats):
            samples = epoch_samples(0, epoch, (images,), repeats)
            row = samples[:, 1]
            assert (row[:-1] != row[1:]).all(), (images, epoch)  # also where a batch begins at an odd place
            assert set(images_of(samples).values()) == {repeats}
            for image in set(row.tolist()):
                places = np.flatnonzero(row == image)
                assert places[-1] - places[0] < 2 * repeats**2


def test_every_view_is_shown_once_before_any_repeats():
    views = 5
    for row in range(10):
        shown = [view_of_visit(0, 3, row, visit, views) for visit in range(12)]
        for turn in range(3):
            assert sorted(shown[turn * 4 : turn * 4 + 4]) == [1, 2, 3, 4]
    assert len({tuple(view_of_visit(0, 3, r, v, views) for v in range(8)) for r in range(10)}) > 5
    assert view_of_visit(0, 3, 0, 7, 1) == 0


def test_ranks_and_accumulation_share_one_global_batch():
    """Two ranks with two micro-batches of 4 hold the samples of one rank with one of 16."""
    whole = batch_positions(3, 0, 16, 16, 50)
    parts = [batch_positions(3, micro, 4, 16, 50) for micro in range(4)]
    assert np.concatenate(parts).tolist() == whole.tolist() == [48, 49, *range(14)]


def test_classes_mix_although_shards_are_read_in_windows():
    sizes = (50,) * 40
    shards = cycle_images(0, 0, sizes)[:, 0]
    first = shards[: WINDOW * 50]
    assert len(set(first.tolist())) == WINDOW  # a window holds whole shards
    assert len(set(first[:64].tolist())) > 10  # a batch mixes them
    one_shard = cycle_images(0, 0, (30,))
    assert sorted(one_shard[:, 1].tolist()) == list(range(30)) and one_shard[:, 1].tolist() != list(range(30))


# Whatever the sizes, the seed and the epoch. `derandomize`: the same examples on every machine.
exact = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=40).map(tuple).filter(lambda sizes: sum(sizes) > 0)
seeds, cycles = st.integers(0, 2**63 - 1), st.integers(0, 1000)


@exact
@given(sizes, seeds, cycles, st.integers(1, 5))
def test_a_cycle_shows_every_image_once_a_repeat_and_no_view_number_twice(shards, seed, cycle, repeats):
    epochs = [epoch_samples(seed, cycle * repeats + part, shards, repeats) for part in range(repeats)]
    shown = np.concatenate(epochs)
    everything = {(shard, row) for shard, size in enumerate(shards) for row in range(size)}
    visits = range(cycle * repeats, (cycle + 1) * repeats)
    assert sorted(map(tuple, shown.tolist())) == sorted((*image, visit) for image in everything for visit in visits)
    assert shown.dtype == np.int64 and all(len(epoch) % repeats == 0 for epoch in epochs)


@exact
@given(sizes, seeds, cycles, st.integers(1, 5))
def test_neighbors_are_of_different_images_wherever_there_are_two(shards, seed, epoch, repeats):
    samples = epoch_samples(seed, epoch, shards, repeats)
    if len(images_of(samples)) > 1:
        assert (samples[:-1, :2] != samples[1:, :2]).any(axis=1).all()


@exact
@given(sizes, seeds, cycles, st.integers(1, 5))
def test_an_epoch_is_a_function_of_its_arguments_alone(shards, seed, epoch, repeats):
    first = epoch_samples(seed, epoch, shards, repeats).copy()
    np.random.default_rng(0).integers(0, 9, 3)
    np.random.seed(epoch)
    for cached in (epoch_samples, cycle_images):
        cached.cache_clear()
    epoch_samples(seed, epoch + 1, shards, repeats)
    assert (epoch_samples(seed, epoch, shards, repeats) == first).all()


@exact
@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(0, 100))
def test_micro_batches_of_all_ranks_are_the_global_batch_cut_up(samples, ranks, accum, batch, step):
    whole = batch_positions(step, 0, ranks * accum * batch, ranks * accum * batch, samples)
    parts = [batch_positions(step, micro, batch, ranks * accum * batch, samples) for micro in range(ranks * accum)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    following = batch_positions(step + 1, 0, batch, ranks * accum * batch, samples)
    assert following[0] == (whole[-1] + 1) % samples and 0 <= whole.min() and whole.max() < samples


@exact
@given(seeds, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 1000), st.integers(2, 64))
def test_views_of_a_turn_are_a_permutation(seed, shard, row, turn, views):
    shown = [view_of_visit(seed, shard, row, turn * (views - 1) + place, views) for place in range(views - 1)]
    assert sorted(shown) == list(range(1, views))
