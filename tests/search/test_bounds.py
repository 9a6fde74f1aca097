"""The inequality that makes the search exact, pair by pair: no row scores below the least score of its own distance."""

import numpy as np
import pytest
import torch

from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines.bounds import DifferenceBounds, ProductBounds, rounded_up
from faiss_knn.search.engines.int8_bounds import Int8Bounds
from faiss_knn.search.engines.projection import leading_directions
from faiss_knn.search.stored_rows import StoredRows

BOUNDARY = 1 + 2.0**-8 - 2.0**-15  # bfloat16 rounds it down by nearly the most that it ever does


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_norms(queries, bank, metric):
    """Norms (B, N) of the differences, in numpy's long double."""
    queries, bank = (rows.double().numpy().astype(np.longdouble) for rows in (queries, bank))
    if metric == "cosine":
        queries, bank = (rows / np.sqrt((rows**2).sum(1, keepdims=True)) for rows in (queries, bank))
    return np.stack([np.sqrt(((bank - query) ** 2).sum(1)) for query in queries])


def excluded(bank, queries, metric="euclidean", dtype=torch.float32, directions=None, basis=None):
    """Tell which rows are excluded from their own distance, (B, N), by a score below the least one or by a NaN."""
    rows, distance = StoredRows(bank, storage_dtype=bank.dtype), get_distance(metric)
    rows.check(distance)
    if directions:
        sample = rows.as_compared(torch.arange(len(bank)), distance)
        basis = leading_directions(sample - sample.median(0).values, directions)[0].contiguous()
    whole = dtype == torch.int8
    bounds = Int8Bounds(rows, distance) if whole else ProductBounds(rows, distance, dtype, basis=basis)
    prepared = bounds.prepare(queries.to(rows.dtype))
    # In whole numbers the product is exact, which not every CPU's is (test_scan).
    whole_scores = prepared.vectors.double() @ bounds._block(0, len(bank)).double().T
    scores = whole_scores if whole else bounds.scores(prepared, 0, len(bank)).T.double()
    norms = torch.from_numpy(exact_norms(queries, bank, metric).astype(float))
    least = torch.stack([bounds.least_score(prepared, column) for column in norms.T], 1)
    return ~(scores >= least)


def check(bank, queries, **options):
    wrong = excluded(bank, queries, **options)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} pairs"


FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
METRICS = pytest.mark.parametrize("metric", ["euclidean", "cosine"])
DIRECTIONS = pytest.mark.parametrize("projected", [False, True])


def banks():
    low_rank = normal(400, 16) @ normal(16, 300, seed=1) + 0.02 * normal(400, 300, seed=2)
    return {
        "normal": (normal(500, 48), normal(30, 48, seed=1)),
        "positive and wide": (normal(200, 1500).abs(), normal(10, 1500, seed=1).abs()),
        "along one line": (3 * normal(300, 1) + 1e-3 * normal(300, 256, seed=1), 3 * normal(9, 1) * torch.ones(256)),
        "far from zero": (normal(500, 32) + 1e3, normal(30, 32, seed=1) + 1e3),
        "a few huge rows": (torch.cat([normal(500, 32), 1e6 * normal(3, 32)]), 1e5 * normal(9, 32, seed=1)),
        "of low rank": (low_rank, low_rank[:20] + 0.01 * normal(20, 300, seed=3)),
        "tiny": (1e-18 * normal(400, 48), 1e-18 * normal(20, 48, seed=1)),
        "large": (1e15 * normal(400, 48), 1e15 * normal(20, 48, seed=1)),
        "the queries are rows": (normal(300, 24), normal(300, 24)[:40]),
        "float16": (normal(300, 24).half(), normal(20, 24, seed=1).half()),
        "float64": (normal(300, 24).double() + 1e8, normal(20, 24, seed=1).double() + 1e8),
    }  # fmt: skip


