"""Classes that are taken for another, with some of the rows that were."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from faiss_knn.measures.confusion import confused_pairs
from faiss_knn.offline.report.findings import Confusion

Ids = npt.NDArray[np.int64]

_EXAMPLES = 8  # rows of a pair


def confusions_between(
    labels: Ids, answers: Ids, numbers: Ids, num_classes: int, class_of: Callable[[int], Any]
) -> list[Confusion]:
    """List pairs of classes, the most frequent first.

    Args:
        labels: (n,) class numbers, -1 where unknown.
        answers: (n,) what the rows were taken for, -1 for nothing.
        numbers: (n,) the rows' numbers as they were given.
        num_classes: C.
        class_of: What to call a class number.

    Example:
        >>> pair, = confusions_between(np.array([0, 0]), np.array([0, 1]), np.array([7, 9]), 2, "ab".__getitem__)
        >>> pair.label, pair.predicted, pair.count, pair.share, pair.rows
        ('a', 'b', 1, 0.5, (9,))
    """
    pairs = confused_pairs(labels, answers, num_classes)
    examples = _examples(labels, answers, numbers, num_classes)
    return [
        Confusion(
            class_of(int(label)), class_of(int(answer)), int(count), float(share),
            examples[int(label) * num_classes + int(answer)],
        )
        for label, answer, count, share in zip(*pairs, strict=True)
    ]  # fmt: skip


def _examples(labels: Ids, answers: Ids, numbers: Ids, classes: int) -> dict[int, tuple[int, ...]]:
    """Return the first rows of each confused pair."""
    wrong = np.flatnonzero((labels != answers) & (labels >= 0) & (answers >= 0))
    keys = labels[wrong] * classes + answers[wrong]
    order = np.argsort(keys, kind="stable")
    unique, starts = np.unique(keys[order], return_index=True)
    ends = np.append(starts, len(order))[1:]
    return {
        int(key): tuple(int(i) for i in numbers[wrong[order[a : min(b, a + _EXAMPLES)]]])
        for key, a, b in zip(unique, starts, ends, strict=True)
    }
