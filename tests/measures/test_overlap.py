"""Agreement of neighbour lists against sets, chance against its known value, and memory that does not grow."""

import tracemalloc

import numpy as np
import pytest

from faiss_knn.measures import overlap as overlap_module
from faiss_knn.measures.overlap import neighbor_overlap, overlap_by_query

RNG = np.random.default_rng(0)


def lists(queries, bank, k, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(bank, k, replace=False) for _ in range(queries)])


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("block", [4, 1 << 21])
def test_it_is_the_share_of_common_members_of_sets(k, block, monkeypatch):
    monkeypatch.setattr(overlap_module, "_BLOCK", block)
    a, b = lists(50, 20, 8, 1), lists(50, 20, 10, 2)
    expected = [len(set(x[:k]) & set(y[:k])) / k for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert overlap_by_query(a, b, k).tolist() == expected
    assert neighbor_overlap(a, b, k).mean == pytest.approx(np.mean(expected))


def test_missing_neighbours_agree_with_nothing():
    a, b = np.array([[4, -1, -1], [1, 2, -1], [-1, -1, -1]]), np.array([[4, -1, -1], [2, 5, 6], [-1, -1, -1]])
    assert overlap_by_query(a, b, 3).tolist() == [1.0, 1 / 3, 0.0]


def test_lists_without_relation_agree_as_chance_does():
    a, b = lists(2000, 100, 10, 3), lists(2000, 100, 10, 4)
    found = neighbor_overlap(a, b, 10)
    assert found.null_mean == pytest.approx(0.1, abs=0.005)  # k of the bank's 100
    assert abs(found.z) < 4
    assert neighbor_overlap(a, a, 10).z > 100


def test_hubs_that_both_see_are_counted_as_chance():
    a, b = lists(500, 100, 10, 5) + 5, lists(500, 100, 10, 6) + 5
    a[:, :5] = b[:, :5] = np.arange(5)  # near to every query, in both
    found = neighbor_overlap(a, b, 10)
    assert found.mean > 0.5
    assert abs(found.z) < 4


def test_it_repeats_with_its_seed():
    a, b = lists(100, 30, 5, 7), lists(100, 30, 5, 8)
    assert neighbor_overlap(a, b, 5, seed=1) == neighbor_overlap(a, b, 5, seed=1) != neighbor_overlap(a, b, 5, seed=2)


def test_no_deviation_has_no_z():
    a = np.tile(np.arange(5), (30, 1))
    assert neighbor_overlap(a, a, 5) == (1.0, 1.0, 0.0, None)


def test_memory_is_a_block_of_lists_and_a_number_per_query():
    a = RNG.integers(0, 1 << 40, (200_000, 20))
    tracemalloc.start()
    neighbor_overlap(a, a[::-1], 20, permutations=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 8 * 200_000 + 8 * 8 * (1 << 21)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: overlap_by_query(a, a, 4), r"`k` must be in \[1, 3\], as long as both lists are, got 4"),
        (lambda a: overlap_by_query(a, a[:1], 2), "`indices_b` must have a list for each of the 2 queries, got 1"),
        (lambda a: overlap_by_query(a[0], a, 2), r"`indices_a` must be a \(Q, K\) integer array of neighbours"),
        (lambda a: overlap_by_query(a, a + 0.5, 2), r"`indices_b` must be a \(Q, K\) integer array of neighbours"),
        (lambda a: neighbor_overlap(a, a, 2, permutations=1), "`permutations` must be 2 or more"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.array([[1, 2, 3], [4, 5, 6]]))
