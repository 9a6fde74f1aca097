"""The matrix product of a scan on the CPU: PyTorch's or numpy's, whichever library's BLAS is faster here.

PyTorch's wheels bring MKL, numpy's bring OpenBLAS; on AMD's CPUs the latter is up to twice as fast. Which is taken
changes the last bits of a score, never a neighbour: the bounds allow for either.
"""

import ctypes
import time
from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
import torch
from numpy.linalg import _umath_linalg
from torch import Tensor

from faiss_knn.search.precision import cpu_flags

BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")  # with either, bfloat16 products are faster than float32 ones
_ROWS, _WIDTH, _QUERIES = 1024, 256, 256  # of the product that is timed: 2 to 5 milliseconds in all
_ROUNDS = 3
_FASTER = 1.1  # numpy's must be so many times as fast to be taken


def multiply(rows: Tensor, queries: Tensor, out: Tensor) -> Tensor:
    """Multiply on whatever device and in whatever dtype they are: `out` (n, B) = rows (n, K) @ queries (B, K)ᵀ.

    Returns:
        `out`.
    """
    # The rows on the left: oneDNN packs the right side anew for every product, and the queries are fewer.
    if uses_numpy(rows):
        np.matmul(rows.numpy(), queries.numpy().T, out=out.numpy())
        return out
    return torch.mm(rows, queries.T, out=out)


def uses_numpy(rows: Tensor) -> bool:
    """Tell whether products with these rows are numpy's."""
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and _numpy_may_be_used() and prefers_numpy()


@cache
def prefers_numpy() -> bool:
    """Tell whether numpy's float32 product is the faster one; timed once per process, for some milliseconds."""
    rows = torch.ones(_ROWS, _WIDTH, dtype=torch.float32, device="cpu")
    queries = torch.ones(_QUERIES, _WIDTH, dtype=torch.float32, device="cpu")
    out = torch.empty(_ROWS, _QUERIES, dtype=torch.float32, device="cpu")
    of_numpy = _least_seconds(lambda: np.matmul(rows.numpy(), queries.numpy().T, out=out.numpy()))
    return _FASTER * of_numpy < _least_seconds(lambda: torch.mm(rows, queries.T, out=out))


@cache
def multiply_add_seconds(dtype: torch.dtype) -> float:
    """Return what each multiply-add of a scan's product takes on this CPU, timed once per process."""
    if dtype == torch.bfloat16 and cpu_flags().isdisjoint(BFLOAT16_FLAGS):
        return multiply_add_seconds(torch.float32)  # without instructions of its own it is never scanned in
    rows = torch.ones(_ROWS, _WIDTH, dtype=dtype, device="cpu")
    queries, out = rows[:_QUERIES].clone(), rows.new_empty(_ROWS, _QUERIES)
    return _least_seconds(lambda: multiply(rows, queries, out)) / (_ROWS * _WIDTH * _QUERIES)


def _least_seconds(product: Callable[[], object]) -> float:
    seconds = []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _numpy_may_be_used() -> bool:
    """Tell whether numpy's BLAS runs on as many threads as PyTorch may use: a limit set for one holds for all."""
    threads = _numpy_threads()
    return threads is not None and threads() == torch.get_num_threads()


@cache
def _numpy_threads() -> Callable[[], int] | None:
    """Find the function that tells on how many threads numpy's bundled OpenBLAS runs; None for another BLAS."""
    try:
        library = ctypes.CDLL(_umath_linalg.__file__)  # it is linked to it
    except OSError:
        return None
    for name in ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads", "openblas_get_num_threads"):
        function = getattr(library, name, None)
        if function is not None:
            function.restype = ctypes.c_int
            return cast(Callable[[], int], function)
    return None


def scan_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that a scan multiplies in: bfloat16 where that is the faster one, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 products are faster than float32 ones: AMX or AVX-512 on a CPU, tensor cores."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not cpu_flags().isdisjoint(BFLOAT16_FLAGS)
