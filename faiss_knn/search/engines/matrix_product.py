"""The matrix product of a scan on the CPU: PyTorch's or numpy's, whichever library's BLAS is faster here.

PyTorch's wheels bring MKL, numpy's bring OpenBLAS; on AMD's CPUs the latter is up to twice as fast. Which is taken
changes the last bits of a score, never a neighbour: the bounds allow for either.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from faiss_knn.search.engines.workers import numpy_threads, run_alone
from faiss_knn.search.precision import cpu_flags

BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")  # with either, bfloat16 products are faster than float32 ones
# With one of them int8 products are exact, and may be faster than either: without, oneDNN's would saturate.
_INT8_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni")
_LEAST_GAIN = 0.7  # of the other product's time: bounds in int8 leave more rows to be measured
_ROWS, _WIDTH, _QUERIES = 512, 520, 500  # of the product that is timed: sizes that no kernel is made for
_PRODUCT = _ROWS * _WIDTH * _QUERIES
_ROUNDS = 4  # the first to warm up: some 50 milliseconds in all where a core does 80 GFLOP/s


def multiply(rows: Tensor, queries: Tensor, out: Tensor) -> Tensor:
    """Multiply on whatever device and in whatever dtype they are: `out` (n, B) = rows (n, K) @ queries (B, K)ᵀ.

    Returns:
        `out`.
    """
    # The rows on the left: oneDNN packs the right side anew for every product, and the queries are fewer.
    if rows.dtype == torch.int8:
        return _multiply_whole(rows, queries, out)
    return _multiply_numpys(rows, queries, out) if uses_numpy(rows) else _multiply_pytorchs(rows, queries, out)


def _multiply_numpys(rows: Tensor, queries: Tensor, out: Tensor) -> Tensor:
    np.matmul(rows.numpy(), queries.numpy().T, out=out.numpy())
    return out


def _multiply_pytorchs(rows: Tensor, queries: Tensor, out: Tensor) -> Tensor:
    return torch.mm(rows, queries.T, out=out)


def _multiply_whole(rows: Tensor, queries: Tensor, out: Tensor) -> Tensor:
    return torch._int_mm(rows, queries.T, out=out)


def uses_numpy(rows: Tensor) -> bool:
    """Tell whether products with these rows are numpy's."""
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and _numpy_may_be_used() and prefers_numpy()


@cache
def prefers_numpy() -> bool:
    """Tell whether numpy's float32 product is the faster one; timed once per process, for some milliseconds."""
    return statistics.median(pytorchs / numpys for pytorchs, numpys in _float32_turns()) > 1


@cache
def multiply_add_seconds(dtype: torch.dtype) -> float:
    """Return what each multiply-add of a scan's product takes a thread of this CPU, timed once per process."""
    if dtype == torch.int8:
        return statistics.median(turn[0] for turn in _turns([_multiply_whole], dtype)) / _PRODUCT
    if dtype == torch.float32 or cpu_flags().isdisjoint(BFLOAT16_FLAGS):
        # Without instructions of its own, bfloat16 is never scanned in.
        of_numpy = numpy_threads() is not None and prefers_numpy()
        seconds = [turn[of_numpy] for turn in _float32_turns()]
    else:
        seconds = [turn[0] for turn in _turns([_multiply_pytorchs], dtype)]
    return statistics.median(seconds) / _PRODUCT


@cache
def _float32_turns() -> list[list[float]]:
    return _turns([_multiply_pytorchs, _multiply_numpys], torch.float32)


def _turns(products: Sequence[Callable[[Tensor, Tensor, Tensor], Tensor]], dtype: torch.dtype) -> list[list[float]]:
    """Time products in turns, each on one thread, by its processor time, which a busy machine hardly changes."""
    rows = torch.ones(_ROWS, _WIDTH, dtype=dtype, device="cpu")
    queries = torch.ones(_QUERIES, _WIDTH, dtype=dtype, device="cpu")

    def measure() -> list[list[float]]:
        out = rows.new_empty(_ROWS, _QUERIES, dtype=torch.int32 if dtype == torch.int8 else dtype)
        return [[_thread_seconds(partial(product, rows, queries, out)) for product in products] for _ in range(_ROUNDS)]

    return run_alone(measure)[1:]


def _thread_seconds(task: Callable[[], object]) -> float:
    start = time.thread_time()
    task()
    return time.thread_time() - start


def _numpy_may_be_used() -> bool:
    """Tell whether numpy's BLAS runs on as many threads as PyTorch may use: a limit set for one holds for all."""
    setting = numpy_threads()
    return setting is not None and setting.read() == torch.get_num_threads()


def scan_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that a scan multiplies in: bfloat16 where that is the faster one, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 products are faster than float32 ones: AMX or AVX-512 on a CPU, tensor cores."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not cpu_flags().isdisjoint(BFLOAT16_FLAGS)


@cache
def has_fast_int8(device: torch.device) -> bool:
    """Tell whether int8 products are exact on this CPU and clearly faster than those in `scan_dtype`."""
    if device.type != "cpu" or cpu_flags().isdisjoint(_INT8_FLAGS) or not hasattr(torch, "_int_mm"):
        return False
    try:
        is_fast = multiply_add_seconds(torch.int8) < _LEAST_GAIN * multiply_add_seconds(scan_dtype(device))
        return is_fast and _is_exact_in_int8()
    except RuntimeError:  # a build of PyTorch without it
        return False


def _is_exact_in_int8() -> bool:
    """Try the largest products: oneDNN may be kept from the CPU's instructions, and others saturate."""
    rows = torch.full((_ROWS, _WIDTH), 127, dtype=torch.int8, device="cpu")
    signs = torch.ones(_QUERIES, 1, dtype=torch.int8, device="cpu")
    signs[1::2] = -1
    out = torch.empty(_ROWS, _QUERIES, dtype=torch.int32, device="cpu")
    product = _multiply_whole(rows, rows[:_QUERIES] * signs, out)
    return torch.equal(product, (127**2 * _WIDTH * signs.T.int()).expand_as(product))
