"""FAISS's indexes on one GPU: moved there, fed with PyTorch's tensors on PyTorch's stream, kept below their limits."""

import contextlib
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from faiss_knn.search.engines.faiss_library import faiss, reason

MAX_K = MAX_NPROBE = 2048  # of FAISS's own kernels; some of them abort the process beyond it
_FLAT = {"IndexFlat", "IndexFlatL2", "IndexFlatIP"}
_KINDS = _FLAT | {"IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer"}

_SCRATCH_BYTES = 3 << 29  # that FAISS reserves on a large GPU

# By device number: one for all indexes, as each reserves scratch memory; given back with the last of them.
_resources: "weakref.WeakValueDictionary[int, Resources]" = weakref.WeakValueDictionary()


class Resources:
    """FAISS's scratch memory and cuBLAS handle on one GPU."""

    def __init__(self) -> None:
        self.faiss: Any = faiss().StandardGpuResources()


@cache
def has_faiss_gpu() -> bool:
    """Tell whether the installed FAISS has a GPU build that sees a GPU."""
    try:
        library = faiss()
    except ImportError:
        return False
    return hasattr(library, "StandardGpuResources") and library.get_num_gpus() > 0


def lacks_faiss(device: torch.device) -> bool:
    """Tell whether a device is a GPU that the installed FAISS cannot use."""
    return device.type == "cuda" and not has_faiss_gpu()


@cache
def warn_without_faiss_gpu(spec: str) -> None:
    """Say once what is done instead of a FAISS index on the GPU, and how to get one."""
    logger.warning(
        "no GPU build of FAISS is installed, so {!r} over features on a GPU is searched exactly by PyTorch there: "
        "`pip install faiss-gpu` (Linux x86_64) for FAISS's own indexes on the GPU",
        spec,
    )


def check_room(device: torch.device, size: int) -> None:
    """Check that an index of `size` bytes fits on a GPU beside FAISS's scratch memory.

    Raises:
        torch.cuda.OutOfMemoryError: If not, before anything is allocated.
    """
    needed = size + _SCRATCH_BYTES
    if torch.cuda.mem_get_info(device)[0] < needed:
        torch.cuda.empty_cache()  # what PyTorch keeps for later is not free for FAISS
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed:
        raise torch.cuda.OutOfMemoryError(
            f"a FAISS index of {size / 2**30:.1f} GiB needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def is_flat(index: Any) -> bool:
    """Tell whether an index on the CPU holds its rows as they are, in no lists."""
    return type(index).__name__ in _FLAT


def to_gpu(index: Any, device: torch.device, *, half: bool = False) -> tuple[Any, Resources] | None:
    """Move an index to a GPU, and only to that one.

    Args:
        index: On the CPU, empty, trained or not.
        device: A CUDA device with a number.
        half: Whether a flat index is to hold its rows, and compare queries, in float16.

    Returns:
        The index on the GPU and what it must keep alive; None, with a warning, if FAISS has no such index there.
    """
    library = faiss()
    why = f"{type(index).__name__} exists on the CPU only"
    if type(index).__name__ in _KINDS:
        resources = _resources.get(device.index) or Resources()
        _resources[device.index] = resources
        options = library.GpuClonerOptions()
        options.useFloat16 = half
        options.use_cuvs = False  # its limits and its padding of missing neighbours are others
        try:
            with _named_out_of_memory():
                return library.index_cpu_to_gpu(resources.faiss, device.index, index, options), resources
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            why = reason(error)
    logger.warning("FAISS searches this index on the CPU, not on {}: {}", device, why)
    return None


def to_cpu(index: Any) -> Any:
    """Return a copy on the CPU of an index on the GPU."""
    return faiss().index_gpu_to_cpu(index)


def add(index: Any, rows: Tensor) -> None:
    """Add rows (n, d) float32, contiguous, where the index is, without a copy on the host."""
    with _on_its_stream(index, rows):
        index.add_ex(len(rows), _floats(rows), faiss().Float32)


def train(index: Any, rows: Tensor) -> None:
    """Train an index with rows (n, d) float32, contiguous, where the index is."""
    with _on_its_stream(index, rows):
        index.train_ex(len(rows), _floats(rows), faiss().Float32)


def search(index: Any, queries: Tensor, k: int) -> Tensor:
    """Return the (B, k) int64 row numbers that an index finds for queries (B, d) float32, contiguous, -1 if missing.

    On a GPU the search is queued on the current stream of the queries' device, and nothing waits for it.
    """
    scores = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    ids = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    library = faiss()
    with _on_its_stream(index, queries):
        pointer = library.cast_integer_to_idx_t_ptr(ids.data_ptr())
        index.search_ex(len(queries), _floats(queries), library.Float32, k, _floats(scores), pointer)
    return ids


def _floats(values: Tensor) -> Any:
    if not values.is_contiguous() or values.dtype != torch.float32:  # FAISS would read and write beyond it
        raise ValueError(f"FAISS needs contiguous float32 values, got {values.dtype} of strides {values.stride()}")
    return faiss().cast_integer_to_float_ptr(values.data_ptr())


@contextlib.contextmanager
def _on_its_stream(index: Any, data: Tensor) -> Iterator[None]:
    """Have FAISS queue its work where PyTorch queues its own for the device of `data`."""
    if data.device.type != "cuda":
        yield
        return
    number = data.device.index
    resources = index.getResources()
    before = resources.getDefaultStream(number)
    stream = torch.cuda.current_stream(data.device).cuda_stream
    with torch.cuda.device(data.device), _named_out_of_memory():
        resources.setDefaultStream(number, faiss().cast_integer_to_cudastream_t(stream))
        try:
            yield
        finally:
            resources.setDefaultStream(number, before)


@contextlib.contextmanager
def _named_out_of_memory() -> Iterator[None]:
    """Raise FAISS's failures to allocate as PyTorch raises its own."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            raise torch.cuda.OutOfMemoryError(str(error)) from error
        raise
