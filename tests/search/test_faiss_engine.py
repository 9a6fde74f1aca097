"""Approximate indexes: the recall they state is the recall they have, and what they learned outlives the bank."""

import pytest
import torch

from faiss_knn import KNNIndex


def clusters(seed: int, n: int, d: int = 96, classes: int = 40) -> torch.Tensor:
    """Rows with classes and a decaying spectrum, like learned features."""
    fixed, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=fixed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=fixed)).Q
    own = torch.randint(classes, (n,), generator=generator)
    return (centres[own] + torch.randn(n, d, generator=generator)) * torch.arange(1, d + 1) ** -0.5 @ turn


def recall(index: KNNIndex, rows: torch.Tensor, queries: torch.Tensor, k: int) -> float:
    exact = KNNIndex(distance_metric=index.distance_metric).build(rows).search(queries, k).indices
    found = index.search(queries, k).indices
    return (found[:, :, None] == exact[:, None, :]).any(1).float().mean().item()


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine"])
@pytest.mark.parametrize("spec", ["fast", "ivf"])
def test_the_stated_recall_holds_for_unseen_queries(spec, metric):
    rows, queries = clusters(0, 8000), clusters(1, 500)
    index = KNNIndex(spec, distance_metric=metric, target_recall=0.95).build(rows)
    assert not index.stats.exact
    assert index.stats.recall >= 0.95
    assert recall(index, rows, queries, 20) == pytest.approx(index.stats.recall, abs=0.03)


@pytest.mark.parametrize("spec", ["fast", "ivf", "HNSW16"])
def test_distances_are_those_of_the_rows_found(spec):
    rows, queries = clusters(0, 6000) + 50, clusters(1, 20) + 50
    found = KNNIndex(spec).build(rows).search(queries, 10)
    expected = (rows[found.indices].double() - queries[:, None].double()).norm(dim=2)
    torch.testing.assert_close(found.distances, expected.float(), rtol=1e-5, atol=0)
    assert (found.distances.diff(dim=1) >= 0).all()


def test_a_low_nprobe_states_what_it_costs():
    rows, queries = clusters(0, 8000), clusters(1, 300)
    index = KNNIndex("ivf", nprobe=1).build(rows)
    assert index.stats.nprobe == 1
    assert index.stats.recall < 0.9
    assert recall(index, rows, queries, 20) == pytest.approx(index.stats.recall, abs=0.05)


def test_a_factory_string_is_tuned_where_a_recall_is_asked_for():
    rows = clusters(0, 6000)
    tuned = KNNIndex("IVF64,Flat", target_recall=0.9).build(rows).stats
    assert tuned.recall >= 0.9
    assert tuned.nprobe > 1
    assert KNNIndex("IVF64,Flat").build(rows).stats.recall is None


def test_fast_keeps_what_it_learned_while_it_holds():
    index = KNNIndex("fast", target_recall=0.95).build(clusters(0, 8000))
    before = index.stats.parameters
    after = index.build(clusters(2, 9000)).stats.parameters
    assert (before["warm"], after["warm"]) == (False, True)
    assert before["k_factor"] == after["k_factor"]
    other = torch.randn(8000, 96, generator=torch.Generator().manual_seed(3)) * torch.arange(96, 0, -1) ** -0.5
    index.build(other)
    assert recall(index, other, other[:200] + 0.01, 20) > 0.92


def test_ivf_keeps_its_centroids():
    index = KNNIndex("ivf").build(clusters(0, 6000))
    rows, queries = clusters(1, 6000), clusters(2, 200)
    assert not index.stats.parameters["warm"]
    assert index.build(rows).stats.parameters["warm"]
    assert recall(index, rows, queries, 20) == pytest.approx(index.stats.recall, abs=0.03)


def test_a_much_larger_k_is_tuned_for():
    rows, queries = clusters(0, 8000), clusters(1, 200)
    index = KNNIndex("ivf", target_recall=0.95).build(rows, expected_k=1)
    assert recall(index, rows, queries, 100) >= 0.93
    fast = KNNIndex("fast", target_recall=0.95).build(rows, expected_k=1)
    assert recall(fast, rows, queries, 100) >= 0.93
    assert fast.stats.parameters["tuned_k"] == 100


def test_fast_and_auto_are_exact_where_exact_is_as_fast():
    rows = clusters(0, 1000)
    for spec in ("fast", "auto"):
        assert KNNIndex(spec).build(rows).stats.exact
    assert KNNIndex("fast", distance_metric="manhattan").build(clusters(0, 5000)).stats.spec == "flat"


def test_auto_weighs_the_queries_against_the_build():
    rows = clusters(0, 60_000, d=256)
    assert KNNIndex("auto").build(rows, expected_queries=10).stats.spec == "flat"
    many = KNNIndex("auto").build(rows, expected_queries=10_000_000).stats
    assert many.spec == "fast"
    assert many.recall >= 0.99


def test_a_bank_too_small_for_lists():
    with pytest.raises(ValueError, match="at least 78 rows"):
        KNNIndex("ivf").build(clusters(0, 50))


def test_flat_with_a_projection_is_as_exact():
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(40, 640, generator=generator)
    rows = torch.randn(3000, 40, generator=generator) @ turn + 0.01 * torch.randn(3000, 640, generator=generator)
    index = KNNIndex().build(rows)
    assert index.stats.parameters["scan_dims"] < 640
    queries = rows[:20] + 0.05 * torch.randn(20, 640, generator=generator)
    expected = torch.cdist(queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = index.search(queries, 15)
    assert torch.equal(found.indices, expected.topk(15, largest=False).indices)
