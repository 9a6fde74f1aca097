"""Features made ready to be compared: the bank's mean subtracted, rows divided by their lengths."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.offline.lazy_rows import RowSource, read_rows, spans
from faiss_knn.offline.task import EvalTask, LabelledRows
from faiss_knn.search.distance import directions
from faiss_knn.search.inputs import is_memmap

_BLOCK_VALUES = 1 << 22


class PreparedRows:
    """Rows of another array, prepared as they are read: float64 for those of float64, else float32.

    Args:
        rows: (N, d), where to read.
        mean: (d,) float64, to be subtracted; None: nothing.
        unit: Whether rows are divided by their lengths; those that are zero stay so.

    Example:
        >>> rows = PreparedRows(np.array([[3.0, 5.0], [0.0, 1.0]]), torch.tensor([0.0, 1.0]).double(), unit=True)
        >>> rows[0:2]
        array([[0.6, 0.8],
               [0. , 0. ]])
    """

    def __init__(self, rows: RowSource, mean: Tensor | None, *, unit: bool) -> None:
        self._rows, self._mean, self._unit = rows, mean, unit
        self.shape = rows.shape
        is_double = rows.dtype in (torch.float64, np.dtype(np.float64))
        self._torch_dtype = torch.float64 if is_double else torch.float32
        self._is_tensor = isinstance(rows[:0], Tensor)
        self.dtype: Any = self._torch_dtype if self._is_tensor else np.dtype(np.float64 if is_double else np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: Any) -> Any:
        block = _as_float64(self._rows[wanted])
        if self._mean is not None:
            block = block - self._mean.to(block.device)
        block = (directions(block) if self._unit else block).to(self._torch_dtype)
        return block if self._is_tensor else block.numpy()


def prepare(task: EvalTask, *, center: bool, unit: bool) -> EvalTask:
    """Return the task with its features prepared: at once where they are in memory, else as they are read.

    Args:
        task: Bank and queries.
        center: Whether the mean of the bank's labelled rows, those that are finite, is subtracted from all rows.
        unit: Whether rows are divided by their lengths, after that.
    """
    if not center and not unit:
        return task
    mean = _mean(task.bank.rows) if center else None

    def prepared(side: LabelledRows) -> LabelledRows:
        rows: RowSource = PreparedRows(side.rows, mean, unit=unit)
        in_memory = isinstance(side.rows, Tensor) or (isinstance(side.rows, np.ndarray) and not is_memmap(side.rows))
        return replace(side, rows=rows[:] if in_memory else rows)

    bank = prepared(task.bank)
    return replace(task, bank=bank, queries=bank if task.leave_one_out else prepared(task.queries))


def _mean(rows: RowSource) -> Tensor:
    """(d,) float64 mean of the finite rows, zero if there is none."""
    total, count = torch.zeros(rows.shape[1], dtype=torch.float64, device="cpu"), 0
    for start, stop in spans(len(rows), max(1, _BLOCK_VALUES // rows.shape[1])):
        block = _as_float64(read_rows(rows, start, stop))
        block = block[block.isfinite().all(1)]
        total += block.sum(0).cpu()
        count += len(block)
    return total / max(1, count)


def _as_float64(block: npt.NDArray[Any] | Tensor) -> Tensor:
    return block.double() if isinstance(block, Tensor) else torch.from_numpy(np.asarray(block, np.float64))
