"""Rows of features wherever they lie: in memory, memory-mapped, in several files, or picked from others."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class RowSource(Protocol):
    """Rows that are read a slice at a time: an ndarray, a memmap, a tensor, an HDF5 dataset, `Shards` or a `Subset`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, d)."""
        ...

    @property
    def dtype(self) -> Any:
        """Of numpy, or of torch for a tensor."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class Shards:
    """Arrays of one row shape, seen as one array without copying them together.

    Args:
        parts: Non-empty sequence of rows with equal trailing shape.

    Example:
        >>> both = Shards([np.zeros((2, 3)), np.ones((1, 3))])
        >>> both.shape, both[1:3].sum(), both[[0, 2]].shape
        ((3, 3), np.float64(3.0), (2, 3))
    """

    def __init__(self, parts: Sequence[RowSource]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))
        self.shape = (self._ends[-1], *self.parts[0].shape[1:])
        self.dtype = np.result_type(*(part.dtype for part in self.parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[Any]:
        if isinstance(rows, slice):
            return self._span(*rows.indices(len(self)))
        numbers = np.asarray(rows)
        out = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        homes = np.searchsorted(self._ends, numbers, side="right")
        for home in np.unique(homes):
            here = homes == home
            out[here] = self.parts[home][numbers[here] - self._start(home)]
        return out

    def _span(self, start: int, stop: int, step: int) -> npt.NDArray[Any]:
        first = bisect_right(self._ends, start)
        pieces = []
        for i in range(first, len(self.parts)):
            offset = self._start(i)
            if offset >= stop:
                break
            pieces.append(self.parts[i][max(start - offset, 0) : stop - offset])
        joined = np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)
        return joined[::step]

    def _start(self, part: int) -> int:
        return self._ends[part - 1] if part else 0


class OneAtATime:
    """Arrays of files that are read as a whole, of which the last one alone is held.

    Example:
        >>> files = OneAtATime()
        >>> rows = files.rows(lambda: np.ones((3, 2)), (3, 2), np.dtype(float))
        >>> rows[1:].shape
        (2, 2)
    """

    def __init__(self) -> None:
        self._held: tuple[_Reread, Any] | None = None

    def rows(self, read: Callable[[], Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> "_Reread":
        """Give an array that `read` reads whenever it is asked for and is not the last one that was."""
        return _Reread(self, read, shape, dtype)

    def array(self, rows: "_Reread") -> Any:
        """Return the whole array."""
        held = self._held  # of several threads each goes by what it saw
        if held is None or held[0] is not rows:
            self._held = held = None  # before the next one is read
            self._held = held = (rows, rows.read())
        return held[1]


class _Reread:
    def __init__(
        self, files: OneAtATime, read: Callable[[], Any], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._files, self.read, self.shape, self.dtype = files, read, shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        return self._files.array(self)[rows]


class Subset:
    """Some of the rows of another array, read when asked for.

    Args:
        rows: Where to read.
        ids: (M,) ascending row numbers in `rows`.

    Example:
        >>> some = Subset(np.arange(10).reshape(5, 2), np.array([1, 4]))
        >>> some.shape, some[1:].tolist()
        ((2, 2), [[8, 9]])
    """

    def __init__(self, rows: RowSource, ids: npt.NDArray[np.int64]) -> None:
        self.rows = rows
        self.ids = ids
        self.shape = (len(ids), *rows.shape[1:])
        self.dtype = rows.dtype

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, wanted: Any) -> Any:
        ids = self.ids[wanted]
        return self.rows[torch.from_numpy(ids).to(self.rows.device) if isinstance(self.rows, Tensor) else ids]


def read_rows(rows: RowSource, start: int = 0, stop: int | None = None) -> npt.NDArray[Any] | Tensor:
    """Read rows [start, stop) as a floating-point array or tensor; without a copy where they are one already."""
    block: npt.NDArray[Any] | Tensor = rows[start : len(rows) if stop is None else stop]
    if isinstance(block, Tensor):
        return block if block.is_floating_point() else block.float()
    if block.dtype.kind != "f":
        return block.astype(np.float32)
    return block if block.dtype.isnative else block.astype(block.dtype.newbyteorder("="))


def spans(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of consecutive blocks.

    Example:
        >>> list(spans(5, 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, length, size):
        yield start, min(start + size, length)
