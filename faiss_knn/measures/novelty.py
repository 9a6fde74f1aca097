"""How well a score tells outliers from ordinary rows."""

import numpy as np
import numpy.typing as npt

from faiss_knn.search.inputs import shown

_ACCEPTED = 0.95  # of the ordinary rows


def detection(scores: npt.NDArray[np.floating], is_outlier: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Compare outliers' scores with those of ordinary rows.

    The score that belongs here is the distance to the k-th neighbour on normalised features (Sun et al. 2022,
    "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML, equation 1), but any will do of which outliers
    have the larger ones.

    Args:
        scores: (Q,) larger for what is farther from everything known.
        is_outlier: (Q,) bool.

    Returns:
        `auroc`, the probability that an outlier scores above an ordinary row, ties counting half; and `fpr95`, the
        share of outliers that pass where the smallest threshold passes 95 % of the ordinary rows: those that score at
        most that.

    Raises:
        ValueError: If the shapes differ, or there are no outliers or nothing else.

    Example:
        >>> detection(np.array([0.1, 0.2, 0.3, 0.9]), np.array([False, False, True, True]))
        {'auroc': 1.0, 'fpr95': 0.0}
    """
    if scores.shape != is_outlier.shape or scores.ndim != 1:
        raise ValueError(f"`is_outlier` must have an entry for each of the scores, got {shown(is_outlier)}")
    if is_outlier.all() or not is_outlier.any():
        raise ValueError(f"`is_outlier` must hold both outliers and others, got {int(is_outlier.sum())} outliers")
    ordinary, outliers = np.sort(scores[~is_outlier]), scores[is_outlier]
    below = np.searchsorted(ordinary, outliers, side="left")
    equal = np.searchsorted(ordinary, outliers, side="right") - below
    threshold = ordinary[int(np.ceil(_ACCEPTED * len(ordinary))) - 1]
    return {
        "auroc": float((below + equal / 2).mean() / len(ordinary)),
        "fpr95": float((outliers <= threshold).mean()),
    }
