"""Arms: which patches each trains on, and the ticket of a mixed view."""

from statistics import NormalDist

import numpy as np
import pytest

from shards.views import center_distance, center_ranking
from trainer.data.arms import arm_ranking, mixed_ranking
from trainer.options import ARMS

GRID = (4, 4)
MINED = np.random.default_rng(0).permutation(16).astype(np.uint8)
GOLDEN = [1, 10, 11, 5, 4, 3, 2, 0, 8, 6, 14, 12, 13, 15, 7, 9]
GOLDEN_GAUSSIAN = [5, 9, 10, 4, 6, 2, 3, 15, 12, 14, 1, 7, 11, 8, 0, 13]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_ranks_every_patch_once(arm):
    assert sorted(arm_ranking(arm, MINED, GRID, fixed_name="a", fresh_name="b").tolist()) == list(range(16))


def test_winning_is_the_mined_ranking_and_inverse_its_reverse():
    assert arm_ranking("winning", MINED, GRID).tolist() == MINED.tolist()
    assert arm_ranking("inverse", MINED, GRID).tolist() == MINED.tolist()[::-1]


def test_center_and_full_do_not_depend_on_what_was_mined():
    for mined in (MINED, MINED[::-1]):
        assert arm_ranking("center", mined, GRID).tolist() == center_ranking(GRID).tolist()
        assert arm_ranking("full", mined, GRID).tolist() == list(range(16))
    assert arm_ranking("full", MINED, (2, 2)).tolist() == [0, 1, 2, 3]  # a coarser grid than was mined


def test_random_follows_its_fresh_name_and_random_fixed_its_fixed_name():
    def ranking(arm: str, fixed: str, fresh: str) -> list[int]:
        return arm_ranking(arm, MINED, GRID, fixed_name=fixed, fresh_name=fresh).tolist()

    assert ranking("random", "a", "x") == ranking("random", "b", "x") != ranking("random", "a", "y")
    assert ranking("random-fixed", "a", "x") == ranking("random-fixed", "a", "y") != ranking("random-fixed", "b", "x")
    assert ranking("random", "a", "a") != ranking("random-fixed", "a", "a")


def test_a_random_ranking_is_part_of_the_recipe():
    """Golden: a change here gives other controls than those of finished runs."""
    assert arm_ranking("random", MINED, GRID, fresh_name="x").tolist() == GOLDEN


def test_random_rankings_are_uniform():
    first = [int(arm_ranking("random", MINED, GRID, fresh_name=str(i))[0]) for i in range(3200)]
    counts = np.bincount(first, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 37.7  # chi-squared with 15 degrees, p = .001


def test_gaussian_follows_its_fresh_name_alone():
    def ranking(fixed: str, fresh: str) -> list[int]:
        return arm_ranking("gaussian", MINED, GRID, fixed_name=fixed, fresh_name=fresh).tolist()

    assert ranking("a", "x") == ranking("b", "x") != ranking("a", "y")
    assert ranking("a", "x") == GOLDEN_GAUSSIAN


def kept_by(arm: str, k: int, draws: int) -> np.ndarray:
    """How often each patch is among the first k."""
    drawn = [arm_ranking(arm, MINED, GRID, fresh_name=str(draw))[:k] for draw in range(draws)]
    return np.bincount(np.concatenate(drawn), minlength=16)


@pytest.mark.parametrize("k", [4, 12])
def test_gaussian_keeps_a_patch_as_often_as_glips_sum_is_among_the_greatest(k):
    """Exactly: given its uniform number, which others lie above is a row of independent coins, a Poisson-binomial."""
    places, normal = np.linspace(-1, 1, 4), NormalDist(0, 0.2**0.5)
    density = np.array([normal.pdf(y) * normal.pdf(x) for y in places for x in places])
    steps, exact = 500, np.zeros(16)
    for patch in range(16):
        for u in (np.arange(steps) + 0.5) / steps:
            above = np.clip(1 - (u + density[patch] - np.delete(density, patch)), 0, 1)
            fewer = np.eye(1, 16)[0]  # chance of 0, 1, ... above
            for chance in above:
                fewer = fewer * (1 - chance) + np.roll(fewer, 1) * chance
            exact[patch] += fewer[:k].sum() / steps
    assert exact.sum() == pytest.approx(k, abs=0.01)
    draws, errors = 2000, {}
    for arm in ("gaussian", "random"):
        errors[arm] = np.abs(kept_by(arm, k, draws) / draws - exact) / np.sqrt(exact * (1 - exact) / draws + 1e-9)
    assert errors["gaussian"].max() < 4 and errors["random"].max() > 20

    distance, found = center_distance(GRID), kept_by("gaussian", k, draws)
    means = [found[distance == d].mean() for d in np.unique(distance)]
    assert means == sorted(means, reverse=True) and means[0] > means[-1] + 0.1 * draws


def test_a_mixed_ranking_is_the_owners_without_share_and_the_partners_with_all():
    own, other = np.random.default_rng(1).permuted(np.tile(np.arange(16), (2, 1)), axis=1)
    assert mixed_ranking(own, other, 0.0).tolist() == own.tolist()
    assert mixed_ranking(own, other, 1.0).tolist() == other.tolist()
    assert mixed_ranking(own, other, np.zeros(16)).tolist() == own.tolist()
    assert mixed_ranking(own, own, 0.3).tolist() == own.tolist()
    assert mixed_ranking(own, other, 0.3).tolist() == mixed_ranking(other, own, 0.7).tolist() != own.tolist()


def test_ties_of_weighted_ranks_go_to_the_lower_index():
    own = np.array([0, 1, 2, 3])
    assert mixed_ranking(own, own[::-1], 0.5).tolist() == [0, 1, 2, 3]
    assert mixed_ranking(own[::-1], own, 0.5).tolist() == [0, 1, 2, 3]
    assert mixed_ranking(np.array([3, 1, 2, 0]), np.array([0, 1, 2, 3]), 0.5).tolist() == [1, 0, 3, 2]  # 1.5, 1, 2, 1.5


def test_in_cutmix_each_patch_goes_by_its_own_share():
    own, other = np.array([0, 1, 2, 3]), np.array([3, 2, 1, 0])
    # ranks: patch 0 own 0, patch 1 own 1, patch 2 of the partner 1, patch 3 half of each: (3 + 0) / 2
    assert mixed_ranking(own, other, np.array([0, 0, 1, 0.5])).tolist() == [0, 1, 2, 3]
    assert mixed_ranking(own, other, np.array([0, 1, 1, 1])).tolist() == [0, 3, 2, 1]
