"""From candidates to neighbours: exact distances of the stored rows, ordered by (distance, index)."""

from typing import NamedTuple

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, pair_norms, unit
from faiss_knn.search.rows import Rows

_PAIR_BYTES = 16 << 20  # float64 rows gathered at once: below what malloc always maps anew
_GPU_PAIR_BYTES = 128 << 20


class Neighbors(NamedTuple):
    """The neighbours of each query, nearest first.

    Attributes:
        distances: (B, k) float32, ascending; inf where missing.
        indices: (B, k) int64 row numbers of the bank; -1 where missing.
    """

    distances: Tensor
    indices: Tensor


def measure(queries: Tensor, rows: Rows, ids: Tensor, distance: Distance, of: Tensor | None = None) -> Tensor:
    """Measure candidates in float64.

    Args:
        queries: (B, d).
        rows: The bank.
        ids: (B, m) int64 row numbers, -1 where there is none.
        distance: Which distance.
        of: (B,) which of the queries each row of `ids` belongs to; None: its own.

    Returns:
        (B, m) float64 distances, inf where the id is -1.
    """
    queries = unit(queries) if distance.unit_rows else queries.double()
    width = ids.shape[1]
    norms = torch.empty(ids.shape, dtype=torch.float64, device=ids.device)
    values = (_GPU_PAIR_BYTES if rows.device.type == "cuda" else _PAIR_BYTES) // 8
    step = max(1, values // (rows.dim * max(1, width)))
    columns = max(1, min(width, values // rows.dim))
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        for left in range(0, width, columns):
            chosen = ids[part, left : left + columns]
            taken = rows.directed(chosen.reshape(-1).clamp(min=0), distance).view(*chosen.shape, rows.dim)
            asking = queries[part] if of is None else queries[of[part]]
            norms[part, left : left + columns] = pair_norms(asking, taken, distance)
    return distance.from_norm(norms).masked_fill_(ids < 0, torch.inf)


def nearest(distances: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest of each row by (distance, id), (B, k) each; missing ones (inf, -1) last.

    Args:
        distances: (B, m) float64, inf where the id is -1.
        ids: (B, m) int64.
        k: At most m.
    """
    # Two stable sorts: by id (missing ones as the largest), then by distance.
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(dim=1, stable=True)
    distances, ids = distances.gather(1, order), ids.gather(1, order)
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :k], ids.gather(1, order[:, :k])
