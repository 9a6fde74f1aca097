"""Lists judged by relevance, against the definitions written out."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from faiss_knn.measures.average_precision import micro_average_precision
from faiss_knn.measures.judged import judged_metrics, revisited_metrics, trapezoid_average_precision


def area(ranked, positives, junk):
    """Trapezoids between the points (recall, precision) before and after each positive, walking down the list."""
    total, found, seen, precision = 0.0, 0, 0, 1.0
    for row in ranked:
        if row in junk:
            continue
        before = precision
        seen += 1
        if row in positives:
            found += 1
            precision = found / seen
            total += (before + precision) / 2 / len(positives)
        else:
            precision = found / seen
    return total


def precision_at(ranked, positives, junk, k):
    kept = [row for row in ranked if row not in junk]
    last = max(kept.index(row) + 1 for row in positives)
    return sum(row in positives for row in kept[: min(k, last)]) / min(k, last)


def random_case(seed, n=60, queries=25):
    rng = np.random.default_rng(seed)
    lists = np.stack([rng.permutation(n) for _ in range(queries)])
    kinds = rng.choice(["", "easy", "hard", "junk"], (queries, n), p=[0.7, 0.1, 0.1, 0.1])
    kinds[0][kinds[0] == "easy"] = ""  # a query without easy ones
    return lists, {name: [np.flatnonzero(one == name) for one in kinds] for name in ("easy", "hard", "junk")}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_three_setups_of_revisited_oxford_and_paris(seed):
    lists, told = random_case(seed)
    found = revisited_metrics(lists, told["easy"], told["hard"], told["junk"], ks=[1, 5, 10])
    setups = {"easy": (("easy",), ("hard", "junk")), "medium": (("easy", "hard"), ("junk",)),
              "hard": (("hard",), ("easy", "junk"))}  # fmt: skip
    for setup, (right, taken) in setups.items():
        areas, precisions = [], []
        for q, ranked in enumerate(lists.tolist()):
            positives = set(np.concatenate([told[name][q] for name in right]).tolist())
            junk = set(np.concatenate([told[name][q] for name in taken]).tolist())
            if positives:
                areas.append(area(ranked, positives, junk))
                precisions.append([precision_at(ranked, positives, junk, k) for k in (1, 5, 10)])
        assert found[f"map_{setup}"] == pytest.approx(np.mean(areas))
        for k, expected in zip((1, 5, 10), np.mean(precisions, axis=0), strict=True):
            assert found[f"mp@{k}_{setup}"] == pytest.approx(expected)
        assert found[f"queries_{setup}"] == len(areas)


def test_trapezoids_are_more_than_the_precision_at_each_positive():
    assert trapezoid_average_precision([0, 1, 2], 3) == 1
    assert trapezoid_average_precision([1], 1) == (0 / 1 + 1 / 2) / 2
    assert trapezoid_average_precision([], 4) == 0


def test_positives_beyond_the_list_are_not_found():
    scores = judged_metrics([[5, 2, -1]], [[5, 9]], ks=[1, 2, 3])
    assert (scores["map"], scores["mp@2"], scores["mp@3"]) == (0.5, 0.5, 1 / 3)
    assert math.isnan(judged_metrics([[1, 2]], [[]])["map"])


def test_micro_ap_orders_the_pairs_of_all_queries_together():
    rng = np.random.default_rng(0)
    scores, matches = rng.integers(0, 30, 400) / 30, rng.random(400) < 0.2  # many equal scores
    expected = average_precision_score(matches, scores)
    assert micro_average_precision(scores, matches, int(matches.sum())) == pytest.approx(expected)
    assert micro_average_precision(scores, matches, 2 * int(matches.sum())) == pytest.approx(expected / 2)
    order = np.argsort(-(scores + 1e-9 * rng.random(400)))
    untied = np.empty(400)
    untied[order] = np.arange(400, 0, -1)
    found = right = recall = 0.0
    for pair in order:  # Σ p(i) · Δr(i)
        found += 1
        right += matches[pair]
        recall += (right / found) * matches[pair] / matches.sum()
    assert micro_average_precision(untied, matches, int(matches.sum())) == pytest.approx(recall)
    assert micro_average_precision([0.5], [False], 3) == 0
    assert math.isnan(micro_average_precision([0.5], [False], 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judged_metrics([[1, 2]], [[1], [2]]), "`positives` must have a list for each of 1 queries, got 2"),
        (lambda: judged_metrics([[1, 2]], [[1]], [[1]]), "row 1 is both positive and junk"),
        (lambda: judged_metrics([[1.5]], [[1]]), r"`neighbors` must be \(Q, K\) row numbers"),
        (lambda: judged_metrics([[1]], [[1]], ks=[0]), "`ks` must be a positive integer, got 0"),
        (lambda: trapezoid_average_precision([2, 1], 2), "`ranks` must ascend"),
        (lambda: trapezoid_average_precision([1, 2], 1), "`total` must be 1 or more, and as many as `ranks`, 2, got 1"),
        (lambda: micro_average_precision([1.0], [True], 0), "`total` must count all true pairs"),
        (lambda: micro_average_precision([1.0], [True, False], 2), "of the same pairs as `scores`"),
    ],
)
def test_bad_lists_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
