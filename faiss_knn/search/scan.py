"""One pass over a bank's scores: the best few of each query, without an (N, B) array and without sorting it."""

import torch
from torch import Tensor

from faiss_knn.search.sketch import Asked, Sketch

_GROUP = 8  # rows whose maximum is compared before any of them is
_PER_KEPT = 64  # rows of a block for each that is kept: selection shall cost per row, not per block
_BLOCK_BYTES = 30 << 20  # of scores: below what malloc always maps anew
_MIN_BLOCK, _MAX_BLOCK = 1 << 13, 1 << 17
_GPU_BLOCK_BYTES, _GPU_MAX_BLOCK = 1 << 27, 1 << 20  # there a block costs a dozen kernel launches


def block_rows(queries: int, kept: int, item: int, device: torch.device) -> int:
    """Return how many rows to score at once, for scores of `item` bytes."""
    size, most = (_GPU_BLOCK_BYTES, _GPU_MAX_BLOCK) if device.type == "cuda" else (_BLOCK_BYTES, _MAX_BLOCK)
    return min(max(size // (item * max(1, queries)), _PER_KEPT * kept, _MIN_BLOCK), most)


def best_scores(sketch: Sketch, asked: Asked, rows: int, kept: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each query.

    Args:
        sketch: Gives the scores of a block of rows.
        asked: B queries as it compares them.
        rows: N.
        kept: How many to keep of each query, at most N.

    Returns:
        (B, kept) scores and (B, kept) int64 row numbers, in no order. Equal scores are kept by chance.
    """
    vectors = asked.vectors
    step = block_rows(len(vectors), kept, vectors.element_size(), vectors.device)
    best: Tensor | None = None
    ids = torch.empty(0)
    for start in range(0, rows, step):
        block = sketch.scores(asked, start, min(start + step, rows))
        found, numbers = _best_rows(block, kept)
        del block  # before the next is made
        numbers += start
        if best is None:
            best, ids = found, numbers
        else:
            best, ids = torch.cat([best, found], 1), torch.cat([ids, numbers], 1)
            best, order = best.topk(min(kept, best.shape[1]), dim=1, sorted=False)
            ids = ids.gather(1, order)
    assert best is not None
    return best, ids


def _best_rows(block: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the `kept` highest of each column of `block` (n, B), (B, kept), and their rows.

    They lie in the `kept` groups of the highest maxima. Maxima cost a pass over the block, a sort of it several.
    """
    height = len(block) // _GROUP
    if height < 2 * kept:
        found, numbers = block.T.contiguous().topk(min(kept, len(block)), dim=1, sorted=False)
        return found, numbers
    groups = _best_rows(torch.unflatten(block[: height * _GROUP], 0, (_GROUP, height)).amax(0), kept)[1]
    numbers = (groups[:, :, None] + torch.arange(0, height * _GROUP, height, device=block.device)).flatten(1)
    if len(block) > height * _GROUP:
        rest = torch.arange(height * _GROUP, len(block), device=block.device)
        numbers = torch.cat([numbers, rest.expand(len(numbers), -1)], 1)
    found, order = block.T.gather(1, numbers).topk(kept, dim=1, sorted=False)
    return found, numbers.gather(1, order)


def reaching(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return (query, row) numbers, (P,) each by query, of the scores (n, B) that reach `least` (B,) float64."""
    query, row = (scores.T.double() >= least[:, None]).nonzero().unbind(1)
    return query, row
