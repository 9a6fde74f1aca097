"""Rows of a bank with what is known of them."""

from typing import NamedTuple

from torch import Tensor


class LabelledRows(NamedTuple):
    """Rows of a bank: all that a rank indexes, or a sample of those of all ranks.

    Attributes:
        features: (n, d).
        labels: (n,) class ids or (n, C).
        ids: (n,) int64 sample ids on the CPU; None where they do not count or nobody asks for them.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor | None = None
