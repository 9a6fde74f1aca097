"""The measurement behind `target_recall`: queries whose exact neighbours are known, and the share of them found.

Recall is measured on rows of the bank that serve as queries, against the exact search. Neither they themselves nor
their near-twins count: a queue holds several views of a sample, and a view finds the others, where a new sample finds
nothing of that kind. Where queries that were really asked have been found wanting, these are measured on instead.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance
from faiss_knn.search.engines.bounds import ProductBounds
from faiss_knn.search.engines.exact import ExactEngine
from faiss_knn.search.engines.rerank import drop_self
from faiss_knn.search.engines.scan import run_search
from faiss_knn.search.stored_rows import StoredRows

_MOST_TWINS = 64
_GAP = 1.3  # of two distances to neighbours in turn: what is nearer is a near-twin
HELD_OUT = 256  # queries of a first tuning: at k = 20 the recall is known to about 0.002
RECHECK = 64  # queries that check what was tuned before


class RecallSample(NamedTuple):
    """Queries to measure a recall on, and what they should find.

    Attributes:
        queries: (n, d) rows of the bank, or queries that were asked.
        excluded: (n, t) int64 rows that do not count: the query itself and its near-twins; negative for none.
        neighbors: (n, k) int64 exact neighbours among the other rows, -1 where there are fewer.

    Example:
        >>> sample = RecallSample(torch.zeros(1, 2), torch.tensor([[7]]), torch.tensor([[3, 5]]))
        >>> found = sample.counted(torch.tensor([[7, 3, 4]]), k=2)
        >>> found.tolist(), sample.recall(found)[0]
        ([[3, 4]], 0.5)
    """

    queries: Tensor
    excluded: Tensor
    neighbors: Tensor

    @property
    def further(self) -> int:
        """How many rows a search must find beyond k for k to be left."""
        return self.excluded.shape[1]

    def counted(self, found: Tensor, k: int) -> Tensor:
        """Return the first k of found (n, m) that count, in order, -1 where fewer."""
        is_excluded = torch.zeros_like(found, dtype=torch.bool)
        for column in self.excluded.T:
            is_excluded |= found == column[:, None]
        order = is_excluded.to(torch.int8).argsort(dim=1, stable=True)
        return found.masked_fill(is_excluded, -1).gather(1, order)[:, :k]

    def recall(self, found: Tensor) -> tuple[float, float]:
        """Return the share of neighbours among those found (n, m), and its standard error over the queries."""
        shares = recall_by_query(found, self.neighbors)
        spread = float(shares.std()) if len(shares) > 1 else 0.0
        return float(shares.mean()), max(spread, 1e-3) / math.sqrt(len(shares))


def recall_sample(
    rows: StoredRows,
    distance: Distance,
    k: int,
    known_queries: Tensor | None = None,
    *,
    count: int = HELD_OUT,
    bounds: ProductBounds | None = None,
) -> RecallSample:
    """Find the exact neighbours of queries to measure on, with no copy of the bank.

    Args:
        rows: The bank.
        distance: Which distance.
        k: Neighbours of each, fewer in a bank that has no more.
        known_queries: (n, d) queries that were asked: every row counts; None: rows of the bank.
        count: How many rows of it.
        bounds: Bounds of these rows that exist already.
    """
    exact = ExactEngine(rows, distance, lean=True, bounds=bounds)
    if known_queries is None:
        return _held_out(rows, exact, distance, k, count)
    _, neighbors = run_search(lambda: exact.search(known_queries, min(k, len(rows))), rows, len(known_queries))
    return RecallSample(known_queries, neighbors.new_full((len(known_queries), 1), -2), neighbors)


def recall_source(known_queries: Tensor | None) -> str:
    """Say what a recall was measured on, for `IndexStats.recall_of`."""
    return "held-out rows without twins" if known_queries is None else "queries"


def _held_out(rows: StoredRows, exact: ExactEngine, distance: Distance, k: int, count: int) -> RecallSample:
    """Take rows at random, the same ones for a bank of the same size, and find their exact neighbours."""
    ids = rows.random_ids(count)
    queries = rows.take(ids)
    k = max(1, min(k, len(rows) - 1))
    most = min(k + 1 + _MOST_TWINS, len(rows))
    distances, near = run_search(lambda: exact.search(queries, most), rows, len(queries))
    distances, near = drop_self(distances, near, ids)
    spare = 0 if distance.norm == 0 else near.shape[1] - k  # by products no row is near another
    twins = _twins(distance.to_norm(distances), spare)
    place = torch.arange(near.shape[1], device=near.device)
    excluded = near.masked_fill(place >= twins[:, None], -1)[:, : max(1, int(twins.max()))]
    places = twins[:, None] + place[:k]
    neighbors = near.gather(1, places.clamp(max=near.shape[1] - 1)).masked_fill(places >= near.shape[1], -1)
    return RecallSample(queries, torch.cat([ids[:, None], excluded], 1), neighbors)


def _twins(norms: Tensor, most: int) -> Tensor:
    """Count the near-twins of each row, from the norms (n, m) to its neighbours: those before the widest gap."""
    if most < 1:
        return torch.zeros(len(norms), dtype=torch.int64, device=norms.device)
    ratios = norms[:, 1 : most + 1] / norms[:, :most].clamp(min=torch.finfo(norms.dtype).tiny)
    widest, place = ratios.max(1)
    return torch.where(widest >= _GAP, place + 1, 0)


def recall_by_query(found: Tensor, exact: Tensor) -> Tensor:
    """Return the share (n,) float64 of exact neighbours (n, k) that are among those found (n, m), query by query.

    Example:
        >>> recall_by_query(torch.tensor([[1, 2, 7], [4, 5, 6]]), torch.tensor([[2, 1], [4, 3]])).tolist()
        [1.0, 0.5]
    """
    is_found = torch.zeros_like(exact, dtype=torch.bool)
    for column in found.T:
        is_found |= exact == column[:, None]
    there = exact >= 0
    return (is_found & there).sum(1).double() / there.sum(1).clamp(min=1)
