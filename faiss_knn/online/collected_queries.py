"""The queries of an epoch, kept until its end, where they are searched in wide batches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from faiss_knn.online.batch import BatchQueries

_ROWS = 1 << 13  # searched at once


class CollectedBatch(NamedTuple):
    """A validation batch as it came.

    Attributes:
        batch_queries: What it asks.
        number: Its dataloader's.
        width: Classes that were known when it came, so that metrics see what they would have seen then.
    """

    batch_queries: BatchQueries
    number: int
    width: int


class CollectedQueries:
    """Batches in the order in which they came; B·d values a batch, of the features' dtype and on their device."""

    def __init__(self) -> None:
        self._batches: list[CollectedBatch] = []

    def keep(self, batch_queries: BatchQueries, number: int, width: int) -> None:
        """Copy what a batch asks: what its owner does to its tensors later changes nothing."""
        own = replace(
            batch_queries, queries=batch_queries.queries.clone(), labels=batch_queries.labels.clone(), place=None
        )
        self._batches.append(CollectedBatch(own, number, width))

    def groups(self) -> list[list[CollectedBatch]]:
        """Return the batches, those together that are searched at once."""
        groups: list[list[CollectedBatch]] = []
        rows = _ROWS
        for batch in self._batches:
            rows += len(batch.batch_queries.queries)
            if rows > _ROWS:
                groups.append([])
                rows = len(batch.batch_queries.queries)
            groups[-1].append(batch)
        return groups


def queries_of(group: list[CollectedBatch]) -> Tensor | None:
    """Return the queries (n, d) of a group; None of an empty one."""
    return torch.cat([batch.batch_queries.queries for batch in group]) if group else None


def dealt_out(neighbors: Any, group: list[CollectedBatch]) -> Iterator[tuple[CollectedBatch, Any]]:
    """Give each batch of a group the neighbours of its own queries."""
    sizes = [len(batch.batch_queries.queries) for batch in group]
    for batch, parts in zip(group, zip(*(part.split(sizes) for part in neighbors), strict=True), strict=True):
        yield batch, type(neighbors)(*parts)
