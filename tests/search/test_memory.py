"""What a search takes of memory, watched in processes of their own: pytest's heap has room that it would hide in."""

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faiss_knn import KNNIndex
from faiss_knn.search.engines import matrix_product
from faiss_knn.search.engines.matrix_product import has_fast_bfloat16
from tests.reference import distances

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
slow_in_bfloat16 = pytest.mark.skipif(not has_fast_bfloat16(torch.device("cpu")), reason="slow on this CPU")

MIB = 1 << 20
WORK = 256 * MIB  # beside the bank, a copy of it and the answer


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def grown_while(function: Callable[[], Any]) -> tuple[int, Any]:
    """Return by how many bytes the memory that is no file's grew at most, and what the function returned."""
    before, seen, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        done.set()
        watcher.join()
    return seen[0] - before, result


def warm_up(distance: str = "euclidean") -> None:
    """Start the threads, of which each has a room of its own, and load the kernels."""
    torch.set_num_threads(2)
    KNNIndex(distance_metric=distance).build(torch.randn(3000, 64)).search(torch.randn(100, 64), 20)


def flat(
    scan: str, rows: int, dim: int, dtype: torch.dtype, queries: int, k: int, distance: str, twins: int
) -> tuple[int, int]:
    """Return by how much a build and a search grow, and what they may add."""
    matrix_product.has_fast_bfloat16 = lambda device: scan == "bfloat16"
    warm_up(distance)
    bank, asked = torch.randn(rows, dim).to(dtype), torch.randn(queries, dim).to(dtype)
    bank[: rows * twins // 100] = bank[0]
    index = KNNIndex(distance_metric=distance)
    grown, found = grown_while(lambda: index.build(bank).search(asked, k))
    assert found.indices.shape == (queries, k)
    assert index.stats.parameters["scan_dtype"] in (scan, "float32")
    return grown, bank.nbytes + WORK + 12 * found.indices.numel()


HALF, WHOLE = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("rows", "dim", "dtype", "queries", "k", "distance", "twins"),
    [
        pytest.param(600_000, 93, WHOLE, 2048, 500, "euclidean", 0, id="many neighbours"),
        pytest.param(8_000, 16, WHOLE, 4096, 1000, "cosine", 0, id="a bank that is measured whole"),
        pytest.param(4_000_000, 16, HALF, 256, 20, "euclidean", 0, id="a copy larger than the bank"),
        pytest.param(8_000_000, 8, WHOLE, 64, 20, "cosine", 0, id="lengths, and bounds that have to be tightened"),
        pytest.param(8_000_000, 8, WHOLE, 64, 20, "euclidean", 50, id="half of the bank one row"),
    ],
)
@pytest.mark.parametrize("scan", [pytest.param("bfloat16", marks=slow_in_bfloat16), "float32"])
def test_flat_adds_one_copy_of_the_bank_at_most_and_bounded_blocks(scan, rows, dim, dtype, queries, k, distance, twins):
    grown, allowed = in_new_process(flat, scan, rows, dim, dtype, queries, k, distance, twins)
    assert 0 < grown <= allowed


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[np.memmap]:
    """400 MB on a disk."""
    path, generator = tmp_path / "bank.f32", np.random.default_rng(0)
    rows = np.memmap(path, np.float32, "w+", shape=(1_000_000, 100))
    for part in np.split(rows, 100):
        part[:] = generator.standard_normal(part.shape, np.float32)
    rows.flush()
    yield rows
    path.unlink()


def from_disk(path: str, shape: tuple[int, int], queries: np.ndarray, distance: str) -> tuple[int, Any]:
    warm_up(distance)
    index = KNNIndex(distance_metric=distance)
    return grown_while(lambda: index.build(np.memmap(path, np.float32, "r", shape=shape)).search(queries, 10))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_memmap_is_never_loaded_whole(mapped, distance):
    queries = mapped[[3, 999_999]] + np.float32(0.1)
    grown, found = in_new_process(from_disk, str(mapped.filename), mapped.shape, queries, distance)
    assert grown < mapped.nbytes / 2
    every = np.concatenate([distances(queries, part, distance) for part in np.split(mapped, 50)], axis=1)
    ids = np.argsort(every, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found.indices.numpy(), ids)
    expected = np.take_along_axis(every, ids, 1).astype(float)
    np.testing.assert_allclose(found.distances.numpy(), expected, rtol=1e-5)
