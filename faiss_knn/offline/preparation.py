"""Features made ready to be compared: the bank's mean subtracted, turned to its axes, cut, divided by their lengths."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.offline.lazy_rows import RowSource
from faiss_knn.offline.principal import mean_of, principal_axes
from faiss_knn.offline.task import EvalTask, LabelledRows
from faiss_knn.search.distance import directions
from faiss_knn.search.inputs import is_memmap


@dataclass(frozen=True)
class Steps:
    """What is done to each row, in this order, in float64.

    Attributes:
        unit_first: Divide it by its length; a row of zeros stays so.
        mean: (d,) float64, subtracted; None: nothing.
        axes: (d, D) float64, multiplied by.
        width: How many of the first columns are kept; None: all.
        unit: Divide it by its length.

    Example:
        >>> Steps(mean=torch.tensor([0.0, 1.0]).double(), unit=True).apply(torch.tensor([[3.0, 5.0]]).double())
        tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """

    unit_first: bool = False
    mean: Tensor | None = None
    axes: Tensor | None = None
    width: int | None = None
    unit: bool = False

    def apply(self, rows: Tensor) -> Tensor:
        """Return (n, D) float64 of (n, d)."""
        if self.unit_first:
            rows = directions(rows)
        if self.mean is not None:
            rows = rows - self.mean.to(rows.device)
        if self.axes is not None:
            rows = rows @ self.axes.to(rows.device)
        rows = rows[:, : self.width]
        return directions(rows) if self.unit else rows

    def width_of(self, width: int) -> int:
        """Tell how wide rows become."""
        turned = width if self.axes is None else self.axes.shape[1]
        return turned if self.width is None else min(turned, self.width)


class PreparedRows:
    """Rows of another array, prepared as they are read: float64 for those of float64, else float32.

    Args:
        rows: (N, d), where to read.
        steps: What is done to them.

    Example:
        >>> rows = PreparedRows(np.array([[3.0, 4.0], [0.0, 1.0]]), Steps(unit=True))
        >>> rows[0:2]
        array([[0.6, 0.8],
               [0. , 1. ]])
    """

    def __init__(self, rows: RowSource, steps: Steps) -> None:
        self._rows, self._steps = rows, steps
        self.shape = (len(rows), steps.width_of(rows.shape[1]))
        is_double = rows.dtype in (torch.float64, np.dtype(np.float64))
        self._torch_dtype = torch.float64 if is_double else torch.float32
        self._is_tensor = isinstance(rows[:0], Tensor)
        self.dtype: Any = self._torch_dtype if self._is_tensor else np.dtype(np.float64 if is_double else np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: Any) -> Any:
        block = self._steps.apply(_as_float64(self._rows[wanted])).to(self._torch_dtype)
        return block if self._is_tensor else block.numpy()


def prepare(
    task: EvalTask, *, center: bool = False, unit: bool = False, pca: int | None = None, whiten: bool = False
) -> EvalTask:
    """Return the task with its features prepared: at once where they are in memory, else as they are read.

    All is fitted on the bank's labelled rows, those that are finite, and done to the queries alike.

    Args:
        task: Bank and queries.
        center: Whether the bank's mean is subtracted; `pca` and `whiten` do so too.
        unit: Whether rows are divided by their lengths, after all else.
        pca: How many principal axes are kept; None: rows are not turned.
        whiten: Whether the bank's deviation along each axis is made 1; axes without any are left out.

    Raises:
        ValueError: If the bank varies along fewer axes than `pca`.
    """
    if pca is not None or whiten:
        mean, axes = principal_axes(task.bank.rows, pca, whiten=whiten)
        return with_steps(task, Steps(mean=mean, axes=axes, unit=unit))
    if not center and not unit:
        return task
    return with_steps(task, Steps(mean=mean_of(task.bank.rows) if center else None, unit=unit))


def with_steps(task: EvalTask, steps: Steps) -> EvalTask:
    """Return the task with the steps done to bank and queries."""
    bank = _prepared(task.bank, steps)
    return replace(task, bank=bank, queries=bank if task.leave_one_out else _prepared(task.queries, steps))


def _prepared(side: LabelledRows, steps: Steps) -> LabelledRows:
    rows: RowSource = PreparedRows(side.rows, steps)
    in_memory = isinstance(side.rows, Tensor) or (isinstance(side.rows, np.ndarray) and not is_memmap(side.rows))
    return replace(side, rows=rows[:] if in_memory else rows)


def _as_float64(block: npt.NDArray[Any] | Tensor) -> Tensor:
    return block.double() if isinstance(block, Tensor) else torch.from_numpy(np.array(block, np.float64))
