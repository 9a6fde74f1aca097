"""Exact neighbours in one pass over a bank: block by block, with all queries at hand and a list of each kept."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from faiss_knn.offline.lazy_rows import RowSource, read_rows, spans
from faiss_knn.offline.search import BANK_BLOCK_BYTES, QUERY_BLOCK, Span, is_plain
from faiss_knn.search.distance import Distance, get_distance
from faiss_knn.search.engines.rerank import Neighbors, nearest
from faiss_knn.search.index import KNNIndex
from faiss_knn.search.inputs import as_matrix, check_comparable, is_memmap


class Bank:
    """Rows that are searched exactly, an index over one block of them at a time.

    Rows that lie in memory are one block. Distances are those of the rows as they are given: float64 stays float64, so
    that what is found does not depend on how the bank is cut.

    Args:
        rows: (N, d).
        distance_metric: As in `KNNIndex`.
        span: Which of the rows; None: all.
        block_rows: Rows of a block; None: 256 MiB of them, or all where they lie in memory.
        device: Where to search; None: where the rows are.
    """

    def __init__(
        self,
        rows: RowSource,
        distance_metric: str,
        *,
        span: Span | None = None,
        block_rows: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.rows = rows
        self.distance = get_distance(distance_metric)
        self.start, self.stop = (0, len(rows)) if span is None else span
        in_memory = is_plain(rows) and not is_memmap(rows)
        block_bytes = BANK_BLOCK_BYTES // (4 * rows.shape[1])
        self.block_rows = block_rows or max(1, self.stop - self.start if in_memory else block_bytes)
        is_wide = str(rows.dtype).removeprefix("torch.") == "float64"
        storage_dtype = torch.float64 if is_wide else None
        self._index = KNNIndex("flat", distance_metric=distance_metric, device=device, storage_dtype=storage_dtype)
        self._indexed: Span | None = None

    def blocks(self, begin: int) -> Iterator[tuple[Span, KNNIndex]]:
        """Yield the rows of each block from row `begin` on, and an index over them, which the next block takes over.

        Raises:
            ValueError: If a row is not finite or, under cosine, zero.
        """
        waiting = [(begin + a, begin + b) for a, b in spans(self.stop - begin, self.block_rows)]
        if waiting == [self._indexed]:
            yield waiting[0], self._index
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self._read, *span) for span in waiting[:1]]
            for span, following in zip_longest(waiting, waiting[1:]):
                self._build(ahead.pop().result(), span[0])
                self._indexed = span
                if following is not None:  # only now: a thread that reads would keep the threads that build waiting
                    ahead.append(reader.submit(self._read, *following))
                yield span, self._index

    def _read(self, start: int, stop: int) -> Any:
        if is_plain(self.rows) and not is_memmap(self.rows):
            return self.rows[start:stop]
        block = read_rows(self.rows, start, stop)
        return np.array(block) if is_memmap(block) else block

    def _build(self, block: Any, start: int) -> None:
        try:
            self._index.build(block)
        except ValueError:
            check_rows(block, self.distance, "features", start)  # the index counts from its own first row
            raise


class Keeper(Protocol):
    """Keeps what was found so far where it outlives the process."""

    def load(self, first: int) -> tuple[int, Neighbors] | None:
        """Return up to which row the bank was searched for the queries from `first` on, and what was found there."""

    def save(self, first: int, searched: int, neighbors: Neighbors) -> None:
        """Keep what was found for the queries from `first` on, in the bank's rows up to `searched`."""


def find_nearest(
    bank: Bank,
    queries: RowSource,
    k: int,
    *,
    argument: str = "queries",
    keeper: Keeper | None = None,
    watch: Callable[[Span, Span, KNNIndex], None] | None = None,
    progress: bool | None = False,
) -> Neighbors:
    """Find each query's k nearest rows in one pass over the bank.

    Args:
        bank: What to search.
        queries: (Q, d); those that are not read from memory or a mapped file are held as a whole.
        k: How many.
        argument: What errors call the queries.
        keeper: Where what was found is kept block by block, and found again by a later run; None: nowhere.
        watch: Called with a span of queries, a block's span and the index over it, once for each pair of them.
        progress: Show a bar; None: if stderr is a terminal.

    Returns:
        (Q, min(k, rows searched)) by (distance, index): float64 distances, of "squared_euclidean" their roots, and
        int64 row numbers, where the bank's rows are.

    Raises:
        ValueError: If a row or query is not finite or, under cosine, zero.
    """
    query_rows = queries if is_plain(queries) else read_rows(queries)
    depth = min(k, bank.stop - bank.start)
    parts = [_Part(query_rows, span, bank, depth, keeper) for span in spans(len(query_rows), QUERY_BLOCK)]
    for part in parts:
        if part.searched < bank.stop:
            check_rows(read_rows(query_rows, *part.span), bank.distance, argument, part.span[0])
    begin = min(part.searched for part in parts)
    with _bar(progress, len(query_rows) * (bank.stop - bank.start)) as bar:
        bar.update(sum(len(part) * (part.searched - bank.start) for part in parts))
        for (start, stop), index in bank.blocks(begin):
            for part in parts:
                if part.searched <= start:
                    part.search(index, start, stop)
                    if watch is not None:
                        watch(part.span, (start, stop), index)
                    bar.update(len(part) * (stop - start))
    distances, indices = zip(*(part.found for part in parts), strict=True)
    return Neighbors(torch.cat(distances), torch.cat(indices))


def check_rows(block: Any, distance: Distance, argument: str, start: int) -> None:
    """Check rows (n, d), the first of which is number `start`.

    Raises:
        ValueError: If one is not finite or, under cosine, zero; it names the first ones.
    """
    check_comparable(as_matrix(block, argument), argument, normalized=distance.normalized, start=start)


class _Part:
    """Some of the queries, and what was found for them in the rows searched so far."""

    def __init__(self, queries: Any, span: Span, bank: Bank, k: int, keeper: Keeper | None) -> None:
        self.queries, self.span, self.k, self.keeper = queries, span, k, keeper
        piece = None if keeper is None else keeper.load(span[0])
        device = "cpu" if not isinstance(bank.rows, Tensor) else bank.rows.device
        nothing = torch.empty(len(self), 0, dtype=torch.float64, device=device)
        self.searched, self.found = (bank.start, Neighbors(nothing, nothing.long())) if piece is None else piece

    def __len__(self) -> int:
        return self.span[1] - self.span[0]

    def search(self, index: KNNIndex, start: int, stop: int) -> None:
        """Search rows [start, stop), over which the index is, and keep the nearest of all so far."""
        distances, indices = index._nearest(read_rows(self.queries, *self.span), self.k)
        distances = torch.cat([self.found.distances, distances.to(self.found.distances.device)], 1)
        indices = torch.cat([self.found.indices, indices.to(self.found.indices.device) + start], 1)
        self.found = Neighbors(*nearest(distances, indices, min(self.k, indices.shape[1])))
        self.searched = stop
        if self.keeper is not None:
            self.keeper.save(self.span[0], stop, self.found)


def _bar(progress: bool | None, total: int) -> Any:
    disabled = None if progress is None else not progress
    return tqdm(total=total, desc="pairs", unit="", unit_scale=True, disable=disabled, file=sys.stderr, leave=False)
