"""The exact search by bounds in whole numbers: the same neighbours, and another way where the bounds are loose."""

import math
import pickle

import numpy as np
import pytest
import torch

from faiss_knn import KNNIndex
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines import choice, exact, matrix_product
from faiss_knn.search.engines.exact import ExactEngine
from faiss_knn.search.engines.matrix_product import scan_dtype
from faiss_knn.search.precision import cpu_flags
from faiss_knn.search.stored_rows import StoredRows

HAS_INSTRUCTIONS = not cpu_flags().isdisjoint({"amx_int8", "avx512_vnni", "avx_vnni"})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def int8_is_fast(monkeypatch):
    lack_or_have_int8(monkeypatch, True)
    for module in ("exact", "costs"):
        monkeypatch.setattr(
            f"faiss_knn.search.engines.{module}.multiply_add_seconds",
            lambda dtype: 1e-12 if dtype == torch.int8 else 1e-9,
        )
    if not HAS_INSTRUCTIONS:
        monkeypatch.setattr(matrix_product, "_multiply_whole", in_float64)


def lack_or_have_int8(monkeypatch, has_it):
    for module in ("exact", "fast", "int8_bounds"):
        monkeypatch.setattr(
            f"faiss_knn.search.engines.{module}.has_fast_int8", lambda device: has_it and device.type == "cpu"
        )


def in_float64(rows, queries, out):
    return out.copy_(rows.double() @ queries.double().T)


def expected(queries, bank, k, metric):
    queries, bank = queries.double().numpy(), bank.double().numpy()
    if metric == "cosine":
        queries, bank = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, bank))
    norms = np.stack([np.sqrt(((bank - query) ** 2).sum(1)) for query in queries])
    distances = norms**2 / 2 if metric == "cosine" else norms
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def check(index, queries, bank, k=10):
    distances, ids = index.search(queries, k)
    wanted, order = expected(queries, bank, k, index.distance_metric)
    np.testing.assert_allclose(distances.numpy(), wanted, rtol=1e-6, atol=1e-12)
    assert (ids.numpy() == order).all()


def banks():
    clusters = normal(30, 96)[torch.arange(3000) % 30] + 0.1 * normal(3000, 96, seed=1)
    outlying = normal(3000, 96)
    outlying[:, 5] *= 40
    return {
        "normal": (normal(3000, 96), normal(40, 96, seed=1)),
        "clusters": (clusters, clusters[:40] + 0.05 * normal(40, 96, seed=2)),
        "far from zero": (normal(3000, 64) + 50, normal(40, 64, seed=1) + 50),
        "one coordinate outlying": (outlying, outlying[:40] + normal(40, 96, seed=2)),
        "copies of each row": (normal(300, 96).repeat(10, 1), normal(40, 96, seed=1)),
        "a few rows of any size": (
            torch.cat([normal(3000, 96), normal(8, 96) * 10.0 ** torch.arange(-3, 5)[:, None]]),
            normal(40, 96, seed=1),
        ),
        "a few queries of any size": (
            normal(3000, 96),
            torch.cat([normal(40, 96, seed=1), normal(8, 96, seed=2) * 10.0 ** torch.arange(-3, 5)[:, None]]),
        ),
        "queries of another kind": (normal(3000, 96), 7 * normal(40, 96, seed=1) + 3),
        "rows of float16": (normal(3000, 96).half(), normal(40, 96, seed=1).half()),
    }  # fmt: skip


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", banks())
def test_the_neighbours_are_those_of_a_float64_search(name, metric):
    bank, queries = banks()[name]
    index = KNNIndex(distance_metric=metric).build(bank)
    assert index.stats.parameters["scan_dtype"] == "int8"
    check(index, queries, bank)
    check(index, queries, bank)  # by what was learned


def test_usual_features_stay_with_it():
    bank, queries = normal(20_000, 128), normal(300, 128, seed=1)
    index = KNNIndex().build(bank)
    check(index, queries, bank, k=20)
    assert index.stats.parameters["scan_dtype"] == "int8"
    assert index.stats.uncertified <= 3


