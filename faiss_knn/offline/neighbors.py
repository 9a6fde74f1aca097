"""exact_neighbors(): the nearest rows of every query, certified, with ties whole where they are asked for."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.offline.lazy_rows import RowSource, Subset
from faiss_knn.offline.streaming import Bank, find_nearest
from faiss_knn.offline.task import as_rows
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines.rerank import Neighbors, drop_self
from faiss_knn.search.inputs import as_k, as_switch

__all__ = ["Neighbors", "exact_neighbors"]

_DEEPER = 4  # times as deep is searched for ties that did not end


def exact_neighbors(
    features: Any,
    queries: Any = None,
    k: int = 10,
    *,
    distance_metric: str,
    exclude_self: bool | None = None,
    ties: bool = False,
) -> Neighbors:
    """Find the k nearest rows of every query, exactly: as a float64 brute force orders them, ties by index.

    The rows are compared as they are given: float64 ones are never rounded to float32. What lies on disk is read in one
    pass, block by block.

    Args:
        features: (N, d) bank: tensor, ndarray, memmap, DataFrame, or `RowSource` that is read in blocks.
        queries: (Q, d), likewise; None: the bank's own rows.
        k: How many, at most as many as there are rows.
        distance_metric: "euclidean", "squared_euclidean", "cosine" (1 - cos), "manhattan" or "dot" (minus the inner
            product).
        exclude_self: Leave row i of `features` out of the list of query i; None: where `queries` is None.
        ties: Lengthen each list by all further rows whose distance, as returned in float32, is that of its k-th: every
            tie set is whole, and any k of a list with its k nearest among them are right. The result is as wide as the
            longest list, the others end in (inf, -1); its first k columns are those without `ties`.

    Returns:
        `Neighbors` on the queries' device: (Q, min(k, N)) float32 distances, ascending, and int64 row numbers; N counts
        one row less with `exclude_self`. `distances, indices = exact_neighbors(...)` takes it apart.

    Raises:
        ValueError: If an argument does not fit, a row is not finite or, under cosine, zero, no row is left to be a
            neighbour, or the tie sets are more than the memory holds.

    Example:
        >>> rows = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
        >>> exact_neighbors(rows, k=1, distance_metric="euclidean").indices.tolist()
        [[1], [0], [1], [2]]
        >>> distances, indices = exact_neighbors(rows, k=1, distance_metric="euclidean", ties=True)
        >>> indices.tolist()
        [[1, -1], [0, 2], [1, 3], [2, -1]]
    """
    k = as_k(k)
    get_distance(distance_metric)
    is_own = queries is None
    exclude_self = is_own if exclude_self is None else as_switch(exclude_self, "`exclude_self`")
    bank, query_rows = as_sides(features, queries, exclude_self)
    search = _Search(Bank(bank, distance_metric), query_rows, exclude_self, "features" if is_own else "queries")
    if not as_switch(ties, "`ties`"):
        return search.nearest(k)
    return _with_whole_ties(search, k)


def as_sides(features: Any, queries: Any, exclude_self: bool) -> tuple[RowSource, RowSource]:
    """Return bank and queries as rows that go together; the queries are the bank's where they are None.

    Raises:
        ValueError: If they do not.
    """
    bank = _as_matrix_rows(features, "features")
    query_rows = bank if queries is None else _as_matrix_rows(queries, "queries")
    if query_rows.shape[1] != bank.shape[1]:
        raise ValueError(
            f"`queries` must be as wide as the bank, d={bank.shape[1]}, got shape {tuple(query_rows.shape)}"
        )
    if exclude_self and len(bank) < 2:
        raise ValueError("`features` must hold two rows or more, of which one is left out (exclude_self), got 1")
    if exclude_self and len(query_rows) > len(bank):
        raise ValueError(
            f"`exclude_self` takes query i for row i of `features`, but there are {len(query_rows)} queries and "
            f"{len(bank)} rows: set it to False"
        )
    return bank, query_rows


def as_reported(neighbors: Neighbors, distance_metric: str) -> Neighbors:
    """Return float32 distances for what `find_nearest` gives."""
    return (neighbors.squared() if distance_metric == "squared_euclidean" else neighbors).single()


def is_tied(neighbors: Neighbors, k: int) -> Tensor:
    """Tell which lists (B, K) have a row after the k-th that is as far: (B,) bool."""
    if neighbors.indices.shape[1] <= k:
        return torch.zeros(len(neighbors.indices), dtype=torch.bool, device=neighbors.indices.device)
    return (neighbors.distances[:, k] == neighbors.distances[:, k - 1]) & (neighbors.indices[:, k] >= 0)


class _Search:
    """The search of one call, at whatever depth."""

    def __init__(self, bank: Bank, queries: RowSource, exclude_self: bool, argument: str) -> None:
        self.bank, self.queries, self.exclude_self, self.argument = bank, queries, exclude_self, argument
        self.most = len(bank.rows) - exclude_self

    def nearest(self, k: int, chosen: npt.NDArray[np.int64] | None = None) -> Neighbors:
        """Return the nearest of all queries, or of those at the ascending places `chosen`."""
        queries = self.queries if chosen is None else Subset(self.queries, chosen)
        k = min(k, self.most)
        neighbors = find_nearest(self.bank, queries, k + self.exclude_self, argument=self.argument)
        if self.exclude_self:
            own = np.arange(len(queries)) if chosen is None else chosen
            neighbors = Neighbors(*drop_self(*neighbors, torch.from_numpy(own).to(neighbors.indices.device)))
        device = self.queries.device if isinstance(self.queries, Tensor) else neighbors.indices.device
        neighbors = as_reported(neighbors, self.bank.distance.name)
        return Neighbors(neighbors.distances.to(device), neighbors.indices.to(device))


def _with_whole_ties(search: _Search, k: int) -> Neighbors:
    """Search deeper and deeper for the queries whose ties have not ended, and lay all lists side by side."""
    neighbors = search.nearest(k + 1)
    waiting = is_tied(neighbors, k).nonzero()[:, 0].cpu().numpy()
    neighbors = neighbors.first(k)
    longer: list[tuple[Tensor, Neighbors]] = []
    depth = k + 1
    while len(waiting):
        depth = min(_DEEPER * depth, search.most)
        _check_room(len(waiting), depth)
        lists = search.nearest(depth, waiting)
        tied = lists.distances <= lists.distances[:, k - 1 : k]
        is_open = tied[:, -1] & (depth < search.most)
        width = int(tied[~is_open].sum(1).max()) if not is_open.all() else 0
        places = torch.from_numpy(waiting).to(is_open.device)
        longer.append((places[~is_open], _only(lists, tied, ~is_open, width)))
        waiting = places[is_open].cpu().numpy()
    width = max((part.indices.shape[1] for _, part in longer), default=neighbors.indices.shape[1])
    _check_room(len(neighbors.indices), width)
    return _side_by_side(neighbors, longer, width)


def _only(lists: Neighbors, kept: Tensor, rows: Tensor, width: int) -> Neighbors:
    distances = lists.distances.masked_fill(~kept, torch.inf)[rows, :width]
    return Neighbors(distances, lists.indices.masked_fill(~kept, -1)[rows, :width])


def _side_by_side(neighbors: Neighbors, longer: list[tuple[Tensor, Neighbors]], width: int) -> Neighbors:
    pad = torch.nn.functional.pad
    missing = width - neighbors.indices.shape[1]
    distances, indices = (
        pad(neighbors.distances, (0, missing), value=torch.inf),
        pad(neighbors.indices, (0, missing), value=-1),
    )
    for places, part in longer:
        own = part.indices.shape[1]
        distances[places, :own], indices[places, :own] = part.distances, part.indices
    return Neighbors(distances, indices)


def _check_room(queries: int, width: int) -> None:
    needed, present = 16 * queries * width, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present // 2:
        raise ValueError(
            f"`ties` asks for {queries} lists of {width} rows that are equally far, {needed / 2**30:.0f} GiB: "
            "leave copies of rows out, or set ties=False"
        )


def _as_matrix_rows(features: Any, name: str) -> RowSource:
    rows = as_rows(features, name)
    if len(rows.shape) != 2 or 0 in rows.shape:
        raise ValueError(f"`{name}` must be (N, d) with at least one row, got shape {tuple(rows.shape)}")
    return rows
