"""One index per rank, searched by all ranks together, and the rows that lie beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from faiss_knn.distributed import (
    BLOCK_BYTES,
    Group,
    RowsHeader,
    all_gather_object,
    all_or_none,
    comm_device,
    common_header,
    gather_known,
    rank_and_size,
    send_rows,
    swap_rows,
)
from faiss_knn.search.engines.rerank import nearest
from faiss_knn.search.index import KNNIndex, Neighbors


class ShardedRows:
    """Rows that stay with the rank that has them, fetched by their global index: the labels beside a `ShardedIndex`.

    Args:
        rows: (n_r, …) of this rank, in the order of its indexed rows; None from a rank that has none.
        group: The ranks that share them; None for all.

    Raises:
        ValueError: On every rank, if no rank has rows or they differ in dtype or trailing shape.

    Example:
        >>> import torch
        >>> ShardedRows(torch.tensor([10, 11, 12])).take(torch.tensor([[2, 0], [1, -1]]))
        tensor([[12, 10],
                [11,  0]])
    """

    def __init__(self, rows: Tensor | None, group: Group = None) -> None:
        with all_or_none(group):
            kind, self.counts = common_header(all_gather_object(RowsHeader.of(rows), group))
            if kind is None:
                raise ValueError("`rows` must have rows on at least one rank, got none on all.")
            self.rows = (
                rows if rows is not None and len(rows) else torch.empty(0, *kind.shape, dtype=kind.dtype, device="cpu")
            )
        self.group = group

    def take(self, indices: Tensor) -> Tensor:
        """Fetch the rows of global indices, which all ranks ask for together, each its own.

        Args:
            indices: (B_r, k) int64; -1 where a neighbour is missing.

        Returns:
            (B_r, k, …) on the device of `indices`, zero where the index is -1.

        Raises:
            Exception: On every rank, if it fails on one (`raise_together`).
        """
        with all_or_none(self.group):
            return self._take(indices)

    def _take(self, indices: Tensor) -> Tensor:
        ends = torch.tensor(self.counts, device=indices.device).cumsum(0)
        flat = indices.flatten()
        places = (flat >= 0).nonzero()[:, 0]
        owners, order = torch.bucketize(flat[places], ends, right=True).sort(stable=True)
        places = places[order]
        local_rows = flat[places] - (ends - torch.tensor(self.counts, device=ends.device))[owners]
        sent = owners.bincount(minlength=len(ends)).tolist()
        requested, received = send_rows(local_rows, sent, group=self.group)
        rows = swap_rows(self.rows[requested.to(self.rows.device)], received, sent, self.group)
        in_place = rows.new_zeros(len(flat), *rows.shape[1:], device=indices.device)
        in_place[places] = rows.to(indices.device)
        return in_place.view(*indices.shape, *rows.shape[1:])


class ShardedIndex:
    """One index per rank over that rank's own rows, searched by all ranks together.

    Queries travel to every shard, each shard answers with its k nearest, and the rank that asked merges the answers.
    For an exact index the result is the one of a single `KNNIndex` over all rows in rank order: same indices, bitwise
    the same distances. A rank holds its shard, O(ranks · B · k) for the answers and one block of queries.

    Args:
        index: This rank's index, not yet built, with the same options on every rank.
        group: The ranks that share the search; None for all.
        block_bytes: The most bytes of queries held at once (at least one rank's batch).

    Example:
        >>> import torch
        >>> shards = ShardedIndex(KNNIndex()).build(torch.eye(3))
        >>> shards.search(torch.eye(3), k=1).indices.tolist()
        [[0], [1], [2]]
    """

    def __init__(self, index: KNNIndex, group: Group = None, *, block_bytes: int = BLOCK_BYTES) -> None:
        self.index = index
        self.group = group
        self.block_bytes = block_bytes
        self.counts: list[int] = []
        self.dim: int | None = None

    def __len__(self) -> int:
        """Return the number of rows over all ranks."""
        return sum(self.counts)

    def build(self, features: Tensor | None, *, expected_k: int | None = None, is_built: bool = False) -> ShardedIndex:
        """Index this rank's rows; global indices count the ranks' rows in rank order.

        Args:
            features: (n_r, d) of this rank; None or no rows from a rank that has none.
            expected_k: See `KNNIndex.build`.
            is_built: Whether this rank's index holds them already.

        Raises:
            ValueError: On every rank, if no rank has rows, if d or the dtype differs, or if any rank cannot build.
        """
        with all_or_none(self.group):
            kind, counts = common_header(all_gather_object(RowsHeader.of(features), self.group))
            if kind is None or not any(counts):
                raise ValueError(
                    "`features` must have rows on at least one rank, got none on all: fill the bank first."
                )
            (dim,) = _matrix_shape(kind, "features")
            if features is not None and len(features) and not is_built:
                self.index.build(features, **({} if expected_k is None else {"expected_k": expected_k}))
        self.counts, self.dim = counts, dim
        return self

    def search(self, queries: Tensor | None, k: int) -> Neighbors:
        """Find the k nearest of all ranks' rows for this rank's queries.

        Args:
            queries: (B_r, d) of this rank; B_r may differ between ranks. None or no rows from a rank that only
                serves the others.
            k: Neighbours per query, the same on every rank.

        Returns:
            `Neighbors` of (B_r, min(k, len(self))) on the queries' device, with global indices.

        Raises:
            ValueError: On every rank, if `build` was not called, if k differs between ranks, if queries do not have
                the bank's dimension, or if any shard refuses them.
            Exception: On every rank, if it fails on one (`raise_together`).
        """
        with all_or_none(self.group):
            return self._search(queries, k)

    def _search(self, queries: Tensor | None, k: int) -> Neighbors:
        headers, ks = zip(*all_gather_object((RowsHeader.of(queries), k), self.group), strict=True)
        kind, counts = common_header(headers)
        self._check(kind, ks)
        device = comm_device(self.group) if queries is None else queries.device
        k = min(k, len(self))
        answers = self._answer(queries, counts, kind, k, device)
        rank, size = rank_and_size(self.group)
        answers = swap_rows(answers, counts, [counts[rank]] * size, self.group)
        return self.index._reported(_merge(answers.view(size, counts[rank], 2, k), k)).single()

    def _check(self, kind: RowsHeader | None, ks: Sequence[int]) -> None:
        if self.dim is None:
            raise ValueError("`search` needs a bank: call `build` on every rank first.")
        if len(set(ks)) > 1 or ks[0] < 1:
            raise ValueError(f"`k` must be positive and the same on every rank, got {list(ks)}.")
        if kind is not None and _matrix_shape(kind, "queries") != (self.dim,):
            raise ValueError(f"`queries` must have the bank's dimension {self.dim}, got rows of shape {kind.shape}.")

    def _answer(
        self, queries: Tensor | None, counts: list[int], kind: RowsHeader | None, k: int, device: torch.device
    ) -> Tensor:
        """Answer the queries of all ranks from this shard: (Q, 2, k) int64, float64 distances beside indices."""
        rank, _ = rank_and_size(self.group)
        answers = torch.empty(sum(counts), 2, k, dtype=torch.int64, device=device)
        answers[:, 0] = torch.tensor(torch.inf, dtype=torch.float64, device="cpu").view(torch.int64)
        answers[:, 1] = -1
        start = 0
        for turn in _turns(counts, kind.row_bytes if kind else 0, self.block_bytes):
            block = gather_known(queries, turn, kind, device, self.group, self.block_bytes)
            if self.counts[rank] and len(block):
                self._search_own(block, k, answers[start : start + len(block)])
            start += len(block)
        return answers

    def _search_own(self, queries: Tensor, k: int, out: Tensor) -> None:
        """Search this rank's shard, and write what it finds under global indices."""
        rank, _ = rank_and_size(self.group)
        distances, indices = self.index._nearest(queries, k)
        width = indices.shape[1]  # the shard may have fewer than k rows
        out[:, 0, :width] = distances.view(torch.int64)
        out[:, 1, :width] = torch.where(indices < 0, indices, indices + sum(self.counts[:rank]))


def _turns(counts: list[int], row_bytes: int, block_bytes: int) -> Iterator[list[int]]:
    """Split the ranks into turns whose queries fit the block: each turn's counts, 0 for the ranks not in it."""
    turn, held = [0] * len(counts), 0
    for rank, count in enumerate(counts):
        if held and held + count * row_bytes > block_bytes:
            yield turn
            turn, held = [0] * len(counts), 0
        turn[rank], held = count, held + count * row_bytes
    yield turn


def _merge(answers: Tensor, k: int) -> Neighbors:
    """Merge the ranks' lists, (ranks, B, 2, k), to the k nearest of each query, by (distance, index)."""
    distances, indices = (part.transpose(0, 1).flatten(1) for part in answers.unbind(2))
    return Neighbors(*nearest(distances.contiguous().view(torch.float64), indices, k))


def _matrix_shape(kind: RowsHeader, name: str) -> tuple[int, ...]:
    if len(kind.shape) != 1:
        raise ValueError(f"`{name}` must be (N, d), got rows of shape {kind.shape}.")
    return kind.shape