def test_where_it_is_loose_the_search_goes_on_in_another_and_the_next_bank_begins_with_that():
    bank = normal(20_000, 64)
    bank[:, :2] *= 20  # beside these, the other coordinates are rounded to next to nothing
    queries = bank[:300] + 0.1 * normal(300, 64, seed=1)
    index = KNNIndex().build(bank)
    check(index, queries, bank)
    assert index.stats.parameters["scan_dtype"] != "int8"
    assert index.build(bank).stats.parameters["scan_dtype"] != "int8"
    assert KNNIndex().build(bank).stats.parameters["scan_dtype"] == "int8"


def test_too_few_candidates_are_no_reason_to_go_on_in_another():
    bank, queries = normal(20_000, 128), normal(300, 128, seed=1)
    index = KNNIndex().build(bank)
    check(index, queries, bank, k=20)
    spare = index._engine._oversampling[20]
    spare.count = 0  # as where the queries so far needed none
    check(index, queries, bank, k=20)
    assert index.stats.parameters["scan_dtype"] == "int8"
    assert index.stats.uncertified <= 6
    assert spare.count > 64


def test_a_few_queries_beyond_reach_do_not_end_it_for_the_others(monkeypatch):
    monkeypatch.setattr(
        "faiss_knn.search.engines.exact.multiply_add_seconds", lambda dtype: 0.0 if dtype == torch.int8 else 2.6e-11
    )
    bank, queries = normal(20_000, 128), normal(300, 128, seed=1)
    queries[:2] = 1e15  # for which every row must be measured
    index = KNNIndex().build(bank)
    index.search(queries, 20)
    assert index.stats.uncertified >= 2
    assert index.stats.parameters["scan_dtype"] == "int8"


def test_where_the_product_is_too_small_to_pay_the_search_goes_on_in_another(monkeypatch):
    monkeypatch.setattr("faiss_knn.search.engines.exact.multiply_add_seconds", lambda dtype: 1e-14)
    bank, queries = normal(20_000, 128), normal(300, 128, seed=1)
    index = KNNIndex().build(bank)
    check(index, queries, bank)
    assert index.stats.parameters["scan_dtype"] != "int8"


@pytest.mark.parametrize(("metric", "dim"), [("euclidean", 63), ("dot", 96), ("manhattan", 96)])
def test_elsewhere_it_is_not_used(metric, dim):
    index = KNNIndex(distance_metric=metric).build(normal(3000, dim))
    assert index.stats.parameters.get("scan_dtype") != "int8"


@pytest.mark.parametrize("has_it", [True, False])
def test_an_index_that_moves_to_a_machine_without_it_goes_on_in_another(monkeypatch, has_it):
    bank, queries = normal(3000, 96), normal(40, 96, seed=1)
    pickled = pickle.dumps(KNNIndex().build(bank))
    lack_or_have_int8(monkeypatch, has_it)
    index = pickle.loads(pickled)
    assert (index.stats.parameters["scan_dtype"] == "int8") == has_it
    check(index, queries, bank)


@pytest.mark.parametrize("spec", ["flat", "fast"])
def test_a_released_index_moves_too(monkeypatch, spec):
    bank, queries = normal(8000, 96), normal(40, 96, seed=1)
    index = KNNIndex(spec).build(bank)
    assert index.stats.parameters["scan_dtype"] == "int8"
    index.release()
    pickled = pickle.dumps(index)
    lack_or_have_int8(monkeypatch, False)
    index = pickle.loads(pickled).build(bank)
    assert index.stats.parameters["scan_dtype"] != "int8"
    assert share_found(index, queries, bank) >= 0.98


