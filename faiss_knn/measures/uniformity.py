"""Uniformity: how evenly features cover the unit sphere."""

import torch
from torch import Tensor

from faiss_knn.measures.alignment import on_sphere

_BLOCK = 1 << 22  # pairs measured at once


def uniformity(features: Tensor, *, t: float = 2.0) -> float:
    """Return the logarithm of the mean Gaussian potential of all pairs of rows, on the unit sphere.

    Wang and Isola 2020, arXiv 2005.10242, section 4.1: log E exp(−t ‖f(x) − f(y)‖²). Lower is more uniform; 0 where
    all features are in one point. O(n²·d): give it a sample.

    Args:
        features: (n, d) of any float dtype, n at least 2; divided by their lengths here.
        t: Sharpness of the potential; the paper's experiments take 2.

    Returns:
        In [−4t, 0].

    Raises:
        ValueError: If there are fewer than two rows, or a row is zero or not finite.

    Example:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])), 4)
        -4.3963
    """
    rows = on_sphere(features, "features")
    if len(rows) < 2:
        raise ValueError(f"`features` must have two rows or more, to make pairs, got {len(rows)}")
    size = max(1, _BLOCK // len(rows))
    total = 0.0
    for start in range(0, len(rows), size):
        cosines = rows[start : start + size] @ rows.T
        potential = torch.exp(t * (2 * cosines - 2).clamp(max=0.0))  # of unit vectors, ‖a − b‖² = 2 − 2 cos
        potential.diagonal(start).zero_()  # each row with itself
        total += float(potential.sum())
    return float(torch.tensor(total / (len(rows) * (len(rows) - 1)), dtype=torch.float64).log())
