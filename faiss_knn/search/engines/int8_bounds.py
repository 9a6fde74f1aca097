"""The same bounds in whole numbers of eight bits, which AMX and VNNI multiply twice as fast as bfloat16.

Let u and v be a row and a query, centred and scaled (see `bounds`), and û = δa, v̂ = δb with vectors a and b of whole
numbers from -127 to 127. Then û·v̂ = δ²(a·b), and a·b is computed without an error. So

    m - t <= δ²(a·b) - (h - m) + |u - û||v| + |û||v - v̂|,    h <= |u|²/2.

What is beside the product must not depend on the query, to be columns of the row: with constants V and β, which most
queries keep to, it is at most

    δ²T + E,    δ²T = m - h + |u - û|V + |û|β,    E = max|u - û|·(|v| - V)⁺ + max|û|·(|v - v̂| - β)⁺.

T is rounded up to a whole number and written in pieces that a query's columns of 127 and 1 put together. E, which is 0
for most queries, lowers the least score of a query.
"""

import math

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance
from faiss_knn.search.engines.bounds import PreparedQueries, ProductBounds, aligned
from faiss_knn.search.engines.matrix_product import has_fast_int8
from faiss_knn.search.stored_rows import StoredRows

_MOST = 127
_CLIPPED = (0.0, 1e-4, 1e-3, 3e-3, 1e-2)  # shares of the coordinates that may be beyond what is written
_USUAL, _ROOM = 0.95, 1.02  # share of the sample's rows that V and β suffice for, and what is added to them
_SAMPLED = 4  # one in so many rows of the sample that centre and scale are from
_RANGE, _MOST_PIECES = 1.5, 32  # of T, in that of the sample's; and columns for it
_LEAST, _LARGEST = 2.0**-20, 2.0**36  # of the coordinate that becomes 127: the lowest T must be below any far row's
_WEIGHTS = (127.0, 96.0, 64.0, 48.0, 32.0, 24.0, 16.0, 12.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0)  # of T, for far queries
_SINGLE = 2.0**-24
# Dimensions from which on the product is worth a faster one, and those that an int32 has room for (127² · 2¹⁷ < 2³¹).
_LEAST_DIM, _MOST_DIM = 64, 1 << 17
_DOUBLE_ERROR = 2.0**-40  # relative, of all that is computed in float64


def may_scan_in_int8(rows: StoredRows, distance: Distance) -> bool:
    """Tell whether rows can be scanned in int8, and faster than otherwise."""
    is_fit = distance.norm == 2 and not rows.streamed and _LEAST_DIM <= rows.dim <= _MOST_DIM
    return is_fit and has_fast_int8(rows.device)


