"""index="auto": exact unless a build of "fast" pays for itself, and the stats say which it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import KNNIndex, OnlineKNN
from faiss_knn.search.engines import choice, costs
from faiss_knn.search.engines.choice import prefers_fast
from faiss_knn.search.engines.fast import FastEngine
from faiss_knn.search.engines.matrix_product import has_fast_bfloat16
from tests.online.parts import Echo, clusters, loader, trainer
from tests.reference import brute_force

LEAST_FAST = 4096
MANY = 10**9  # queries: whatever a build costs is nothing against them
DTYPE = torch.bfloat16 if has_fast_bfloat16(torch.device("cpu")) else torch.float32


def bank(n: int, d: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def decisions(monkeypatch):
    """What the cost model is asked; "fast" is always its answer."""
    asked = []

    def always(rows, dim, queries, k, dtype, *, warm, forecast):
        asked.append({"rows": rows, "dim": dim, "queries": queries, "k": k, "dtype": dtype, "warm": warm})
        return True

    monkeypatch.setattr(choice, "prefers_fast", always)
    return asked


def test_a_bank_where_exact_is_as_fast_is_searched_exactly(decisions):
    index = KNNIndex("auto").build(bank(LEAST_FAST - 1), expected_queries=MANY)
    assert (index.stats.spec, index.stats.exact, index.stats.recall) == ("flat", True, 1.0)
    assert KNNIndex("auto").build(bank(LEAST_FAST), expected_queries=MANY).stats.spec == "fast"


@pytest.mark.parametrize("spec", ["auto", "fast"])
def test_manhattan_and_memmaps_are_searched_exactly(decisions, tmp_path, spec):
    rows = bank(LEAST_FAST + 1)
    manhattan = KNNIndex(spec, distance_metric="manhattan").build(rows, expected_queries=MANY)
    assert (manhattan.stats.spec, manhattan.stats.exact) == ("flat", True)
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = KNNIndex(spec).build(np.load(tmp_path / "rows.npy", mmap_mode="r"), expected_queries=MANY)
    assert (mapped.stats.spec, mapped.stats.exact) == ("flat", True)


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
def test_the_cost_model_decides_and_the_stats_say_what_is_used(monkeypatch, answer, distance):
    monkeypatch.setattr(choice, "prefers_fast", lambda *sizes, **more: answer)
    rows = bank(5000)
    index = KNNIndex("auto", distance_metric=distance).build(rows)
    plain = KNNIndex("fast" if answer else "flat", distance_metric=distance).build(rows)
    assert index.spec == "auto"
    assert index.stats.spec == plain.stats.spec == plain.spec
    assert index.stats.exact is not answer
    assert (index.stats.recall, index.stats.parameters) == (plain.stats.recall, plain.stats.parameters)
    ours, theirs = index.search(bank(20, seed=1), 10), plain.search(bank(20, seed=1), 10)
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.distances, theirs.distances)


def test_the_cost_model_is_asked_about_what_will_be_searched(decisions):
    index = KNNIndex("auto").build(bank(5000), expected_k=7, expected_queries=123)
    index.build(bank(6000, d=16, seed=1))
    first = {"rows": 5000, "dim": 16, "queries": 123, "k": 7, "dtype": DTYPE, "warm": False}
    assert decisions == [first, first | {"rows": 6000, "queries": 6000, "k": 20, "warm": True}]


@pytest.mark.parametrize("spec", ["flat", "ivf", "Flat"])
def test_other_specs_are_taken_at_their_word(decisions, spec):
    assert KNNIndex(spec).build(bank(LEAST_FAST), expected_queries=MANY).stats.backend == (
        "torch" if spec == "flat" else "faiss"
    )
    assert decisions == []


SIZES = {
    "rows": st.integers(LEAST_FAST, 10**7),
    "dim": st.integers(1, 4096),
    "k": st.integers(1, 1000),
    "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
}


@given(**SIZES, queries=st.integers(0, 256), warm=st.booleans())
def test_few_queries_never_pay_for_a_tuning(rows, dim, k, dtype, queries, warm):
    # A first tuning scans hundreds of rows of the bank, a check of an earlier one scores of them.
    assert not prefers_fast(rows, dim, queries if not warm else queries // 8, k, dtype, warm=warm)


@given(**SIZES, queries=st.integers(0, 10**8), more=st.integers(0, 10**8), warm=st.booleans())
def test_more_queries_and_a_warm_index_speak_for_fast(rows, dim, k, dtype, queries, more, warm):
    if prefers_fast(rows, dim, queries, k, dtype, warm=warm):
        assert prefers_fast(rows, dim, queries + more, k, dtype, warm=warm)
        assert prefers_fast(rows, dim, queries, k, dtype, warm=True)


@pytest.mark.parametrize("queries", [0, 1, 256])
def test_a_large_bank_is_searched_exactly_for_few_queries(queries):
    assert KNNIndex("auto").build(bank(50_000, 128), expected_queries=queries).stats.exact


def test_fast_that_was_tuned_anew_is_not_warm():
    index = KNNIndex("fast").build(bank(5000, 64), expected_k=5)
    assert index.build(bank(5000, 64), expected_k=5).stats.parameters["warm"]
    index.search(bank(3, 64), k=50)
    parameters = index.stats.parameters
    assert (parameters["warm"], parameters["tuned_k"]) == (False, 50)


def test_fast_for_as_many_neighbours_as_there_are_rows_may_be_warm(monkeypatch):
    monkeypatch.setattr(choice, "_FAST_ROWS", 300)
    index = KNNIndex("fast")
    warm = [index.build(bank(300, 16), expected_k=400).stats.parameters["warm"] for _ in range(2)]
    assert warm == [False, True]


@pytest.mark.parametrize("had", [torch.bfloat16, torch.float32])
def test_directions_are_scanned_in_what_is_fast_on_the_machine_that_builds(monkeypatch, had):
    monkeypatch.setattr("faiss_knn.search.engines.int8_bounds.has_fast_int8", lambda device: False)
    index = KNNIndex("fast").build(decayed(5000))
    assert index.stats.parameters["scan_dims"] < 256
    engine = index._engine
    engine.tuned = engine.tuned._replace(dtype=had)  # as on another machine, or a GPU whose memory did not suffice
    parameters = index.build(decayed(5000)).stats.parameters
    assert parameters["warm"]
    assert parameters["scan_dtype"] == str(DTYPE).removeprefix("torch.")


def test_its_size_is_that_of_what_is_scanned_after_another_tuning_too(monkeypatch):
    index = KNNIndex("fast").build(decayed(5000), expected_k=1)
    dims = index.stats.parameters["scan_dims"]
    monkeypatch.setattr(FastEngine, "_projections", lambda self, k, may_pay: iter(()))
    index.search(bank(3, 256), 50)
    stats = index.stats
    assert stats.parameters["scan_dims"] == 256 > dims
    scanned = getattr(torch, stats.parameters["scan_dtype"])
    assert stats.bytes >= (4 + scanned.itemsize) * 5000 * 256


def decayed(n, d=256, seed=0, power=-1.0):
    return bank(n, d, seed=seed) * torch.arange(1, d + 1) ** power


def test_the_spectrum_decides_and_is_looked_at_only_where_it_may_pay(monkeypatch):
    def seconds(dtype):
        return 1e-12 if dtype == torch.int8 else 1e-11  # 200 GFLOP/s a thread

    for module in (choice, costs):
        monkeypatch.setattr(module, "multiply_add_seconds", seconds)
    monkeypatch.setattr("faiss_knn.search.engines.int8_bounds.has_fast_int8", lambda device: False)
    index = KNNIndex("auto")
    assert index.build(bank(20_000, 256), expected_queries=10**6).stats.spec == "flat"
    assert index.build(decayed(20_000), expected_queries=500).stats.spec == "flat"
    assert index.build(decayed(20_000), expected_queries=10**6).stats.spec == "fast"

    def never():
        raise AssertionError("asked")

    def prefers(queries, flat, fast):
        return prefers_fast(20_000, 256, queries, 20, DTYPE, warm=False, forecast=choice.Forecast(flat, fast))

    assert not prefers(500, never, never)
    assert not prefers(8_000, never, never)  # would take long beside them
    whole, half = choice.Scan(256, DTYPE, 29), choice.Scan(128, DTYPE, 20)
    assert not prefers(10**9, lambda: whole, lambda: whole._replace(candidates=20))
    assert prefers(10**9, lambda: whole, lambda: half)
    assert not prefers(10**9, lambda: whole._replace(dims=32), lambda: half)
    assert not prefers(10**9, lambda: whole._replace(dims=8), never)
    assert not prefers(10**9, lambda: whole._replace(dtype=torch.int8), lambda: half)
    assert prefers(10**9, lambda: whole, lambda: half._replace(dims=256, dtype=torch.int8))


def test_a_large_bank_is_projected_to_what_was_best_for_a_sample_of_it_or_not_at_all(monkeypatch):
    monkeypatch.setattr("faiss_knn.search.engines.fast._LEAST_FORETOLD", 0)
    monkeypatch.setattr("faiss_knn.search.engines.int8_bounds.has_fast_int8", lambda device: False)
    projected, make = [], FastEngine._made

    def made(self, dtype, basis=None):
        if basis is not None:
            projected.append((len(self._rows), basis.shape[1]))
        return make(self, dtype, basis)

    monkeypatch.setattr(FastEngine, "_made", made)
    noise = KNNIndex("fast").build(bank(20_000, 256)).stats
    assert noise.parameters["scan_dims"] == 256
    assert noise.recall >= 0.99
    assert projected == []  # it spreads evenly
    assert KNNIndex("fast").build(decayed(20_000, power=-0.3)).stats.parameters["scan_dims"] == 256
    assert {rows for rows, _ in projected} == {4096}  # the sample alone
    projected.clear()
    rows, queries = decayed(20_000), decayed(50, seed=1)
    index = KNNIndex("fast").build(rows)
    dims = index.stats.parameters["scan_dims"]
    assert dims < 128
    assert [width >= dims for count, width in projected if count == 20_000] == [True]  # once
    _, expected = brute_force(queries.numpy(), rows.numpy(), 20)
    found = index.search(queries, 20).indices.numpy()
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found, expected, strict=True)]) >= 0.98


class Endless(IterableDataset):
    """Batches without a known number."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def scored(train, *loaders, **options):
    metrics = {"acc": MulticlassAccuracy(4, average="micro")}
    callback = OnlineKNN("knn", "embedding", "label", len(train["x"]), metrics, k=(3, 8), index="auto")
    run = trainer(callback, num_sanity_val_steps=0, **options)
    run.fit(Echo(), loader(512, **train), list(loaders))
    return run


def test_the_callback_says_how_many_queries_an_epoch_will_ask(decisions):
    train, val = clusters(LEAST_FAST + 512, spread=3.0), clusters(50, seed=1)
    run = scored(train, loader(16, **val))
    assert [(one["rows"], one["queries"], one["k"]) for one in decisions] == [(LEAST_FAST + 512, 64, 8)]  # 4 × 16
    assert run.callback_metrics["eval/knn_index_recall"] >= 0.99


def test_the_callback_counts_every_loader_and_the_batches_that_are_left(decisions):
    train, val = clusters(LEAST_FAST + 512, spread=3.0), clusters(50, seed=1)
    scored(train, loader(16, **val), loader(10, **val), limit_val_batches=2, max_epochs=2)
    assert [(one["queries"], one["warm"]) for one in decisions] == [(52, False), (52, True)]


def test_the_callback_does_not_guess_where_a_loader_has_no_length(decisions):
    train, val = clusters(LEAST_FAST + 512, spread=3.0), clusters(32, seed=1)
    endless = DataLoader(Endless([val, val]), batch_size=None)
    scored(train, endless)
    assert decisions[0]["queries"] == LEAST_FAST + 512  # as many as there are rows
