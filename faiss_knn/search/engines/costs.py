"""What searches cost: a model, for choices that shall not depend on what else the machine does meanwhile.

Seconds are those of one thread. Only the rate of the matrix product is measured, once per process; the other figures
are those of a modern core.
"""

import math

import torch

from faiss_knn.search.engines.matrix_product import multiply_add_seconds

_PAIR, _PAIR_VALUE = 260e-9, 2e-9  # seconds per distance that is measured, and per value of it
_QUICK = 0.6  # of that, where distances are measured in float32
_KEPT = 3e-7  # seconds per score that is kept of the first rows
# Seconds per score compared: the first rows' highest are sorted out, of the others those alone that reach the least.
_FIRST_ROWS, _FIRST_SCORE, _SCORE = 1 << 14, 1.4e-9, 0.6e-9


def seconds_per_candidate(dim: int) -> float:
    """Return what the exact distance of one pair of rows (d,) takes."""
    return _PAIR + dim * _PAIR_VALUE


def seconds_per_kept(rows: int) -> float:
    """Return what a score that a scan of so many rows keeps for a query takes: sorted out, and those that it displaces.

    Of n rows in a random order the best m change m · ln(n / first) times after the first ones.
    """
    return _KEPT * (1 + math.log(max(1.0, rows / _FIRST_ROWS)))


def search_cost(
    rows: int, dim: int, scanned: int, candidates: int, dtype: torch.dtype, *, is_quick: bool = False
) -> float:
    """Model the time of one query in a batch: a scan of products and a measurement of candidates.

    Args:
        rows: N.
        dim: d.
        scanned: Width of the scanned copy.
        candidates: How many rows are measured.
        dtype: Of the scanned copy.
        is_quick: Whether they are measured in float32, as by an approximate index.

    Returns:
        Seconds of a thread, in proportion to those of other choices.
    """
    first = min(rows, _FIRST_ROWS)
    compared = first * _FIRST_SCORE + (rows - first) * _SCORE
    measured = candidates * seconds_per_candidate(dim) * (_QUICK if is_quick else 1.0)
    return rows * scanned * multiply_add_seconds(dtype) + compared + measured
