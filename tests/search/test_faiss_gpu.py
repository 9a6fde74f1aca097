"""What a machine without a GPU can show of the GPU path: tensors handed over, and what is done when memory runs out."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch

from faiss_knn import KNNIndex
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines import faiss_gpu, faiss_library
from faiss_knn.search.engines.exact import ExactEngine
from faiss_knn.search.engines.faiss_engine import FaissEngine
from faiss_knn.search.engines.fast import FastEngine
from faiss_knn.search.stored_rows import ReadAhead, StoredRows
from tests.reference import brute_force

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


@pytest.mark.parametrize("spec", ["Flat", "IVF8,Flat"])
def test_tensors_reach_faiss_as_arrays_do(spec):
    rows, queries = torch.randn(600, 16), torch.randn(40, 16)[3:]  # a view that begins inside its storage
    ours, theirs = (faiss_library.make_index(spec, 16, "METRIC_L2") for _ in range(2))
    faiss_gpu.train(ours, rows)
    theirs.train(rows.numpy())
    faiss_gpu.add(ours, rows)
    theirs.add(rows.numpy())
    assert np.array_equal(faiss_gpu.search(ours, queries, 5).numpy(), theirs.search(queries.numpy(), 5)[1])


def test_an_index_only_the_cpu_has_stays_there_with_a_warning(logged):
    index = faiss_library.make_index("HNSW8", 4, "METRIC_L2")
    assert faiss_gpu.to_gpu(index, torch.device("cuda", 0)) is None
    assert "IndexHNSWFlat exists on the CPU only" in "\n".join(logged)


@pytest.mark.parametrize("half", [False, True])
def test_an_index_goes_to_the_gpu_of_its_rows_in_the_dtype_asked_for(monkeypatch, half):
    library = mock.Mock()
    monkeypatch.setattr(faiss_gpu, "faiss", lambda: library)
    index = faiss_library.make_index("Flat", 4, "METRIC_L2")
    moved = faiss_gpu.to_gpu(index, torch.device("cuda", 3), half=half)
    assert moved is not None
    (resources, number, given, options), _ = library.index_cpu_to_gpu.call_args
    assert (resources, number, given) == (moved[1].faiss, 3, index)
    assert (options.useFloat16, options.use_cuvs) == (half, False)


@pytest.mark.parametrize(
    ("scale", "offset", "expected"), [(1.0, 0.0, True), (1.0, 1000.0, True), (1e-4, 0.0, False), (1e5, 0.0, False)]
)
def test_rows_are_held_in_float16_only_where_it_holds_them_well(scale, offset, expected):
    rows = StoredRows((torch.randn(3000, 8) * scale + offset).bfloat16())
    engine = FaissEngine(rows, get_distance("euclidean"), "Flat")
    assert engine.float16_holds(rows) is expected


def test_without_a_gpu_build_of_faiss_the_search_is_exact_and_says_so_once(monkeypatch, logged):
    assert not faiss_gpu.has_faiss_gpu()
    monkeypatch.setattr(faiss_gpu, "lacks_faiss", lambda device: True)
    faiss_gpu.warn_without_faiss_gpu.cache_clear()
    rows = torch.randn(5000, 8)
    for _ in range(2):
        index = KNNIndex("ivf").build(rows)
        assert (index.stats.exact, index.stats.spec, index.stats.backend) == (True, "flat", "torch")
    expected, _ = brute_force(rows[:20].double().numpy(), rows.double().numpy(), 5, "euclidean")
    torch.testing.assert_close(index.search(rows[:20], 5).distances, torch.from_numpy(expected.astype(np.float32)))
    assert "\n".join(logged).count("pip install faiss-gpu") == 1


@pytest.mark.parametrize("engine", [ExactEngine, FastEngine])
def test_a_shortage_of_memory_makes_the_parts_smaller_and_changes_no_result(monkeypatch, logged, engine):
    index = KNNIndex("flat" if engine is ExactEngine else "fast").build(torch.randn(6000, 16))
    queries = torch.randn(300, 16)
    expected = index.search(queries, 5)
    search, sizes = engine.search, []

    def short_of_memory(self, queries, k):
        sizes.append(len(queries))
        if len(queries) > 40:
            raise OUT_OF_MEMORY
        return search(self, queries, k)

    monkeypatch.setattr(engine, "search", short_of_memory)
    found = index.search(queries, 5)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.distances, expected.distances)
    assert sizes[:2] == [300, 128]
    assert set(sizes[2:]) == {32, 300 % 32}
    assert "32 queries are searched at once: CUDA out of memory. Tried to allocate 2.00 GiB." in "\n".join(logged)
    sizes.clear()
    index.search(queries, 5)
    assert max(sizes) == 32  # it does not run into it again


def test_where_no_part_is_small_enough_the_cpu_searches(monkeypatch, logged):
    rows, queries = torch.randn(500, 16), torch.randn(50, 16)
    index = KNNIndex().build(rows)
    expected = index.search(queries, 5)
    search, first = ExactEngine.search, index._engine

    def never_enough(self, queries, k):
        if self is first:
            raise OUT_OF_MEMORY
        return search(self, queries, k)

    monkeypatch.setattr(ExactEngine, "search", never_enough)
    found = index.search(queries, 5)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.distances, expected.distances)
    assert "does not suffice for 500 rows, so the CPU searches" in "\n".join(logged)


def test_threads_that_run_out_of_memory_together_change_the_index_once(monkeypatch, logged):
    rows, queries, threads = (
        torch.randn(3000, 16),
        torch.randn(300, 16),
        5,
    )  # few: as on a GPU, each searches on its own
    index = KNNIndex().build(rows)
    expected = index.search(queries, 5)
    search, first, together = ExactEngine.search, index._engine, threading.Barrier(threads)

    def never_enough(self, queries, k):
        if self is first:
            together.wait(20)
            raise OUT_OF_MEMORY
        return search(self, queries, k)

    monkeypatch.setattr(ExactEngine, "search", never_enough)
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(index.search, [queries] * threads, [5] * threads))
    assert all(torch.equal(found.indices, expected.indices) for found in answers)
    said = "\n".join(logged)
    assert [said.count(f"so {part} queries are searched") for part in (128, 32)] == [1, 1]
    assert said.count("so the CPU searches") == 1


def test_a_bank_that_does_not_fit_is_built_on_the_cpu(monkeypatch, logged):
    rows, calls, make = torch.randn(500, 16), [], ExactEngine.__init__

    def no_room_at_first(self, *args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise OUT_OF_MEMORY
        make(self, *args, **options)

    monkeypatch.setattr(ExactEngine, "__init__", no_room_at_first)
    index = KNNIndex().build(rows)
    assert index.search(rows[:3], 1).indices.flatten().tolist() == [0, 1, 2]
    assert "the CPU searches: CUDA out of memory." in "\n".join(logged)


@pytest.mark.parametrize("step", ["train", "search"])
def test_a_shortage_while_faiss_builds_is_not_taken_for_unfit_rows(monkeypatch, logged, step):
    real, failed = getattr(faiss_gpu, step), []

    def short_once(*args):
        if not failed:
            failed.append(step)
            raise OUT_OF_MEMORY
        return real(*args)

    monkeypatch.setattr(faiss_gpu, step, short_once)
    rows = torch.randn(800, 16)
    index = KNNIndex("IVF8,Flat", nprobe=8).build(rows)
    assert index.search(rows[:3], 1).indices.flatten().tolist() == [0, 1, 2]
    assert "so the CPU searches: CUDA out of memory." in "\n".join(logged)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"`device` must be one that PyTorch can use here, got 'cuda:77'"):
        KNNIndex(device="cuda:77").build(torch.randn(10, 3))


class OnStreams(torch.Tensor):
    """A tensor on the CPU that takes being told of a CUDA stream."""

    def record_stream(self, stream) -> None:
        """Nothing to record."""


@pytest.mark.parametrize("size", [64, 100, 1000])
def test_reading_ahead_yields_every_block_and_copies_each_once(size):
    data = torch.randn(500, 3).as_subclass(OnStreams)
    with mock.patch.multiple(
        "torch.cuda", Stream=mock.DEFAULT, stream=mock.DEFAULT, current_stream=mock.DEFAULT
    ) as fakes:
        ahead = ReadAhead(data, torch.device("cpu"))
        for _ in range(2):
            blocks = [ahead.block(start, min(start + size, 500)) for start in range(0, 500, size)]
            assert torch.equal(torch.cat(blocks), data)
        assert torch.equal(ahead.block(7, 20), data[7:20])  # out of turn
    copies = fakes["Stream"].return_value.record_event.call_count
    assert copies == 2 * len(blocks) + 2  # and the one that follows rows 7 to 20
