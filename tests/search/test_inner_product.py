"""distance_metric="dot": minus the inner product, exact for rows of any finite size."""

import numpy as np
import pytest
import torch

from faiss_knn import FeatureBank, KNNIndex, OnlineKNN, evaluate, vote
from faiss_knn.search.distance import get_distance, pair_norms
from faiss_knn.search.engines.bounds import InnerProductBounds
from faiss_knn.search.engines.recall_sample import recall_sample
from faiss_knn.search.stored_rows import StoredRows
from tests.reference import brute_force, distances

FLOAT32_MOST = float(np.finfo(np.float32).max)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(most, *shape, seed=0):
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def banks():
    huge = normal(3000, 32)
    huge[:30] *= 1e20
    one_huge = normal(3000, 32)
    one_huge[7] *= 1e25
    zeros = normal(2000, 8)
    zeros[100:1500] = 0
    beyond = normal(2000, 16).double() * 1e300
    beyond[:20] *= 2e7
    low_rank = normal(2000, 20) @ normal(20, 600, seed=1)
    return {
        "normal": (normal(3000, 33), normal(30, 33, seed=1)),
        "few": (normal(40, 33), normal(30, 33, seed=1)),
        "one dimension": (normal(3000, 1), normal(9, 1, seed=1)),
        "far from zero": (normal(3000, 32) + 1e4, torch.cat([normal(20, 32, seed=1), normal(20, 32, seed=2) + 1e4])),
        "of many sizes": (normal(3000, 32) * torch.exp(3 * normal(3000, 1, seed=2)), normal(30, 32, seed=1)),
        "some huge": (huge, normal(30, 32, seed=1)),
        "one huge, tiny queries": (one_huge, 1e-20 * normal(30, 32, seed=1)),
        "ties": (whole(2, 3000, 6), whole(2, 30, 6, seed=1)),
        "zero rows and queries": (zeros, torch.cat([normal(20, 8, seed=1), torch.zeros(3, 8)])),
        "copies": (whole(9, 20, 16)[torch.arange(3000) % 20], whole(9, 20, 16, seed=1)),
        "all zero": (torch.zeros(500, 4), normal(3, 4)),
        "float16": (normal(1000, 24).half(), normal(20, 24, seed=1).half()),
        "bfloat16": (normal(1000, 24).bfloat16(), normal(20, 24, seed=1).bfloat16()),
        "float64": (normal(1000, 24).double() + 1e6, normal(20, 24, seed=1).double()),
        "float64, tiny": (normal(1000, 24).double() * 1e-200, normal(20, 24, seed=1).double() * 1e-50),
        "float64, large": (normal(1000, 24).double() * 1e200, normal(20, 24, seed=1).double() * 1e50),
        "float64, at the end of its range": (beyond, normal(20, 16, seed=1).double()),
        "of low rank": (low_rank, low_rank[:20]),
        "wide": (normal(1000, 700) * torch.exp(normal(1000, 1, seed=2)), normal(20, 700, seed=1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", banks())
def test_neighbours_are_those_of_brute_force_in_any_batch(name):
    rows, queries = banks()[name]
    index = KNNIndex(distance_metric="dot", storage_dtype=rows.dtype).build(rows)
    found = index.search(queries, 20)
    expected, ids = brute_force(queries.double().numpy(), rows.double().numpy(), 20, "dot")
    np.testing.assert_array_equal(found.indices.numpy(), ids)
    expected = expected.clip(-FLOAT32_MOST, FLOAT32_MOST).astype(np.float32)
    scale = (queries.double().norm(dim=1) * rows.double().norm(dim=1).amax()).clamp(max=FLOAT32_MOST).numpy()
    assert (np.abs(found.distances.numpy() - expected) <= 1e-6 * np.abs(expected) + 1e-12 * scale[:, None]).all()
    for size in (1, 7):
        parts = [index.search(part, 20) for part in queries.split(size)]
        assert torch.equal(torch.cat([part.indices for part in parts]), found.indices)
        assert torch.equal(torch.cat([part.distances for part in parts]), found.distances)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", banks())
def test_no_row_scores_below_the_least_score_of_its_distance(name, projected, dtype):
    bank, queries = banks()[name]
    rows, distance = StoredRows(bank, storage_dtype=bank.dtype), get_distance("dot")
    basis = torch.linalg.qr(normal(bank.shape[1], max(1, bank.shape[1] // 3))).Q if projected else None
    bounds = InnerProductBounds(rows, distance, dtype, basis=basis)
    prepared = bounds.prepare(queries)
    scores = bounds.scores(prepared, 0, len(bank)).T.double()
    most = np.finfo(np.float64).max
    exact = distances(queries.double().numpy(), bank.double().numpy(), "dot").clip(-most, most).astype(float)
    exact = torch.from_numpy(exact)
    least = torch.stack([bounds.least_score(prepared, column) for column in exact.T], 1)
    assert (scores >= least).all()


def test_bounds_exclude_nearly_all_rows():
    rows, queries = normal(20000, 64), normal(50, 64, seed=1)
    index = KNNIndex(distance_metric="dot").build(rows)
    index.search(queries, 10)
    assert index.stats.uncertified < 10


def test_a_pair_has_the_same_bits_wherever_it_stands():
    rows, queries = normal(300, 37).double(), normal(5, 37, seed=1).double()
    distance = get_distance("dot")
    whole_table = pair_norms(queries, rows[None], distance)
    for i in (0, 4):
        for j in (0, 5, 299):
            assert pair_norms(queries[i, None], rows[None, None, j], distance)[0, 0] == whole_table[i, j]
            assert pair_norms(queries[i, None].clone(), rows[j:][None], distance)[0, 0] == whole_table[i, j]


@pytest.mark.parametrize("spec", ["Flat", "IVF16,Flat", "HNSW16", "ivf", "fast", "auto"])
def test_indexes_search_by_products(spec):
    rows, queries = normal(6000, 16) + 1, normal(40, 16, seed=1)
    index = KNNIndex(spec, distance_metric="dot", target_recall=0.9).build(rows)
    found = index.search(queries, 10)
    exact, ids = brute_force(queries.numpy(), rows.numpy(), 10, "dot")
    shares = [len(set(ours) & set(theirs)) / 10 for ours, theirs in zip(found.indices.tolist(), ids, strict=True)]
    assert np.mean(shares) > (0.999 if spec in ("Flat", "fast", "auto") else 0.3)  # graphs of products are poor
    assert index.stats.spec == "flat" or spec not in ("fast", "auto")
    hit = found.indices.numpy() == ids
    np.testing.assert_allclose(found.distances.numpy()[hit], exact[hit].astype(float), rtol=1e-5)


def test_softmax_and_uniform_weights_take_negative_distances_and_inverse_ones_are_refused():
    rows, queries = normal(50, 4), normal(6, 4, seed=1)
    labels = torch.arange(50) % 3
    bank = FeatureBank(rows, labels, distance_metric="dot")
    near, ids = brute_force(queries.numpy(), rows.numpy(), 5, "dot")
    weights = np.exp((near[:, :1] - near).astype(float) / 0.5)
    expected = np.zeros((6, 3))
    for query, weight, one in zip(range(6), weights, ids, strict=True):
        np.add.at(expected[query], labels.numpy()[one], weight / weight.sum())
    found = bank.predict(queries, k=5, temperature=0.5, weighting="softmax")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert bank.predict(queries, k=5, weighting="uniform").sum() == 30
    for call in (
        lambda: bank.predict(queries, k=5),
        lambda: evaluate(rows, labels, queries, labels[:6], distance_metric="dot"),
        lambda: OnlineKNN("knn", "x", "y", 10, distance_metric="dot"),
    ):
        with pytest.raises(ValueError, match="weighting='inverse' does not go with distance_metric='dot'"):
            call()
    with pytest.raises(ValueError, match="-inf or NaN, got -inf"):
        vote(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([[0, 1]]), 2, weighting="softmax")


def test_evaluation_by_products():
    rows, queries = normal(400, 8) * torch.exp(normal(400, 1, seed=2)), normal(50, 8, seed=1)
    labels, truth = torch.arange(400) % 5, torch.arange(50) % 5
    queries = torch.cat([queries, rows[:7], rows[7:9] * (1 + 2.0**-10)])
    truth = torch.cat([truth, labels[:9]])
    report = evaluate(rows, labels, queries, truth, k=(1, 9), weighting="uniform", distance_metric="dot",
                      index=("flat", "IVF4,Flat"), nprobe=4, keep_neighbors=True)  # fmt: skip
    _, ids = brute_force(queries.numpy(), rows.numpy(), 9, "dot")
    np.testing.assert_array_equal(report.neighbors["flat"][1], ids)
    votes = [np.bincount(labels.numpy()[row], minlength=5).argmax() for row in ids]
    record = next(r for r in report.records if r["k"] == 9 and r["spec"] == "flat")
    assert record["top1"] == pytest.approx(np.mean(np.array(votes) == truth.numpy()))
    assert [r["recall"] for r in report.records] == [1, 1, 1, 1]
    # A copy is found among a query's largest products: those of short rows are not.
    within = sum(i in ids[50 + i] for i in range(7))
    assert record["duplicates"] == within > 0
    assert record["near_duplicates"] == sum(i in ids[50 + i] for i in (7, 8))
    alone = evaluate(rows, labels, leave_one_out=True, k=3, weighting="uniform", distance_metric="dot",
                     keep_neighbors=True)  # fmt: skip
    every = distances(rows.numpy(), rows.numpy(), "dot")
    np.fill_diagonal(every, np.inf)
    np.testing.assert_array_equal(alone.neighbors["flat"][1], np.argsort(every, axis=1, kind="stable")[:, :3])


def test_sums_that_leave_float64_on_the_way():
    pairs = ((1.7e308, -1.7e308), (1.6e308, -1.7e308), (1.7e308, -1.6e308), (1, 1))
    rows = torch.tensor([[a, b] * 4 for a, b in pairs], dtype=torch.float64)
    queries = torch.tensor([[1.0] * 8, [-1.0] * 8, [1e-9] * 8], dtype=torch.float64)
    large = torch.tensor([[1e300, -1e300] * 4, [1e300, 1e300] * 4], dtype=torch.float64)
    for bank, asked in ((rows, queries), (large, large), (rows.repeat(200, 1), queries)):
        found = KNNIndex(distance_metric="dot", storage_dtype=torch.float64).build(bank)._nearest(asked, 2)
        most = np.finfo(np.float64).max
        every = distances(asked.numpy(), bank.numpy(), "dot").clip(-most, most).astype(float)
        ids = np.argsort(every, axis=1, kind="stable")[:, :2]
        np.testing.assert_array_equal(found.indices.numpy(), ids)
        np.testing.assert_allclose(found.distances.numpy(), np.take_along_axis(every, ids, 1), rtol=1e-14)


def test_held_out_rows_have_no_near_twins_by_products():
    rows = normal(30, 4)
    stored = StoredRows(rows)
    stored.check(get_distance("dot"))
    sample = recall_sample(stored, get_distance("dot"), 10)  # farther ones are at positive distances
    own = sample.excluded[:, 0]
    assert (sample.excluded[:, 1:] == -1).all()
    every = distances(rows.numpy(), rows.numpy(), "dot")
    np.fill_diagonal(every, np.inf)
    expected = np.argsort(every, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(sample.neighbors.numpy(), expected[own.numpy()])
