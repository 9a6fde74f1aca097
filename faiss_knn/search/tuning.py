"""The measurement behind `target_recall`, and the cost model behind "fast" and "auto".

Recall is measured on rows of the bank that serve as queries and never count as their own neighbour, against the exact
search. Costs are modelled from the measured rate of the CPU's matrix product, not timed: a choice shall not depend on
what else the machine does.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from faiss_knn.search.exact import ExactEngine
from faiss_knn.search.products import multiply_add_seconds
from faiss_knn.search.rerank import PAIR_SECONDS, VALUE_SECONDS
from faiss_knn.search.rows import Rows

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
    """Rows of the bank as queries, and the exact neighbours of each but itself.

    Attributes:
        ids: (n,) their row numbers.
        queries: (n, d) the rows.
        neighbors: (n, k) int64 row numbers.
    """

    ids: Tensor
    queries: Tensor
    neighbors: Tensor


def hold_out(rows: Rows, exact: ExactEngine, k: int, count: int) -> HeldOut:
    """Take `count` rows at random, the same ones for a bank of the same size, and find their exact neighbours.

    Args:
        rows: The bank.
        exact: An exact search of it.
        k: Neighbours of each, fewer in a bank that has no more.
        count: How many rows, at most N.
    """
    order = torch.randperm(len(rows), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    ids = order[: min(count, len(rows))].sort().values.to(rows.device)
    queries = rows.take(ids)
    k = max(1, min(k, len(rows) - 1))
    _, found = exact.search(queries, min(k + 1, len(rows)))
    return HeldOut(ids, queries, without_self(found, ids, k))


def without_self(found: Tensor, ids: Tensor, k: int) -> Tensor:
    """Return the first k of found (n, m) that are not the query's own row `ids` (n,), in order, -1 where fewer."""
    own = found == ids[:, None]
    order = own.to(torch.int8).argsort(dim=1, stable=True)
    return found.masked_fill(own, -1).gather(1, order)[:, :k]


def recall(found: Tensor, exact: Tensor) -> float:
    """Return the share of exact neighbours (n, k) that are among those found (n, m).

    Example:
        >>> recall(torch.tensor([[1, 2, 7]]), torch.tensor([[2, 1]]))
        1.0
    """
    hits = (found[:, :, None] == exact[:, None, :]) & (exact >= 0)[:, None, :]
    return float(hits.any(1).sum() / (exact >= 0).sum().clamp(min=1))


def measure_recall(engine: Engine, held_out: HeldOut) -> float:
    """Measure the recall of an engine on held-out rows."""
    k = held_out.neighbors.shape[1]
    _, found = engine.search(held_out.queries, k + 1)
    return recall(without_self(found, held_out.ids, k), held_out.neighbors)


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
