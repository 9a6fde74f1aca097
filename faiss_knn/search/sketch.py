"""Scores that bound distances: what a scan may compute in low precision and still prove that a row is too far.

A sketch gives every (query, row) a score, high where the row is near, such that every row within a distance has at
least the score that `least_score` says of it. For the euclidean distances (cosine: of unit vectors) the score is one
matrix product. Let u = s(x - c) be a row and v = s(q - c) a query, centred and scaled, both as real numbers; û and v̂
what is stored of them. Then s²|x - q|² = |v|² + 2t with t = |u|²/2 - u·v, and

    u·v <= û·v̂ + |u - û||v| + |û||v - v̂|                                 (Cauchy-Schwarz)
    computed products differ from exact ones by at most γ|û||v̂|           (Higham, Accuracy and Stability, §3.1)

so m - t <= û·v̂ - (h - m) + |û|β with h <= |u|²/2 and β = r|v| + |v - v̂| + γ|v̂|, where r >= |u - û| / |û| and m is any
constant. h and |û| are two further columns of û. The margin |û|β belongs to the row: one huge row does not widen the
others'.

Given a basis P of m orthonormal directions, û holds Pu alone. What is left of u and v, of lengths ρu and ρv, adds at
most ρuρv to u·v (Cauchy-Schwarz again): one more column. Where the spectrum decays, m products do for d.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from faiss_knn.search.backend import cpu_flags
from faiss_knn.search.distance import Distance, unit
from faiss_knn.search.products import BFLOAT16_FLAGS, multiply
from faiss_knn.search.rows import Rows

_SAMPLE = 1024
# Values of a block made at once: as fast as smaller ones that stay in cache, and each block costs a dozen barriers
# between threads, which a busy machine makes expensive.
_BLOCK_VALUES = 1 << 20
_GPU_BLOCK_VALUES = 1 << 24  # there a block costs some twenty kernel launches
_FAR = 2.0**40  # in units of the median norm; beyond it a row or query is not worth a float32 exponent
_FAR_HALF_SQUARE = 2.0**77  # below |u|²/2 - |u||v| for any |u| > 2^40 and |v| <= 2^38
_FLUSHED = 1e-30  # what products may lose to underflow, in units of the median square


class Asked(NamedTuple):
    """Queries as a sketch compares them.

    Attributes:
        vectors: (B, K) what enters the product.
        square: (B,) float64 |v|²; inf where the query is beyond the sketch's range and must be searched without it.
    """

    vectors: Tensor
    square: Tensor


class Sketch(Protocol):
    """Scores that bound distances from below."""

    bytes: int

    def ask(self, queries: Tensor) -> Asked:
        """Prepare queries (B, d)."""

    def scores(self, asked: Asked, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return (stop - start, B) scores of a block of rows, in `out` if they are made by a product."""

    def least_score(self, asked: Asked, norms: Tensor) -> Tensor:
        """Return (B,) float64: every row within this norm of differences has at least such a score."""


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 products are faster than float32 ones: AMX or AVX-512 on a CPU, tensor cores."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not cpu_flags().isdisjoint(BFLOAT16_FLAGS)


