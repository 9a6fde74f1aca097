"""RingBuffer: the most recent rows, in one tensor; and what several of them that belong together have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from faiss_knn.distributed import all_or_none, gather_rows, rank_and_size
from faiss_knn.search.inputs import as_integer, as_positive, shown

Dim = int | Sequence[int] | None


class RingBuffer:
    """The last `length` rows appended, in one preallocated tensor.

    Position and fill are Python integers, so an append is one slice copy (two where it wraps): no sort, no copy of the
    buffer, no device synchronisation. What is not given is taken from the first rows.

    Args:
        length: Rows kept.
        dim: Trailing shape of a row: d, or a shape. None: that of the first rows.
        dtype: None: that of the first rows.
        device: None: that of the first rows.
        pin_memory: Whether a CPU buffer is page-locked, so that rows from a GPU are copied without waiting for them.

    Raises:
        ValueError: If `length` is not positive.

    Example:
        >>> ring = RingBuffer(3)
        >>> ring.append(torch.tensor([1, 2]))
        >>> ring.append(torch.tensor([3, 4]))
        >>> ring.latest(), ring.latest(2), len(ring)
        (tensor([2, 3, 4]), tensor([3, 4]), 3)
    """

    def __init__(
        self,
        length: int,
        dim: Dim = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.length = as_positive(length, "`length`")
        self.shape = row_shape(dim)
        self.dtype = as_dtype(dtype)
        self.device = as_device_or_none(device)
        self.pin_memory = pin_memory
        self._widens = dtype is None
        self._rows: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        # Where the next row goes, how many are filled, how many there ever were, and how many of the oldest an append
        # under way overwrites: replaced as one, so that an interrupt finds either the old rows or the new ones.
        self._state = 0, 0, 0, 0
        if self.shape is not None and dtype is not None and device is not None:
            self._rows = self._empty(self.shape)

    def __len__(self) -> int:
        _, filled, _, torn = self._state
        return min(filled, self.length - torn)

    @property
    def total(self) -> int:
        """How many rows were ever appended: the number of the next one. Rings of one step compare theirs."""
        return self._state[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the filled rows take."""
        return 0 if self._rows is None else self._rows[: len(self)].nbytes

    def append(self, rows: Tensor) -> None:
        """Copy rows in, the oldest making room; of more than `length` rows the last are kept.

        Args:
            rows: (n, *shape); detached, and cast to the buffer's dtype and device by the copy.

        Raises:
            ValueError: If they are no dense tensor of rows, their trailing shape is not the buffer's, or its dtype was
                given and cannot hold theirs.
        """
        _check_rows(rows)
        if self._rows is None or rows.shape[1:] != self.shape:
            self._allocate_for(rows)
        if rows.dtype != self.dtype:
            self._hold(rows.dtype)
        assert self._rows is not None
        rows = rows.detach()
        count = rows.shape[0]
        rows = rows[-self.length :] if count > self.length else rows
        n, start, filled, total = len(rows), self._state[0], len(self), self._state[2]
        self._state = start, filled, total, n
        fits = min(n, self.length - start)
        self._rows[start : start + fits].copy_(rows[:fits], non_blocking=self.pin_memory)
        if fits < n:
            self._rows[: n - fits].copy_(rows[fits:], non_blocking=self.pin_memory)
        if self.pin_memory and rows.is_cuda:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        self._state = (start + n) % self.length, min(self.length, filled + n), total + count, 0

    def latest(self, n: int | None = None, *, until: int | None = None) -> Tensor:
        """Copy out the `n` most recent rows, oldest first; all of them for None.

        Args:
            n: Rows wanted.
            until: Number of the first row that is too new; None: none is.

        Returns:
            (min(n, len), *shape); (0,) as long as nothing told the shape.
        """
        if self._rows is None:
            return torch.empty(0, *(self.shape or ()), dtype=self.dtype, device=self.device)
        if self._copied is not None:
            self._copied.synchronize()
        newer = 0 if until is None else min(max(0, self.total - until), len(self))
        n = len(self) - newer if n is None else min(as_integer(n, "`n`"), len(self) - newer)
        start = (self._state[0] - newer - n) % self.length
        if start + n <= self.length:
            return self._rows[start : start + n].clone()
        return torch.cat([self._rows[start:], self._rows[: start + n - self.length]])

    def resize(self, length: int) -> None:
        """Change the length and keep the most recent rows that fit."""
        if length != self.length:
            self.replace(self.latest(length), length, self.total)

    def replace(self, rows: Tensor | None, length: int | None = None, total: int | None = None) -> None:
        """Forget every row, then append `rows`; None leaves it empty.

        Args:
            rows: (n, *shape).
            length: The new length; None: as it is.
            total: How many rows there ever were; None: these.
        """
        length = length or self.length
        if self._rows is not None and length != self.length:
            self._rows = None
        count = 0 if rows is None else len(rows)
        self.length, self._state = length, (0, 0, 0 if total is None else total - count, 0)
        if rows is not None and count:
            self.append(rows)

    def move_to(self, device: torch.device, pin_memory: bool = False) -> None:
        """Keep the rows on a device, page-locked or not, from here on."""
        if self.device != device or self.pin_memory != pin_memory:
            rows, self._rows, self._copied = self.latest(), None, None
            self.device, self.pin_memory = device, pin_memory
            self.replace(rows if len(rows) else None, total=self.total)

    def count_from(self, total: int) -> None:
        """Let `total` be so many, and the next row's number with it."""
        start, filled, _, torn = self._state
        self._state = start, filled, total, torn

    @property
    def is_torn(self) -> bool:
        """Whether an append was interrupted, which took the oldest rows' places and is not to be read."""
        return self._state[3] > 0

    def drop_newest(self, n: int) -> None:
        """Forget the `n` most recent rows, as if they had not come; at most all."""
        start, filled, total = self._state[0], len(self), self.total
        forgotten = min(n, filled)
        self._state = (start - forgotten) % self.length, filled - forgotten, total - n, 0

    def drop_older(self, number: int) -> None:
        """Forget the rows before row `number`."""
        self._state = self._state[0], min(len(self), max(0, self.total - number)), self.total, 0

    def _hold(self, dtype: torch.dtype) -> None:
        """Make sure that rows of another dtype lose nothing but the precision that was asked for."""
        assert self.dtype is not None
        wider = _common_dtype(dtype, self.dtype)
        if wider == self.dtype or (not self._widens and self.dtype.is_floating_point and not dtype.is_complex):
            return
        if not self._widens:
            raise ValueError(
                f"`rows` must fit into the buffer's {self.dtype}, got {dtype}: cast them, or give no dtype"
            )
        rows, self._rows, self.dtype = self._rows, None, wider
        if rows is not None:
            widened = self._empty(tuple(rows.shape[1:]))
            widened.copy_(rows)
            self._rows = widened

    def _allocate_for(self, rows: Tensor) -> None:
        shape = tuple(rows.shape[1:])
        if self.shape is not None and shape != self.shape:
            expected = ", ".join(["n", *map(str, self.shape)]) + ("" if self.shape else ",")
            raise ValueError(f"`rows` must have shape ({expected}), got {tuple(rows.shape)}")
        self.shape = shape
        self.dtype = self.dtype or rows.dtype
        self.device = self.device or rows.device
        self._rows = self._empty(shape)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training
            return torch.empty(self.length, *shape, dtype=self.dtype, device=self.device, pin_memory=self.pin_memory)


