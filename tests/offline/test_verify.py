"""Lists of others, right and wrong in ways that are known."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from faiss_knn import exact_neighbors, verify_neighbors
from faiss_knn.offline import streaming

DIGITS = load_digits().data.astype(np.float32)
BANK, QUERIES = DIGITS[:1000], DIGITS[1000:1200]


def exact(k=5, metric="euclidean"):
    return [part.numpy().copy() for part in exact_neighbors(BANK, QUERIES, k, distance_metric=metric)]


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine", "manhattan", "dot"])
def test_the_exact_lists_are_certified(metric):
    distances, indices = exact(metric=metric)
    report = verify_neighbors(indices, BANK, QUERIES, distances=distances, distance_metric=metric)
    assert report["recall_ids"] == report["recall_distances"] == 1.0
    assert (report["wrong_distances"], report["worst"], report["repeated"], report["missing"]) == (0, [], 0, 0)
    assert (report["queries"], report["rows"], report["k"]) == (200, 1000, 5)


def test_scikit_learn_is_certified_with_and_without_the_row_itself():
    for include in (True, False):
        model = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(DIGITS[:500].astype(np.float64))
        found = model.kneighbors(DIGITS[:500] if include else None)
        report = verify_neighbors(found[1], DIGITS[:500], distances=found[0], distance_metric="euclidean")
        assert report["excludes_self"] is not include
        assert report["recall_distances"] == 1.0
        assert report["wrong_distances"] == 0


def test_each_fault_is_counted_and_its_query_named():
    distances, indices = exact()
    far = np.setdiff1d(np.arange(1000), indices[7])[
        np.argmax(((np.delete(BANK, indices[7], 0) - QUERIES[7]) ** 2).sum(1))
    ]
    indices[7, 2:4] = far, -1  # a wrong row, a missing one
    indices[9, 4] = indices[9, 0]  # a row twice
    distances[11, 1] *= 1.001
    distances[7, 2] = np.linalg.norm(BANK[far] - QUERIES[7])
    distances[9, 4] = distances[9, 0]
    report = verify_neighbors(indices, BANK, QUERIES, distances=distances, distance_metric="euclidean")
    assert report["recall_ids"] == pytest.approx(1 - 3 / 1000)
    assert report["recall_distances"] == pytest.approx(1 - 3 / 1000)
    assert (report["wrong_distances"], report["repeated"], report["missing"]) == (1, 1, 1)
    assert report["worst"] == [7, 9, 11]
    assert report["worst_recalls"] == [0.6, 0.8, 1.0]


def test_rows_that_tie_for_the_last_place_count_by_distance_alone():
    rows = np.array([[0.0], [1.0], [-1.0], [1.0], [5.0]], np.float32)
    report = verify_neighbors([[3], [2]], rows, np.array([[0.1], [-0.9]], np.float32) * 10, distance_metric="euclidean")
    assert (report["recall_ids"], report["recall_distances"], report["ties"]) == (0.5, 1.0, 1)
    report = verify_neighbors([[2, 0]], rows, rows[:1], distance_metric="euclidean")
    assert (report["recall_ids"], report["recall_distances"], report["ties"]) == (0.5, 1.0, 1)


def test_distances_are_checked_only_where_there_are_some():
    assert verify_neighbors(exact()[1], BANK, QUERIES, distance_metric="euclidean")["wrong_distances"] is None
    squares = verify_neighbors(exact()[1], BANK, QUERIES, distances=exact()[0] ** 2, distance_metric="euclidean")
    assert squares["wrong_distances"] == 1000


def test_a_bank_in_blocks_gives_the_same_report(tmp_path, monkeypatch):
    distances, indices = exact()
    indices[::3, 1] = 17
    options = {"distances": distances, "distance_metric": "euclidean"}
    whole = verify_neighbors(indices, BANK, QUERIES, **options)
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 90)
    np.save(tmp_path / "bank.npy", BANK)
    assert verify_neighbors(indices, np.load(tmp_path / "bank.npy", mmap_mode="r"), QUERIES, **options) == whole
    assert whole["wrong_distances"] >= 60


def test_lists_longer_than_the_bank_are_judged_by_what_there_is():
    report = verify_neighbors([[1, -1, -1], [0, -1, -1]], BANK[:2], distance_metric="euclidean")
    assert (report["k"], report["recall_ids"], report["missing"]) == (1, 1.0, 0)


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        ([[0.5]], {}, r"`indices` must be a \(Q, K\) array of row numbers"),
        ([[0]] * 3, {}, "`indices` must have a list for each of the 2 queries, got 3"),
        ([[0], [9]], {}, "`indices` must be row numbers of the bank, 0 to 3, or -1 for none, got 9 in list 1"),
        ([[0], [-2]], {}, "got -2 in list 1"),
        ([[0], [1]], {"distances": [[0.0]]}, r"`distances` must be numbers of the shape of `indices`, \(2, 1\)"),
        ([[0], [1]], {"distance_metric": "l2"}, "`distance_metric` must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(indices, options, message):
    with pytest.raises(ValueError, match=message):
        verify_neighbors(indices, BANK[:4], QUERIES[:2], **{"distance_metric": "euclidean", **options})
