"""Rows as they come out of a network: their shape, and which of them can be searched."""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22  # of temporaries while a bank is looked through


def flat_rows(values: Tensor) -> Tensor:
    """View (n, ...) as (n, d); a 1-D tensor as (n, 1)."""
    return values.unsqueeze(1) if values.ndim == 1 else values.flatten(1)


def searchable(rows: Tensor, directions: bool) -> Tensor:
    """Tell which rows have a distance to others.

    Args:
        rows: (n, d) of any float dtype.
        directions: Whether rows are compared by direction, which a zero row does not have.

    Returns:
        (n,) bool: False for rows with a value that float32 does not hold as a finite number, and for such zero rows.
    """
    parts = torch.split(rows, max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1])))
    finite = torch.cat([part.float().isfinite().all(dim=1) for part in parts])
    return finite & torch.cat([part.float().any(dim=1) for part in parts]) if directions else finite


def class_labels(values: Tensor, what: str) -> Tensor:
    """Return (n,) int64 class ids, or (n, C) integer multi-hot labels, from what a batch holds.

    Args:
        values: (n,), (n, 1) or (n, C); floats must be whole numbers.
        what: Names the values in the error.

    Raises:
        ValueError: For other shapes, and for floats that are no labels.
    """
    if values.ndim > 2:
        raise ValueError(f"{what} must be (n,) class ids or (n, C) multi-hot labels, got shape {tuple(values.shape)}")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.is_floating_point():
        if not (values == values.round()).all():
            raise ValueError(f"{what} must hold class ids or 0/1 labels, got {values.dtype} with fractions or NaN")
        values = values.long()
    return values.long() if values.ndim == 1 else values


def labelled(labels: Tensor) -> Tensor:
    """Tell which rows of (n,) or (n, C) labels hold no -1."""
    return labels >= 0 if labels.ndim == 1 else (labels >= 0).all(dim=1)