class QueueStorage:
    """The rows of one key in one trainer, and what was read of them for the validation run under way.

    Args:
        ring: The rows.

    Example:
        >>> stored = QueueStorage(RingBuffer(2))
        >>> stored.ring.append(torch.tensor([1, 2, 3]))
        >>> stored.snapshot(length=2, gathered=True)
        tensor([2, 3])
    """

    def __init__(self, ring: RingBuffer) -> None:
        self.ring = ring
        self._validating = False
        self._local: Tensor | None = None
        self._gathered: tuple[Tensor, list[int]] | None = None

    def start_validation(self) -> None:
        """Keep the rows as they are until `end_validation`; they are read and gathered once."""
        self.end_validation()  # a run that an exception ended left its snapshot behind
        self._validating = True

    def end_validation(self) -> None:
        """Free the snapshot."""
        self._validating = False
        self._local = self._gathered = None

    def snapshot(self, length: int, gathered: bool, until: int | None = None) -> Tensor:
        """Copy of the last `length` rows, oldest first; `gathered`: of every rank, rank after rank.

        With several ranks and `gathered`, all must ask together. `until`: as in `RingBuffer.latest`.
        """
        if not gathered or rank_and_size()[1] == 1:
            return self._own(until)[-length:]
        with all_or_none():
            return self._of_all_ranks(length, until)

    def _own(self, until: int | None) -> Tensor:
        local = self.ring.latest(until=until) if self._local is None else self._local
        if self._validating:
            self._local = local
        return local

    def _of_all_ranks(self, length: int, until: int | None) -> Tensor:
        rows, counts = self._gathered or gather_rows(self._own(until))
        if self._validating:
            self._gathered = rows, counts
            self._local = torch.split(rows, counts)[rank_and_size()[0]]  # not a second copy
        if max(counts) <= length:
            return rows
        return torch.cat([part[-length:] for part in torch.split(rows, counts)])


