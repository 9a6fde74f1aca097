"""verify_neighbors(): how right anybody's lists of neighbours are, measured against the exact ones."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.measures.overlap import count_common
from faiss_knn.offline.lazy_rows import RowSource, read_rows
from faiss_knn.offline.neighbors import as_reported, as_sides, is_tied
from faiss_knn.offline.search import QUERY_BLOCK, Span
from faiss_knn.offline.streaming import Bank, find_nearest
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines.rerank import Neighbors, drop_self, measure, ordered_by
from faiss_knn.search.index import KNNIndex
from faiss_knn.search.inputs import shown
from faiss_knn.search.precision import full_precision
from faiss_knn.search.stored_rows import as_queries

DISTANCE_TOLERANCE = 1e-5  # relative, of distances that others measured
_OF_ONE = 1e-6  # what 1 - cos loses in float32, whatever it comes to
_WORST = 10

Ids = npt.NDArray[np.int64]


def verify_neighbors(
    indices: Any,
    features: Any,
    queries: Any = None,
    *,
    distances: Any = None,
    distance_metric: str,
    progress: bool | None = False,
) -> dict[str, Any]:
    """Certify lists of neighbours that any program found: search exactly and compare.

    Where the queries are the bank's own rows, a row is not expected in its own list, unless most lists hold their own.

    Args:
        indices: (Q, K) row numbers of `features`, in any order, -1 where a list is shorter.
        features: (N, d), as `exact_neighbors` takes them.
        queries: (Q, d); None: the bank's own rows.
        distances: (Q, K) that were found, to be checked; None: not checked.
        distance_metric: As in `exact_neighbors`.
        progress: Show a bar; None: if stderr is a terminal.

    Returns:
        - `recall_ids`: share of the exact neighbours, ties by index, that are in the lists.
        - `recall_distances`: share of them that the lists hold, or another row as near in their place: rows of a list,
          each once, whose true distance is at most that of the K-th exact neighbour. Ties for the last place count.
        - `ties`: queries whose K-th exact neighbour has the same distance as a row after it, so that more than one list
          is right.
        - `wrong_distances`: how many of `distances` are off by more than 1e-5 of the true one (with "cosine", and 1e-6
          more); None if none were given.
        - `worst`: numbers of up to ten queries whose lists are least right, by `recall_distances`, then by wrong
          distances; only of lists that are not.
        - `worst_recalls`: `recall_distances` of each of these.
        - `repeated`: entries that name a row a second time in a list; `missing`: entries that are -1 though there are
          rows enough.
        - `queries`, `rows`, `k` (K, at most the rows that there are), `excludes_self`.

    Raises:
        ValueError: If shapes do not fit, an index is no row of the bank, or the features are unfit.

    Example:
        >>> rows = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
        >>> report = verify_neighbors([[1], [2], [1], [2]], rows, distance_metric="euclidean")
        >>> report["recall_ids"], report["worst"], report["worst_recalls"]
        (0.75, [1], [0.0])
    """
    get_distance(distance_metric)
    bank, query_rows = as_sides(features, queries, exclude_self=False)
    lists = _as_lists(indices, len(query_rows), len(bank))
    given = None if distances is None else _as_distances(distances, lists)
    own = np.arange(len(lists))[:, None] if queries is None else None
    excludes_self = own is not None and bool((lists == own).any(1).mean() <= 0.5)
    reachable = len(bank) - excludes_self
    k = min(lists.shape[1], reachable)
    if k == 0:
        raise ValueError("`features` must hold two rows or more for a row to have a neighbour, got 1")
    true = _True(lists, query_rows, distance_metric)
    neighbors = find_nearest(
        Bank(bank, distance_metric), query_rows, k + 1 + excludes_self, watch=true.watch, progress=progress
    )
    if excludes_self:
        neighbors = Neighbors(*drop_self(*neighbors, torch.arange(len(lists), device=neighbors.indices.device)))
    exact = as_reported(neighbors, distance_metric)
    judged = _Judged(
        lists, as_reported(true.found, distance_metric).distances.numpy(), exact, k, own if excludes_self else None
    )
    wrong = None if given is None else _wrong(given, judged, distance_metric)
    worst = _worst(judged.near, wrong)
    return {
        "recall_ids": float(judged.same.mean()),
        "recall_distances": float(judged.near.mean()),
        "ties": int(is_tied(exact, k).sum()),
        "wrong_distances": None if wrong is None else int(wrong.sum()),
        "worst": worst.tolist(),
        "worst_recalls": judged.near[worst].tolist(),
        "repeated": int(judged.is_repeated.sum()),
        "missing": int(np.maximum(k - (lists >= 0).sum(1), 0).sum()),
        "queries": len(lists),
        "rows": len(bank),
        "k": k,
        "excludes_self": excludes_self,
    }


class _True:
    """Measures the listed rows while the bank passes by: exact distances of every pair."""

    def __init__(self, lists: Ids, queries: RowSource, distance_metric: str) -> None:
        self.lists, self.queries = torch.from_numpy(lists), queries
        self.distance = ordered_by(get_distance(distance_metric))
        self.found = Neighbors(torch.full(lists.shape, torch.inf, dtype=torch.float64), self.lists)

    def watch(self, part: Span, block: Span, index: KNNIndex) -> None:
        """Measure those of some queries' rows that are in a block, over which the index is."""
        ids = self.lists[slice(*part)]
        query, place = ((ids >= block[0]) & (ids < block[1])).nonzero().unbind(1)
        if len(query) == 0:
            return
        rows, _ = index._built()
        with full_precision(rows.device):
            asked = as_queries(read_rows(self.queries, *part), rows, self.distance, checked=True)
            pairs = (ids[query, place] - block[0])[:, None].to(rows.device)
            measured = measure(asked, rows, pairs, self.distance, of=query.to(rows.device))
        self.found.distances[slice(*part)][query, place] = measured[:, 0].cpu()


