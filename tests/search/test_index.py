"""Exact means exact: KNNIndex against brute force, at any shape, scale, dtype and batch."""

import ast
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faiss_knn import KNNIndex
from faiss_knn.search.engines import matrix_product
from faiss_knn.search.engines.exact import ExactEngine
from faiss_knn.search.engines.faiss_library import faiss
from tests.reference import brute_force, distances

METRICS = ("euclidean", "squared_euclidean", "cosine", "manhattan")
NEAR_TIE = 1e-13  # relative; below it float64 itself cannot tell which is nearer


def assert_exact(index: KNNIndex, rows: torch.Tensor, queries: torch.Tensor, k: int) -> None:
    """Ids by (distance, index), apart from what differs by float64 rounding; distances to 1e-5 relative."""
    found = index.search(queries, k)
    stored, asked = rows.double().numpy(), queries.double().numpy()
    expected, ids = brute_force(asked, stored, k, index.distance_metric)
    assert found.indices.shape == found.distances.shape == expected.shape
    ours = found.indices.numpy()
    assert all(len(set(row)) == len(row) for row in ours.tolist())
    np.testing.assert_allclose(found.distances.numpy(), expected.astype(np.float64), rtol=1e-5, atol=1e-37)
    every = distances(asked, stored, index.distance_metric)
    chosen = np.take_along_axis(every, ours, 1)
    slack = NEAR_TIE * expected + (1e-15 if index.distance_metric == "cosine" else 0) * np.sqrt(expected)
    assert (np.abs(chosen - expected)[ours != ids] <= np.broadcast_to(slack, ours.shape)[ours != ids]).all()
    # Where rows are equal, no rounding excuses a wrong order.
    twins = (stored[ours[:, 1:]] == stored[ours[:, :-1]]).all(2)
    assert (ours[:, 1:] > ours[:, :-1])[twins].all()


def bank(seed: int, n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_distance_and_dtype(metric, dtype):
    rows, queries = bank(0, 700, 24).to(dtype), bank(1, 30, 24).to(dtype)
    storage = torch.float64 if dtype == torch.float64 else None
    assert_exact(KNNIndex(distance_metric=metric, storage_dtype=storage).build(rows), rows, queries, 10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e2, 1e4])
def test_common_offset(metric, offset):
    rows, queries = bank(0, 2000, 32) + offset, bank(1, 20, 32) + offset
    assert_exact(KNNIndex(distance_metric=metric).build(rows), rows, torch.cat([queries, rows[:5]]), 20)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4])
def test_collapse_around_one_direction(metric, spread):
    direction = torch.nn.functional.normalize(bank(2, 1, 48))
    rows, queries = direction + spread * bank(0, 2000, 48), direction + spread * bank(1, 20, 48)
    assert_exact(KNNIndex(distance_metric=metric).build(rows), rows, queries, 20)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-3, 1e6, 1e17])
def test_scale(metric, scale):
    rows, queries = scale * bank(0, 1500, 16), scale * bank(1, 20, 16)
    assert_exact(KNNIndex(distance_metric=metric).build(rows), rows, queries, 10)


@settings(max_examples=60, deadline=None)
@given(
    metric=st.sampled_from(METRICS),
    n=st.integers(1, 400),
    d=st.integers(1, 40),
    b=st.integers(1, 12),
    k=st.integers(1, 400),
    scale=st.sampled_from([1e-8, 1e-4, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e2, 1e4]),
    distinct=st.integers(1, 400),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_any_shape(metric, n, d, b, k, scale, offset, distinct, dtype, seed):
    if dtype == torch.float16:
        scale, offset = 1.0, min(offset, 1e2)
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(min(n, distinct), d, generator=generator) + offset) * scale
    rows = rows[torch.randint(len(rows), (n,), generator=generator)].to(dtype)
    queries = ((torch.randn(b, d, generator=generator) + offset) * scale).to(dtype)
    if metric == "cosine":  # a direction is needed
        rows[(rows == 0).all(1)], queries[(queries == 0).all(1)] = 1, 1
    index = KNNIndex(distance_metric=metric, storage_dtype=dtype).build(rows)
    assert_exact(index, rows, queries, min(k, n))


