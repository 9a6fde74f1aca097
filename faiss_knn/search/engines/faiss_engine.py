"""Indexes that FAISS makes from a factory string, over centred rows, with exact distances of what they find."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, normalize
from faiss_knn.search.engines import faiss_gpu, faiss_library
from faiss_knn.search.engines.base import TooFewRowsError
from faiss_knn.search.engines.recall_sample import recall_sample, recall_source
from faiss_knn.search.engines.rerank import measure, nearest
from faiss_knn.search.engines.specs import check_alive
from faiss_knn.search.stored_rows import StoredRows

_TRAIN_ROWS_PER_CENTROID = 256  # more do not help k-means, by FAISS's own cap
_MIN_TRAIN_ROWS = 65536
_LEAST_LINKED_CODES = 1000  # rows of a graph over product quantizers
_FLOAT16_LEAST, _FLOAT16_MOST = 2.0**-9, 2.0**15  # mean size of the rows' values, and largest
_GPU_BLOCK_BYTES = 256 << 20  # an index on a GPU grows with every block added


class FaissEngine:
    """A FAISS index: on the GPU where the rows are, if FAISS has it there, else on the CPU.

    Args:
        rows: The bank.
        distance: Which distance.
        spec: FAISS factory string.
        nprobe: Lists visited by an IVF index; None leaves the index's own.
        trained: An engine of the same spec whose trained state is taken over, and with it its index.

    Raises:
        ValueError: If the spec is not valid, the bank too small for it, or nprobe out of range.

    Example:
        >>> from faiss_knn.search.distance import get_distance
        >>> engine = FaissEngine(StoredRows(torch.eye(4)), get_distance("euclidean"), "Flat")
        >>> engine.search(torch.eye(4)[2:], k=1)[1].flatten().tolist()
        [2, 3]
    """

    exact = False
    backend = "faiss"

    def __init__(
        self,
        rows: StoredRows,
        distance: Distance,
        spec: str,
        nprobe: int | None = None,
        trained: "FaissEngine | None" = None,
    ) -> None:
        self.spec = spec
        self._rows = rows
        self._dim = rows.dim
        self.recall: float | None = None
        self.recall_of: str | None = None
        self.tuned_k: int | None = None
        self.parameters: dict[str, object] = {"warm": trained is not None}
        self._distance = distance
        self.uncertified = 0
        if trained is not None:
            self.index: Any = trained.index
            self._centre: Tensor = trained._centre.to(rows.device)
        else:
            check_alive(spec, rows.dim, distance.faiss_metric)
            if len(rows) < _LEAST_LINKED_CODES and re.match(r"HNSW\d+_.*PQ", spec):  # FAISS would never end
                raise TooFewRowsError(
                    f"`features` must hold {_LEAST_LINKED_CODES} rows or more for {spec!r}, got {len(rows)}: use 'flat'"
                )
            self.index = faiss_library.make_index(spec, rows.dim, distance.faiss_metric)
            sample = self._sample(rows)
            self._centre = _prepared(sample, distance).mean(0)
            if distance.norm == 0:
                self._centre.zero_()  # products, unlike differences, change with the origin
        self._place(rows)
        self.nprobe = self._set_nprobe(nprobe)
        if trained is None:
            self._train(sample, spec)
        on_cpu = self.device.type == "cpu"
        with self._enough_rows(spec):
            for _, block in rows.blocks(None if on_cpu else max(1, _GPU_BLOCK_BYTES // (4 * rows.dim))):
                faiss_gpu.add(self.index, self._array(block))
        self._probe(spec)
        self.bytes = rows.bytes + (faiss_library.index_bytes(self.index) if on_cpu else len(rows) * self._row_bytes)

    def __getstate__(self) -> dict[str, Any]:
        index = self.index if self._resources is None else faiss_gpu.to_cpu(self.index)
        return vars(self) | {"index": faiss_library.as_bytes(index), "_resources": None, "device": torch.device("cpu")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"index": faiss_library.from_bytes(state["index"])})

    def _place(self, rows: StoredRows) -> None:
        """Move the index to the rows' GPU, if FAISS has one for it."""
        self.device = torch.device("cpu")
        self._resources: faiss_gpu.Resources | None = None
        if rows.device.type != "cuda":
            return
        row_bytes = getattr(self.index, "code_size", 0) + (8 if faiss_library.inner_ivf(self.index) is not None else 0)
        half = faiss_gpu.is_flat(self.index) and rows.dtype.itemsize == 2 and self.float16_holds(rows)
        row_bytes //= 2 if half else 1
        faiss_gpu.check_room(rows.device, len(rows) * row_bytes)
        moved = faiss_gpu.to_gpu(self.index, rows.device, half=half)
        if moved is not None:
            self.index, self._resources = moved
            self.device, self._row_bytes = rows.device, row_bytes

    def float16_holds(self, rows: StoredRows) -> bool:
        """Tell whether float16 holds the rows, as the index is given them, with all of its 11 bits."""
        blocks = (_prepared(block, self._distance).sub_(self._centre) for _, block in rows.blocks())
        sizes = torch.stack([torch.stack([block.abs().amax(), block.abs().mean()]) for block in blocks])
        return float(sizes[:, 0].max()) < _FLOAT16_MOST and float(sizes[:, 1].min()) > _FLOAT16_LEAST

    def _sample(self, rows: StoredRows) -> Tensor:
        """Return as many rows, taken at random, as training can use."""
        ivf = faiss_library.inner_ivf(self.index)
        count = max(_MIN_TRAIN_ROWS, _TRAIN_ROWS_PER_CENTROID * (ivf.nlist if ivf is not None else 0))
        return rows.take(rows.random_ids(count))

    def _most_probes(self, ivf: Any) -> int:
        return int(ivf.nlist) if self.device.type == "cpu" else min(int(ivf.nlist), faiss_gpu.MAX_NPROBE)

    def _set_nprobe(self, nprobe: int | None) -> int | None:
        ivf = faiss_library.inner_ivf(self.index)
        if nprobe is None:
            return int(ivf.nprobe) if ivf is not None else None
        if ivf is None:
            raise ValueError(f"`nprobe` is for indexes with inverted lists (IVF), got nprobe={nprobe}: leave it out")
        if not 1 <= nprobe <= self._most_probes(ivf):
            on_gpu = "" if self.device.type == "cpu" else f", and up to {faiss_gpu.MAX_NPROBE} on a GPU"
            raise ValueError(
                f"`nprobe` must be in [1, nlist={ivf.nlist}]{on_gpu}, got {nprobe}: lower it or raise nlist"
            )
        ivf.nprobe = nprobe
        return nprobe

    def fits(self, rows: StoredRows, distance: Distance, spec: str) -> bool:
        """Tell whether what was trained here serves another bank."""
        return (self.spec, self._distance, self._dim) == (spec, distance, rows.dim)

    def release(self) -> None:
        """Drop the rows and keep what was trained; nothing can be searched after that."""
        del self._rows
        self.index.reset()
        if self._resources is not None:
            self.index, self._resources = faiss_gpu.to_cpu(self.index), None  # what was trained waits there

    def retune(self, k: int, known_queries: Tensor | None = None) -> None:
        """Tune for another k as `tune` did before, on known queries (n, d) where there are any."""
        self.tune(k, self._target, self._given_nprobe, known_queries)

    def tune(self, k: int, target: float, nprobe: int | None, known_queries: Tensor | None = None) -> None:
        """Measure the recall: at `nprobe`, or at the first of 1, 2, 4, … lists that meets the target for certain.

        Args:
            k: Neighbours that the recall is of.
            target: The recall to meet by more than its standard error, where there is something to tune.
            nprobe: Lists to visit; None: to be tuned.
            known_queries: (n, d) queries to measure on; None: held-out rows.
        """
        self._target, self._given_nprobe = target, nprobe
        most_k = k if self.device.type == "cpu" else min(k, faiss_gpu.MAX_K // 2)
        sample = recall_sample(self._rows, self._distance, most_k, known_queries)
        ivf = faiss_library.inner_ivf(self.index)
        tried: list[int | None] = [nprobe]
        if ivf is not None and nprobe is None:
            most = self._most_probes(ivf)
            tried = [*(1 << power for power in range(most.bit_length() - 1)), most]
        depth = sample.neighbors.shape[1]
        for probes in tried:
            self.nprobe = self._set_nprobe(probes)
            _, ids = self.search(sample.queries, min(depth + sample.further, len(self._rows)))
            self.recall, error = sample.recall(sample.counted(ids, depth))
            if self.recall - error >= target:
                break
        self.tuned_k, self.recall_of = k, recall_source(known_queries)

    def _train(self, sample: Tensor, spec: str) -> None:
        with self._enough_rows(spec):
            faiss_gpu.train(self.index, self._array(sample))

    @contextmanager
    def _enough_rows(self, spec: str) -> Iterator[None]:
        """Say in words what FAISS cannot do with so few rows."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:  # a RuntimeError too, and nothing wrong with the rows
            raise
        except RuntimeError as error:
            raise TooFewRowsError(
                f"`features` must hold enough rows to train {spec!r}, got {len(self._rows)}: "
                f"choose a smaller index or 'flat' ({faiss_library.reason(error)})"
            ) from error

    def _probe(self, spec: str) -> None:
        """Search once: what an index cannot do with a metric, FAISS may say only then."""
        try:
            self.search(self._rows.block(0, 1), 1)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"`spec` must be an index that searches by {self._distance.name}, got {spec!r}: "
                f"{faiss_library.reason(error)}"
            ) from error

    def _array(self, rows: Tensor) -> Tensor:
        """Return rows (n, d) centred, float32, where the index is."""
        centred = _prepared(rows, self._distance).sub_(self._centre)
        return centred.float().to(self.device).contiguous()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ((B, k) float64 distances, (B, k) int64 ids) of queries (B, d), (inf, -1) where missing.

        Raises:
            ValueError: If k is above what FAISS can do on a GPU.
        """
        if self.device.type != "cpu" and k > faiss_gpu.MAX_K:
            raise ValueError(
                f"`k` must be at most {faiss_gpu.MAX_K} for {self.spec!r} on a GPU, got {k}: use 'flat' or device='cpu'"
            )
        with faiss_library.blas_for_all_sizes():
            ids = faiss_gpu.search(self.index, self._array(queries), k).to(queries.device)
        return nearest(measure(queries, self._rows, ids, self._distance), ids, k)


def _prepared(rows: Tensor, distance: Distance) -> Tensor:
    return normalize(rows) if distance.normalized else rows.to(torch.float64, copy=True)
