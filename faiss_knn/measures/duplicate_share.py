"""The share of rows that stand more than once, bit for bit."""

import torch
from torch import Tensor

from faiss_knn.search.inputs import as_matrix


def duplicate_share(features: Tensor) -> float:
    """Return which share of the rows are copies of an earlier one: (rows − distinct rows) / rows.

    0 where all differ, near 1 where all are equal. Numbers are compared as numbers: 0.0 and −0.0 are equal.

    Args:
        features: (n, d) of any float dtype.

    Returns:
        In [0, 1); 0 without rows.

    Raises:
        ValueError: If `features` is no matrix.

    Example:
        >>> duplicate_share(torch.tensor([[1.0, 2.0], [0.0, 2.0], [1.0, 2.0], [1.0, 2.0]]))
        0.5
    """
    rows = as_matrix(features, "features")
    return (len(rows) - len(torch.unique(rows, dim=0))) / max(1, len(rows))
