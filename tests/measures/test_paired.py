"""Differences over draws and groups: against all signs, draws by hand, and simulations in which the truth is known."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from faiss_knn.measures.paired import GroupedPairs, pair_outcomes, sign_flip_p
from faiss_knn.measures.significance import Pairs, mcnemar_p, queries_needed


@pytest.mark.parametrize("seed", range(8))
def test_the_sign_flip_test_counts_all_signs(seed):
    rng = np.random.default_rng(seed)
    sums = rng.integers(-4, 6, 13) * (1 + seed % 3)
    signs = np.array(list(product((-1, 1), repeat=13)))
    expected = (np.abs(signs @ sums) >= abs(sums.sum())).mean()
    assert sign_flip_p(sums) == pytest.approx(expected, rel=1e-10)


def test_of_one_size_it_is_mcnemars():
    assert sign_flip_p([3] * 30 + [-3] * 12 + [0] * 7) == mcnemar_p(30, 12)
    assert sign_flip_p([0, 0]) == 1.0
    one_more = sign_flip_p([2] * 300 + [-2] * 240 + [1])  # which counts where the others stand at 60 exactly
    assert one_more == pytest.approx((mcnemar_p(300, 240) + mcnemar_p(301, 239)) / 2)


def test_a_great_difference_is_tiny_and_above_zero():
    assert 0 < sign_flip_p([1, 2] * 200) < 1e-12


def test_many_queries_are_tested_at_once():
    sums = np.random.default_rng(1).integers(-5, 6, 100_000)
    z = abs(sums.sum()) / np.sqrt((sums**2.0).sum())
    assert sign_flip_p(sums) == pytest.approx(2 * stats.norm.sf(z), rel=0.01)


def outcomes(seed, draws=3, queries=60):
    rng = np.random.default_rng(seed)
    hard = rng.random(queries)
    return [rng.random((draws, queries)) < 0.4 + 0.5 * hard for _ in range(2)]


def test_draws_of_a_query_count_together():
    a, b = outcomes(0)
    pairs = pair_outcomes(a, b)
    assert pairs.difference == pytest.approx(a.mean() - b.mean())
    more = a.sum(0).astype(int) - b.sum(0)
    drawn = np.random.default_rng(1).integers(0, 60, (20_000, 60))
    expected = np.quantile(more[drawn].mean(1) / 3, [0.05, 0.95])
    assert pairs.interval(0.9) == pytest.approx(tuple(expected), abs=0.008)
    assert pairs.p() == sign_flip_p(more)


def test_a_bank_that_is_the_same_in_all_draws_is_compared_with_each():
    a, b = outcomes(4)
    for one, other in ((pair_outcomes(a, b[0]), pair_outcomes(a, np.stack([b[0]] * 3))),
                       (pair_outcomes(a[0], b), pair_outcomes(np.stack([a[0]] * 3), b))):  # fmt: skip
        assert one.difference == other.difference == pytest.approx(one.more.mean() / 3)
        assert one.p() == other.p()


def test_queries_of_a_group_count_together():
    a, b = (one[0] for one in outcomes(2))
    groups = np.arange(60) // 4 * 10 + 3
    pairs = pair_outcomes(a, b, groups)
    sums = (a.astype(int) - b).reshape(15, 4).sum(1)
    assert pairs.p() == sign_flip_p(sums)
    drawn = np.random.default_rng(1).integers(0, 15, (20_000, 15))
    assert pairs.interval() == pytest.approx(tuple(np.quantile(sums[drawn].mean(1) / 4, [0.025, 0.975])), abs=0.017)
    alone = GroupedPairs(np.array([1, 0]), 1, np.array([5, 5]))
    assert (alone.interval(), alone.p()) == ((0.5, 0.5), 1.0)


def test_single_queries_of_one_bank_are_plain_pairs():
    a, b = (one[0] for one in outcomes(3))
    plain = pair_outcomes(a, b)
    assert isinstance(plain, Pairs)
    of_one = pair_outcomes(a, b, np.arange(60))
    assert of_one.p() == plain.p()
    assert of_one.difference == plain.difference
    assert of_one.interval() == pytest.approx(plain.interval(), abs=0.02)
    assert of_one.needed() == pytest.approx(queries_needed(plain), rel=1e-9)
    assert pair_outcomes(np.vstack([a, a]), np.vstack([b, b])).needed() == of_one.needed()  # the same draw twice
    assert pair_outcomes(a, a, np.arange(60)).needed() is None


def test_a_group_of_copies_needs_as_many_groups_as_single_queries():
    a, b = (one[0] for one in outcomes(3))
    copies = pair_outcomes(np.repeat(a, 5), np.repeat(b, 5), np.repeat(np.arange(60), 5))
    assert copies.p() == pair_outcomes(a, b).p()
    assert copies.needed() == pytest.approx(5 * pair_outcomes(a, b).needed(), abs=5)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_difference_that_is_zero_is_rarely_called_one(grouped):
    """Of 150 pairs as good as each other one in twenty may be told apart, and of one in twenty the interval miss 0."""
    called = missed = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        if grouped:
            groups = np.repeat(np.arange(40), 5)
            a, b = (rng.random(200) < np.repeat(rng.beta(2, 1, 40), 5) for _ in range(2))
        else:
            groups, (a, b) = None, outcomes(seed, queries=80)
        pairs = pair_outcomes(a, b, groups)
        low, high = pairs.interval(seed=seed)
        called += pairs.p() <= 0.05
        missed += not low <= 0 <= high
    assert called <= 0.09 * 150
    assert missed <= 0.10 * 150