def share_found(index, queries, bank, k=10):
    _, order = expected(queries, bank, k, index.distance_metric)
    found = index.search(queries, k).indices.numpy()
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(found, order, strict=True)])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_fast_scans_in_it_at_its_recall_and_a_warm_build_too(metric):
    bank, queries = normal(8000, 96), normal(100, 96, seed=1)
    index = KNNIndex("fast", distance_metric=metric).build(bank)
    for is_warm in (False, True):
        assert index.stats.parameters["scan_dtype"] == "int8"
        assert index.stats.parameters["scan_dims"] == 96
        assert index.stats.parameters["warm"] == is_warm
        assert index.stats.recall >= 0.985
        assert share_found(index, queries, bank) >= 0.98
        index.build(bank)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("times", "plus"), [(1.5, 0), (3, 0), (14, 0), (100, 0), (1, 3), (1, 20)])
def test_fast_finds_as_many_of_queries_unlike_the_rows(times, plus, metric):
    bank, queries = normal(8000, 96), normal(100, 96, seed=1)
    index = KNNIndex("fast", distance_metric=metric).build(bank)
    assert index.stats.parameters["scan_dtype"] == "int8"
    assert share_found(index, times * queries + plus, bank) >= 0.98


def test_fast_scans_in_another_where_rounding_leaves_too_little():
    clusters = 100 * normal(8, 64).repeat(1000, 1)
    bank = clusters + 0.4 * normal(8000, 64, seed=1)  # a tenth of what one in 127 stands for
    queries = clusters[:100] + 0.4 * normal(100, 64, seed=2)
    index = KNNIndex("fast").build(bank)
    assert index.stats.parameters["scan_dtype"] != "int8"
    assert index.stats.recall >= 0.98
    assert share_found(index, queries, bank) >= 0.98


def test_where_nothing_meets_the_target_fast_takes_what_finds_most(monkeypatch):
    shares = iter([0.2, 0.9, 0.5, 0.4, 0.3, 0.1, 0.0])
    tried = []

    def unmet(self, bounds, sample):
        tried.append((next(shares), bounds.dtype))
        return 10.0, tried[-1][0], False

    monkeypatch.setattr("faiss_knn.search.engines.fast.FastEngine._least_factor", unmet)
    stats = KNNIndex("fast").build(normal(8000, 96)).stats
    assert stats.recall == 0.9
    assert stats.parameters["scan_dtype"] == str(tried[1][1]).removeprefix("torch.") != "int8"


@pytest.mark.parametrize("has_it", [True, False])
def test_fast_that_moves_to_a_machine_without_it_goes_on_in_another(monkeypatch, has_it):
    bank, queries = normal(8000, 96), normal(40, 96, seed=1)
    pickled = pickle.dumps(KNNIndex("fast").build(bank))
    lack_or_have_int8(monkeypatch, has_it)
    index = pickle.loads(pickled)
    assert (index.stats.parameters["scan_dtype"] == "int8") == has_it
    assert share_found(index, queries, bank) >= 0.98


def test_fast_finds_as_many_there_where_scores_in_bfloat16_would_be_too_rough(monkeypatch):
    centres = normal(50, 256).repeat(400, 1)
    bank = centres + 0.3 * normal(20_000, 256, seed=1)
    queries = centres[:200] + 0.3 * normal(200, 256, seed=2)
    index = KNNIndex("fast").build(bank, expected_k=50)
    assert index.stats.parameters["scan_dtype"] == "int8"
    pickled = pickle.dumps(index)
    lack_or_have_int8(monkeypatch, False)
    monkeypatch.setattr("faiss_knn.search.engines.fast.scan_dtype", lambda device: torch.bfloat16)
    assert share_found(pickle.loads(pickled), queries, bank, k=50) >= 0.985


def test_more_dimensions_than_int32_has_room_for_are_scanned_in_another():
    # Rows that are 127 or -127 everywhere in whole numbers: of some the product would be above 2^31.
    row = normal(1, 140_000).sign()
    sizes = 1 + torch.arange(44)[:, None] / 512
    bank = torch.cat([row * sizes, 0 * row, -row * sizes]).half()
    index = KNNIndex().build(bank)
    assert index.stats.parameters["scan_dtype"] != "int8"
    assert index.search(bank[[20, 70]], 1).indices.tolist() == [[20], [70]]


