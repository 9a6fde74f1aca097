"""Effective rank: over how many directions features spread."""

import torch
from torch import Tensor

from faiss_knn.search.inputs import as_matrix, check_finite

_EPSILON = 1e-7  # of RankMe, beside each share


def effective_rank(features: Tensor) -> float:
    """Return the exponential of the entropy of the singular values' shares.

    RankMe (Garrido et al. 2023, arXiv 2210.02885, equations 1 and 2): exp(-Σ p_k log p_k) with p_k = σ_k / Σσ + 10⁻⁷,
    of the features as they are, not centred. It is near min(n, d) where all directions are used alike, and near 1
    where all features lie along one direction, as those of a collapsed network do.

    The search is tuned by another number of directions: the participation ratio of centred rows, corrected for the size
    of its sample (`search.engines.projection`).

    Args:
        features: (n, d) of any float dtype. The paper takes 25,600 rows; of fewer the value is lower, at most n, so
            that only values of equally many rows compare. O(n·d·min(n, d)) in float64, on the features' device.

    Returns:
        In [1, min(n, d)], up to what 10⁻⁷ adds; 0 where all numbers are 0.

    Raises:
        ValueError: If `features` is no matrix of finite numbers with rows.

    Example:
        >>> round(effective_rank(torch.eye(4)), 3), round(effective_rank(torch.ones(5, 4)), 3)
        (4.0, 1.0)
    """
    rows = as_matrix(features, "features")
    if not len(rows):
        raise ValueError("`features` must have rows, got none")
    check_finite(rows, "features")
    rows = rows.double()
    largest = rows.abs().max()
    if largest == 0:
        return 0.0
    values = torch.linalg.svdvals(rows / largest)  # scaled, so that no square leaves float64
    shares = values / values.sum() + _EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))
