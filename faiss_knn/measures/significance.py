"""How sure an accuracy is, and a difference of two: intervals, tests, and how many queries it would take.

Of one accuracy there are Wilson's interval and, for queries in groups, the standard error and the bootstrap's interval.

Two classifiers that answered the same queries differ only where one of them is right alone. So all that is needed of
them are three numbers, `Pairs`, whatever the number of queries.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from faiss_knn.search.inputs import shown

_DRAWN = 1 << 22  # counts that a block of draws holds


class Pairs(NamedTuple):
    """How often two classifiers were right on the same queries.

    Attributes:
        only_a: Queries on which the first alone was right.
        only_b: Queries on which the second alone was right.
        total: All queries, with those on which both or none was right.

    Example:
        >>> pairs = Pairs(only_a=30, only_b=12, total=1000)
        >>> pairs.difference
        0.018
    """

    only_a: int
    only_b: int
    total: int

    @property
    def difference(self) -> float:
        """Accuracy of the first less accuracy of the second."""
        return (self.only_a - self.only_b) / self.total

    def p(self) -> float:
        """Test as `mcnemar_p`."""
        return mcnemar_p(self.only_a, self.only_b)

    def interval(self, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
        """Return `bootstrap_interval`."""
        return bootstrap_interval(self, confidence, seed=seed)

    def needed(self, confidence: float = 0.95, *, comparisons: int = 1) -> int | None:
        """Return `queries_needed`."""
        return queries_needed(self, confidence, comparisons=comparisons)


def count_pairs(correct_a: npt.ArrayLike, correct_b: npt.ArrayLike) -> Pairs:
    """Count on which queries one of two classifiers alone was right.

    Args:
        correct_a: (Q,) bool, whether the first was right on each query.
        correct_b: (Q,) bool, the second, on the same queries in the same order.

    Raises:
        ValueError: If the two are no bool arrays of one length, or empty.

    Example:
        >>> count_pairs([True, True, False, True], [True, False, True, False])
        Pairs(only_a=2, only_b=1, total=4)
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    for name, values in (("correct_a", a), ("correct_b", b)):
        if values.ndim != 1 or values.dtype != np.bool_ or not len(values):
            raise ValueError(f"`{name}` must be (Q,) bool, one per query, got {values.dtype} {values.shape}")
    if len(a) != len(b):
        raise ValueError(f"`correct_b` must be of the same queries as `correct_a`, {len(a)}, got {len(b)}")
    return Pairs(int((a & ~b).sum()), int((b & ~a).sum()), len(a))


