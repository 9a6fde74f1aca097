"""What of a queue's rows a checkpoint holds, and which of them each rank gets back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from faiss_knn.distributed import all_gather_object, gather_to, rank_and_size
from faiss_knn.online.ring import RingBuffer


def own_rows(ring: RingBuffer, end: int | None = None) -> tuple[Tensor, int]:
    """Return this rank's rows, and how many there ever were.

    Args:
        ring: Where they are kept.
        end: Number of the first row that is too new; None: none is.
    """
    total = ring.total if end is None else min(ring.total, end)
    return ring.latest(until=total), total


def rows_of_all_ranks(ring: RingBuffer, end: int | None = None) -> tuple[list[Tensor] | None, list[int]]:
    """Return what a checkpoint holds, one tensor per rank, on rank zero alone; and how many there ever were.

    All ranks must call it together. `end`: as in `own_rows`.
    """
    rows, total = own_rows(ring, end)
    return gather_to(rows), all_gather_object(total)


def put_back(ring: RingBuffer, saved: Sequence[Tensor], totals: Sequence[int], title: str) -> None:
    """Fill a ring with this rank's part of what a checkpoint holds: see `rows_of_rank`.

    Args:
        ring: Gets the newest rows that fit.
        saved: The rows of each rank that wrote.
        totals: How many each of them had ever had.
        title: What a warning begins with, where the ranks of before have rows for more than fit.
    """
    rank, size = rank_and_size()
    rows = rows_of_rank(saved, rank, size)
    ring.replace(rows if len(rows) else None, total=total_of_rank(totals, rank, size))
    if len(rows) > ring.length and len(saved) != size and rank == 0:
        logger.warning(
            f"{title}: the checkpoint of {len(saved)} ranks has {len(rows):,} rows for each of "
            f"{size}, of which the last {ring.length:,} fit: raise queue_length to keep them"
        )


def rows_of_rank(saved: Sequence[Tensor], rank: int, size: int) -> Tensor:
    """Deal the rows that `len(saved)` ranks wrote out to `size` ranks.

    As many ranks as before get their own rows back. Otherwise all rows are dealt out in turn from the newest on, so
    that each rank gets as many as another (give or take one), no row is lost or doubled, and the queues of features
    and labels stay row for row the same samples.

    Args:
        saved: The rows of each rank that wrote, oldest first.
        rank: Who asks.
        size: The ranks there are now.

    Returns:
        The rank's rows, oldest first.

    Example:
        >>> rows_of_rank([torch.tensor([1, 2, 3]), torch.tensor([11, 12, 13])], 0, 1)
        tensor([11,  1, 12,  2, 13,  3])
    """
    if len(saved) == size:
        return saved[rank]
    filled = [rows for rows in saved if len(rows)]
    if not filled:
        return saved[0]
    ages = torch.cat([torch.arange(len(rows) - 1, -1, -1, device=rows.device) for rows in filled])
    newest_first = ages.argsort(stable=True)
    return torch.cat(filled)[newest_first[rank::size].flip(0)]


def total_of_rank(totals: Sequence[int], rank: int, size: int) -> int:
    """Number the rows that `rows_of_rank` dealt out, so that keys which were saved together end with the same number.

    Args:
        totals: How many rows each rank that wrote had ever had; empty where it is not known.
        rank: Who asks.
        size: The ranks there are now.
    """
    return totals[rank] if len(totals) == size else sum(totals)


def rows_of_stable_pretraining(checkpoint: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Read the rows of a key, oldest first, that stable-pretraining's queue left among a checkpoint's weights.

    Its buffers hold rank zero's rows. Lightning loads the weights before it asks callbacks, so a module without such
    buffers needs `strict_loading = False`.

    Returns:
        "rows", of one rank, and "totals", how many there ever were; empty if there are none.
    """
    prefix = f"callbacks_modules.ordered_queue_{key}."
    names = ("out", "order_indices", "pointer", "filled", "global_counter")
    states = [checkpoint.get("state_dict", {}).get(prefix + name) for name in names]
    if any(value is None for value in states):
        return {}
    out, order, pointer, filled, counter = states
    used = len(out) if filled else int(pointer)
    return {"rows": [out[:used][order[:used].argsort()]], "totals": [int(counter)]}
