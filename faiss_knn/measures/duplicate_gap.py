"""The gap in a distribution of distances below which pairs are near-duplicates."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

ROUNDING = 1e-5  # of the ordinary length: what is nearer is a copy, and how near says nothing
_LEAST_RATIO = 1.25  # of the gap's ends
_CHANCE = 0.01  # that a distribution without near-duplicates has such a gap
_TAIL = 200  # lengths just above a gap that tell how the ordinary ones thin out


def duplicate_gap(lengths: Floats, ordinary: float) -> float | None:
    """Find the length that parts near-duplicates from ordinary neighbours; None if nothing parts them.

    Without near-duplicates the number of pairs nearer than x falls like x^m, m the correlation dimension (Grassberger
    and Procaccia 1983). Of the logarithms of the n smallest such lengths, the spacing that has i pairs below it is then
    exponential with mean 1 / (m · i) (Rényi 1953), so that a gap by a factor r has the probability r^(-m · i). The
    highest gap of a factor of 1.25 or more that chance makes in 1 of 100 data sets at most is taken; m is Hill's
    estimate from the 200 lengths above it. Everything below the gap is a near-duplicate.

    Args:
        lengths: Distances between rows and their neighbours, in any order, as lengths (the ends of a vector, not its
            square). Each pair may occur twice, from both its ends.
        ordinary: Length at which rows have ordinary neighbours, such as the median of the k-th neighbours'.

    Returns:
        The geometric mean of the gap's ends.

    Example:
        >>> ordinary = np.linspace(1, 2, 100)
        >>> duplicate_gap(np.concatenate([np.full(6, 0.01), ordinary]), 1.8)
        0.1
        >>> duplicate_gap(ordinary, 1.8) is None
        True
    """
    near = np.sort(np.maximum(lengths[lengths < ordinary], ordinary * ROUNDING).astype(np.float64))
    for place in np.flatnonzero(near[1:] >= _LEAST_RATIO * near[:-1])[::-1]:
        above = near[place + 1 :][:_TAIL]
        pairs = (place + 1) / 2
        if _log_chance(near[place], above, pairs) < np.log(_CHANCE / (pairs + 1) ** 2):  # adds up over all places
            return float(np.sqrt(near[place] * near[place + 1]))
    return None


def _log_chance(below: float, above: Floats, pairs: float) -> float:
    """Compute the logarithm of the chance of a gap from `below` to the first of `above`, with so many pairs below."""
    spread = np.log(above[-1] / above[:-1]).mean() if len(above) > 1 else 0.0
    if len(above) < 5 or spread == 0:
        return 0.0  # too few to tell how they thin out
    return -float(np.log(above[0] / below)) * pairs / float(spread)
