"""Indexes that FAISS makes from a factory string, over centred rows, with exact distances of what they find."""

import numpy as np
import torch
from torch import Tensor

from faiss_knn.search import backend
from faiss_knn.search.distance import Distance, unit
from faiss_knn.search.rerank import measure, nearest
from faiss_knn.search.rows import Rows

_TRAIN_ROWS_PER_CENTROID = 256  # more do not help k-means, by FAISS's own cap
_MIN_TRAIN_ROWS = 65536


class FaissEngine:
    """A FAISS index on the CPU.

    Args:
        rows: The bank.
        distance: Which distance.
        spec: FAISS factory string.
        nprobe: Lists visited by an IVF index; None leaves the index's own.

    Raises:
        ValueError: If the spec is not valid, the bank too small for it, or nprobe out of range.
    """

    exact = False
    backend = "faiss"

    def __init__(self, rows: Rows, distance: Distance, spec: str, nprobe: int | None = None) -> None:
        self._rows = rows
        self.parameters: dict[str, object] = {}
        self._distance = distance
        self.uncertified = 0
        self.index = backend.make_index(spec, rows.dim, distance.faiss_metric)
        self.nprobe = self._set_nprobe(nprobe)
        sample = rows.take(torch.randperm(len(rows), generator=_generator())[: self._train_rows()].sort().values)
        self._centre = _prepared(sample, distance).mean(0)
        self._train(spec, sample)
        for _, block in rows.blocks():
            self.index.add(self._array(block))
        self._probe(spec)
        self.bytes = rows.bytes + backend.index_bytes(self.index)

    def _train_rows(self) -> int:
        ivf = backend.inner_ivf(self.index)
        return max(_MIN_TRAIN_ROWS, _TRAIN_ROWS_PER_CENTROID * (ivf.nlist if ivf is not None else 0))

    def _set_nprobe(self, nprobe: int | None) -> int | None:
        ivf = backend.inner_ivf(self.index)
        if nprobe is None:
            return int(ivf.nprobe) if ivf is not None else None
        if ivf is None:
            raise ValueError(f"`nprobe` is for indexes with inverted lists (IVF), got nprobe={nprobe}: leave it out")
        if not 1 <= nprobe <= ivf.nlist:
            raise ValueError(f"`nprobe` must be in [1, nlist={ivf.nlist}], got {nprobe}: lower it or raise nlist")
        ivf.nprobe = nprobe
        return nprobe

    def _train(self, spec: str, sample: Tensor) -> None:
        try:
            self.index.train(self._array(sample))
        except RuntimeError as error:
            raise ValueError(
                f"`features` must hold enough rows to train {spec!r}, got {len(self._rows)}: "
                f"choose a smaller index or 'flat' ({_reason(error)})"
            ) from error

    def _probe(self, spec: str) -> None:
        """Search once: what an index cannot do with a metric, FAISS may say only then."""
        try:
            self.search(self._rows.block(0, 1), 1)
        except RuntimeError as error:
            raise ValueError(
                f"`spec` must be an index that searches by {self._distance.name}, got {spec!r}: {_reason(error)}"
            ) from error

    def _array(self, rows: Tensor) -> np.ndarray:
        centred = _prepared(rows, self._distance).sub_(self._centre)
        return centred.float().cpu().contiguous().numpy()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ((B, k) float64 distances, (B, k) int64 ids) of queries (B, d), (inf, -1) where missing."""
        with backend.blas_for_all_sizes():
            _, ids = self.index.search(self._array(queries), k)
        found = torch.from_numpy(ids).to(queries.device)
        return nearest(measure(queries, self._rows, found, self._distance), found, k)


def _prepared(rows: Tensor, distance: Distance) -> Tensor:
    return unit(rows) if distance.unit_rows else rows.to(torch.float64, copy=True)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _reason(error: RuntimeError) -> str:
    return str(error).rpartition("Error: ")[2] or str(error)
