"""Recall of an index: which share of the exact neighbours it found."""

import torch
from torch import Tensor


def recalls(distances: Tensor, indices: Tensor, exact_distances: Tensor, exact_indices: Tensor) -> tuple[float, float]:
    """Count the exact neighbours that an index found, by distance and by id.

    By distance a neighbour counts if it is no farther than the last exact one (to a relative 1e-5, for indexes that
    keep float32 distances), so that another row of the same distance is no miss. The tuning of an index has only ids,
    and needs the share of each query to tell how sure it is: its own count is `recall_by_query` in
    search/engines/recall_sample.py.

    Args:
        distances: (Q, k) found, inf where missing.
        indices: (Q, k) found, -1 where missing.
        exact_distances: (Q, k) ascending.
        exact_indices: (Q, k), -1 where there are fewer.

    Returns:
        Two shares of all exact neighbours: counted by distance, and by id.

    Raises:
        ValueError: If a row is found twice by one query: neither count would mean anything.

    Example:
        >>> distances = torch.tensor([[0.1, 0.2]])
        >>> recalls(distances, torch.tensor([[4, 7]]), distances, torch.tensor([[4, 5]]))
        (1.0, 0.5)
    """
    ordered = indices.sort(dim=1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("the index returned a row twice for one query: its recall cannot be measured")
    there = exact_indices >= 0
    last = exact_distances.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
    near = (distances <= last + 1e-5 * last.abs()) & (indices >= 0)
    both = torch.cat([indices, exact_indices], dim=1).sort(dim=1).values  # what both have stands side by side
    same = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum()
    total = int(there.sum())
    return (float(near.sum()) / total, int(same) / total) if total else (1.0, 1.0)
