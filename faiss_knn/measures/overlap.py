"""How far two lists of neighbours per query agree, against what chance would give."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from faiss_knn.search.inputs import as_count, shown

Indices = npt.NDArray[np.integer]

_BLOCK = 1 << 21  # neighbours that are looked at at once


class Overlap(NamedTuple):
    """Agreement of two sets of lists, and what chance would give.

    Attributes:
        mean: Over the queries, of `overlap_by_query`.
        null_mean: The same with queries paired at random, on average over such pairings.
        null_std: Its standard deviation over the pairings.
        z: How many of these `mean` lies above chance; None where `null_std` is 0.
    """

    mean: float
    null_mean: float
    null_std: float
    z: float | None


def overlap_by_query(indices_a: Indices, indices_b: Indices, k: int) -> npt.NDArray[np.float64]:
    """Count which share of its k nearest neighbours two models agree on, for each query.

    This is the mutual k-nearest-neighbour measure, |A ∩ B| / k (Huh et al. 2024, "The Platonic Representation
    Hypothesis", arXiv 2405.07987, appendix A). Where lists are shorter than k the longer one's length stands for k.

    Args:
        indices_a: (Q, K) rows that the first model finds nearest, each once, ascending by distance; -1 where missing.
        indices_b: (Q, K') rows that the second finds, of the same bank for the same queries.
        k: How many of each list count, at most K and K'.

    Returns:
        (Q,) float64 in [0, 1]. Memory O(Q), beside a block of lists.

    Raises:
        ValueError: If the shapes do not fit, or a list is shorter than k.

    Example:
        >>> overlap_by_query(np.array([[3, 1, 2], [5, 6, 7]]), np.array([[1, 3, 9], [0, 2, 4]]), k=2).tolist()
        [1.0, 0.0]
    """
    _check(indices_a, indices_b, k)
    return _overlaps(indices_a, indices_b, k, np.arange(len(indices_a)))


def neighbor_overlap(
    indices_a: Indices, indices_b: Indices, k: int, *, permutations: int = 20, seed: int = 0
) -> Overlap:
    """Compare the mean of `overlap_by_query` with chance, that is with queries paired at random.

    Random pairs keep both models' lists as they are, so that rows that are near to many queries in both (hubs) agree
    by chance as often as they do.

    Args:
        indices_a: See `overlap_by_query`.
        indices_b: See `overlap_by_query`.
        k: See `overlap_by_query`.
        permutations: Random pairings, at least 2.
        seed: Of these.

    Raises:
        ValueError: As `overlap_by_query`, or for fewer than two permutations.

    Example:
        >>> lists = np.random.default_rng(0).permuted(np.tile(np.arange(100), (50, 1)), axis=1)[:, :10]
        >>> found = neighbor_overlap(lists, lists, k=10)
        >>> found.mean, round(found.null_mean, 1)
        (1.0, 0.1)
    """
    _check(indices_a, indices_b, k)
    if as_count(permutations, "`permutations`") < 2:
        raise ValueError(f"`permutations` must be 2 or more, to have a deviation, got {permutations}")
    random = np.random.default_rng(seed)
    queries = len(indices_a)
    mean = float(_overlaps(indices_a, indices_b, k, np.arange(queries)).mean())
    null = [_overlaps(indices_a, indices_b, k, random.permutation(queries)).mean() for _ in range(permutations)]
    null_mean, null_std = float(np.mean(null)), float(np.std(null, ddof=1))
    return Overlap(mean, null_mean, null_std, (mean - null_mean) / null_std if null_std > 0 else None)


def _overlaps(a: Indices, b: Indices, k: int, partners: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Compute which share (Q,) of the k nearest each list of `a` has in common with its partner of `b`."""
    shares = np.empty(len(a))
    size = max(1, _BLOCK // (2 * k))
    for start in range(0, len(a), size):
        left, right = a[start : start + size, :k], b[partners[start : start + size], :k]
        lengths = np.maximum((left >= 0).sum(1), (right >= 0).sum(1))
        shares[start : start + size] = count_common(left, right) / np.maximum(lengths, 1)
    return shares


def count_common(a: Indices, b: Indices) -> npt.NDArray[np.int64]:
    """Count the ids (Q,) that two lists of a query, (Q, j) and (Q, k), have in common; none has an id twice, but -1.

    Example:
        >>> count_common(np.array([[4, 2, -1]]), np.array([[2, -1]]))
        array([1])
    """
    both = np.concatenate([a, b], axis=1)
    both.sort(axis=1)  # what both have stands side by side
    common: npt.NDArray[np.int64] = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)
    return common


def _check(a: Indices, b: Indices, k: int) -> None:
    for name, indices in (("indices_a", a), ("indices_b", b)):
        if (
            not isinstance(indices, np.ndarray)
            or indices.ndim != 2
            or indices.dtype.kind not in "iu"
            or not len(indices)
        ):
            raise ValueError(f"`{name}` must be a (Q, K) integer array of neighbours, got {shown(indices)}")
    if len(a) != len(b):
        raise ValueError(f"`indices_b` must have a list for each of the {len(a)} queries, got {len(b)}")
    shortest = min(a.shape[1], b.shape[1])
    if not 1 <= as_count(k, "`k`") <= shortest:
        raise ValueError(f"`k` must be in [1, {shortest}], as long as both lists are, got {k}")
