"""One pass over a bank's scores: the best few of each query, without an (B, N) array and without sorting it."""

from collections.abc import Callable

import torch
from torch import Tensor

_GROUP = 16  # rows whose maximum is compared before any of them is
_SCORES = 15 << 20  # of one block: 30 MiB in bfloat16, below what malloc always maps anew
_MIN_BLOCK, _MAX_BLOCK = 1 << 13, 1 << 17
_GPU_SCORES, _GPU_MAX_BLOCK = 1 << 26, 1 << 20  # there a block costs a dozen kernel launches, and selection is parallel


def block_rows(queries: int, kept: int, device: torch.device) -> int:
    """Return how many rows to score at once: enough that selection pays per row, not per block; a multiple of 16."""
    scores, most = (_GPU_SCORES, _GPU_MAX_BLOCK) if device.type == "cuda" else (_SCORES, _MAX_BLOCK)
    wanted = max(scores // max(1, queries), 4 * _GROUP * kept, _MIN_BLOCK)
    return min(wanted, most) // _GROUP * _GROUP


def best_scores(
    scores: Callable[[int, int], Tensor], queries: int, rows: int, kept: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each query.

    Args:
        scores: scores(start, stop) gives (B, stop - start) scores of a block of rows.
        queries: B.
        rows: N.
        kept: How many to keep of each query, at most N.
        device: Where the scores are.

    Returns:
        (B, kept) scores and (B, kept) int64 row numbers, in no order. Equal scores are kept by chance.
    """
    step = block_rows(queries, kept, device)
    best: Tensor | None = None
    ids = torch.empty(0)
    for start in range(0, rows, step):
        block = scores(start, min(start + step, rows))
        found, columns = _best_columns(block, kept)
        del block  # before the next is made
        columns += start
        if best is None:
            best, ids = found, columns
        else:
            best, ids = torch.cat([best, found], 1), torch.cat([ids, columns], 1)
            best, order = best.topk(min(kept, best.shape[1]), dim=1, sorted=False)
            ids = ids.gather(1, order)
    assert best is not None
    return best, ids


def _best_columns(block: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the `kept` highest of each row of `block` (B, n) and their columns.

    The best `kept` lie in the `kept` groups of the highest maxima, and maxima of strided columns cost a fifth of a
    pass, a sort of all columns two.
    """
    width = block.shape[1] // _GROUP
    if width < 2 * kept:
        found, columns = block.topk(min(kept, block.shape[1]), dim=1, sorted=False)
        return found, columns
    grouped = torch.unflatten(block[:, : width * _GROUP], 1, (_GROUP, width))
    groups = _best_columns(grouped.amax(1), kept)[1]
    columns = (groups[:, :, None] + torch.arange(0, width * _GROUP, width, device=block.device)).flatten(1)
    if block.shape[1] > width * _GROUP:
        rest = torch.arange(width * _GROUP, block.shape[1], device=block.device)
        columns = torch.cat([columns, rest.expand(len(block), -1)], 1)
    found, order = block.gather(1, columns).topk(kept, dim=1, sorted=False)
    return found, columns.gather(1, order)


def reaching(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return (query, column) numbers, (P,) each, of the scores (B, n) that reach `least` (B,) float64."""
    query, column = (scores.double() >= least[:, None]).nonzero().unbind(1)
    return query, column
