"""From candidates to neighbours: exact distances of the stored rows, ordered by (distance, index)."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, get_distance, normalize, pair_norms
from faiss_knn.search.engines.selection import needs_no_wait
from faiss_knn.search.engines.workers import run_together, threads_for
from faiss_knn.search.stored_rows import StoredRows

_PAIR_BYTES = 2 << 20  # float64 rows gathered at once: more makes the heap shrink and grow with every search
_GPU_PAIR_BYTES = 128 << 20
_ALONE = 1 << 18  # differences from which on threads share them
_SHORT = 2048  # dimensions that float32 sums may have
_NEAR, _FAR = 2.0**-40, 2.0**55
_NEAR_DIRECTIONS = 2.0**-3


class Neighbors(NamedTuple):
    """The neighbours of each query, nearest first.

    Attributes:
        distances: (B, k) float32, ascending; inf where missing.
        indices: (B, k) int64 row numbers of the bank; -1 where missing.

    Example:
        >>> Neighbors(torch.tensor([[0.5, 0.7]]), torch.tensor([[4, 2]])).first(1)
        Neighbors(distances=tensor([[0.5000]]), indices=tensor([[4]]))
    """

    distances: Tensor
    indices: Tensor

    def first(self, k: int) -> "Neighbors":
        """Return the first k columns."""
        return Neighbors(self.distances[:, :k], self.indices[:, :k])

    def squared(self) -> "Neighbors":
        """Square distances in float64; what is beyond it becomes its largest number, not inf, which means missing."""
        squares = self.distances.square().clamp_(max=torch.finfo(self.distances.dtype).max)
        return Neighbors(squares.masked_fill_(self.indices < 0, torch.inf), self.indices)

    def single(self) -> "Neighbors":
        """Round distances to float32; those beyond it become its largest numbers, for inf means that none was found."""
        most = torch.finfo(torch.float32).max
        return Neighbors(
            self.distances.clamp(-most, most).float().masked_fill(self.indices < 0, torch.inf), self.indices
        )


def ordered_by(distance: Distance) -> Distance:
    """Return the distance that neighbours are ordered by: instead of squares their roots, under the same name.

    Float64 does not hold every square: of very near or very far rows it would merge them.
    """
    root = get_distance("euclidean")
    is_squared = distance.name == "squared_euclidean"
    return replace(distance, from_norm=root.from_norm, to_norm=root.to_norm) if is_squared else distance


def measure(
    queries: Tensor,
    rows: StoredRows,
    ids: Tensor,
    distance: Distance,
    of: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Measure candidates.

    Args:
        queries: (B, d).
        rows: The bank.
        ids: (B, m) int64 row numbers, -1 where there is none.
        distance: Which distance.
        of: (B,) which of the queries each row of `ids` belongs to; None: its own.
        dtype: To compute in.

    Returns:
        (B, m) distances in that dtype, inf where the id is -1.
    """
    queries = (normalize(queries) if distance.normalized else queries).to(dtype)
    wide = rows.dtype == torch.float64 and not distance.normalized
    width, dim = ids.shape[1], rows.dim
    norms = torch.empty(ids.shape, dtype=dtype, device=ids.device)
    values = (_GPU_PAIR_BYTES if rows.device.type == "cuda" else _PAIR_BYTES) // 8
    step = max(1, values // (dim * max(1, width)))
    columns = max(1, min(width, values // dim))
    parts = iter(range(0, len(ids), step))  # one for all threads

    def measure_parts() -> None:
        for part in (slice(start, start + step) for start in parts):
            for left in range(0, width, columns):
                chosen = ids[part, left : left + columns]
                known = chosen.reshape(-1).clamp(min=0)
                compared = rows.as_compared(known, distance, dtype) if distance.normalized else rows.take(known)
                asking = queries[part] if of is None else queries[of[part]]
                compared = compared.view(*chosen.shape, dim)
                norms[part, left : left + columns] = pair_norms(asking, compared, distance, dtype, wide=wide)

    threads = threads_for(ids.numel() * dim, _ALONE) if ids.device.type == "cpu" else 1
    run_together([measure_parts] * min(threads, max(1, -(-len(ids) // step))))
    return distance.from_norm(norms).masked_fill_(ids < 0, torch.inf)


def measure_quickly(queries: Tensor, rows: StoredRows, ids: Tensor, distance: Distance) -> Tensor:
    """Measure candidates to 1e-5, for approximate indexes: in float32 where its range and precision are enough.

    A difference of two float32 values is rounded once, by 2⁻²⁴ of itself; their squares add up in sixteen sums. Pairs
    that are very near or very far, where squares would leave the range, are measured again; of directions also those
    within an eighth of each other, as rounding each to float32 moves it by 2⁻²³.

    Returns:
        (B, m) float64 distances of candidates `ids` (B, m), all known.
    """
    if rows.dim > _SHORT or torch.float64 in (queries.dtype, rows.dtype):
        return measure(queries, rows, ids, distance)
    distances = measure(queries, rows, ids, distance, dtype=torch.float32).double()
    norms = distance.to_norm(distances)
    near = _NEAR_DIRECTIONS if distance.normalized else _NEAR
    query, place = ((norms < near) | (norms > _FAR)).nonzero().unbind(1)
    if len(query) > 0:
        distances[query, place] = measure(queries, rows, ids[query, place][:, None], distance, of=query)[:, 0]
    return distances


def nearest(distances: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest of each row by (distance, id), (B, k) each; missing ones (inf, -1) last.

    Args:
        distances: (B, m) float64, inf where the id is -1.
        ids: (B, m) int64.
        k: At most m.
    """
    if needs_no_wait(distances.device):
        ordered, order = distances.sort(dim=1)
        compared = ordered[:, : k + 1]  # with the first that is left out: it may be equal to the last
        if not (compared[:, 1:] == compared[:, :-1]).any():
            return ordered[:, :k].contiguous(), ids.gather(1, order[:, :k])
    # Two stable sorts: by id (missing ones as the largest), then by distance.
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(dim=1, stable=True)
    distances, ids = distances.gather(1, order), ids.gather(1, order)
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :k].contiguous(), ids.gather(1, order[:, :k])  # no view: it would keep all of them


def drop_self(distances: Tensor, ids: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Drop each row's own id from its list, or the last neighbour where it is not found: (B, m - 1) each, in order.

    Args:
        distances: (B, m) ascending.
        ids: (B, m) int64.
        own: (B,) int64 ids of the rows that were searched for.

    Example:
        >>> drop_self(torch.tensor([[0.0, 0.5, 0.7]]), torch.tensor([[4, 2, 9]]), torch.tensor([2]))
        (tensor([[0.0000, 0.7000]]), tensor([[4, 9]]))
    """
    order = (ids == own[:, None]).to(torch.int8).argsort(dim=1, stable=True)[:, :-1]
    return distances.gather(1, order), ids.gather(1, order)
