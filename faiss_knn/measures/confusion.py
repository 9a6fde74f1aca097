"""Which classes are taken for which."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class ConfusedPairs(NamedTuple):
    """Pairs of classes, the one that is confused most often first; of equals by class number.

    Attributes:
        labels: (p,) classes.
        predictions: (p,) what they were taken for.
        counts: (p,) how often.
        shares: (p,) in which share of the class's rows.
    """

    labels: Ids
    predictions: Ids
    counts: Ids
    shares: npt.NDArray[np.float64]


def confused_pairs(labels: Ids, predictions: Ids, num_classes: int) -> ConfusedPairs:
    """Count the rows of each class that were taken for another, pair by pair.

    Args:
        labels: (n,) class numbers, -1 where unknown.
        predictions: (n,) class numbers, -1 where there is none: such a row counts in its class but in no pair.
        num_classes: C; memory is O(C) and the pairs that occur, never C × C.

    Example:
        >>> pairs = confused_pairs(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 0, 1]), 2)
        >>> pairs.labels.tolist(), pairs.predictions.tolist(), pairs.counts.tolist(), pairs.shares.round(2).tolist()
        ([1, 0], [0, 1], [2, 1], [0.67, 0.5])
    """
    rows = np.bincount(labels[labels >= 0], minlength=num_classes)
    wrong = (labels != predictions) & (labels >= 0) & (predictions >= 0)
    keys, counts = np.unique(labels[wrong] * num_classes + predictions[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    keys, counts = keys[order], counts[order]
    of = keys // max(1, num_classes)
    return ConfusedPairs(of, keys % max(1, num_classes), counts, counts / rows[of])
