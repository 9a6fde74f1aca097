"""Find queries that are in the bank, also where the copy was rounded or scaled: such queries leak."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.offline.lazy_rows import read_rows, spans
from faiss_knn.offline.task import EvalTask

_ROUNDING = 2.0**-8  # of bfloat16, relative to each number: the coarsest dtype that features are saved in
_FAR_NEARER = 0.1  # of the distance at which queries have another neighbour
_SAMPLE = 1024  # queries that show how far their neighbours are
_OTHERS = 10  # neighbours among which another one is, where the bank holds a row several times

Floats = npt.NDArray[np.floating[Any]]


class Copies(NamedTuple):
    """How many queries are a row of the bank.

    Attributes:
        equal: Number by number.
        near: Not so, but as near as a copy that was rounded to half precision or, under cosine, scaled.
    """

    equal: int
    near: int


def count_copies(task: EvalTask, distances: Tensor, indices: Tensor, distance_metric: str) -> Copies:
    """Compare each query with its nearest bank row.

    By inner products, of which that with its copy need not be the largest, with the ten nearest, as far as there are.

    It is a near copy if no difference is beyond the rounding of bfloat16 and the row is nearer, by far, than where
    queries ordinarily have another neighbour: in a bank whose rows all lie that close together, none is.

    Args:
        task: Bank and queries.
        distances: (Q, K) of the exact neighbours, ascending.
        indices: (Q, K) places in the bank.
        distance_metric: Of the distances.
    """
    by_product = distance_metric == "dot"
    compared = indices[:, : _OTHERS if by_product else 1]
    bound = _FAR_NEARER * _ordinary(_gaps(task, compared[:_SAMPLE]) if by_product else distances, distance_metric)
    equal = near = 0
    for a, b in spans(len(task.queries.rows), 4096):
        is_equal, is_near = np.zeros(b - a, bool), np.zeros(b - a, bool)
        for column in compared[a:b].T:
            order, rows, queries = _side_by_side(task, column, a)
            is_equal[order] |= (rows == queries).all(1)
            is_near[order] |= _is_near(rows, queries, bound, distance_metric)
        equal += int(is_equal.sum())
        near += int((is_near & ~is_equal).sum())
    return Copies(equal, near)


def _side_by_side(
    task: EvalTask, column: Tensor, first: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]:
    """Read the bank rows of `column` (n,) beside their queries, those from `first` on, (n, d) each, and their order.

    Where there is no row, -1, the bank's first one stands: it is among the others of that query.
    """
    nearest = column.clamp(min=0).cpu().numpy()
    order = np.argsort(nearest, kind="stable")  # files are read in ascending order
    places, back = np.unique(nearest[order], return_inverse=True)
    rows = _on_host(read_rows(task.bank.pick(places).rows))[back]
    return order, rows, _on_host(read_rows(task.queries.rows, first, first + len(nearest)))[order]


def _gaps(task: EvalTask, indices: Tensor) -> Tensor:
    """Measure Euclidean lengths (n, K) between the first queries and bank rows (n, K)."""
    gaps = torch.full(indices.shape, torch.inf, dtype=torch.float64, device="cpu")
    for number, column in enumerate(indices.T):
        order, rows, queries = _side_by_side(task, column, 0)
        lengths = _lengths(rows.astype(np.float64) - queries.astype(np.float64))
        gaps[torch.from_numpy(order), number] = torch.from_numpy(lengths)
    return gaps.masked_fill(indices.cpu() < 0, torch.inf)


def _ordinary(distances: Tensor, distance_metric: str) -> float:
    """Find the median distance to the farthest of the first neighbours, as a length; inf if one alone is known."""
    if distances.shape[1] < 2:
        return float("inf")
    near = distances[:, :_OTHERS]
    farthest = near.masked_fill(~near.isfinite(), -1).amax(1).double()
    median = max(0.0, float(farthest.median()))
    if distance_metric == "cosine":
        return float(np.sqrt(2 * median))  # between the ends of two unit vectors
    return float(np.sqrt(median)) if distance_metric == "squared_euclidean" else median


def _is_near(rows: Floats, queries: Floats, bound: float, distance_metric: str) -> npt.NDArray[np.bool_]:
    rows, queries = (_scaled(block.astype(np.float64), distance_metric) for block in (rows, queries))
    order = 1 if distance_metric == "manhattan" else 2
    gaps, lengths = (_lengths(block, order) for block in (rows - queries, rows))
    near: npt.NDArray[np.bool_] = (gaps <= _ROUNDING * lengths) & (gaps <= bound)
    return near


def _scaled(rows: Floats, distance_metric: str) -> Floats:
    """Scale rows so that their squares do not overflow; under cosine to length 1."""
    if distance_metric != "cosine":
        return rows
    rows = rows / np.abs(rows).max(1, keepdims=True)
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _lengths(rows: Floats, order: int = 2) -> Floats:
    """Compute norms (n,) of rows (n, d), whose squares float64 need not hold."""
    sizes = np.abs(rows).max(1)
    lengths: Floats = np.linalg.norm(rows / np.where(sizes > 0, sizes, 1.0)[:, None], order, axis=1) * sizes
    return lengths


def _on_host(block: npt.NDArray[Any] | Tensor) -> npt.NDArray[Any]:
    if not isinstance(block, Tensor):
        return block
    block = block.cpu()
    return np.asarray(block.float() if block.dtype == torch.bfloat16 else block)