def align(rings: Sequence[RingBuffer]) -> int:
    """Let rings that are appended to together end with the same row, also after an interrupt in between.

    A ring without rows begins where the others are. Rings of one length also begin with the same row, where the
    interrupted step took the place of others.

    Returns:
        How many rows were dropped of the ring that was furthest ahead.

    Example:
        >>> features, labels = RingBuffer(4), RingBuffer(4)
        >>> features.append(torch.tensor([1, 2, 3]))
        >>> labels.append(torch.tensor([1, 2]))
        >>> align([features, labels]), features.latest()
        (1, tensor([1, 2]))
    """
    end = min((ring.total for ring in rings if len(ring)), default=0)
    ahead = [ring.total - end if len(ring) else 0 for ring in rings]
    cut = [ring for ring, rows in zip(rings, ahead, strict=True) if rows or ring.is_torn]
    for ring, rows in zip(rings, ahead, strict=True):
        if rows:
            ring.drop_newest(rows)
        elif ring.total != end:
            ring.count_from(end)
    for ring in rings:
        if begins := [other.total - len(other) for other in cut if other.length == ring.length]:
            ring.drop_older(max(begins))
    return max(ahead, default=0)


def _check_rows(rows: Any) -> None:
    if not isinstance(rows, Tensor) or rows.layout != torch.strided or rows.is_nested or rows.ndim == 0:
        raise ValueError(f"`rows` must be a dense tensor with one row per sample, got {_described(rows)}")


def _described(rows: Any) -> str:
    return f"a {rows.layout} one" if isinstance(rows, Tensor) and rows.layout != torch.strided else shown(rows)


def as_dtype(dtype: Any) -> torch.dtype | None:
    """Return a torch dtype or None, and refuse all else with a ValueError."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype` must be a torch dtype, such as torch.float32, or None, got {shown(dtype)}")
    return dtype


def as_device_or_none(device: Any, argument: str = "`device`") -> torch.device | None:
    """Return a torch device from itself or its name, or None, and refuse all else with a ValueError."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{argument} must be a torch device or its name, got {shown(device)}") from error


def row_shape(dim: Any) -> tuple[int, ...] | None:
    """Return the trailing shape that a `dim` stands for, and refuse what is none with a ValueError."""
    if dim is None:
        return None
    sizes = tuple(dim) if isinstance(dim, Sequence) and not isinstance(dim, str) else (dim,)
    return tuple(as_positive(size, "`dim`") for size in sizes)


def shaped_rows(values: Tensor, dim: Dim) -> Tensor:
    """Give values the trailing shape that an int `dim` asks for: flattened, or with a column added."""
    if isinstance(dim, int) and values.ndim != 2:
        return values.unsqueeze(1) if values.ndim == 1 else values.flatten(1)
    return values


def _common_dtype(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Return a dtype that holds every value of both; where none does (int64 beside float32), float64."""
    wider = [one, other, torch.int16, torch.int32, torch.int64, torch.float32]
    return next((dtype for dtype in wider if _holds(dtype, one) and _holds(dtype, other)), torch.float64)


def _holds(wide: torch.dtype, dtype: torch.dtype) -> bool:
    """Tell whether each value of `dtype` is one of `wide` too."""
    if wide == dtype or wide.is_complex or dtype.is_complex:
        return wide == dtype or (wide.is_complex and torch.promote_types(wide, dtype) == wide)
    if dtype.is_floating_point:
        few, many = torch.finfo(dtype), torch.finfo(wide) if wide.is_floating_point else None
        return many is not None and many.eps <= few.eps and many.max >= few.max and many.tiny <= few.tiny
    low, high = _range(dtype)
    if wide.is_floating_point:
        return high <= 2 / torch.finfo(wide).eps
    return _range(wide)[0] <= low and high <= _range(wide)[1]


def _range(dtype: torch.dtype) -> tuple[int, int]:
    return (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