class Int8Bounds(ProductBounds):
    """A centred copy of the bank in int8, a quarter of float32's size, to bound euclidean and cosine distances.

    Args:
        rows: The bank, in memory.
        distance: One that is measured by euclidean norms.
        passed_over: Numbers of rows that get a low score.

    Example:
        >>> from faiss_knn.search.distance import get_distance
        >>> rows = StoredRows(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
        >>> bounds = Int8Bounds(rows, get_distance("euclidean"))
        >>> prepared = bounds.prepare(torch.zeros(1, 2))
        >>> least = bounds.least_score(prepared, torch.tensor([1.0]))  # of all rows within a distance of 1
        >>> (bounds.scores(prepared, 0, 3) >= least).flatten().tolist()
        [True, False, True]
    """

    def __init__(self, rows: StoredRows, distance: Distance, *, passed_over: Tensor | None = None) -> None:
        super().__init__(rows, distance, torch.int8, passed_over=passed_over)
        self.score_dtype = torch.int32

    def _lay_out(self) -> None:
        """Choose δ, V, β and how many pieces T is written in, by a sample of the rows."""
        self._gamma = 0.0  # nothing is rounded
        self._most_size = self._most_lost = self._most_over = 0.0
        sample = ((self._sample_of_rows()[::_SAMPLED] - self._centre) * self._scale).float()
        sizes = sample.norm(dim=1)
        is_near = sizes <= self._reach
        sample, sizes = (
            (sample[is_near], sizes[is_near]) if is_near.any() else map(torch.zeros_like, (sample[:1], sizes[:1]))
        )
        places = [int(share * (sample.numel() - 1)) for share in _CLIPPED]
        largest = sample.abs().flatten().topk(places[-1] + 1).values
        units = (largest[places].clamp(_LEAST, _LARGEST) / _MOST).tolist()  # numbers that float32 has
        self._unit = min(units, key=lambda unit: float(_rounded_off(sample, unit).mean()))
        lost = _rounded_off(sample, self._unit)
        self._usual_size = _ROOM * float(sizes.quantile(_USUAL))
        self._usual_error = _ROOM * float(lost.quantile(_USUAL))
        beside = self._beside(sizes, lost, sizes)
        most = max(_RANGE * float(beside.max()), float(beside.abs().quantile(_USUAL)))
        pieces = math.ceil(most / _MOST**2)
        self._pieces = 1 + min(max(pieces, 1), _MOST_PIECES)
        self._width = aligned(self._vector + self._pieces)

    def _beside(self, sizes: Tensor, lost: Tensor, written: Tensor) -> Tensor:
        """Return T (n,) float64 from |u|, |u - û| and |û| (n,), not rounded."""
        sizes, lost, written = sizes.double(), lost.double(), written.double()
        half = sizes.square() / 2
        half = half - half * self._norm_error - self._blur * sizes
        beside: Tensor = self._shift - half + lost * self._usual_size + written * self._usual_error
        beside /= self._unit**2
        return beside

    def _write(self, block: Tensor, start: int, out: Tensor) -> None:
        rows, sizes, outside, _ = self._centred(block, start)
        whole = _whole(rows, self._unit)
        lost = rows.sub_(whole, alpha=self._unit).norm(dim=1) * (1 + self._norm_error)
        lost += self._blur + 16 * _SINGLE * (sizes + lost)  # of u, and of what is subtracted from it
        lost.masked_fill_(outside, 0.0)
        written = (1 + self._norm_error) * (sizes + lost)
        self._most_size = max(self._most_size, float(written.max()))
        self._most_lost = max(self._most_lost, float(lost.max()))
        most = _MOST**2 * (self._pieces - 1)
        beside = (self._beside(sizes, lost, written) * (1 + _DOUBLE_ERROR)).ceil() + 1
        beside.masked_fill_(outside, -torch.inf)
        self._most_over = max(self._most_over, float(beside.max()) - most)
        beside.clamp_(-most, most)  # from below a row is made nearer than it is
        coarse = (beside / _MOST).round()
        parts = torch.arange(self._pieces - 1, device=rows.device)
        # ⌊c/p⌋ + ⌊(c + 1)/p⌋ + … + ⌊(c + p - 1)/p⌋ = c
        out[:, : self._pieces - 1] = ((coarse[:, None] + parts) / (self._pieces - 1)).floor()
        out[:, self._pieces - 1] = beside - _MOST * coarse
        out[:, self._pieces : self._pieces + self._vector] = whole
        out[:, self._pieces + self._vector :] = 0

    def prepare(self, queries: Tensor, *, bound: bool = True) -> PreparedQueries:
        """Prepare queries (B, d); without `bound`, scores prove nothing, and far queries are written smaller."""
        exact, square = self._centred_queries(queries)
        whole = _whole(exact, self._unit)
        error = (exact - whole * self._unit).norm(dim=1) + self._unit_error
        vectors = torch.zeros(len(exact), self._width, dtype=torch.int8, device=exact.device)
        vectors[:, : self._pieces - 1] = _MOST
        vectors[:, self._pieces - 1] = 1
        vectors[:, self._pieces : self._pieces + self._vector] = whole
        if not bound:
            self._write_smaller(vectors, exact, (error > self._usual_error).nonzero()[:, 0])
            return PreparedQueries(vectors, square)
        unpaid = self._most_lost * (exact.norm(dim=1) - self._usual_size).clamp(min=0)
        unpaid += self._most_size * (error - self._usual_error).clamp(min=0)
        return PreparedQueries(vectors, square, shortfall=unpaid)

    def _write_smaller(self, vectors: Tensor, exact: Tensor, unusual: Tensor) -> None:
        """Write those of queries v (B, d) whose coordinates are cut off so much smaller that least of them is lost.

        T counts as much less in their scores.
        """
        if len(unusual) == 0:
            return
        far = exact[unusual]
        lost = [_rounded_off(far, self._unit * (_MOST / weight)) for weight in _WEIGHTS]
        weights = far.new_tensor(_WEIGHTS)[torch.stack(lost).argmin(0), None]
        vectors[unusual, : self._pieces - 1] = weights.to(torch.int8)
        vectors[unusual, self._pieces - 1] = (weights[:, 0] / _MOST).round().to(torch.int8)
        whole = _whole(far, self._unit * (_MOST / weights))
        vectors[unusual, self._pieces : self._pieces + self._vector] = whole.to(torch.int8)

    def least_score(self, prepared: PreparedQueries, norms: Tensor) -> Tensor:
        """Return (B,) float64: every row within this norm of differences has at least such a score."""
        if prepared.shortfall is None:
            raise ValueError("queries must be prepared by the bounds that they are compared with")
        least = (self._least(prepared, norms) - prepared.shortfall) / self._unit**2 - max(0.0, self._most_over)
        return torch.where(least.isfinite(), least - least.abs() * _DOUBLE_ERROR, -torch.inf)


def _whole(vectors: Tensor, unit: float | Tensor) -> Tensor:
    whole: Tensor = vectors / unit
    return whole.round_().clamp_(-_MOST, _MOST)


def _rounded_off(vectors: Tensor, unit: float) -> Tensor:
    lost: Tensor = vectors - _whole(vectors, unit) * unit
    sizes: Tensor = lost.norm(dim=1)
    return sizes
