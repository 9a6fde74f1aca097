"""Scores that bound distances: what a scan may compute in low precision and still prove that a row is too far.

Bounds give every (query, row) a score, high where the row is near, such that every row within a distance has at
least the score that `least_score` says of it. For the euclidean distances (cosine: of unit vectors) the score is one
matrix product. Let u = s(x - c) be a row and v = s(q - c) a query, centred and scaled, both as real numbers; û and v̂
what is stored of them. Then s²|x - q|² = |v|² + 2t with t = |u|²/2 - u·v, and

    u·v <= û·v̂ + |u - û||v| + |û||v - v̂|                                 (Cauchy-Schwarz)
    computed products differ from exact ones by at most γ Σ|û_i v̂_i|      (Higham, Accuracy and Stability, §3.1)

so m - t <= û·v̂ - (h - m) + |u - û||v| + |û|β with h <= |u|²/2, β >= |v - v̂| + γ|v̂|, and any constant m. The margins
belong to the row: one huge row does not widen the others'. All of it is one product of these columns:

    column      of a row u                                        of a query v
    h           h - m, rounded down; two pieces in bfloat16       -1 each
    1 … d       û: u, rounded to the dtype                        v̂
    size        |û|, rounded up                                   β: what v̂ and the product lose, rounded up
    lost        |u - û| as measured, rounded up                   |v|, rounded up
    left out    ρu (with a projection)                            ρv

Given a basis P of m orthonormal directions, û holds Pu alone. What is left of u and v, of lengths ρu and ρv, adds at
most ρuρv to u·v (Cauchy-Schwarz again): the last column. Where the spectrum decays, m products do for d.

For the distance -q·x the same columns without h bound the product itself: s(q·x) = u·v + sc·v.

exact.py compares a scan's scores with `least_score`, which certifies that no row left unmeasured is nearer.
docs/exact.md derives every constant below.
"""

import copy
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance, lengths, normalize, scaled_by_powers
from faiss_knn.search.engines.matrix_product import multiply
from faiss_knn.search.stored_rows import StoredRows

_SAMPLE = 1024
_DOUBLE, _SINGLE, _HALF = 2.0**-53, 2.0**-24, 2.0**-8  # unit roundoff of float64, float32 and bfloat16
# What a product's terms and sums are off by, in units of float32's roundoff: twice, for units that do not round to
# nearest; twice again, for tensor cores that cut off what they align. And 1 %, for terms of second order.
_PRODUCT_ROUNDINGS, _HALF_PRODUCT_ROUNDINGS = 2.02, 4.04
_UNIT_ERROR, _SINGLE_UNIT_ERROR = 2.0**-50, 2.0**-21  # of a vector divided by its length, in float64 and float32
_LEAST_BLUR = 2.0**-50  # of u, whose typical size is 1: what scaling loses of numbers that leave float32's range
_SECOND_ORDER = 1.01  # |û| and |v̂| instead of |u| and |v|
# Relative, of products, sums and projections: beyond it, at millions of dimensions, nothing is proven.
_MOST_ERROR = 0.5
BOUND_COLUMNS = 5  # beside the vector, at most
# Values of a block made at once: as fast as smaller ones that stay in cache, and each block costs a dozen barriers
# between threads, which a busy machine makes expensive.
_BLOCK_VALUES = 1 << 20
_GPU_BLOCK_VALUES = 1 << 24  # there a block costs some twenty kernel launches
_FAR = 2.0**40  # in units of the median norm; beyond it a row or query is not worth a float32 exponent
_MOST_EXPONENT = 1000  # of the scale
_LARGE = 2.0**1000
_FAR_HALF_SQUARE = 2.0**77  # below |u|²/2 - |u||v| for any |u| > 2^40 and |v| <= 2^38


class PreparedQueries(NamedTuple):
    """Queries as bounds compare them.

    Attributes:
        vectors: (B, K) what enters the product.
        square: (B,) float64 |v|²; inf where the query is beyond the bounds' range and must be searched without it.
        offset: (B,) float64 sc·v, for inner products alone.
        scale: (B,) float64, what turns q·x into the scale of u·v, likewise.
        shortfall: (B,) float64, what the rows' columns leave unpaid of the margins of unusual queries, for int8 alone.
    """

    vectors: Tensor
    square: Tensor
    offset: Tensor | None = None
    scale: Tensor | None = None
    shortfall: Tensor | None = None


