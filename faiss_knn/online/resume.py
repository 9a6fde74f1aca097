"""Which of the rows in a checkpoint each rank gets back."""

from collections.abc import Sequence

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