class _Judged:
    """What lists are worth beside the exact ones.

    Attributes:
        true: (Q, K) float32 true distances of the listed rows, inf where missing.
        is_repeated: (Q, K) entries that name a row a second time.
        same: (Q,) share of the exact neighbours in the list.
        near: (Q,) share of rows in the list that are no farther than the last exact neighbour.
    """

    def __init__(self, lists: Ids, true: npt.NDArray[np.float32], exact: Neighbors, k: int, own: Ids | None) -> None:
        self.true = true
        self.is_listed = lists >= 0
        self.is_repeated = _repeated(lists)
        counted = self.is_listed & ~self.is_repeated
        if own is not None:
            counted &= lists != own
        limits = exact.distances[:, k - 1 : k].cpu().numpy()
        self.near = np.minimum((counted & (true <= limits)).sum(1), k) / k
        ids = exact.indices[:, :k].cpu().numpy()
        same = [count_common(np.where(counted[a:b], lists[a:b], -1), ids[a:b]) for a, b in _blocks(len(lists))]
        self.same = np.concatenate(same) / k


def _blocks(length: int) -> Iterator[Span]:
    yield from ((start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK))


def _repeated(lists: Ids) -> npt.NDArray[np.bool_]:
    """Mark entries (Q, K) whose row stands in the list before them."""
    order = np.argsort(lists, axis=1, kind="stable")
    ordered = np.take_along_axis(lists, order, 1)
    again = np.zeros(lists.shape, bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    is_repeated = np.zeros(lists.shape, bool)
    np.put_along_axis(is_repeated, order, again, 1)
    return is_repeated


def _wrong(given: npt.NDArray[np.float64], judged: _Judged, distance_metric: str) -> Ids:
    """Count the given distances that are not those of their rows, (Q,)."""
    true = judged.true.astype(np.float64)
    slack = DISTANCE_TOLERANCE * np.abs(true) + (_OF_ONE if distance_metric == "cosine" else 0.0)
    with np.errstate(invalid="ignore"):  # inf - inf, where no row is listed
        is_right = np.abs(given - true) <= slack
    wrong: Ids = (judged.is_listed & ~is_right).sum(1)
    return wrong


def _worst(recalls: npt.NDArray[np.float64], wrong: Ids | None) -> Ids:
    errors = np.zeros(len(recalls), np.int64) if wrong is None else wrong
    order = np.lexsort((-errors, recalls))[:_WORST]
    return order[(recalls[order] < 1) | (errors[order] > 0)]


def _as_lists(indices: Any, queries: int, rows: int) -> Ids:
    lists = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    if lists.ndim != 2 or lists.dtype.kind not in "iu" or lists.shape[1] == 0:
        raise ValueError(f"`indices` must be a (Q, K) array of row numbers, got {shown(indices)} of {lists.dtype}")
    if len(lists) != queries:
        raise ValueError(f"`indices` must have a list for each of the {queries} queries, got {len(lists)}")
    lists = lists.astype(np.int64)
    if lists.min() < -1 or lists.max() >= rows:
        odd = int(lists.min()) if lists.min() < -1 else int(lists.max())
        query = int(np.flatnonzero((lists == odd).any(1))[0])
        raise ValueError(
            f"`indices` must be row numbers of the bank, 0 to {rows - 1}, or -1 for none, got {odd} in list {query}"
        )
    return lists


def _as_distances(distances: Any, lists: Ids) -> npt.NDArray[np.float64]:
    given = np.asarray(distances.cpu() if isinstance(distances, Tensor) else distances)
    if given.shape != lists.shape or given.dtype.kind not in "fiu":
        raise ValueError(
            f"`distances` must be numbers of the shape of `indices`, {lists.shape}, got {shown(distances)}"
        )
    return given.astype(np.float64)
