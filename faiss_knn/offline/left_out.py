"""Which bank rows a query may not find: its own, those of its group, those on a list of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Search = Callable[[Any, int], tuple[Tensor, Tensor]]

_LISTED = 1 << 22  # neighbours of the queries that are searched once more at once
_SPARE = 16  # rows that may fall out of a short list before it is searched once more


@dataclass(frozen=True)
class LeftOut:
    """For each of Q queries the rows of a bank of N that do not count as its neighbours.

    Attributes:
        own: (Q,) int64 place of the query's own row, -1 where it is not in the bank.
        bank_groups: (N,) int64 groups, all of which a query of the same one may not find; None: no groups.
        query_groups: (Q,) int64.
        listed: (L,) int64 ascending query · N + place, for each row on a query's list.
        size: N.

    Example:
        >>> left_out = LeftOut(torch.tensor([2, -1]), None, None, torch.tensor([0, 4]), size=3)
        >>> left_out.mask(torch.tensor([0, 1]), torch.tensor([[0, 1, 2], [0, 1, 2]]))
        tensor([[ True, False,  True],
                [False,  True, False]])
        >>> left_out.counts
        tensor([2, 1])
    """

    own: Tensor
    bank_groups: Tensor | None
    query_groups: Tensor | None
    listed: Tensor
    size: int

    def mask(self, queries: Tensor, indices: Tensor) -> Tensor:
        """Tell which of (B, K) places, -1 where missing, the (B,) queries may not find."""
        device = indices.device
        queries = queries.to(device)[:, None]
        is_left_out = (indices == self.own.to(device)[queries]) & (indices >= 0)
        if self.bank_groups is not None and self.query_groups is not None:
            groups = self.bank_groups.to(device)[indices.clamp(min=0)]
            is_left_out |= (groups == self.query_groups.to(device)[queries]) & (indices >= 0)
        if len(self.listed):
            listed, codes = self.listed.to(device), queries * self.size + indices
            places = torch.searchsorted(listed, codes).clamp(max=len(listed) - 1)
            is_left_out |= (listed[places] == codes) & (indices >= 0)
        return is_left_out

    @cached_property
    def counts(self) -> Tensor:
        """(Q,) how many rows of the bank each query may not find."""
        nothing = torch.zeros(max(self.size, len(self.own)), dtype=torch.int64, device="cpu")
        return self.count_alike(nothing[: self.size], nothing[: len(self.own)])

    def count_alike(self, bank_labels: Tensor, query_labels: Tensor) -> Tensor:
        """Count those of these rows (Q,) that have the query's label, from (N,) and (Q,) labels; each row once."""
        numbers = torch.arange(len(self.own), device="cpu")
        own = self.own >= 0
        single = torch.unique(torch.cat([numbers[own] * self.size + self.own[own], self.listed]))
        queries, places = single // self.size, single % self.size
        alike = bank_labels[places] == query_labels[queries]
        if self.bank_groups is None or self.query_groups is None:
            return torch.bincount(queries[alike], minlength=len(self.own))
        alike &= self.bank_groups[places] != self.query_groups[queries]  # these are counted with their group
        counts = torch.bincount(queries[alike], minlength=len(self.own))
        width = int(max(bank_labels.max(), query_labels.max())) + 1
        kinds, sizes = torch.unique(self.bank_groups * width + bank_labels, return_counts=True)
        wanted = self.query_groups * width + query_labels
        at = torch.searchsorted(kinds, wanted).clamp(max=len(kinds) - 1)
        return counts + torch.where(kinds[at] == wanted, sizes[at], 0)


def nearest_allowed(
    search: Search, queries: Any, numbers: Tensor, k: int, left_out: LeftOut, rows: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest rows of those that it may find: (B, k), (inf, -1) where there are no more.

    Lists are searched so long that some rows may fall out; where more do, longer ones, up to as many as can: what is
    left begins with the k nearest for certain.

    Args:
        search: Finds the m nearest rows of some queries: distances, ascending, and places in `rows`, -1 where missing.
        queries: (B, d) tensor or array.
        numbers: (B,) int64 which queries of `left_out` these are.
        k: How many.
        left_out: What they may not find.
        rows: Which rows of the bank are searched, [start, stop).
    """
    first, size = rows[0], rows[1] - rows[0]
    most = (k + left_out.counts[numbers]).clamp(max=size)  # a list this long is enough
    depth = min(int(most.max()), max(2 * k, k + _SPARE))
    distances, indices, enough = _allowed(*search(queries, depth), numbers, k, left_out, first)
    pending = (~enough & (most > depth)).nonzero()[:, 0]
    while len(pending):
        depth = min(int(most[pending].max()), 4 * depth)
        again = []
        for part in torch.split(pending, max(1, _LISTED // depth)):
            on_host = part if isinstance(queries, Tensor) else part.numpy()
            lists = search(queries[on_host], depth)
            near, places, enough = _allowed(*lists, numbers[part], k, left_out, first)
            target = part.to(distances.device)
            distances[target], indices[target] = near, places
            again.append(part[~enough & (most[part] > depth)])
        pending = torch.cat(again)
    return distances, indices


def _allowed(
    distances: Tensor, indices: Tensor, numbers: Tensor, k: int, left_out: LeftOut, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Take what is left out off lists, k long, and tell on the CPU whether they are as long as lists can be."""
    gone = left_out.mask(numbers, torch.where(indices < 0, -1, indices + first))
    order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    distances = distances.masked_fill(gone, float("inf")).gather(1, order)
    places = indices.masked_fill(gone, -1).gather(1, order)
    missing = k - places.shape[1]
    if missing > 0:
        distances = torch.nn.functional.pad(distances, (0, missing), value=float("inf"))
        places = torch.nn.functional.pad(places, (0, missing), value=-1)
    return distances, places, ((~gone).sum(1) >= k).cpu()
