"""Groups of rows that belong together, a scene, a patient, a product: read from what the caller gives, and numbered."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn.classify.labels import as_labels_or_names, number_classes, number_names

_NEED = "a pair of arrays, the bank's groups and the queries', or the queries' alone"


def read_groups(groups: Any, n_bank: int, n_queries: int, *, leave_one_out: bool) -> tuple[Tensor | None, Tensor]:
    """Number the groups of bank rows and queries alike.

    A row of the group -1, or of a name that is missing, is a group of its own.

    Args:
        groups: (Q,) integers or names, the queries' groups; or a pair, (N,) of the bank and (Q,) of the queries. With
            leave-one-out (N,), as the bank's rows are the queries.
        n_bank: N.
        n_queries: Q.
        leave_one_out: Whether the queries are the bank's rows.

    Returns:
        (N,) int64 groups of the bank, None if they were not given, and (Q,) int64 of the queries.

    Raises:
        ValueError: If groups are not as many as rows, or neither integers nor names.

    Example:
        >>> read_groups((["a", "b", "a"], ["b", "c"]), 3, 2, leave_one_out=False)
        (tensor([0, 1, 0]), tensor([1, 2]))
    """
    if leave_one_out:
        own = _numbered([_read(groups, "`groups`", n_bank)])[0]
        return own, own
    if _is_pair(groups):
        read = [
            _read(part, f"`groups[{i}]`, of the {side},", length)
            for i, (part, side, length) in enumerate(zip(groups, ("bank", "queries"), (n_bank, n_queries), strict=True))
        ]
        if isinstance(read[0], Tensor) != isinstance(read[1], Tensor):
            raise ValueError("`groups` of bank and queries must both be integers or both be names")
        bank, queries = _numbered(read)
        return bank, queries
    return None, _numbered([_read(groups, "`groups`", n_queries)])[0]


def _is_pair(groups: Any) -> bool:
    return isinstance(groups, (tuple, list)) and len(groups) == 2 and all(hasattr(x, "__len__") for x in groups) and (
        not any(isinstance(x, (str, bytes)) for x in groups)
    )  # fmt: skip


def _read(values: Any, what: str, length: int) -> Any:
    read = as_labels_or_names(values, what, float_ids=True)
    if getattr(read, "ndim", 1) != 1 or len(read) != length:
        raise ValueError(f"{what} must be one group for each of {length} rows, got shape {tuple(read.shape)}: {_NEED}")
    return read


def _numbered(parts: list[Any]) -> list[Tensor]:
    """Number the groups, a new one for each row that has none."""
    if not isinstance(parts[0], Tensor):
        lengths = [len(part) for part in parts]
        numbers = list(torch.split(number_names(np.concatenate(parts))[1], lengths))
    else:
        parts = [part.cpu() for part in parts]
        least = min(int(part.min()) for part in parts)
        numbers = number_classes(*(torch.where(part == -1, -1, part - min(least, 0)) for part in parts))[1]
    count = max(int(part.max()) for part in numbers) + 1
    for i, part in enumerate(numbers):
        alone = part < 0
        numbers[i] = part.masked_scatter(alone, count + torch.arange(int(alone.sum()), device=part.device))
        count += int(alone.sum())
    return numbers