@settings(max_examples=15, deadline=None)
@given(
    values=st.integers(2, 9),
    d=st.integers(1, 6),
    n=st.integers(400, 3000),
    k=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_lattices_are_full_of_ties(values, d, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(values, (n, d), generator=generator).float()
    queries = torch.randint(values, (10, d), generator=generator).float()
    for metric in ("euclidean", "manhattan", "dot"):
        found = KNNIndex(distance_metric=metric).build(rows).search(queries, k)
        _, ids = brute_force(queries.numpy(), rows.numpy(), k, metric)
        np.testing.assert_array_equal(found.indices.numpy(), ids)  # integers: no rounding anywhere


def test_all_rows_equal():
    index = KNNIndex().build(torch.full((50_000, 16), 3.0))
    found = index.search(bank(0, 200, 16), 30)
    assert (found.indices == torch.arange(30)).all()
    assert index.stats.uncertified == 0


def test_half_the_bank_duplicated():
    rows = bank(0, 4000, 16)
    rows[2000:] = rows[7]
    queries = torch.cat([rows[7:8], bank(1, 20, 16), rows[7:8] + 1e-3])
    assert_exact(KNNIndex().build(rows), rows, queries, 25)
    assert_exact(KNNIndex(distance_metric="cosine").build(rows), rows, queries, 25)


def test_queries_without_copies_after_many_whose_neighbours_are_copies():
    groups, others = bank(0, 100, 24), bank(1, 2000, 24)
    others[:, 3] += 20
    rows = torch.cat([groups.repeat(12, 1), others])
    index = KNNIndex().build(rows)
    assert_exact(index, rows, groups.repeat(3, 1) + 1e-3 * bank(2, 300, 24), 10)
    assert_exact(index, rows, torch.cat([groups[:5], others[:20] + 0.1]), 10)
    assert_exact(index, rows, others[:20] + 0.1, 10)


def test_near_duplicates_take_the_second_pass_and_are_counted():
    rows = bank(0, 3000, 32)
    rows[2200:] = rows[0] + 1e-6 * bank(1, 800, 32)
    index = KNNIndex().build(rows)
    assert_exact(index, rows, rows[:3], 10)
    assert index.stats.uncertified >= 1
    assert index.stats.exact


def test_one_huge_row_does_not_decertify_the_others():
    rows = bank(0, 3000, 32)
    rows[5] = 1e15
    index = KNNIndex().build(rows)
    assert_exact(index, rows, bank(1, 50, 32), 10)
    assert index.stats.uncertified == 0
    assert_exact(index, rows, rows[5:6], 10)  # far from all others: nothing certifies it, and it is right
    assert_exact(index, rows, bank(1, 2, 32), 3000)


def test_queries_far_from_a_collapsed_bank():
    rows = 1.0 + 1e-5 * bank(0, 3000, 16)
    assert_exact(KNNIndex().build(rows), rows, 100 * bank(1, 20, 16), 10)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_at_any_batch_chunk_position_and_thread_count(metric):
    rows, queries = bank(0, 3000, 96), bank(1, 1024, 96)
    index = KNNIndex(distance_metric=metric).build(rows)
    whole = index.search(queries, 20)
    for size in (1, 7, 256):
        parts = [index.search(part, 20) for part in queries[:512].split(size)]
        assert torch.equal(torch.cat([part.distances for part in parts]), whole.distances[:512])
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices[:512])
    chunked = KNNIndex(distance_metric=metric, chunk_size=100).build(rows).search(queries.flip(0), 20)
    assert torch.equal(chunked.distances.flip(0), whole.distances)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = KNNIndex(distance_metric=metric).build(rows).search(queries, 20)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.distances, whole.distances)
    assert torch.equal(alone.indices, whole.indices)


