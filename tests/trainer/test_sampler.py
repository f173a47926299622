"""The order of an epoch: exact coverage, fresh orders, mixing, and independence of ranks and workers."""

from collections import Counter

import numpy as np
import pytest

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
def test_neighbours_that_mix_are_of_different_images(repeats):
    samples = epoch_samples(0, 0, (100, 60), repeats)
    pairs = samples[: len(samples) // 2 * 2].reshape(-1, 2, 3)
    assert (pairs[:, 0, :2] != pairs[:, 1, :2]).any(axis=1).all()
    partners = Counter(
        tuple(sorted(map(tuple, p[:, :2].tolist()))) for p in pairs[: len(pairs) // repeats**2 * repeats**2]
    )
    assert max(partners.values()) == 1  # and never twice the same two


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_neighbours_differ_whatever_number_of_images_is_left_over(repeats):
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
