"""Collapse: features that say nothing, because a network gives the same to all samples."""

from torch import Tensor

from faiss_knn.search.inputs import as_matrix

_LEAST_ROWS, _LEAST_WIDTH = 32, 8  # below them rows that lie along a line are nothing to wonder at
_EQUAL = 1e-5  # of the rows' length: a spread below it
_THIN = 1e-3  # of the spread: what is beside the one direction


def collapse_of(features: Tensor) -> str | None:
    """Tell whether features are collapsed: to one point, or to one direction.

    In O(n·d), without a decomposition: if all rows lie along a line, they lie along that to the farthest from the mean.

    Args:
        features: (n, d) finite numbers of any float dtype.

    Returns:
        What is wrong, to stand after "the features are": "all equal", where the rows differ from their mean by less
        than 10⁻⁵ of their length, or "all along one direction", where less than 10⁻³ of their spread is beside one
        line. None where neither is, for fewer than 32 rows, or fewer than 8 numbers in each.

    Example:
        >>> import torch
        >>> collapse_of(torch.ones(100, 16)), collapse_of(torch.randn(100, 16))
        ('all equal', None)
        >>> collapse_of(torch.randn(100, 1) * torch.ones(16) + 3)
        'all along one direction'
    """
    rows = as_matrix(features, "features").double()
    if rows.shape[0] < _LEAST_ROWS or rows.shape[1] < _LEAST_WIDTH:
        return None
    rows = rows / rows.abs().max().clamp(min=2.0**-1000)  # so that no square leaves float64
    centred = rows - rows.mean(0)
    lengths = centred.square().sum(1)
    if float(lengths.sum()) <= _EQUAL**2 * float(rows.square().sum()):
        return "all equal"
    line = centred[lengths.argmax()] / lengths.max().sqrt()
    beside = (centred - (centred @ line)[:, None] * line).square().sum()
    return "all along one direction" if float(beside) <= _THIN**2 * float(lengths.sum()) else None
