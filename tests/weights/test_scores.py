"""Scores and chance to masks: exact counts, ties by place, nested levels."""

import numpy as np
import pytest

from shards.errors import TicketSetError
from trainer.weights.scores import (
    count_of,
    default_levels,
    drawn,
    even_counts,
    keep_best,
    shuffled,
    sparsity_at,
    votes,
)

SHAPES = {"b": (3, 5), "a": (7,), "c": (2, 2, 3)}  # 34 weights, not in the order of their names


def total(kept):
    return sum(int(mask.sum()) for mask in kept.values())


def random_scores(seed=0):
    random = np.random.default_rng(seed)
    return {name: random.random(shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_levels_are_those_of_a_fifth_a_level():
    assert [default_levels(s) for s in (0.5, 0.8, 0.9, 0.95, 0.99, 0.2)] == [4, 8, 11, 14, 21, 1]
    assert sparsity_at(0.9, 11, 11) == 0.9  # not 1 - .1 ** 1, which is another float
    assert sparsity_at(0.75, 2, 1) == pytest.approx(0.5)


@pytest.mark.parametrize("count", range(35))
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_count_is_exact_whatever_the_scores(count, scope):
    equal = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for scores in (random_scores(), equal, {n: s.round(1) for n, s in random_scores().items()}):
        assert total(keep_best(scores, count, None, scope)) == count


def test_the_greatest_are_kept_over_all_tensors_and_ties_go_to_the_lower_place():
    scores = {"b": np.array([[5.0, 1.0], [3.0, 3.0]]), "a": np.array([3.0, 9.0, 0.0])}
    kept = keep_best(scores, 4, None, "global")  # 9, 5, and of three threes those first by name, then by place
    assert kept["a"].tolist() == [True, True, False] and kept["b"].tolist() == [[True, False], [True, False]]
    layer = keep_best(scores, 4, None, "layer")
    assert {name: int(mask.sum()) for name, mask in layer.items()} == {"a": 1, "b": 3}


def test_a_threshold_alone_would_not_do():
    """Four equal weights, two of five to go: what open_lth's strict threshold makes of it removes four."""
    assert keep_best({"w": np.array([1.0, 1.0, 1.0, 1.0, 2.0])}, 3, None, "global")["w"].tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_levels_are_nested_also_where_scores_change_and_are_negative(scope):
    kept = None
    for level, count in enumerate((20, 11, 3, 1)):
        scores = {name: values - 2 for name, values in random_scores(level).items()}
        found = keep_best(scores, count, kept, scope)
        assert total(found) == count
        assert kept is None or all((found[name] <= kept[name]).all() for name in SHAPES)
        kept = found


def test_without_the_level_before_they_are_not():
    first, second = (keep_best(random_scores(seed), 11, None, "global") for seed in (0, 1))
    assert not all((second[name] <= first[name]).all() for name in SHAPES)


def test_scores_that_are_not_finite_are_refused():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(TicketSetError, match="w: expected finite scores"):
            keep_best({"w": np.array([1.0, bad])}, 1, None, "global")


def test_counts_spread_by_size_and_shrink_with_what_is_there():
    for count in range(35):
        counts = even_counts(SHAPES, count)
        assert sum(counts.values()) == count
        assert all(abs(counts[name] - count * np.prod(shape) / 34) < 1 for name, shape in SHAPES.items())
    # An apportionment that is not told what there is takes one more of "c" for 3 than for 4: here there is none.
    sizes = {"a": (6,), "b": (1,), "c": (3,)}
    assert (even_counts(sizes, 4)["b"], even_counts(sizes, 3)["b"]) == (0, 1)
    before = {"a": np.ones(6, bool), "b": np.zeros(1, bool), "c": np.ones(3, bool)}
    assert even_counts(sizes, 3, before) == {"a": 2, "b": 0, "c": 1}


def test_random_masks_are_functions_of_their_name_and_nested():
    large, small, other = (drawn(SHAPES, n, "random", seed) for n, seed in ((20, 0), (9, 0), (9, 1)))
    again = drawn({"c": (2, 2, 3), **SHAPES}, 9, "random", 0)
    assert all((small[n] == again[n]).all() for n in SHAPES) and (total(large), total(small)) == (20, 9)
    assert all((drawn(SHAPES, 9, "random", 0, before=large)[n] <= large[n]).all() for n in SHAPES)
    assert not all((small[n] == other[n]).all() for n in SHAPES)


def test_shuffled_masks_keep_counts_and_shapes_and_little_else():
    kept = keep_best({"w": np.arange(1000.0).reshape(10, 100), "v": np.ones((2, 3))}, 500, None, "global")
    found = shuffled(kept, "shuffled", 0)
    assert {n: (m.shape, m.sum()) for n, m in found.items()} == {n: (m.shape, m.sum()) for n, m in kept.items()}
    assert 0.3 < (found["w"] == kept["w"]).mean() < 0.7


def test_votes_come_first_and_magnitude_breaks_their_ties():
    weights = [{"w": np.array([0.9, -0.1, 0.4, 100.0])}, {"w": np.array([0.8, 0.2, -0.5, 0.0])}]
    elected = [{"w": np.array([True, True, False, True])}, {"w": np.array([True, True, True, False])}]
    found = votes(elected, weights)["w"]
    assert np.argsort(-found, kind="stable").tolist() == [0, 1, 3, 2]  # two votes, two votes, then one by magnitude
    assert (found.astype(int) == [2, 2, 1, 1]).all()  # no magnitude weighs as much as a vote


def test_votes_that_tie_are_ranked_over_all_tensors():
    """A tensor of small weights is not ranked by its own greatest."""
    weights = [{"a": np.array([0.019, 10.0]), "b": np.array([0.018, 0.02])}]
    elected = [{"a": np.array([True, True]), "b": np.array([True, True])}]
    assert keep_best(votes(elected, weights), 2, None, "global")["b"].tolist() == [False, True]
    assert keep_best(votes(elected, weights), 3, None, "global")["a"].tolist() == [True, True]


def test_scores_of_what_is_gone_may_be_anything():
    before = {"w": np.array([True, False, True])}
    assert keep_best({"w": np.array([1.0, np.nan, 2.0])}, 1, before, "global")["w"].tolist() == [False, False, True]


def test_at_least_one_weight_is_kept():
    assert (count_of(100, 0.9), count_of(3, 0.9), count_of(245760, 0.9)) == (10, 1, 24576)
