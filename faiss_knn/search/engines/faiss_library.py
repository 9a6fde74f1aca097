"""The only file that imports FAISS: which BLAS kernels it runs, what its build can do, indexes from factory strings."""

import contextlib
import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch  # before faiss: then both share one OpenMP runtime, and forked workers can search
from loguru import logger

from faiss_knn.search.precision import SharedSetting, cpu_flags

_INSTALL = (
    "FAISS is not installed: `pip install faiss-cpu` (or faiss-gpu on Linux x86_64 with an NVIDIA GPU), "
    "or `conda install -c conda-forge faiss`"
)
_REHEARSED = 1000  # rows: what product quantizers of eight bits can be trained on
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}
_SLOW_KERNELS = {"Prescott", "Barcelona"}  # what OpenBLAS falls back to on a CPU it does not know


def openblas_kernels(flags: frozenset[str]) -> str | None:
    """Return the OpenBLAS kernel set that a CPU with these flags can run, None where the default should stay.

    OpenBLAS 0.3.15, which the FAISS wheels bundle, takes Intel's server CPUs from Ice Lake-SP on for a Prescott (SSE3)
    and AMD's from Zen 5 on for a Barcelona. It runs what OPENBLAS_CORETYPE names without a check, so a name is given
    only where the CPU has its instructions.

    Example:
        >>> openblas_kernels(frozenset({"sse3", "avx2", "fma"}))
        'Haswell'
        >>> openblas_kernels(frozenset({"sse3"})) is None
        True
    """
    if flags >= _AVX512:
        return "SkylakeX"
    return "Haswell" if flags >= {"avx2", "fma"} else None


@cache
def faiss() -> Any:
    """Import FAISS, with the CPU's own BLAS kernels where it is safe to name them, and return the module.

    Raises:
        ImportError: If FAISS is missing or its installation is broken; says how to install it.
    """
    if "faiss" in sys.modules:
        module = sys.modules["faiss"]
        _warn_if_slow()
    else:
        with _kernels_named():
            module = _import()
    if not hasattr(module, "IndexFlat"):
        raise ImportError(f"the installed FAISS is broken (two distributions of it, one removed?). {_INSTALL}")
    return module


def _import() -> Any:
    try:
        return import_module("faiss")
    except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA libraries raises RuntimeError
        raise ImportError(f"{_INSTALL} (import faiss: {error})") from error


@contextlib.contextmanager
def _kernels_named() -> Iterator[None]:
    """Set OPENBLAS_CORETYPE while FAISS loads; numpy's own copy has read it already and keeps its choice."""
    kernels = openblas_kernels(cpu_flags()) if sys.platform == "linux" and platform.machine() == "x86_64" else None
    if kernels is None or "OPENBLAS_CORETYPE" in os.environ:
        yield
        return
    os.environ["OPENBLAS_CORETYPE"] = kernels
    try:
        yield
    finally:
        del os.environ["OPENBLAS_CORETYPE"]


def openblas_core() -> str | None:
    """Return the kernel set that FAISS's bundled OpenBLAS runs ("SkylakeX", "Prescott", …); None if not bundled."""
    path = _bundled_openblas()
    if path is None:
        return None
    library = ctypes.CDLL(path)  # already mapped: the same copy
    for name in ("openblas_get_corename", "scipy_openblas_get_corename"):
        with contextlib.suppress(AttributeError):
            function: Callable[[], bytes] = getattr(library, name)
            function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
            return function().decode()
    return None


def _bundled_openblas() -> str | None:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "openblas" in line}
    return next((path for path in sorted(paths) if "faiss" in path), None)


def _warn_if_slow() -> None:
    core = openblas_core()
    kernels = openblas_kernels(cpu_flags())
    if core in _SLOW_KERNELS and kernels is not None and "OPENBLAS_CORETYPE" not in os.environ:
        logger.warning(
            "faiss was imported before faiss_knn and its OpenBLAS runs {} kernels, several times slower than this CPU "
            "can: call faiss_knn.search.engines.faiss_library.faiss() before, or set OPENBLAS_CORETYPE={}",
            core,
            kernels,
        )


