"""Neighbours from Python: what a brute force finds, with and without the row itself, with ties whole."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from faiss_knn import exact_neighbors
from faiss_knn.offline import neighbors, streaming
from faiss_knn.offline.lazy_rows import Shards
from tests.reference import brute_force, distances

DIGITS = load_digits().data
SOME = DIGITS[:400]


def found(*arguments, **options):
    return [part.numpy() for part in exact_neighbors(*arguments, **options)]


def without_self(rows, k, metric):
    every = distances(rows, rows, metric)
    np.fill_diagonal(every, np.inf)
    order = np.argsort(every, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(every, order, 1), order


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "manhattan", "dot"])
def test_queries_get_what_a_brute_force_finds(metric):
    got, ids = found(SOME, DIGITS[400:500], 7, distance_metric=metric)
    expected, rows = brute_force(DIGITS[400:500], SOME, 7, metric)
    np.testing.assert_array_equal(ids, rows)
    np.testing.assert_allclose(got, expected.astype(float), rtol=1e-6)
    assert got.dtype == np.float32
    assert ids.dtype == np.int64


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_rows_are_no_neighbours_of_themselves_though_they_have_twins(metric):
    rows = np.concatenate([SOME[:100], SOME[:100]]) + np.random.default_rng(0).random((200, 64)).round(2)
    rows[100:150] = rows[:50]
    got, ids = found(rows, k=5, distance_metric=metric)
    expected, order = without_self(rows, 5, metric)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(got, expected.astype(float), rtol=1e-6, atol=1e-12)


def test_whether_a_row_is_its_own_neighbour_can_be_said():
    own = found(SOME, k=3, distance_metric="euclidean", exclude_self=False)[1]
    assert (own[:, 0] == np.arange(400)).all()
    first = found(SOME, SOME[:10], 3, distance_metric="euclidean", exclude_self=True)[1]
    np.testing.assert_array_equal(first, found(SOME, k=3, distance_metric="euclidean")[1][:10])


def test_no_more_neighbours_than_there_are_rows():
    assert found(SOME[:4], k=9, distance_metric="euclidean")[1].shape == (4, 3)
    assert found(SOME[:4], SOME[:2], 9, distance_metric="euclidean", ties=True)[1].shape == (2, 4)


def test_float64_rows_are_not_rounded():
    rows = 1e6 + np.arange(50)[:, None] * 1e-9 + np.zeros((1, 3))
    _, ids = found(rows, k=2, distance_metric="euclidean", exclude_self=False)
    np.testing.assert_array_equal(ids[:, 0], np.arange(50))


@pytest.mark.parametrize("metric", ["squared_euclidean", "manhattan"])
@pytest.mark.parametrize("k", [1, 3, 39, 60])
def test_tie_sets_are_whole(metric, k):
    rows = np.random.default_rng(1).integers(0, 3, (60, 2)).astype(np.float32)  # nine places: many ties
    got, ids = found(rows, k=k, distance_metric=metric, ties=True)
    plain, plain_ids = found(rows, k=k, distance_metric=metric)
    np.testing.assert_array_equal(ids[:, : plain.shape[1]], plain_ids)
    every = distances(rows, rows, metric).astype(float)
    np.fill_diagonal(every, np.inf)
    for query, row in enumerate(every):
        limit = np.sort(row)[min(k, 59) - 1]
        order = [i for i in np.argsort(row, kind="stable") if row[i] <= limit and i != query]
        assert ids[query][: len(order)].tolist() == order
        assert (ids[query][len(order) :] == -1).all()
        np.testing.assert_array_equal(got[query], [*row[order], *[np.inf] * (got.shape[1] - len(order))])
    assert ids.shape[1] == max((ids >= 0).sum(1))


def test_ties_of_rows_that_are_all_alike_are_refused_where_memory_ends(monkeypatch):
    rows = np.ones((50, 2), np.float32)
    assert found(rows, k=2, distance_metric="euclidean", ties=True)[1].shape == (50, 49)
    monkeypatch.setattr(neighbors.os, "sysconf", lambda _: 100)
    with pytest.raises(ValueError, match=r"`ties` asks for 50 lists of \d+ rows that are equally far"):
        exact_neighbors(rows, k=2, distance_metric="euclidean", ties=True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
def test_rows_on_disk_in_blocks_give_the_same_bits(tmp_path, monkeypatch, metric, dtype):
    rows = DIGITS[:300].astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    whole = found(rows.astype(np.float32) if dtype == np.uint8 else rows, k=6, distance_metric=metric)
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 37)
    monkeypatch.setattr(streaming, "QUERY_BLOCK", 41)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for source in (mapped, Shards([mapped[:120], mapped[120:]])):
        blocks = found(source, k=6, distance_metric=metric)
        np.testing.assert_array_equal(blocks[0].view(np.int32), whole[0].view(np.int32))
        np.testing.assert_array_equal(blocks[1], whole[1])


def test_blocks_shorter_than_a_list_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 3)
    np.save(tmp_path / "rows.npy", SOME[:50])
    _, ids = found(np.load(tmp_path / "rows.npy", mmap_mode="r"), k=20, distance_metric="euclidean")
    np.testing.assert_array_equal(ids, without_self(SOME[:50], 20, "euclidean")[1])


def test_lists_are_where_the_queries_are_and_tensors_are_taken():
    lists = exact_neighbors(torch.tensor(SOME).bfloat16(), torch.tensor(SOME[:3]), 2, distance_metric="cosine")
    assert [part.shape for part in lists] == [(3, 2), (3, 2)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((SOME, None, 0), {}, "`k` must be a positive integer, got 0"),
        ((SOME,), {"distance_metric": "l2"}, "`distance_metric` must be one of"),
        ((SOME,), {"exclude_self": 1}, "`exclude_self` must be True or False, got 1"),
        ((SOME,), {"ties": "all"}, "`ties` must be True or False"),
        ((SOME[0],), {}, r"`features` must be \(N, d\) with at least one row"),
        ((SOME, SOME[:, :3]), {}, "`queries` must be as wide as the bank, d=64"),
        ((SOME[:1],), {}, "`features` must hold two rows or more"),
        ((SOME[:2], SOME[:3]), {"exclude_self": True}, "there are 3 queries and 2 rows: set it to False"),
        ((SOME, np.full((2, 64), np.nan)), {}, r"`queries` must be finite as torch.float64, got 2 .* \(row 0, 1\)"),
        ((np.eye(3) - np.eye(3)[1],), {"distance_metric": "cosine"}, r"`features` must have no zero rows .*\(row 1\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        exact_neighbors(*arguments, **{"distance_metric": "euclidean", **options})


def test_a_bad_row_of_a_later_block_is_named_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 100)
    rows = SOME.copy()
    rows[250] = 0
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    with pytest.raises(ValueError, match=r"`features` must have no zero rows .*\(row 250\)"):
        exact_neighbors(mapped, SOME[:5], distance_metric="cosine")
