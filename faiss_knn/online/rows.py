"""Rows as they come out of a network: their shape, and which of them can be searched."""

import torch
from torch import Tensor

from faiss_knn.classify.labels import as_labels, is_labelled, is_soft

__all__ = ["class_labels", "flat_rows", "labelled", "searchable"]

labelled = is_labelled

_BLOCK_ELEMENTS = 1 << 22  # of temporaries while a bank is looked through


def flat_rows(values: Tensor) -> Tensor:
    """View (n, ...) as (n, d); a 1-D tensor as (n, 1)."""
    return values.unsqueeze(1) if values.ndim == 1 else values.flatten(1)


def searchable(rows: Tensor, normalized: bool) -> Tensor:
    """Tell which rows have a distance to others.

    Args:
        rows: (n, d) of any float dtype.
        normalized: Whether rows are compared by direction, which a zero row does not have.

    Returns:
        (n,) bool: False for rows with a value that float32 does not hold as a finite number, and for such zero rows.
    """
    parts = torch.split(rows, max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1])))
    finite = torch.cat([part.float().isfinite().all(dim=1) for part in parts])
    return finite & torch.cat([part.float().any(dim=1) for part in parts]) if normalized else finite


def class_labels(values: Tensor, what: str) -> Tensor:
    """Return (n,) int64 class ids, or (n, C) integer multi-hot labels, from what a batch holds: see `as_labels`.

    Lightning casts float labels with the batch, so whole numbers in floats are class ids here.
    """
    labels = as_labels(values, what, float_ids=True)
    if is_soft(labels):
        raise ValueError(f"{what} must hold class ids or 0/1 labels, got {values.dtype} with fractions or NaN")
    return labels