def test_float16_storage_halves_the_rows_and_measures_what_is_stored():
    rows, queries = bank(0, 2000, 64), bank(1, 10, 64)
    index = KNNIndex(storage_dtype=torch.float16).build(rows)
    assert_exact(index, rows.half(), queries, 5)


def test_float64_rows_are_stored_as_float32_where_that_holds_them():
    near = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)
    kept = KNNIndex().build(near)
    assert kept.search(near[1:], 1).indices.item() == 1
    assert kept.stats.storage_dtype == "float64"
    assert KNNIndex(storage_dtype=torch.float32).build(near).search(near[1:], 1).indices.item() == 0
    ordinary = bank(0, 500, 8).double() + 1e-9 * bank(1, 500, 8).double()
    assert KNNIndex().build(ordinary).stats.storage_dtype == "float32"
    assert KNNIndex().build(ordinary + 1e8).stats.storage_dtype == "float64"
    assert KNNIndex().build(1e200 * ordinary).stats.storage_dtype == "float64"


def clustered(scale, dim=32):
    centres = bank(2, 50, dim).double()[torch.arange(3000) % 50]
    return centres + scale * bank(3, 3000, dim).double()


def ulp_apart(dim=512):
    rows = bank(0, 2000, dim).double()
    rows[1000] = rows[7]
    rows[1000, 3] *= 1 + 2.0**-50
    return rows


@pytest.mark.parametrize(
    ("rows", "distance"),
    [
        (clustered(1e-5), "euclidean"),
        (clustered(1e-7), "manhattan"),
        (clustered(1e-7) * (1 + 9 * torch.rand(3000, 1, generator=torch.Generator().manual_seed(0))), "cosine"),
        (ulp_apart(), "euclidean"),
        (torch.tensor([[2.0**40], [2.0**40 + 2], [1.0], [2.0]], dtype=torch.float64), "euclidean"),
    ],
    ids=["tight clusters", "tighter ones", "tight directions", "one bit apart", "large whole numbers"],
)
def test_float64_rows_that_float32_would_merge_or_reorder(rows, distance):
    index = KNNIndex(distance_metric=distance).build(rows)
    assert index.stats.storage_dtype == "float64"
    asked = rows[-40:] if len(rows) != 2000 else rows[995:1005]
    _, expected = brute_force(asked.numpy(), rows.numpy(), 4, distance)
    assert torch.equal(index.search(asked, 4).indices, torch.from_numpy(expected))


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "manhattan"])
def test_ordinary_float64_rows_are_stored_as_float32(distance):
    normal = bank(0, 2000, 16).double() + 1e-9 * bank(1, 2000, 16).double()
    equal = torch.cat([normal, normal[:500]])
    for rows in (normal, normal.abs(), normal + 3, 1e-6 * normal, 1e6 * normal, equal, bank(0, 900, 4).double()):
        assert KNNIndex(distance_metric=distance).build(rows).stats.storage_dtype == "float32"


@pytest.mark.parametrize("offset", [1e5, 1e8, 1e12])
@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_float64_rows_far_from_zero_have_float64s_neighbours(distance, offset):
    rows, queries = (bank(seed, n, 16).double() + offset for seed, n in ((0, 3000), (1, 40)))
    found = KNNIndex(distance_metric=distance).build(rows).search(queries, 10)
    _, expected = brute_force(queries.numpy(), rows.numpy(), 10, distance)
    assert torch.equal(found.indices, torch.from_numpy(expected))


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e160, 1e200, 1e307])
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
@pytest.mark.parametrize(("count", "dim"), [(60, 16), (1000, 16), (2500, 600)])  # wide ones may be projected
def test_float64_rows_whose_squares_float64_cannot_hold(scale, distance, count, dim):
    scale = min(scale, 1e308 / dim)  # the distances themselves it can hold
    rows, queries = bank(0, count, dim).double() * scale, bank(1, 40, dim).double() * scale
    queries[0] = rows.median(0).values  # its own square is small, those of its distances are not
    _, expected = brute_force((queries / scale).numpy(), (rows / scale).numpy(), 10)
    index = KNNIndex(distance_metric=distance).build(rows)
    found = index.search(queries, 10)
    assert torch.equal(found.indices, torch.from_numpy(expected))
    assert found.distances.isfinite().all()
    assert index._nearest(queries, 10).squared().distances.isfinite().all()


