"""The exact search: candidates by a scan of bounds, exact distances, a certificate, and a second pass without it."""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, normalize, pair_norms
from faiss_knn.search.engines.bounds import (
    BOUND_COLUMNS,
    Bounds,
    DifferenceBounds,
    InnerProductBounds,
    PreparedQueries,
    ProductBounds,
)
from faiss_knn.search.engines.costs import seconds_per_candidate, seconds_per_kept
from faiss_knn.search.engines.duplicates import Duplicates
from faiss_knn.search.engines.int8_bounds import Int8Bounds, may_scan_in_int8
from faiss_knn.search.engines.matrix_product import has_fast_int8, multiply_add_seconds, scan_dtype
from faiss_knn.search.engines.oversampling import Oversampling
from faiss_knn.search.engines.projection import SAMPLE_ROWS, leading_directions, participation_ratio
from faiss_knn.search.engines.rerank import measure, nearest
from faiss_knn.search.engines.scan import best_scores, rows_at_least, run_search, search_in_parts
from faiss_knn.search.engines.selection import needs_no_wait
from faiss_knn.search.stored_rows import StoredRows

_SMALL = 4  # a bank of fewer than this many times the candidates is measured whole
_LEEWAY = 32 << 20  # bytes that a copy may be larger than the bank
_CHUNK = 512  # queries of one pass
_SECOND_CHUNK = 64
_KEPT_BYTES = 1 << 19  # of the scores of one chunk's candidates: 64 times as much is held of the first rows
_WHOLE = 1 << 20  # distances of one, where all are measured
_SECOND_BLOCK = 8192  # rows for so many queries, more for fewer
_WIDE = 512  # narrower rows gain too little from a projection
_BASIS_SHARE = 3  # of the dimensions at most one in so many
_LEFT_OUT = 0.03  # energy that a projection may leave out: its bound must exclude nearly all rows
# Of a second pass, that of each, per byte scanned, and per row of each query.
_PASS_SECONDS, _READ_SECONDS, _COMPARED_SECONDS = 1e-3, 2e-10, 3e-9
_TRIAL, _LOOSE = 64, 0.3  # bounds are too loose if after so many queries such a share is uncertified
_FIRST, _FIRST_INT8 = 32, 128  # candidates beyond k, or k of them, before anything is known
_SPENT = 0.9  # of what a product in int8 saves, as modelled, that its candidates may cost
_FURTHER = 16  # candidates measured at a time beyond the first ones, at least
_FEW_LOST, _LOOSE_INT8 = 4, 0.02  # queries of one pass, and their share, that bounds in int8 may fail to certify


