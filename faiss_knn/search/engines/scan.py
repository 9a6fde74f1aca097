"""One pass over a bank's scores: the best few of each query, without an (N, B) array and without sorting it."""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.search.engines.bounds import Bounds, PreparedQueries
from faiss_knn.search.engines.selection import highest, needs_no_wait
from faiss_knn.search.engines.workers import run_alone, run_apart, run_together, threads_for
from faiss_knn.search.stored_rows import StoredRows

T = TypeVar("T")
Places = npt.NDArray[np.int64]

_GROUP = 8  # rows whose maximum is compared before any of them is
_PER_KEPT = 64  # rows of a block for each that is kept: selection shall cost per row, not per block
# Of scores at once: on a CPU what stays in cache between product and comparison. There the block of the first rows is
# larger, for the least score that counts to be high from the start.
_BLOCK_BYTES, _MIN_BLOCK, _MAX_BLOCK = 2 << 20, 1 << 10, 1 << 16
_FIRST_BYTES, _FIRST_BLOCK = 16 << 20, 1 << 14
_GPU_BLOCK_BYTES, _GPU_MIN_BLOCK, _GPU_MAX_BLOCK = 1 << 27, 1 << 13, 1 << 20  # a block costs a dozen kernel launches
_CROWDED = 8  # one in so many groups reaching the least score: sorting the block is cheaper
_LEAST_WORK = 1 << 24  # products from which on a search goes to threads of our own
_LEAST_PART = 192  # queries for a thread of their own: of fewer the product would read the bank too often
_ALONE = 1 << 20  # scores from which on threads share them
_AT_ONCE = 4  # times as many scores as are kept of a query, compared with them at once
_PENDING = 2  # for each score kept, how many wait for being compared with them


def run_search(search: Callable[[], T], rows: StoredRows, queries: int) -> T:
    """Run a search for so many queries on threads of our own where it is worth going there."""
    is_long = len(rows) * rows.dim * queries >= _LEAST_WORK
    return run_alone(search) if rows.device.type == "cpu" and is_long else search()


def search_in_parts(
    search: Callable[[Tensor], tuple[Tensor, Tensor]], queries: Tensor, k: int, most: int, *, together: bool = False
) -> tuple[Tensor, Tensor]:
    """Search many queries in parts: each thread has parts of its own where they are large enough, else they share each.

    Args:
        search: Returns (b, k) float64 distances and (b, k) int64 ids of queries (b, d).
        queries: (B, d).
        k: Neighbours of each.
        most: How many queries of a part.
        together: Whether threads share each part however large: where every part reads the bank anew.
    """
    # Made first: among the parts' own, short-lived memory it would keep the heap from shrinking.
    distances = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    ids = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    threads = threads_for(len(queries), 2 * _LEAST_PART)
    if together or len(queries) < threads * _LEAST_PART:
        threads = 1
    parts = threads * max(1, math.ceil(len(queries) / (threads * most)))
    step = max(1, math.ceil(len(queries) / parts))
    starts = iter(range(0, len(queries), step))  # one for all threads

    def search_parts() -> None:
        for start in starts:
            part = slice(start, start + step)
            distances[part], ids[part] = search(queries[part])

    if threads > 1:
        run_apart([search_parts] * threads)
    else:
        search_parts()
    return distances, ids