def test_differences_beyond_float64():
    rows = torch.tensor([[1.7e308, 1.0], [-1.7e308, 1.0], [1.6e308, 1.0]], dtype=torch.float64)
    found = KNNIndex().build(rows).search(rows, 3)
    assert found.indices.tolist() == [[0, 2, 1], [1, 0, 2], [2, 0, 1]]  # beyond float64 by index
    assert found.distances.isfinite().all()


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "manhattan", "cosine"])
@pytest.mark.parametrize("scale", [1e10, 4e7, 1e15, 1e37])
def test_one_huge_row_or_all_of_them(distance, scale):
    rows = bank(0, 1000, 512)
    for large in (torch.cat([rows[:1] * scale, rows[1:]]), rows * scale):
        found = KNNIndex(distance_metric=distance).build(large).search(large[:5], 2)
        assert found.indices[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert found.distances.isfinite().all()  # beyond float32: its largest number; inf is for what was not found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("fast_bfloat16", [True, False])
def test_rows_that_are_multiples_of_each_other_are_ordered_by_index(monkeypatch, dtype, fast_bfloat16):
    monkeypatch.setattr(matrix_product, "has_fast_bfloat16", lambda device: fast_bfloat16)
    generator = np.random.default_rng(0)
    directions = generator.integers(-8, 9, (40, 12))
    which = generator.integers(0, 40, 1200)
    rows = torch.from_numpy(directions[which] * generator.integers(1, 200, (1200, 1))).to(dtype)  # as exact numbers
    queries = torch.cat([bank(1, 20, 12).to(dtype), rows[:20] * 3])
    every = distances(queries.double().numpy(), directions, "cosine")[:, which]
    expected = np.argsort(every.astype(float), axis=1, kind="stable")[:, :70]
    found = KNNIndex(distance_metric="cosine").build(rows).search(queries, 70)
    assert torch.equal(found.indices, torch.from_numpy(expected))


def watched(index, done):
    """Count how often the stats could be read until others are done."""
    count = 0
    while not done.wait(1e-3):
        assert index.stats.exact
        count += 1
    return count


def test_several_threads_search_one_index(monkeypatch):
    """Bounds are tightened while others search: rows near each other beside a projection that leaves them out."""
    centres = bank(0, 30, 600)
    rows = torch.cat([centres.repeat(50, 1) + 1e-2 * bank(1, 1500, 600), bank(2, 1500, 10) @ bank(3, 10, 600)])
    asked = [rows[start : start + 32] + 1e-2 * bank(start, 32, 600) for start in range(0, 1600, 200)]
    expected = [torch.from_numpy(brute_force(some.double().numpy(), rows.double().numpy(), 10)[1]) for some in asked]
    for dtype in (True, False):
        monkeypatch.setattr(matrix_product, "has_fast_bfloat16", lambda device, dtype=dtype: dtype)
        for _ in range(2):
            index = KNNIndex().build(rows)
            done = threading.Event()
            with ThreadPoolExecutor(7) as pool:
                watch = pool.submit(watched, index, done)
                found = list(pool.map(index.search, asked * 6, repeat(10)))
                done.set()
                assert watch.result() > 0
            assert all(torch.equal(one.indices, expected[i % len(asked)]) for i, one in enumerate(found))


def test_settings_that_threads_hold_at_once_are_put_back():
    before = torch.get_float32_matmul_precision()
    rows = bank(0, 3000, 64)
    index = KNNIndex("IVF8,Flat").build(rows)
    threshold = faiss().cvar.distance_compute_blas_threshold
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: index.search(rows[i : i + 20], 5), range(200)))
    assert torch.get_float32_matmul_precision() == before
    assert faiss().cvar.distance_compute_blas_threshold == threshold


