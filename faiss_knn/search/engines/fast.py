"""index="fast": a scan of estimates, over the leading directions or in int8, and exact distances of the best."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance
from faiss_knn.search.engines.bounds import BOUND_COLUMNS, ProductBounds
from faiss_knn.search.engines.costs import search_cost
from faiss_knn.search.engines.int8_bounds import Int8Bounds, may_scan_in_int8
from faiss_knn.search.engines.matrix_product import has_fast_int8, scan_dtype
from faiss_knn.search.engines.projection import SAMPLE_ROWS, leading_directions, participation_ratio
from faiss_knn.search.engines.recall_sample import HELD_OUT, RECHECK, RecallSample, recall_sample, recall_source
from faiss_knn.search.engines.rerank import measure_quickly, nearest
from faiss_knn.search.engines.scan import best_scores, run_search, search_in_parts
from faiss_knn.search.stored_rows import StoredRows

_SHARES = (0.125, 0.25, 0.375, 0.5)  # of the dimensions, scanned instead of all
_FACTORS = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0)
_SPARE = 280  # candidates beyond k that a factor may ask for: selecting more takes longer than measuring them
_EVEN = 0.5  # of the dimensions: rows that spread over so many directions are not projected
_SAMPLE = 4096  # rows to foretell a tuning from; of a small bank no more than a quarter
_LEAST_FORETOLD = 1 << 16  # rows; below, to try all takes no longer
_CHUNK = 512
_KEPT = 1 << 18


class Tuned(NamedTuple):
    """What a tuning chose, kept from one bank to the next.

    Attributes:
        basis: (d, m) directions to scan; None: all coordinates.
        factor: Candidates measured per neighbour asked for.
        k: The k it was measured at.
        dtype: What is scanned in.
    """

    basis: Tensor | None
    factor: float
    k: int
    dtype: torch.dtype

    def candidates(self, k: int) -> int:
        """Return how many candidates to measure for k neighbours: never fewer spare ones than at the tuned k."""
        return max(math.ceil(self.factor * k), k + math.ceil((self.factor - 1) * self.k))


class _Choice(NamedTuple):
    cost: float
    bounds: ProductBounds
    tuned: Tuned
    recall: float


class FastEngine:
    """Approximate neighbours at a measured recall; their distances are exact.

    Args:
        rows: The bank.
        distance: One that is measured by euclidean norms.
        k: The k that the recall is met for.
        target: The recall to meet.
        previous: What was chosen for an earlier bank: kept if it still meets the target.
        known_queries: (n, d) queries of an earlier bank to measure on; None: rows of the bank.
        stands_for: How many rows to choose for, where the bank is a sample of them.

    Example:
        >>> from faiss_knn.search.distance import get_distance
        >>> bank = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
        >>> engine = FastEngine(StoredRows(bank), get_distance("euclidean"), k=5, target=0.99)
        >>> engine.recall >= 0.99, engine.search(bank[:2], k=1)[1].flatten().tolist()
        (True, [0, 1])
    """

    exact = False
    spec = "fast"
    backend = "torch"
    nprobe = None
    uncertified = 0

    def __init__(
        self,
        rows: StoredRows,
        distance: Distance,
        k: int,
        target: float,
        previous: Tuned | None = None,
        known_queries: Tensor | None = None,
        stands_for: int | None = None,
    ) -> None:
        self._stands_for = len(rows) if stands_for is None else stands_for
        self._known_queries = known_queries
        self.recall_of = recall_source(known_queries)
        self._rows = rows
        self.device = rows.device
        self._distance = distance
        self._target = target
        self.recall = 0.0
        self.tuned: Tuned
        if previous is not None and previous.basis is not None:
            previous = previous._replace(basis=previous.basis.to(rows.device), dtype=scan_dtype(rows.device))
        self._warm = previous is not None and self._still_meets_target(previous, k)
        if not self._warm:
            self.tune(k)

    @property
    def bytes(self) -> int:
        """Size of the bank and what was made of it."""
        return self._rows.bytes + self._bounds.bytes

    @property
    def tuned_k(self) -> int:
        """The k that the recall is met for."""
        return self.tuned.k

    @property
    def parameters(self) -> dict[str, object]:
        """What was tuned."""
        dims = self._rows.dim if self.tuned.basis is None else self.tuned.basis.shape[1]
        return {
            "k_factor": self.tuned.factor,
            "scan_dims": dims,
            "scan_dtype": str(self.tuned.dtype).removeprefix("torch."),
            "tuned_k": self.tuned.k,
            "warm": self._warm,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        is_released = "_rows" not in state
        if self.tuned.dtype == torch.int8 and not is_released and not has_fast_int8(self.device):
            # Not bfloat16, whose scores are rounded too: it may find fewer with so many candidates.
            self.tuned = self.tuned._replace(dtype=torch.float32)
            self._bounds = self._made(torch.float32)

    def release(self) -> None:
        """Drop the rows and keep what was tuned; nothing can be searched after that."""
        del self._rows, self._bounds

    def _still_meets_target(self, previous: Tuned, k: int) -> bool:
        """Take over an earlier choice if a few held-out rows confirm it."""
        basis, most = previous.basis, len(self._rows) - 1  # neighbours that any tuning can be for
        is_fit = previous.dtype in self._whole_dtypes() if basis is None else len(basis) == self._rows.dim
        if previous.k < min(k, most) or not is_fit:
            return False
        self.tuned = previous
        self._bounds = self._made(previous.dtype, previous.basis)
        sample = self._sample(None if previous.basis is not None else self._bounds, k, RECHECK)
        kept = previous.candidates(k)
        found = self._scan(self._bounds, sample.queries, min(kept + sample.further, len(self._rows)))
        self.recall, error = sample.recall(sample.counted(found, kept))
        return self.recall + 2 * error >= self._target  # unless they refute it

    def _whole_dtypes(self) -> list[torch.dtype]:
        """Return what all coordinates may be scanned in, the fastest and roughest first."""
        dtypes = [torch.int8] if may_scan_in_int8(self._rows, self._distance) else []
        return list(dict.fromkeys([*dtypes, scan_dtype(self.device), torch.float32]))

    def _made(self, dtype: torch.dtype, basis: Tensor | None = None) -> ProductBounds:
        if dtype == torch.int8:
            return Int8Bounds(self._rows, self._distance)
        return ProductBounds(self._rows, self._distance, dtype, basis=basis)

    def retune(self, k: int, known_queries: Tensor | None = None) -> None:
        """Tune for another k, on known queries (n, d) where there are any."""
        if known_queries is not None:
            self._known_queries, self.recall_of = known_queries, recall_source(known_queries)
        self._warm = False
        self.tune(k)

    def tune(self, k: int) -> None:
        """Choose what to scan and how many candidates: the cheapest by the cost model among those that meet the target.

        All coordinates in int8 come first. Then a large bank is projected to as many directions as were best for a
        sample of it, or not at all; another begins with the fewest, and ends where even the least number of candidates
        would make more of them too dear. All coordinates in other dtypes come last. Where nothing meets the target, it
        takes what finds most.
        """
        narrow, dtypes = scan_dtype(self.device), self._whole_dtypes()
        whole = self._bounds = self._made(dtypes[0])
        sample = self._sample(whole, k, HELD_OUT)
        k = sample.neighbors.shape[1]
        best = _Choice(math.inf, whole, Tuned(None, 1.0, k, whole.dtype), 0.0)

        def may_pay(dims: int, dtype: torch.dtype = narrow) -> bool:
            return self._cost(dims, k, dtype) < best.cost

        def better(bounds: ProductBounds, basis: Tensor | None = None) -> _Choice:
            choice = self._choice(bounds, basis, sample)
            return min(choice, best, key=lambda one: (one.cost, -one.recall))

        if whole.dtype == torch.int8:
            best = better(whole)
            dtypes.remove(torch.int8)
        for basis, widths in self._projections(k, may_pay):
            rotated = self._made(narrow, basis)
            for dims in widths:
                if not may_pay(dims):
                    break
                best = better(rotated.narrowed(dims), basis[:, :dims].contiguous())
        for dtype in dtypes:
            if may_pay(self._rows.dim, dtype):
                best = better(whole if whole.dtype == dtype else self._made(dtype))
        del whole, self._bounds
        self._bounds, self.tuned, self.recall = best.bounds, best.tuned, best.recall
        if self.tuned.basis is not None:
            self._bounds = self._bounds.compact()

    def _choice(self, bounds: ProductBounds, basis: Tensor | None, sample: RecallSample) -> _Choice:
        """Find how many candidates bounds need; where no number meets the target, the cost is infinite."""
        factor, recall, is_met = self._least_factor(bounds, sample)
        tuned = Tuned(basis, factor, sample.neighbors.shape[1], bounds.dtype)
        dims = self._rows.dim if basis is None else basis.shape[1]
        cost = self._cost(dims, factor * tuned.k, bounds.dtype) if is_met else math.inf
        return _Choice(cost, bounds, tuned, recall)

    def _projections(self, k: int, may_pay: Callable[[int], bool]) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield directions (d, m), and how many of them may be scanned, ascending, while more of them may pay."""
        widths, sample = self._widths(), self._rows.sample(SAMPLE_ROWS, self._distance)
        sample -= sample.median(0).values
        if participation_ratio(sample) > _EVEN * self._rows.dim:
            return
        if self._stands_for == len(self._rows) >= _LEAST_FORETOLD:
            foretold = foretell(self._rows, self._distance, k, self._target)
            if foretold.basis is not None:
                most = foretold.basis.shape[1]
                yield foretold.basis, [width for width in widths if width <= most][-2:]
            return
        half = len(widths) // 2
        for some in (widths[:half], widths[half:]):  # the time to find them grows with the square of their number
            if some and may_pay(some[0]):
                yield leading_directions(sample, some[-1])[0], some

    def _widths(self) -> list[int]:
        """Return how many directions may be scanned, ascending, with the other columns multiples of 32."""
        most = max(1, self._rows.dim // 2)
        widths = [max(1, round(share * self._rows.dim / 32) * 32 - BOUND_COLUMNS) for share in _SHARES]
        return sorted({min(width, most) for width in widths})

    def _sample(self, bounds: ProductBounds | None, k: int, count: int) -> RecallSample:
        return recall_sample(self._rows, self._distance, k, self._known_queries, count=count, bounds=bounds)

    def _cost(self, dims: int, candidates: float, dtype: torch.dtype) -> float:
        return search_cost(self._stands_for, self._rows.dim, dims, int(candidates), dtype, is_quick=True)

    def _least_factor(self, bounds: ProductBounds, sample: RecallSample) -> tuple[float, float, bool]:
        """Return the smallest factor that meets the target, or the largest; the recall with it; whether it is met."""
        k = sample.neighbors.shape[1]
        factors = [factor for factor in _FACTORS if factor * k <= k + _SPARE]
        most = min(math.ceil(factors[-1] * k) + sample.further, len(self._rows))
        found = sample.counted(self._scan(bounds, sample.queries, most), most)
        for factor in factors:
            share, error = sample.recall(found[:, : math.ceil(factor * k)])
            if share - error >= self._target:
                return factor, share, True
        return factor, share, False

    def _scan(self, bounds: ProductBounds, queries: Tensor, kept: int) -> Tensor:
        """Return the ids (B, kept) of the best estimates, best first."""

        def scan() -> Tensor:
            prepared = bounds.prepare(queries, bound=False)
            scores, ids = best_scores(bounds, prepared, len(self._rows), kept)
            return ids.gather(1, scores.float().argsort(dim=1, descending=True))

        return run_search(scan, self._rows, len(queries))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ((B, k) float64 distances, (B, k) int64 ids) of queries (B, d), k at most N."""
        bounds, kept = self._bounds, min(self.tuned.candidates(k), len(self._rows))
        most = max(1, min(_CHUNK, _KEPT // kept))
        return search_in_parts(lambda part: self._search_chunk(part, k, kept, bounds), queries, k, most)

    def _search_chunk(self, queries: Tensor, k: int, kept: int, bounds: ProductBounds) -> tuple[Tensor, Tensor]:
        prepared = bounds.prepare(queries, bound=False)
        _, ids = best_scores(bounds, prepared, len(self._rows), kept)
        return nearest(measure_quickly(queries, self._rows, ids, self._distance), ids, k)


def sample_of(rows: StoredRows, distance: Distance) -> StoredRows:
    """Return rows of a bank, at random, that foretell what is best for all."""
    sample = StoredRows(rows.take(rows.random_ids(min(_SAMPLE, len(rows) // 4))))
    sample.check(distance)
    return sample


def foretell(rows: StoredRows, distance: Distance, k: int, target: float) -> Tuned:
    """Choose for a bank by a sample of it."""
    sample = sample_of(rows, distance)
    return FastEngine(sample, distance, max(1, min(k, len(sample) // 100)), target, stands_for=len(rows)).tuned