def wilson_interval(correct: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bound an accuracy by Wilson's score interval.

    Unlike accuracy ± standard errors it stays within 0 and 1, and does not shrink to a point where all or none are
    right (Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22, equation 2).

    Args:
        correct: Right answers, in [0, total]; a mean over draws need not be whole.
        total: Answers.
        confidence: Share of such intervals that hold the true accuracy.

    Returns:
        Lowest and highest accuracy, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> low, high = wilson_interval(90, 100)
        >>> round(low, 4), round(high, 4)
        (0.8256, 0.9448)
    """
    z = _z_two_sided(confidence)
    if total < 1:
        raise ValueError(f"`total` must be 1 or more, got {shown(total)}")
    if not 0 <= correct <= total:
        raise ValueError(f"`correct` must be in [0, total={total}], got {shown(correct)}")
    share = correct / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low, high = ((middle - half) / (1 + z**2 / total), (middle + half) / (1 + z**2 / total))
    return (0.0 if correct == 0 else low), (1.0 if correct == total else high)  # rounding aside they are just that


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Test whether two classifiers are equally often right alone: McNemar's exact two-sided p.

    If they are equally good, each of the n = only_a + only_b queries on which they differ falls to either side like a
    fair coin: p = min(1, 2 · P[Binomial(n, 1/2) ≤ min(only_a, only_b)]) (McNemar 1947, Psychometrika 12; exact by the
    binomial distribution). Both numbers come from `count_pairs`.

    Raises:
        ValueError: If a count is negative.

    Example:
        >>> round(mcnemar_p(30, 12), 5), mcnemar_p(7, 7)
        (0.00792, 1.0)
    """
    for name, count in (("only_a", only_a), ("only_b", only_b)):
        if count < 0:
            raise ValueError(f"`{name}` must be a number of queries, 0 or more, got {shown(count)}")
    n, fewer = only_a + only_b, min(only_a, only_b)
    i = np.arange(1, fewer + 1)
    logarithms = np.cumsum(np.log(n - i + 1) - np.log(i), dtype=np.float64)  # of n over i
    logarithms = np.append(0.0, logarithms) - n * math.log(2)
    largest = float(logarithms.max())
    tail = math.exp(largest) * float(np.exp(logarithms - largest).sum())
    return min(1.0, 2 * tail)


def bootstrap_interval(
    pairs: Pairs, confidence: float = 0.95, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bound a difference of accuracies by a paired bootstrap over the queries.

    A draw of Q queries with replacement has a difference that depends only on how many of them the first, the second,
    or neither is right on alone, and these three counts are multinomial: so draws of counts are draws of queries, in
    O(draws) memory. The interval lies between percentiles (Efron and Tibshirani 1993, "An Introduction to the
    Bootstrap", section 13.3). Where no query is right alone it is the point 0.

    Args:
        pairs: Of the two classifiers.
        confidence: Share of such intervals that hold the true difference.
        draws: How many.
        seed: Of the draws.

    Returns:
        Lowest and highest difference, first less second.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> low, high = bootstrap_interval(Pairs(30, 12, 1000))
        >>> round(low, 3), round(high, 3)
        (0.006, 0.031)
    """
    _check_pairs(pairs)
    _z_two_sided(confidence)
    if draws < 1:
        raise ValueError(f"`draws` must be 1 or more, got {shown(draws)}")
    shares = [pairs.only_a / pairs.total, pairs.only_b / pairs.total]
    counts = np.random.default_rng(seed).multinomial(pairs.total, [*shares, max(0.0, 1 - sum(shares))], size=draws)
    differences = (counts[:, 0] - counts[:, 1]) / pairs.total
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def cluster_bootstrap_interval(
    values: npt.ArrayLike, groups: npt.ArrayLike, confidence: float = 0.95, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bound a mean over queries that come in groups: scenes, patients, products.

    Queries of a group are alike, so that they tell less than as many independent ones: whole groups are drawn, as many
    as there are, with replacement, and a draw's mean is the sum of its groups' values over that of their sizes. The
    interval lies between percentiles (Davison and Hinkley 1997, "Bootstrap Methods and their Application", section
    3.8). Groups of one size and sum are the same to it, and how often each kind is drawn is multinomial: so draws of
    counts of kinds are draws of groups. Of 1,000,000 queries, right or wrong, there are some 10,000 kinds at most.
    With fewer than about 20 groups such an interval is too narrow; where all values are equal it is a point.

    Args:
        values: (Q,) numbers, such as whether each query was right.
        groups: (Q,) which group each is of.
        confidence: Share of such intervals that hold the true mean.
        draws: How many.
        seed: Of the draws.

    Returns:
        Lowest and highest mean.

    Raises:
        ValueError: If an argument is out of range, or there is but one group.

    Example:
        >>> low, high = cluster_bootstrap_interval(np.arange(100) % 10 > 0, np.arange(100) // 5)
        >>> round(low, 2), round(high, 2)
        (0.86, 0.94)
    """
    _z_two_sided(confidence)
    if draws < 1:
        raise ValueError(f"`draws` must be 1 or more, got {shown(draws)}")
    sums, sizes = _by_group(*_grouped(values, groups))
    kinds, how_many = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    random, block = np.random.default_rng(seed), max(1, _DRAWN // kinds.shape[1])
    means = []
    for start in range(0, draws, block):
        drawn = random.multinomial(len(sums), how_many / len(sums), size=min(block, draws - start))
        means.append((drawn @ kinds[0]) / (drawn @ kinds[1]))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def cluster_standard_error(values: npt.ArrayLike, groups: npt.ArrayLike) -> float:
    """Estimate the error of a mean over queries in groups: √(Σ_g (Σ_{i in g} (x_i − x̄))²) / Q.

    The linearised variance of a ratio of sums over groups (Cochran 1977, "Sampling Techniques", chapter 6, without
    correction for few groups); with a query a group it is the deviation over √Q.

    Args:
        values: (Q,) numbers.
        groups: (Q,) which group each is of.

    Raises:
        ValueError: If the two are not of one length, or there is but one group.

    Example:
        >>> round(cluster_standard_error([1, 1, 0, 0], [0, 0, 1, 1]), 4), cluster_standard_error([1, 0], [5, 7])
        (0.3536, 0.3535533905932738)
    """
    numbers, codes = _grouped(values, groups)
    sums, _ = _by_group(numbers - numbers.mean(), codes)
    return math.sqrt(float((sums**2).sum())) / len(numbers)


def _grouped(values: npt.ArrayLike, groups: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return values, and their groups numbered from 0."""
    numbers = np.asarray(values, dtype=np.float64)
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    if numbers.ndim != 1 or codes.shape != numbers.shape:
        raise ValueError(f"`groups` must be of the same queries as `values`, {numbers.shape}, got {codes.shape}")
    if len(names) < 2:
        raise ValueError(f"`groups` must be two groups or more, got {len(names)}: the spread between them is asked for")
    return numbers, codes


def _by_group(
    values: npt.NDArray[np.float64], codes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sum of the values, and number of them, in each group."""
    return np.bincount(codes, values).astype(np.float64), np.bincount(codes).astype(np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for how many there are, so that one below α by chance is as rare as with a single one.

    The i-th smallest of m is multiplied by m − i + 1, and none is less than a smaller one's (Holm 1979, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6).

    Returns:
        The corrected values in the order given, at most 1.

    Raises:
        ValueError: If a value is no probability.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"`p_values` must be probabilities in [0, 1], got {list(p_values)}")
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    adjusted: list[float] = corrected.tolist()
    return adjusted


def queries_needed(pairs: Pairs, confidence: float = 0.95, *, power: float = 0.8, comparisons: int = 1) -> int | None:
    """Estimate how many queries would separate two classifiers that differ as these do.

    With δ the difference of accuracies and ψ the share of queries on which one alone is right, McNemar's test finds the
    difference with the given power from n = (z_{1−α/2} √ψ + z_{power} √(ψ − δ²))² / δ² queries on (Miettinen 1968,
    Biometrics 24; Connor 1987, Biometrics 43, equation 5), where α = (1 − confidence) / comparisons.

    Args:
        pairs: Of the two classifiers. Both δ and ψ are as observed: an estimate, and a rough one where few differ.
        confidence: 1 − α of the test.
        power: Probability that the test finds the difference.
        comparisons: How many tests are made together.

    Returns:
        Queries, or None where the two are equally often right: no number would separate them.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> queries_needed(Pairs(only_a=130, only_b=110, total=5000))
        23545
    """
    _check_pairs(pairs)
    differing = (pairs.only_a + pairs.only_b) / pairs.total
    needed = units_needed(pairs.difference, differing, confidence, power=power, comparisons=comparisons)
    return None if needed is None else math.ceil(needed)


def units_needed(
    mean: float, square: float, confidence: float = 0.95, *, power: float = 0.8, comparisons: int = 1
) -> float | None:
    """Estimate how many units, such as groups of queries, would tell their mean difference from 0.

    The formula of `queries_needed`, with ψ the mean of the squared differences.

    Args:
        mean: δ, of the units' differences.
        square: ψ, mean of their squares.
        confidence: As in `queries_needed`, and so are the rest.
        power: See there.
        comparisons: See there.

    Example:
        >>> round(units_needed(mean=0.004, square=0.048))
        23544
    """
    if not 0 < power < 1:
        raise ValueError(f"`power` must be in (0, 1), got {shown(power)}")
    if comparisons < 1:
        raise ValueError(f"`comparisons` must be 1 or more, got {shown(comparisons)}")
    z_alpha = _z_two_sided(confidence, comparisons)
    if mean == 0:
        return None
    spread = z_alpha * math.sqrt(square) + NormalDist().inv_cdf(power) * math.sqrt(max(0.0, square - mean**2))
    return (spread / mean) ** 2


def _z_two_sided(confidence: Any, comparisons: int = 1) -> float:
    """Tell how many standard deviations from the middle hold this share of a normal distribution."""
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), such as 0.95, got {shown(confidence)}")
    return NormalDist().inv_cdf(1 - (1 - confidence) / (2 * comparisons))


def _check_pairs(pairs: Pairs) -> None:
    if min(pairs) < 0 or pairs.total < max(1, pairs.only_a + pairs.only_b):
        raise ValueError(f"`pairs` must count queries, none of them twice, got {tuple(pairs)}")