class ExactEngine:
    """Exact nearest neighbours, certified: `uncertified` counts the queries that took the second pass.

    Args:
        rows: The bank.
        distance: Which distance.
        lean: Whether to make nothing of the bank beforehand: for a few queries.
        bounds: What another engine made of the same rows and scans by, to be used instead of making one.
        previous: The engine of an earlier bank: what was too loose for its bounds is not tried again.

    Example:
        >>> from faiss_knn.search.distance import get_distance
        >>> engine = ExactEngine(StoredRows(torch.tensor([[0.0], [3.0], [1.0]])), get_distance("euclidean"))
        >>> engine.search(torch.tensor([[0.9]], dtype=torch.float64), k=2)[1]
        tensor([[2, 0]])
    """

    exact = True
    spec = "flat"
    backend = "torch"
    nprobe = None
    recall = 1.0
    recall_of = None
    tuned_k = None

    def __init__(
        self,
        rows: StoredRows,
        distance: Distance,
        *,
        lean: bool = False,
        bounds: ProductBounds | None = None,
        previous: "ExactEngine | None" = None,
    ) -> None:
        self._rows = rows
        self.device = rows.device
        self._distance = distance
        self._duplicates: Duplicates | None = None
        self.uncertified = self._trial_searched = self._trial_uncertified = self._trial_needed = 0
        self._lean = lean
        self._lock = threading.RLock()
        self._oversampling: dict[int, Oversampling] = {}
        self._basis: Tensor | None = None
        if distance.norm != 1 and not lean:
            self._duplicates = Duplicates.among(rows)
            self._basis = _worthwhile_basis(rows, distance)
        self._is_int8_loose: bool = previous is not None and previous._is_int8_loose
        if bounds is not None:
            self._dtype = bounds.dtype
        elif lean or self._basis is not None or self._is_int8_loose or not may_scan_in_int8(rows, distance):
            self._dtype = scan_dtype(rows.device)
        else:
            self._dtype = torch.int8
        self._bounds: Bounds | None = bounds
        self._made_bounds()

    @property
    def bytes(self) -> int:
        """Size of the bank and what was made of it."""
        with self._lock:
            return self._rows.bytes + self._made_bounds().bytes

    @property
    def parameters(self) -> dict[str, object]:
        """What the scan computes in."""
        with self._lock:
            if not isinstance(self._made_bounds(), ProductBounds):
                return {}
            dims = self._rows.dim if self._basis is None else self._basis.shape[1]
            return {"scan_dtype": str(self._dtype).removeprefix("torch."), "scan_dims": dims}

    def retune(self, k: int, known_queries: Tensor | None = None) -> None:
        """Do nothing: it is exact at any k."""

    def release(self) -> None:
        """Drop the rows; nothing can be searched after that."""
        del self._rows, self._bounds, self._duplicates

    def _made_bounds(self) -> Bounds:
        """Return the bounds, made if there are none: memory may have run out when they were to be made before."""
        if self._bounds is None:
            self._bounds = self._made()
        return self._bounds

    def _made(self) -> Bounds:
        if self._distance.norm == 1:
            return DifferenceBounds(self._rows)
        later = None if self._duplicates is None else self._duplicates.later
        if self._dtype == torch.int8:
            return Int8Bounds(self._rows, self._distance, passed_over=later)
        kind = InnerProductBounds if self._distance.norm == 0 else ProductBounds
        return kind(self._rows, self._distance, self._dtype, passed_over=later, basis=self._basis, room=self._room())

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()
        is_released = "_rows" not in state
        if self._dtype == torch.int8 and not is_released and not has_fast_int8(self.device):  # products may saturate
            self._tighten()

    def _now(self, k: int) -> tuple[Bounds, Oversampling]:
        """Return what a search goes by until its end, whatever others change meanwhile."""
        with self._lock:
            return self._made_bounds(), self._oversampling_for(k)

    def _oversampling_for(self, k: int) -> Oversampling:
        if k not in self._oversampling:
            scanned = self._made_bounds().bytes or self._rows.bytes
            # On a CPU it is selected, and measured only if it may be among the nearest.
            is_selected = needs_no_wait(self.device)
            candidate = seconds_per_kept(len(self._rows)) if is_selected else seconds_per_candidate(self._rows.dim)
            second_pass = _PASS_SECONDS + scanned * _READ_SECONDS
            first = _FIRST_INT8 if self._dtype == torch.int8 else _FIRST
            query = len(self._rows) * _COMPARED_SECONDS
            self._oversampling[k] = Oversampling(k, candidate, second_pass, query, first)
        return self._oversampling[k]

    def _room(self) -> int:
        """Return what a copy may take so that, with all else that is kept of it, the bank is held twice at most."""
        if self._lean:
            return 0
        duplicates_bytes = 0 if self._duplicates is None else self._duplicates.bytes
        return self._rows.bytes + _LEEWAY - duplicates_bytes - (8 * len(self._rows) if self._distance.normalized else 0)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ((B, k) float64 distances, (B, k) int64 ids) of queries (B, d), k at most N."""
        if len(self._rows) <= _SMALL * (k + max(20, k)):
            return search_in_parts(
                lambda part: self._measured_whole(part, k), queries, k, max(1, _WHOLE // len(self._rows))
            )
        bounds, oversampling = self._now(k)
        most = max(1, min(_CHUNK, _KEPT_BYTES // (bounds.score_dtype.itemsize * (k + oversampling.count))))
        del bounds  # so that tighter ones can take their place
        return search_in_parts(lambda part: self._search_part(part, k), queries, k, most, together=self._rows.streamed)

    def _search_part(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        while True:
            bounds, oversampling = self._now(k)
            count = oversampling.count
            distances, ids, needed = self._first_pass(queries, k, bounds, count, oversampling.usual)
            lost = [query for query, need in enumerate(needed) if need > count]
            # A second pass by bounds in int8 may measure so many rows that another first one is cheaper.
            is_anew = isinstance(bounds, Int8Bounds) and len(lost) > max(_FEW_LOST, _LOOSE_INT8 * len(queries))
            for start in range(0, 0 if is_anew else len(lost), _SECOND_CHUNK):
                some = lost[start : start + _SECOND_CHUNK]
                part = torch.tensor(some, device=queries.device)
                distances[part], ids[part], within = self._second_pass(queries[part], k, distances[part, -1], bounds)
                for query, reached in zip(some, within.tolist(), strict=True):
                    needed[query] = max(needed[query], reached - k + 1)
            del bounds  # so that tighter ones can take their place
            with self._lock:
                are_current = oversampling is self._oversampling.get(k)  # else they have, meanwhile
                if is_anew:
                    if are_current:
                        self._tighten() if count >= oversampling.first else oversampling.begin_anew()
                    continue
                self.uncertified += len(lost)
                if are_current:
                    self._learn(oversampling, needed, count)
            return distances, ids

    def _first_pass(
        self, queries: Tensor, k: int, bounds: Bounds, count: int, usual: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Search by bounds and `count` candidates beyond k; also say how many each query would have needed.

        Args:
            queries: (b, d).
            k: How many neighbours.
            bounds: To scan by.
            count: Candidates beyond k.
            usual: How many of them to measure at once, before it is known which may be among the k nearest.
        """
        prepared = bounds.prepare(queries)
        scores, ids = best_scores(bounds, prepared, len(self._rows), min(k + count, len(self._rows)))
        ids = ids if self._duplicates is None else self._duplicates.mask_copies(ids)
        measured = self._measured(queries, k, bounds, prepared, scores, ids, usual)
        distances, ids = self._followed(*nearest(*measured, k), k)
        # Certified: not all candidates can be within the k-th distance, hence no row that scored lower than they.
        within = scores.double() >= bounds.least_score(prepared, self._distance.to_norm(distances[:, -1]))[:, None]
        counts = within.sum(1).tolist()  # the one time that a GPU is waited for
        return distances, ids, [count + 1 if reached == scores.shape[1] else reached - k + 1 for reached in counts]

    def _measured(
        self,
        queries: Tensor,
        k: int,
        bounds: Bounds,
        prepared: PreparedQueries,
        scores: Tensor,
        ids: Tensor,
        usual: int,
    ) -> tuple[Tensor, Tensor]:
        """Measure those candidates that may be among the k nearest: ((B, m) distances, (B, m) ids)."""
        if not needs_no_wait(ids.device) or ids.shape[1] <= k:  # a GPU would be waited for
            return measure(queries, self._rows, ids, self._distance), ids
        scores, order = scores.sort(dim=1, descending=True)
        ids = ids.gather(1, order)
        distances = torch.full(ids.shape, torch.inf, dtype=torch.float64, device="cpu")
        start, stop, asked = 0, min(k + usual, ids.shape[1]), torch.arange(len(queries), device="cpu")
        while len(asked) > 0:
            some = ids[asked, start:stop]
            distances[asked, start:stop] = measure(queries[asked], self._rows, some, self._distance)
            # What is farther than the k nearest so far, by its score, need not be measured.
            limits = distances[:, :stop].kthvalue(k, dim=1).values
            least = bounds.least_score(prepared, self._distance.to_norm(limits))
            start, stop = stop, min(stop + max(_FURTHER, k // 2), ids.shape[1])
            asked = (scores[:, start].double() >= least).nonzero()[:, 0] if start < stop else asked[:0]
        return distances[:, :start], ids[:, :start]

    def _learn(self, oversampling: Oversampling, needed: list[int], count: int) -> None:
        oversampling.learn(needed)
        self._trial_searched += len(needed)
        self._trial_uncertified += sum(need > count for need in needed)
        self._trial_needed += sum(min(need, count) for need in needed)  # further ones are in `oversampling.seconds`
        if self._trial_searched >= _TRIAL and self._are_too_loose(oversampling.seconds):
            self._tighten()

    def _are_too_loose(self, seconds: float) -> bool:
        if self._trial_uncertified > _LOOSE * self._trial_searched:
            return True
        if self._dtype != torch.int8:
            return False
        return not pays_in_int8(self._rows, len(self._rows), self._trial_needed / self._trial_searched, seconds)

    def candidates_needed(self, rows: int, k: int) -> float:
        """Foretell how many candidates beyond k a query needs on average in a bank that these rows are a sample of.

        Args:
            rows: Of the bank.
            k: How many neighbours.
        """
        bounds, share = self._made_bounds(), len(self._rows) / rows
        near = min(1 + max(1, round(k * share)), len(self._rows))  # each query finds itself
        queries = self._rows.take(self._rows.random_ids(_TRIAL))
        distances = run_search(lambda: self.search(queries, near), self._rows, len(queries))[0][:, -1]
        prepared = bounds.prepare(queries)
        least = bounds.least_score(prepared, self._distance.to_norm(distances))
        reached = bounds.scores(prepared, 0, len(self._rows)).double() >= least
        return float(reached.sum(0).double().mean() - near) / share

    def _followed(self, distances: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return (distances, ids) if self._duplicates is None else self._duplicates.expand(distances, ids, k)

    def _tighten(self) -> None:
        """Go on with tighter bounds: bfloat16 instead of int8, all coordinates, float32 instead of bfloat16."""
        self._trial_searched = self._trial_uncertified = self._trial_needed = 0
        self._oversampling = {}
        if self._dtype == torch.int8:
            self._dtype, self._is_int8_loose = scan_dtype(self.device), True
        elif self._basis is not None:
            self._basis = None
        elif self._dtype == torch.bfloat16:
            self._dtype = torch.float32
        else:
            return
        self._bounds = None  # before the next are made: one copy at a time, unless another thread searches by it
        self._made_bounds()

    def _second_pass(self, queries: Tensor, k: int, limits: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
        """Measure every row whose bound does not exclude it from the k nearest, and also count them (b,).

        Args:
            queries: (b, d).
            k: How many neighbours.
            limits: (b,) distances that k rows are known to be within.
            bounds: What excludes them.
        """
        prepared = bounds.prepare(queries)
        best = torch.empty(len(queries), 0, dtype=torch.float64, device=queries.device)
        ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        step = _SECOND_BLOCK * _SECOND_CHUNK // len(queries)
        for start in range(0, len(self._rows), step):
            scores = bounds.scores(prepared, start, min(start + step, len(self._rows)))
            query, row = rows_at_least(scores, bounds.least_score(prepared, self._distance.to_norm(limits)))
            row = row + start
            counts += query.bincount(minlength=len(queries))
            if self._duplicates is not None:
                first = self._duplicates.mask_copies(row) >= 0
                query, row = query[first], row[first]
            measured = measure(queries, self._rows, row[:, None], self._distance, of=query)[:, 0]
            dense, dense_ids = _by_query(query, measured, row, len(queries))
            best, ids = torch.cat([best, dense], 1), torch.cat([ids, dense_ids], 1)
            best, ids = nearest(best, ids, min(k, best.shape[1]))
            if best.shape[1] == k:
                limits = torch.minimum(limits, best[:, -1])
        return *self._followed(best, ids, k), counts

    def _measured_whole(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = normalize(queries) if self._distance.normalized else queries.double()
        numbers = torch.arange(len(self._rows), device=queries.device)
        parts = torch.split(numbers, _SECOND_BLOCK)
        wide = self._rows.dtype == torch.float64 and not self._distance.normalized
        norms = [
            pair_norms(queries, self._rows.as_compared(part, self._distance)[None], self._distance, wide=wide)
            for part in parts
        ]
        return nearest(self._distance.from_norm(torch.cat(norms, 1)), numbers.expand(len(queries), -1), k)


def pays_in_int8(bank: StoredRows, rows: int, needed: float, seconds: float) -> bool:
    """Tell whether the faster product outweighs the candidates that looser bounds leave.

    Args:
        bank: What is searched, or a sample of it.
        rows: How many there are in all.
        needed: Candidates beyond k that are measured of a query.
        seconds: What selecting more of them, and second passes, cost it.
    """
    saved = multiply_add_seconds(scan_dtype(bank.device)) - multiply_add_seconds(torch.int8)
    saved_of_all = rows * bank.dim * saved + _FIRST * seconds_per_kept(rows)
    return needed * seconds_per_candidate(bank.dim) + seconds <= _SPENT * saved_of_all


def _by_query(query: Tensor, distances: Tensor, ids: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Lay out found pairs (P,), in order of their query, as (queries, most) arrays filled up with (inf, -1)."""
    counts = torch.bincount(query, minlength=queries)
    place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    dense = distances.new_full((queries, int(counts.max())), torch.inf)
    dense_ids = ids.new_full(dense.shape, -1)
    dense[query, place], dense_ids[query, place] = distances, ids
    return dense, dense_ids


def _worthwhile_basis(rows: StoredRows, distance: Distance) -> Tensor | None:
    """Return (d, m) leading directions if a few of them hold nearly all the spread, else None."""
    if rows.dim < _WIDE:
        return None
    sample = rows.sample(SAMPLE_ROWS, distance)
    sample -= sample.median(0).values
    most = rows.dim // _BASIS_SHARE
    rank = participation_ratio(sample)
    if len(sample) < 2 * most or rank > most:
        return None
    for count in dict.fromkeys((min(2 * math.ceil(rank), most), most)):  # the time grows with its square
        basis, energies = leading_directions(sample, count)
        enough = (energies.cumsum(0) >= 1 - _LEFT_OUT).nonzero()
        if len(enough) > 0:
            return basis[:, : min(count, _padded(int(enough[0]) + 1))].contiguous()
    return None


def _padded(count: int) -> int:
    """Fill the product's width up to a multiple of 32 with further directions, room left for the bounds."""
    return -(-(count + BOUND_COLUMNS) // 32) * 32 - BOUND_COLUMNS
