"""Intervals and tests against scipy's, plain loops, and simulations in which the truth is known."""

import numpy as np
import pytest
from scipy import stats

from faiss_knn.measures.significance import (
    Pairs,
    bootstrap_interval,
    cluster_bootstrap_interval,
    cluster_standard_error,
    count_pairs,
    holm,
    mcnemar_p,
    queries_needed,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (1, 1), (37, 100), (49_999, 50_000), (812, 1797)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_agrees_with_scipy(correct, total, confidence):
    theirs = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, total, confidence) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (0, 1), (5, 0), (7, 7), (7, 8), (30, 12), (900, 1100), (200_000, 201_000)]
)
def test_mcnemar_is_the_exact_binomial_test(a, b):
    expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar_p(a, b) == mcnemar_p(b, a) == pytest.approx(expected, rel=1e-8)


def test_mcnemar_of_a_great_difference_is_tiny_and_no_error():
    assert mcnemar_p(10_000, 0) == 0.0
    assert mcnemar_p(900, 0) == pytest.approx(2.0**-899)


def test_pairs_count_where_one_alone_was_right():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 500)) < 0.7
    pairs = count_pairs(a, b)
    assert pairs == (
        sum(x and not y for x, y in zip(a, b, strict=True)),
        sum(y and not x for x, y in zip(a, b, strict=True)),
        500,
    )
    assert pairs.difference == pytest.approx(a.mean() - b.mean())


def test_bootstrap_agrees_with_drawing_the_queries_themselves():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.8, rng.random(400) < 0.7
    own = bootstrap_interval(count_pairs(a, b), 0.9, draws=20_000)
    drawn = [(a[rows].mean() - b[rows].mean()) for rows in (rng.integers(0, 400, 400) for _ in range(20_000))]
    assert own == pytest.approx(np.quantile(drawn, [0.05, 0.95]), abs=0.004)


def test_bootstrap_repeats_with_its_seed_and_needs_no_queries_times_draws():
    pairs = Pairs(3_000_000, 2_999_000, 1_000_000_000)  # one array of all queries alone would not fit
    assert bootstrap_interval(pairs, seed=3) == bootstrap_interval(pairs, seed=3) != bootstrap_interval(pairs, seed=4)
    assert bootstrap_interval(Pairs(0, 0, 50)) == (0.0, 0.0)
    assert bootstrap_interval(Pairs(50, 0, 50)) == (1.0, 1.0)


def test_bootstrap_holds_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(2)
    shares, total = [0.09, 0.05, 0.86], 600
    held = 0
    for seed in range(300):
        only_a, only_b, _ = rng.multinomial(total, shares)
        low, high = bootstrap_interval(Pairs(int(only_a), int(only_b), total), draws=2000, seed=seed)
        held += low <= 0.04 <= high
    assert 0.92 <= held / 300 <= 0.98


def test_holm_multiplies_the_smallest_by_all_the_next_by_one_less():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_difference_that_is_zero_is_rarely_called_one(seed):
    """Five settings a table, as good as each other: a table in twenty may hold a difference."""
    rng = np.random.default_rng(seed)
    tables_with_a_difference = 0
    for _ in range(200):
        p = []
        for _ in range(5):
            a, b = rng.random((2, 800)) < 0.75
            pairs = count_pairs(a, b)
            p.append(mcnemar_p(pairs.only_a, pairs.only_b))
        tables_with_a_difference += min(holm(p)) <= 0.05
    assert tables_with_a_difference <= 0.08 * 200  # 5 % and its spread


def test_the_queries_needed_separate_in_four_of_five_cases():
    pairs = Pairs(only_a=130, only_b=100, total=2000)
    needed = queries_needed(pairs)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(needed, [0.065, 0.05, 0.885], size=1000)
    separated = np.mean([mcnemar_p(int(a), int(b)) <= 0.05 for a, b, _ in drawn])
    assert separated == pytest.approx(0.8, abs=0.04)


def test_more_queries_are_needed_for_less_difference_more_power_and_more_comparisons():
    near, far = Pairs(110, 100, 2000), Pairs(150, 100, 2000)
    assert queries_needed(near) > queries_needed(far) > 0
    assert queries_needed(far, power=0.95) > queries_needed(far)
    assert queries_needed(far, comparisons=10) > queries_needed(far)
    assert queries_needed(Pairs(5, 5, 100)) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 2), r"`correct` must be in \[0, total=2\], got 3"),
        (lambda: wilson_interval(0, 0), "`total` must be 1 or more, got 0"),
        (lambda: wilson_interval(1, 2, 95), r"`confidence` must be in \(0, 1\), such as 0.95, got 95"),
        (lambda: mcnemar_p(-1, 2), "`only_a` must be a number of queries, 0 or more, got -1"),
        (
            lambda: count_pairs([1, 0], [True, False]),
            r"`correct_a` must be \(Q,\) bool, one per query, got int64 \(2,\)",
        ),
        (
            lambda: count_pairs([True], [True, False]),
            "`correct_b` must be of the same queries as `correct_a`, 1, got 2",
        ),
        (
            lambda: bootstrap_interval(Pairs(3, 3, 5)),
            r"`pairs` must count queries, none of them twice, got \(3, 3, 5\)",
        ),
        (lambda: bootstrap_interval(Pairs(3, 3, 9), draws=0), "`draws` must be 1 or more, got 0"),
        (lambda: holm([0.1, 1.2]), r"`p_values` must be probabilities in \[0, 1\], got \[0.1, 1.2\]"),
        (lambda: queries_needed(Pairs(3, 2, 9), power=1), r"`power` must be in \(0, 1\), got 1"),
        (lambda: queries_needed(Pairs(3, 2, 9), comparisons=0), "`comparisons` must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_cluster_bootstrap_draws_whole_groups():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 400)
    values = (rng.random(30)[groups] + 0.3 * rng.random(400)) > 0.7
    ours = cluster_bootstrap_interval(values, groups, 0.9, draws=4000, seed=1)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    means = [values[np.concatenate([members[g] for g in rng.integers(0, 30, 30)])].mean() for _ in range(4000)]
    assert ours == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=0.01)
    alone = cluster_bootstrap_interval(values, np.arange(400), 0.9, draws=4000)
    assert alone[1] - alone[0] < 0.6 * (ours[1] - ours[0])
    error = cluster_standard_error(values, groups)
    assert error == pytest.approx(np.std(means), rel=0.1)
    assert cluster_standard_error(values, np.arange(400)) == pytest.approx(values.std() / 20)


def test_a_cluster_bootstrap_covers_the_mean_as_often_as_it_says():
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shares = rng.beta(4, 2, 60)
        groups = np.repeat(np.arange(60), rng.integers(1, 9, 60))
        low, high = cluster_bootstrap_interval(rng.random(len(groups)) < shares[groups], groups, draws=1000)
        covered += low <= 4 / 6 <= high
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize(
    ("values", "groups", "options", "message"),
    [
        ([1, 0], [3, 3], {}, "`groups` must be two groups or more, got 1"),
        ([1, 0], [3, 4, 5], {}, "of the same queries as `values`"),
        ([1, 0], [3, 4], {"draws": 0}, "`draws` must be 1 or more, got 0"),
        ([1, 0], [3, 4], {"confidence": 1.0}, "`confidence` must be in"),
    ],
)
def test_a_cluster_bootstrap_refuses(values, groups, options, message):
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap_interval(values, groups, **options)