class Bounds(Protocol):
    """Scores that bound distances from below."""

    bytes: int
    score_dtype: torch.dtype

    def prepare(self, queries: Tensor) -> PreparedQueries:
        """Prepare queries (B, d)."""

    def scores(self, prepared: PreparedQueries, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return (stop - start, B) scores of a block of rows, in `out` if they are made by a product."""

    def least_score(self, prepared: PreparedQueries, norms: Tensor) -> Tensor:
        """Return (B,) float64: every row within this norm of differences has at least such a score."""


class ProductBounds:
    """A centred copy of the bank in `dtype` whose products with queries bound euclidean and cosine distances.

    Args:
        rows: The bank. A streamed one is never copied.
        distance: One that is measured by euclidean norms.
        dtype: torch.bfloat16 (half the memory; where the CPU or GPU is fast in it) or torch.float32.
        passed_over: Numbers of rows that get the lowest score, so that a scan passes them over.
        basis: (d, m) float32 orthonormal directions to project to; None: all d coordinates as they are.
        room: Bytes that the copy may take; rows beyond it are written anew for every scan. None: all it needs.

    Example:
        >>> from faiss_knn.search.distance import get_distance
        >>> rows = StoredRows(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        >>> bounds = ProductBounds(rows, get_distance("euclidean"), torch.float32)
        >>> prepared = bounds.prepare(torch.zeros(1, 2))
        >>> least = bounds.least_score(prepared, torch.tensor([1.0]))  # of all rows within a distance of 1
        >>> (bounds.scores(prepared, 0, 2) >= least).flatten().tolist()
        [True, False]
    """

    _half_square_of_far = _FAR_HALF_SQUARE

    def __init__(
        self,
        rows: StoredRows,
        distance: Distance,
        dtype: torch.dtype,
        *,
        passed_over: Tensor | None = None,
        basis: Tensor | None = None,
        room: int | None = None,
    ) -> None:
        self._rows = rows
        self._distance = distance
        self.dtype = self.score_dtype = dtype
        self._basis = basis
        self._vector = rows.dim if basis is None else basis.shape[1]
        self._norm_error = 1.01 * (rows.dim + 8) * _SINGLE  # of |u|² summed in float32
        self._tilt = 0.0 if basis is None else _tilt(basis)
        self._passed_over: Tensor | None = None
        if passed_over is not None:
            self._passed_over = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            self._passed_over[passed_over] = True
        self._step = max(1, (_GPU_BLOCK_VALUES if rows.device.type == "cuda" else _BLOCK_VALUES) // rows.dim)
        self._place(rows)
        self._lay_out()
        self._is_proof = max(self._gamma, self._norm_error, self._tilt) <= _MOST_ERROR
        self._copy = self._copied(rows, room)
        self.bytes = self._copy.numel() * self._copy.element_size()

    def _place(self, rows: StoredRows) -> None:
        """Choose centre and scale: medians, which a few huge rows do not move."""
        sample = self._sample_of_rows()
        self._centre = sample.median(0).values
        sizes = lengths(sample - self._centre)  # whose squares float64 need not hold
        sizes = sizes[(sizes > 0) & sizes.isfinite()]
        size = float(sizes.median()) if len(sizes) else 1.0
        exponent = min(max(-math.frexp(size)[1], -_MOST_EXPONENT), _MOST_EXPONENT)
        self._scale = 2.0**exponent
        # Beyond that the median row is not of size 1 after scaling: then no query is within reach, nothing is proven.
        self._reach = _FAR if abs(exponent) < _MOST_EXPONENT else 0.0
        # float32 centres exactly enough unless its range ends, or unit vectors lie within 2^-10 of each other.
        unsafe = not 2.0**-90 < size < 2.0**60
        if self._distance.normalized:
            unsafe |= size < 2.0**-10
        self._work = torch.float64 if unsafe or rows.dtype == torch.float64 else torch.float32
        self._centre = self._centre.to(self._work).double()
        # Unit vectors are off by some 2^-22 (2^-50) before they are centred, however small they are after.
        self._unit_error = self._scale * _UNIT_ERROR if self._distance.normalized else 0.0
        of_rows = _UNIT_ERROR if self._work == torch.float64 else _SINGLE_UNIT_ERROR
        self._blur = _LEAST_BLUR + (self._scale * of_rows if self._distance.normalized else 0.0)
        self._shift = 0.5 * (size * self._scale) ** 2

    def _sample_of_rows(self) -> Tensor:
        return self._rows.sample(_SAMPLE, self._distance)

    def _lay_out(self) -> None:
        """Choose the columns."""
        half = self.dtype == torch.bfloat16
        self._pieces = 2 if half else 1  # h in bfloat16 alone would be off by 2^-8 of it
        self._width = aligned(self._vector + self._pieces + (2 if self._basis is None else 3))
        # Eight more than the product has: centring a row rounds it twice.
        self._gamma = (_HALF_PRODUCT_ROUNDINGS if half else _PRODUCT_ROUNDINGS) * (self._width + 8) * _SINGLE

    def _as_compared(self, block: Tensor, start: int) -> Tensor:
        """Return a block of rows, which starts at row `start`, in the dtype to centre it in."""
        if self._distance.normalized:
            return normalize(block, self._rows.lengths[start : start + len(block)], self._work)
        return block.to(self._work)

    def _copied(self, rows: StoredRows, room: int | None) -> Tensor:
        """Return what is kept of û for the first rows, (n, K): all N where there is room."""
        count = len(rows) if room is None else min(len(rows), max(0, room) // (self._width * self.dtype.itemsize))
        return self._written(0, 0 if rows.streamed else count)

    def _write(self, block: Tensor, start: int, out: Tensor) -> None:
        """Write all columns of a block of rows (n, d), which starts at row `start`, to `out` (n, K)."""
        rows, sizes, outside, far = self._centred(block, start)
        seen = rows if self._basis is None else rows @ self._basis
        column = self._pieces + self._vector
        out[:, self._pieces : column] = seen
        half_squares = self._half_squares(sizes).masked_fill(outside[:, None], _FAR_HALF_SQUARE / self._pieces)
        half_squares.masked_fill_(far[:, None], self._half_square_of_far / self._pieces)
        out[:, : self._pieces] = half_squares
        out[:, column] = rounded_up(sizes * (1 + self._norm_error), self.dtype)
        lost = (seen - out[:, self._pieces : column].float()).norm(dim=1) * (1 + self._norm_error)
        out[:, column + 1] = rounded_up((lost + self._blur).masked_fill(outside, 0.0), self.dtype)
        out[:, column + 2 :] = 0
        if self._basis is not None:
            left_out = self._left_out(sizes.square(), seen.square().sum(1))
            out[:, column + 2] = rounded_up(left_out, self.dtype)

    def _centred(self, block: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return u (n, d) and |u| (n,) of a block of rows, 0 for those passed over (n,), and which of these are far."""
        rows = (self._as_compared(block, start) - self._centre.to(self._work)).mul_(self._scale).float()
        sizes = rows.norm(dim=1)
        far = ~(sizes <= self._reach)
        outside = far if self._passed_over is None else far | self._passed_over[start : start + len(block)]
        if outside.any():
            rows[outside], sizes[outside] = 0.0, 0.0
        return rows, sizes, outside, far

    def _half_squares(self, sizes: Tensor) -> Tensor:
        """Return h - m in (n, pieces), rounded down, from the float32 sizes |u| (n,)."""
        half = sizes.square() / 2
        below = half * self._norm_error  # |u|² is a sum of rounded squares,
        below += self._blur * sizes  # of a vector that may be off by so much,
        below += 2 * self._gamma * (half + self._shift)  # and the product rounds h as it does the rest.
        left = half - self._shift - below
        if self._pieces == 1:
            return left[:, None]
        left = left - 2 * _HALF**2 * left.abs()  # what two pieces of eight bits leave over
        first = left.bfloat16()
        return torch.stack([first, (left - first.float()).bfloat16()], 1)

    def _left_out(self, square: Tensor, seen: Tensor) -> Tensor:
        """Return at least the length of what a projection leaves out, from |u|² and |Pu|²."""
        return ((square - seen).clamp(min=0) + 4 * (self._tilt + self._norm_error) * square).sqrt() * (1 + 4 * _SINGLE)

    def prepare(self, queries: Tensor, *, bound: bool = True) -> PreparedQueries:
        """Prepare queries (B, d); without `bound`, scores estimate and prove nothing."""
        exact, square = self._centred_queries(queries)
        return PreparedQueries(self._columns(exact, bound), square)

    def _centred_queries(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return v (B, d) and |v|² (B,), float64, of queries (B, d): 0 and inf for those beyond reach."""
        as_compared = normalize(queries) if self._distance.normalized else queries.double()
        exact = (as_compared - self._centre).mul_(self._scale)
        square = exact.square().sum(1)
        outside = ~(square < (self._reach / 4) ** 2)
        return exact.masked_fill_(outside[:, None], 0.0), square.masked_fill(outside, torch.inf)

    def _columns(self, exact: Tensor, bound: bool) -> Tensor:
        """Return all columns (B, K) of queries v (B, d) float64; without `bound`, those that prove are 0."""
        seen = exact if self._basis is None else exact @ self._basis.double()
        vectors = torch.zeros(len(exact), self._width, dtype=self.dtype, device=exact.device)
        vectors[:, : self._pieces] = -1
        vectors[:, self._pieces : self._pieces + self._vector] = seen
        if bound:
            self._widen(vectors, exact, seen)
        return vectors

    def narrowed(self, dims: int) -> "ProductBounds":
        """Return estimates over the first `dims` directions alone: a view of the copy, whose scores prove nothing."""
        other = copy.copy(self)
        other._vector, other._width, other._is_proof = dims, self._pieces + dims, False
        other._copy = self._copy[:, : other._width]
        other._basis = None if self._basis is None else self._basis[:, :dims]
        return other

    def compact(self) -> "ProductBounds":
        """Return the same with a copy of its own, of what it reads alone."""
        other = copy.copy(self)
        other._width = aligned(self._width)
        other._copy = self._copy.new_zeros(len(self._copy), other._width)
        other._copy[:, : self._width] = self._copy
        other.bytes = other._copy.nbytes
        return other

    def _widen(self, vectors: Tensor, exact: Tensor, seen: Tensor) -> None:
        """Write β, |v| and ρ of queries v (B, d), projected to (B, m), to the columns beside v̂."""
        column = self._pieces + self._vector
        size = exact.norm(dim=1)
        beta = (seen - vectors[:, self._pieces : column].double()).norm(dim=1) + self._unit_error
        beta = _SECOND_ORDER * (beta + self._gamma * size)
        vectors[:, column] = rounded_up((1 + 2 * self._gamma) * beta, self.dtype)
        vectors[:, column + 1] = rounded_up((1 + 2 * self._gamma) * size, self.dtype)
        if self._basis is not None:
            left_out = self._left_out(exact.square().sum(1), seen.square().sum(1))
            vectors[:, column + 2] = rounded_up((1 + 2 * self._gamma) * left_out, self.dtype)

    def scores(self, prepared: PreparedQueries, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return (stop - start, B) scores of a block of rows."""
        if out is None:
            out = prepared.vectors.new_empty(stop - start, len(prepared.vectors), dtype=self.score_dtype)
        return multiply(self._block(start, stop), prepared.vectors, out)

    def _block(self, start: int, stop: int) -> Tensor:
        return self._copy[start:stop] if stop <= len(self._copy) else self._written(start, stop)

    def _written(self, start: int, stop: int) -> Tensor:
        block = torch.empty(stop - start, self._width, dtype=self.dtype, device=self._rows.device)
        for left in range(start, stop, self._step):
            right = min(left + self._step, stop)
            self._write(self._rows.block(left, right), left, block[left - start : right - start])
        return block

    def least_score(self, prepared: PreparedQueries, norms: Tensor) -> Tensor:
        """Return (B,) float64: every row within this norm of differences has at least such a score."""
        if not self._is_proof:
            return torch.full_like(prepared.square, -torch.inf)
        least = self._least(prepared, norms)
        # Of a query beyond reach, or a distance that is no number, nothing is known.
        return torch.where(least.isfinite(), least - least.abs() * self._rounding, -torch.inf)

    def _least(self, prepared: PreparedQueries, norms: Tensor) -> Tensor:
        """Return (B,) the least m - t of rows within this norm of differences."""
        square = (norms * self._scale + self._unit_error).square() * (1 + self._slack)
        return self._shift - (square - prepared.square * (1 - self._slack)) / 2

    @property
    def _rounding(self) -> float:
        """What writing a score in `dtype` may take off it, and the sign of it."""
        return _HALF if self.dtype == torch.bfloat16 else 4 * _SINGLE

    @property
    def _slack(self) -> float:
        """Relative error of squared float64 norms."""
        return (self._rows.dim + 32) * 4 * _DOUBLE


class InnerProductBounds(ProductBounds):
    """Bounds of minus the inner product: the scores are products, and rows that are too large for them score highest.

    Queries are scaled by powers of two of their own, so that none is out of reach for its size.

    Example:
        >>> from faiss_knn.search.distance import get_distance
        >>> rows = StoredRows(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> bounds = InnerProductBounds(rows, get_distance("dot"), torch.float32)
        >>> prepared = bounds.prepare(torch.tensor([[2.0, 0.0]]))
        >>> least = bounds.least_score(prepared, torch.tensor([-1.0]))  # of all rows whose product is 1 or more
        >>> (bounds.scores(prepared, 0, 2) >= least).flatten().tolist()
        [True, False]
    """

    _half_square_of_far = -_FAR_HALF_SQUARE

    def _place(self, rows: StoredRows) -> None:
        super()._place(rows)
        self._offset = self._centre * self._scale
        # What float64 loses of a product that is summed by halves, relative to |q||x|.
        self._measuring_error = (math.log2(rows.dim) + 4) * 2 * _DOUBLE

    def _half_squares(self, sizes: Tensor) -> Tensor:
        return sizes.new_zeros(len(sizes), self._pieces)

    def prepare(self, queries: Tensor, *, bound: bool = True) -> PreparedQueries:
        """Prepare queries (B, d); without `bound`, scores estimate and prove nothing."""
        exact, exponents = scaled_by_powers(queries)
        vectors = self._columns(exact, bound)
        scale = self._scale * torch.exp2(-exponents)
        return PreparedQueries(vectors, exact.square().sum(1), (exact * self._offset).sum(1), scale)

    def _widen(self, vectors: Tensor, exact: Tensor, seen: Tensor) -> None:
        super()._widen(vectors, exact, seen)
        column = self._pieces + self._vector
        beta = vectors[:, column].double() + self._measuring_error * exact.norm(dim=1)
        vectors[:, column] = rounded_up(beta, self.dtype)

    def least_score(self, prepared: PreparedQueries, norms: Tensor) -> Tensor:
        """Return (B,) float64: every row within this distance has at least such a score."""
        if prepared.offset is None or prepared.scale is None:
            raise ValueError("queries must be prepared by the bounds that they are compared with")
        if not self._is_proof:
            return torch.full_like(prepared.square, -torch.inf)
        product = -norms * prepared.scale
        lost = self._slack * (product.abs() + prepared.square.sqrt() * self._offset.norm())
        least = product - prepared.offset - lost
        least = (least - least.abs() * self._rounding).clamp(max=-self._half_square_of_far / 2)
        # Of products at the end of float64's range nothing is known.
        known = (norms.abs() < _LARGE) & (prepared.scale < _LARGE) & (prepared.scale > 1 / _LARGE)
        return torch.where(least.isfinite() & known, least, -torch.inf)


class DifferenceBounds:
    """Scores for the manhattan distance: the negative distance itself, in float32 (float64 for a float64 bank).

    Example:
        >>> rows = StoredRows(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        >>> bounds = DifferenceBounds(rows)
        >>> bounds.scores(bounds.prepare(torch.zeros(1, 2)), 0, 2).flatten().tolist()
        [-0.0, -7.0]
    """

    bytes = 0

    def __init__(self, rows: StoredRows) -> None:
        self._rows = rows
        self.score_dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        # Each difference is rounded once, their sum d times; both relative to the distance.
        self._gamma = (rows.dim + 16) * (8 * _DOUBLE if self.score_dtype == torch.float64 else 4 * _SINGLE)

    def prepare(self, queries: Tensor) -> PreparedQueries:
        """Prepare queries (B, d)."""
        return PreparedQueries(
            queries.to(self.score_dtype), torch.zeros(len(queries), dtype=torch.float64, device=queries.device)
        )

    def scores(self, prepared: PreparedQueries, start: int, stop: int, out: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return (stop - start, B) scores of a block of rows."""
        return torch.cdist(self._rows.block(start, stop).to(self.score_dtype), prepared.vectors, p=1.0).neg_()

    def least_score(self, prepared: PreparedQueries, norms: Tensor) -> Tensor:
        """Return (B,) float64: every row within this norm of differences has at least such a score."""
        if self._gamma > _MOST_ERROR:
            return torch.full_like(prepared.square, -torch.inf)
        # A float32 sum that overflowed says no more than that.
        return torch.where(norms < 1e38, -norms * (1 + self._gamma), -torch.inf)


def rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the least numbers of `dtype`, bfloat16 or float32, that are not below `values` (n,), none negative.

    Example:
        >>> rounded_up(torch.tensor([1.0, 1.001]), torch.bfloat16)
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    rounded = values.to(dtype)
    whole = torch.int16 if dtype == torch.bfloat16 else torch.int32
    # The next number above has the next bits; a double that rounds to zero is the least number that float32 has.
    return torch.where(rounded.double() < values.double(), (rounded.view(whole) + 1).view(dtype), rounded)


def aligned(width: int) -> int:
    """Round a product's width up to a multiple of eight.

    Example:
        >>> aligned(390)
        392
    """
    return -(-width // 8) * 8  # what tensor cores ask for


def _tilt(basis: Tensor) -> float:
    dim, count = basis.shape
    exact = basis.double()
    skew = float((exact.T @ exact - torch.eye(count, dtype=torch.float64, device=basis.device)).norm())
    return float(1.01 * dim * _SINGLE * count**0.5 + 2 * skew)
