"""The exact search."""

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, pair_norms
from faiss_knn.search.rerank import nearest
from faiss_knn.search.rows import Rows


class ExactEngine:
    """Exact nearest neighbours by comparing every row."""

    exact = True
    backend = "torch"

    def __init__(self, rows: Rows, distance: Distance) -> None:
        self._rows = rows
        self._distance = distance
        self.bytes = rows.bytes
        self.uncertified = 0

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ((B, k) float64 distances, (B, k) int64 ids) of queries (B, d)."""
        best = torch.empty(len(queries), 0, dtype=torch.float64, device=queries.device)
        ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start, block in self._rows.blocks(4096):
            found = self._distance.from_norm(pair_norms(queries, block[None], self._distance))
            numbers = torch.arange(start, start + len(block), device=queries.device).expand(len(queries), -1)
            best, ids = nearest(torch.cat([best, found], 1), torch.cat([ids, numbers], 1), k)
        return best, ids