class ProductSketch:
    """A centred copy of the bank in `dtype` whose products with queries bound euclidean and cosine distances.

    Args:
        rows: The bank. A streamed one is never copied.
        distance: One that is measured by euclidean norms.
        dtype: torch.bfloat16 (half the memory; where the CPU or GPU is fast in it) or torch.float32.
        passed_over: Numbers of rows that get the lowest score, so that a scan passes them over.
        basis: (d, m) float32 orthonormal directions to project to; None: all d coordinates as they are.
        room: Bytes that the copy may take; rows beyond it are written anew for every scan. None: all it needs.
    """

    def __init__(
        self,
        rows: Rows,
        distance: Distance,
        dtype: torch.dtype,
        *,
        passed_over: Tensor | None = None,
        basis: Tensor | None = None,
        room: int | None = None,
    ) -> None:
        self._rows = rows
        self._distance = distance
        self.dtype = dtype
        self._pieces = 2 if dtype == torch.bfloat16 else 1  # h in bfloat16 alone would be off by 2^-9
        self._basis = basis
        self._vector = rows.dim if basis is None else basis.shape[1]
        self._width = _aligned(self._vector + self._pieces + (1 if basis is None else 2))
        # Twice, for units that do not round to nearest; twice again, for tensor cores that cut off what they align.
        self._gamma = (4.04 if dtype == torch.bfloat16 else 2.02) * (self._width + 8) * 2.0**-24
        # Rounding to bfloat16 changes each value by 2^-9 of it, hence a row by as much; and 2^-22 for centring.
        self._ratio = (2.0**-9 if dtype == torch.bfloat16 else 0.0) + 2.0**-22
        # What float32 loses of a projection, and the basis lacks of being orthonormal.
        self._tilt = 0.0 if basis is None else _tilt(basis)
        self._ratio += 2 * self._tilt
        self._passed_over: Tensor | None = None
        if passed_over is not None:
            self._passed_over = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            self._passed_over[passed_over] = True
        self._step = max(1, (_GPU_BLOCK_VALUES if rows.device.type == "cuda" else _BLOCK_VALUES) // rows.dim)
        self._place(rows)
        self._copy = self._copied(rows, room)
        self.bytes = self._copy.numel() * self._copy.element_size()

    def _place(self, rows: Rows) -> None:
        """Choose centre and scale: medians, which a few huge rows do not move."""
        ids = torch.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows)), dtype=torch.float64, device="cpu").long()
        sample = rows.directed(ids, self._distance)
        self._centre = sample.median(0).values
        sizes = (sample - self._centre).norm(dim=1)
        sizes = sizes[sizes > 0]
        size = float(sizes.median()) if len(sizes) else 1.0
        exponent = min(max(-math.frexp(size)[1], -1000), 1000)
        self._scale = 2.0**exponent
        # float32 centres exactly enough unless its range ends, or unit vectors lie within 2^-10 of each other.
        unsafe = not 2.0**-90 < size < 2.0**60
        if self._distance.unit_rows:
            unsafe |= size < 2.0**-10 or not rows.ordinary_lengths
        self._work = torch.float64 if unsafe or rows.dtype == torch.float64 else torch.float32
        self._centre = self._centre.to(self._work).double()
        # Unit vectors are off by some 2^-22 (2^-50) before they are centred, however small they are after.
        self._unit_error = self._scale * 2.0**-50 if self._distance.unit_rows else 0.0
        self._blur = 2.0**-50 + self._unit_error * (1.0 if self._work == torch.float64 else 2.0**29)
        self._shift = 0.5 * (size * self._scale) ** 2

    def _directed(self, block: Tensor, start: int) -> Tensor:
        """Return a block of rows, which starts at row `start`, in the dtype to centre it in."""
        rows = block.to(self._work)
        if self._distance.unit_rows:
            rows = rows / self._rows.lengths[start : start + len(block), None].to(self._work)
        return rows

    def _copied(self, rows: Rows, room: int | None) -> Tensor:
        """Return what is kept of û for the first rows, (n, K): all N where there is room."""
        count = len(rows) if room is None else min(len(rows), max(0, room) // (self._width * self.dtype.itemsize))
        return self._written(0, 0 if rows.streamed else count)

    def _write(self, block: Tensor, start: int, out: Tensor) -> None:
        """Write û, h, |û| and ρ of a block of rows (n, d), which starts at row `start`, to `out` (n, K)."""
        dim = self._vector
        rows = (self._directed(block, start) - self._centre.to(self._work)).mul_(self._scale).float()
        sizes = rows.norm(dim=1)
        far = ~(sizes <= _FAR)
        if self._passed_over is not None:
            far |= self._passed_over[start : start + len(block)]
        if far.any():
            rows[far], sizes[far] = 0.0, 0.0
        seen = rows if self._basis is None else rows @ self._basis
        out[:, :dim] = seen
        half = sizes.square() / 2
        half = half - self._shift - 2 * self._gamma * (half + self._shift) - self._blur * sizes - _FLUSHED
        half = half.masked_fill(far, _FAR_HALF_SQUARE)
        if self._pieces == 2:
            half -= 2.0**-14 * half.abs()
        left = half
        for column in range(dim, dim + self._pieces):
            out[:, column] = left
            left = left - out[:, column].float()
        out[:, dim + self._pieces] = (sizes * (1 + 2.0**-7) + self._blur / self._ratio).masked_fill(far, 0.0)
        out[:, dim + self._pieces + 1 :] = 0
        if self._basis is not None:
            out[:, dim + self._pieces + 1] = self._left_out(sizes.square(), seen.square().sum(1)) * (1 + 2.0**-7)

    def _left_out(self, square: Tensor, seen: Tensor) -> Tensor:
        """Return at least the length of what a projection leaves out, from |u|² and |Pu|²."""
        return ((square - seen).clamp(min=0) + 4 * self._tilt * square).sqrt()

    def ask(self, queries: Tensor, *, bound: bool = True) -> Asked:
        """Prepare queries (B, d); without `bound`, scores estimate and prove nothing."""
        directed = unit(queries) if self._distance.unit_rows else queries.double()
        exact = (directed - self._centre).mul_(self._scale)
        square = exact.square().sum(1)
        outside = ~(square <= (_FAR / 4) ** 2)
        exact.masked_fill_(outside[:, None], 0.0)
        seen = exact if self._basis is None else exact @ self._basis.double()
        vectors = torch.zeros(len(queries), self._width, dtype=self.dtype, device=queries.device)
        vectors[:, : self._vector] = seen
        vectors[:, self._vector : self._vector + self._pieces] = -1
        if bound:
            self._widen(vectors, exact, seen)
        return Asked(vectors, square.masked_fill(outside, torch.inf))

    def narrow(self, asked: Asked, dims: int) -> None:
        """Restrict queries asked without bound to the first `dims` directions, in place."""
        asked.vectors[:, dims : self._vector] = 0

    def _widen(self, vectors: Tensor, exact: Tensor, seen: Tensor) -> None:
        """Write β and ρ of queries v (B, d), projected to (B, m), to the columns beside v̂."""
        column = self._vector + self._pieces
        lost = (seen - vectors[:, : self._vector].double()).norm(dim=1) + self._unit_error
        beta = (self._ratio + self._gamma * 1.01) * exact.norm(dim=1) + lost * 1.01
        vectors[:, column] = beta * (1 + 2.0**-7)
        if self._basis is not None:
            left_out = self._left_out(exact.square().sum(1), seen.square().sum(1))
            vectors[:, column + 1] = left_out * (1 + 2.0**-7)

    def scores(self, asked: Asked, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return (stop - start, B) scores of a block of rows."""
        out = asked.vectors.new_empty(stop - start, len(asked.vectors)) if out is None else out
        return multiply(self._block(start, stop), asked.vectors, out)

    def _block(self, start: int, stop: int) -> Tensor:
        return self._copy[start:stop] if stop <= len(self._copy) else self._written(start, stop)

    def _written(self, start: int, stop: int) -> Tensor:
        block = torch.empty(stop - start, self._width, dtype=self.dtype, device=self._rows.device)
        for left in range(start, stop, self._step):
            right = min(left + self._step, stop)
            self._write(self._rows.block(left, right), left, block[left - start : right - start])
        return block

    def least_score(self, asked: Asked, norms: Tensor) -> Tensor:
        """Return (B,) float64: every row within this norm of differences has at least such a score."""
        square = (norms * self._scale + self._unit_error).square() * (1 + self._slack)
        least = self._shift - (square - asked.square * (1 - self._slack)) / 2
        return torch.where(asked.square.isinf(), -torch.inf, least - least.abs() * self._rounding)

    @property
    def _rounding(self) -> float:
        """What writing a score in `dtype` may take off it, and the sign of it."""
        return 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-22

    @property
    def _slack(self) -> float:
        """Relative error of squared float64 norms."""
        return (self._rows.dim + 32) * 2.0**-51


class DifferenceSketch:
    """Scores for the manhattan distance: the negative distance itself, in float32 (float64 for a float64 bank)."""

    bytes = 0

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        # Each difference is rounded once, their sum d times; both relative to the distance.
        self._gamma = (rows.dim + 16) * (2.0**-50 if self._dtype == torch.float64 else 2.0**-22)

    def ask(self, queries: Tensor) -> Asked:
        """Prepare queries (B, d)."""
        return Asked(queries.to(self._dtype), torch.zeros(len(queries), dtype=torch.float64, device=queries.device))

    def scores(self, asked: Asked, start: int, stop: int, out: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return (stop - start, B) scores of a block of rows."""
        return torch.cdist(self._rows.block(start, stop).to(self._dtype), asked.vectors, p=1.0).neg_()

    def least_score(self, asked: Asked, norms: Tensor) -> Tensor:  # noqa: ARG002
        """Return (B,) float64: every row within this norm of differences has at least such a score."""
        # A float32 sum that overflowed says no more than that.
        return torch.where(norms < 1e38, -norms * (1 + self._gamma), -torch.inf)


def _aligned(width: int) -> int:
    return -(-width // 8) * 8  # what tensor cores ask for


def _tilt(basis: Tensor) -> float:
    dim, count = basis.shape
    exact = basis.double()
    skew = float((exact.T @ exact - torch.eye(count, dtype=torch.float64, device=basis.device)).norm())
    return float(1.01 * dim * 2.0**-24 * count**0.5 + 2 * skew)
