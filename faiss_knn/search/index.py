"""KNNIndex: build it over features, search it for the nearest rows of queries."""

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from faiss_knn.names import SPECS
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines.base import Engine, TooFewRowsError
from faiss_knn.search.engines.choice import DEFAULT_K, EngineRequest, make_engine
from faiss_knn.search.engines.faiss_library import make_index, reason
from faiss_knn.search.engines.recall_sample import recall_sample
from faiss_knn.search.engines.rerank import Neighbors, ordered_by
from faiss_knn.search.engines.scan import run_search
from faiss_knn.search.engines.specs import check_alive, check_numbers
from faiss_knn.search.inputs import as_count, as_integer, as_k, as_number, first_line, shown
from faiss_knn.search.precision import full_precision
from faiss_knn.search.stored_rows import StoredRows, as_queries

__all__ = ["IndexStats", "KNNIndex", "Neighbors", "TooFewRowsError"]

_STORAGE = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KEPT_QUERIES = 256
_CHUNK = 4096  # queries prepared at once; an engine bounds its own blocks
_SCARCE_CHUNK, _LEAST_CHUNK = 512, 32  # where a GPU's memory ran out
_ANY_DIM = 64  # that a factory string is parsed for before there are rows


@dataclasses.dataclass(frozen=True)
class IndexStats:
    """What an index is and what it cost.

    Attributes:
        spec: The spec actually used: "flat", or a FAISS factory string.
        exact: Whether the neighbours are certified to be the exact ones.
        backend: "torch" or "faiss", whichever finds the candidates.
        device: Where it searches.
        bytes: Size of what the index holds: the bank's rows where it refers to them, and its own data.
        build_seconds: Time of the last build.
        nprobe: Inverted lists visited; None without them.
        recall: Measured share of the exact neighbours that it finds, 1.0 when exact; None if not measured.
        recall_of: What it was measured on: "queries" (`measure_recall`), or "held-out rows without twins" of the bank.
        uncertified: How many queries since the build needed the second, exhaustive pass to be certified exact.
        storage_dtype: Of the stored rows, "float32" or another.
        parameters: Further parameters actually used.

    Example:
        >>> stats = KNNIndex().build(torch.eye(3)).stats
        >>> stats.spec, stats.exact, stats.recall, stats.storage_dtype
        ('flat', True, 1.0, 'float32')
    """

    spec: str
    exact: bool
    backend: str
    device: str
    bytes: int
    build_seconds: float
    nprobe: int | None = None
    recall: float | None = None
    recall_of: str | None = None
    uncertified: int = 0
    storage_dtype: str = "float32"
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for reports."""
        return dataclasses.asdict(self)


class KNNIndex:
    """Nearest-neighbour search over a bank of features.

    Several threads may search one index at once; none may build or release it meanwhile. An index can be pickled.

    Args:
        spec: "flat", "ivf", "fast", "auto", or a FAISS factory string ("IVF1024,Flat", "HNSW32", "PQ96x4fs,RFlat").
        distance_metric: "euclidean", "squared_euclidean", "cosine" (1 - cos), "manhattan" or "dot": minus the
            inner product, so that the largest is the nearest, which "fast" and "auto" search exactly.
        device: Where to hold and search the bank; None: where the features are.
        nprobe: Inverted lists that an IVF index visits; None: tuned, or FAISS's default for a factory string.
        target_recall: Share of the exact neighbours that "fast", "ivf" or "auto" must find on held-out rows of the
            bank (neither they nor their near-twins count); None: 0.99. With a factory string it has the recall
            measured, and nprobe tuned where the string has inverted lists. `stats.recall` says what was measured.
        storage_dtype: Dtype of the stored rows; None: the features' own, float64 as float32 where that neither merges
            rows, nor moves them by more than a millionth of their spread, nor changes what is near what
            (`stats.storage_dtype` says which). torch.float16 and torch.bfloat16 take half the memory of float32 and
            round each coordinate by up to 2⁻¹¹ and 2⁻⁸ of its size (float16 refuses values above 65,504): distances are
            exact, but those of the rounded rows, so neighbours nearer to each other than that can change places.
        chunk_size: Queries searched at once; -1: chosen so that memory stays bounded. Where a GPU's memory runs out
            all the same, smaller parts are searched, then the CPU searches, each with a warning.

    Raises:
        ValueError: If an argument is out of range, or FAISS, where it is installed, cannot parse the spec.

    Example:
        >>> index = KNNIndex().build(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
        >>> index.search(torch.tensor([[0.0, 0.0]]), k=2)
        Neighbors(distances=tensor([[0., 1.]]), indices=tensor([[0, 2]]))
    """

    def __init__(
        self,
        spec: str = "flat",
        *,
        distance_metric: str = "euclidean",
        device: torch.device | str | None = None,
        nprobe: int | None = None,
        target_recall: float | None = None,
        storage_dtype: torch.dtype | None = None,
        chunk_size: int = -1,
    ) -> None:
        if not isinstance(spec, str) or not spec:
            raise ValueError(
                f"`spec` must be 'flat', 'ivf', 'fast', 'auto' or a FAISS factory string, got {shown(spec)}"
            )
        nprobe = None if nprobe is None else as_count(nprobe, "`nprobe`")
        target_recall = None if target_recall is None else as_number(target_recall, "`target_recall`")
        if target_recall is not None and not 0 < target_recall <= 1:
            raise ValueError(f"`target_recall` must be in (0, 1], got {target_recall!r}")
        if not any(storage_dtype is dtype for dtype in _STORAGE):
            raise ValueError(f"`storage_dtype` must be None or one of {_STORAGE[1:]}, got {shown(storage_dtype)}")
        chunk_size = as_integer(chunk_size, "`chunk_size`")
        if chunk_size < 1 and chunk_size != -1:
            raise ValueError(f"`chunk_size` must be a positive integer, or -1 to choose it, got {chunk_size}")
        check_numbers(spec)
        self.spec = spec
        self.device = device
        self.nprobe = nprobe
        self.target_recall = target_recall
        self.storage_dtype = storage_dtype
        self.chunk_size = min(chunk_size, sys.maxsize)
        self._distance = get_distance(distance_metric)
        _check_spelling(spec, self._distance.faiss_metric)
        self._is_squared = distance_metric == "squared_euclidean"
        self._ordering = ordered_by(self._distance)
        self._engine: Engine | None = None
        self._released: Engine | None = None
        self._rows: StoredRows | None = None
        self._build_seconds = 0.0
        self._step = _CHUNK
        self._changes = 0
        self._access = _Access()
        self._measured: float | None = None
        self._known_queries: Tensor | None = None
        self._request = EngineRequest(spec)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_access"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._access = _Access()

    @property
    def distance_metric(self) -> str:
        """Name of the distance."""
        return self._distance.name

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    @property
    def dim(self) -> int:
        """Width of the rows, d."""
        return self._built()[0].dim

    def build(
        self,
        features: Tensor | np.ndarray,
        *,
        expected_k: int = DEFAULT_K,
        expected_queries: int | None = None,
    ) -> Self:
        """Index `features`; a second call indexes others in their place and keeps what was learned while it holds.

        The index refers to the features where it need not copy them: do not change them while it is in use.

        Args:
            features: (N, d) tensor, ndarray or memmap of any float dtype.
            expected_k: The k that target_recall is met for.
            expected_queries: How many queries will be searched until the next build, for "auto" to weigh what a build
                costs; None: as many as there are rows.

        Raises:
            ValueError: If features are empty, not (N, d), not finite, or zero under cosine; or too few for the spec.
        """
        start = time.perf_counter()
        if expected_queries is not None:
            expected_queries = min(as_integer(expected_queries, "`expected_queries`"), sys.maxsize)
        expected_k = min(as_count(expected_k, "`expected_k`"), sys.maxsize)
        request = EngineRequest(self.spec, self.nprobe, self.target_recall, expected_k, expected_queries)
        self._step = self.chunk_size if self.chunk_size > 0 else _CHUNK
        try:
            self._index(features, self.device, request)
        except torch.cuda.OutOfMemoryError as error:
            reason = first_line(error)
        else:
            reason = ""
        if reason:  # only now: the traceback held on to what had been allocated
            self._move_to_cpu(features, request, reason)
        self._build_seconds = time.perf_counter() - start
        return self

    def _index(self, features: Tensor | np.ndarray, device: torch.device | str | None, request: EngineRequest) -> None:
        rows = StoredRows(
            features, storage_dtype=self.storage_dtype, device=device, normalized=self._distance.normalized
        )
        with full_precision(rows.device):
            rows.check(self._distance)
            self.release()
            self._measured = None
            previous, self._released = self._released, None
            self._engine = make_engine(request, rows, self._ordering, previous, self._known_queries_for(rows))
        self._rows, self._request = rows, request

    def _move_to_cpu(self, features: Tensor | np.ndarray, request: EngineRequest, reason: str) -> None:
        logger.warning("the GPU's memory does not suffice for {} rows, so the CPU searches: {}", len(features), reason)
        self.release()
        torch.cuda.empty_cache()
        self._index(features, "cpu", request)

    def release(self) -> None:
        """Forget the rows and free their memory; what was learned from them is kept for the next `build`."""
        if self._engine is not None:
            self._engine.release()
            self._engine, self._released = None, self._engine
        self._rows = None

    def _known_queries_for(self, rows: StoredRows) -> Tensor | None:
        """Return queries that an earlier bank was found wanting for, if rows are as wide as they."""
        known = self._known_queries
        if known is None or known.shape[1] != rows.dim:
            return None
        return known.to(rows.device, torch.float64 if rows.dtype == torch.float64 else known.dtype)

    def search(self, queries: Tensor | np.ndarray, k: int) -> Neighbors:
        """Find the k nearest rows of each query.

        Args:
            queries: (B, d) of any float dtype, anywhere.
            k: How many; at most N are returned.

        Returns:
            `Neighbors` on the queries' device: (B, min(k, N)) float32 distances, ascending, and int64 indices. Equal
            distances are ordered by index; a neighbour that an approximate index did not find is (inf, -1), last. A
            distance beyond float32 is its largest number, never inf.

        Raises:
            ValueError: If k < 1, the width differs from the bank's, or a query is not finite, or zero under cosine.
        """
        return self._reported(self._nearest(queries, k)).single()

    def _search_checked(self, queries: Tensor, k: int) -> Neighbors:
        """Search queries that are known to be finite in float32 and, under cosine, not zero: no GPU is waited for."""
        return self._reported(self._nearest(queries, k, is_checked=True)).single()

    def _reported(self, neighbors: Neighbors) -> Neighbors:
        """Return distances for what neighbours are ordered by: squares for their roots, where those are asked for."""
        return neighbors.squared() if self._is_squared else neighbors

    def _nearest(self, queries: Tensor | np.ndarray, k: int, *, is_checked: bool = False) -> Neighbors:
        """Find the k nearest rows by (distance, index), the distances in float64 and, instead of squares, their roots.

        Where a GPU's memory does not suffice, it is tried again with less.
        """
        rows, _ = self._built()
        k = min(as_k(k), len(rows))
        while True:
            state = self._changes
            try:
                self._retune_for(k)
                return self._search_parts(queries, k, is_checked=is_checked)
            except torch.cuda.OutOfMemoryError as error:
                shortage = first_line(error)
            self._spare_memory(state, shortage)  # only now: the traceback held on to what had been allocated

    def _search_parts(self, queries: Tensor | np.ndarray, k: int, *, is_checked: bool) -> Neighbors:
        with self._access.shared():
            rows, engine = self._built()

            def search() -> tuple[Tensor, Tensor]:
                with full_precision(rows.device):
                    prepared = as_queries(queries, rows, self._distance, checked=is_checked)
                    parts = [engine.search(part, k) for part in torch.split(prepared, self._step)]
                distances, indices = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
                return distances, indices

            # All of it there: of what PyTorch divided before, its threads would still spin and take our threads' cores.
            count = len(queries) if engine.backend == "torch" and getattr(queries, "ndim", 0) == 2 else 0
            distances, indices = run_search(search, rows, count)
        device = queries.device if isinstance(queries, Tensor) else rows.device
        return Neighbors(distances.to(device), indices.to(device))

    def _spare_memory(self, state: int, shortage: str) -> None:
        """Search in smaller parts from now on, which finds the same, and where they are smallest, on the CPU.

        Args:
            state: The number of changes when the memory ran out: another thread may have made the next one since.
            shortage: What ran out.
        """
        with self._access.alone():
            if self._changes != state:
                return
            self._changes += 1
            if self._step <= _LEAST_CHUNK:
                self._move_to_cpu(self._built()[0].data, self._request, shortage)
                return
            self._step = max(_LEAST_CHUNK, min(self._step, _SCARCE_CHUNK) // 4)
            torch.cuda.empty_cache()
            logger.warning("the GPU's memory is short, so {} queries are searched at once: {}", self._step, shortage)

    def _retune_for(self, k: int) -> None:
        """Tune anew for a k of more than twice the one that the engine was tuned for."""
        with self._access.shared():
            if not self._is_tuned_for_less(k):
                return
        with self._access.alone():
            if self._is_tuned_for_less(k):  # no other thread has done it meanwhile
                rows, engine = self._built()
                with full_precision(rows.device):
                    engine.retune(k, self._known_queries_for(rows))

    def _is_tuned_for_less(self, k: int) -> bool:
        tuned_k = self._built()[1].tuned_k
        return tuned_k is not None and k > 2 * tuned_k

    def check_spec(self, dim: int) -> None:
        """Check that FAISS can make the index for rows of width `dim`, before there are any.

        Raises:
            ValueError: If it cannot.
        """
        check_alive(self.spec, dim, self._distance.faiss_metric)

    def measure_recall(self, queries: Tensor | np.ndarray, k: int) -> float:
        """Measure the share of queries' exact neighbours that the index finds; `stats.recall` is that from then on.

        The queries are searched exactly too, with no copy of the bank. Where the recall is below `target_recall` for
        certain, 256 of them are kept, and the next build is tuned on them.

        Args:
            queries: (B, d), such as are really asked.
            k: Neighbours of each.

        Raises:
            ValueError: As `search`.

        Example:
            >>> index = KNNIndex("HNSW8").build(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))
            >>> index.measure_recall(torch.zeros(1, 8), k=5)
            1.0
            >>> index.stats.recall_of
            'queries'
        """
        rows, _ = self._built()
        k = min(as_k(k), len(rows))
        ids = self._nearest(queries, k).indices
        with self._access.shared():
            rows, engine = self._built()
            if engine.exact or len(ids) == 0:
                return 1.0
            with full_precision(rows.device):
                known_queries = as_queries(queries, rows, self._distance)
                sample = recall_sample(rows, self._ordering, k, known_queries)
                share, error = sample.recall(ids.to(rows.device))
        self._measured = share
        if share + 2 * error < self._request.target:
            self._known_queries = known_queries[:_KEPT_QUERIES].clone()
        return share

    @property
    def stats(self) -> IndexStats:
        """What the index is and what it cost; grows with searches (`uncertified`)."""
        with self._access.shared():
            return self._stats(*self._built())

    def _stats(self, rows: StoredRows, engine: Engine) -> IndexStats:
        return IndexStats(
            spec=engine.spec,
            exact=engine.exact,
            backend=engine.backend,
            device=str(engine.device),
            bytes=engine.bytes,
            build_seconds=self._build_seconds,
            nprobe=engine.nprobe,
            recall=engine.recall if self._measured is None else self._measured,
            recall_of=engine.recall_of if self._measured is None else "queries",
            uncertified=engine.uncertified,
            storage_dtype=str(rows.dtype).removeprefix("torch."),
            parameters=engine.parameters,
        )

    def _built(self) -> tuple[StoredRows, Engine]:
        if self._rows is None or self._engine is None:
            raise RuntimeError("the index is empty: call build(features) first")
        return self._rows, self._engine


class _Access:
    """Lets any number of threads search at once, and one that changes the index only while nobody searches.

    A thread that waits to change goes before searches that have not begun. Neither may be asked for within the other.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._searching = self._waiting = 0
        self._is_changing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the index as it is, beside others who do."""
        with self._condition:
            self._condition.wait_for(lambda: not (self._is_changing or self._waiting))
            self._searching += 1
        try:
            yield
        finally:
            with self._condition:
                self._searching -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the index to oneself."""
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not (self._is_changing or self._searching))
                self._is_changing = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._is_changing = False
                self._condition.notify_all()


@lru_cache(256)
def _check_spelling(spec: str, metric: str) -> None:
    """Check that FAISS can parse a factory string, as far as that is known before the width of the rows is.

    Without FAISS any string passes: on a GPU an exact search takes its place.

    Raises:
        ValueError: With what FAISS says.
    """
    if spec in SPECS:
        return
    try:
        make_index(spec, _ANY_DIM, metric)
    except ImportError:
        return
    except ValueError as error:
        if "could not parse" in str(cause := error.__cause__) and isinstance(cause, RuntimeError):
            raise ValueError(
                "`spec` must be 'flat', 'ivf', 'fast', 'auto' or a FAISS factory string as FAISS spells it, got "
                f"{spec!r}: {reason(cause)}"
            ) from cause
