"""Parquet files: tables of which vectors that are too many to be held are decoded a part at a time."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

from faiss_knn.offline.column_files import Member, column_array, members
from faiss_knn.offline.remote import FilePath

_HELD_BYTES = 1 << 30  # up to which an array is read as a whole
_DECODED_BYTES = 16 << 20  # at once
_READ_BYTES = 64 << 20  # at once, of all columns together; of each one
_LEAST_READ, _MOST_READ = 1 << 16, 4 << 20


def open_parquet(path: FilePath) -> dict[str, Member]:
    """Open a Parquet file; of vectors of more than 1 GiB a part is decoded when it is asked for."""
    from pyarrow import parquet  # an extra

    with _source(path) as source, parquet.ParquetFile(source) as file:
        schema, length = file.schema_arrow, file.metadata.num_rows

    def read(names: list[str], _: bool) -> Any:
        with _source(path) as source, parquet.ParquetFile(source, memory_map=True) as file:
            return file.read(columns=names).select(names)

    arrays = members(schema, length, read)
    vectors = {name: member for name, member in arrays.items() if len(member.shape) == 2}
    return arrays | {
        name: replace(member, read=partial(_held_or_decoded, path, member, list(member.columns) or [name]))
        for name, member in vectors.items()
    }


def _source(path: FilePath) -> Any:
    """What pyarrow reads from: the path, or an open file of another file system, as a context."""
    return nullcontext(path) if isinstance(path, Path) else path.open()


def _held_or_decoded(path: FilePath, member: Member, names: list[str]) -> Any:
    rows = ParquetRows(path, names, member.shape[0], member.dtype)
    return rows if math.prod(rows.shape) * rows.dtype.itemsize > _HELD_BYTES else member.read()


class ParquetRows:
    """Vectors of a Parquet file, decoded in order: one pass over them reads the file once.

    What lies before the place that it has come to is read again, from the row group's beginning.

    Args:
        path: The file.
        names: The column of lists, or the columns of numbers that make a row.
        length: N.
        dtype: Of the numbers.

    Raises:
        ValueError: When rows are read that have nulls, or not as many numbers as others.
    """

    def __init__(self, path: FilePath, names: list[str], length: int, dtype: np.dtype[Any]) -> None:
        from pyarrow import parquet  # an extra

        buffer_size = min(_MOST_READ, max(_LEAST_READ, _READ_BYTES // len(names)))
        source = path if isinstance(path, Path) else path.open()
        self._file = parquet.ParquetFile(source, buffer_size=buffer_size, pre_buffer=False)  # which would hold it all
        self._names, self._lock = names, Lock()
        groups = (self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups))
        self._starts = [0, *accumulate(groups)][:-1]
        self.dtype = dtype
        self.shape = (length, self._width() if length else 0)
        self._step = max(1, _DECODED_BYTES // max(1, self.shape[1] * dtype.itemsize))
        self._batches: Iterator[Any] = iter(())
        self._first, self._block = length, np.empty((0, self.shape[1]), dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | EllipsisType | npt.NDArray[np.integer]) -> npt.NDArray[Any]:
        with self._lock:  # of one place in the file
            if isinstance(rows, (slice, EllipsisType)):
                span = range(len(self))[slice(None) if rows is ... else rows]
                return self._span(min(span), max(span) + 1)[:: span.step] if span else self._span(0, 0)
            picked = [self._span(row, row + 1) for row in np.asarray(rows).tolist()]
            return np.concatenate(picked) if picked else np.empty((0, self.shape[1]), self.dtype)

    def _width(self) -> int:
        if len(self._names) > 1:
            return len(self._names)
        first = self._rows(next(self._file.iter_batches(1, columns=self._names)), 0)
        return int(first.shape[1])

    def _span(self, start: int, stop: int) -> npt.NDArray[Any]:
        out = np.empty((stop - start, self.shape[1]), self.dtype)
        at = start
        while at < stop:
            self._go_to(at)
            part = self._block[at - self._first : stop - self._first]
            out[at - start : at - start + len(part)] = part
            at += len(part)
        return out

    def _go_to(self, row: int) -> None:
        """Decode up to the block that holds this row, from its row group's beginning if that is nearer."""
        group = bisect_right(self._starts, row) - 1
        if row < self._first or self._starts[group] > self._first + len(self._block):
            groups = list(range(group, len(self._starts)))
            self._batches = self._file.iter_batches(self._step, row_groups=groups, columns=self._names)
            self._first, self._block = self._starts[group], self._block[:0]
        while row >= self._first + len(self._block):
            self._first += len(self._block)
            self._block = self._rows(next(self._batches), self._first)
            if self._block.shape[1] != self.shape[1]:
                raise ValueError(
                    f"column {self._names[0]!r} holds vectors of different lengths, {self.shape[1]} in row 0, but not "
                    f"in {self._first}"
                )

    def _rows(self, batch: Any, first: int) -> npt.NDArray[Any]:
        import pyarrow as pa

        columns = [column_array(name, pa.chunked_array([batch.column(name)]), first) for name in self._names]
        return columns[0] if columns[0].ndim == 2 else np.stack(columns, axis=1)
