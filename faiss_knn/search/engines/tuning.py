"""The measurement behind `target_recall`, and the cost model behind "fast" and "auto".

Recall is measured on rows of the bank that serve as queries, against the exact search. Neither they themselves nor
their near-twins count: a queue holds several views of a sample, and a view finds the others, where a new sample finds
nothing of that kind. Where queries that were really asked have been found wanting, these are measured on instead. Costs
are modelled from the measured rate of the CPU's matrix product, not timed: a choice shall not depend on what else the
machine does.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance
from faiss_knn.search.engines.exact import ExactEngine
from faiss_knn.search.engines.products import multiply_add_seconds
from faiss_knn.search.engines.rerank import PAIR_SECONDS, VALUE_SECONDS, drop_self
from faiss_knn.search.stored_rows import StoredRows

_MOST_TWINS = 64
_GAP = 1.3  # of two distances to neighbours in turn: what is nearer is a near-twin
HELD_OUT = 256  # queries of a first tuning: at k = 20 the recall is known to about 0.002
RECHECK = 64  # queries that check what was tuned before

_SCORE = 0.4e-9  # seconds on two modern cores per score compared
_ROW_VALUE = 4e-9  # of a build: check, centre, cast, write
_TUNED_SCANS = 3  # scans of the held-out queries that a first tuning takes


class Engine(Protocol):
    """What searches a bank."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ((B, k) float64 distances, (B, k) int64 ids)."""


class HeldOut(NamedTuple):
    """Queries to measure on, and what they should find.

    Attributes:
        queries: (n, d) rows of the bank, or queries that were asked.
        excluded: (n, t) int64 rows that do not count: the query itself and its near-twins; -1 for none.
        neighbors: (n, k) int64 exact neighbours among the other rows, -1 where there are fewer.
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
        out = torch.zeros_like(found, dtype=torch.bool)
        for column in self.excluded.T:
            out |= found == column[:, None]
        order = out.to(torch.int8).argsort(dim=1, stable=True)
        return found.masked_fill(out, -1).gather(1, order)[:, :k]

    def recall(self, found: Tensor) -> tuple[float, float]:
        """Return the share of neighbours among those found (n, m), and its standard error over the queries."""
        shares = recall_by_query(found, self.neighbors)
        spread = float(shares.std()) if len(shares) > 1 else 0.0
        return float(shares.mean()), max(spread, 1e-3) / math.sqrt(len(shares))


def hold_out(rows: StoredRows, exact: ExactEngine, distance: Distance, k: int, count: int) -> HeldOut:
    """Take `count` rows at random, the same ones for a bank of the same size, and find their exact neighbours.

    Args:
        rows: The bank.
        exact: An exact search of it.
        distance: Which distance.
        k: Neighbours of each, fewer in a bank that has no more.
        count: How many rows, at most N.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0), device="cpu")
    ids = order[: min(count, len(rows))].sort().values.to(rows.device)
    queries = rows.take(ids)
    k = max(1, min(k, len(rows) - 1))
    distances, found = exact.search(queries, min(k + 1 + _MOST_TWINS, len(rows)))
    distances, found = drop_self(distances, found, ids)
    twins = _twins(distance.to_norm(distances), found.shape[1] - k)
    place = torch.arange(found.shape[1], device=found.device)
    excluded = found.masked_fill(place >= twins[:, None], -1)[:, : max(1, int(twins.max()))]
    wanted = twins[:, None] + place[:k]
    neighbors = found.gather(1, wanted.clamp(max=found.shape[1] - 1)).masked_fill(wanted >= found.shape[1], -1)
    return HeldOut(queries, torch.cat([ids[:, None], excluded], 1), neighbors)


def _twins(norms: Tensor, most: int) -> Tensor:
    """Count the near-twins of each row, from the norms (n, m) to its neighbours: those before the widest gap."""
    if most < 1:
        return torch.zeros(len(norms), dtype=torch.int64, device=norms.device)
    ratios = norms[:, 1 : most + 1] / norms[:, :most].clamp(min=torch.finfo(norms.dtype).tiny)
    widest, place = ratios.max(1)
    return torch.where(widest >= _GAP, place + 1, 0)


def asked_before(exact: ExactEngine, queries: Tensor, k: int) -> HeldOut:
    """Find the exact neighbours of queries (n, d) that were asked of an earlier bank; every row counts."""
    _, neighbors = exact.search(queries, k)
    return HeldOut(queries, neighbors.new_full((len(queries), 1), -2), neighbors)


def of_queries(asked: Tensor | None) -> str:
    """Say what a recall is of."""
    return "held-out rows without twins" if asked is None else "queries"


def recall_by_query(found: Tensor, exact: Tensor) -> Tensor:
    """Return the share (n,) float64 of exact neighbours (n, k) that are among those found (n, m), query by query.

    Example:
        >>> recall_by_query(torch.tensor([[1, 2, 7], [4, 5, 6]]), torch.tensor([[2, 1], [4, 3]])).tolist()
        [1.0, 0.5]
    """
    hits = torch.zeros_like(exact, dtype=torch.bool)
    for column in found.T:
        hits |= exact == column[:, None]
    there = exact >= 0
    return (hits & there).sum(1).double() / there.sum(1).clamp(min=1)


def search_cost(rows: int, dim: int, scanned: int, candidates: int, dtype: torch.dtype) -> float:
    """Model the time of one query in a batch: a scan of products and an exact measurement of candidates.

    Args:
        rows: N.
        dim: d.
        scanned: Width of the scanned copy.
        candidates: How many rows are measured.
        dtype: Of the scanned copy.

    Returns:
        Seconds, in proportion to those of other choices.
    """
    scan = rows * (scanned * multiply_add_seconds(dtype) + _SCORE)
    return scan + candidates * (PAIR_SECONDS + dim * VALUE_SECONDS)


def prefers_fast(rows: int, dim: int, queries: int, k: int, dtype: torch.dtype, *, warm: bool) -> bool:
    """Decide for "auto" whether a build and `queries` searches are cheaper with "fast" than with "flat".

    flat:  build N·d + Q · (scan of d dimensions + 1.5k candidates)
    fast:  build N·d, tuning (some scans of the held-out queries, fewer when warm) + Q · (scan of d/2 + 2k)

    "ivf" is never chosen: at a recall worth reporting it visits a quarter of its lists, one query at a time, and takes
    longer than an exact scan by products; what it saves at fewer lists it costs in accuracy.
    """
    flat = search_cost(rows, dim, dim, k + k // 2 + 10, dtype)
    fast = search_cost(rows, dim, dim // 2, 2 * k, dtype)
    tuning = (RECHECK if warm else _TUNED_SCANS * HELD_OUT) * flat + (1 if warm else 2) * rows * dim * _ROW_VALUE
    return tuning + queries * fast < queries * flat
