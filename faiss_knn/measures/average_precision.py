"""Average precision of scores, class by class."""

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


def _average_precision(scores: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # the last query of each threshold
    hits = np.cumsum(truth[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])
