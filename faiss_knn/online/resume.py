"""Which of the rows in a checkpoint each rank gets back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


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
    found = [checkpoint.get("state_dict", {}).get(prefix + name) for name in names]
    if any(value is None for value in found):
        return {}
    out, order, pointer, filled, counter = found
    used = len(out) if filled else int(pointer)
    return {"rows": [out[:used][order[:used].argsort()]], "totals": [int(counter)]}
