"""The CPU's oracles on CUDA: search, vote, queue and callback on the device, with and without FAISS's GPU build."""

import warnings

import numpy as np
import pytest
import torch

from faiss_knn import KNNIndex, OnlineKNN, vote
from faiss_knn.online.queue import RingBuffer
from faiss_knn.search.engines import faiss_gpu
from tests.online.parts import Echo, clusters, loader, trainer
from tests.online.test_callback import knn
from tests.reference import brute_force

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_faiss = pytest.mark.skipif(not faiss_gpu.has_faiss_gpu(), reason="needs FAISS's GPU build and a CUDA device")
CUDA = torch.device("cuda", 0)


def data(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def check_exact(bank: torch.Tensor, queries: torch.Tensor, k: int, distance: str = "euclidean", spec: str = "flat"):
    """Build and search on the device; compare with numpy in extended precision."""
    index = KNNIndex(spec, distance_metric=distance).build(bank.to(CUDA))
    found = index.search(queries.to(CUDA), k)
    assert found.indices.device == found.distances.device == CUDA
    expected, ids = brute_force(queries.double().numpy(), bank.double().numpy(), k, distance)
    expected = torch.from_numpy(expected.astype(np.float64))
    torch.testing.assert_close(found.distances.cpu().double(), expected, rtol=1e-5, atol=1e-30)
    clear = (expected[:, 1:] > expected[:, :-1] * (1 + 1e-12)).all(1)  # no ties that rounding could have made
    assert torch.equal(found.indices.cpu()[clear], torch.from_numpy(ids)[clear])
    return index


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine", "manhattan", "dot"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flat_equals_brute_force(distance, offset, dtype):
    check_exact((data(5000, 64) + offset).to(dtype), (data(100, 64, 1) + offset).to(dtype), 20, distance)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_flat_is_exact_at_any_scale(scale):
    check_exact(data(3000, 32) * scale, data(50, 32, 1) * scale, 10)


def test_flat_is_exact_where_features_collapsed():
    direction = torch.nn.functional.normalize(data(1, 96, 2))
    check_exact(direction + 1e-4 * data(4000, 96) / 96**0.5, direction + 1e-4 * data(60, 96, 1) / 96**0.5, 20, "cosine")


def test_flat_is_exact_with_many_duplicates_and_one_huge_row():
    bank = data(40, 48)[torch.arange(6000) % 40]
    bank[17] *= 1e6
    check_exact(bank, data(30, 48, 1), 200)


def test_flat_is_exact_through_a_projection_to_leading_directions():
    spread = data(24, 768, 3)
    index = check_exact(data(8000, 24) @ spread, data(64, 24, 1) @ spread, 20)
    assert index.stats.parameters["scan_dims"] < 768


def test_a_query_gets_the_same_bits_in_any_batch():
    rows, queries = torch.randn(20_000, 128, device=CUDA), torch.randn(1024, 128, device=CUDA)
    index = KNNIndex().build(rows)
    whole = index.search(queries, 20)
    for size in (1, 7, 256):
        part = index.search(queries[:size], 20)
        assert torch.equal(part.indices, whole.indices[:size])
        assert torch.equal(part.distances, whole.distances[:size])


def test_flat_refers_to_features_on_the_device():
    bank = torch.randn(200_000, 64, device=CUDA)
    index = KNNIndex().build(bank)
    assert index._rows is not None
    assert index._rows.data.data_ptr() == bank.data_ptr()


def test_fast_meets_its_recall_and_stays_warm():
    bank, queries = data(20_000, 64).to(CUDA), data(200, 64, 1).to(CUDA)
    exact = KNNIndex().build(bank).search(queries, 20).indices
    index = KNNIndex("fast").build(bank)
    index.build(bank)
    found = index.search(queries, 20).indices
    assert (found[:, :, None] == exact[:, None]).any(1).float().mean() > 0.97
    assert index.stats.recall >= 0.98


def test_a_search_follows_the_current_stream():
    bank, queries = torch.randn(100_000, 64, device=CUDA), torch.randn(64, 64, device=CUDA)
    expected = KNNIndex().build(bank).search(queries, 5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_bank, late_queries = bank * 1.0, queries * 1.0  # not there before the sleep is over
        found = KNNIndex().build(late_bank).search(late_queries, 5)
    stream.synchronize()
    assert torch.equal(found.indices, expected.indices)


def test_a_bank_in_page_locked_memory_is_streamed():
    bank, queries = data(300_000, 64), data(64, 64, 1)
    expected = KNNIndex().build(bank.to(CUDA)).search(queries.to(CUDA), 20)
    before = torch.cuda.memory_allocated()
    index = KNNIndex(device=CUDA).build(bank.pin_memory())
    assert torch.cuda.memory_allocated() - before < bank.nbytes / 2
    for _ in range(2):
        found = index.search(queries.to(CUDA), 20)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.distances, expected.distances)


def test_where_the_memory_ends_the_cpu_searches_the_same(logged):
    bank, queries = data(400_000, 128), data(64, 128, 1)
    expected = KNNIndex().build(bank).search(queries, 10)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + bank.nbytes // 2) / total)
    try:
        index = KNNIndex(device=CUDA).build(bank)
        found = index.search(queries, 10)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert index.stats.device == "cpu"
    assert "so the CPU searches" in "\n".join(logged)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.distances, expected.distances)


def test_a_hundred_rebuilds_leave_no_memory_behind():
    bank, index = torch.randn(50_000, 64, device=CUDA), KNNIndex()
    index.build(bank).search(bank[:64], 5)
    after_one = torch.cuda.memory_allocated()
    for _ in range(100):
        index.build(bank).search(bank[:64], 5)
    assert torch.cuda.memory_allocated() <= after_one + (1 << 20)


