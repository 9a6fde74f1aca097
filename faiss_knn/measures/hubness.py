"""Hubness: rows that are near to very many others, and rows that are near to none."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from faiss_knn.search.inputs import as_count, as_integer, shown

_BLOCK = 1 << 22  # neighbours that are counted at once


class Hubness(NamedTuple):
    """How evenly a bank's rows occur among the neighbours of queries.

    Attributes:
        skewness: Of the rows' k-occurrences: 0 where they are spread evenly to both sides, above 1 with clear hubs.
        antihub_share: Share of the rows that are no query's neighbour, in [0, 1].
        hubs: (h,) int64 rows that occur most often, the most frequent first, the lowest number among equals.
        hub_counts: (h,) int64, in how many lists each of them is.
        hub_share: Share of all neighbours found that these hubs are, in [0, 1].
    """

    skewness: float
    antihub_share: float
    hubs: Tensor
    hub_counts: Tensor
    hub_share: float


def k_occurrences(indices: Tensor | np.ndarray, rows: int) -> Tensor:
    """Count in how many lists of neighbours each row of the bank is, N_k in Radovanović et al. 2010.

    Args:
        indices: (B, k) integer row numbers, -1 where a neighbour is missing. Where the bank's rows are the queries,
            without each row itself.
        rows: N, of the bank.

    Returns:
        (N,) int64 on the device of `indices`. Memory O(N), beside a block of lists.

    Raises:
        ValueError: If `indices` is no integer matrix, or names a row outside the bank.

    Example:
        >>> k_occurrences(torch.tensor([[1, 2], [2, 0], [1, -1]]), 4)
        tensor([1, 2, 2, 0])
    """
    indices, rows = _lists(indices), as_count(rows, "`rows`")
    counts = torch.zeros(rows, dtype=torch.int64, device=indices.device)
    for block in torch.split(indices, max(1, _BLOCK // max(1, indices.shape[1]))):
        listed = block[block >= 0]
        if len(listed) and int(listed.max()) >= rows:
            raise ValueError(f"`indices` must be rows of a bank of {rows}, or -1, got {int(listed.max())}")
        counts += torch.bincount(listed, minlength=rows)
    return counts


def skewness(counts: Tensor) -> float:
    """Return the skewness E[(x − μ)³] / σ³ of counts (N,); 0 where all are equal.

    Of k-occurrences it is the measure of hubness of Radovanović, Nanopoulos and Ivanović 2010, "Hubs in Space", JMLR
    11, section 3.

    Example:
        >>> round(skewness(torch.tensor([0, 0, 0, 4])), 4)
        1.1547
    """
    centred = counts.double() - counts.double().mean()
    deviation = centred.square().mean().sqrt()
    return float((centred / deviation).pow(3).mean()) if deviation > 0 else 0.0


def hubness(indices: Tensor | np.ndarray, rows: int, *, worst: int = 10) -> Hubness:
    """Tell from lists of neighbours how much a few rows of the bank crowd out the others.

    Args:
        indices: See `k_occurrences`.
        rows: N, of the bank.
        worst: How many hubs are named at most.

    Raises:
        ValueError: As `k_occurrences`, or for a negative `worst`.

    Example:
        >>> found = hubness(torch.tensor([[1], [0], [1], [1]]), 4, worst=1)
        >>> found.hubs.tolist(), found.hub_counts.tolist(), found.hub_share, found.antihub_share
        ([1], [3], 0.75, 0.5)
    """
    worst = as_integer(worst, "`worst`")
    if worst < 0:
        raise ValueError(f"`worst` must be how many hubs are named, 0 or more, got {worst}")
    counts = k_occurrences(indices, rows)
    ordered = counts.sort(descending=True, stable=True)
    hub_counts, hubs = ordered.values[:worst], ordered.indices[:worst]
    is_hub = hub_counts > 0
    return Hubness(
        skewness(counts),
        float((counts == 0).sum()) / rows,
        hubs[is_hub],
        hub_counts[is_hub],
        float(hub_counts.sum()) / max(1, int(counts.sum())),
    )


def _lists(indices: Tensor | np.ndarray) -> Tensor:
    """Check lists of neighbours, and return them as an int64 tensor (B, k)."""
    tensor = torch.from_numpy(indices) if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu" else indices
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"`indices` must be a (B, k) integer array of neighbours, got {shown(indices)}")
    return tensor.long()