@contextlib.contextmanager
def blas_for_all_sizes() -> Iterator[None]:
    """Have FAISS use matrix products for batches of any size, not its slow sequential kernel for small ones."""
    with _blas_threshold().held_at(1):
        yield


@cache
def _blas_threshold() -> SharedSetting:
    variables = faiss().cvar
    name = "distance_compute_blas_threshold"
    return SharedSetting(lambda: getattr(variables, name), lambda value: setattr(variables, name, value))


def make_index(spec: str, dim: int, metric: str) -> Any:
    """Make an empty index from a factory string.

    Args:
        spec: As for `faiss.index_factory`.
        dim: Width of the rows.
        metric: Name of a FAISS metric: "METRIC_L2", "METRIC_INNER_PRODUCT" or "METRIC_L1".

    Raises:
        ValueError: If FAISS does not accept the string, or not with this metric.
    """
    library = faiss()
    try:
        return library.index_factory(dim, spec, getattr(library, metric))
    except RuntimeError as error:
        raise ValueError(
            f"`spec` must be 'flat', 'ivf', 'fast', 'auto' or a FAISS factory string valid for d={dim} and {metric}, "
            f"got {spec!r}: {reason(error)}"
        ) from error


def binary_index(codes: Any) -> Callable[[Any, int], tuple[Any, Any]]:
    """Index rows of bits, and return what finds the k rows that differ from queries in the fewest.

    Args:
        codes: (N, m) uint8, eight bits to a byte.

    Returns:
        A function of (B, m) uint8 and k ≤ N: (B, k) int32 numbers of differing bits, ascending, and int64 rows, those
        that differ in as many by number.
    """
    index = faiss().IndexBinaryFlat(8 * codes.shape[1])
    index.use_heap = False  # rows are counted by how many bits differ, in their order: a heap would mix equal ones
    index.add(codes)

    def search(queries: Any, k: int) -> tuple[Any, Any]:
        differing, rows = index.search(queries, k)
        return differing, rows

    return search


def inner_ivf(index: Any) -> Any | None:
    """Return the IVF index inside `index` (behind transforms and refinement), None if there is none."""
    library = faiss()
    if isinstance(index, getattr(library, "GpuIndexIVF", ())):
        return index
    try:
        return library.extract_index_ivf(index)
    except RuntimeError:
        return None


def index_bytes(index: Any) -> int:
    """Return the size of an index in bytes, as FAISS would write it to a file."""
    library = faiss()
    writer = library.CountingIOWriter() if hasattr(library, "CountingIOWriter") else None
    if writer is None:
        return len(library.serialize_index(index))
    library.write_index(index, writer)
    return int(writer.total_written)


def as_bytes(index: Any) -> Any:
    """Return an index on the CPU as an array of bytes."""
    return faiss().serialize_index(index)


def from_bytes(data: Any) -> Any:
    """Return the index that `as_bytes` wrote."""
    return faiss().deserialize_index(data)


def try_index(spec: str, dim: int, metric: str) -> None:
    """Build an index from a factory string over a few rows and search it; errors that FAISS raises are no matter."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_REHEARSED, dim, generator=generator, dtype=torch.float32, device="cpu").numpy()
    with contextlib.suppress(RuntimeError, ValueError):
        index = make_index(spec, dim, metric)
        index.train(rows)
        index.add(rows)
        index.search(rows[:3], 2)


def reason(error: Exception) -> str:
    """Return why FAISS refused, without the places in its source and the conditions that it writes before."""
    text = next(iter(str(error).splitlines()), "")
    said = re.search(r"\.(?:cpp|h|cuh?):\d+: (?:Error: )?(.*)", text)
    words = re.sub(r"^'.*?' failed:?\s*", "", said[1] if said else text).replace("faiss::", "").strip(" .:")
    return words if words and "::" not in words and " at /" not in words else "FAISS refuses it"