@needs_faiss
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
def test_faiss_flat_on_the_device(distance):
    index = check_exact(data(5000, 64), data(100, 64, 1), 20, distance, spec="Flat")
    assert (index.stats.backend, index.stats.device) == ("faiss", "cuda:0")


@needs_faiss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_faiss_flat_holds_half_rows_in_half_the_memory(dtype):
    bank, queries = data(20_000, 64).to(CUDA), data(100, 64, 1).to(CUDA)
    index = KNNIndex("Flat", storage_dtype=dtype).build(bank)
    assert index.stats.bytes == 2 * (2 * bank.numel())  # the rows, and the index
    found, exact = index.search(queries, 20), KNNIndex(storage_dtype=dtype).build(bank).search(queries, 20)
    assert (found.indices[:, :, None] == exact.indices[:, None]).any(1).float().mean() > 0.99


@needs_faiss
@pytest.mark.parametrize("spec", ["ivf", "IVF64,Flat", "IVF64,SQ8"])
def test_faiss_inverted_lists_on_the_device(spec):
    bank, queries = data(20_000, 32).to(CUDA), data(300, 32, 1).to(CUDA)
    index = KNNIndex(spec, target_recall=0.95).build(bank)
    exact = KNNIndex().build(bank).search(queries, 20)
    found = index.search(queries, 20)
    assert (index.stats.backend, index.stats.device) == ("faiss", "cuda:0")
    assert (found.indices[:, :, None] == exact.indices[:, None]).any(1).float().mean() > 0.9
    assert (found.distances.diff(dim=1) >= 0).all()
    nprobe = index.stats.nprobe
    index.build(bank)
    assert index.stats.parameters["warm"]
    assert index.stats.nprobe == nprobe


@needs_faiss
def test_missing_neighbours_of_faiss_are_marked():
    found = KNNIndex("IVF64,Flat", nprobe=1).build(data(6000, 8).to(CUDA)).search(data(10, 8, 1).to(CUDA), 1000)
    assert torch.equal(found.indices < 0, found.distances.isinf())
    assert (found.indices < 0).any()


@needs_faiss
def test_limits_of_faiss_on_the_device_are_errors_not_aborts():
    index = KNNIndex("Flat").build(data(5000, 8).to(CUDA))
    assert index.search(data(2, 8, 1).to(CUDA), 2048).indices.shape == (2, 2048)
    with pytest.raises(ValueError, match="`k` must be at most 2048"):
        index.search(data(2, 8, 1).to(CUDA), 2049)


@needs_faiss
def test_an_index_that_only_the_cpu_has_searches_there():
    index = KNNIndex("HNSW16").build(data(3000, 16).to(CUDA))
    assert index.stats.device == "cpu"
    assert index.search(data(5, 16).to(CUDA), 3).indices.device == CUDA


@needs_faiss
def test_released_indexes_give_their_scratch_memory_back():
    bank = data(100_000, 64).to(CUDA)
    index = KNNIndex("ivf").build(bank)
    index.release()
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(3):
        index.build(bank)
        index.release()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= free - (256 << 20)


@needs_faiss
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("spec", ["flat", "ivf"])
def test_no_other_gpu_is_used(spec):
    before = torch.cuda.mem_get_info(0)[0]
    bank = data(50_000, 64).to("cuda:1")
    index = KNNIndex(spec).build(bank)
    assert index.search(bank[:10], 5).indices.device == torch.device("cuda", 1)
    assert torch.cuda.mem_get_info(0)[0] >= before - (64 << 20)


def test_vote_equals_the_cpu():
    distances, labels = torch.rand(64, 50), torch.randint(0, 10, (64, 50))
    torch.testing.assert_close(vote(distances.to(CUDA), labels.to(CUDA), 10).cpu(), vote(distances, labels, 10))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_append_does_not_synchronise(device):
    ring = RingBuffer(1000, 64, torch.float32, device, pin_memory=device == "cpu")
    rows = torch.randn(300, 64, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            ring.append(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(ring.latest(300).to(CUDA), rows)


def counting_waits(function, counts):
    """Make `function` append how often it waited for the device to `counts`."""

    def run(*args, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return function(*args, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                counts.append(sum("synchronizing" in str(warning.message) for warning in caught))

    return run


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_training_step_never_waits_and_a_validation_batch_twice(distance, monkeypatch):
    training, validation = [], []
    for name, counts in (("on_train_batch_end", training), ("on_validation_batch_end", validation)):
        monkeypatch.setattr(OnlineKNN, name, counting_waits(getattr(OnlineKNN, name), counts))
    callback = knn(queue_length=2000, metrics=None, num_classes=4, distance_metric=distance)
    run = trainer(callback, accelerator="gpu", devices=1, num_sanity_val_steps=0)
    train = {"x": data(2000, 16), "label": torch.arange(2000) % 4}
    run.fit(Echo(), loader(250, **train), loader(32, x=data(128, 16, 1), label=torch.arange(128) % 4))
    assert training == [0] * 8
    assert len(validation) == 4
    assert max(validation) <= 2


@pytest.mark.parametrize("options", [{}, {"index": "ivf", "queue_length": 4096}, {"bank_device": "cpu"}])
def test_the_callback_scores_on_the_device(options):
    run = trainer(knn(**options), accelerator="gpu", devices=1)
    run.fit(Echo(), loader(**clusters(512)), loader(**clusters(32, seed=1)))
    assert run.callback_metrics["eval/knn_acc"] == 1.0