@pytest.mark.skipif(not HAS_INSTRUCTIONS, reason="the CPU has no instructions for int8, or saturating ones")
@pytest.mark.parametrize("saturates", [True, False])
def test_products_that_saturate_are_not_used_however_fast(monkeypatch, saturates):
    monkeypatch.setattr(matrix_product, "multiply_add_seconds", lambda dtype: 1e-12 if dtype == torch.int8 else 1e-9)
    if saturates:
        monkeypatch.setattr(matrix_product, "_multiply_whole", saturating)
    assert matrix_product.has_fast_int8.__wrapped__(torch.device("cpu")) != saturates


def saturating(rows, queries, out):
    pairs = [rows[:, i::2].double() @ queries[:, i::2].double().T for i in range(2)]
    return out.copy_(sum(pair.clamp(-(2.0**15), 2.0**15 - 1) for pair in pairs))


@pytest.mark.skipif(not HAS_INSTRUCTIONS, reason="the CPU has no instructions for int8, or saturating ones")
@pytest.mark.parametrize("width", [8, 72, 392, 2056])
def test_products_of_whole_numbers_are_exact(width):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-127, 128, (300, width), generator=generator).to(torch.int8)
    queries = torch.cat([torch.full((1, width), 127), torch.full((1, width), -127)]).to(torch.int8)
    rows[:2] = queries
    queries = torch.cat([queries, rows[40:71]])
    product = matrix_product.multiply(rows, queries, torch.empty(300, len(queries), dtype=torch.int32))
    assert torch.equal(product, (rows.double() @ queries.double().T).int())


def test_a_sample_foretells_how_many_candidates_a_bank_needs():
    bank, queries = normal(40_000, 96), normal(300, 96, seed=1)
    index = KNNIndex().build(bank)
    index.search(queries, 20)
    needed = index._engine._oversampling[20].usual
    rows = StoredRows(bank[::10].contiguous())
    foretold = ExactEngine(rows, get_distance("euclidean")).candidates_needed(40_000, 20)
    assert 0.7 * needed < foretold < 1.5 * needed


@pytest.mark.parametrize("k", [5000, 10**6, 10**400], ids=["the bank", "more", "any number"])
@pytest.mark.parametrize("queries", [None, 10**400], ids=["usual queries", "any number"])
def test_auto_may_expect_more_neighbours_and_queries_than_there_can_be(monkeypatch, k, queries):
    monkeypatch.setattr(choice, "_FASTER", math.inf)  # that all is foretold
    monkeypatch.setattr(choice, "_SURE", math.inf)
    index = KNNIndex("auto").build(normal(5000, 64), expected_k=k, expected_queries=queries)
    assert index.search(normal(2, 64, seed=1), 10).indices.shape == (2, 10)


def test_candidates_and_second_passes_must_cost_less_than_the_product_saves(monkeypatch):
    rows = StoredRows(normal(1000, 100))
    seconds = {torch.int8: 2e-12, scan_dtype(rows.device): 4e-12}
    monkeypatch.setattr(f"{exact.__name__}.multiply_add_seconds", seconds.__getitem__)
    monkeypatch.setattr(f"{exact.__name__}.seconds_per_candidate", lambda dim: 1e-6)
    monkeypatch.setattr(f"{exact.__name__}.seconds_per_kept", lambda rows: 1e-6)
    saved = 0.9 * (1_000_000 * 100 * 2e-12 + 32e-6)  # 209 µs a query
    for needed, selecting in ((208, 0.0), (100, 108e-6), (0, 208e-6)):
        assert exact.pays_in_int8(rows, 1_000_000, needed, selecting)
        assert not exact.pays_in_int8(rows, 1_000_000, needed + 2, selecting)
        assert needed * 1e-6 + selecting < saved < (needed + 2) * 1e-6 + selecting
