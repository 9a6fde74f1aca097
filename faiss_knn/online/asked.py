"""What a validation batch asks of the bank, and which of its rows do."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from faiss_knn.online.rows import labelled, searchable


class Chosen(NamedTuple):
    """Which of a batch's B rows are searched and counted.

    A slice where it says all: to pick rows by a mask, a GPU is waited for.

    Attributes:
        highest: The highest label; -1 in an empty batch.
        skipped: How many of the sampler's own rows are not counted.
        searched: The rows that have a distance to others, (B,) bool or all.
        counted: Those that the metrics count, (B,) bool or the first ones.
    """

    highest: int
    skipped: int
    searched: Tensor | slice
    counted: Tensor | slice


def choose(queries: Tensor, labels: Tensor, own: int, *, normalized: bool) -> Chosen:
    """Look through a batch, and wait for a GPU once.

    Args:
        queries: (B, d).
        labels: (B,) or (B, C).
        own: How many leading rows are samples of their own, not a sampler's padding.
        normalized: Whether rows are compared by direction.
    """
    if len(labels) == 0:
        return Chosen(-1, 0, slice(None), slice(0))
    searched = searchable(queries, normalized)
    counted = searched & labelled(labels)
    highest = labels.amax() if labels.ndim == 1 else torch.full((), labels.shape[1] - 1, device=labels.device)
    most, found, kept = torch.stack([highest, searched.sum(), counted[:own].sum()]).tolist()
    if found < len(queries) or kept < own:
        counted[own:] = False
        return Chosen(most, own - kept, slice(None) if found == len(queries) else searched, counted)
    return Chosen(most, 0, slice(None), slice(own))


@dataclass
class Asked:
    """What a validation batch asks: (n, d) queries that can be searched, of B rows.

    Attributes:
        queries: The rows of `searched`.
        labels: (B,) or (B, C).
        searched: As in `Chosen`.
        counted: As in `Chosen`.
        ids: (B,) sample ids, if asked for.
        place: Where the predictions go.
        loader: Number of the dataloader.
    """

    queries: Tensor
    labels: Tensor
    searched: Tensor | slice
    counted: Tensor | slice
    ids: Tensor | None
    place: MutableMapping[str, Any] | None
    loader: int

    def counted_of(self, new: Tensor) -> Tensor:
        """Return those of the counted rows that `new` (B,) bool holds too, (B,) bool."""
        new = new.to(self.labels.device)
        return new if isinstance(self.counted, slice) else self.counted & new

    def among_searched(self, rows: Tensor | slice) -> Tensor | slice:
        """Return rows that were searched, by their place among those that were."""
        return rows if isinstance(self.searched, slice) else rows[self.searched]  # type: ignore[index]