@pytest.mark.parametrize("spec", ["flat", "fast", "IVF8,Flat", "HNSW8"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_an_index_can_be_pickled(spec, distance):
    index = KNNIndex(spec, distance_metric=distance)
    assert pickle.loads(pickle.dumps(index)).spec == spec
    index.build(bank(0, 5000, 16))
    again = pickle.loads(pickle.dumps(index))
    queries = bank(1, 7, 16)
    assert all(map(torch.equal, again.search(queries, 5), index.search(queries, 5)))
    assert copy.deepcopy(index).stats.spec == index.stats.spec


def test_low_precision_settings_of_a_training_run_do_not_reach_the_search():
    rows, queries = bank(0, 2000, 64), bank(1, 10, 64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            assert_exact(KNNIndex().build(rows.clone()), rows, queries.clone(), 10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_features_with_gradient_and_stride():
    rows = bank(0, 500, 64).requires_grad_()[:, ::2]
    queries = bank(1, 32, 10).T.requires_grad_()
    assert_exact(KNNIndex().build(rows), rows.detach(), queries.detach(), 5)


@pytest.mark.parametrize("metric", METRICS)
def test_memmap(tmp_path, metric):
    rows = bank(0, 3000, 16).numpy()
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    index = KNNIndex(distance_metric=metric).build(mapped)
    assert_exact(index, torch.from_numpy(rows), bank(1, 10, 16), 10)


def test_a_float32_bank_is_referred_to():
    rows = bank(0, 100, 8)
    query = rows[:1].clone()
    index = KNNIndex().build(rows)
    rows[0] += torch.eye(8)[0] / 8
    assert index.search(query, 1).distances.item() == pytest.approx(1 / 8)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spec", ["Flat", "HNSW16", "IVF8,Flat", "PQ8x4fs,RFlat", "SQ8"])
def test_factory_strings_measure_what_they_find(metric, spec):
    rows, queries = bank(0, 1000, 32) + 100, bank(1, 20, 32) + 100
    if metric == "manhattan" and spec in ("PQ8x4fs,RFlat", "SQ8"):  # FAISS has no such index for L1
        with pytest.raises(ValueError, match="manhattan"):
            KNNIndex(spec, distance_metric=metric).build(rows)
        return
    index = KNNIndex(spec, distance_metric=metric).build(rows)
    found = index.search(queries, 10)
    every = distances(queries.double().numpy(), rows.double().numpy(), metric)
    there = found.indices.numpy() >= 0
    chosen = np.take_along_axis(every, found.indices.clamp(min=0).numpy(), 1)
    np.testing.assert_allclose(found.distances.numpy()[there], chosen[there].astype(float), rtol=1e-5)
    assert (found.distances.diff(dim=1) >= 0).all()
    assert not index.stats.exact or spec == "Flat"
    assert index.stats.backend == "faiss"
    _, ids = brute_force(queries.numpy(), rows.numpy(), 10, metric)
    found_share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.indices.tolist(), ids, strict=True)])
    assert found_share >= {"Flat": 1.0, "HNSW16": 0.8, "SQ8": 0.9}.get(spec, 0.1)


def test_what_ivf_does_not_find_is_minus_one_at_infinity_and_last():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    rows = torch.cat([centres[0] + bank(0, 100, 2), centres[1] + bank(1, 3, 2)])
    found = KNNIndex("IVF2,Flat", nprobe=1).build(rows).search(centres[1:], 10)
    assert (found.indices[0, 3:] == -1).all()
    assert found.distances[0, 3:].isinf().all()
    assert sorted(found.indices[0, :3].tolist()) == [100, 101, 102]


def test_shapes_of_answers():
    index = KNNIndex().build(bank(0, 10, 4))
    assert index.search(torch.empty(0, 4), 3).indices.shape == (0, 3)
    assert index.search(bank(1, 2, 4), 50).distances.shape == (2, 10)
    distances_, indices = index.search(bank(1, 2, 4).numpy(), 3)
    assert distances_.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert (len(index), index.dim, index.distance_metric) == (10, 4, "euclidean")


def test_a_second_build_replaces_the_bank():
    index = KNNIndex().build(bank(0, 10, 4)).build(bank(1, 600, 7))
    assert (len(index), index.dim) == (600, 7)
    assert_exact(index, bank(1, 600, 7), bank(2, 5, 7), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": ""}, "spec"),
        ({"spec": "nonsense"}, "FAISS factory string"),
        ({"distance_metric": "l7"}, "distance_metric"),
        ({"nprobe": 0}, "nprobe"),
        ({"spec": "Flat", "nprobe": 2}, "inverted lists"),
        ({"spec": "IVF4,Flat", "nprobe": 5}, r"\[1, nlist=4\]"),
        ({"spec": "IVF4000,Flat"}, "enough rows"),
        ({"target_recall": 1.5}, "target_recall"),
        ({"storage_dtype": torch.int8}, "storage_dtype"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_unfit_options(options, message):
    with pytest.raises(ValueError, match=message):
        KNNIndex(**options).build(bank(0, 100, 8))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.empty(0, 4), "empty bank"),
        (torch.ones(4), "shape"),
        (torch.ones(4, 0), "shape"),
        (torch.ones(4, 2, dtype=torch.int64), "float32"),
        (np.ones((4, 2), dtype=np.int32), "float32"),
        ([[1.0]], "tensor or ndarray"),
        (torch.tensor([[1.0], [float("nan")], [float("inf")]]), "rows? .*1, 2"),
    ],
)
def test_unfit_features(features, message):
    with pytest.raises(ValueError, match=message):
        KNNIndex().build(features)


