"""What searches cost: a model, for choices that shall not depend on what else the machine does meanwhile.

Seconds are those of one thread. Only the rate of the matrix product is measured, once per process; the other figures
are those of a modern core.
"""

import torch

from faiss_knn.search.engines.products import multiply_add_seconds

_PAIR, _PAIR_VALUE = 260e-9, 2e-9  # seconds per distance that is measured, and per value of it
_SCORE = 1.5e-9  # seconds per score compared


def seconds_per_candidate(dim: int) -> float:
    """Return what the exact distance of one pair of rows (d,) takes."""
    return _PAIR + dim * _PAIR_VALUE


def search_cost(rows: int, dim: int, scanned: int, candidates: int, dtype: torch.dtype) -> float:
    """Model the time of one query in a batch: a scan of products and an exact measurement of candidates.

    Args:
        rows: N.
        dim: d.
        scanned: Width of the scanned copy.
        candidates: How many rows are measured.
        dtype: Of the scanned copy.

    Returns:
        Seconds, in proportion to those of other choices.
    """
    return rows * (scanned * multiply_add_seconds(dtype) + _SCORE) + candidates * seconds_per_candidate(dim)
