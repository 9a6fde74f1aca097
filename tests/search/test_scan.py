"""The best scores of a scan, against a sort of all of them."""

import subprocess
import sys

import pytest
import torch

from faiss_knn.search.engines import matrix_product
from faiss_knn.search.engines.bounds import PreparedQueries
from faiss_knn.search.engines.scan import best_scores
from faiss_knn.search.engines.selection import highest


class Given:
    """Scores (N, B) that are there already."""

    def __init__(self, scores):
        self.all_scores = scores
        self.score_dtype = scores.dtype

    def scores(self, asked, start, stop, out=None):
        return self.all_scores[start:stop]


def asked(scores):
    return PreparedQueries(torch.empty(scores.shape[1], 4, dtype=scores.dtype), torch.empty(scores.shape[1]))


def orders(rows, queries):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, queries, generator=generator)
    yield "as drawn", drawn
    yield "each better than all before", drawn.sort(0).values
    yield "each worse than all before", drawn.sort(0, descending=True).values
    yield "all positive", drawn.abs() + 1
    yield "all negative", -drawn.abs() - 1
    yield "of few values", drawn.round()
    yield "all equal", torch.zeros_like(drawn)
    best_of_one = drawn.clone()
    best_of_one[-rows // 3 :, 0] += 100
    yield "late rows all near to one query", best_of_one
    yield "few above the rest", torch.where(drawn < 1, -torch.inf, drawn)


def written(scores, dtype):
    """Scores as a scan in this dtype would give them."""
    if dtype == torch.int32:
        return (scores * 1e4).clamp(min=torch.iinfo(dtype).min).to(dtype)
    return scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize(
    ("rows", "queries", "kept"), [(70_001, 3, 25), (20_000, 13, 1), (9_000, 1, 300), (700, 5, 700)]
)
def test_the_best_of_any_order_of_rows_are_found(dtype, rows, queries, kept):
    for name, scores in orders(rows, queries):
        scores = written(scores, dtype)
        found, ids = best_scores(Given(scores), asked(scores), rows, kept)
        expected = scores.T.double().topk(kept).values
        assert torch.equal(found.double().sort(dim=1, descending=True).values, expected), name
        assert torch.equal(scores.T.gather(1, ids), found), name
        assert all(len(set(row)) == kept for row in ids.tolist()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize(
    ("queries", "width", "kept"),
    [
        *[(5, 400, 30), (3, 513, 256), (4, 1300, 200), (2, 5000, 3), (3, 70_000, 9), (7, 20, 20)],
        *[(3, 1, 1), (3, 511, 1), (3, 512, 512), (3, 512, 1), (3, 513, 1), (3, 1 << 16, 1), (3, (1 << 16) + 1, 1)],
    ],
)
def test_the_highest_of_each_row_of_scores(dtype, queries, width, kept):
    for name, drawn in orders(width, queries):
        scores = written(drawn.T.contiguous(), dtype)
        found, places = highest(scores, kept)
        assert torch.equal(found.double().sort(dim=1, descending=True).values, scores.double().topk(kept).values), name
        assert torch.equal(scores.gather(1, places), found), name
        assert all(len(set(row)) == kept for row in places.tolist()), name


@pytest.mark.parametrize("numpy_is_faster", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_either_library_multiplies(monkeypatch, numpy_is_faster, dtype):
    monkeypatch.setattr(matrix_product, "prefers_numpy", lambda: numpy_is_faster)
    rows, queries = torch.randn(100, 24).to(dtype), torch.randn(7, 24).to(dtype)
    product = matrix_product.multiply(rows, queries, torch.empty(100, 7, dtype=dtype))
    expected = rows.double() @ queries.double().T
    torch.testing.assert_close(product.double(), expected, rtol=2.0**-7, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_numpy_is_left_out_where_pytorch_may_use_fewer_threads():
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from faiss_knn.search.engines import matrix_product\n"
        "def never(): raise SystemExit('asked')\n"
        "matrix_product.prefers_numpy = never\n"
        "matrix_product.multiply(torch.ones(3, 2), torch.ones(2, 2), torch.empty(3, 2))\n"
        "print(torch.get_num_threads())"
    )
    environment = {"OPENBLAS_NUM_THREADS": "2", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
