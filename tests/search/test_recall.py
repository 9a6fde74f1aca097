"""The recall that an approximate index reports is the one that its queries get."""

import pytest
import torch

from faiss_knn import KNNIndex

DECAY = torch.arange(1, 65) ** -0.35


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def views(samples, count, noise=0.1, seed=0):
    """Rows that show each of `samples` samples `count` times, as a queue of augmented batches does."""
    rows = normal(samples, 1, 64, seed=seed) * DECAY
    return (rows + noise * normal(samples, count, 64, seed=seed + 1) * DECAY).reshape(-1, 64)


def true_recall(index, bank, queries, k):
    exact = KNNIndex("flat").build(bank).search(queries, k).indices
    found = index.search(queries, k).indices
    return (found[:, :, None] == exact[:, None]).any(1).double().mean().item()


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("spec", ["fast", "auto", "ivf"])
def test_views_of_one_sample_do_not_flatter_the_recall(spec, k, count):
    bank, queries = views(6000 // count, count), normal(300, 64, seed=9) * DECAY
    index = KNNIndex(spec, target_recall=0.95).build(bank, expected_k=k, expected_queries=10**8)
    true = true_recall(index, bank, queries, k)
    assert index.stats.recall <= true + 0.04
    assert true >= 0.92
    assert index.stats.recall_of == (None if index.stats.exact else "held-out rows without twins")


@pytest.mark.parametrize("spec", ["fast", "ivf", "HNSW8", "IVF32,Flat"])
def test_what_queries_get_is_measured_on_them_and_the_next_build_is_tuned_on_them(spec):
    bank, queries = normal(6000, 64, seed=0) * DECAY, 3 * normal(300, 64, seed=9)  # nothing like the bank
    index = KNNIndex(spec, target_recall=0.95).build(bank, expected_k=10)
    share = index.measure_recall(queries, 10)
    assert share == pytest.approx(true_recall(index, bank, queries, 10))
    assert (index.stats.recall, index.stats.recall_of) == (share, "queries")
    index.build(bank, expected_k=10)
    assert share >= 0.9 or index.stats.recall_of == "queries"
    if spec != "HNSW8":  # it has nothing to tune
        assert true_recall(index, bank, queries, 10) >= 0.93


def test_an_exact_index_finds_all_and_is_not_measured():
    index = KNNIndex().build(normal(100, 8, seed=0))
    assert index.measure_recall(normal(5, 8, seed=1), 3) == 1.0
    assert index.stats.recall_of is None
