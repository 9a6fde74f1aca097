"""What comes in: the bank's rows and the queries, checked, in the dtype they are compared in, read in blocks."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, scaled_lengths, unit
from faiss_knn.search.inputs import shown
from faiss_knn.search.storage import float32_holds

_BLOCK_BYTES = 32 << 20
_NAMED_ROWS = 5
_CHECKED = 1 << 20  # values of a block checked at once

_Copying = tuple[int, int, Tensor, torch.cuda.Event]  # first and last row, the rows, when they are there


class Rows:
    """The bank as it is stored: (N, d) rows on one device, read in blocks.

    A tensor or ndarray whose dtype and device fit is referred to, never copied; a memmap is never read whole. A tensor
    in page-locked host memory that is to be searched on a GPU stays there: its blocks are copied as they are read, the
    next one while the last is worked on.

    Args:
        features: (N, d) tensor, ndarray or memmap of any float dtype.
        storage_dtype: Dtype to store; None: the features' own, float64 as float32 where that holds their differences.
        device: Where to search, and to store what is not streamed; None: where the features are.
        directions: Whether the rows' directions will be compared.

    Raises:
        ValueError: If the shape or dtype does not fit or there are no rows.
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        *,
        storage_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        directions: bool = False,
    ) -> None:
        data = as_matrix(features, "features")
        if len(data) == 0:
            raise ValueError("`features` must hold at least one row, got an empty bank: fill it first")
        self.dtype = storage_dtype or _least_dtype(data, directions)
        self.device = data.device if device is None else as_device(device)
        locked = self.device.type == "cuda" and data.device.type == "cpu" and data.is_pinned()
        # Blocks are cast and moved as they are read.
        self.streamed = is_memmap(features) or locked
        self.data = data if self.streamed else data.to(self.device, self.dtype)
        self._ahead = ReadAhead(self.data, self.device) if locked else None
        self._lengths: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ahead": None}  # blocks are copied as they are asked for

    def __len__(self) -> int:
        return len(self.data)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.data.shape[1]

    @property
    def bytes(self) -> int:
        """Size of the bank's rows in bytes where they are held."""
        return self.data.numel() * self.data.element_size()

    @property
    def block_rows(self) -> int:
        """How many rows make a block of bounded size."""
        return max(1, _BLOCK_BYTES // (4 * self.dim))

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows start to stop, (stop - start, d), as stored."""
        part = self.data[start:stop] if self._ahead is None else self._ahead.block(start, stop)
        return part.to(self.device, self.dtype)

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row's number, (n, d) rows) for the whole bank."""
        step = size or self.block_rows
        for start in range(0, len(self), step):
            yield start, self.block(start, min(start + step, len(self)))

    def take(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids` (n,), (n, d), as stored."""
        return self.data.index_select(0, ids.to(self.data.device)).to(self.device, self.dtype)

    @property
    def lengths(self) -> Tensor:
        """`scaled_lengths` (N,) of the rows, known once they were checked for a distance of directions."""
        assert self._lengths is not None
        return self._lengths

    def directed(self, ids: Tensor, distance: Distance, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the rows of `ids` (n,), (n, d) float64 or float32, of length 1 if the distance asks for it."""
        rows = self.take(ids)
        return unit(rows, self.lengths[ids], dtype) if distance.unit_rows else rows.to(dtype)

    def check(self, distance: Distance) -> None:
        """Check every row, and learn the rows' lengths if the distance is one of directions.

        Raises:
            ValueError: If a row is not finite as stored or, under cosine, zero; names the first ones.
        """
        if distance.unit_rows:
            self._lengths = torch.empty(len(self), dtype=torch.float64, device=self.device)
        for start, block in self.blocks(max(1, _CHECKED // self.dim)):
            check_finite(block, "features", start)
            if self._lengths is not None:
                self._lengths[start : start + len(block)] = scaled_lengths(block)
        if self._lengths is not None and (zero := ~(self._lengths > 0)).any():
            refuse_zero(zero, "features")


def _least_dtype(data: Tensor, directions: bool) -> torch.dtype:
    holds = data.dtype == torch.float64 and float32_holds(data, directions=directions)
    return torch.float32 if holds else data.dtype


class ReadAhead:
    """Copies blocks of page-locked rows to a GPU, the next one on a stream of its own while the last is worked on.

    Args:
        data: (N, d) rows in host memory.
        device: A CUDA device.
    """

    def __init__(self, data: Tensor, device: torch.device) -> None:
        self._data = data
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._next: _Copying | None = None

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows start to stop on the device, and begin to copy as many after them."""
        begun, self._next = self._next, None  # no other thread's any more
        if begun is None or begun[:2] != (start, stop):
            begun = self._begin(start, stop)
        _, _, block, copied = begun
        here = torch.cuda.current_stream(self._device)
        here.wait_event(copied)
        block.record_stream(here)  # its memory is not given to the next copy before the work here is done
        if stop < len(self._data):
            self._next = self._begin(stop, min(2 * stop - start, len(self._data)))
        return block

    def _begin(self, start: int, stop: int) -> _Copying:
        with torch.cuda.stream(self._stream):
            block = self._data[start:stop].to(self._device, non_blocking=True)
            return start, stop, block, self._stream.record_event()


def as_device(device: torch.device | str) -> torch.device:
    """Return the device, a CUDA one with its number: which GPU "cuda" is depends on when one asks.

    Raises:
        ValueError: If this machine or this build of PyTorch has no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # AssertionError: a build without CUDA
        raise ValueError(
            f"`device` must be one that PyTorch can use here, got {shown(device)}: {str(error).splitlines()[0]}"
        ) from error


def is_memmap(features: object) -> bool:
    """Tell whether an array reads from a mapped file, also as a view of one."""
    while isinstance(features, np.ndarray):
        if isinstance(features, np.memmap):
            return True
        features = features.base
    return False


def as_matrix(features: Any, argument: str) -> Tensor:
    """Return (n, d) float data as a tensor that shares its memory, without gradient.

    Raises:
        ValueError: If it is neither tensor nor array, not dense, not two-dimensional, not float, masked, or d is 0.
    """
    if not isinstance(features, (Tensor, np.ndarray)) and hasattr(features, "to_numpy"):  # a DataFrame
        features = features.to_numpy()
    if isinstance(features, np.ndarray):
        features = _from_numpy(features, argument)
    if not isinstance(features, Tensor):  # a ValueError like every other unfit input
        raise ValueError(f"`{argument}` must be a tensor or ndarray of shape (n, d), got {shown(features)}")  # noqa: TRY004
    check_dense(features, f"`{argument}`")
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"`{argument}` must have shape (n, d) with d > 0, got {tuple(features.shape)}")
    if features.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"`{argument}` must be float16, bfloat16, float32 or float64, got {features.dtype}: convert it first"
        )
    return features.detach()


def check_dense(values: Tensor, argument: str) -> None:
    """Check that a tensor holds its values, one beside the other.

    Raises:
        ValueError: If it is sparse, nested, quantized or on the meta device.
    """
    kinds = {"nested": values.is_nested, "quantized": values.is_quantized, "meta": values.is_meta}
    kinds["sparse"] = values.layout != torch.strided
    if kind := next((kind for kind, is_so in kinds.items() if is_so), None):
        raise ValueError(f"{argument} must be an ordinary dense tensor, got a {kind} one: convert it first")


def _from_numpy(array: np.ndarray, argument: str) -> Tensor:
    if np.ma.is_masked(array):
        raise ValueError(f"`{argument}` must not have masked entries: leave those rows out, or fill them in")
    array = np.asarray(array)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(
            f"`{argument}` must be float16, bfloat16, float32 or float64, got {array.dtype}: convert it first"
        )
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))  # torch holds neither
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor do we write
        return torch.from_numpy(array)


def as_queries(queries: Tensor | np.ndarray, rows: Rows, distance: Distance, *, checked: bool = False) -> Tensor:
    """Return queries (B, d) on the bank's device, their values checked unless they are `checked` already.

    Queries become float64 if the bank is, and float32 if they alone are, as its rows did: one that is a row of the bank
    is at distance 0.

    Raises:
        ValueError: If shape, dtype or width do not fit, or a query is not finite or, under cosine, zero.
    """
    matrix = as_matrix(queries, "queries")
    if matrix.shape[1] != rows.dim:
        raise ValueError(f"`queries` must be as wide as the bank, d={rows.dim}, got shape {tuple(matrix.shape)}")
    if torch.float64 in (matrix.dtype, rows.dtype):
        matrix = matrix.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    matrix = matrix.to(rows.device).contiguous()
    if checked:
        return matrix
    check_finite(matrix, "queries")
    if distance.unit_rows and (zero := (matrix == 0).all(1)).any():
        refuse_zero(zero, "queries")
    return matrix


def check_finite(block: Tensor, argument: str, start: int = 0) -> None:
    """Check that `block`, whose first row is number `start`, is finite.

    Raises:
        ValueError: If not; names the first rows.
    """
    # One pass that makes nothing: a sum is finite only if every value is.
    if not torch.isfinite(block.sum(dtype=torch.promote_types(block.dtype, torch.float32))):
        bad = (~torch.isfinite(block)).any(1)
        if bad.any():
            _refuse(bad, start, f"`{argument}` must be finite as {block.dtype}", "NaN or infinite")


def refuse_zero(bad: Tensor, argument: str) -> None:
    """Raise a ValueError that names the rows which `bad` (n,) marks as zero."""
    _refuse(bad, 0, f"`{argument}` must have no zero rows for the cosine distance", "zero")


def _refuse(bad: Tensor, start: int, need: str, what: str) -> None:
    ids = bad.nonzero()[:, 0] + start
    named = ", ".join(str(int(row)) for row in ids[:_NAMED_ROWS]) + (", …" if len(ids) > _NAMED_ROWS else "")
    raise ValueError(f"{need}, got {len(ids)} {what} row(s) (row {named}): leave them out or mend them")
