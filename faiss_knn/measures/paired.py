"""How sure a difference is where queries are no single trials of their own: asked of several banks, or alike in groups.

Two few-shot evaluations answer each query once for each bank that was drawn, and queries of a scene or a patient are
right or wrong together. What is drawn, swapped and counted here are whole groups, each with all draws.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from faiss_knn.measures.significance import (
    Pairs,
    cluster_bootstrap_interval,
    count_pairs,
    mcnemar_p,
    units_needed,
)

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupedPairs:
    """How much more often one classifier was right than another, query by query.

    Attributes:
        more: (Q,) int64 in how many draws the first was right, less in how many the second was.
        draws: How many there were.
        groups: (Q,) which group each query is of, a number of its own where it is of none.

    Example:
        >>> pairs = GroupedPairs(np.array([2, -1, 1, 0]), draws=2, groups=np.arange(4))
        >>> pairs.difference, pairs.p()
        (0.25, 0.75)
    """

    more: Integers
    draws: int
    groups: Integers

    @property
    def total(self) -> int:
        """How many queries."""
        return len(self.more)

    @property
    def difference(self) -> float:
        """Accuracy of the first less accuracy of the second."""
        return float(self.more.sum()) / (self.draws * len(self.more))

    def p(self) -> float:
        """Test as `sign_flip_p`, of whole groups."""
        return sign_flip_p(self._sums)

    def interval(self, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
        """Return `cluster_bootstrap_interval`; of a single group it is the point."""
        if len(self._sums) == 1:
            return self.difference, self.difference
        return cluster_bootstrap_interval(self.more / self.draws, self.groups, confidence, seed=seed)

    def needed(self, confidence: float = 0.95, *, comparisons: int = 1) -> int | None:
        """Return `units_needed`, in queries, if groups stay as large as they are."""
        sums = self._sums
        square = float((sums.astype(np.float64) ** 2).mean())
        groups = units_needed(float(sums.mean()), square, confidence, comparisons=comparisons)
        return None if groups is None else math.ceil(groups * len(self.more) / len(sums))

    @property
    def _sums(self) -> Integers:
        numbers = np.unique(self.groups, return_inverse=True)[1]
        return np.bincount(numbers, self.more).astype(np.int64)


def pair_outcomes(
    correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_], groups: Integers | None = None
) -> Pairs | GroupedPairs:
    """Pair what two classifiers answered to the same queries.

    Args:
        correct_a: (Q,) bool, or (T, Q) of T draws.
        correct_b: The same of the second, in the same draws; (Q,) beside (T, Q) is the same in all of them.
        groups: (Q,) of the queries, None where each is one of its own.

    Example:
        >>> pair_outcomes(np.array([True, True]), np.array([True, False]))
        Pairs(only_a=1, only_b=0, total=2)
    """
    if correct_a.ndim == correct_b.ndim == 1 and groups is None:
        return count_pairs(correct_a, correct_b)
    a, b = np.broadcast_arrays(np.atleast_2d(correct_a), np.atleast_2d(correct_b))
    own = np.arange(a.shape[1]) if groups is None else groups
    return GroupedPairs(a.sum(0, dtype=np.int64) - b.sum(0, dtype=np.int64), len(a), own)


def sign_flip_p(sums: npt.ArrayLike) -> float:
    """Test whether differences are as often one way as the other: the exact two-sided p of a sign-flip test.

    If two classifiers are equally good, the difference of each unit, a query or a group of them, is as likely its
    opposite. Over all 2^U signs, p is the share of sums at least as far from 0 as the one observed (Fisher 1935, "The
    Design of Experiments", section 21). Where all differences are of one size that is McNemar's exact test. The
    distribution of the sum is the product of the units' characteristic functions, cos(ω s), turned back by one Fourier
    transform: exact but for rounding, some 1e-15.

    Args:
        sums: (U,) integers, the units' differences.

    Example:
        >>> sign_flip_p([2, 1, -1, 0]), sign_flip_p([1, 1, 1, 1, -1])
        (0.75, 0.375)
    """
    values = np.asarray(sums, dtype=np.int64)
    sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
    if len(sizes) < 2:
        return mcnemar_p(int((values > 0).sum()), int((values < 0).sum()))
    sizes = sizes // np.gcd.reduce(sizes)
    observed = abs(int(values.sum())) // int(np.gcd.reduce(values))
    largest = int((sizes * counts).sum())
    angles = np.pi * np.arange(largest // 2 + 1 + largest % 2) / (largest + 1)
    product = np.ones(len(angles), dtype=np.complex128) * np.exp(-1j * angles * largest)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        product *= np.cos(angles * size) ** count
    chances = np.fft.irfft(product, largest + 1)  # of (sum + largest) / 2
    distances = np.abs(2 * np.arange(largest + 1) - largest)
    least = 2.0 ** (1 - min(int(counts.sum()), 1000))  # that of all signs alike
    return float(np.clip(chances[distances >= observed].sum(), least, 1))
