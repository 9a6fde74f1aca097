"""Principal axes of a bank, fitted block by block in float64, and the same signs on every machine."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from faiss_knn.offline.lazy_rows import RowSource, read_rows, spans

_BLOCK_VALUES = 1 << 22
_LEAST = 1e-12  # of the largest variance: what is below is rounding


class Axes(NamedTuple):
    """Where rows are looked at from, and along what.

    Attributes:
        mean: (d,) float64.
        directions: (d, D) float64, those of largest variance first; divided by the deviation along them if whitened.
    """

    mean: Tensor
    directions: Tensor


def mean_of(rows: RowSource) -> Tensor:
    """Average the rows that are finite, (d,) float64; zero if there is none."""
    total, count = torch.zeros(rows.shape[1], dtype=torch.float64, device="cpu"), 0
    for block in _finite_blocks(rows):
        total += block.sum(0).cpu()
        count += len(block)
    return total / max(1, count)


def principal_axes(rows: RowSource, count: int | None = None, *, whiten: bool = False, argument: str = "pca") -> Axes:
    """Find the axes along which rows vary most: eigenvectors of their covariance (1 / N), both in float64.

    Of each axis the component of largest size is positive, the first of equal ones.

    Args:
        rows: (N, d); those that are not finite are left out.
        count: D, how many axes; None: all along which rows vary.
        whiten: Divide each by the deviation of the rows along it.
        argument: Names `count` in errors.

    Raises:
        ValueError: If rows vary along fewer axes: by more than a millionth of the largest deviation.

    Example:
        >>> mean, directions = principal_axes(torch.tensor([[0.0, 3.0], [0.0, 1.0], [1.0, 2.0], [-1.0, 2.0]]), 1)
        >>> principal_axes(torch.tensor([[0.0, 3.0], [0.0, 1.0]])).directions.abs()
        tensor([[0.],
                [1.]], dtype=torch.float64)
    """
    mean = mean_of(rows)
    width, seen = rows.shape[1], 0
    products = torch.zeros(width, width, dtype=torch.float64, device="cpu")
    for block in _finite_blocks(rows):
        centred = block - mean.to(block.device)
        products += (centred.T @ centred).cpu()
        seen += len(block)
    variances, vectors = torch.linalg.eigh(products / max(1, seen))
    variances, vectors = variances.flip(0), vectors.flip(1)
    varying = int((variances > _LEAST * variances[0]).sum()) if float(variances[0]) > 0 else 0
    if (count or 1) > varying:
        raise ValueError(f"`{argument}` must be at most {varying}, the axes along which the bank varies, got {count}")
    count = varying if count is None else count
    directions = vectors[:, :count]
    largest = directions.abs().argmax(0, keepdim=True)
    directions = directions * torch.where(directions.gather(0, largest) < 0, -1.0, 1.0)
    return Axes(mean, directions / variances[:count].sqrt() if whiten else directions)


def _finite_blocks(rows: RowSource) -> Any:
    for start, stop in spans(len(rows), max(1, _BLOCK_VALUES // rows.shape[1])):
        read = read_rows(rows, start, stop)
        block = read.double() if isinstance(read, Tensor) else torch.from_numpy(np.array(read, np.float64))
        yield block[block.isfinite().all(1)]