def test_unfit_searches():
    index = KNNIndex(distance_metric="cosine").build(bank(0, 10, 4))
    for k in (0, -1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="`k`"):
            index.search(bank(1, 2, 4), k)
    with pytest.raises(ValueError, match="d=4"):
        index.search(bank(1, 2, 5), 1)
    with pytest.raises(ValueError, match="row 1"):
        index.search(torch.tensor([[1.0] * 4, [float("nan")] * 4]), 1)
    with pytest.raises(ValueError, match="zero"):
        index.search(torch.zeros(1, 4), 1)
    with pytest.raises(ValueError, match="row 3"):
        KNNIndex(distance_metric="cosine").build(torch.ones(5, 2) * torch.tensor([1, 1, 1, 0, 1])[:, None])
    with pytest.raises(RuntimeError, match="build"):
        KNNIndex().search(bank(1, 2, 4), 1)


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1.0, 1e6, 1e17])
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
def test_the_distances_of_fast_are_good_to_1e_5_at_any_scale(scale: float, distance: str) -> None:
    rows = (torch.randn(5000, 96, generator=torch.Generator().manual_seed(0)) * scale).float()
    rows[1000:2000] = rows[:1000] * (1 + 1e-5)  # and some that are very near each other
    found = KNNIndex("fast", distance_metric=distance).build(rows).search(rows[:50], 5)
    every = distances(rows[:50].double().numpy(), rows.double().numpy(), distance)
    expected = np.take_along_axis(every, found.indices.numpy(), 1).astype(np.float64)
    torch.testing.assert_close(found.distances.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-37)


def test_no_check_of_the_search_goes_away_under_python_o():
    for path in (Path(__file__).parents[2] / "faiss_knn" / "search").rglob("*.py"):
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not asserts, path


def test_bounds_that_memory_ran_out_for_are_made_by_the_next_search(monkeypatch):
    bank, queries = torch.randn(3000, 24), torch.randn(8, 24)
    index = KNNIndex().build(bank)
    engine, made = index._engine, ExactEngine._made

    def no_memory(self):
        raise MemoryError

    monkeypatch.setattr(ExactEngine, "_made", no_memory)
    engine._dtype = torch.bfloat16  # not the last that there is
    with pytest.raises(MemoryError):
        engine._tighten()
    monkeypatch.setattr(ExactEngine, "_made", made)
    _, expected = brute_force(queries.numpy(), bank.numpy(), 5)
    assert (index.search(queries, 5).indices.numpy() == expected).all()
