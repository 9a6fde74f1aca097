"""The exactness rules with the scan in either dtype, whichever this machine would choose."""

import pytest
import torch

from faiss_knn import KNNIndex
from tests.search.test_index import assert_exact, bank


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def scanned_in(request, monkeypatch):
    monkeypatch.setattr(
        "faiss_knn.search.engines.matrix_product.has_fast_bfloat16", lambda device: request.param == torch.bfloat16
    )
    monkeypatch.setattr("faiss_knn.search.engines.int8_bounds.has_fast_int8", lambda device: False)
    return str(request.param).removeprefix("torch.")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1e4, 1.0), (0.0, 1e-8), (0.0, 1e6), (1.0, 1e-4)], ids=str)
def test_offsets_scales_and_collapse(scanned_in, metric, offset, spread):
    rows, queries = offset + spread * bank(0, 2000, 48), offset + spread * bank(1, 20, 48)
    index = KNNIndex(distance_metric=metric).build(rows)
    assert index.stats.parameters["scan_dtype"] == scanned_in
    assert_exact(index, rows, torch.cat([queries, rows[:5]]), 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_with_many_duplicates(scanned_in, dtype):
    rows = bank(0, 3000, 32).to(dtype)
    rows[1500:] = rows[7]
    assert_exact(KNNIndex().build(rows), rows, torch.cat([rows[7:8], bank(1, 20, 32).to(dtype)]), 25)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rows_that_the_copy_has_no_room_for(scanned_in, metric, monkeypatch):
    monkeypatch.setattr("faiss_knn.search.engines.exact._LEEWAY", 0)  # beside half rows the columns of bounds have none
    rows, queries = bank(0, 30_000, 24).half(), bank(1, 20, 24).half()
    index = KNNIndex(distance_metric=metric).build(rows)
    assert rows.nbytes < index.stats.bytes <= 2 * rows.nbytes
    assert_exact(index, rows, queries, 20)


def test_the_same_bits_in_any_batch(scanned_in):
    index, queries = KNNIndex().build(bank(0, 5000, 64)), bank(1, 300, 64)
    whole = index.search(queries, 20)
    for size in (1, 7, 256):
        parts = [index.search(part, 20) for part in queries.split(size)]
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
        assert torch.equal(torch.cat([part.distances for part in parts]), whole.distances)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "manhattan"])
def test_queries_after_it_learned_how_many_candidates_suffice(scanned_in, metric):
    rows, queries = bank(0, 5000, 64), bank(1, 300, 64)
    index = KNNIndex(distance_metric=metric).build(rows)
    index.search(queries, 50)
    assert_exact(index, rows, queries[:40], 50)


def test_fast_meets_its_recall(scanned_in):
    rows = bank(0, 8000, 64)
    index = KNNIndex("fast").build(rows)
    exact = KNNIndex().build(rows).search(bank(1, 200, 64), 20).indices
    found = index.search(bank(1, 200, 64), 20).indices
    assert (found[:, :, None] == exact[:, None]).any(1).float().mean() >= 0.98
    assert index.stats.parameters["scan_dtype"] == scanned_in
