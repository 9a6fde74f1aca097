"""Rows that are equal bit for bit: one of them is searched for, the others follow it."""

from typing import Self

import torch
from torch import Tensor

from faiss_knn.search.engines.rerank import nearest
from faiss_knn.search.stored_rows import StoredRows

_FEW = 4  # copies that the further candidates of a search absorb
_EXPANDED = 1 << 20  # neighbours expanded at once


class Duplicates:
    """Groups of equal rows.

    Args:
        members: (N,) all row numbers, group by group, each group in order.
        starts: (N,) bool, where in `members` a group begins.

    Example:
        >>> duplicates = Duplicates(torch.tensor([0, 2, 1]), torch.tensor([True, False, True]))
        >>> duplicates.later  # rows that follow another
        tensor([2])
    """

    def __init__(self, members: Tensor, starts: Tensor) -> None:
        begin = starts.nonzero()[:, 0]
        first = members[begin]
        self._members = members
        self._is_later = torch.ones_like(starts)
        self._is_later[first] = False
        self.later = self._is_later.nonzero()[:, 0]
        self._starts, self._counts = torch.zeros_like(members), torch.zeros_like(members)
        self._starts[first] = begin
        self._counts[first] = begin.diff(append=begin.new_full((1,), len(members)))

    @property
    def bytes(self) -> int:
        """Size of what is kept of the groups."""
        return sum(part.nbytes for part in (self._is_later, self.later, self._members, self._counts, self._starts))

    @classmethod
    def among(cls, rows: StoredRows) -> Self | None:
        """Group the rows of a bank; None where no row has so many copies that a search would notice."""
        keys = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        for start, block in rows.blocks():
            keys[start : start + len(block)] = _fingerprints(block)
        keys, order = keys.sort(stable=True)
        if not (keys[_FEW:] == keys[:-_FEW]).any():
            return None
        starts = torch.cat([keys.new_ones(1, dtype=torch.bool), keys[1:] != keys[:-1]])
        del keys
        _split_where_unequal(rows, order, starts)
        return cls(order, starts)

    def mask_copies(self, ids: Tensor) -> Tensor:
        """Replace every id (of any shape) that is not its group's first by -1."""
        return ids.masked_fill((ids >= 0) & self._is_later[ids.clamp(min=0)], -1)

    def expand(self, distances: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Let each first row be followed by its copies, and return the k nearest, (B, min(k, found)).

        Args:
            distances: (B, m) float64, of first rows alone.
            ids: (B, m), the nearest m by (distance, id), all of them or at least k.
            k: How many.
        """
        counts = torch.where(ids < 0, 0, self._counts[ids.clamp(min=0)]).clamp(max=k)
        copies = max(1, int(counts.max())) if counts.numel() else 1
        step = max(1, _EXPANDED // max(1, copies * ids.shape[1]))
        parts = [
            self._expanded(distances[start : start + step], ids[start : start + step], copies, k)
            for start in range(0, max(1, len(ids)), step)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _expanded(self, distances: Tensor, ids: Tensor, copies: int, k: int) -> tuple[Tensor, Tensor]:
        known = ids.clamp(min=0)[:, :, None]
        nth = torch.arange(copies, device=ids.device)
        there = (nth < self._counts[known]) & (ids[:, :, None] >= 0)
        members = self._members[(self._starts[known] + nth).clamp(max=len(self._members) - 1)]
        all_ids = torch.where(there, members, -1).flatten(1)
        all_distances = torch.where(there, distances[:, :, None], torch.inf).flatten(1)
        return nearest(all_distances, all_ids, k)


def _fingerprints(block: Tensor) -> Tensor:
    """Hash rows (n, d) to (n,) int64: equal rows mostly to equal keys, others rarely."""
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randn(block.shape[1], 2, generator=generator, dtype=torch.float32, device="cpu").to(block.device)
    return (block.float() @ weights).view(torch.int64)[:, 0]


def _split_where_unequal(rows: StoredRows, order: Tensor, starts: Tensor) -> None:
    """Begin a new group at every row that differs from the one before it, in place."""
    doubtful = (~starts).nonzero()[:, 0]
    for part in torch.split(doubtful, rows.block_rows):
        starts[part] = (rows.take(order[part]) != rows.take(order[part - 1])).any(1)