@FLOATS
@METRICS
@DIRECTIONS
@pytest.mark.parametrize("name", banks())
def test_no_row_scores_below_the_least_score_of_its_distance(name, metric, dtype, projected):
    bank, queries = banks()[name]
    check(bank, queries, metric=metric, dtype=dtype, directions=max(1, bank.shape[1] // 3) if projected else None)


@METRICS
@pytest.mark.parametrize("name", banks())
def test_no_row_scores_below_in_whole_numbers(name, metric):
    bank, queries = banks()[name]
    check(bank, queries, metric=metric, dtype=torch.int8)


@METRICS
@pytest.mark.parametrize("dim", [2, 5, 16, 40, 120])
def test_rows_that_bfloat16_rounds_the_most(metric, dim):
    near = BOUNDARY * 8 * torch.ones(60, dim) * (1 + 1e-4 * normal(60, 1)) + 1e-4 * normal(60, dim, seed=1)
    bank = torch.cat([0.01 * normal(1200, dim, seed=2), near])
    check(bank, near[:20] + 1e-3 * normal(20, dim, seed=3), metric=metric, dtype=torch.bfloat16)
    check(-bank, -near[:20], metric=metric, dtype=torch.bfloat16)


@pytest.mark.parametrize("dim", [2, 5, 16, 40, 120])
def test_queries_that_bfloat16_rounds_the_most(dim):
    # The rows are numbers of bfloat16 and centred at zero: nothing but the queries is rounded.
    signs = normal(600, dim).sign()
    bank = torch.cat([signs, -signs, 8 * torch.ones(20, dim)])
    check(bank, BOUNDARY * torch.ones(4, dim) * 2.0 ** torch.arange(4)[:, None], dtype=torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("size", range(9, 18))
def test_sums_that_are_rounded_down_at_every_step(size, dtype):
    # All products are 1 + 0.49 · 2^-size: where a sum's last digit is 2^-size, each step loses the same 0.49 of it.
    ones = torch.ones(40, 6000)
    value = 1 + 0.49 * 2.0**-size if dtype == torch.float32 else 1.0
    queries = 1024 * value * torch.ones(2, 6000) * torch.tensor([[1.0], [-1.0]])
    check(torch.cat([ones, -ones, normal(20, 6000).sign() * value]), queries, dtype=dtype)


@pytest.mark.parametrize("size", range(9, 18))
def test_squares_that_are_rounded_up_at_every_step(size):
    # The query is the centre, so that of the score only |u|² is left, and one direction allows for few roundings.
    side = (1 + 0.51 * 2.0**-size) ** 0.5 * torch.ones(40, 6000)
    basis = torch.full((6000, 1), 6000**-0.5)
    check(torch.cat([side, -side]), torch.zeros(1, 6000), basis=basis)


def test_squares_of_rows_that_are_rounded_up_in_whole_numbers():
    # The query is the centre, which no row is: of the score only |u|² is left.
    blocks = torch.arange(100)
    for size, part in [(6, 0.51), (8, 0.51), (10, 0.49), (14, 0.51)]:
        rows = (1 + part * 2.0**-size) ** 0.5 * torch.ones(100, 6000)
        rows.view(100, 100, 60)[blocks, blocks] = 0.0
        check(torch.cat([rows, -rows]), torch.zeros(1, 6000), dtype=torch.int8)


def test_squares_of_what_is_rounded_off_that_are_rounded_down_in_whole_numbers():
    # Three rows are rounded to nothing, the query is not rounded, and along what was rounded off.
    axes = torch.arange(24)
    bank = torch.zeros(24, 20_000)
    bank[axes, axes] = (-1.0) ** axes
    for size in range(12, 15):
        bank[1:6:2] = 2.0**-8 * (1 + 0.49 * 2.0**-size) ** 0.5
        check(bank, torch.ones(1, 20_000), dtype=torch.int8)


def test_directions_that_float32_rounds_away_from_the_centre_in_whole_numbers():
    # Nearly all rows are the centre, which is also the query and, like the other rows, hardly rounded to whole numbers.
    for seed in range(3):
        bank = torch.ones(1000, 64)
        bank[::25] += 4e-3 * normal(40, 64, seed=seed).sign()
        check(bank * (1 + normal(1000, 1, seed=seed).abs()), torch.ones(1, 64), metric="cosine", dtype=torch.int8)


def test_a_row_whose_columns_cannot_hold_its_share_in_whole_numbers():
    # Columns are laid out by every fourth row: of those that are shorter, no T is so large as the centre's.
    bank = torch.eye(64).repeat(6, 1)
    bank[::2] *= -1
    bank[::4] *= 0.7
    bank[1] = 0.0
    check(bank, torch.zeros(1, 64), dtype=torch.int8)


@FLOATS
@pytest.mark.parametrize("stretch", [0.998, 1.002])
def test_directions_that_are_not_quite_of_length_one(dtype, stretch):
    bank = normal(300, 64)
    basis = torch.linalg.qr(normal(64, 64, seed=1)).Q * stretch
    check(bank, torch.cat([8 * bank[:20], -8 * bank[:20]]), dtype=dtype, basis=basis)


@DTYPES
def test_rows_far_from_the_centre_beside_it(dtype):
    # |u|² is large and must be subtracted to more digits than one bfloat16 has.
    scales = 2.0 ** torch.arange(-10, 20).repeat_interleave(20)[:, None]
    bank = torch.cat([normal(700, 16), scales * normal(600, 16, seed=1)])
    check(bank, bank[::7] * 1.001, dtype=dtype)


@DTYPES
def test_a_far_row_beside_one_that_is_nearly_as_far(dtype):
    # What scales the second to whole numbers must leave room for a score of the first that is below all others.
    bank = normal(1000, 64)
    bank[8:10] = 0.0
    bank[8:10, 0] = torch.tensor([2.0**42.9, 2.0**43.1])
    queries = torch.zeros(2, 64)
    queries[:, 0] = torch.tensor([2.0**40.9, 1.0])
    check(bank, queries, dtype=dtype)


def test_a_row_at_the_centre_of_queries_far_away():
    # Of the row nothing is rounded; float64 rounds the squares of such queries by more than all other margins.
    corners = torch.cat([torch.eye(8), -torch.eye(8)])
    bank = torch.cat([corners, torch.zeros(40, 8)])
    for seed in range(20):
        check(bank, 2.0**28 * normal(50, 8, seed=seed))


def test_unit_vectors_near_each_other():
    # Dividing by the length is off by 2^-24 of the whole vector, and what is compared is a small part of it.
    for seed in range(20):
        bank = torch.ones(300, 4) + 4e-3 * normal(300, 4, seed=seed)
        check(bank * (1 + normal(300, 1, seed=seed + 99).abs()), bank[:30] * 3, metric="cosine")


@DTYPES
def test_numbers_whose_products_are_too_small_for_float32(dtype):
    bank = 1e-310 * normal(200, 12).double()
    check(torch.cat([bank, 1e-300 * normal(3, 12).double()]), bank[:20] * 1.01, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e150, 1e200, 1e307])
def test_numbers_whose_squares_float64_cannot_hold(dtype, scale):
    # Beside far queries the centre itself, and others near it: their own squares are small.
    bank = scale * normal(400, 12).double()
    centre = bank.median(0).values[None]
    check(bank, torch.cat([centre, centre * (1 + 1e-12), 1.01 * bank[:20]]), dtype=dtype)


@FLOATS
def test_what_a_projection_leaves_out(dtype):
    # Half of the spread lies outside of the directions, and the query's lies along the row's.
    bank = torch.cat([normal(300, 8) * 3, torch.zeros(300, 40)], 1)
    bank[150:, 8:] = normal(150, 40, seed=1)
    check(bank, bank[150:200] * 1.1, dtype=dtype, directions=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_upper_bounds_are_rounded_up(dtype):
    values = torch.cat([normal(5000).abs().double(), torch.tensor([0.0, 1.0, BOUNDARY, 1e-60, 2.0**-126])]).double()
    rounded = rounded_up(values, dtype)
    assert rounded.dtype == dtype
    assert (rounded.double() >= values).all()
    below = (rounded.view(torch.int16 if dtype == torch.bfloat16 else torch.int32) - 1).view(dtype).double()
    assert (below < values)[values > 0].all()
    assert torch.equal(rounded_up(rounded.double(), dtype), rounded)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 2_200_000), (torch.float32, 4_300_000)])
def test_nothing_is_proven_where_sums_may_be_off_by_half(dtype, dim):
    rows = StoredRows(torch.ones(3, dim) * torch.tensor([[1.0], [2.0], [3.0]]))
    norms = torch.ones(3, dtype=torch.float64)
    for bounds in (ProductBounds(rows, get_distance("euclidean"), dtype), DifferenceBounds(rows)):
        assert (bounds.least_score(bounds.prepare(rows.data), norms) == -torch.inf).all()