def best_scores(bounds: Bounds, prepared: PreparedQueries, rows: int, kept: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each query.

    Args:
        bounds: Gives the scores of a block of rows.
        prepared: B queries as they compare them.
        rows: N.
        kept: How many to keep of each query, at most N.

    Returns:
        (B, kept) scores and (B, kept) int64 row numbers, in no order. Equal scores are kept by chance.
    """
    if needs_no_wait(prepared.vectors.device):
        return _best_above_a_threshold(bounds, prepared, rows, kept)
    step = _gpu_block_rows(prepared.vectors, kept)
    best, ids = _best_rows(bounds.scores(prepared, 0, min(step, rows)), kept)
    for start in range(step, rows, step):
        block = bounds.scores(prepared, start, min(start + step, rows))
        scores, numbers = _best_rows(block, kept)
        del block  # before the next is made
        best, ids = _best_of(torch.cat([best, scores], 1), torch.cat([ids, numbers + start], 1), kept)
    return best, ids


def _gpu_block_rows(vectors: Tensor, kept: int) -> int:
    size = _GPU_BLOCK_BYTES // (vectors.element_size() * max(1, len(vectors)))
    return min(max(size, _PER_KEPT * kept, _GPU_MIN_BLOCK), _GPU_MAX_BLOCK)


def _best_above_a_threshold(bounds: Bounds, prepared: PreparedQueries, rows: int, kept: int) -> tuple[Tensor, Tensor]:
    """Scan in blocks that stay in cache, and look at those scores alone that reach the lowest of the best so far."""
    row_bytes = bounds.score_dtype.itemsize * max(1, len(prepared.vectors))
    first = min(rows, max(_PER_KEPT * kept, min(_FIRST_BLOCK, _FIRST_BYTES // row_bytes)))
    threads = threads_for(rows * len(prepared.vectors), _ALONE)
    step = min(_BLOCK_BYTES // row_bytes, math.ceil((rows - first) / threads))
    step = min(max(math.ceil(step / _GROUP) * _GROUP, _MIN_BLOCK), _MAX_BLOCK)
    found = _best_of_first(bounds, prepared, first, kept, threads)
    least = found[0].amin(1)  # what one thread found, all go by
    starts = iter(range(first, rows, step))  # one for all threads: who is done takes the next

    def scan() -> tuple[Tensor, Tensor]:
        best = _Best(torch.full_like(found[0], _lowest(found[0].dtype)), torch.full_like(found[1], -1), least)
        buffer = _scores(bounds, prepared, min(step, rows - first))
        for start in starts:
            stop = min(start + step, rows)
            best.add(bounds.scores(prepared, start, stop, out=buffer[: stop - start]), start)
        return best.merged()

    parts = [found, *run_together([scan] * min(threads, -(-(rows - first) // step)))]
    return _best_of(torch.cat([scores for scores, _ in parts], 1), torch.cat([ids for _, ids in parts], 1), kept)


def _best_of_first(
    bounds: Bounds, prepared: PreparedQueries, rows: int, kept: int, threads: int
) -> tuple[Tensor, Tensor]:
    """Return the best of the first `rows` rows: threads divide the rows for the product, and then the queries."""
    block = _scores(bounds, prepared, rows)

    def fill(start: int, stop: int) -> None:
        scores = bounds.scores(prepared, start, stop, out=block[start:stop])
        if scores.data_ptr() != block[start:stop].data_ptr():
            block[start:stop] = scores

    run_together([partial(fill, start, stop) for start, stop in _spans(rows, threads)])
    parts = run_together(
        [partial(_best_rows, block[:, start:stop], kept) for start, stop in _spans(block.shape[1], threads)]
    )
    return torch.cat([scores for scores, _ in parts]), torch.cat([ids for _, ids in parts])


def _scores(bounds: Bounds, prepared: PreparedQueries, rows: int) -> Tensor:
    """Return an array for the scores of so many rows, (rows, B)."""
    return prepared.vectors.new_empty(rows, len(prepared.vectors), dtype=bounds.score_dtype)


def _lowest(dtype: torch.dtype) -> float:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _spans(length: int, parts: int) -> list[tuple[int, int]]:
    """Cut 0 … length into so many pieces of about one size, none empty."""
    step = max(1, -(-length // parts))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class _Best:
    """The highest scores so far, and further ones that reached the lowest of them and wait for being compared.

    Args:
        scores: (B, kept), kept of each query.
        ids: (B, kept) their rows.
        least: (B,) what further ones must reach: raised here, and by others that look through other rows. (Where two
            raise it at once, the lower may stay for a while, which costs time alone.)
    """

    def __init__(self, scores: Tensor, ids: Tensor, least: Tensor) -> None:
        self._least = least
        self._waiting: list[tuple[Tensor, Places]] = []  # scores, and places in an (N, B) array of all scores
        self._count = 0
        self._set(scores, ids)

    def add(self, block: Tensor, start: int) -> None:
        """Take the scores (n, B) of rows from number `start` on into account."""
        queries = block.shape[1]
        height = len(block) // _GROUP  # of a group's rows each is so far from the next
        groups = torch.unflatten(block[: height * _GROUP], 0, (_GROUP, height))
        places = np.flatnonzero(_reached(groups, self._least))
        if len(places) * _CROWDED > height * queries:
            self._add_crowded(block, start)
            return
        if len(places):
            of_group = np.arange(0, height * _GROUP * queries, height * queries)
            self._wait(block, places[:, None] + of_group, places % queries, start)
        if len(block) > height * _GROUP:
            rest = block[height * _GROUP :] >= self._least.to(block.dtype)
            places = np.flatnonzero(rest.numpy()) + height * _GROUP * queries
            self._wait(block, places[:, None], places % queries, start)

    def _wait(self, block: Tensor, places: Places, query: Places, start: int) -> None:
        """Keep those scores of a block, at places (P, g) of query (P,), that reach the query's least."""
        scores = torch.take(block, torch.from_numpy(places.ravel()))
        reached = np.flatnonzero(_comparable(scores) >= self._comparable_least[query].repeat(places.shape[1]))
        if len(reached):
            chosen = places.ravel()[reached] + start * block.shape[1]
            self._waiting.append((scores[torch.from_numpy(reached)], chosen))
            self._count += len(reached)
            if self._count > _PENDING * self._ids.numel():
                self._merge()

    def _add_crowded(self, block: Tensor, start: int) -> None:
        self._merge()
        scores, numbers = _best_rows(block, min(self._ids.shape[1], len(block)))
        self._keep(scores, numbers + start)

    def _merge(self) -> None:
        """Compare what waits with the best, of each query so many at a time that memory stays bounded."""
        if not self._count:
            return
        scores = torch.cat([scores for scores, _ in self._waiting])
        places = np.concatenate([places for _, places in self._waiting])
        self._waiting, self._count = [], 0
        queries, width = self._ids.shape
        query = places % queries
        # Numbers of 16 bits numpy sorts by their digits.
        order = np.argsort(query.astype(np.uint16) if queries <= 1 << 16 else query, kind="stable")
        counts = np.bincount(query, minlength=queries)
        nth = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        span = _AT_ONCE * width
        for turn in range(0, int(counts.max()), span):
            now = order if counts.max() <= span else order[(nth >= turn) & (nth < turn + span)]
            taken = (counts - turn).clip(0, span)
            there = torch.from_numpy(np.arange(taken.max()) < taken[:, None])
            further = scores.new_full(there.shape, _lowest(scores.dtype))
            further_ids = torch.full(there.shape, -1, device="cpu")
            further[there] = scores[torch.from_numpy(now)]
            further_ids[there] = torch.from_numpy(places[now] // queries)
            self._keep(further, further_ids)

    def _keep(self, scores: Tensor, ids: Tensor) -> None:
        self._set(*_best_of(torch.cat([self._scores, scores], 1), torch.cat([self._ids, ids], 1), self._ids.shape[1]))

    def _set(self, scores: Tensor, ids: Tensor) -> None:
        self._scores, self._ids = scores, ids
        torch.maximum(self._least, scores.amin(1), out=self._least)
        self._comparable_least = _comparable(self._least)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return the (B, kept) highest scores and their rows."""
        self._merge()
        return self._scores, self._ids


def _comparable(scores: Tensor) -> npt.NDArray[np.floating]:
    """Return scores as numpy, which has no bfloat16."""
    values: npt.NDArray[np.floating] = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()
    return values


def _reached(groups: Tensor, least: Tensor) -> npt.NDArray[np.bool_]:
    """Tell which maxima over the first axis of (g, n, B) scores reach `least` (B,): (n, B) bool."""
    if groups.dtype == torch.bfloat16 and bool((least > 0).all()):
        # Positive numbers of 16 bits have the order of their bits, and come after those of negative ones.
        groups, least = groups.view(torch.int16), least.view(torch.int16)
    reached: npt.NDArray[np.bool_] = (groups.amax(0) >= least).numpy()
    return reached


def _best_of(scores: Tensor, ids: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    scores, order = highest(scores, min(kept, scores.shape[1]))
    return scores, ids.gather(1, order)


def _best_rows(block: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the `kept` highest of each column of `block` (n, B), (B, kept), and their rows."""
    if block.dtype == torch.bfloat16 and needs_no_wait(block.device):
        bits, rows = _best_by_groups(block.view(torch.int16), kept)
        if bool((bits > 0).all()):  # above all others: only negative numbers come in the reverse order of their bits
            return bits.view(torch.bfloat16), rows
    return _best_by_groups(block, kept)


def _best_by_groups(block: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Do so by groups: the highest lie in the `kept` groups of the highest maxima.

    Maxima cost a pass over the block, a sort of it several.
    """
    height = len(block) // _GROUP
    if height < 2 * kept:
        return highest(block.T.contiguous(), min(kept, len(block)))
    groups = _best_by_groups(torch.unflatten(block[: height * _GROUP], 0, (_GROUP, height)).amax(0), kept)[1]
    numbers = (groups[:, :, None] + torch.arange(0, height * _GROUP, height, device=block.device)).flatten(1)
    if len(block) > height * _GROUP:
        rest = torch.arange(height * _GROUP, len(block), device=block.device)
        numbers = torch.cat([numbers, rest.expand(len(numbers), -1)], 1)
    found, order = highest(block.T.gather(1, numbers), kept)
    return found, numbers.gather(1, order)


def rows_at_least(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return (query, row) numbers, (P,) each by query, of the scores (n, B) that reach `least` (B,) float64."""
    query, row = (scores.T.double() >= least[:, None]).nonzero().unbind(1)
    return query, row
