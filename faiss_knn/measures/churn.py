"""Churn: which share of their nearest neighbours samples have exchanged, from one time to the next."""

import numpy as np
import numpy.typing as npt

from faiss_knn.measures.overlap import Indices, overlap_by_query
from faiss_knn.search.inputs import shown


def neighbor_churn(ids_before: Indices, lists_before: Indices, ids_now: Indices, lists_now: Indices) -> float:
    """Return the mean share of neighbours that are not in a sample's list any more.

    1 minus the overlap of `overlap_by_query`, |A ∩ B| / k, over the samples of which there are both lists.

    Args:
        ids_before: (Q,) sample ids, each once.
        lists_before: (Q, k) sample ids of their nearest neighbours, -1 where missing.
        ids_now: (Q',) sample ids, each once, in any order.
        lists_now: (Q', k) sample ids of their nearest neighbours now.

    Returns:
        In [0, 1]; NaN where no sample has both lists.

    Raises:
        ValueError: If an id stands twice, or lists do not fit.

    Example:
        >>> before, now = np.array([[11, 12], [10, 12]]), np.array([[13, 12], [11, 12]])
        >>> neighbor_churn(np.array([10, 11]), before, np.array([11, 10]), now)
        0.25
    """
    for name, ids, lists in (("before", ids_before, lists_before), ("now", ids_now, lists_now)):
        _check(name, ids, lists)
    if lists_before.shape[1] != lists_now.shape[1]:
        raise ValueError(
            f"`lists_now` must be as long as `lists_before`, {lists_before.shape[1]}, got {lists_now.shape[1]}"
        )
    _, before, now = np.intersect1d(ids_before, ids_now, assume_unique=True, return_indices=True)
    if not len(before):
        return float("nan")
    agreement: npt.NDArray[np.float64] = overlap_by_query(lists_before[before], lists_now[now], lists_now.shape[1])
    return 1.0 - float(agreement.mean())


def _check(name: str, ids: Indices, lists: Indices) -> None:
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"`ids_{name}` must be (Q,) integer sample ids, got {shown(ids)}")
    if not isinstance(lists, np.ndarray) or lists.ndim != 2 or len(lists) != len(ids):
        raise ValueError(
            f"`lists_{name}` must be (Q, k) sample ids, one list for each of {len(ids)}, got {shown(lists)}"
        )
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"`ids_{name}` must hold each sample once")
