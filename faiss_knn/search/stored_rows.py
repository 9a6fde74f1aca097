"""What comes in: the bank's rows and the queries, checked, in the dtype they are compared in, read in blocks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, normalize, scaled_lengths
from faiss_knn.search.float32_holds import float32_holds
from faiss_knn.search.inputs import as_device, as_matrix, check_comparable, check_finite, is_memmap, refuse_zero

_BLOCK_BYTES = 32 << 20
_CHECKED = 1 << 20  # values of a block checked at once

_Copying = tuple[int, int, Tensor, torch.cuda.Event]  # first and last row, the rows, when they are there


class StoredRows:
    """The bank as it is stored: (N, d) rows on one device, read in blocks.

    A tensor or ndarray whose dtype and device fit is referred to, never copied; a memmap is never read whole. A tensor
    in page-locked host memory that is to be searched on a GPU stays there: its blocks are copied as they are read, the
    next one while the last is worked on.

    Args:
        features: (N, d) tensor, ndarray or memmap of any float dtype.
        storage_dtype: Dtype to store; None: the features' own, float64 as float32 where that holds their differences.
        device: Where to search, and to store what is not streamed; None: where the features are.
        normalized: Whether the rows' directions will be compared.

    Raises:
        ValueError: If the shape or dtype does not fit or there are no rows.

    Example:
        >>> rows = StoredRows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> len(rows), rows.dim, rows.bytes
        (2, 2, 16)
        >>> rows.take(torch.tensor([1]))
        tensor([[3., 4.]])
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        *,
        storage_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        normalized: bool = False,
    ) -> None:
        data = as_matrix(features, "features")
        if len(data) == 0:
            raise ValueError("`features` must hold at least one row, got an empty bank: fill it first")
        self.dtype = storage_dtype or _least_dtype(data, normalized)
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
        if self._lengths is None:
            raise RuntimeError("the rows' lengths are not known before `check` with a distance of directions")
        return self._lengths

    def random_ids(self, count: int) -> Tensor:
        """Return the numbers of `count` rows at random, ascending, the same ones for a bank of the same size."""
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randperm(len(self), generator=generator, device="cpu")[:count].sort().values
        return ids.to(self.device)

    def sample(self, count: int, distance: Distance) -> Tensor:
        """Return `count` rows at even steps, or all where there are fewer, as `as_compared` does in float64."""
        ids = torch.linspace(0, len(self) - 1, min(count, len(self)), dtype=torch.float64, device="cpu").long()
        return self.as_compared(ids, distance)

    def as_compared(self, ids: Tensor, distance: Distance, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the rows of `ids` (n,), (n, d) float64 or float32, of length 1 if the distance asks for it."""
        rows = self.take(ids)
        return normalize(rows, self.lengths[ids], dtype) if distance.normalized else rows.to(dtype)

    def check(self, distance: Distance) -> None:
        """Check every row, and learn the rows' lengths if the distance is one of directions.

        Raises:
            ValueError: If a row is not finite as stored or, under cosine, zero; names the first ones.
        """
        if distance.normalized:
            self._lengths = torch.empty(len(self), dtype=torch.float64, device=self.device)
        for start, block in self.blocks(max(1, _CHECKED // self.dim)):
            check_finite(block, "features", start)
            if self._lengths is not None:
                self._lengths[start : start + len(block)] = scaled_lengths(block)
        if self._lengths is not None and (zero := ~(self._lengths > 0)).any():
            refuse_zero(zero, "features")


def _least_dtype(data: Tensor, normalized: bool) -> torch.dtype:
    holds = data.dtype == torch.float64 and float32_holds(data, normalized=normalized)
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


def as_queries(queries: Tensor | np.ndarray, rows: StoredRows, distance: Distance, *, checked: bool = False) -> Tensor:
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
    check_comparable(matrix, "queries", normalized=distance.normalized)
    return matrix
