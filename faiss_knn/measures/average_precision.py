"""Average precision of scores: of each class over the queries, and of all pairs together."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def average_precisions(scores: Tensor, truth: Tensor) -> Tensor:
    """Compute each class's average precision over the queries.

    It is the sum over the score's thresholds of precision times the recall that the threshold adds. Queries of equal
    score form one threshold, as in scikit-learn's `average_precision_score`.

    Args:
        scores: (Q, C), the higher the surer that the query has the class.
        truth: (Q, C) 0 and 1.

    Returns:
        (C,) float64 on the CPU, NaN for a class that no query has.

    Example:
        >>> average_precisions(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[1], [0], [1]]))
        tensor([0.8333], dtype=torch.float64)
    """
    columns = zip(scores.T.cpu().numpy(), truth.T.cpu().numpy(), strict=True)
    return torch.tensor([_average_precision(s, t) for s, t in columns], dtype=torch.float64, device="cpu")


def micro_average_precision(scores: npt.ArrayLike, matches: npt.ArrayLike, total: int) -> float:
    """Compute the average precision of the pairs of all queries in one list: µAP, as copy detection counts it.

    Pairs are ordered by their scores over all queries, so that scores must mean the same for each; queries without any
    true pair count, by their false ones. It is Σ_i p(i) · Δr(i), with precision p(i) among the first i pairs and recall
    of all `total` true ones (Douze et al. 2021, "The 2021 Image Similarity Dataset and Challenge", arXiv 2106.09672).
    Pairs of equal score are one threshold, as in scikit-learn; that challenge's code puts the false ones of them first.

    Args:
        scores: (P,) of the pairs that were found, the higher the surer.
        matches: (P,) bool, whether each is true.
        total: How many true pairs there are, with those that were not found.

    Returns:
        In [0, 1]; NaN if there are no true pairs.

    Raises:
        ValueError: If more pairs are true than `total`, or lengths differ.

    Example:
        >>> micro_average_precision([0.9, 0.8, 0.5], [True, False, True], total=4)
        0.41666666666666663
    """
    values, truth = np.asarray(scores), np.asarray(matches, dtype=np.bool_)
    if values.ndim != 1 or values.shape != truth.shape:
        raise ValueError(f"`matches` must be of the same pairs as `scores`, {values.shape}, got {truth.shape}")
    true_listed = int(truth.sum())
    if total < true_listed:
        raise ValueError(f"`total` must count all true pairs, at least the {true_listed} that were found, got {total}")
    if not total:
        return float("nan")
    return _average_precision(values, truth) * true_listed / total if true_listed else 0.0


def _average_precision(scores: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # the last query of each threshold
    hits = np.cumsum(truth[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])
